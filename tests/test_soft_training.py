"""Training with every penalty, rule and form: it resumes bit by bit, and counts soft steps."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

import padst_compiler as padst

STEPS = 30


def start(form: str, **settings: Any) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    config = padst.SparseConfig("block:4", 0.5, form)
    padst.sparsify(net, config, filter_fn=lambda site: True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=5e-3, weight_decay=0.0)
    training = padst.DynamicSparsity(
        net, optimizer, total_steps=STEPS, update_every=5, harden_every=3, **settings
    )
    return net, optimizer, training


def run(net: nn.Module, optimizer: torch.optim.Optimizer, training: Any, steps: range) -> None:
    for step in steps:
        data = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        ((net(data[0]) - data[1]).square().mean() + training.penalty()).backward()
        optimizer.step()


CASES: list[tuple[str, dict[str, Any]]] = [
    ("sinkhorn", {"anneal": 5.0}),
    ("sinkhorn", {"penalty": "augmented_lagrangian", "hardening": "plateau:2"}),
    ("gumbel", {"penalty": "constant", "hardening": "step:20"}),
    ("autoshuffle", {"penalty": "augmented_lagrangian"}),
    ("low_rank:4", {"hardening": "threshold:0.5"}),
    ("clos:2", {"hardening": "step"}),
    ("blockwise:8", {"penalty": "constant", "method": "set"}),
]


@pytest.mark.parametrize(("form", "settings"), CASES, ids=str)
def test_half_saved_and_half_is_the_whole(form: str, settings: dict[str, Any]) -> None:
    whole = start(form, **settings)
    run(*whole, range(STEPS))
    first = start(form, **settings)
    run(*first, range(STEPS // 2))
    states = copy.deepcopy([part.state_dict() for part in first])
    second = start(form, **settings)
    second[2].load_state_dict(states[2])
    second[0].load_state_dict(states[0])
    second[1].load_state_dict(states[1])
    run(*second, range(STEPS // 2, STEPS))
    ours, theirs = second[0].state_dict(), whole[0].state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert second[2].soft_fraction() == whole[2].soft_fraction()
    assert second[2].history == whole[2].history


def test_soft_fractions_by_layer() -> None:
    net, optimizer, training = start("sinkhorn", hardening="step:12")
    run(net, optimizer, training, range(STEPS))
    assert training.soft_fraction() == {"0": pytest.approx(12 / 30), "2": pytest.approx(12 / 30)}
    assert [e["step"] for e in training.history if e["hardened"]] == [12, 12]
    net, optimizer, training = start("none")
    run(net, optimizer, training, range(3))
    assert training.soft_fraction() == {"0": 0.0, "2": 0.0}


def test_a_constant_penalty_counts_from_the_first_step_and_a_ramp_does_not() -> None:
    assert float(start("sinkhorn", penalty="constant")[2].penalty().detach()) > 0.5
    assert float(start("sinkhorn")[2].penalty().detach()) == 0.0


def test_another_rule_or_penalty_is_another_run() -> None:
    state = start("sinkhorn")[2].state_dict()
    for settings in ({"hardening": "step"}, {"penalty": "constant"}, {"anneal": 2.0}):
        with pytest.raises(ValueError, match=rf"Expected {next(iter(settings))} = .* checkpoint"):
            start("sinkhorn", **settings)[2].load_state_dict(state)


@pytest.mark.parametrize(
    "settings", [{"hardening": "gabs"}, {"penalty": "quadratic"}, {"anneal": 0.1}], ids=str
)
def test_unknown_settings_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="Expected"):
        start("sinkhorn", **settings)


def test_a_vacuous_side_is_learned_only_by_force() -> None:
    for form in ("learned", "sinkhorn", "low_rank:2", "clos"):
        for forced in (False, True):
            net = nn.Sequential(nn.Linear(16, 16))
            config = padst.SparseConfig("fan_in", 0.5, form, force_permutation=forced)
            padst.sparsify(net, config, filter_fn=lambda site: True)
            assert (padst.sparse_layers(net)["0"].soft_permutation is not None) == forced


def test_a_width_that_a_form_cannot_permute_stays_dense_or_raises() -> None:
    net = nn.Sequential(nn.Linear(13, 13), nn.Linear(13, 13))
    config = padst.SparseConfig("diagonal", 0.5, "clos")
    plan = padst.plan(net, None, config, filter_fn=lambda site: True)
    assert [site.refused for site in plan.sites] == [True, True]
    assert "Expected a width with divisors for clos. Got 13." in plan.sites[0].reason
    with pytest.raises(ValueError, match="Expected a width with divisors"):
        padst.plan(net, None, config, filter_fn=lambda site: True, strict=True)
