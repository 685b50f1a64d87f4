"""Soft permutations are measured, hardened by their rule, and leave the optimiser."""

from typing import Any

import pytest
import torch
from torch import nn

from padst_compiler.hardening import Hardening, controllable, harden
from padst_compiler.index_map import IndexMap
from padst_compiler.layers import SparseLayer, SparseLinear
from padst_compiler.permutation import FixedPermutation, Permutation, gaps
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation
from padst_compiler.schedule import Schedule
from padst_compiler.structures import NM


def sparse(permutation: Permutation | None) -> SparseLayer:
    start = torch.zeros(4, 2, 1, dtype=torch.int32)
    return SparseLinear.adopt(nn.Linear(8, 4), NM(m=4), start, permutation, "input")


def soft(seed: int = 0) -> SinkhornPermutation:
    return SinkhornPermutation(8, torch.Generator().manual_seed(seed))


def sharpen(permutation: SinkhornPermutation, perm: list[int], logit: float = 9.0) -> None:
    with torch.no_grad():
        permutation.logits.copy_(torch.eye(8)[perm] * logit * permutation.temperature)


def at(model: nn.Module, i: int) -> SparseLayer:
    layer = model.get_submodule(f"{i}.0")
    assert isinstance(layer, SparseLayer)
    return layer


def soft_of(layer: SparseLayer) -> SinkhornPermutation:
    assert isinstance(layer.soft_permutation, SinkhornPermutation)
    return layer.soft_permutation


def perm_of(layer: nn.Module) -> list[int]:
    assert isinstance(layer, SparseLayer) and isinstance(layer.permutation, FixedPermutation)
    result: list[int] = layer.permutation.perm.tolist()
    return result


def make(count: int = 2) -> tuple[nn.Sequential, torch.optim.Optimizer]:
    model = nn.Sequential(*[nn.Sequential(sparse(soft(i)), nn.Linear(4, 8)) for i in range(count)])
    return model, torch.optim.Adam(model.parameters())


PERM = [3, 1, 0, 2, 7, 5, 4, 6]


def test_a_look_tells_the_worst_gap_and_the_mean_of_l1_minus_l2() -> None:
    model, optimizer = make()
    hardening = Hardening(controllable(model, optimizer), optimizer)
    permutation = soft_of(at(model, 0))
    look = hardening.look("0.0")
    assert look.gap == pytest.approx(permutation.gap())
    assert look.penalty == pytest.approx(float(gaps(permutation.soft().detach()).mean()), rel=1e-3)
    with torch.no_grad():
        permutation.logits.zero_()
    assert hardening.look("0.0").penalty == pytest.approx(1 - 8**-0.5)


def test_the_penalty_is_the_mean_over_layers_and_has_a_gradient() -> None:
    model, optimizer = make()
    hardening = Hardening(controllable(model, optimizer), optimizer)
    mean = hardening.penalty()
    assert mean.item() == pytest.approx(sum(hardening.look(n).penalty for n in hardening.soft) / 2)
    mean.backward()
    for i in (0, 1):
        gradient = soft_of(at(model, i)).logits.grad
        assert gradient is not None and bool((gradient != 0).any())


def test_a_shared_permutation_counts_once_and_hardens_everywhere() -> None:
    shared = soft()
    model = nn.Sequential(
        sparse(shared), nn.Linear(4, 8), sparse(shared), nn.Linear(4, 8), sparse(soft(1))
    )
    optimizer = torch.optim.Adam(model.parameters())
    hardening = Hardening(controllable(model, optimizer), optimizer)
    means = [hardening.look(name).penalty for name in ("0", "4")]
    assert float(hardening.penalty().detach()) == pytest.approx(sum(means) / 2)
    sharpen(shared, PERM)
    assert hardening.settle("0", hardening.look("0")) and hardening.soft == ["4"]
    assert not hardening.settle("4", hardening.look("4"))
    assert model[0].permutation is model[2].permutation
    assert [p for p in optimizer.param_groups[0]["params"] if p is shared.logits] == []
    assert all(perm_of(model[i]) == PERM for i in (0, 2))


def test_what_settles_becomes_an_index_map_and_leaves_the_optimiser() -> None:
    model, optimizer = make()
    hardening = Hardening(controllable(model, optimizer), optimizer)
    torch.stack([p.sum() for p in model.parameters()]).sum().backward()
    optimizer.step()
    permutation = soft_of(at(model, 0))
    logits = permutation.logits
    sharpen(permutation, PERM)
    held = len(optimizer.param_groups[0]["params"])
    assert logits in optimizer.state
    assert hardening.settle("0.0", hardening.look("0.0"))
    assert perm_of(at(model, 0)) == PERM
    assert hardening.soft == ["1.0"]
    assert len(optimizer.param_groups[0]["params"]) == held - 1
    assert logits not in optimizer.state
    optimizer.step()  # goes on without it


