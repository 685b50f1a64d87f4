"""Two layers of blocks as one C++ kernel: ``padst::block_mlp``, put there by ``fuse_mlp``.

A thread computes all hidden features of a few tokens, bias and activation on the tiles, and the
second layer from them while they are in its cache; what follows the second layer is Inductor's.
fp32 on a CPU. With too few tokens for that, threads share the tokens as two kernels would.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from padst_compiler import cpp_templates as cpp
from padst_compiler.kernel_ops import BLOCK_MLP
from padst_compiler.kernels.micro import block_width, source, sums
from padst_compiler.kernels.micro_block import ROW, blocks_of

__all__ = ["LOWERINGS", "WRITTEN"]

WRITTEN: Mapping[str, str] = {
    "relu": "at::vec::clamp_min(x, all(0))",
    "gelu": "all(0.5) * x * (all(1) + (x * all(M_SQRT1_2)).erf())",
    "gelu_tanh": "all(0.5) * x * (all(1) + (all(M_SQRT2 * M_2_SQRTPI * 0.5) * "
    "(x + all(0.044715) * x * x * x)).tanh())",
    "silu": "x / (all(1) + x.neg().exp())",
    "quick_gelu": "x / (all(1) + (all(-1.702) * x).exp())",
}
"""Activations of a vector, by their names; ``all`` makes vectors of numbers."""

CALL = (
    ROW
    + """
    const auto activate = [](float* tile, int64_t count) {
        using Vector = at::vec::Vectorized<float>;
        const auto all = [](double number) { return Vector((float)number); };
        for (int64_t n = 0; n < count; n += Vector::size()) {
            const int64_t left = std::min<int64_t>(Vector::size(), count - n);
            const Vector x = Vector::loadu(tile + n, left);
            const Vector y = {{ACTIVATION}};
            y.store(tile + n, left);
        }
    };
    {%- for layer, numbers in (("1", FIRST), ("2", SECOND)) %}
    using Sides{{layer}} = padst::Sides<{{numbers.N}}, {{numbers.C}}, {{numbers.R}}>;
    const padst::Layout blocks{{layer}}{
        INDICES{{layer}}, nullptr, {{numbers.KEPT}}, {{numbers.ROWS}}};
    {%- endfor %}
    padst::block_mlp<Sides1, Sides2, {{HIDDEN}}, {{ROW}}, {{READ}}, {{MOVED}}>(
        X, row, tokens, {{FEATURES}}, {{I}}, {{in_map}}, W1, blocks1, {{BIAS}}, W2, blocks2,
        {{out_map}}, threads, activate, store);
"""
)


def lower_mlp(x: Any, *rest: Any) -> Any:
    """Lower ``padst::block_mlp``; what the kernel does not do calls the operator."""
    return _mlp(x, *rest) or cpp.fallback(BLOCK_MLP, x, *rest)


def _mlp(
    x: Any,
    values1: Any,
    indices1: Any,
    bias1: Any,
    values2: Any,
    indices2: Any,
    hidden: Any,
    outputs: Any,
    activation: str,
    in_map: Any,
    out_map: Any,
) -> Any:
    first = blocks_of(x, indices1, values1.get_size(), hidden)
    second = blocks_of(x, indices2, values2.get_size(), outputs)
    if first is None or second is None:
        return None
    if not block_width(first["R"]) or not block_width(second["R"]):
        return None
    for layer in (first, second):
        layer["N"] = block_width(layer["R"])
    tensors = {"W1": values1, "INDICES1": indices1, "W2": values2, "INDICES2": indices2}
    if bias1 is not None:
        tensors["BIAS1"] = bias1
    (features,) = cpp.numbers([hidden])
    numbers = {
        "FIRST": first,
        "SECOND": second,
        "HIDDEN": features,
        "N": second["N"],
        "WEIGHTS": sum(s["ROWS"] * s["KEPT"] * s["C"] * s["R"] for s in (first, second)),
        "ACTIVATION": WRITTEN[activation],
        "BIAS": "nullptr" if bias1 is None else "BIAS1",
    }
    text, maps = source(CALL, "block.h", "mlp.h"), (in_map, out_map)
    total = second["ROWS"] * second["R"]
    return sums("padst_block_mlp", text, x, tensors, maps, total, numbers, apart=False)


LOWERINGS: dict[torch._ops.OpOverload, Callable[..., Any]] = {BLOCK_MLP: lower_mlp}
