"""A sparse layer as the dense layer that it was."""

from __future__ import annotations

import copy

import torch
from torch import nn

from padst_compiler.layers import SparseLayer
from padst_compiler.parameter import SparseParameter, put_back

__all__ = ["to_dense"]


def to_dense(model: nn.Module) -> nn.Module:
    """Return a plain copy of ``model``: every sparse layer is the dense module that it was.

    The weight is the effective one, zeros included, so the outputs are the same up to rounding. A
    soft permutation is multiplied in, which leaves no zeros; call ``harden`` first to keep them.

    Args:
        model: stays as it is; may itself be a sparse layer.

    Example:
        >>> import padst_compiler as padst
        >>> model = padst.sparsify(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))
        >>> to_dense(model)[0]
        Linear(in_features=64, out_features=64, bias=True)
    """
    plain = copy.deepcopy(model)
    for module in list(plain.modules()):
        put_back(module)
        if isinstance(module, SparseLayer) and not isinstance(module, SparseParameter):
            _restore(module)
    return plain


def _restore(layer: SparseLayer) -> None:
    with torch.no_grad():
        weight = layer.weight.to(layer.values.dtype).contiguous()
    trainable, bias = layer.values.requires_grad, layer._parameters.pop("bias", None)
    for name in ("values", "indices", "rows", "selection", "permutation", "recorder"):
        delattr(layer, name)
    dense_type = layer.dense_type
    for name in ("structure", "shape", "side", "dense_type", "config"):
        layer.__dict__.pop(name, None)
    layer.__class__ = dense_type  # type: ignore[assignment]
    layer.register_parameter("weight", nn.Parameter(weight, trainable))
    layer._parameters["bias"] = bias  # after the weight, as in a dense layer
