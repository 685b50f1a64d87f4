"""Units that were ever active, against sets of Python numbers."""

import pytest
import torch
from torch import nn

import padst_compiler as padst
from padst_compiler.exploration import Exploration
from padst_compiler.layers import sparse_layers
from padst_compiler.structures import Block, Diagonal, Structure

STRUCTURES: list[Structure | str] = ["block:4", "nm:8", "diagonal", "fan_in", "unstructured"]
STRUCTURES += [Diagonal(band=4), Diagonal(modulus=8), Block(4, 8, balanced=False)]


def net(structure: Structure | str) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 16), nn.Linear(16, 4))
    config = padst.SparseConfig(structure, sparsity=0.75, permutation="none")
    padst.sparsify(model, {"0": config, "2": config})
    return model


def active(model: nn.Module) -> dict[str, set[tuple[int, int]]]:
    """Return (group, candidate) of every unit of every layer, ablated neurons left out."""
    found = {}
    for name, layer in sparse_layers(model).items():
        slots = layer.structure.slots(layer.kept_units(), layer.shape).tolist()
        found[name] = {(g, u) for g, row in enumerate(slots) for u in row if u >= 0}
    return found


@pytest.mark.parametrize("method", ["set", "rigl", "srigl"])
@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_the_rate_counts_what_was_ever_active(structure: Structure | str, method: str) -> None:
    if method == "srigl" and structure not in ("fan_in", "nm:8"):
        method = "set"
    model = net(structure)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = padst.DynamicSparsity(
        model, optimizer, method, total_steps=60, update_every=3, drop_fraction=0.9
    )
    explored = Exploration(model, optimizer)
    union = active(model)
    generator = torch.Generator().manual_seed(0)
    before = explored.rates()
    for _ in range(30):
        x = torch.randn(8, 16, generator=generator)
        optimizer.zero_grad()
        (model(x) - x[:, :4]).square().mean().backward()
        optimizer.step()
        for name, units in active(model).items():
            union[name] |= units
    assert any(event["churn"] > 0 for event in training.history)
    for name, layer in sparse_layers(model).items():
        groups, candidates = layer.structure.table(layer.shape)
        rate = explored.rates()[name]
        assert rate == pytest.approx(len(union[name]) / (groups * candidates))
        assert rate >= before[name]
    assert explored.rates() != before


def test_a_step_without_an_update_writes_nothing() -> None:
    model = net("fan_in")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    explored = Exploration(model, optimizer)
    versions = [bits._version for bits in explored._bits.values()]
    for _ in range(5):
        model(torch.ones(2, 16)).sum().backward()
        optimizer.step()
    assert [bits._version for bits in explored._bits.values()] == versions
    explored.detach()


def test_state_goes_with_a_checkpoint_and_another_models_is_refused() -> None:
    model = net("fan_in")
    explored = Exploration(model, torch.optim.SGD(model.parameters(), lr=0.1))
    with torch.no_grad():
        layer = sparse_layers(model)["0"]
        layer.indices.copy_((layer.indices + 1) % 16)
    explored.note()
    twin = Exploration(net("fan_in"), torch.optim.SGD(model.parameters(), lr=0.1))
    twin.load_state_dict(explored.state_dict())
    assert twin.rates()["0"] >= explored.rates()["0"] > 0.25
    other = Exploration(net("block:4"), torch.optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(ValueError, match="Expected bits of"):
        other.load_state_dict(explored.state_dict())


def test_a_dense_model_is_refused() -> None:
    dense = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Expected a model with sparse layers"):
        Exploration(dense, torch.optim.SGD(dense.parameters(), lr=0.1))
