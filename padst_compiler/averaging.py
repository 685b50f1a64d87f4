"""Exponential moving averages of sparse models, whose masks move and whose permutations harden.

``torch.optim.swa_utils.AveragedModel`` averages parameters by position and leaves buffers alone: it
would average weights of different units under the mask of the first step. Here the average has the
mask of the model: a weight whose unit stays is averaged, one whose unit is new is taken over.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from padst_compiler.layers import SparseLayer, sparse_layers
from padst_compiler.storage import replace_data

__all__ = ["EMA"]


class EMA:
    """An exponential moving average of a model, itself a model: ``ema.model``.

    Soft permutations are averaged as their parameters are; where one has become an index map, so
    has its average. Buffers that are not averaged (running statistics) are copied.

    Args:
        model: sparse or dense; it is copied, and stays as it is.
        decay: what a step keeps of the average, ``0 <= decay < 1``.

    Raises:
        ValueError: ``decay`` is out of range.

    Example:
        >>> import padst_compiler as padst
        >>> model = padst.sparsify(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))
        >>> ema = EMA(model, decay=0.9)
        >>> ema.update(model)  # after each optimizer.step()
        >>> ema.model(torch.zeros(2, 64)).shape
        torch.Size([2, 64])
    """

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        """Start from the model as it is."""
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"Expected 0 <= decay < 1. Got {decay}. Use 0.999, say.")
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False).eval()
        for layer in sparse_layers(self.model).values():
            layer.recorder = None

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards ``model``; call it after each ``optimizer.step()``.

        Args:
            model: the one that the average was made from.

        Raises:
            ValueError: it has other layers.
        """
        ours = dict(self.model.named_modules())
        known = sparse_layers(self.model).keys()
        if known != sparse_layers(model).keys():
            raise ValueError(
                f"Expected the model that was averaged, with {len(known)} sparse layers. Got "
                f"{len(sparse_layers(model))}. Sparsify first, then make the average."
            )
        for name, layer in sparse_layers(model).items():
            average = ours[name]
            assert isinstance(average, SparseLayer)
            self._follow(average, layer)
        theirs = dict(_tensors(model))
        for name, tensor in _tensors(self.model):
            learned = isinstance(theirs[name], nn.Parameter) and tensor.is_floating_point()
            _blend(tensor, theirs[name], self.decay if learned else 0.0)

    def _follow(self, average: SparseLayer, layer: SparseLayer) -> None:
        """Take over topology, selection and permutation kind; average the weights that stay."""
        if type(average.permutation) is not type(layer.permutation):
            average.permutation = copy.deepcopy(layer.permutation)
        if average.size() != layer.size() or not _same(average.rows, layer.rows):
            replace_data(average.values, layer.values.detach().clone())
            average.indices = layer.indices.clone()
            average.rows = None if layer.rows is None else layer.rows.clone()
            average.selection = copy.deepcopy(layer.selection)
            return
        stays = average.indices == layer.indices
        stays = stays.view(*stays.shape, *[1] * (layer.values.dim() - stays.dim()))
        blended = torch.lerp(layer.values, average.values, self.decay)
        average.values.copy_(torch.where(stays, blended, layer.values))
        average.indices.copy_(layer.indices)


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(one, other)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield parameters and buffers but those of the topology, each once."""
    own = {id(m.values) for m in sparse_layers(model).values()}
    own |= {id(b) for m in sparse_layers(model).values() for b in (m.indices, m.rows)}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if id(tensor) not in own and ".recorder." not in f".{name}":
            yield name, tensor


def _blend(average: Tensor, tensor: Tensor, decay: float) -> None:
    average.copy_(tensor if decay == 0.0 else torch.lerp(tensor, average, decay))
