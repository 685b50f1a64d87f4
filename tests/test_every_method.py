"""Promises of every growth method: exact resuming, no move on bad gradients, defined edges."""

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import padst_compiler as padst
from padst_compiler import DynamicSparsity, SparseConfig
from padst_compiler.methods import (
    GMP,
    METHODS,
    SET,
    DynaDiag,
    Mest,
    Method,
    NonFiniteGradientWarning,
    RigL,
    SRigL,
    Static,
)

CASES: dict[str, tuple[Method, str]] = {
    "rigl": (RigL(), "block:4"),
    "rigl_diagonal": (RigL(), "diagonal"),
    "srigl": (SRigL(gamma_sal=0.8), "fan_in"),
    "srigl_nm": (SRigL(gamma_sal=0.9), "nm:4"),
    "srigl_whole": (SRigL(ablation=False), "fan_in"),
    "set": (SET(), "nm:4"),
    "mest": (Mest(), "unstructured"),
    "gmp": (GMP(), "block:4"),
    "gmp_fan_in": (GMP(start=0.1), "fan_in"),
    "dynadiag": (DynaDiag(), "dynadiag"),
    "static": (Static(), "block:4"),
    "rigl_bands": (RigL(), "diagonal:band=2"),
    "gmp_classes": (GMP(), "diagonal:modulus=8"),
    "set_free": (SET(), "block:4:2:balanced=false"),
    "gmp_free": (GMP(), "block:2:4:balanced=false"),
}
Built = tuple[nn.Module, torch.optim.Optimizer, DynamicSparsity]


def build(
    case: str,
    seed: int = 0,
    width: int = 16,
    sparsity: float = 0.75,
    lr: float = 0.02,
    permutation: str = "learned",
    **options: Any,
) -> Built:
    method, structure = CASES[case]
    torch.manual_seed(seed)
    start = 0.0 if isinstance(method, GMP) else None
    config = SparseConfig(
        structure, sparsity, permutation, start_sparsity=start, force_permutation=True
    )
    model = nn.Sequential(nn.Linear(16, width), nn.Tanh(), nn.Linear(width, 16), nn.Linear(16, 4))
    padst.sparsify(model, {"0": config, "2": config, "3": None})
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    options = {"total_steps": 24, "update_every": 3, "harden_every": 4} | options
    return model, optimizer, DynamicSparsity(model, optimizer, method, **options)


def steps(built: Built, at: range, scale: Callable[[int], float] = lambda _: 1.0) -> list[float]:
    model, optimizer, training = built
    losses = []
    for step in at:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(12, 16, generator=generator)
        loss = (model(x) - x[:, :4] * x[:, 4:8]).square().mean() * scale(step) + training.penalty()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return losses


def topology(model: nn.Module) -> list[Tensor]:
    layers = padst.sparse_layers(model).values()
    return [part for layer in layers for part in (layer.mask(), layer.indices.clone())]


def test_every_method_is_covered() -> None:
    assert {type(method) for method, _ in CASES.values()} == set(METHODS.values())


