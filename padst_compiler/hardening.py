"""The soft permutations of a model in training: their penalty, their gaps, and who hardens when."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from padst_compiler import control
from padst_compiler.control import controllable
from padst_compiler.layers import SparseLayer
from padst_compiler.multipliers import Multipliers
from padst_compiler.permutation import FixedPermutation, SoftPermutation
from padst_compiler.rules import Rule, RuleState, make_rule
from padst_compiler.schedule import Schedule

__all__ = ["Hardening", "HardeningState", "Look", "controllable", "harden"]

Model = TypeVar("Model", bound=nn.Module)


class Look(NamedTuple):
    """One look at a soft permutation: the worst gap, and P(M) / (2 N), the mean ``l1 - l2``."""

    gap: float
    penalty: float


class HardeningState(TypedDict):
    """Of the layers that are soft: rules, multipliers by layer; of all: steps spent soft."""

    rules: dict[str, RuleState]
    multipliers: dict[str, Tensor]
    soft_steps: dict[str, int]


class Hardening:
    """Follow the soft permutations of ``layers``, by name, and harden each by its own rule.

    The start counts as a first look: a start near uniform lies far above the limit, so a
    permutation that is learned between two looks hardens at the second. Layers that share one
    permutation harden together.

    Args:
        layers: sparse layers by name; those without a soft permutation are left alone.
        optimizer: loses the parameters of what hardens.
        schedule: names the rule and the penalty, and says when to sharpen; by default the gap rule
            and a plain penalty, looked at by hand.

    Example:
        >>> from padst_compiler.layers import SparseLinear
        >>> from padst_compiler.relaxations.sinkhorn import SinkhornPermutation
        >>> from padst_compiler.structures import NM
        >>> start = torch.zeros(2, 2, 1, dtype=torch.int32)
        >>> soft = SinkhornPermutation(8, torch.Generator().manual_seed(0))
        >>> layer = SparseLinear.adopt(torch.nn.Linear(8, 2), NM(m=4), start, soft, "input")
        >>> hardening = Hardening({"fc": layer}, torch.optim.SGD(layer.parameters()))
        >>> hardening.settle("fc", hardening.look("fc")), hardening.soft
        (False, ['fc'])
    """

    def __init__(
        self,
        layers: dict[str, SparseLayer],
        optimizer: Optimizer,
        schedule: Schedule | None = None,
    ) -> None:
        """Take control of the layers, and the first look."""
        self._layers, self._optimizer = layers, optimizer
        self._schedule = schedule or Schedule(total_steps=1)
        text, end = self._schedule.hardening, self._schedule.end_step
        soft = [name for name, layer in layers.items() if layer.soft_permutation is not None]
        self._rules: dict[str, Rule] = {name: make_rule(text, end) for name in soft}
        self._soft_steps = dict.fromkeys(layers, 0)
        for name, rule in self._rules.items():
            rule.note(self.look(name).gap)
        lagrangian = self._schedule.penalty == "augmented_lagrangian"
        self._multipliers = Multipliers() if lagrangian else None
        control.take(layers.values(), self)

    @property
    def soft(self) -> list[str]:
        """Names of the layers that are still soft, in the order of the model."""
        return [n for n in self._rules if self._layers[n].soft_permutation is not None]

    def release(self) -> None:
        """Give up control of the layers."""
        control.release(self._layers.values())

    def penalty(self) -> Tensor:
        """Return the mean of P(M) / (2 N) over soft layers; a shared permutation counts once.

        With the augmented Lagrangian, the mean of what ``Multipliers.weigh`` makes of each.
        """
        means = []
        for name, soft in self._distinct(self.soft).items():
            parts, own = _parts(soft), self._multipliers
            means.append(parts.mean() if own is None else own.weigh(name, parts))
        return torch.stack([mean.to(means[0].device) for mean in means]).mean()

    def soft_fraction(self, step: int) -> dict[str, float]:
        """Return by layer the share of ``step`` steps that it spent with a soft permutation."""
        return {name: steps / max(1, step) for name, steps in self._soft_steps.items()}

    @torch.no_grad()
    def look(self, name: str) -> Look:
        """Measure one soft permutation."""
        soft = self._layers[name].soft_permutation
        assert soft is not None
        l1, l2 = soft.norms()
        return Look((1.0 - l2 / l1).max().item(), (l1 - l2).mean().item())

    @torch.no_grad()
    def sharpen(self, factor: float, everything: bool) -> None:
        """Sharpen the soft permutations that are decided and not hard yet, or all of them."""
        chosen = [name for name in self.soft if everything or self._rules[name].settling]
        for soft in self._distinct(chosen).values():
            soft.sharpen(factor)

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        """Do what is due after ``step`` optimiser steps, before any look: sharpen, anneal, count.

        Only the gap rule sharpens what is late; the others harden when they say.
        """
        factor, everything = self._schedule.sharpening_at(step)
        self.sharpen(factor, everything and self._schedule.hardening.startswith("gap"))
        checked = self._schedule.checks_at(step)
        for name, soft in self._distinct(self.soft).items():
            if (factor := self._schedule.annealing_at(step, soft.annealing)) != 1.0:
                soft.anneal(factor)
            if checked and self._multipliers is not None:
                self._multipliers.update(name, _parts(soft))
            soft.resample()
        for name in self.soft:
            self._soft_steps[name] += 1

    def settle(self, name: str, look: Look, step: int = 0) -> bool:
        """Show the rule one look at a soft permutation; return whether it hardened."""
        soft = self._layers[name].soft_permutation
        assert soft is not None
        decode = soft.harden
        ready = self._rules[name].ready(
            look.gap, lambda: decode().perm, mean=look.penalty, step=step
        )
        if not ready:
            soft.balance()  # for the next look
            return False
        self.harden(name)
        return True

    def harden(self, name: str) -> None:
        """Harden one layer's permutation now; its parameters leave the optimiser."""
        soft = self._layers[name].soft_permutation
        learned = [] if soft is None else list(soft.parameters())
        for at in [n for n, m in self._layers.items() if m.soft_permutation is soft]:
            self._rules.pop(at, None)
        _harden_together(soft, self._layers.values())
        for group in self._optimizer.param_groups:  # an emptied group stays: schedulers count them
            kept = [p for p in group["params"] if not any(p is one for one in learned)]
            group["params"] = kept
        for parameter in learned:
            self._optimizer.state.pop(parameter, None)

    def state_dict(self) -> HardeningState:
        """Return what the rules of the soft layers have seen, and how long each layer was soft."""
        return HardeningState(
            rules={name: self._rules[name].state_dict() for name in self.soft},
            multipliers=self._multipliers.state_dict() if self._multipliers else {},
            soft_steps=dict(self._soft_steps),
        )

    def load_state_dict(self, state: HardeningState) -> None:
        """Harden what is not in ``state``, and go on with the rest.

        Raises:
            ValueError: a layer in ``state`` is no longer soft; nothing was changed.
        """
        rules = state["rules"]
        if missing := sorted(rules.keys() - set(self.soft)):
            raise ValueError(
                f"Expected a soft permutation in {missing[0]}, as in the checkpoint. Got none. "
                "Load into a model that was sparsified alike and not hardened further."
            )
        for name in self.soft:
            if name in rules:
                self._rules[name].load_state_dict(rules[name])
            elif name in self.soft:  # it may have hardened with another
                self.harden(name)
        if self._multipliers is not None:
            self._multipliers.load_state_dict(state["multipliers"])
        self._soft_steps = dict(state["soft_steps"])

    def _distinct(self, names: Iterable[str]) -> dict[str, SoftPermutation]:
        """Return the soft permutations of the layers, each once, by the first that holds it."""
        held = {name: self._layers[name].soft_permutation for name in names}
        first = {soft: name for name, soft in reversed(held.items()) if soft is not None}
        return {name: soft for name, soft in held.items() if soft and first[soft] == name}


