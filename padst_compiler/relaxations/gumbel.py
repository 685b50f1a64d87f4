"""Gumbel-Sinkhorn: full logits with noise while training, which tries more than one assignment."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from padst_compiler.relaxations.sinkhorn import SinkhornPermutation

__all__ = ["GumbelPermutation"]

_STRIDE = 2**31  # between the seeds of two draws


class GumbelPermutation(SinkhornPermutation):
    """``Sinkhorn((logits / temperature) + strength * Gumbel noise)`` (Mena et al. 2018).

    The noise is one tensor that ``resample`` draws anew, after every optimiser step where a
    controller trains the model; so one step sees one noise, forward and backward, compiled or not.
    Outside training mode there is none. ``drawn`` (seed and number of draws) is saved with the
    model, and the noise follows from it: a resumed run sees the same numbers.

    Args:
        size: the number of features.
        generator: of the start and of the noise's seed; on the CPU.
        strength: factor on the noise, whose deviation is 1.28.
        settings: as ``SinkhornPermutation`` takes them.

    Example:
        >>> soft = GumbelPermutation(8, torch.Generator().manual_seed(0))
        >>> before = soft.soft()
        >>> soft.resample()
        >>> torch.equal(before, soft.soft()), torch.equal(soft.eval().soft(), soft.eval().soft())
        (False, True)
    """

    name: ClassVar[str] = "gumbel"
    drawn: Tensor
    noise: Tensor

    def __init__(
        self, size: int, generator: torch.Generator, *, strength: float = 0.5, **settings: Any
    ) -> None:
        """Start as without noise, and draw the first."""
        super().__init__(size, generator, **settings)
        self.strength = strength
        seed = torch.randint(_STRIDE, (1,), generator=generator)
        device = self.logits.device
        self.register_buffer("drawn", torch.cat([seed, seed.new_zeros(1)]).to(device))
        self.register_buffer("noise", torch.empty(size, size, device=device), persistent=False)
        self._draw()

    def log(self) -> Tensor:
        """Return logits over temperature, with noise in training mode."""
        log = super().log()
        return log + self.strength * self.noise if self.training else log

    @torch.no_grad()
    def gaps(self) -> Tensor:
        """Return the gaps without noise: they decide when it hardens."""
        was, self.training = self.training, False
        try:
            return super().gaps()
        finally:
            self.training = was

    @torch.no_grad()
    def resample(self) -> None:
        """Draw the next noise."""
        self.drawn[1] += 1
        self._draw()

    def settings(self) -> dict[str, float]:
        """Return the number of Sinkhorn steps and the strength of the noise."""
        return super().settings() | {"strength": self.strength}

    def _draw(self) -> None:
        seed, count = self.drawn.tolist()
        own = torch.Generator().manual_seed(seed * _STRIDE + count)
        uniform = torch.rand(self.size, self.size, generator=own).clamp_min(1e-20)
        self.noise.copy_(-uniform.log().neg().clamp_min(1e-20).log())

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.drawn.is_meta:
            self._draw()
