"""An average follows masks that move, permutations that harden and neurons that come and go."""

import copy

import pytest
import torch
from torch import nn

import padst_compiler as padst
from padst_compiler.averaging import EMA
from padst_compiler.layers import SparseLayer, sparse_layers


def net(structure: str = "fan_in", permutation: str = "none") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 32))
    config = padst.SparseConfig(structure, sparsity=0.75, permutation=permutation)
    padst.sparsify(model, {"0": config, "3": config})
    return model


def step(model: nn.Module, optimizer: torch.optim.Optimizer, training: object) -> None:
    loss = model(torch.randn(16, 32)).square().mean()
    if isinstance(training, padst.DynamicSparsity):
        loss = loss + training.penalty()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def dense_of(layer: SparseLayer) -> torch.Tensor:
    return layer.matrix().detach().clone()


@pytest.mark.parametrize("structure", ["block:8", "nm:8", "diagonal", "fan_in", "unstructured"])
@pytest.mark.parametrize("method", ["rigl", "set"])
def test_it_is_the_dense_average_under_the_present_mask(structure: str, method: str) -> None:
    model = net(structure)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    training = padst.DynamicSparsity(model, optimizer, method, total_steps=60, update_every=3)
    ema = EMA(model, decay=0.8)
    expected = {n: dense_of(m) for n, m in sparse_layers(model).items()}
    masks = {n: m.mask() for n, m in sparse_layers(model).items()}
    for _ in range(30):
        step(model, optimizer, training)
        ema.update(model)
        for name, layer in sparse_layers(model).items():
            now, mask = dense_of(layer), layer.mask()
            stays = mask & masks[name]
            average = 0.8 * expected[name] + 0.2 * now
            expected[name], masks[name] = torch.where(stays, average, now), mask
    assert sum(event["churn"] for event in training.history) > 0
    for name, layer in sparse_layers(ema.model).items():
        assert torch.equal(layer.mask(), masks[name])
        torch.testing.assert_close(dense_of(layer), expected[name], rtol=1e-4, atol=1e-6)


def test_dense_parts_are_averaged_and_statistics_copied() -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    ema = EMA(model, decay=0.5)
    bias = model.get_parameter("3.bias")
    before = bias.detach().clone()
    step(model, optimizer, None)
    ema.update(model)
    average, norm = ema.model.get_parameter("3.bias"), ema.model.get_buffer("1.running_mean")
    torch.testing.assert_close(average, (before + bias) / 2)
    assert torch.equal(norm, model.get_buffer("1.running_mean"))
    assert not ema.model.training and not any(p.requires_grad for p in ema.model.parameters())


def test_permutations_are_averaged_until_they_harden() -> None:
    model = net("nm:8", "learned")
    ema = EMA(model, decay=0.5)
    layer, average = (sparse_layers(m)["0"] for m in (model, ema.model))
    assert layer.soft_permutation is not None and average.soft_permutation is not None
    before = next(average.soft_permutation.parameters()).clone()
    with torch.no_grad():
        next(layer.soft_permutation.parameters()).add_(1.0)
    ema.update(model)
    torch.testing.assert_close(next(average.soft_permutation.parameters()), before + 0.5)
    padst.harden(model)
    ema.update(model)
    x = torch.randn(4, 32)
    assert average.soft_permutation is None
    assert torch.equal(average.permutation(x), layer.permutation(x))


def test_ablated_neurons_leave_the_average_too() -> None:
    model = net()
    layer = sparse_layers(model)["0"]
    ema = EMA(model, decay=0.5)
    rows = torch.arange(0, 64, 2)
    layer.store(torch.zeros(32, layer.indices.numel() // 32, dtype=torch.int32), rows)
    ema.update(model)
    average = sparse_layers(ema.model)["0"]
    assert average.ablated == 32
    torch.testing.assert_close(dense_of(average), dense_of(layer))


def test_the_model_is_not_touched_and_another_one_is_refused() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    ema = EMA(model)
    ema.update(model)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())
    with pytest.raises(ValueError, match=r"Expected the model that was averaged"):
        ema.update(nn.Linear(4, 4))
    with pytest.raises(ValueError, match=r"Expected 0 <= decay < 1\. Got 1\.0\."):
        EMA(model, decay=1.0)


def test_it_saves_and_compiles_as_any_sparse_model(tmp_path: object) -> None:
    ema = EMA(net("block:8", "random"))
    x = torch.randn(4, 32)
    padst.save(ema.model, f"{tmp_path}/ema.safetensors")
    twin = net("block:8", "random")
    padst.load(twin, f"{tmp_path}/ema.safetensors")
    torch.testing.assert_close(twin.eval()(x), ema.model(x))
