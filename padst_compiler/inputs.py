"""Example inputs: a tensor, a tuple of positional arguments or a dict of keyword arguments."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["bind", "check_device"]


def bind(model: nn.Module, example_inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return positional and keyword arguments, checked to lie where the model's Parameters do.

    Raises:
        ValueError: an input lies on another device than the model.

    Example:
        >>> bind(nn.Linear(2, 2), torch.ones(1, 2))[0][0].shape
        torch.Size([1, 2])
    """
    args: tuple[Any, ...] = (example_inputs,)
    kwargs: dict[str, Any] = {}
    if isinstance(example_inputs, Mapping):
        args, kwargs = (), dict(example_inputs)
    elif isinstance(example_inputs, tuple | list):
        args = tuple(example_inputs)
    check_device(model, (args, kwargs))
    return args, kwargs


def check_device(model: nn.Module, inputs: Any) -> None:
    """Refuse inputs on a device where the model has no Parameter.

    Raises:
        ValueError: names both devices.
    """
    devices = {p.device for p in model.parameters()} | {b.device for b in model.buffers()}
    for tensor in torch.utils._pytree.tree_leaves(inputs):
        if isinstance(tensor, Tensor) and devices and tensor.device not in devices:
            where = ", ".join(sorted(map(str, devices)))
            raise ValueError(
                f"Expected example inputs on {where}, where the model is. Got {tensor.device}. "
                f"Move them with .to({where.split(',')[0]!r})."
            )
