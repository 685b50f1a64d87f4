"""Triton kernels inside Inductor: beside ``compat.py`` and ``cpp_templates.py`` its private names.

A kernel's text becomes a template: Inductor puts what stands before it into its loads and what
follows into its stores, and times its configurations under ``max-autotune``. Each name used here
has a test in ``tests/test_triton_templates.py``.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from padst_compiler import cpp_templates as inductor
from padst_compiler.triton_text import Kernel, Launch, numbers, template_of

__all__ = [
    "about",
    "example",
    "is_available",
    "is_tuned",
    "run",
    "shifted",
    "sorted_places",
    "total",
    "turned",
]

LISTS = ("INDICES", "ORDER", "STARTS", "FROM", "INTO")  # inputs that say where others are read


@functools.cache
def is_available() -> bool:
    """Whether Triton is installed."""
    from torch.utils._triton import has_triton_package

    return bool(has_triton_package())


def is_tuned() -> bool:
    """Whether Inductor was asked to time configurations."""
    from torch._inductor import config

    return bool(config.max_autotune or config.max_autotune_gemm)


def run(
    kernel: Kernel,
    inputs: Mapping[str, Any],
    sizes: tuple[Any, int],
    ways: Sequence[Launch],
    dtype: torch.dtype,
) -> Any:
    """Return what a kernel computes.

    Args:
        kernel: what runs.
        inputs: tensors of the graph by name; copied into order where the text does not read them
            by ``load_input``, which knows strides.
        sizes: of the result.
        ways: constants and programs, the first of which runs where nothing is timed.
        dtype: of the result.
    """
    from torch._inductor import ir
    from torch._inductor.select_algorithm import autotune_select_algorithm, realize_inputs

    real = []
    for name in kernel.inputs:
        x = realize_inputs(inputs[name])
        by_strides = f'load_input("{name}"' in kernel.body
        real.append(x if by_strides else inductor.contiguous(x))
    layout = ir.FixedLayout(real[0].get_device(), dtype, list(sizes))
    multiplied = numbers(real[0].get_dtype())
    choices: list[Any] = []
    for how in ways if is_tuned() else ways[:1]:
        programs = 0 if how.tiles else how.programs
        _template(kernel).maybe_append_choice(
            choices,
            input_nodes=tuple(real),
            layout=layout,
            num_warps=how.warps,
            num_stages=how.stages,
            **how.values,
            **multiplied,
            PROGRAMS=programs,
        )
    given = dict(zip(kernel.inputs, real, strict=True))
    examples = _examples(given, int(ways[0].values.get("C", 1)))
    result: Any = autotune_select_algorithm(
        kernel.name, choices, real, layout, input_gen_fns=examples
    )
    return result[0] if isinstance(result, tuple) else result


def _examples(inputs: Mapping[str, Any], side: int) -> dict[int, Callable[[Any], Tensor]]:
    """Return what makes the lists that kernels are timed with, by their places among the inputs.

    With these Inductor chooses before it fuses, so what follows is fused whatever is chosen.
    """
    read = {"FROM": "X", "INDICES": "FROM" if "FROM" in inputs else "X", "STARTS": "ORDER"}

    def made(name: str, node: Any) -> Tensor:
        below = about(inputs[read.get(name, name)].get_size()[-1])
        below = below // side if name == "INDICES" else below
        sizes = [about(size) for size in node.get_size()]
        return example(name, sizes, below, node.get_dtype()).to(node.get_device())

    names = enumerate(inputs)
    return {at: functools.partial(made, name) for at, name in names if name in LISTS}


def example(name: str, sizes: Sequence[int], below: int, dtype: torch.dtype) -> Tensor:
    """Return a list such as a layer has. Inductor's own are zeros: then ``dx`` has nothing to do.

    Args:
        name: of the input, one of ``LISTS``.
        sizes: of the list.
        below: what its numbers are below; ``STARTS`` end there.
        dtype: of the list.

    Example:
        >>> example("STARTS", [5], 12, torch.int32).tolist()
        [0, 3, 6, 9, 12]
    """
    count = math.prod(sizes)
    if name == "STARTS":
        return torch.linspace(0, below, count).to(dtype)
    generator = torch.Generator().manual_seed(0)
    if name != "INDICES":
        return torch.randperm(below, generator=generator)[:count].to(dtype)
    order = torch.rand(*sizes[:-1], below, generator=generator).argsort(-1)
    return order[..., : sizes[-1]].sort(-1).values.to(dtype)


def sorted_places(indices: Any, count: int) -> tuple[Any, Any]:
    """Return the places of numbers below ``count`` in their order, and where each number begins."""
    from torch._inductor.lowering import lowerings

    aten, prims = torch.ops.aten, torch.ops.prims
    flat = inductor.view(indices, [-1])
    ordered, order = lowerings[aten.sort.stable](flat, stable=True, dim=0, descending=False)
    kind = {"dtype": torch.int32, "device": flat.get_device(), "requires_grad": False}
    edges = lowerings[prims.iota.default](count + 1, start=0, step=1, **kind)
    starts = lowerings[aten.searchsorted.Tensor](ordered, edges, out_int32=True)
    return lowerings[prims.convert_element_type.default](order, torch.int32), starts


def shifted(indices: Any, step: int) -> Any:
    """Return ``indices[:, g] + g * step``: places within groups as places in a row."""
    from torch._inductor.lowering import lowerings

    kind = {"dtype": torch.int32, "device": indices.get_device(), "requires_grad": False}
    groups = indices.get_size()[1]
    first = lowerings[torch.ops.prims.iota.default](groups, start=0, step=step, **kind)
    return lowerings[torch.ops.aten.add.Tensor](indices, inductor.view(first, [1, groups, 1]))


def about(size: Any) -> int:
    """Return a size of a tensor of the graph, or for a symbolic one what it was traced with."""
    from torch._inductor.virtualized import V

    known: Any = V.graph.sizevars
    hint = getattr(known, "optimization_hint", None) or known.size_hint  # torch 2.11
    return int(hint(size))


def total(x: Any, axis: int, dtype: torch.dtype) -> Any:
    """Return the sum over an axis of a tensor of the graph."""
    from torch._inductor.lowering import lowerings

    return lowerings[torch.ops.aten.sum.dim_IntList](x, [axis], dtype=dtype)


def turned(x: Any, rows: int, in_map: Any = None) -> Any:
    """Return ``(T, i)`` of the graph as ``(i, rows)``, features taken through a map."""
    from torch._inductor.lowering import lowerings

    aten = torch.ops.aten
    taken = x if in_map is None else lowerings[aten.index.Tensor](x, [None, in_map])
    y = lowerings[aten.permute.default](taken, [1, 0])
    (tokens,) = inductor.numbers(x.get_size()[:1])
    more = rows - tokens
    return lowerings[aten.constant_pad_nd.default](y, [0, more], 0) if more else y


@functools.cache
def _template(kernel: Kernel) -> Any:
    """Return the template of a kernel; Inductor takes a name once in a process."""
    from torch._inductor.select_algorithm import SymbolicGridFn, TritonTemplate

    def grid(rows: Any, columns: Any, meta: Mapping[str, Any], *, cdiv: Any) -> tuple[Any, ...]:
        del columns
        programs = meta["PROGRAMS"] or cdiv(rows, meta["BLOCK_M"]) * meta["TILES"]
        return programs, 1, 1

    return TritonTemplate(name=kernel.name, grid=SymbolicGridFn(grid), source=template_of(kernel))
