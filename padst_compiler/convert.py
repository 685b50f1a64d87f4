"""From a sparse layer back to a dense one, and to and from the description that a file holds."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from padst_compiler.config import SparseConfig, describe, parse_structure
from padst_compiler.index_map import IndexMap
from padst_compiler.layers import SparseConv1D, SparseLayer, SparseLinear, SparsePointwiseConv
from padst_compiler.permutation import FixedPermutation, Permutation, SinkhornPermutation
from padst_compiler.sites import Site
from padst_compiler.structures import Shape, Structure

__all__ = ["from_description", "require", "to_dense", "to_description", "unchanged_on_error"]

_OWN = ("structure", "shape", "side", "dense_type", "config")
_KINDS: dict[str, type[SparseLayer]] = {  # by the words of ``Site.kind``
    "linear": SparseLinear,
    "conv1d": SparseConv1D,
    "conv1x1": SparsePointwiseConv,
}


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
    recorders = {id(m.recorder): None for m in model.modules() if isinstance(m, SparseLayer)}
    plain = copy.deepcopy(model, dict(recorders))  # a recorder holds on to its layer: none is made
    for module in list(plain.modules()):
        if isinstance(module, SparseLayer):
            _restore(module)
    return plain


def _restore(layer: SparseLayer) -> None:
    with torch.no_grad():
        weight = layer.weight.to(layer.values.dtype).contiguous()
    trainable, dense_type = layer.values.requires_grad, layer.dense_type
