"""Static masks do not move."""

import torch
from torch import nn

import padst_compiler as padst
from padst_compiler.methods import Static


def test_masks_stay_and_nothing_is_noted() -> None:
    model = padst.sparsify(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), structure="fan_in")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = padst.DynamicSparsity(model, optimizer, Static(), total_steps=8, update_every=1)
    before = [layer.indices.clone() for layer in padst.sparse_layers(model).values()]
    for _ in range(8):
        model(torch.randn(4, 16)).square().mean().backward()
        optimizer.step()
    layers = padst.sparse_layers(model).values()
    assert all(torch.equal(a, b.indices) for a, b in zip(before, layers, strict=True))
    assert training.history == [] and all(layer.recorder is None for layer in layers)
