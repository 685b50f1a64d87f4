"""Who controls a sparse layer: one controller at a time, which hears when a layer hardens."""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import nn
from torch.optim import Optimizer

from padst_compiler.layers import SparseLayer, sparse_layers

if TYPE_CHECKING:
    from padst_compiler.hardening import Hardening

__all__ = ["controllable", "owner_of", "release", "some_sparse", "take"]

_CONTROL: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Hardening]] = weakref.WeakKeyDictionary()


def take(layers: Iterable[SparseLayer], owner: Hardening) -> None:
    """Note that ``owner`` controls the layers from now on, as long as it lives."""
    for layer in layers:
        _CONTROL[layer] = weakref.ref(owner)


def release(layers: Iterable[SparseLayer]) -> None:
    """Note that nobody controls the layers any more."""
    for layer in layers:
        _CONTROL.pop(layer, None)


def owner_of(layer: SparseLayer) -> Hardening | None:
    """Return who controls a layer, if anyone does."""
    reference = _CONTROL.get(layer)
    return None if reference is None else reference()


def controllable(model: nn.Module, optimizer: Optimizer) -> dict[str, SparseLayer]:
    """Return the sparse layers of ``model`` by name.

    Raises:
        ValueError: there is none, one is already controlled, or ``optimizer`` does not train one.
    """
    layers = some_sparse(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, layer in layers.items():
        if owner_of(layer) is not None:
            raise ValueError(
                f"Expected one controller per model. Got a second one for {name or 'the model'}. "
                "Call detach() on the first."
            )
        if layer.values.requires_grad and id(layer.values) not in held:
            raise ValueError(
                f"Expected an optimizer that holds {f'{name}.values'.lstrip('.')}. Got another. "
                "Make the optimizer after sparsify, from model.parameters()."
            )
    return layers


def some_sparse(model: nn.Module) -> dict[str, SparseLayer]:
    """Return the sparse layers of ``model`` by name.

    Raises:
        ValueError: there is none.
    """
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(
            f"Expected a model with sparse layers. Got {type(model).__name__} without one. "
            "Call padst.sparsify(model) first."
        )
    return layers
