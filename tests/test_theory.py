"""The expressivity of whole models: chains with and without permutations, as a table and a dict."""

import json
import math

import pytest
import torch
from torch import nn

import padst_compiler as padst
from padst_compiler.layers import sparse_layers
from padst_compiler.permutation import FixedPermutation


def chain(structure: str, permutation: str, depth: int = 6, side: str = "input") -> nn.Sequential:
    model = nn.Sequential(*[nn.Linear(64, 64) for _ in range(depth)])
    config = padst.SparseConfig(structure, sparsity=0.75, permutation=permutation, side=side)
    padst.sparsify(model, config, filter_fn=lambda site: True)
    return model


@pytest.mark.parametrize("permutation", ["random", "learned"])
def test_permutations_bring_dense_factors_back_after_the_overhead(permutation: str) -> None:
    found = padst.theory.expressivity(chain("block:16", permutation))
    assert [layer.u for layer in found.layers] == [16, 32, 48, 64, 64, 64]
    assert found.dense_at == found.dense_at_mixed == 4 == found.layers[0].overhead
    assert found.dense_at_plain is None
    assert [layer.u_plain for layer in found.layers] == [16] * 6
    regions = [math.log2(sum(math.comb(64, j) for j in range(k + 1))) for k in (16, 32, 48)]
    assert found.log2_regions == pytest.approx(sum(regions) + 3 * 64)
    assert found.log2_regions_dense == 6 * 64


def test_without_permutations_a_structured_chain_stalls() -> None:
    found = padst.theory.expressivity(chain("diagonal", "none"))
    assert [layer.u for layer in found.layers] == [16] * 6
    assert (found.dense_at, found.dense_at_mixed) == (None, 4)


def test_what_is_absorbed_does_not_mix() -> None:
    model = chain("block:16", "random")
    for layer in sparse_layers(model).values():
        assert isinstance(layer.permutation, FixedPermutation)
        layer.permutation.perm.copy_(torch.arange(64).view(4, 16).flip(0, 1).flatten())
    found = padst.theory.expressivity(model)
    assert [layer.mixes for layer in found.layers] == [False] * 6
    assert found.dense_at is None


def test_output_permutations_mix_what_the_next_layer_reads() -> None:
    found = padst.theory.expressivity(chain("block:16", "random", side="output"))
    assert [layer.mixes for layer in found.layers] == [False] + [True] * 5
    assert [layer.u for layer in found.layers] == [16, 32, 48, 64, 64, 64]


def test_fan_in_and_unstructured_mix_by_themselves() -> None:
    fan_in = padst.theory.expressivity(chain("fan_in", "none"))
    assert (fan_in.dense_at, fan_in.dense_at_plain) == (4, 4)
    free = padst.theory.expressivity(chain("unstructured", "none"))
    assert free.dense_at == 1 and free.log2_regions == free.log2_regions_dense


def test_the_published_depths_in_real_layers() -> None:
    for sparsity, depth in ((0.6, 3), (0.7, 4), (0.8, 5), (0.9, 10), (0.95, 20)):
        model = nn.Sequential(nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 4))
        config = padst.SparseConfig("diagonal", sparsity=sparsity, permutation="random")
        found = padst.theory.expressivity(padst.sparsify(model, {"0": config}))
        assert found.inputs == 768 and found.layers[0].overhead == depth
    for size, depth in ((16, 48), (32, 24), (64, 12)):
        model = nn.Sequential(nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 4))
        config = padst.SparseConfig(f"block:{size}", sparsity=0.75, permutation="random")
        assert (
            padst.theory.expressivity(padst.sparsify(model, {"0": config})).layers[0].overhead
            == depth
        )


def test_table_and_dict_say_the_same() -> None:
    found = padst.theory.expressivity(chain("block:16", "random"))
    text, plain = str(found), json.loads(json.dumps(found.to_dict()))
    assert "dense factors: from layer 4" in text and "without any never" in text
    assert len(text.splitlines()) == 2 + 6 + 2
    assert [layer["u"] for layer in plain["layers"]] == [16, 32, 48, 64, 64, 64]


def test_a_dense_model_is_refused() -> None:
    with pytest.raises(ValueError, match="Expected a model with sparse layers"):
        padst.theory.expressivity(nn.Linear(2, 2))
