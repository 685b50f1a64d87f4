"""What a growth method is: how one layer's topology moves, and what that needs."""

from __future__ import annotations

import warnings
from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from padst_compiler.layers import SparseLayer
from padst_compiler.memory import Memory
from padst_compiler.recorder import Recorder
from padst_compiler.schedule import Schedule
from padst_compiler.text import suggest
from padst_compiler.watch import FINITE, POISONED

__all__ = ["Job", "Method", "NonFiniteGradientWarning", "as_method", "verdict", "warned"]


class NonFiniteGradientWarning(UserWarning):
    """A gradient was NaN or infinite when a topology was to move; it stayed as it was."""


WARNINGS: dict[int, tuple[type[Warning], str]] = {
    1: (
        NonFiniteGradientWarning,
        "Expected finite gradients in {}. Got NaN or infinity. "
        "Its topology stays; lower the learning rate, or clip the gradients.",
    ),
    2: (
        UserWarning,
        "Expected gradients in {}. Got none. "
        "Its topology stays; call the layer itself, not F.linear on its weight.",
    ),
}
"""Why no topology follows from a layer's gradients, by verdict."""


@dataclass(frozen=True)
class Job:
    """One layer at one update.

    ``last`` says whether it is the last sparse layer of the model; ``recorder`` is None where the
    method records nothing; ``generator`` lives on the CPU. ``trusted`` is a bool on the layer's
    device, None where it is known to be true.
    """

    name: str
    layer: SparseLayer
    memory: Memory
    recorder: Recorder | None
    schedule: Schedule
    step: int
    generator: torch.Generator
    last: bool
    trusted: Tensor | None = None

    @property
    def slots(self) -> Tensor:
        """The kept units, ``(g, k)``; -1 in the groups of ablated neurons."""
        return self.layer.structure.slots(self.layer.kept_units(), self.layer.shape)

    @property
    def drop(self) -> float:
        """The share of units to drop now."""
        return self.schedule.drop_at(self.step)

    @property
    def seen(self) -> Recorder:
        """The recorder of a method that records."""
        assert self.recorder is not None
        return self.recorder

    def replace(self, slots: Tensor, changed: Tensor) -> Tensor:
        """Put other units into some slots; return the share that changed, on the layer's device.

        Args:
            slots: ``(g, k)``, of a layer without ablated neurons.
            changed: ``(g, k)``, bool: which hold another unit. They start at zero.
        """
        if self.trusted is not None:
            changed = changed & self.trusted
            slots = torch.where(changed, slots, self.slots)
        self.layer.indices.copy_(self.layer.structure.indices_of(slots, self.layer.shape))
        self.memory.forget(self.layer.values, changed)
        return changed.float().mean()


@dataclass(frozen=True)
class Method(ABC):
    """A growth method; the fields of a subclass are its options.

    A new one is a subclass in a file of its own and a line in ``METHODS``. It overrides ``move``,
    and what else it needs. One that moves layers by ``Job.replace`` alone, and reads nothing back
    from the GPU, says that it does not wait: then no update does.
    """

    name: ClassVar[str]
    waits: ClassVar[bool] = True
    records: ClassVar[bool] = False
    ablates: ClassVar[bool] = False

    def refusal(self, layers: Mapping[str, SparseLayer]) -> str | None:
        """Return why it cannot train these layers, with the cure; None where it can."""
        for name, layer in layers.items():
            config = layer.config
            if layer.selection is not None:
                return (
                    f"Expected method 'dynadiag' for {_at(name)}, which chooses its diagonals "
                    f"softly. Got {self.name!r}. Use 'dynadiag'."
                )
            if layer.ablated and not self.ablates:
                return (
                    f"Expected method 'srigl' or 'static' for {_at(name)}, which has ablated "
                    f"neurons. Got {self.name!r}. Go on with 'srigl'."
                )
            if config is not None and config.start_sparsity is not None:
                return (
                    f"Expected method 'gmp' for {_at(name)}, which starts at sparsity "
                    f"{config.start_sparsity}. Got {self.name!r}. Use 'gmp', or no start_sparsity."
                )
        return None

    def updates_at(self, step: int, schedule: Schedule) -> bool:
        """Whether topologies move after ``step`` optimiser steps."""
        return schedule.updates_at(step)

    def record(self, layer: SparseLayer, schedule: Schedule) -> tuple[int, int]:
        """Return how long the recorder's lists per group and per layer are; where it records."""
        del schedule
        return layer.kept, 0

    def move(self, job: Job) -> float | Tensor | None:
        """Move one layer's topology.

        Returns:
            The share of units that changed; None where there was nothing to do.
        """
        raise NotImplementedError(f"{type(self).__name__} must say how it moves a layer.")

    def advance(self, layers: Mapping[str, SparseLayer], step: int, schedule: Schedule) -> None:
        """Follow the number of optimiser steps, at 0 and after each."""
        del layers, step, schedule

    def penalty(self, layers: Mapping[str, SparseLayer]) -> Tensor | None:
        """Return what it adds to the loss; None for nothing."""
        del layers
        return None


def as_method(spec: Method | str, known: Mapping[str, type[Method]]) -> Method:
    """Return the method that ``spec`` names, with its default options.

    Args:
        spec: a method, or a name.
        known: all names.

    Raises:
        TypeError: neither text nor a method.
        ValueError: no such name.
    """
    if isinstance(spec, Method):
        return spec
    if not isinstance(spec, str):
        raise TypeError(f"Expected a method or its name. Got {spec!r}. Use 'rigl'.")
    if spec not in known:
        names = ", ".join(map(repr, known))
        raise ValueError(f"Expected method {names}. Got {spec!r}. {suggest(spec, known)}")
    return known[spec]()


def verdict(layer: SparseLayer, seen: Recorder | None) -> Tensor:
    """Return whether a topology may follow from a layer's gradients: 0, or a key of ``WARNINGS``.

    A number on the layer's device: nothing waits for it.

    Args:
        layer: after the optimiser's step.
        seen: its recorder, where the method records.
    """
    tensors = [layer.values] if layer.selection is None else [layer.values, layer.selection.alpha]
    bad = torch.zeros((), dtype=torch.bool, device=layer.values.device)
    for tensor in tensors:
        if tensor.grad is not None:
            bad = bad | ~tensor.grad.isfinite().all()
    if seen is None:
        return bad.int()
    return (2 * (seen.status != FINITE)).masked_fill(bad | (seen.status == POISONED), 1)


def warned(found: int, where: str) -> bool:
    """Warn of a verdict, if it is not 0; return whether it is not.

    Args:
        found: the verdict.
        where: names the layer and the step.
    """
    if found:
        kind, text = WARNINGS[found]
        warnings.warn(text.format(where), kind, stacklevel=3)
    return bool(found)


def _at(name: str) -> str:
    return name or "the model"
