"""The soft permutations of a model in training: their penalty, their gaps, and who hardens when."""

from __future__ import annotations

import weakref
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from padst_compiler.layers import SparseLayer, sparse_layers
from padst_compiler.permutation import gaps, penalty
from padst_compiler.schedule import GapRule, RuleState

__all__ = ["Hardening", "Look", "controllable", "harden"]

Model = TypeVar("Model", bound=nn.Module)

_CONTROL: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Hardening]] = weakref.WeakKeyDictionary()


class Look(NamedTuple):
    """One look at a soft permutation: the worst gap, and P(M) / (2 N), the mean ``l1 - l2``."""

    gap: float
    penalty: float


class Hardening:
    """Follow the soft permutations of ``layers``, by name, and harden each by its own ``GapRule``.

    The start counts as a first look: a start near uniform lies far above the limit, so a
    permutation that is learned between two looks hardens at the second.

    Args:
        layers: sparse layers by name; those without a soft permutation are left alone.
        optimizer: loses the logits of what hardens.

    Example:
        >>> from padst_compiler.layers import SparseLinear
        >>> from padst_compiler.permutation import SinkhornPermutation
        >>> from padst_compiler.structures import NM
        >>> start = torch.zeros(2, 2, 1, dtype=torch.int32)
        >>> soft = SinkhornPermutation(8, torch.Generator().manual_seed(0))
        >>> layer = SparseLinear.adopt(torch.nn.Linear(8, 2), NM(m=4), start, soft, "input")
        >>> hardening = Hardening({"fc": layer}, torch.optim.SGD(layer.parameters()))
        >>> gap = hardening.look("fc").gap
        >>> hardening.settle("fc", gap), hardening.soft
        (False, ['fc'])
    """

    def __init__(self, layers: dict[str, SparseLayer], optimizer: Optimizer) -> None:
        """Take control of the layers, and the first look."""
        self._layers, self._optimizer = layers, optimizer
        self._rules = {n: GapRule() for n, m in layers.items() if m.soft_permutation is not None}
        for name, rule in self._rules.items():
            rule.note(self.look(name).gap)
        for layer in layers.values():
            _CONTROL[layer] = weakref.ref(self)

    @property
    def soft(self) -> list[str]:
        """Names of the layers that are still soft, in the order of the model."""
        return [n for n in self._rules if self._layers[n].soft_permutation is not None]

    def release(self) -> None:
        """Give up control of the layers."""
        for layer in self._layers.values():
            _CONTROL.pop(layer, None)

    def penalty(self) -> Tensor:
        """Return the mean of P(M) / (2 N) over soft layers; a shared permutation counts once."""
        found = [self._layers[name].soft_permutation for name in self.soft]
        each = list({id(soft): soft for soft in found if soft is not None}.values())
        means = [soft.penalty() / (2 * soft.size) for soft in each]
        return torch.stack([mean.to(means[0].device) for mean in means]).mean()

    @torch.no_grad()
    def look(self, name: str) -> Look:
        """Measure one soft permutation."""
        soft = self._layers[name].soft_permutation
        assert soft is not None
        matrix = soft.soft()
        return Look(gaps(matrix).max().item(), penalty(matrix).item() / (2 * soft.size))

    @torch.no_grad()
    def sharpen(self, factor: float, everything: bool) -> None:
        """Sharpen the soft permutations that are decided and not hard yet, or all of them."""
        chosen = [name for name in self.soft if everything or self._rules[name].settling]
        found = [self._layers[name].soft_permutation for name in chosen]
        for soft in {id(soft): soft for soft in found if soft is not None}.values():
            soft.sharpen(factor)

    def settle(self, name: str, gap: float) -> bool:
        """Show the rule the gap of one soft permutation; return whether it hardened."""
        soft = self._layers[name].soft_permutation
        assert soft is not None
        if not self._rules[name].ready(gap, lambda: soft.harden().perm):
            soft.balance()  # for the next look
            return False
        self.harden(name)
        return True

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

    def state_dict(self) -> dict[str, RuleState]:
        """Return what the rules of the soft layers have seen."""
        return {name: self._rules[name].state_dict() for name in self.soft}

    def load_state_dict(self, state: dict[str, RuleState]) -> None:
        """Harden what is not in ``state``, and go on with the rest.

        Raises:
            ValueError: a layer in ``state`` is no longer soft; nothing was changed.
        """
        if missing := sorted(state.keys() - set(self.soft)):
            raise ValueError(
                f"Expected a soft permutation in {missing[0]}, as in the checkpoint. Got none. "
                "Load into a model that was sparsified alike and not hardened further."
            )
        for name in self.soft:
            if name in state:
                self._rules[name].load_state_dict(state[name])
            else:
                self.harden(name)


def harden(model: Model) -> Model:
    """Harden every soft permutation of ``model`` in place, wherever its gap is; return the model.

    Raises:
        ValueError: no sparse layer, or a permutation that is not finite; nothing was changed.

    Example:
        >>> harden(nn.Linear(2, 2))
        Traceback (most recent call last):
        ValueError: Expected a model with sparse layers. Got Linear without one. ...
    """
    layers = _sparse(model)
    for name, layer in layers.items():
        if (soft := layer.soft_permutation) is not None and not soft.gap() <= 1.0:
            raise ValueError(
                f"Expected a finite soft permutation in {name or 'the model'}. Got NaN. "
                "Lower the learning rate of the logits, or resume from an earlier checkpoint."
            )
    for layer in layers.values():
        owner = _owner(layer)
        if owner is None:
            layer.harden()
        else:
            owner.harden(next(name for name, own in owner._layers.items() if own is layer))
    return model


def controllable(model: nn.Module, optimizer: Optimizer) -> dict[str, SparseLayer]:
    """Return the sparse layers of ``model`` by name.

    Raises:
        ValueError: there is none, one is already controlled, or ``optimizer`` does not train one.
    """
    layers = _sparse(model)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    for name, layer in layers.items():
        if _owner(layer) is not None:
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


def _sparse(model: nn.Module) -> dict[str, SparseLayer]:
    layers = sparse_layers(model)
    if not layers:
        raise ValueError(
            f"Expected a model with sparse layers. Got {type(model).__name__} without one. "
            "Call padst.sparsify(model) first."
        )
    return layers


def _owner(layer: SparseLayer) -> Hardening | None:
    reference = _CONTROL.get(layer)
    return None if reference is None else reference()
