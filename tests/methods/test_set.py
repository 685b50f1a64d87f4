"""SET drops the smallest units and grows at random."""

import torch
from torch import nn

from padst_compiler.layers import SparseLinear
from padst_compiler.methods import SET
from padst_compiler.structures import FanIn
from padst_compiler.training import DynamicSparsity


def test_it_drops_the_smallest_weights_and_needs_no_recorder() -> None:
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        scores = torch.rand(6, 16, generator=generator)
        layer = SparseLinear.adopt(
            nn.Linear(16, 6), FanIn(), FanIn().select(scores, 4), None, "input"
        )
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        training = DynamicSparsity(
            layer, optimizer, SET(), total_steps=8, update_every=1, drop_fraction=0.5, seed=seed
        )
        assert layer.recorder is None
        before, strength = layer.indices.clone(), layer.values.detach().abs().flatten()
        layer(torch.ones(2, 16)).sum().backward()
        optimizer.step()
        n_drop = int(training.schedule.drop_at(1) * 24)
        moved = (layer.indices != before).flatten()
        assert 0 < int(moved.sum()) <= n_drop
        assert set(moved.nonzero()[:, 0].tolist()) <= set(strength.argsort()[:n_drop].tolist())