def test_only_what_settles_is_sharpened_and_keeps_its_assignment() -> None:
    model, optimizer = make()
    hardening = Hardening(controllable(model, optimizer), optimizer)
    first, second = (soft_of(at(model, i)) for i in range(2))
    sharpen(first, PERM, logit=4.0)
    assert not hardening.settle("0.0", hardening.look("0.0"))  # decided, not yet settled
    before, other = first.logits.detach().clone(), second.logits.detach().clone()
    hardening.sharpen(1.5, everything=False)
    assert torch.equal(first.logits, before * 1.5) and torch.equal(second.logits, other)
    while not hardening.settle("0.0", hardening.look("0.0")):
        hardening.sharpen(1.5, everything=False)
    assert perm_of(at(model, 0)) == PERM


def test_a_group_that_held_only_logits_stays_for_the_schedulers() -> None:
    kinds: list[Any] = [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop]
    for kind in [*kinds, torch.optim.Adagrad, torch.optim.Adafactor]:
        layer = sparse(soft())
        groups = [{"params": [layer.values, layer.bias]}, {"params": [soft_of(layer).logits]}]
        optimizer = kind(groups, lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
        hardening = Hardening({"layer": layer}, optimizer)
        hardening.harden("layer")
        layer(torch.ones(2, 8)).sum().backward()
        optimizer.step()
        scheduler.step()
        assert len(optimizer.param_groups) == 2


def test_it_goes_on_from_its_state_and_hardens_what_was_hard() -> None:
    model, optimizer = make()
    hardening = Hardening(controllable(model, optimizer), optimizer)
    hardening.harden("0.0")
    state = hardening.state_dict()
    twin, other = make()
    resumed = Hardening(controllable(twin, other), other)
    resumed.load_state_dict(state)
    assert resumed.soft == ["1.0"] and at(twin, 0).soft_permutation is None
    assert resumed.state_dict() == state


def test_a_state_with_more_soft_layers_is_refused_and_nothing_changes() -> None:
    model, optimizer = make()
    state = Hardening(controllable(model, optimizer), optimizer).state_dict()
    twin, other = make()
    hardening = Hardening(controllable(twin, other), other)
    hardening.harden("1.0")
    del state["rules"]["0.0"]
    with pytest.raises(ValueError, match=r"Expected a soft permutation in 1\.0.* Got none\."):
        hardening.load_state_dict(state)
    assert hardening.soft == ["0.0"]


def test_a_layer_hardened_by_other_hands_is_hard_for_it_too() -> None:
    model, optimizer = make()
    hardening = Hardening(controllable(model, optimizer), optimizer)
    at(model, 0).harden()
    assert hardening.soft == ["1.0"] and list(hardening.state_dict()["rules"]) == ["1.0"]


def test_harden_hardens_everything_and_returns_the_model() -> None:
    model, _ = make(3)
    at(model, 1).permutation = FixedPermutation(IndexMap.of(PERM))
    assert harden(model) is model
    assert all(sorted(perm_of(at(model, i))) == list(range(8)) for i in range(3))
    assert perm_of(at(model, 1)) == PERM
    names = set(model.state_dict())
    assert "0.0.permutation.perm" in names and "0.0.permutation.logits" not in names
    harden(model)  # again: nothing to do


def test_harden_tells_the_controller_and_its_optimiser() -> None:
    model, optimizer = make()
    hardening = Hardening(controllable(model, optimizer), optimizer)
    logits = [soft_of(at(model, i)).logits for i in range(2)]
    harden(model[0])  # a part of the model, under other names
    assert hardening.soft == ["1.0"]
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(logits[0]) not in held and id(logits[1]) in held


def test_harden_refuses_a_model_without_sparse_layers() -> None:
    with pytest.raises(ValueError, match=r"Expected a model with sparse layers\. Got Linear"):
        harden(nn.Linear(2, 2))


def test_harden_names_the_permutation_that_is_not_finite_and_changes_nothing() -> None:
    model, _ = make()
    with torch.no_grad():
        soft_of(at(model, 1)).logits[0, 0] = torch.nan
    with pytest.raises(ValueError, match=r"Expected a finite soft permutation in 1\.0\. Got NaN\."):
        harden(model)
    assert at(model, 0).soft_permutation is not None


def test_control_ends_with_release_or_with_the_controller() -> None:
    model, optimizer = make()
    hardening = Hardening(controllable(model, optimizer), optimizer)
    with pytest.raises(ValueError, match=r"Expected one controller.* 0\.0\. Call detach\(\)"):
        controllable(model, optimizer)
    hardening.release()
    other = Hardening(controllable(model, optimizer), optimizer)
    del other
    assert list(controllable(model, optimizer)) == ["0.0", "1.0"]


def test_an_optimiser_of_other_parameters_is_refused_by_the_layers_name() -> None:
    model, _ = make()
    optimizer = torch.optim.SGD([p for n, p in model.named_parameters() if n != "1.0.values"])
    with pytest.raises(ValueError, match=r"Expected an optimizer that holds 1\.0\.values\. Got"):
        controllable(model, optimizer)
    at(model, 1).values.requires_grad_(False)
    assert list(controllable(model, optimizer)) == ["0.0", "1.0"]


def controlled(**settings: Any) -> tuple[nn.Sequential, Hardening]:
    model, optimizer = make()
    schedule = Schedule(total_steps=40, harden_every=10, end=0.5, **settings)
    return model, Hardening(controllable(model, optimizer), optimizer, schedule)


def test_every_rule_is_shown_what_it_needs() -> None:
    for text, step, ready in (
        ("plateau:1", 0, True),
        ("plateau:2", 0, False),
        ("threshold:0.9", 0, True),
        ("threshold:0.1", 0, False),
        ("step", 19, False),
        ("step", 20, True),
    ):
        model, hardening = controlled(hardening=text)
        assert hardening.settle("0.0", hardening.look("0.0"), step) == ready, text
        assert (at(model, 0).soft_permutation is None) == ready


def test_only_the_gap_rule_sharpens_what_is_late() -> None:
    for text, grows in (("gap", True), ("step", False), ("threshold", False), ("plateau", False)):
        model, hardening = controlled(hardening=text)
        before = soft_of(at(model, 0)).logits.detach().clone()
        hardening.after_step(19)
        assert torch.equal(soft_of(at(model, 0)).logits, before)
        hardening.after_step(20)
        assert torch.equal(soft_of(at(model, 0)).logits, before) != grows


def test_the_temperature_follows_the_schedule_and_is_constant_by_default() -> None:
    for anneal, wanted in ((None, 0.1), (1.0, 0.1), (5.0, 0.02)):
        model, hardening = controlled(anneal=anneal)
        for step in range(1, 41):
            hardening.after_step(step)
        assert soft_of(at(model, 0)).temperature.item() == pytest.approx(wanted, rel=1e-4)


def test_steps_spent_soft_are_counted_by_layer() -> None:
    _, hardening = controlled()
    for step in range(1, 31):
        hardening.after_step(step)
        if step == 10:
            hardening.harden("0.0")
    assert hardening.soft_fraction(30) == {"0.0": pytest.approx(1 / 3), "1.0": 1.0}
    _, resumed = controlled()
    resumed.load_state_dict(hardening.state_dict())
    assert resumed.soft_fraction(30) == hardening.soft_fraction(30)


def test_multipliers_start_at_zero_grow_at_looks_and_are_saved() -> None:
    model, hardening = controlled(penalty="augmented_lagrangian")
    assert float(hardening.penalty().detach()) == 0.0
    for step in range(1, 11):
        hardening.after_step(step)
    means = []
    for i in range(2):
        l1, l2 = soft_of(at(model, i)).norms()
        stretched = (l1 - l2) + 0.05 * (l1 - l2) ** 2
        means.append(float((0.1 * stretched * stretched).mean().detach()))
    assert float(hardening.penalty().detach()) == pytest.approx(sum(means) / 2, rel=1e-5)
    twin, resumed = controlled(penalty="augmented_lagrangian")
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(hardening.state_dict())
    assert torch.equal(resumed.penalty(), hardening.penalty())


def test_layers_that_share_harden_together_without_a_controller_too() -> None:
    shared = soft()
    model = nn.Sequential(sparse(shared), nn.Linear(4, 8), sparse(shared))
    harden(model)
    assert model[0].permutation is model[2].permutation
    assert isinstance(model[0].permutation, FixedPermutation)


def test_a_state_of_layers_that_hardened_together_loads() -> None:
    def shared_model() -> tuple[nn.Module, Hardening]:
        one = soft()
        model = nn.Sequential(sparse(one), nn.Linear(4, 8), sparse(one))
        optimizer = torch.optim.Adam(model.parameters())
        return model, Hardening(controllable(model, optimizer), optimizer)

    _, hardening = shared_model()
    hardening.harden("2")
    model, resumed = shared_model()
    resumed.load_state_dict(hardening.state_dict())
    assert resumed.soft == [] and perm_of(model.get_submodule("0")) == perm_of(
        model.get_submodule("2")
    )
