"""Block kernels in C++: sums in registers, block columns read in place, nothing gathered.

The operators themselves stay in the graph and Inductor lowers them by ``LOWERINGS``: the storage
``(o/r, k, c, r)`` is what the kernel reads, the outputs of a block side by side. fp32 on a CPU.

========  =========================================================================================
linear    sums of a few tokens and a row of blocks over its blocks
dx        the same over the blocks of a block column, which are listed first; weights transposed
dw        sums of a few inputs and a block's outputs over tokens, its gradients side by side
========  =========================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from padst_compiler import cpp_templates as cpp
from padst_compiler.formulation import Formulation, Geometry, gemm, moved
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.structures import Block

__all__ = ["DW_FORM", "DX_FORM", "LINEAR_FORM", "LOWERINGS"]

ALONE = 1_500_000  # multiplications that one thread does faster than others wake up
PAGE = 1024  # numbers

BODY = """
extern "C" {{export}}
{{kernel.def_kernel(inputs=inputs, outputs={"Y": result}, aliases=aliases)}}
{
    {{kernel.maybe_codegen_profile()}}
    {%- set unused = kernel.define_stack_allocated_buffer("tile", [16, N]) %}
    {%- set here = [("m_start", "m_start + rows"), ("n_start", "n_start + " ~ N)] %}
    {%- set to = kernel.slice_nd(flat, here) %}
    {%- set of = kernel.slice_nd(kernel.local_buffers["tile"], [("0", "rows"), ("0", N)]) %}
    const auto store = [&](int64_t m_start, int64_t rows, int64_t n_start, float* tile) {
        {{kernel.store_output(to, of, made, nodes, offsets=("m_start", "n_start"), reindexers=reindexers)|indent(8, false)}}
    };
    const int64_t tokens = {{kernel.size(X, 0)}};
    const int threads = tokens * {{COUNT * IN * OUT}} > {{ALONE}} ? {{threads}} : 1;
CALL
}
"""  # noqa: E501 - the generator's own lines

LINEAR_CALL = """
    padst::block_sums<{{N}}, {{IN}}, {{OUT}}, {{COPIED}}>(
        X, {{kernel.stride(X, 0)}}, tokens, {{I}}, W,
        padst::Layout{INDICES, nullptr, nullptr, {{KEPT}}, {{GROUPS}}}, threads, store);