def _parts(soft: SoftPermutation) -> Tensor:
    l1, l2 = soft.norms()
    return l1 - l2


def _harden_together(soft: SoftPermutation | None, layers: Iterable[SparseLayer]) -> None:
    """Put one index map in the place of ``soft`` in every layer that holds it."""
    if soft is None:
        return
    hard = FixedPermutation(soft.harden(), next(soft.parameters()).device)
    for layer in layers:
        if layer.permutation is soft:
            layer.permutation = hard


def harden(model: Model) -> Model:
    """Harden every soft permutation of ``model`` in place, wherever its gap is; return the model.

    Raises:
        ValueError: no sparse layer, or a permutation that is not finite; nothing was changed.

    Example:
        >>> harden(nn.Linear(2, 2))
        Traceback (most recent call last):
        ValueError: Expected a model with sparse layers. Got Linear without one. ...
    """
    layers = control.some_sparse(model)
    for name, layer in layers.items():
        if (soft := layer.soft_permutation) is not None and not soft.gap() <= 1.0:
            raise ValueError(
                f"Expected a finite soft permutation in {name or 'the model'}. Got NaN. "
                "Lower the learning rate of the logits, or resume from an earlier checkpoint."
            )
    for layer in layers.values():
        owner = control.owner_of(layer)
        if owner is None:
            _harden_together(layer.soft_permutation, layers.values())
        else:
            owner.harden(next(name for name, own in owner._layers.items() if own is layer))
    return model