@pytest.mark.parametrize(
    "cut", [11, *(pytest.param(cut, marks=pytest.mark.slow) for cut in (2, 20))]
)
@pytest.mark.parametrize("case", CASES)
def test_resuming_is_exact(case: str, cut: int) -> None:
    """Cut at 2 and 11: armed for an update; at 20: after hardening, freeze and pruning."""
    whole, first, second = (build(case) for _ in range(3))
    losses = steps(whole, range(24))
    before = steps(first, range(cut))
    model, optimizer, training = first
    file = io.BytesIO()
    torch.save([training.state_dict(), model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    again, optimizer, training = second
    for part, state in zip((training, again, optimizer), saved, strict=True):
        part.load_state_dict(state)  # type: ignore[attr-defined]
    assert before + steps(second, range(cut, 24)) == losses
    assert training.history == whole[2].history
    ours, theirs = whole[0].state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name
    one, other = whole[1].state_dict(), optimizer.state_dict()
    assert one["param_groups"] == other["param_groups"]
    for key, state in one["state"].items():
        for name, value in state.items():
            assert torch.equal(value, other["state"][key][name])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("case", [case for case in CASES if case != "static"])
def test_a_gradient_that_is_not_finite_moves_nothing(case: str, bad: float) -> None:
    built = build(case, permutation="none", update_every=9, total_steps=30, seed=1)
    model, _, training = built
    steps(built, range(8))
    state, before = copy.deepcopy(model.state_dict()), topology(model)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        steps(built, range(8, 9), lambda _: bad)
    kinds = [w.category for w in said]
    assert kinds.count(NonFiniteGradientWarning) == 2
    assert all(torch.equal(a, b) for a, b in zip(before, topology(model), strict=True))
    assert [event["churn"] for event in training.history] == [0.0, 0.0]
    assert state.keys() == model.state_dict().keys()


@pytest.mark.parametrize("case", CASES)
def test_gradients_of_zero_give_a_defined_result(case: str) -> None:
    results = []
    for _ in range(2):
        built = build(case, permutation="none")
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            steps(built, range(24), lambda _: 0.0)
        results.append(topology(built[0]))
        for layer in padst.sparse_layers(built[0]).values():
            assert int(layer.mask().sum()) == layer.packed().values.numel() > 0
            assert bool(layer.weight.isfinite().all())
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("case", ["rigl", "srigl", "srigl_whole", "set", "mest", "gmp", "static"])
@pytest.mark.parametrize("kept", [1, 2])
def test_one_neuron_and_one_weight_each(case: str, kept: int) -> None:
    """The narrow side has one neuron; k = 1 wherever ``kept`` is 1."""
    method = CASES[case][0]
    start = 0.0 if isinstance(method, GMP) else None
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 1), nn.Linear(1, 4))
    config = SparseConfig("fan_in", 1 - kept / 16, "none", start_sparsity=start)
    padst.sparsify(model, {"0": config})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    training = DynamicSparsity(model, optimizer, method, total_steps=12, update_every=1)
    for step in range(12):
        x = torch.randn(8, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    (layer,) = padst.sparse_layers(model).values()
    assert int(layer.mask().sum()) == kept and layer.ablated == 0
    assert all(event["ablated"] == 0 for event in training.history)


@pytest.mark.parametrize("case", CASES)
def test_a_sparsity_that_rounds_to_no_unit_keeps_one(case: str) -> None:
    built = build(case, sparsity=0.9999, permutation="none")
    steps(built, range(24))
    for layer in padst.sparse_layers(built[0]).values():
        assert layer.kept >= 1 and int(layer.mask().sum()) == layer.packed().values.numel()


@pytest.mark.parametrize("case", CASES)
def test_no_global_random_number_is_drawn(case: str) -> None:
    built = build(case)
    before = torch.get_rng_state()
    steps(built, range(24))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("case", CASES)
def test_a_state_of_another_method_is_refused(case: str) -> None:
    built = build(case, permutation="none")
    state = built[2].state_dict()
    state["settings"]["method"] = "Other()"
    with pytest.raises(ValueError, match=r"^Expected method = Other\(\), as in the checkpoint"):
        built[2].load_state_dict(state)


def test_a_scaler_that_skips_a_step_leaves_no_trace_in_what_is_recorded() -> None:
    for case in ("rigl", "srigl"):
        results = []
        for skips in (False, True):
            model, optimizer, training = build(case, permutation="none", update_every=2)
            scaler = torch.amp.GradScaler("cpu", init_scale=1.0, growth_interval=1000)
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))
            for factor in [1.0, *[torch.inf] * skips, 1.0]:
                optimizer.zero_grad()
                scaler.scale(model(x).square().mean() * factor).backward()
                scaler.step(optimizer)
                scaler.update(1.0)
            assert training.step_count == 2
            results.append(topology(model))
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
