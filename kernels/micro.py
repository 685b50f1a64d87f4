"""What every C++ kernel of sums shares: the body around its call, chunks, copies and maps.

A kernel computes tiles of ``N`` outputs; Inductor generates what follows on them. ``x`` is read as
it lies, from a copy that is laid out apart, or through ``in_map``; outputs may be stored through
``out_map``. See ``sums.h``.
"""

from __future__ import annotations

import functools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from padst_compiler import cpp_templates as cpp
from padst_compiler.cpu_products import HALF, products_of
from padst_compiler.formulation import Geometry, moved

__all__ = [
    "ALONE",
    "BODY",
    "block_width",
    "fits",
    "gradient",
    "source",
    "sums",
    "wide",
    "widening",
    "width",
]

ALONE = 1_500_000  # multiplications that one thread does faster than others wake up
PAGE = 1024  # numbers

BODY = """
extern "C" {{export}}
{{kernel.def_kernel(inputs=buffers, outputs={"Y": result}, aliases=aliases)}}
{
    {{kernel.maybe_codegen_profile()}}
    {%- for name, x in inputs.items() %}
    const auto* const {{name}} = &{{kernel.index(x, [0] * x.get_size()|length)}};
    {%- endfor %}
    {%- set unused = kernel.define_stack_allocated_buffer("tile", [ROWS, N]) %}
    {%- set here = [("m_start", "m_start + rows"), ("n_start", "n_start + " ~ N)] %}
    {%- set to = kernel.slice_nd(flat, here) %}
    {%- set of = kernel.slice_nd(kernel.local_buffers["tile"], [("0", "rows"), ("0", N)]) %}
    const auto store = [&](int64_t m_start, int64_t rows, int64_t n_start, float* tile) {
        {{kernel.store_output(to, of, made, nodes, offsets=("m_start", "n_start"), reindexers=reindexers)|indent(8, false)}}
    };
    const int64_t tokens = {{kernel.size(X, 0)}}, row = {{kernel.stride(X, 0)}};
    const int threads = tokens * {{WEIGHTS}} > {{ALONE}} ? {{threads}} : 1;
    {%- for map, features in CHECKED %}
    padst::check_map({{map}}, {{kernel.size(inputs[map], 0)}}, {{features}});
    {%- endfor %}
    {%- set in_map = "IN_MAP" if IN_MAP is defined else "nullptr" %}
    {%- set out_map = "OUT_MAP" if OUT_MAP is defined else "nullptr" %}
CALL
}
"""  # noqa: E501 - the generator's own lines


@functools.cache
def source(call: str, *headers: str) -> str:
    """Return a kernel that makes this call, with the headers that it needs."""
    here = Path(__file__).resolve().parent
    names = ("vectors.h", "turn.h", "sums.h", *headers)
    texts = []
    for name in names:  # with cpp_wrapper all kernels of a graph are one file
        guard = f"PADST_{name.upper().replace('.', '_')}"
        text = (here / name).read_text("utf-8")
        texts.append(f"#ifndef {guard}\n#define {guard}\n{text}\n#endif")
    return "\n".join(["{{template.header().getvalue()}}", *texts, BODY.replace("CALL", call)])


def width(outputs: int, most: int = 64) -> int:
    """Return how many outputs are done at once; 0 where vectors do not tile them."""
    return next((n for n in (64, 48, 32, 16, 8, 4) if n <= most and outputs % n == 0), 0)


def block_width(outputs: int) -> int:
    """Return how many of a block's outputs are done at once: registers hold 6 to 16 tokens' sums.

    AVX-512 has room for those of any width, AVX2 for 16 outputs: at 197 tokens they are done at 93
    GF/s, at 75 by 32 or 64 (Zen 4, built for AVX2).
    """
    most = {"AVX512": 64, "AVX2": 16}.get(torch.backends.cpu.get_cpu_capability(), 8)
    return width(outputs, most)


def fits(geometry: Geometry) -> bool:
    """Whether the kernels are made for this type, device and compiler: GCC or Clang."""
    here = geometry.device == "cpu" and sys.platform != "win32"
    return here and geometry.dtype in (torch.float32, *HALF)


