"""Folded or on activations: the same numbers and gradients, the cheaper of the two."""

import pytest
import torch
from torch import nn

from padst_compiler.index_map import IndexMap
from padst_compiler.layers import SparseLayer, SparseLinear
from padst_compiler.permutation import FixedPermutation
from padst_compiler.recorder import Recorder
from padst_compiler.relaxations.spelling import make
from padst_compiler.soft_product import folded_weight, is_cheaper_folded
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured


def layer_of(
    structure: Structure, shape: Shape, side: str, form: str = "sinkhorn", bias: bool = True
) -> SparseLayer:
    linear = nn.Linear(shape.in_features, shape.out_features, bias=bias).double()
    indices = structure.select(linear.weight.detach(), structure.kept(shape, 0.75))
    size = shape.in_features if side == "input" else shape.out_features
    soft = make(form, size, torch.Generator().manual_seed(0))
    return SparseLinear.adopt(linear, structure, indices, soft, side).float()


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("shape", [Shape(16, 16), Shape(24, 16), Shape(16, 24)], ids=str)
@pytest.mark.parametrize("structure", [Block(4), NM(4), Diagonal(), FanIn(), Unstructured()])
def test_folding_is_the_same_function(structure: Structure, shape: Shape, side: str) -> None:
    layer = layer_of(structure, shape, side)
    x = torch.randn(3, 40, shape.in_features, requires_grad=True)
    upstream = torch.randn(3, 40, shape.out_features)
    folded = folded_weight(layer, x, layer.values)
    width = shape.in_features if side == "input" else shape.out_features
    once = layer.values.numel() * width if side == "input" else width**2 * shape.in_features
    activations = 120 * (width**2 + layer.values.numel())
    assert (folded is not None) == (once + 120 * shape.numel < activations)
    # Token by token nothing folds; together they may.
    together = layer(x)
    apart = torch.stack([layer(row) for row in x.flatten(0, 1)]).view_as(together)
    assert folded_weight(layer, x[0, 0], layer.values) is None
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)
    leaves = [x, *layer.parameters()]
    ours, theirs = (torch.autograd.grad(y, leaves, upstream) for y in (together, apart))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)


def test_both_ways_are_taken_somewhere() -> None:
    square = Shape(64, 64)
    for side in ("input", "output"):
        assert not is_cheaper_folded(square, 400, side, 8)
        assert is_cheaper_folded(square, 400, side, 10**5)
    assert not is_cheaper_folded(Shape(256, 64), 1600, "input", 10**6)  # the wide weight is dearer
    assert is_cheaper_folded(Shape(64, 256), 1600, "input", 1000)  # a wide soft matrix is


def test_activations_while_a_recorder_is_armed_and_the_same_scores_after() -> None:
    layer = layer_of(FanIn(), Shape(16, 16), "input")
    layer.recorder = Recorder(layer)
    x = torch.randn(200, 16)
    assert folded_weight(layer, x, layer.values) is not None
    layer.recorder.arm()
    assert folded_weight(layer, x, layer.values) is None
    layer(x).square().sum().backward()
    assert layer.soft_permutation is not None
    gains, inner = layer.recorder.gains.clone(), layer.soft_permutation(x).detach()
    y = (layer(x).detach() * 2.0).t() @ inner
    best = y.abs().scatter(1, layer.indices.long(), 0.0).topk(gains.shape[1], dim=1).values
    torch.testing.assert_close(gains.sort(descending=True).values, best, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("form", ["low_rank", "clos", "blockwise"])
def test_forms_that_are_cheaper_than_their_matrix_never_fold(form: str) -> None:
    layer = layer_of(FanIn(), Shape(16, 16), "input", form)
    assert folded_weight(layer, torch.randn(10**4, 16), layer.values) is None


def test_a_hard_permutation_and_none_do_not_fold() -> None:
    layer, x = layer_of(FanIn(), Shape(16, 16), "input"), torch.randn(1000, 16)
    for held in (FixedPermutation(IndexMap.of(torch.randperm(16))), None):
        layer.permutation = held
        assert folded_weight(layer, x, layer.values) is None


def test_a_compiled_layer_does_not_ask_for_the_number_of_tokens() -> None:
    layer = layer_of(FanIn(), Shape(16, 16), "input")
    fast = torch.compile(layer, backend="eager", fullgraph=True, dynamic=True)
    for tokens in (4, 500, 1000):
        x = torch.randn(tokens, 16)
        with torch.compiler.set_stance("default" if tokens == 4 else "fail_on_recompile"):
            torch.testing.assert_close(fast(x), layer(x), rtol=1e-4, atol=1e-5)


def test_autocast_computes_in_its_dtype() -> None:
    layer, x = layer_of(FanIn(), Shape(16, 16), "input"), torch.randn(1000, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.1, atol=0.1)
