"""A file from another structure, sparsity or permutation: what differs is said, nothing changes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import padst_compiler as padst
from padst_compiler.differences import differences
from padst_compiler.layers import SparseLayer
from padst_compiler.sites import discover

OPTIONS: dict[str, Any] = {"structure": "block:8", "sparsity": 0.5}
OTHERS: dict[str, dict[str, Any]] = {
    "structure block:8, here block:4": {"structure": "block:4"},
    "sparsity 0.5, here 0.75": {"sparsity": 0.75},
    "structure block:8, here nm:8; sparsity 0.5, here 0.75": {
        "structure": "nm:8",
        "sparsity": 0.75,
    },
    "permutation learned, here none": {"permutation": "none"},
    "side input, here output": {"side": "output"},
}


def net(layers: int = 1, **options: Any) -> nn.Sequential:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(layers)))
    padst.sparsify(model, padst.SparseConfig(**OPTIONS | options))
    return model


@pytest.mark.parametrize("said", OTHERS)
def test_a_model_that_was_configured_otherwise_is_left_as_it_is(said: str, tmp_path: Path) -> None:
    padst.save(net(), tmp_path / "file")
    target = net(**OTHERS[said])
    before = {name: t.clone() for name, t in target.state_dict().items()}
    objects = {name: id(t) for name, t in target.state_dict(keep_vars=True).items()}
    with pytest.raises(ValueError, match="Load into the model before it is sparsified") as error:
        padst.load(target, tmp_path / "file")
    assert f"Got '0' with {said}." in str(error.value)
    now = target.state_dict(keep_vars=True)
    assert {name: id(t) for name, t in now.items()} == objects
    assert all(torch.equal(now[name], t) for name, t in before.items())


def test_many_differences_are_counted(tmp_path: Path) -> None:
    padst.save(net(5), tmp_path / "file")
    with pytest.raises(ValueError, match=r"'2' with structure .*, and 2 more\. Load into"):
        padst.load(net(5, structure="block:4"), tmp_path / "file")


def test_seeds_and_stages_of_training_are_no_differences(tmp_path: Path) -> None:
    model = net(seed=1)
    padst.save(padst.harden(model), tmp_path / "file")
    target = padst.load(net(seed=2), tmp_path / "file")
    assert torch.equal(target(torch.eye(32)), model(torch.eye(32)))


def test_a_layer_made_by_hand_differs_by_its_structure_alone() -> None:
    model = net()
    layer = model[0]
    assert isinstance(layer, SparseLayer)
    layer.config = None
    sites = {site.name: site for site in discover(model)}
    fields = {"names": ["0"], "structure": "block:8", "config": {"sparsity": 0.9}}
    assert differences(sites, fields) == []
    assert differences(sites, fields | {"structure": "nm:8"}) != []
    assert differences({}, fields | {"structure": "nm:8"}) == []
