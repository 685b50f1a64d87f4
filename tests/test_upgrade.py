"""A file of version 1 loads as it did."""

import json
from pathlib import Path

import safetensors
import safetensors.torch
import torch
from torch import nn

import padst_compiler as padst
from padst_compiler.checkpoint import FORMAT
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation


def test_soft_permutations_of_version_1_keep_their_temperature(tmp_path: Path) -> None:
    model = padst.sparsify(nn.Sequential(nn.Linear(16, 16)), structure="block:4", sparsity=0.5)
    soft = padst.sparse_layers(model)["0"].soft_permutation
    assert isinstance(soft, SinkhornPermutation)
    soft.temperature.fill_(0.25)
    soft.iterations = 7
    path = tmp_path / "model.safetensors"
    padst.save(model, path)
    with safetensors.safe_open(path, framework="pt") as file:
        header = json.loads(file.metadata()[FORMAT])
    assert header["version"] == 2
    header["version"] = 1
    old = {"kind": "soft", "temperature": 0.25, "iterations": 7}
    header["layers"][0]["permutation"] = old
    header["layers"][0]["config"].pop("share")
    tensors = safetensors.torch.load_file(path)
    del tensors["0.permutation.temperature"]
    safetensors.torch.save_file(tensors, path, {FORMAT: json.dumps(header)})
    loaded = padst.load(nn.Sequential(nn.Linear(16, 16)), path)
    x = torch.randn(3, 16)
    assert torch.equal(loaded(x), model(x))
    assert "temperature=0.25, iterations=7" in repr(loaded)
