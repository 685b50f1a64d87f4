"""One controller per layer, for as long as it lives."""

import pytest
import torch
from torch import nn

from padst_compiler import control
from padst_compiler.hardening import Hardening
from padst_compiler.layers import SparseLayer, sparse_layers
from padst_compiler.sparsify import sparsify


def make() -> tuple[nn.Module, dict[str, SparseLayer], torch.optim.Optimizer]:
    model = sparsify(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), structure="block:4")
    return model, sparse_layers(model), torch.optim.SGD(model.parameters(), lr=0.1)


def test_a_layer_has_the_owner_that_took_it_until_release_or_its_end() -> None:
    model, layers, optimizer = make()
    first = next(iter(layers.values()))
    assert control.owner_of(first) is None
    owner = Hardening(layers, optimizer)
    assert control.owner_of(first) is owner
    control.release([first])
    assert control.owner_of(first) is None
    control.take([first], owner)
    del owner
    assert control.owner_of(first) is None
    assert control.controllable(model, optimizer) == layers


def test_a_dense_model_and_a_second_controller_are_refused() -> None:
    model, layers, optimizer = make()
    with pytest.raises(ValueError, match=r"Expected a model with sparse layers\. Got Linear"):
        control.some_sparse(nn.Linear(2, 2))
    owner = Hardening(layers, optimizer)
    with pytest.raises(ValueError, match=r"Expected one controller per model"):
        control.controllable(model, optimizer)
    owner.release()
    other = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"Expected an optimizer that holds"):
        control.controllable(model, other)
