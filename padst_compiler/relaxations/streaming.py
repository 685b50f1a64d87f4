"""Products with ``M_ij = exp(l_i . r_j + a_i + b_j)`` that never hold the whole of M.

M is formed a few rows at a time, in the forward pass and again in the backward pass, like the
scores of attention. ``left`` and ``right`` are ``(n, m)``, the potentials ``a`` and ``b`` ``(n,)``.
Gradients flow to all four. Everything is float32 (float64 where ``left`` is), whatever autocast
says; ``product`` alone multiplies in the dtype of its tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor

__all__ = ["CHUNK", "moments", "potential", "product"]

CHUNK = 2**22
"""Numbers of M that exist at once: 16 MiB. Up to n = 2048 that is M itself, in one piece."""

_Pull: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor]  # gradients of left, right, a, b


def potential(left: Tensor, right: Tensor, shift: Tensor, chunk: int = CHUNK) -> Tensor:
    """Return ``-log sum_j exp(l_i . r_j + shift_j)`` for every i, ``(n,)``: half a Sinkhorn step.

    Args:
        left: ``(n, m)``, the side that is scaled.
        right: ``(n, m)``, the other side.
        shift: ``(n,)``, the other side's potential.
        chunk: numbers of M to hold at once.

    Example:
        >>> potential(torch.zeros(3, 2), torch.zeros(4, 2), torch.zeros(4)).exp().tolist()
        [0.25, 0.25, 0.25]
    """
    result: Tensor = _Potential.apply(  # type: ignore[no-untyped-call]
        left, right, shift, chunk
    )
    return result


def product(
    x: Tensor, left: Tensor, right: Tensor, a: Tensor, b: Tensor, chunk: int = CHUNK
) -> Tensor:
    """Return ``M x`` along the last axis: ``(..., n) -> (..., n)``."""
    result: Tensor = _Product.apply(  # type: ignore[no-untyped-call]
        x.reshape(-1, x.shape[-1]), left, right, a, b, chunk
    )
    return result.view(x.shape)


def moments(
    left: Tensor, right: Tensor, a: Tensor, b: Tensor, chunk: int = CHUNK
) -> tuple[Tensor, Tensor]:
    """Return sums and sums of squares of the rows, then of the columns, of M: each ``(2 n,)``."""
    sums, squares = _Moments.apply(  # type: ignore[no-untyped-call]
        left, right, a, b, chunk
    )
    return sums, squares


def _multiply(first: Tensor, second: Tensor) -> Tensor:
    with torch.autocast(first.device.type, enabled=False):
        return first @ second


def _parts(left: Tensor, right: Tensor, chunk: int) -> Iterator[tuple[slice, Tensor]]:
    """Yield runs of rows with their ``l_i . r_j``."""
    step = max(1, chunk // right.shape[0])
    for start in range(0, left.shape[0], step):
        rows = slice(start, start + step)
        yield rows, _multiply(left[rows], right.t())


class _Potential(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, shift: Tensor, chunk: int) -> Tensor:
        parts = [-log.add_(shift).logsumexp(dim=1) for _, log in _parts(left, right, chunk)]
        found = torch.cat(parts)
        ctx.chunk = chunk
        ctx.save_for_backward(left, right, shift, found)
        return found

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right, shift, found = ctx.saved_tensors
        to_left, to_right, to_shift = [], torch.zeros_like(right), torch.zeros_like(shift)
        for rows, log in _parts(left, right, ctx.chunk):
            share = log.add_(shift).add_(found[rows, None]).exp_().mul_(-grad[rows, None])
            to_left.append(_multiply(share, right))
            to_right += _multiply(share.t(), left[rows])
            to_shift += share.sum(dim=0)
        return torch.cat(to_left), to_right, to_shift, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, left: Tensor, right: Tensor, a: Tensor, b: Tensor, chunk: int
    ) -> Tensor:
        y = torch.empty_like(x)
        for rows, log in _parts(left, right, chunk):
            y[:, rows] = _multiply(x, log.add_(a[rows, None]).add_(b).exp_().to(x.dtype).t())
        ctx.chunk = chunk
        ctx.save_for_backward(x, left, right, a, b)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, left, right, a, b = ctx.saved_tensors
        to_x = torch.zeros_like(x) if ctx.needs_input_grad[0] else None
        collected = _Collected(left, right)
        for rows, log in _parts(left, right, ctx.chunk):
            share = log.add_(a[rows, None]).add_(b).exp_()
            if to_x is not None:
                to_x.addmm_(grad[:, rows], share.to(x.dtype))  # in place: no second (t, n)
            share.mul_(_multiply(grad[:, rows].t(), x))
            collected.add(rows, share)
        return (to_x, *collected.all(), None)


class _Moments(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, left: Tensor, right: Tensor, a: Tensor, b: Tensor, chunk: int
    ) -> tuple[Tensor, Tensor]:
        rows_of: list[tuple[Tensor, Tensor]] = []
        columns, columns_squared = torch.zeros_like(b), torch.zeros_like(b)
        for rows, log in _parts(left, right, chunk):
            part = log.add_(a[rows, None]).add_(b).exp_()
            sums = part.sum(dim=1)
            columns += part.sum(dim=0)
            part.square_()
            rows_of.append((sums, part.sum(dim=1)))
            columns_squared += part.sum(dim=0)
        ctx.chunk = chunk
        ctx.save_for_backward(left, right, a, b)
        sums = torch.cat([*(one for one, _ in rows_of), columns])
        return sums, torch.cat([*(one for _, one in rows_of), columns_squared])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, squared: Tensor) -> tuple[Tensor | None, ...]:
        left, right, a, b = ctx.saved_tensors
        n = left.shape[0]
        collected = _Collected(left, right)
        for rows, log in _parts(left, right, ctx.chunk):
            share = log.add_(a[rows, None]).add_(b).exp_()
            slope = 2.0 * share * (squared[:n][rows, None] + squared[n:])
            slope.add_(grad[:n][rows, None]).add_(grad[n:])
            collected.add(rows, share.mul_(slope))
        return (*collected.all(), None)


class _Collected:
    """Gradients of left, right, a and b from those of ``log M``, row by row."""

    def __init__(self, left: Tensor, right: Tensor) -> None:
        self._left, self._right = left, right
        self._to_left: list[Tensor] = []
        self._to_a: list[Tensor] = []
        self._to_right, self._to_b = torch.zeros_like(right), torch.zeros_like(right[:, 0])

    def add(self, rows: slice, share: Tensor) -> None:
        self._to_left.append(_multiply(share, self._right))
        self._to_right += _multiply(share.t(), self._left[rows])
        self._to_a.append(share.sum(dim=1))
        self._to_b += share.sum(dim=0)

    def all(self) -> _Pull:
        return torch.cat(self._to_left), self._to_right, torch.cat(self._to_a), self._to_b
