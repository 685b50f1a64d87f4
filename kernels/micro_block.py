"""Block kernels in C++: sums in registers, block columns read in place, nothing gathered.

The operators themselves stay in the graph and Inductor lowers them by ``LOWERINGS``: the storage
``(o/r, k, c, r)`` is what the kernel reads, outputs of a block side by side. fp32 on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from padst_compiler import cpp_templates as cpp
from padst_compiler.formulation import Formulation, Geometry, gemm
from padst_compiler.ops import LINEAR
from padst_compiler.structures import Block

__all__ = ["LINEAR_FORM", "LOWERINGS"]

CHUNK = 32  # tokens whose inputs stay in the cache while all weights pass by
ALONE = 1_500_000  # multiplications that one thread does faster than others wake up

FORWARD = """
extern "C" {{export}}
{{kernel.def_kernel(inputs=inputs, outputs={"Y": result}, aliases=aliases)}}
{
    {{kernel.maybe_codegen_profile()}}
    const int64_t M = {{kernel.size(made, 0)}}, chunks = (M + {{CHUNK}} - 1) / {{CHUNK}};
    #pragma omp parallel num_threads({{threads}}) if (M * {{NNZ}} > {{ALONE}})
    {
    {{kernel.define_stack_allocated_buffer("tile", [16, N])}}
    {%- set tile = kernel.local_buffers["tile"] %}
    {%- if PACKED %}
    // Rows a multiple of a page apart share a few lines of the cache: a copy sets them apart.
    constexpr int64_t row = {{I + 16}};
    std::unique_ptr<float[]> copy(new float[{{CHUNK}} * row]);
    int64_t copied = -1;
    {%- else %}
    const int64_t row = {{kernel.stride(X, 0)}};
    {%- endif %}
    #pragma omp for collapse(2) schedule(static)
    for (int64_t chunk = 0; chunk < chunks; chunk++)
    for (int64_t part = 0; part < {{ROWS * PARTS}}; part++) {
        const int64_t block = part / {{PARTS}}, inside = part % {{PARTS}} * {{N}};
        const int64_t n_start = block * {{R}} + inside, first = chunk * {{CHUNK}};
        const int64_t last = std::min<int64_t>(M, first + {{CHUNK}});
        {%- if PACKED %}
        if (copied != chunk)
            for (int64_t t = first; t < last; t++)
                std::memcpy(&copy[(t - first) * row], X + t * {{kernel.stride(X, 0)}}, {{4 * I}});
        copied = chunk;
        const float* inputs = copy.get();
        {%- else %}
        const float* inputs = X + first * row;
        {%- endif %}
        for (int64_t m_start = first, rows; m_start < last; m_start += rows) {
            rows = padst::tile_of<{{N}}, {{C}}>(
                inputs + (m_start - first) * row, row, 1, INDICES + block * {{KEPT}},
                W + block * {{KEPT * C * R}} + inside, {{R}}, {{KEPT}}, 0, tile, last - m_start);
            {%- set here = [("m_start", "m_start + rows"), ("n_start", "n_start + " ~ N)] %}
            {%- set to = kernel.slice_nd(flat, here) %}
            {%- set of = kernel.slice_nd(tile, [("0", "rows"), ("0", N)]) %}
            {{kernel.store_output(to, of, made, nodes, offsets=("m_start", "n_start"), reindexers=reindexers)|indent(12, false)}}
        }
    }
    }
}
"""  # noqa: E501 - the generator's own lines


@cache
def source(body: str) -> str:
    """Return a body with the headers that it needs."""
    here = Path(__file__).resolve().parent
    headers = [(here / name).read_text("utf-8") for name in ("vectors.h", "block.h")]
    return "\n".join(["{{template.header().getvalue()}}", *headers, body])


def kernel(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return ``x S^T + bias``; the operator stays, and the bias is what follows it."""
    y: Tensor = LINEAR["block"](x, values, indices, None, out_features)
    return y if bias is None else y + bias


def lower_linear(x: Any, values: Any, indices: Any, bias: Any, out_features: Any) -> Any:
    """Lower ``padst::block_linear`` to the C++ kernel where it applies, else call the operator."""
    op = LINEAR["block"]
    fits = bias is None and x.get_device().type == "cpu" and x.get_dtype() is torch.float32
    sizes = values.get_size()
    if not fits or not all(isinstance(s, int) or s.is_number for s in sizes):
        return cpp.fallback(op, x, values, indices, bias, out_features)
    rows, kept, c, r = cpp.numbers(sizes)
    if rows * r != cpp.numbers([out_features])[0] or width(r) is None:
        return cpp.fallback(op, x, values, indices, bias, out_features)
    n = width(r)
    assert n is not None
    shape = x.get_size()
    (i,) = cpp.numbers([shape[-1]])
    x = cpp.view(x, [-1, i])
    numbers = {
        "ROWS": rows, "KEPT": kept, "C": c, "R": r, "N": n, "PARTS": r // n,
        "I": i, "PACKED": int(i % 1024 == 0), "CHUNK": CHUNK, "NNZ": rows * kept * c * r, "ALONE": ALONE,
    }  # fmt: skip
    y = cpp.run(
        "padst_block_linear",
        source(FORWARD),
        {"X": x, "W": values, "INDICES": indices},
        (x.get_size()[0], rows * r),
        numbers,
    )
    return cpp.view(y, [*shape[:-1], rows * r])


def width(r: int) -> int | None:
    """Return how many outputs of a block are done at once; None where vectors do not tile them."""
    if r % 4:
        return None
    return next(n for n in (64, 48, 32, 16, 8, 4) if r % n == 0)


def _cost(g: Geometry) -> float | None:
    structure = g.structure
    if not isinstance(structure, Block) or not structure.balanced:
        return None
    r, c = structure.sides
    if g.device != "cpu" or g.dtype is not torch.float32 or width(r) is None:
        return None
    efficiency = {4: 0.15, 8: 0.3, 16: 0.6}.get(math.gcd(r, 64), 0.8)
    return gemm(g.tokens, g.kept * c, r, g.shape.out_features // r, efficiency)


LINEAR_FORM = Formulation("micro_kernel", kernel, _cost)
LOWERINGS: dict[torch._ops.OpOverload, Callable[..., Any]] = {LINEAR["block"]: lower_linear}
install = cache(partial(lambda: [cpp.lower(op, way) for op, way in LOWERINGS.items()]))
