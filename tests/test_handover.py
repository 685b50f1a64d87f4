from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from padst_compiler.handover import check_optimizer, hand_over, unchanged_on_error


def parameter(*sizes: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(*sizes))


class Layers:
    """Two dense weights, a bias, and what replaces the weights."""

    def __init__(self) -> None:
        self.a, self.bias, self.b = parameter(4, 4), parameter(4), parameter(4, 4)
        self.old = {"a": self.a, "m.b": self.b}
        self.new = {
            "a": {"values": parameter(2), "permutation.logits": parameter(4, 4)},
            "m.b": {"values": parameter(2)},
        }
        self.values = [new["values"] for new in self.new.values()]
        self.logits = self.new["a"]["permutation.logits"]

    @property
    def dense(self) -> list[nn.Parameter]:
        return [self.a, self.bias, self.b]

    def stepped(self, build: Callable[[list[Any]], Optimizer], *groups: Any) -> Optimizer:
        optimizer = build(list(groups or self.dense))
        for one in self.dense:
            one.grad = torch.ones_like(one)
        optimizer.step()
        return optimizer


def same(found: list[Any], wanted: list[Any]) -> bool:
    return [id(p) for p in found] == [id(p) for p in wanted]


def test_values_stand_where_the_weights_stood() -> None:
    layers = Layers()
    optimizer = layers.stepped(lambda params: SGD(params, lr=0.1, momentum=0.9))
    first, second = layers.values
    hand_over(optimizer, layers.old, layers.new)
    (group,) = optimizer.param_groups
    assert same(group["params"], [first, layers.bias, second, layers.logits])
    assert set(map(id, optimizer.state)) == {id(layers.bias)}  # the weights' momentum is gone


def test_logits_are_not_decayed() -> None:
    layers = Layers()
    optimizer = layers.stepped(
        lambda params: AdamW(params, lr=0.1, weight_decay=0.5),
        {"params": [layers.a], "lr": 0.01, "betas": (0.5, 0.9)},
        {"params": [layers.bias, layers.b], "weight_decay": 0.25},
    )
    hand_over(optimizer, layers.old, layers.new)
    decays = [group["weight_decay"] for group in optimizer.param_groups]
    assert decays == [0.5, 0.25, 0.0]
    third = optimizer.param_groups[2]
    assert same(third["params"], [layers.logits])
    assert third["lr"] == 0.01 and third["betas"] == (0.5, 0.9)
    for one in [*layers.values, layers.bias, layers.logits]:
        one.grad = torch.ones_like(one)
    before = layers.logits.detach().clone()
    optimizer.step()
    assert not torch.equal(layers.logits, before)


@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_names_follow(decay: float) -> None:
    layers = Layers()
    named: Any = [("a.weight", layers.a), ("a.bias", layers.bias), ("m.b.weight", layers.b)]
    optimizer = SGD(named, lr=0.1, weight_decay=decay)
    hand_over(optimizer, layers.old, layers.new)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    assert names == ["a.values", "a.bias", "m.b.values", "a.permutation.logits"]
    assert len(optimizer.param_groups) == (2 if decay else 1)


def test_a_weight_that_was_not_trained_is_not_now() -> None:
    layers = Layers()
    optimizer = SGD([layers.b], lr=0.1)
    hand_over(optimizer, layers.old, layers.new)
    assert same(optimizer.param_groups[0]["params"], [layers.values[1]])


def test_an_error_leaves_the_optimizer_as_it_was() -> None:
    layers = Layers()
    optimizer = layers.stepped(lambda params: AdamW(params, weight_decay=0.5))
    state = {id(p): entry for p, entry in optimizer.state.items()}
    params = optimizer.param_groups[0]["params"]
    with pytest.raises(KeyboardInterrupt), unchanged_on_error(optimizer):
        hand_over(optimizer, layers.old, layers.new)
        assert len(optimizer.param_groups) == 2
        raise KeyboardInterrupt
    (group,) = optimizer.param_groups
    assert group["params"] is params and same(params, layers.dense)
    assert {id(p): entry for p, entry in optimizer.state.items()} == state


def test_without_an_optimizer_there_is_nothing_to_restore() -> None:
    with pytest.raises(KeyError), unchanged_on_error(None):
        raise KeyError


def test_optimizers_that_cannot_take_over_are_refused() -> None:
    layers = Layers()
    with pytest.raises(TypeError, match=r"Expected a torch\.optim\.Optimizer\. Got list"):
        check_optimizer([layers.a], [layers.a])
    with pytest.raises(ValueError, match="Got LBFGS"):
        check_optimizer(LBFGS([layers.a]), [layers.a])
    with pytest.raises(ValueError, match="Got SGD without any of the 1 weights"):
        check_optimizer(SGD([layers.bias], lr=0.1), [layers.a])
    check_optimizer(SGD([layers.bias], lr=0.1), [])
    check_optimizer(SGD([layers.a], lr=0.1), [layers.a, layers.b])
