"""Dynamic sparse training around any optimiser: masks move, permutations harden, after ``step()``.

1. Update: a growth method (``methods``) moves every topology. A grown unit starts at zero, with a
   zero optimiser state.
2. Check: a soft permutation that satisfies ``GapRule`` is sharpened, and becomes an index map.
3. Where the method needs gradients for the next step's update, recorders are armed.
"""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from padst_compiler.hardening import Hardening, controllable, harden
from padst_compiler.layers import SparseLayer
from padst_compiler.memory import Memory
from padst_compiler.methods import METHODS, Job, Method
from padst_compiler.methods.base import as_method, verdict, warned
from padst_compiler.notes import Event, Notes, place
from padst_compiler.recorder import Recorder
from padst_compiler.schedule import Schedule

__all__ = ["DynamicSparsity", "Event", "harden"]


class DynamicSparsity:
    """Move masks and harden permutations of ``model`` while ``optimizer`` trains it.

    Hooked to ``optimizer.step()``, it lives as long as the optimiser, or until ``detach()``. A step
    that a gradient scaler skips does not count. One process: data-parallel ranks would each see
    their own gradients and grow different units. ``layers`` holds what it controls, by name.

    Args:
        model: holds sparse layers; one with frozen ``values`` keeps its mask.
        optimizer: any that holds the layers' ``values``.
        method: a name of ``methods.METHODS``, or a method with options: ``SRigL(ablation=False)``.
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
        method: Method | str = "rigl",
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
        every = update_every if harden_every is None else harden_every
        lengths = (total_steps, update_every, drop_fraction, end, penalty_weight, every)
        self.schedule = Schedule(*lengths, penalty, hardening, anneal)
        self.method, self.layers = as_method(method, METHODS), controllable(model, optimizer)
        if refusal := self.method.refusal(self.layers):
            raise ValueError(refusal)
        self.keep_state, self.step_count = keep_state, 0
        self._notes = Notes((), warned)
        self._memory = Memory(optimizer, keep_state)
        self._generator = torch.Generator().manual_seed(seed)
        self._lambda = torch.tensor(self.schedule.penalty_at(0))  # a tensor: compiled once
        self._recorders: dict[str, Recorder] = {}
        self._hardening = Hardening(self.layers, optimizer, self.schedule)
        for name, layer in self.layers.items():
            if self.method.records and layer.values.requires_grad:
                room = self.method.record(layer, self.schedule)
                layer.recorder = self._recorders[name] = Recorder(layer, *room)
        self.method.advance(self.layers, 0, self.schedule)
        self._arm()
        self._hook = optimizer.register_step_post_hook(self._after_step)

    @property
    def history(self) -> list[Event]:
        """What happened at updates and checks so far; to read it waits for the GPU."""
        return self._notes.events

    def penalty(self) -> Tensor:
        """Return ``lambda(t) * mean over soft layers of P(M) / (2 N)``, to add to the task loss.

        P(M) sums ``l1 - l2`` over N rows and N columns. Divided by 2 N it is their mean gap, below
        1 for every width; then the mean over the layers that are still soft. So the penalty stays
        below ``penalty_weight``, which compares with a task loss of the order of 1. A scalar on
        the model's device, 0 where nothing is soft. The method may add a term of its own.
        """
        total = torch.zeros((), device=next(iter(self.layers.values())).values.device)
        if self._hardening.soft:
            total = self._hardening.penalty() * self._lambda
        extra = self.method.penalty(self.layers)
        return total if extra is None else total + extra.to(total.device)

    def soft_fraction(self) -> dict[str, float]:
        """Return by layer the share of the steps so far that it spent with a soft permutation."""
        return self._hardening.soft_fraction(self.step_count)

    def detach(self) -> None:
        """Let go of model and optimiser; masks and permutations stay as they are."""
        self._hook.remove()
        self._hardening.release()
        for name in self._recorders:
            self.layers[name].recorder = None

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training; nothing that ``model.state_dict()`` holds."""
        seen = self._recorders if self._records_next() else {}
        return {
            "settings": self._settings(),
            "step": self.step_count,
            "generator": self._generator.get_state(),
            "soft": self._hardening.state_dict(),
            "layers": {name: layer.size() for name, layer in self.layers.items()},
            "recorders": {n: {k: t.clone() for k, t in r.named_buffers()} for n, r in seen.items()},
            "history": [event.copy() for event in self.history],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``; call it *before* the model's and the optimiser's own.

        Layers that were hard harden here, and storage that had shrunk shrinks, so that the two
        others find the tensors and groups that were saved; the numbers come with these states.

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
        for name, size in state["layers"].items():
            if (selection := self.layers[name].resize(*size)) is not None:
                self._memory.drop(selection.alpha)
        self.step_count = state["step"]
        self._notes = Notes([event.copy() for event in state["history"]], warned)
        self._lambda.fill_(self.schedule.penalty_at(self.step_count))
        self._generator.set_state(state["generator"].cpu())
        self.method.advance(self.layers, self.step_count, self.schedule)
        self._arm()
        for name, saved in state["recorders"].items():
            for key, tensor in self._recorders[name].named_buffers():
                tensor.copy_(saved[key])

    def _settings(self) -> dict[str, Any]:
        own = {
            "method": repr(self.method),
            "keep_state": self.keep_state,
            "layers": list(self.layers),
        }
        return asdict(self.schedule) | own

    def _records_next(self) -> bool:
        return self.method.records and self.method.updates_at(self.step_count + 1, self.schedule)

    def _arm(self) -> None:
        """Arm the recorders where the next step ends in an update, in the layers' present sizes."""
        for name, recorder in self._recorders.items():
            room = self.method.record(self.layers[name], self.schedule)
            if not recorder.fits(*room):
                recorder.fit(*room)
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
        self.method.advance(self.layers, self.step_count, self.schedule)
        update = self.method.updates_at(self.step_count, self.schedule)
        if update or self.schedule.checks_at(self.step_count):
            for name, layer in self.layers.items():
                self._visit(name, layer, update and layer.values.requires_grad)
        self._notes.settle()
        if self._recorders and (update or self._records_next()):
            self._arm()

    def _visit(self, name: str, layer: SparseLayer, update: bool) -> None:
        """Move one layer's mask, look at its permutation, and note both."""
        churn = self._move(name, layer) if update else None
        due = self.schedule.checks_at(self.step_count)
        soft = name in self._hardening.soft and (due or churn is not None)
        if churn is None and not soft:
            return
        look = self._hardening.look(name) if soft else None
        done = look is not None and due and self._hardening.settle(name, look, self.step_count)
        gap, penalty = look or (None, None)
        event: Any = {"step": self.step_count, "layer": name, "gap": gap, "penalty": penalty}
        unread = churn if isinstance(churn, Tensor) else None
        share = 0.0 if isinstance(churn, Tensor) or churn is None else churn
        event |= {"churn": share, "hardened": done, "ablated": layer.ablated}
        self._notes.add(event, unread)

    def _move(self, name: str, layer: SparseLayer) -> float | Tensor | None:
        """Let the method move one layer, unless its gradients cannot be trusted.

        Returns:
            The share of units that changed; with the verdict, ``(2,)``, where it is not read yet.
        """
        seen = self._recorders.get(name)
        found = verdict(layer, seen)
        trusted = None if self.method.waits else found == 0
        if trusted is None and warned(int(found), place(name, self.step_count)):
            return 0.0
        now = (self.schedule, self.step_count, self._generator, name == list(self.layers)[-1])
        moved = self.method.move(Job(name, layer, self._memory, seen, *now, trusted))
        return torch.stack([moved, found.to(moved)]) if isinstance(moved, Tensor) else moved
