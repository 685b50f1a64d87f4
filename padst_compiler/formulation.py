"""Formulations: the ways to run one structured operator, with what each is predicted to cost.

``kernels/`` names them, the pass ``choose_formulation`` picks one per site. Costs are predicted,
so that the same model always gets the same graph and hits the compile cache. Dense on the
materialised weight is always a candidate.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from padst_compiler.structures import Shape, Structure

__all__ = ["Candidates", "Formulation", "Geometry", "gemm", "moved"]

# Rates of one class of machine, in floating-point operations of a dense product: what a byte
# moved and an operation of a smaller product cost. Fitted to paired timings of ``kernels/block.py``
# on AVX-512 servers, 2 threads, fp32: blocks of 8 to 64, 90 %, 1 to 4096 tokens.
BYTE = 12.0
WEIGHT_READ = 12.0  # per weight of a product with few tokens: 4 to 8 on Zen 4, 15 on Xeons
CACHE = 2.0**24  # bytes that a copy may move before it leaves the cache
LAUNCH = 4.0e5  # one more kernel call, about 3 us


@dataclass(frozen=True)
class Geometry:
    """One call of a structured operator.

    ``frozen`` says that values and indices do not change between calls, so work on them is free.
    """

    structure: Structure
    shape: Shape
    kept: int
    tokens: int
    dtype: torch.dtype
    device: str
    frozen: bool

    @property
    def nnz(self) -> int:
        """Number of stored weights."""
        return round(
            self.shape.numel * (1.0 - self.structure.actual_sparsity(self.shape, self.kept))
        )

    @property
    def item(self) -> int:
        """Bytes of one number."""
        return self.dtype.itemsize


@dataclass(frozen=True)
class Formulation:
    """One way to run an operator.

    Attributes:
        name: shown in reports.
        run: takes the operator's own arguments; plain torch, traced into the graph.
        cost: predicted cost in dense floating-point operations; None where it does not apply.
        feature_major: reads and writes ``x^T``, and transposes at both ends.
    """

    name: str
    run: Callable[..., Tensor]
    cost: Callable[[Geometry], float | None]
    feature_major: bool = False


Candidates = Mapping[Any, Sequence[Formulation]]


def gemm(tokens: int, inner: int, outer: int, batch: int = 1, efficiency: float = 1.0) -> float:
    """Return the cost of ``batch`` dense products ``(tokens, inner) @ (inner, outer)``.

    A product of few tokens is bound by reading the weight, which the second term counts.
    """
    flops = 2.0 * tokens * inner * outer * batch / efficiency
    return max(flops, WEIGHT_READ * inner * outer * batch) + LAUNCH


def moved(numbers: float, item: int) -> float:
    """Return the cost of reading and writing ``numbers`` numbers once; out of cache up to 4x."""
    bytes_moved = 2.0 * numbers * item
    return BYTE * bytes_moved * min(4.0, max(1.0, bytes_moved / CACHE)) + LAUNCH