"""
DX_CALL = """
    const padst::ByColumn blocks(INDICES, {{COUNT // KEPT}}, {{KEPT}}, {{GROUPS}});
    padst::block_sums<{{N}}, {{IN}}, {{OUT}}, {{COPIED}}>(
        X, {{kernel.stride(X, 0)}}, tokens, {{I}}, W, blocks.layout(), threads, store);
"""
DW_CALL = """
    padst::block_gradient<{{N}}, {{IN}}, {{OUT}}>(
        X, {{kernel.stride(X, 0)}}, G, {{kernel.stride(G, 0)}}, tokens, INDICES,
        {{GROUPS}}, {{KEPT}}, threads, store);
"""


@cache
def source(call: str) -> str:
    """Return a kernel that makes this call, with the headers that it needs."""
    here = Path(__file__).resolve().parent
    headers = [(here / name).read_text("utf-8") for name in ("vectors.h", "block.h")]
    return "\n".join(["{{template.header().getvalue()}}", *headers, BODY.replace("CALL", call)])


def width(outputs: int) -> int:
    """Return how many outputs of a block are done at once; 0 where vectors do not tile them."""
    return next((n for n in (64, 48, 32, 16, 8, 4) if outputs % n == 0), 0)


# -- formulations ----------------------------------------------------------------------------------


def linear(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return ``x S^T + bias``; the operator stays, and the bias is what follows it."""
    y: Tensor = LINEAR["block"](x, values, indices, None, out_features)
    return y if bias is None else y + bias


def dx(grad: Tensor, values: Tensor, indices: Tensor, in_features: int) -> Tensor:
    """Return ``grad S``: the operator stays."""
    result: Tensor = LINEAR_DX["block"](grad, values, indices, in_features)
    return result


def dw(grad: Tensor, x: Tensor, indices: Tensor, unit: Sequence[int]) -> Tensor:
    """Return the gradient of the kept blocks: the operator stays."""
    result: Tensor = LINEAR_DW["block"](grad, x, indices, unit)
    return result


def _product(g: Geometry, outputs: int, inputs: int, extra: float = 0.0) -> float | None:
    fits = isinstance(g.structure, Block) and g.structure.balanced and width(outputs)
    if not fits or g.device != "cpu" or g.dtype is not torch.float32:
        return None
    efficiency = {4: 0.15, 8: 0.3, 16: 0.6}.get(math.gcd(outputs, 64), 0.8)
    return gemm(g.tokens, inputs, outputs, g.nnz // (inputs * outputs), efficiency) + extra


def _linear_cost(g: Geometry) -> float | None:
    assert isinstance(g.structure, Block)
    rows, columns = g.structure.sides
    return _product(g, rows, columns)


def _dx_cost(g: Geometry) -> float | None:
    assert isinstance(g.structure, Block)
    rows, columns = g.structure.sides
    return _product(g, columns, rows, extra=moved(g.nnz, g.item))


LINEAR_FORM = Formulation("micro_kernel", linear, _linear_cost)
DX_FORM = Formulation("micro_kernel", dx, _dx_cost)
DW_FORM = Formulation("micro_kernel", dw, _linear_cost)


# -- lowerings -------------------------------------------------------------------------------------


def lower_linear(x: Any, values: Any, indices: Any, bias: Any, out_features: Any) -> Any:
    """Lower ``padst::block_linear``; what the kernel does not do calls the operator."""
    blocks = _blocks(x, indices, values.get_size(), out_features)
    if bias is not None or blocks is None or not width(blocks["R"]):
        return cpp.fallback(LINEAR["block"], x, values, indices, bias, out_features)
    return _sums(LINEAR_CALL, x, values, indices, blocks["R"], blocks["C"], blocks)


def lower_dx(grad: Any, values: Any, indices: Any, in_features: Any) -> Any:
    """Lower ``padst::block_linear_dx``; what the kernel does not do calls the operator."""
    blocks = _blocks(grad, indices, values.get_size(), grad.get_size()[-1])
    if blocks is None or not width(blocks["C"]):
        return cpp.fallback(LINEAR_DX["block"], grad, values, indices, in_features)
    (i,) = cpp.numbers([in_features])
    blocks = {**blocks, "ROWS": i // blocks["C"]}
    values = cpp.transposed(values)
    return _sums(DX_CALL, grad, values, indices, blocks["C"], blocks["R"], blocks)


def lower_dw(grad: Any, x: Any, indices: Any, unit: Sequence[Any]) -> Any:
    """Lower ``padst::block_linear_dw``; what the kernel does not do calls the operator."""
    blocks = _blocks(grad, indices, [*indices.get_size(), *unit], grad.get_size()[-1])
    if blocks is None or not width(blocks["R"]):
        return cpp.fallback(LINEAR_DW["block"], grad, x, indices, unit)
    rows, kept, c, r = (blocks[name] for name in ("ROWS", "KEPT", "C", "R"))
    numbers = {"GROUPS": rows, "COUNT": rows * kept, "KEPT": kept, "IN": c, "OUT": r, "N": width(r)}
    flat = {name: cpp.view(t, [-1, t.get_size()[-1]]) for name, t in (("X", x), ("G", grad))} | {
        "INDICES": indices
    }
    sizes = (rows * kept * c, r)
    y = cpp.run("padst_block_dw", source(DW_CALL), flat, sizes, {**numbers, "ALONE": ALONE})
    return cpp.view(y, [rows, kept, c, r])


def _blocks(x: Any, indices: Any, sizes: Sequence[Any], out_features: Any) -> dict[str, int] | None:
    """Return the numbers of a balanced layer of blocks, or None where the kernels do not apply."""
    if x.get_device().type != "cpu" or x.get_dtype() is not torch.float32:
        return None
    if indices.get_dtype() is not torch.int32 or not cpp.are_numbers([*sizes, out_features]):
        return None
    rows, kept, c, r, total = cpp.numbers([*sizes, out_features])
    if rows * r != total:  # free blocks: one group of all
        return None
    return {"ROWS": rows, "KEPT": kept, "C": c, "R": r}


def _sums(
    call: str,
    x: Any,
    weights: Any,
    indices: Any,
    outputs: int,
    inputs: int,
    blocks: dict[str, int],
) -> Any:
    shape = x.get_size()
    (i,) = cpp.numbers([shape[-1]])
    flat = cpp.view(x, [-1, i])
    numbers = {
        "GROUPS": blocks["ROWS"],
        "COUNT": math.prod(cpp.numbers(indices.get_size())),
        "KEPT": blocks["KEPT"],
        "OUT": outputs,
        "IN": inputs,
        "N": width(outputs),
        "I": i,
        "COPIED": int(i % PAGE == 0),
        "ALONE": ALONE,
    }
    total = blocks["ROWS"] * outputs
    tensors = {"X": flat, "W": weights, "INDICES": indices}
    y = cpp.run("padst_block_sums", source(call), tensors, (flat.get_size()[0], total), numbers)
    return cpp.view(y, [*shape[:-1], total])


LOWERINGS: dict[torch._ops.OpOverload, Callable[..., Any]] = {
    LINEAR["block"]: lower_linear,
    LINEAR_DX["block"]: lower_dx,
    LINEAR_DW["block"]: lower_dw,
}


@cache
def install() -> None:
    """Let Inductor lower the operators; once in a process."""
    for op, lowering in LOWERINGS.items():
        cpp.lower(op, lowering)
