"""How a device runs one operator: here as formulations that Inductor compiles well.

``CANDIDATES`` names, for every structured operator, the ways to run it; the dense one comes last.
``PORTABLE`` is the same for graphs that leave as ONNX: standard operators, costs of onnxruntime.
"""

from padst_compiler.formulation import Candidates
from padst_compiler.kernels import block, fan_in
from padst_compiler.kernels.dense import dense
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.structures import STRUCTURES

__all__ = ["CANDIDATES", "PORTABLE"]

_SPARSE = {
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


CANDIDATES: Candidates = _with_dense(_SPARSE)
PORTABLE: Candidates = _with_dense({LINEAR["block"]: block.PORTABLE})
