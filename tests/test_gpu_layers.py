from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from padst_compiler.backend import gpu_eager
from padst_compiler.gpu_cases import Case
from padst_compiler.gpu_check import error, expected_of
from padst_compiler.gpu_layers import (
    DTYPES,
    Layers,
    compiled,
    only,
    precision,
    product,
    way,
)
from padst_compiler.index_map import invert
from padst_compiler.kernel_ops import BLOCK_MLP
from padst_compiler.layers import sparse_layers

CASE = Case("layers", (32, 64), 5, "block:16", 0.5, "fp32")


def test_layers_are_seeded_and_made_once_a_shape() -> None:
    layers = Layers("cpu")
    (dense, x), sparse = layers.dense(CASE), layers.sparse(CASE)
    assert layers.dense(CASE)[1] is x and layers.sparse(replace(CASE, tokens=9)) is sparse
    assert layers.dense(replace(CASE, tokens=9))[1].shape == (9, 32)
    again, y = layers.dense(CASE)
    assert y is not x and torch.equal(x, y) and torch.equal(dense.weight, again.weight)
    half = replace(CASE, dtype="bf16")
    assert layers.dense(half)[1].dtype is only(layers.sparse(half)).values.dtype is torch.bfloat16
    with pytest.raises(ValueError, match="divisible"):
        layers.sparse(replace(CASE, structure="block:64"))


def test_what_cannot_be_made_is_tried_once() -> None:
    tried, layers = list[int](), Layers("cpu")

    def make() -> None:
        tried.append(1)
        raise RuntimeError("no configuration fits")

    for _ in range(2):
        with pytest.raises(RuntimeError, match="no configuration"):
            layers.once("Inductor", make)
    assert tried == [1]


@pytest.mark.parametrize("kind", ["block:16", "diagonal"])
def test_a_layer_s_kernel_runs_with_and_without_maps(kind: str) -> None:
    layers, case = Layers("cpu"), replace(CASE, structure=kind)
    (_, x), layer = layers.dense(case), only(layers.sparse(case))
    with torch.no_grad():
        expected = expected_of(layer, x)
        assert error(product(layer, x, bias=layer.bias), expected) < 1e-6
        perm, into = torch.randperm(32), torch.randperm(64)
        moved = expected_of(layer, x[:, perm], bias=False)[:, invert(into)]
        assert error(product(layer, x, perm, into), moved) < 1e-6


def test_the_fused_kernel_is_launched() -> None:
    layers = Layers("cpu")
    dense, sparse = layers.mlps(CASE)
    assert [type(m) for m in dense][1] is [type(m) for m in sparse][1]
    first, second = sparse_layers(sparse).values()
    x = torch.randn(5, 32)
    given = (x, first.values, first.indices, first.bias, second.values, second.indices)
    with torch.no_grad():
        y: Tensor = gpu_eager.launch(BLOCK_MLP, *given, 64, 32, "gelu")
        assert second.bias is not None
        assert error(y + second.bias, sparse.double()(x.double())) < 1e-5


def test_tf32_is_allowed_for_a_while_and_only_where_asked() -> None:
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32
    for name in DTYPES:
        with precision(name):
            assert flags.allow_tf32 == (name == "tf32")
        assert flags.allow_tf32 == before


@pytest.mark.slow
def test_a_graph_is_what_the_model_computes_and_the_way_is_named() -> None:
    layers = Layers("cpu")
    (_, x), sparse = layers.dense(CASE), layers.sparse(CASE)
    with torch.no_grad():
        ours, graph = compiled(sparse, x, kernels="dense")
        assert torch.equal(ours(x), graph()[0]) and error(ours(x), sparse(x)) < 1e-6
    assert way(sparse, x).split()[0]
