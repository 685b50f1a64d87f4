"""Fan-in kernels in C++: x is turned in tiles, an input is a row of 32 tokens. fp32 on a CPU.

Sixteen outputs are turned back and stored together. N:M is constant fan-in with computed indices,
and runs so where its own kernel does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from padst_compiler import cpp_templates as cpp
from padst_compiler.formulation import Formulation, Geometry, gemm, moved
from padst_compiler.kernel_ops import GATHERED_SUMS
from padst_compiler.kernels.fan_in import nm_inputs
from padst_compiler.kernels.micro import fits, source, sums, wide, widening
from padst_compiler.structures import NM, FanIn

__all__ = ["FAN_IN_FORM", "LOWERINGS", "NM_FORM"]

DOWN, ACROSS = 16, 32  # outputs and tokens of a tile
FEW = 8  # fewer tokens leave most of a tile empty

CALL = """
    padst::feature_sums<{{THROUGH}}, {{MOVED}}>(
        X, row, tokens, {{FEATURES}}, {{in_map}}, W, INPUTS, {{O}}, {{KEPT}}, {{out_map}}, threads,
        store);
"""


# -- formulations ----------------------------------------------------------------------------------


def fan_in(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return ``x S^T + bias`` for constant fan-in."""
    del out_features
    return _gathered(x, values, indices, bias)


def nm(
    x: Tensor, values: Tensor, indices: Tensor, bias: Tensor | None, out_features: int
) -> Tensor:
    """Return ``x S^T + bias`` for N:M."""
    del out_features
    return _gathered(x, values.flatten(1), nm_inputs(x, indices), bias)


def _gathered(x: Tensor, weights: Tensor, inputs: Tensor, bias: Tensor | None) -> Tensor:
    y: Tensor = GATHERED_SUMS(x, weights.contiguous(), inputs.to(torch.int32), None, None)
    return y if bias is None else y + bias


def _cost(g: Geometry, kind: type[FanIn | NM]) -> float | None:
    outputs, tokens = g.shape.out_features, -(-g.tokens // ACROSS) * ACROSS
    if not isinstance(g.structure, kind) or not fits(g) or outputs % DOWN or g.tokens < FEW:
        return None
    laid_out = 0.0 if g.frozen or kind is FanIn else moved(g.nnz, g.item)
    # The inputs of one tile stay in the cache. Xeon: 0.43 and 0.27 of dense; Zen 4: 0.54 and 0.4.
    rate, casts = widening(g, 0.36 if tokens <= ACROSS else 0.25)
    return gemm(tokens, g.nnz // outputs, outputs, efficiency=rate) + laid_out + casts


FAN_IN_FORM = Formulation("feature_kernel", wide(fan_in), lambda g: _cost(g, FanIn))
NM_FORM = Formulation("feature_kernel", wide(nm), lambda g: _cost(g, NM))


# -- lowerings -------------------------------------------------------------------------------------


def lower_sums(x: Any, weights: Any, inputs: Any, *maps: Any) -> Any:
    """Lower ``padst::gathered_sums``; what the kernel does not do calls the operator."""
    out, kept = cpp.numbers(weights.get_size())
    y = None
    if out % DOWN == 0 and inputs.get_dtype() is torch.int32:
        numbers: dict[str, Any] = {"N": DOWN, "ROWS": ACROSS, "KEPT": kept}
        numbers |= {"WEIGHTS": kept * out, "THROUGH": str(maps[0] is not None).lower()}
        tensors, text = {"W": weights, "INPUTS": inputs}, source(CALL, "features.h")
        y = sums("padst_features", text, x, tensors, maps, out, numbers, apart=False)
    return y or cpp.fallback(GATHERED_SUMS, x, weights, inputs, *maps)


LOWERINGS: dict[torch._ops.OpOverload, Callable[..., Any]] = {GATHERED_SUMS: lower_sums}
