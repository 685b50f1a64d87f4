"""Reports against what a plain count of the layers says, through a whole training."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import padst_compiler as padst
from padst_compiler.layers import sparse_layers
from padst_compiler.methods.base import Method
from padst_compiler.methods.srigl import SRigL
from padst_compiler.permutation import FixedPermutation


def net(structure: str = "block:8", permutation: str = "learned") -> nn.Sequential:
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 8))
    config = padst.SparseConfig(structure, sparsity=0.75, permutation=permutation)
    padst.sparsify(model, {"0": config, "2": config})
    return model


def train(
    model: nn.Module, method: Method | str = "rigl", steps: int = 60
) -> tuple[padst.DynamicSparsity, padst.Exploration]:
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    training = padst.DynamicSparsity(
        model, optimizer, method, total_steps=60, update_every=5, penalty_weight=20.0
    )
    explored = padst.Exploration(model, optimizer)
    for step in range(steps):
        x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        ((model(x) - x[:, :8]).square().mean() + training.penalty()).backward()
        optimizer.step()
    return training, explored


@pytest.mark.parametrize("structure", ["block:8", "nm:8", "diagonal", "fan_in", "unstructured"])
def test_counts_are_those_of_the_masks(structure: str) -> None:
    model = net(structure, "none")
    result = padst.report(model)
    assert result.step is None and result.history == ()
    for name, layer in sparse_layers(model).items():
        row = result.layers[name]
        ones = int(layer.mask().sum())
        assert row.nnz == ones
        assert row.sparsity == pytest.approx(1 - ones / layer.shape.numel)
        assert row.requested == 0.75 and row.shape == str(layer.shape)
        assert (row.permutation, row.side, row.distance, row.gap) == ("none", None, None, None)
        assert row.churn is row.explored is row.soft_share is None and row.ablated == 0


def test_soft_and_hard_permutations_through_a_training() -> None:
    model = net()
    before = padst.report(model)
    assert all(row.permutation == "soft" for row in before.layers.values())
    soft = sparse_layers(model)["0"].soft_permutation
    assert soft is not None
    matrix = soft.soft().detach().double()
    lines = [matrix[n] for n in range(32)] + [matrix[:, n] for n in range(32)]
    each = [float(line.sum() - line.square().sum().sqrt()) for line in lines]
    assert before.layers["0"].penalty == pytest.approx(sum(each) / 64, rel=1e-4)
    worst = max(1 - float(line.norm() / line.sum()) for line in lines)
    assert before.layers["0"].gap == pytest.approx(worst, rel=1e-4)

    training, explored = train(model)
    padst.harden(model)
    after = padst.report(model, training, explored)
    assert after.step == 60
    for name, row in after.layers.items():
        layer = sparse_layers(model)[name]
        assert (row.permutation, row.gap, row.penalty) == ("hard", 0.0, 0.0)
        assert isinstance(layer.permutation, FixedPermutation)
        perm = layer.permutation.perm.tolist()
        assert row.distance is not None
        assert row.distance == sum(p != n for n, p in enumerate(perm)) / len(perm)
        assert row.distance_modulo is not None and row.distance_modulo <= row.distance
        churns = [e["churn"] for e in training.history if e["layer"] == name and e["step"] <= 40]
        assert row.churn == churns[-1]  # updates end at 45; later events are looks
        assert row.explored is not None and 0.25 <= row.explored <= 1.0
        assert row.soft_share is not None and 0.0 < row.soft_share <= 1.0


def test_the_hardening_step_is_in_the_share_spent_soft() -> None:
    model = net()
    training, _ = train(model)
    hardened = {e["layer"]: e["step"] for e in training.history if e["hardened"]}
    assert hardened
    result = padst.report(model, training)
    for name, step in hardened.items():
        assert result.layers[name].soft_share == pytest.approx(step / 60, abs=1.5 / 60)


def test_a_permutation_on_a_vacuous_side_adds_nothing() -> None:
    model = net("fan_in", "random")
    for row in padst.report(model).layers.values():
        assert row.distance is not None and row.distance > 0.5 and row.distance_modulo == 0.0


def test_ablated_neurons_are_counted_and_their_weights_are_not() -> None:
    model = net("fan_in", "none")
    training, explored = train(model, SRigL(gamma_sal=0.95))
    result = padst.report(model, training, explored)
    for name, layer in sparse_layers(model).items():
        row = result.layers[name]
        events = [event for event in training.history if event["layer"] == name]
        assert row.ablated == layer.ablated == events[-1]["ablated"]
        assert row.nnz == int(layer.mask().sum())
    assert sum(row.ablated for row in result.layers.values()) > 0


def test_text_dict_and_numbers_say_the_same() -> None:
    model = net()
    training, explored = train(model, steps=20)
    result = padst.report(model, training, explored)
    text = str(result)
    assert len(text.splitlines()) == 2 + 2 and "block:8" in text and "ITOP" in text
    plain = json.loads(json.dumps(result.to_dict()))
    assert plain["step"] == 20 and plain["nnz"] == 2 * 64 * 32 // 4
    assert [row["name"] for row in plain["layers"]] == ["0", "2"]
    numbers = result.numbers()
    assert numbers["0/sparsity"] == 0.75 and numbers["nnz"] == plain["nnz"]
    assert not any(isinstance(value, str) for value in numbers.values())


def test_reporting_changes_nothing() -> None:
    model = net()
    training, explored = train(model, steps=20)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    padst.report(model, training, explored)
    assert torch.equal(torch.get_rng_state(), state) and training.step_count == 20
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_layers_that_share_a_permutation_decode_it_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    first, second = sparse_layers(model).values()
    first.permutation = second.permutation  # 32 -> 64 permutes 32, 64 -> 32 permutes 32
    soft = second.soft_permutation
    assert soft is not None and soft.size == 32
    counted = Mock(wraps=soft.harden)
    monkeypatch.setattr(soft, "harden", counted)
    rows = list(padst.report(model).layers.values())
    assert counted.call_count == 1 and rows[0].distance == rows[1].distance


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected a model with sparse layers"):
        padst.report(nn.Linear(2, 2))


def test_pictures_with_and_without_a_history(tmp_path: Path) -> None:
    model = net()
    alone = padst.report(model).plot(tmp_path / "alone.png")
    training, explored = train(model, steps=20)
    full = padst.report(model, training, explored).plot(tmp_path / "full.png")
    assert alone.read_bytes()[:4] == full.read_bytes()[:4] == b"\x89PNG"
    assert full.stat().st_size > alone.stat().st_size
