"""Dynamic sparse training around any optimiser: masks move and permutations harden after ``step()``.

1. Update: every layer drops its weakest units and grows others (``growth``), in place. A grown unit
   starts at zero, with a zero optimiser state. RigL and SRigL replace the gradient step by the
   update; here it follows the step, so that every optimiser works unchanged.
2. Check: a soft permutation that satisfies ``GapRule`` becomes an index map.
3. RigL: where the next step ends in an update, recorders are armed for its backward passes.
"""

from __future__ import annotations

import weakref
from dataclasses import asdict
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from padst_compiler import growth
from padst_compiler.layers import SparseLayer, sparse_layers
from padst_compiler.permutation import gaps, penalty
from padst_compiler.recorder import Recorder
from padst_compiler.schedule import GapRule, Schedule

__all__ = ["DynamicSparsity", "Event", "harden"]

Model = TypeVar("Model", bound=nn.Module)

_CONTROLLERS: weakref.WeakKeyDictionary[nn.Module, weakref.ref[DynamicSparsity]]
_CONTROLLERS = weakref.WeakKeyDictionary()


class Event(TypedDict):
    """One layer at one update or check.

    ``gap`` is that of the worst row or column, ``penalty`` is P(M) / (2 N) without lambda, both None
    where nothing is soft; ``churn`` is the share of units that changed.
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
        penalty_weight: float = 0.3,
        harden_every: int | None = None,
        keep_state: bool = False,
        seed: int = 0,
    ) -> None:
        """Check everything, then attach."""
        if method not in growth.METHODS:
            raise ValueError(f"Expected method 'rigl' or 'set'. Got {method!r}. Use 'rigl'.")
        every = update_every if harden_every is None else harden_every
        self.schedule = Schedule(
            total_steps, update_every, drop_fraction, end, penalty_weight, every
        )
        self._layers = _controllable(model, optimizer)
        self.method, self.keep_state, self.step_count = method, keep_state, 0
        self.history: list[Event] = []
        self._optimizer = optimizer
        self._generator = torch.Generator().manual_seed(seed)
        self._lambda = torch.zeros(())  # a tensor: a compiled loss must not be compiled again
        self._recorders: dict[str, Recorder] = {}
        self._rules: dict[str, GapRule] = {}
        for name, layer in self._layers.items():
            _CONTROLLERS[layer] = weakref.ref(self)
            if (soft := layer.soft_permutation) is not None:
                self._rules[name] = GapRule(seen_above=GapRule.above(soft.gap()))  # the start counts
            if method == "rigl" and layer.values.requires_grad:
                layer.recorder = self._recorders[name] = Recorder(layer)
        self._arm()
        self._hook = optimizer.register_step_post_hook(self._after_step)

    def penalty(self) -> Tensor:
        """Return ``lambda(t) * mean over soft layers of P(M) / (2 N)``, to add to the task loss.

        P(M) sums ``l1 - l2`` over N rows and N columns. Divided by 2 N it is their mean gap, below 1
        for every width; then the mean over the layers that are still soft. So the penalty stays
        below ``penalty_weight``, which compares with a task loss of the order of 1. The scalar is
        zero, on the model's device, where nothing is soft.
        """
        device = next(iter(self._layers.values())).values.device
        soft = [layer.soft_permutation for layer in self._layers.values()]
        each = {id(p): p for p in soft if p is not None}  # a shared permutation counts once
        if not each:
            return torch.zeros((), device=device)
        means = [p.penalty().to(device) / (2 * p.size) for p in each.values()]
        return torch.stack(means).mean() * self._lambda

    def detach(self) -> None:
        """Let go of model and optimiser; masks and permutations stay as they are."""
        self._hook.remove()
        for name, layer in self._layers.items():
            _CONTROLLERS.pop(layer, None)
            if name in self._recorders:
                layer.recorder = None

    def harden(self, name: str) -> None:
        """Harden one layer's permutation now; its logits leave the optimiser."""
        layer = self._layers[name]
        soft = layer.soft_permutation
        layer.harden()
        self._rules.pop(name, None)
        if soft is None:
            return
        for group in self._optimizer.param_groups:  # an emptied group stays: schedulers count them
            group["params"] = [p for p in group["params"] if p is not soft.logits]
        self._optimizer.state.pop(soft.logits, None)

    def state_dict(self) -> dict[str, Any]:
        """Return the position in the training; what ``model.state_dict()`` holds is not repeated."""
        seen = self._recorders if self._records_next() else {}
        return {
            "settings": self._settings(),
            "step": self.step_count,
            "generator": self._generator.get_state(),
            "soft": {name: rule.state_dict() for name, rule in self._rules.items()},
            "recorders": {
                name: {key: tensor.clone() for key, tensor in recorder.named_buffers()}
                for name, recorder in seen.items()
            },
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
        if missing := sorted(state["soft"].keys() - self._rules.keys()):
            raise ValueError(
                f"Expected a soft permutation in {missing[0]}, as in the checkpoint. Got none. "
                "Load into a model that was sparsified alike and not hardened further."
            )
        self.step_count, self.history = state["step"], [event.copy() for event in state["history"]]
        self._lambda.fill_(self.schedule.penalty_at(self.step_count))
        self._generator.set_state(state["generator"].cpu())
        for name in self._rules.keys() - state["soft"].keys():
            self.harden(name)
        for name, rule in self._rules.items():
            rule.load_state_dict(state["soft"][name])
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
        update = self.schedule.updates_at(self.step_count)
        if update or self.schedule.checks_at(self.step_count):
            for name, layer in self._layers.items():
                self._visit(name, layer, update and layer.values.requires_grad)
        if update or self._records_next():
            self._arm()

    def _visit(self, name: str, layer: SparseLayer, update: bool) -> None:
        """Move one layer's mask, look at its permutation, and note both."""
        churn = self._move(name, layer) if update else 0.0
        event = Event(step=self.step_count, layer=name, gap=None, penalty=None, churn=churn, hardened=False)
        if (soft := layer.soft_permutation) is not None:
            matrix = soft.soft()
            event["gap"] = gap = gaps(matrix).max().item()
            event["penalty"] = penalty(matrix).item() / (2 * soft.size)
            due = self.schedule.checks_at(self.step_count)
            if due and self._rules[name].ready(gap, lambda: soft.harden().perm):
                self.harden(name)
                event["hardened"] = True
        if update or soft is not None:
            self.history.append(event)

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


def harden(model: Model) -> Model:
    """Harden every soft permutation of ``model`` in place, wherever its gap is; return the model.

    Raises:
        ValueError: the model has no sparse layer, or a permutation that is not finite; nothing was changed.

    Example:
        >>> harden(nn.Linear(2, 2))
        Traceback (most recent call last):
        ValueError: Expected a model with sparse layers. Got Linear without one. ...
    """
    layers = _sparse(model)
    for name, layer in layers.items():
        if (soft := layer.soft_permutation) is not None and not soft.gap() < 1.0:
            raise ValueError(
                f"Expected a finite soft permutation in {name or 'the model'}. Got NaN or infinity. "
                "Lower the learning rate of the logits, or resume from an earlier checkpoint."
            )
    for layer in layers.values():
        owner = _CONTROLLERS.get(layer, lambda: None)()
        if owner is None:
            layer.harden()
        else:
            owner.harden(next(name for name, own in owner._layers.items() if own is layer))
    return model


def _sparse(model: nn.Module) -> dict[str, SparseLayer]:
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(
            f"Expected a model with sparse layers. Got {type(model).__name__} without one. "
            "Call padst.sparsify(model) first."
        )
    return layers


def _controllable(model: nn.Module, optimizer: Optimizer) -> dict[str, SparseLayer]:
    """Return the sparse layers of ``model``, or raise where they cannot be controlled."""
    layers = _sparse(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, layer in layers.items():
        if _CONTROLLERS.get(layer, lambda: None)() is not None:
            raise ValueError(
                f"Expected one controller per model. Got a second one for {name or 'the model'}. "
                "Call detach() on the first."
            )
        if layer.values.requires_grad and id(layer.values) not in held:
            raise ValueError(
                f"Expected an optimizer that holds {f'{name}.values'.lstrip('.')}. Got one without. "
                "Make the optimizer after sparsify, from model.parameters()."
            )
    return layers
