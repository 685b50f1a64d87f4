"""Which units of each layer were ever active: the in-time over-parameterisation rate (ITOP).

Source: Liu et al. 2021, "Do we actually need dense over-parameterization?" (arXiv 2102.02887).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from padst_compiler.control import some_sparse
from padst_compiler.layers import SparseLayer

__all__ = ["Exploration"]


class Exploration:
    """Note, after every optimiser step, the units that are active; count those that ever were.

    Make it after ``DynamicSparsity``, so that its hook runs after the masks have moved.

    Cost: one bit per candidate unit, on the layer's device: 1/32 of the dense float32 weight for
    single weights, 1/32768 for blocks of 32, next to nothing for diagonals. A step without an
    update costs one comparison of two integers per layer; an update, one write of its units.

    Args:
        model: holds sparse layers.
        optimizer: trains them.

    Raises:
        ValueError: there is no sparse layer.

    Example:
        >>> import padst_compiler as padst
        >>> model = padst.sparsify(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))
        >>> explored = Exploration(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> explored.rates()  # at the start, the density
        {'0': 0.5, '2': 0.5}
    """

    def __init__(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Take down the units that are active now, then follow ``optimizer``."""
        self._layers = some_sparse(model)
        self._bits = {name: _room(layer) for name, layer in self._layers.items()}
        self._seen: dict[str, tuple[Tensor, int]] = {}  # buffer and version, at the last look
        self.note()
        self._hook = optimizer.register_step_post_hook(self._after_step)

    @torch.no_grad()
    def note(self) -> None:
        """Take down the active units of every layer whose topology was written to."""
        for name, layer in self._layers.items():
            indices, version = self._seen.get(name, (None, 0))
            if indices is layer.indices and version == layer.indices._version:
                continue
            bits = self._bits[name] = self._bits[name].to(layer.indices.device)
            _mark(bits, _units(layer))
            self._seen[name] = (layer.indices, layer.indices._version)

    def rates(self) -> dict[str, float]:
        """Return by layer the share of all candidate units that were ever active."""
        return {
            name: _count(self._bits[name]) / _candidates(layer)
            for name, layer in self._layers.items()
        }

    def detach(self) -> None:
        """Let go of the optimiser; what was noted stays."""
        self._hook.remove()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the bits by layer."""
        return {name: bits.clone() for name, bits in self._bits.items()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from ``state``; call it after the model's own.

        Raises:
            ValueError: ``state`` is that of other layers; nothing was changed.
        """
        sizes = {name: bits.numel() for name, bits in state.items()}
        ours = {name: bits.numel() for name, bits in self._bits.items()}
        if sizes != ours:
            raise ValueError(
                f"Expected bits of {ours}. Got {sizes}. Sparsify as the run that was saved did."
            )
        for name, bits in state.items():
            self._bits[name].copy_(bits)
        self._seen.clear()
        self.note()

    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Any) -> None:
        del optimizer, args, kwargs
        self.note()


def _candidates(layer: SparseLayer) -> int:
    groups, candidates = layer.structure.table(layer.shape)
    return groups * candidates


def _room(layer: SparseLayer) -> Tensor:
    size = (_candidates(layer) + 7) // 8
    return torch.zeros(size, dtype=torch.uint8, device=layer.indices.device)


def _units(layer: SparseLayer) -> Tensor:
    """Return one number per kept unit: its place in the table of all groups and candidates.

    It is -1 for the units of ablated neurons.
    """
    slots = layer.structure.slots(layer.kept_units(), layer.shape).long()
    group = torch.arange(slots.shape[0], device=slots.device)[:, None]
    keys = group * layer.structure.table(layer.shape)[1] + slots
    return keys.masked_fill(slots < 0, -1).flatten()


def _mark(bits: Tensor, units: Tensor) -> None:
    there = (units >= 0).to(bits.dtype)  # a mask of places would have to be read from a GPU
    marks = there << (units & 7).to(bits.dtype)
    bits |= torch.zeros_like(bits).index_add_(0, units.clamp_min(0) >> 3, marks)  # units differ


def _count(bits: Tensor) -> int:
    byte = torch.arange(256, device=bits.device)
    ones = sum((byte >> place) & 1 for place in range(8))
    assert isinstance(ones, Tensor)
    return int((bits.long().bincount(minlength=256) * ones).sum())
