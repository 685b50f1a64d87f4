"""Train sparse layers with learned shuffles; compile the shuffles away.

Importing registers the ``padst::`` operators. ``torch.compile(model, backend="padst")``
needs no import. The compiler and what builds on it load when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from padst_compiler import theory
from padst_compiler.averaging import EMA
from padst_compiler.checkpoint import load, save
from padst_compiler.config import SparseConfig
from padst_compiler.densify import to_dense
from padst_compiler.exploration import Exploration
from padst_compiler.layers import SparseLayer, sparse_layers
from padst_compiler.plan import plan
from padst_compiler.reporting import report
from padst_compiler.sparsify import sparsify
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Unstructured
from padst_compiler.tensorboard import TensorBoard
from padst_compiler.training import DynamicSparsity, harden

if TYPE_CHECKING:
    from padst_compiler.backend import export_onnx
    from padst_compiler.explanation import explain

__all__ = ["NM", "Block", "Diagonal", "FanIn", "SparseConfig", "SparseLayer", "Unstructured"]
__all__ += ["load", "plan", "save", "sparse_layers", "sparsify", "to_dense"]
__all__ += ["EMA", "DynamicSparsity", "Exploration", "harden"]
__all__ += ["TensorBoard", "explain", "export_onnx", "report", "theory"]

__version__ = "0.1.0"

_LATER = {"explain": "padst_compiler.explanation", "export_onnx": "padst_compiler.backend"}


def __getattr__(name: str) -> Any:
    if name in _LATER:
        return getattr(importlib.import_module(_LATER[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
