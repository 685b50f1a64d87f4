"""Dynamic sparse training around any optimiser: masks move, permutations harden, after ``step()``.

1. Update: every layer drops its weakest units and grows others (``growth``), in place. A grown unit
   starts at zero, with a zero optimiser state. RigL and SRigL replace the gradient step by the
   update; here it follows the step, so that every optimiser works unchanged.
2. Check: a soft permutation that satisfies ``GapRule`` is sharpened, and becomes an index map.
3. RigL: where the next step ends in an update, recorders are armed for its backward passes.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from padst_compiler import growth
from padst_compiler.hardening import Hardening, controllable, harden
from padst_compiler.layers import SparseLayer
from padst_compiler.recorder import Recorder
from padst_compiler.schedule import Schedule

__all__ = ["DynamicSparsity", "Event", "harden"]


class Event(TypedDict):
    """One layer at one update or check.

    ``gap`` is that of the worst row or column, ``penalty`` is P(M) / (2 N) without lambda, both
    None where nothing is soft; ``churn`` is the share of units that changed.
    """

    step: int
    layer: str
    gap: float | None
    penalty: float | None
    churn: float
    hardened: bool


class DynamicSparsity:
    """Move masks and harden permutations of ``model`` while ``optimizer`` trains it.

    Hooked to ``optimizer.step()``, it lives as long as the optimiser, or until ``detach()``. A step
    that a gradient scaler skips does not count. One process: data-parallel ranks would each see
    their own gradients and grow different units.

    Args:
        model: holds sparse layers; one with frozen ``values`` keeps its mask.
        optimizer: any that holds the layers' ``values``.
        method: "rigl" grows by the dense gradient, "set" at random.
        total_steps: length of the training in optimiser steps.
        update_every: steps between updates of the masks.
        drop_fraction: share dropped at step 0, by cosine to 0 at ``end``; 0 keeps the masks.
        end: share of ``total_steps`` after which masks stay.
        penalty_weight: lambda from ``end`` on, reached by a linear ramp from 0.
        harden_every: steps between looks at soft permutations; by default ``update_every``.
        keep_state: keep the optimiser's state at slots whose unit changed.
        seed: of the private generator; no global one is touched.
        penalty, hardening, anneal: as ``Schedule`` takes them.

    Raises:
        ValueError: nothing to control, a second controller, or a number out of range.

    Example:
        >>> from padst_compiler.layers import SparseLinear
        >>> from padst_compiler.structures import FanIn
        >>> start = torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
        >>> layer = SparseLinear.adopt(nn.Linear(8, 2), FanIn(), start, None, "input")
        >>> optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        >>> training = DynamicSparsity(layer, optimizer, total_steps=8, update_every=2)
        >>> for _ in range(8):
        ...     (layer(torch.ones(4, 8)).sum() + training.penalty()).backward()
        ...     optimizer.step()
        >>> training.step_count, [event["step"] for event in training.history]
        (8, [2, 4])
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        method: str = "rigl",
        *,
        total_steps: int,
        update_every: int = 100,
        drop_fraction: float = 0.3,
        end: float = 0.75,
        penalty_weight: float = 3.0,
        harden_every: int | None = None,
        keep_state: bool = False,
        seed: int = 0,
        penalty: str = "ramp",
        hardening: str = "gap",
        anneal: float | None = None,
    ) -> None:
        """Check everything, then attach."""
        if method not in growth.METHODS:
            raise ValueError(f"Expected method 'rigl' or 'set'. Got {method!r}. Use 'rigl'.")
        every = update_every if harden_every is None else harden_every
        lengths = (total_steps, update_every, drop_fraction, end, penalty_weight, every)
        self.schedule = Schedule(*lengths, penalty, hardening, anneal)
        self._layers = controllable(model, optimizer)
        self.method, self.keep_state, self.step_count = method, keep_state, 0
        self.history: list[Event] = []
        self._optimizer = optimizer
        self._generator = torch.Generator().manual_seed(seed)
        self._lambda = torch.tensor(self.schedule.penalty_at(0))  # a tensor: compiled once
        self._recorders: dict[str, Recorder] = {}
        self._hardening = Hardening(self._layers, optimizer, self.schedule)
        for name, layer in self._layers.items():
            if method == "rigl" and layer.values.requires_grad:
                layer.recorder = self._recorders[name] = Recorder(layer)
        self._arm()
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def penalty(self) -> Tensor:
        """Return ``lambda(t) * mean over soft layers of P(M) / (2 N)``, to add to the task loss.

        P(M) sums ``l1 - l2`` over N rows and N columns. Divided by 2 N it is their mean gap, below
        1 for every width; then the mean over the layers that are still soft. So the penalty stays
        below ``penalty_weight``, which compares with a task loss of the order of 1. The scalar is
        zero, on the model's device, where nothing is soft.
        """
        if not self._hardening.soft:
            return torch.zeros((), device=next(iter(self._layers.values())).values.device)
        return self._hardening.penalty() * self._lambda

    def soft_fraction(self) -> dict[str, float]:
        """Return by layer the share of the steps so far that it spent with a soft permutation."""
        return self._hardening.soft_fraction(self.step_count)

    def detach(self) -> None:
        """Let go of model and optimiser; masks and permutations stay as they are."""
        self._hook.remove()
        self._hardening.release()
        for name in self._recorders:
            self._layers[name].recorder = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training; nothing that ``model.state_dict()`` holds."""
        seen = self._recorders if self._records_next() else {}
        return {
            "settings": self._settings(),
            "step": self.step_count,
            "generator": self._generator.get_state(),
            "soft": self._hardening.state_dict(),
            "recorders": {n: {k: t.clone() for k, t in r.named_buffers()} for n, r in seen.items()},
            "history": [event.copy() for event in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; call it *before* the model's and the optimiser's own.

        Layers that were hard harden here, so that the two others find the tensors and groups that
        were saved; the index maps themselves come with the model's state.

        Raises:
            ValueError: ``state`` belongs to another run; nothing was changed.
        """
        ours = self._settings()
        for key in sorted(ours.keys() | state["settings"].keys()):
            saved = state["settings"].get(key)
            if saved != ours.get(key):
                raise ValueError(
                    f"Expected {key} = {saved}, as in the checkpoint. Got {ours.get(key)}. "
                    "Construct DynamicSparsity as the run that was saved did."
                )
        self._hardening.load_state_dict(state["soft"])
        self.step_count, self.history = state["step"], [event.copy() for event in state["history"]]
        self._lambda.fill_(self.schedule.penalty_at(self.step_count))
        self._generator.set_state(state["generator"].cpu())
        self._arm()
        for name, saved in state["recorders"].items():
            for key, tensor in self._recorders[name].named_buffers():
                tensor.copy_(saved[key])

    def _settings(self) -> dict[str, Any]:
        own = {"method": self.method, "keep_state": self.keep_state, "layers": list(self._layers)}
        return asdict(self.schedule) | own

    def _records_next(self) -> bool:
        return self.method == "rigl" and self.schedule.updates_at(self.step_count + 1)

    def _arm(self) -> None:
        for recorder in self._recorders.values():
            recorder.arm() if self._records_next() else recorder.disarm()

    @torch.no_grad()
    def _after_step(self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: Any) -> None:
        del args, kwargs
        overflow = getattr(optimizer, "found_inf", None)  # a fused optimiser skips inside step()
        if overflow is not None and bool(overflow):
            return
        self.step_count += 1
        self._lambda.fill_(self.schedule.penalty_at(self.step_count))
        self._hardening.after_step(self.step_count)
        update = self.schedule.updates_at(self.step_count)
        if update or self.schedule.checks_at(self.step_count):
            for name, layer in self._layers.items():
                self._visit(name, layer, update and layer.values.requires_grad)
        if update or self._records_next():
            self._arm()

    def _visit(self, name: str, layer: SparseLayer, update: bool) -> None:
        """Move one layer's mask, look at its permutation, and note both."""
        look = self._hardening.look(name) if name in self._hardening.soft else None
        if look is None and not update:
            return
        churn = self._move(name, layer) if update else 0.0
        due = self.schedule.checks_at(self.step_count)
        done = look is not None and due and self._hardening.settle(name, look, self.step_count)
        gap, penalty = look or (None, None)
        event: Any = {"step": self.step_count, "layer": name, "gap": gap, "penalty": penalty}
        self.history.append(event | {"churn": churn, "hardened": done})

    def _move(self, name: str, layer: SparseLayer) -> float:
        """Drop and grow units of one layer; return the share that changed."""
        structure, shape = layer.structure, layer.shape
        slots = structure.slots(layer.indices, shape)
        scores = structure.slot_scores(layer.values, shape)
        n_drop = int(self.schedule.drop_at(self.step_count) * slots.numel())
        if self.method == "set":
            candidates = structure.table(shape)[1]
            new = growth.set_(scores, slots, n_drop, candidates, self._generator)
        else:
            seen = self._recorders[name]
            if not seen.has_seen:
                warnings.warn(
                    f"Expected gradients in {name or 'the model'}. Got none that is finite. "
                    "Its mask stays; call the layer itself, not F.linear on its weight.",
                    stacklevel=2,
                )
            new = growth.rigl(scores, slots, n_drop, seen.candidates, seen.gains, seen.active)
        layer.indices.copy_(new.slots.view(layer.indices.shape))
        self._forget(layer.values, new.changed)
        return new.changed.float().mean().item()

    def _forget(self, values: nn.Parameter, changed: Tensor) -> None:
        """Zero the values at changed slots, and what the optimiser remembers of them."""
        size = values.numel() // changed.numel()
        mask = changed[..., None].expand(*changed.shape, size).reshape(values.shape)
        state = {} if self.keep_state else self._optimizer.state.get(values, {})
        for tensor in (values, values.grad, *state.values()):
            if isinstance(tensor, Tensor) and tensor.shape == values.shape:
                tensor.masked_fill_(mask.to(tensor.device), 0)
