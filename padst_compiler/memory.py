"""What an optimiser remembers of a layer's stored weights, moved along with them.

No optimiser is known by name: a tensor of the parameter's own shape is taken to hold one number
per weight (momentum, second moments); every other tensor is left alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from padst_compiler.storage import replace_data

__all__ = ["Memory"]


class Memory:
    """The state of ``optimizer`` for each stored weight.

    Args:
        optimizer: any.
        keep_state: keep what is remembered at places whose weight is new, instead of zeroing it.

    Example:
        >>> weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        >>> memory = Memory(torch.optim.SGD([weight], lr=0.1))
        >>> memory.move(weight, torch.tensor([2, -1, 0]))
        >>> weight.tolist()
        [3.0, 0.0, 1.0]
    """

    def __init__(self, optimizer: Optimizer, keep_state: bool = False) -> None:
        """Hold on to the optimiser."""
        self._optimizer, self.keep_state = optimizer, keep_state

    @torch.no_grad()
    def forget(self, values: nn.Parameter, changed: Tensor) -> None:
        """Zero the weights of the changed units, their gradients and what is remembered of them.

        Args:
            values: of one layer.
            changed: ``(groups, k)``, bool, one for each stored unit.
        """
        size = values.numel() // changed.numel()
        mask = changed[..., None].expand(*changed.shape, size).reshape(values.shape)
        state = () if self.keep_state else self._state(values)
        for tensor in (values, values.grad, *(tensor for _, tensor in state)):
            if tensor is not None:
                tensor.masked_fill_(mask.to(tensor.device), 0)

    @torch.no_grad()
    def move(self, values: nn.Parameter, source: Tensor) -> None:
        """Give every place the weight of another one, in place; nothing changes its shape.

        Args:
            values: of one layer.
            source: int64, as many as ``values``: the place that each weight comes from, -1 for a
                new one, which is zero.
        """
        fresh = (source < 0).view(values.shape)
        for tensor in (values, values.grad):
            if tensor is not None:
                tensor.copy_(_gather(tensor, source, values.shape).masked_fill_(fresh, 0))
        for _, tensor in self._state(values):
            moved = _gather(tensor, source, values.shape)
            gone = fresh.to(tensor.device)
            kept = tensor if self.keep_state else torch.zeros((), dtype=tensor.dtype)
            tensor.copy_(torch.where(gone, kept.to(tensor.device), moved))

    @torch.no_grad()
    def shrink(self, values: nn.Parameter, source: Tensor, shape: tuple[int, ...]) -> None:
        """Keep some weights only; the Parameter stays the same object and loses its gradient.

        An optimiser that remembers anything else than one number per weight (Adafactor's rows
        and columns) forgets this parameter, for its numbers would belong to other weights.

        Args:
            values: of one layer.
            source: int64, the places that stay.
            shape: of ``values`` afterwards.
        """
        state = self._optimizer.state.get(values, {})
        tensors = {key: t for key, t in state.items() if isinstance(t, Tensor)}
        if any(t.numel() > 1 and t.shape != values.shape for t in tensors.values()):
            self._optimizer.state.pop(values, None)
        for key, tensor in list(self._state(values)):
            state[key] = _gather(tensor, source, shape)
        replace_data(values, _gather(values.detach(), source, shape))

    def drop(self, parameter: nn.Parameter) -> None:
        """Take a parameter out of the optimiser."""
        for group in self._optimizer.param_groups:  # an emptied group stays: schedulers count them
            group["params"] = [p for p in group["params"] if p is not parameter]
        self._optimizer.state.pop(parameter, None)

    def _state(self, values: nn.Parameter) -> Iterator[tuple[Any, Tensor]]:
        for key, tensor in self._optimizer.state.get(values, {}).items():
            if isinstance(tensor, Tensor) and tensor.shape == values.shape:
                yield key, tensor


def _gather(tensor: Tensor, source: Tensor, shape: tuple[int, ...]) -> Tensor:
    at = source.reshape(-1).clamp_min(0).to(tensor.device)
    return tensor.reshape(-1)[at].view(shape)
