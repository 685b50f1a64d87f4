"""A contest: one call of a structured operator, and the formulations that are timed on it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from padst_compiler.formulation import Formulation, Geometry
from padst_compiler.ops import LINEAR_DW, LINEAR_DX

__all__ = ["Clock", "Contest", "Measured", "Prefer"]

ROWS = 64  # of the result, that are compared with the reference
LIMIT = 1e-4  # of the largest number; more for 16-bit types: a few roundings


@dataclass(frozen=True)
class Contest:
    """A distinct site of a graph: layers that are alike share one.

    Attributes:
        op: the structured operator.
        geometry: of the call.
        bias: whether the operator adds one.
        ways: the formulations that apply; the last one is dense.
    """

    op: torch._ops.OpOverload
    geometry: Geometry
    bias: bool
    ways: tuple[Formulation, ...] = field(repr=False)

    def __str__(self) -> str:
        """Name the site in a few words."""
        g = self.geometry
        kind = self.op.name().removeprefix("padst::")
        return f"{kind} {g.shape}, {g.tokens} tokens"

    def arguments(self) -> list[Any]:
        """Return random arguments of the operator; the same ones every time."""
        g, random = self.geometry, torch.Generator().manual_seed(0)

        def numbers(*sizes: int) -> Tensor:
            return torch.randn(sizes, generator=random).to(g.device, g.dtype)

        weight = torch.randn(g.shape.out_features, g.shape.in_features, generator=random)
        indices = g.structure.select(weight, g.kept)
        values = g.structure.pack(weight, indices).to(g.device, g.dtype)
        indices = indices.to(g.device)
        x, grad = (numbers(g.tokens, n) for n in (g.shape.in_features, g.shape.out_features))
        if self.op in LINEAR_DW.values():
            return [grad, x, indices, list(g.structure.unit(g.shape))]
        if self.op in LINEAR_DX.values():
            return [grad, values, indices, g.shape.in_features]
        bias = numbers(g.shape.out_features) if self.bias else None
        return [x, values, indices, bias, g.shape.out_features]

    def is_right(self, arguments: Sequence[Any], result: Tensor) -> bool:
        """Whether a result is the structure's reference in float64, up to rounding.

        Compared on a sample of rows that has the first and the last one.

        Args:
            arguments: as ``arguments`` makes them.
            result: of the operator on them.
        """
        dtype = self.geometry.dtype
        wide = [a.double() if _has_fractions(a) else a for a in arguments]
        if self.op not in LINEAR_DW.values():  # rows are tokens, which do not meet
            count = self.geometry.tokens
            rows = torch.linspace(0, count - 1, min(count, ROWS)).long().to(result.device)
            wide[0], result = wide[0][rows], result[rows]
        expected = self.op(*wide)
        if result.shape != expected.shape or result.dtype is not dtype:
            return False
        error = (result.double() - expected).abs().max() / expected.abs().max()
        return bool(error < max(LIMIT, 8.0 * torch.finfo(dtype).eps))


@dataclass(frozen=True)
class Measured:
    """What a contest came to; formulations are known by their names.

    Attributes:
        seconds: a call of each that gave the right result; none where dense did not.
        low: of each but dense, how many times faster it was in all but the worst quarter of rounds.
        dropped: the others, and why.
        cached: whether it was timed by an earlier compilation.
    """

    seconds: Mapping[str, float]
    low: Mapping[str, float]
    dropped: Mapping[str, str] = field(default_factory=dict)
    cached: bool = False

    def is_faster(self, name: str) -> bool:
        """Whether a formulation is faster than dense beyond the noise."""
        return self.low.get(name, 0.0) > 1.0

    def against(self, name: str) -> str:
        """Return in words how a formulation compares with dense.

        Example:
            >>> Measured({"a": 1e-3, "dense": 2.5e-3}, {"a": 2.4}).against("a")
            'timed 2.5x dense (1.000 against 2.500 ms)'
        """
        one = self.seconds[name]
        (two,) = (seconds for way, seconds in self.seconds.items() if way not in self.low)
        times = two / one
        digits = 1 if times > 1.5 else 2
        noise = ", within the noise" if times > 1.0 and not self.is_faster(name) else ""
        cached = ", cached" if self.cached else ""
        figures = f"{1e3 * one:.3f} against {1e3 * two:.3f} ms"
        return f"timed {times:.{digits}f}x dense ({figures}){noise}{cached}"


class Clock(Protocol):
    """What a pass asks for timings; its repr is part of the pass's cache key."""

    def time(self, contests: Sequence[Contest]) -> Mapping[Contest, Measured]:
        """Return what is known of these contests; one that is left out is to be predicted."""


Prefer: TypeAlias = str | Clock
"""How formulations are chosen: "auto", "dense", "sparse", or by a clock."""


def _has_fractions(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