def wide(run: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a formulation that runs in fp32 and returns the type it was given: rounded once.

    Inductor casts on the tiles; weights that are frozen are cast once.
    """

    @functools.wraps(run)
    def widened(first: Tensor, *rest: Any) -> Tensor:
        if first.dtype not in HALF:
            return run(first, *rest)
        floats = [t.float() if _is_half(t) else t for t in rest]
        return run(first.float(), *floats).to(first.dtype)

    return widened


def widening(geometry: Geometry, rate: float) -> tuple[float, float]:
    """Return the rate in the units of a dense product of this type, and the cost of the casts.

    Rates are of CPUs that do two products of 512 bits in a cycle. Zen 4 does one, and loads as much
    for it: what waits for loads reaches 1.5 times the share (1.3 to 1.6, measured).

    With vector instructions for it a dense product of 16-bit numbers is twice as fast as one of
    fp32 (bf16, Zen 4), with tiles (AMX) taken to be eight times. Without, it took 3.7 to 4.7 times
    as long (bf16, AVX-512), and is priced at twice.
    """
    if geometry.device == "cpu" and products_of(torch.bfloat16) == ("avx512",):
        rate *= 1.5
    if geometry.dtype not in HALF:
        return rate, 0.0
    weights = 0 if geometry.frozen else geometry.nnz
    numbers = geometry.tokens * geometry.shape.in_features + weights
    units = products_of(geometry.dtype)
    faster = 8.0 if "amx" in units else 2.0 if units else 0.5
    return rate / faster, moved(numbers, geometry.item)


def _is_half(value: object) -> bool:
    return isinstance(value, Tensor) and value.dtype in HALF


def sums(
    name: str,
    text: str,
    x: Any,
    tensors: Mapping[str, Any],
    maps: Sequence[Any],
    outputs: int,
    numbers: Mapping[str, Any],
    *,
    apart: bool,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Return what a kernel of sums computes, or None where it does not take these arguments.

    Args:
        name: in generated code.
        text: of the kernel.
        x: ``(..., features)``, any strides.
        tensors: what else the kernel reads, by the names that the call uses.
        maps: of inputs and outputs, each may be None.
        outputs: of the kernel.
        numbers: what else the text names: ``N`` and ``WEIGHTS``, the number of weights, at least.
        apart: whether the kernel needs something around every row of x.
        dtype: of x. Numbers of 16 bits are read two in the place of one, ``I`` and
            ``FEATURES`` count those.
    """
    if x.get_device().type != "cpu" or x.get_dtype() is not dtype:
        return None
    given = {key: m for key, m in zip(("IN_MAP", "OUT_MAP"), maps, strict=True) if m is not None}
    if any(table.get_dtype() is not torch.int64 for table in given.values()):
        return None
    shape = x.get_size()
    (features,) = cpp.numbers([shape[-1]])
    if "OUT_MAP" in given and cpp.numbers(given["OUT_MAP"].get_size()) != [outputs]:
        return None
    (inputs,) = cpp.numbers(given["IN_MAP"].get_size() if "IN_MAP" in given else [features])
    flat = cpp.view(x, [-1, features])
    limits, through = {"IN_MAP": features, "OUT_MAP": outputs}, "THROUGH"
    if dtype in HALF:
        if features % 2 or inputs % 2:
            return None
        flat = cpp.contiguous(flat)  # pairs begin at even places
        features, inputs, through = features // 2, inputs // 2, "PAIRS_THROUGH"
    read = through if "IN_MAP" in given else "APART" if apart or inputs % PAGE == 0 else "HERE"
    values = {
        "I": inputs,
        "FEATURES": features,
        "O": outputs,
        "READ": f"padst::Read::{read}",
        "MOVED": str("OUT_MAP" in given).lower(),
        "CHECKED": [(key, limits[key]) for key in given],
        "ROWS": 16,
        "ALONE": ALONE,
        **numbers,
    }
    y = cpp.run(name, text, {"X": flat, **tensors, **given}, (flat.get_size()[0], outputs), values)
    return cpp.view(y, [*shape[:-1], outputs])


def gradient(
    name: str,
    text: str,
    grad: Any,
    x: Any,
    indices: Any,
    sizes: tuple[int, int],
    numbers: Mapping[str, Any],
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Return what a kernel of a gradient of weights computes, or None where it is not of ``dtype``.

    Args:
        name: in generated code.
        text: of the kernel; it reads ``X``, ``G`` and ``INDICES``.
        grad: ``(..., outputs)``, any strides.
        x: ``(..., inputs)``, any strides.
        indices: of the weights.
        sizes: of the result; the second is a whole number of ``N``.
        numbers: what else the text names: ``N`` at least.
        dtype: of x and grad.
    """
    tensors = (grad, x)
    if any(t.get_device().type != "cpu" or t.get_dtype() is not dtype for t in tensors):
        return None
    flat = {key: cpp.view(t, [-1, t.get_size()[-1]]) for key, t in (("X", x), ("G", grad))}
    known = {"ROWS": 16, "ALONE": ALONE, "CHECKED": [], "WEIGHTS": math.prod(sizes)}
    return cpp.run(name, text, flat | {"INDICES": indices}, sizes, known | dict(numbers))
