"""The registry: for every operator the ways to run it.

``CANDIDATES`` names, for every structured operator, the ways to run it; the dense one comes last.
``PLAIN`` leaves out what must be compiled. ``PORTABLE`` is for graphs that leave as ONNX: standard
operators, costs of onnxruntime. ``DENSE`` runs frozen dense weights.
"""

from collections.abc import Callable
from functools import cache
from typing import Any, TypeAlias

from padst_compiler import cpp_templates
from padst_compiler.formulation import Candidates, Formulation
from padst_compiler.kernels import (
    block,
    fan_in,
    gpu_block,
    gpu_semi_structured,
    gpu_sums,
    micro_block,
    micro_diagonal,
    micro_features,
    micro_gradients,
    micro_mlp,
    micro_pairs,
    micro_select,
)
from padst_compiler.kernels.dense import dense
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.structures import STRUCTURES

__all__ = ["CANDIDATES", "COMPILED", "DENSE", "PLAIN", "PORTABLE", "install"]

COMPILED = (
    micro_block,
    micro_diagonal,
    micro_features,
    micro_gradients,
    micro_mlp,
    micro_pairs,
    micro_select,
)
"""The modules that lower operators in Inductor, on a CPU."""

GPU = (gpu_block, gpu_sums)
"""The same on a GPU."""

Lowering: TypeAlias = Callable[..., Any]

DENSE = (micro_block.LINEAR_FORM, micro_pairs.LINEAR_FORM)
"""Ways to run a layer of blocks that run one without zeros well."""

_COMPILED: dict[Any, tuple[Formulation, ...]] = {
    LINEAR["block"]: (*DENSE, micro_pairs.ZIPPED_FORM, gpu_block.LINEAR_FORM),
    LINEAR_DX["block"]: (micro_block.DX_FORM, micro_pairs.DX_FORM, gpu_block.DX_FORM),
    LINEAR_DW["block"]: (micro_block.DW_FORM, micro_pairs.DW_FORM, gpu_block.DW_FORM),
    LINEAR["nm"]: (micro_select.NM_FORM, micro_features.NM_FORM, gpu_semi_structured.NM_FORM),
    LINEAR["diagonal"]: (micro_diagonal.LINEAR_FORM,),
    LINEAR_DX["diagonal"]: (micro_diagonal.DX_FORM,),
    LINEAR_DW["diagonal"]: (micro_diagonal.DW_FORM,),
    LINEAR["fan_in"]: (micro_select.FAN_IN_FORM, micro_features.FAN_IN_FORM),
    **{LINEAR_DX[name]: ways for name, ways in micro_gradients.DX_FORMS.items()},
    **{LINEAR_DW[name]: ways for name, ways in micro_gradients.DW_FORMS.items()},
}
for _ops, _forms in (
    (LINEAR, gpu_sums.FROZEN_FORMS),
    (LINEAR, gpu_sums.LINEAR_FORMS),
    (LINEAR_DX, gpu_sums.DX_FORMS),
    (LINEAR_DW, gpu_sums.DW_FORMS),
):
    _COMPILED |= {_ops[name]: (*_COMPILED[_ops[name]], form) for name, form in _forms.items()}
_ATEN: Candidates = {
    LINEAR["block"]: block.LINEAR,
    LINEAR_DX["block"]: block.DX,
    LINEAR_DW["block"]: block.DW,
    LINEAR["nm"]: fan_in.NM_LINEAR,
    LINEAR["diagonal"]: fan_in.DIAGONAL_LINEAR,
    LINEAR["fan_in"]: fan_in.FAN_IN_LINEAR,
}


def _with_dense(sparse: Candidates) -> Candidates:
    return {
        op: (*sparse.get(op, ()), fallback)
        for kind in STRUCTURES
        for op, fallback in zip(
            (LINEAR[kind.name], LINEAR_DX[kind.name], LINEAR_DW[kind.name]),
            dense(kind),
            strict=True,
        )
    }


CANDIDATES: Candidates = _with_dense(
    {op: (*ways, *_ATEN.get(op, ())) for op, ways in _COMPILED.items()}
)
PLAIN: Candidates = _with_dense(_ATEN)
PORTABLE: Candidates = _with_dense({LINEAR["block"]: block.PORTABLE})


@cache
def install() -> None:
    """Let Inductor lower the operators that kernels run; once in a process."""
    on_cpu = {op: lowering for kernels in COMPILED for op, lowering in kernels.LOWERINGS.items()}
    on_gpu = {op: lowering for kernels in GPU for op, lowering in kernels.LOWERINGS.items()}
    for op in {**on_cpu, **on_gpu}:
        cpp_templates.lower(op, _by_device(op, on_cpu.get(op), on_gpu.get(op)))


def _by_device(op: Any, on_cpu: Lowering | None, on_gpu: Lowering | None) -> Lowering:
    """Return the lowering for the device of the first argument; none calls the operator."""

    def lower(x: Any, *rest: Any) -> Any:
        chosen = on_gpu if x.get_device().type == "cuda" else on_cpu
        return chosen(x, *rest) if chosen else cpp_templates.fallback(op, x, *rest)

    return lower
