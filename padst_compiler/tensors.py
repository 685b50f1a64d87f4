"""Questions about tensors: which a value holds, which a call changes, which share their numbers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

__all__ = ["is_plain", "storage_key", "tensors_in", "written_by"]


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is an ordinary one with strides: no subclass, not sparse or nested.

    Args:
        tensor: any tensor.

    Example:
        >>> is_plain(torch.ones(2)), is_plain(torch.ones(2).to_sparse())
        (True, False)
    """
    strided = tensor.layout is torch.strided and not tensor.is_nested
    return strided and type(tensor) in (Tensor, nn.Parameter)


def storage_key(tensor: Tensor) -> tuple[int, int]:
    """Return what two names of the same numbers have in common: storage and offset.

    Args:
        tensor: any tensor; only itself has its key where it is not plain.

    Example:
        >>> x = torch.ones(2, 3)
        >>> storage_key(x) == storage_key(x.t())
        True
    """
    if not is_plain(tensor):
        return id(tensor), 0
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())


def tensors_in(tree: Any) -> list[Tensor]:
    """Return the tensors among the leaves of nested containers.

    Args:
        tree: any value.

    Example:
        >>> len(tensors_in({"x": torch.ones(2), "n": [3, torch.ones(1)]}))
        2
    """
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def written_by(op: torch._ops.OpOverload, args: Any, kwargs: Any) -> list[Tensor]:
    """Return the tensors that a call changes, as far as the operator's schema says so.

    Args:
        op: an operator.
        args: its positional arguments.
        kwargs: its keyword arguments.

    Example:
        >>> x = torch.ones(2)
        >>> written_by(torch.ops.aten.add_.Tensor, (x, 1), {})[0] is x
        True
    """
    values = [
        args[at] if at < len(args) else kwargs.get(argument.name)
        for at, argument in enumerate(op._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    return tensors_in(values)
