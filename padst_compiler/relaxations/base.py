"""What block-diagonal parametrisations share: batches of small soft permutations."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor, nn

from padst_compiler.index_map import IndexMap
from padst_compiler.permutation import SoftPermutation, decode, norms, sinkhorn
from padst_compiler.relaxations.sinkhorn import balanced

__all__ = ["FactoredPermutation"]


class FactoredPermutation(SoftPermutation):
    """A product of block-diagonal soft permutations with stride shuffles between them.

    ``M = ... K^T D_2 K D_1``: ``D_1, D_3, ...`` hold ``n / b`` blocks of ``b``, ``D_2, ...`` hold
    ``b`` blocks of ``n / b``; K sends feature ``i b + j`` to ``j n / b + i``. M is a permutation
    where every block is one, so gap and penalty are those of the blocks, and each block hardens
    by itself.

    Args:
        size: the number of features, n.
        generator: of the start, on the CPU.
        block: b, which divides n.
        factors: how many D.
        temperature: of the logits.
        iterations: Sinkhorn steps.
        noise: deviation of the start's logits over temperature.
        device: of the logits.
    """

    temperature: Tensor
    default_iterations: ClassVar[int] = 10

    def __init__(
        self,
        size: int,
        generator: torch.Generator,
        *,
        block: int,
        factors: int,
        temperature: float = 0.1,
        iterations: int | None = None,
        noise: float = 1.0,
        device: torch.device | None = None,
    ) -> None:
        """Start near uniform in every block."""
        super().__init__()
        self.size, self.block, self.factors = size, block, factors
        self.iterations = self.default_iterations if iterations is None else iterations
        sizes = [block if at % 2 == 0 else size // block for at in range(factors)]
        starts = [torch.randn(size // b, b, b, generator=generator) for b in sizes]
        scale = noise * temperature
        self.logits = nn.ParameterList([nn.Parameter((s * scale).to(device)) for s in starts])
        self.register_buffer("temperature", torch.tensor(float(temperature), device=device))

    def blocks(self) -> list[Tensor]:
        """Return the soft blocks of each factor, ``(n / b, b, b)``, the first applied first."""
        temperature = self.temperature.float()
        return [sinkhorn(logits.float() / temperature, self.iterations) for logits in self.logits]

    def forward(self, x: Tensor) -> Tensor:
        """Return ``M x`` along the last axis, factor by factor."""
        y = x.unflatten(-1, (-1, self.block))
        for at, blocks in enumerate(self.blocks()):
            y = y.transpose(-1, -2) if at % 2 else y
            y = torch.einsum("...gi,goi->...go", y, blocks.to(x.dtype))
            y = y.transpose(-1, -2) if at % 2 else y
        result: Tensor = y.flatten(-2)
        return result

    def soft(self) -> Tensor:
        """Return M, float32."""
        eye = torch.eye(self.size, device=self.temperature.device)
        with torch.autocast(eye.device.type, enabled=False):
            return self.forward(eye).t()

    def norms(self) -> tuple[Tensor, Tensor]:
        """Return l1 and l2 of every row and column of every block, factor after factor."""
        each = [norms(blocks) for blocks in self.blocks()]
        return torch.cat([l1 for l1, _ in each]), torch.cat([l2 for _, l2 in each])

    @torch.no_grad()
    def sharpen(self, factor: float) -> None:
        """Multiply the logits of all blocks."""
        for logits in self.logits:
            logits.mul_(factor)

    @torch.no_grad()
    def anneal(self, factor: float) -> None:
        """Divide the temperature by ``factor``."""
        self.temperature.div_(factor)

    @torch.no_grad()
    def balance(self) -> None:
        """Shift the logits of every block until its columns sum to 1 as well."""
        temperature = self.temperature.float()
        for logits in self.logits:
            logits.copy_(balanced(logits.float() / temperature) * temperature)

    @torch.no_grad()
    def harden(self) -> IndexMap:
        """Decode every block by itself, and compose the factors."""
        perm = torch.arange(self.size).view(-1, self.block)
        for at, logits in enumerate(self.logits):
            soft = sinkhorn(logits.double() / self.temperature.double(), 4 * self.iterations)
            maps = torch.stack([decode(block).perm for block in soft])
            perm = perm.t() if at % 2 else perm
            perm = perm.gather(1, maps)
            perm = perm.t() if at % 2 else perm
        return IndexMap.of(perm.flatten())

    def settings(self) -> dict[str, float]:
        """Return the block, the number of factors and of Sinkhorn steps."""
        return {"block": self.block, "factors": self.factors, "iterations": self.iterations}
