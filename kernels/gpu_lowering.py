"""What every lowering to a Triton kernel shares: which tensors it takes, rows of tokens, maps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from padst_compiler import cpp_templates as inductor
from padst_compiler import triton_templates as triton
from padst_compiler.triton_text import TYPES, Kernel, Launch

__all__ = ["gradient", "lowered", "mapped", "rows", "takes", "tokens", "width"]

INDICES = (torch.int32, torch.int16, torch.uint8)

Lowering = Callable[..., Any]


def takes(x: Any, other: Any, indices: Any, sizes: Sequence[Any]) -> bool:
    """Whether kernels run on these: a GPU, one type of numbers, and weights of known sizes.

    Indices may be narrow; kernels that add to them widen them first.
    """
    dtype = x.get_dtype()
    fits = x.get_device().type == "cuda" and dtype in TYPES and other.get_dtype() is dtype
    numbers = indices.get_dtype() in INDICES and inductor.are_numbers(sizes)
    return fits and numbers and triton.is_available()


def rows(x: Any) -> Any:
    """Return a tensor of the graph as rows of tokens."""
    return inductor.view(x, [-1, x.get_size()[-1]])


def tokens(x: Any) -> int:
    """Return about how many tokens a tensor of the graph has."""
    return triton.about(rows(x).get_size()[0])


def width(x: Any, table: Any = None) -> int:
    """Return how many features a kernel reads of a tensor of the graph, through a map or not."""
    (features,) = inductor.numbers((x if table is None else table).get_size()[-1:])
    return features


def mapped(
    kernel: Kernel,
    x: Any,
    tensors: Mapping[str, Any],
    outputs: int,
    ways: Sequence[Launch],
    in_map: Any,
    into: Any,
) -> Any:
    """Return ``(..., outputs)``: what a kernel of sums computes, through maps that are given."""
    maps = {key: table for key, table in (("FROM", in_map), ("INTO", into)) if table is not None}
    through = {"IN_MAP": in_map is not None, "OUT_MAP": into is not None}
    told = [replace(how, values={**how.values, **through}) for how in ways]
    flat = rows(x)
    sizes = (flat.get_size()[0], outputs)
    y = triton.run(
        kernel.reading(*maps), {"X": flat, **tensors, **maps}, sizes, told, x.get_dtype()
    )
    return inductor.view(y, [*x.get_size()[:-1], outputs])


def gradient(kernel: Kernel, grad: Any, x: Any, indices: Any, how: Launch, sizes: list[int]) -> Any:
    """Return the gradient of weights of these sizes; its parts are added in one order."""
    split, dtype = int(how.values["SPLIT"]), x.get_dtype()
    given = {"X": rows(x), "G": rows(grad), "INDICES": indices}
    height = math.prod(sizes[:-1])
    partial = torch.float32 if split > 1 else dtype
    parts = triton.run(kernel, given, (split * height, sizes[-1]), [how], partial)
    if split == 1:
        return inductor.view(parts, sizes)
    return triton.total(inductor.view(parts, [split, *sizes]), 0, dtype)


def lowered(
    op: torch._ops.OpOverload, run: Lowering, *, bias: int | None = None, through: bool = False
) -> Lowering:
    """Return a lowering by ``run``, which returns None where its kernel does not apply.

    Then the operator itself is called. So it is for what no kernel computes: a bias, which is what
    follows elsewhere, and a map of outputs whose inverse is not known (``invert_maps`` knows it).

    Args:
        op: the operator.
        run: takes its arguments, but for a bias.
        bias: the place of the bias among them.
        through: whether the last argument is a map of outputs.
    """

    def lower(*args: Any) -> Any:
        other = (bias is not None and args[bias] is not None) or (through and args[-1] is not None)
        given = [a for at, a in enumerate(args) if at != bias]
        result = None if other else run(*given)
        return inductor.fallback(op, *args) if result is None else result

    return lower
