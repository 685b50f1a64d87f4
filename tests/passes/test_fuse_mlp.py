import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import padst_compiler as padst
from padst_compiler.kernel_ops import BLOCK_MLP
from padst_compiler.ops import LINEAR
from padst_compiler.passes.fuse_mlp import FuseMlp
from padst_compiler.passes.lower_maps import LowerMaps
from padst_compiler.structures import Block, Shape

Rewrite = Callable[..., Any]
linear, permute = LINEAR["block"], torch.ops.padst.permute


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def blocks(outputs: int, inputs: int, number: int = 1) -> dict[str, Tensor]:
    structure, shape = Block(4), Shape(outputs, inputs)
    indices = structure.select(x(outputs, inputs), structure.kept(shape, 0.5))
    return {f"v{number}": structure.pack(x(outputs, inputs), indices), f"i{number}": indices}


def frozen() -> dict[str, Tensor]:
    """Return two layers, 8 to 12 to 4 features, and the bias of the first."""
    return {**blocks(12, 8), **blocks(4, 12, 2), "b": x(12)}


def mlp(between: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return two layers with something between them; it gets the hidden features and the bias."""

    def run(x: Tensor, v1: Tensor, i1: Tensor, v2: Tensor, i2: Tensor, b: Tensor) -> Tensor:
        y: Tensor = linear(between(linear(x, v1, i1, None, 12), b), v2, i2, None, 4)
        return y.sin()

    return run


def new_gelu(x: Tensor) -> Tensor:
    return (
        0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * torch.pow(x, 3.0))))
    )


def quick_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.702 * x)


def masked(x: Tensor) -> Tensor:
    return x * (x > 1.0)


SPELLED: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": ("relu", lambda h, b: F.relu(h + b)),
    "bias first": ("silu", lambda h, b: F.silu(b + h)),
    "no bias": ("gelu", lambda h, b: F.gelu(h)),
    "new gelu": ("gelu_tanh", lambda h, b: new_gelu(h + b)),
    "quick gelu": ("quick_gelu", lambda h, b: quick_gelu(h + b)),
    "dropout of eval": ("relu", lambda h, b: F.dropout(F.relu(h + b), 0.5, training=False)),
    "a copy": ("gelu", lambda h, b: F.gelu((h + b).clone()).contiguous()),
}


@pytest.mark.parametrize("name", SPELLED)
@pytest.mark.parametrize("lead", [(5,), (2, 3)], ids=str)
def test_every_spelling_of_an_activation_is_fused(
    rewrite: Rewrite, name: str, lead: tuple[int, ...]
) -> None:
    activation, between = SPELLED[name]
    result = rewrite(FuseMlp(), mlp(between), x(*lead, 8), **frozen())
    assert result.after == ["block_mlp", "sin"]
    assert result.fired == [f"one kernel, {activation} between the layers"]
    assert (result.left, result.where) == ([], ["i1, i2"])


def test_views_of_the_tokens_stay_around_the_kernel(rewrite: Rewrite) -> None:
    """GPT-2 computes products of flat tokens, and activations of sequences."""

    def run(x: Tensor, v1: Tensor, i1: Tensor, v2: Tensor, i2: Tensor, b: Tensor) -> Tensor:
        batch = x.shape[0]
        h = (linear(x.view(-1, 8), v1, i1, None, 12) + b).view(batch, -1, 12)
        y: Tensor = linear(F.gelu(h).view(-1, 12), v2, i2, None, 4).view(batch, -1, 4)
        return y

    flat = rewrite(FuseMlp(), run, x(2, 3, 8), dynamic=True, **frozen())
    assert flat.after.count("block_mlp") == 1 and "block_linear" not in flat.after

    def back(x: Tensor, v1: Tensor, i1: Tensor, v2: Tensor, i2: Tensor, b: Tensor) -> Tensor:
        h = (linear(x.view(-1, 8), v1, i1, None, 12) + b).view(*x.shape[:2], 12)
        y: Tensor = linear(F.gelu(h), v2, i2, None, 4)
        return y * 2.0

    for dynamic in (False, True):
        result = rewrite(FuseMlp(), back, x(2, 3, 8), dynamic=dynamic, **frozen())
        assert [name for name in result.after if "size" not in name] == [
            "view",
            "block_mlp",
            "view",
            "mul",
        ]


def test_casts_between_the_layers_drop_out(rewrite: Rewrite) -> None:
    given = {k: t.float() if t.is_floating_point() else t for k, t in frozen().items()}
    given["b"] = given["b"].bfloat16()

    def between(h: Tensor, b: Tensor) -> Tensor:
        return F.gelu(h.bfloat16() + b).float()

    result = rewrite(FuseMlp(), mlp(between), x(5, 8).float(), compare=False, **given)
    assert result.after == ["block_mlp", "sin"]
    (node,) = (n for n in result.graph.nodes if n.target is BLOCK_MLP)
    assert node.args[3].meta["val"].dtype is torch.float32


def test_maps_on_both_sides_are_read_and_written_through(rewrite: Rewrite) -> None:
    p, q = torch.randperm(8), torch.randperm(4)

    def run(x: Tensor, p: Tensor, q: Tensor, b: Tensor, **layers: Tensor) -> Tensor:
        h = linear(permute(x, p), layers["v1"], layers["i1"], None, 12)
        y = linear(F.relu(h + b), layers["v2"], layers["i2"], None, 4)
        moved: Tensor = permute(y, q).sin()
        return moved

    result = rewrite((FuseMlp(), LowerMaps()), run, x(5, 8), p=p, q=q, **frozen())
    assert result.after == ["block_mlp", "sin"]
    (node,) = (n for n in result.graph.nodes if n.target is BLOCK_MLP)
    assert [a.name for a in node.args[-2:]] == ["arg1_1", "arg2_1"]


def test_the_first_two_of_three_layers_are_fused(rewrite: Rewrite) -> None:
    def run(x: Tensor, **t: Tensor) -> Tensor:
        y = linear(x, t["v1"], t["i1"], None, 12).relu()
        y = linear(y, t["v2"], t["i2"], None, 4).relu()
        last: Tensor = linear(y, t["v3"], t["i3"], None, 8)
        return last

    given = {**blocks(12, 8), **blocks(4, 12, 2), **blocks(8, 4, 3)}
    result = rewrite(FuseMlp(), run, x(5, 8), **given)
    assert result.after == ["block_mlp", "relu", "block_linear"]
    assert result.left == ["the first layer is fused with the one before it"]
    assert result.where == ["i1, i2", "i2, i3"]


# -- what is left alone ----------------------------------------------------------------------------

LEFT: dict[str, tuple[str, Callable[[Tensor, Tensor], Tensor]]] = {
    "dropout": ("dropout is active", lambda h, b: F.dropout(F.relu(h + b), 0.5)),
    "noise": ("dropout is active", lambda h, b: F.relu(h + b) * torch.rand_like(h)),
    "tanh": ("what stands between the layers (tanh) is none of", lambda h, b: (h + b).tanh()),
    "relu6": ("is none of relu, gelu,", lambda h, b: F.relu6(h + b)),
    "nothing": ("(nothing) is none of", lambda h, b: h),
    "a bias alone": ("(nothing) is none of", lambda h, b: h + b),
    "a scaled bias": (
        "more than a bias and numbers",
        lambda h, b: torch.add(h, b, alpha=2.0).relu(),
    ),
    "a bias afterwards": ("more than a bias and numbers", lambda h, b: F.relu(h) + b),
    "a scale": ("more than a bias and numbers", lambda h, b: F.relu(h * b)),
    "two biases": ("more than a bias and numbers", lambda h, b: F.relu(h + b + b.sin())),
    "one bias a token": ("more than a bias and numbers", lambda h, b: F.relu(h + b[:5, None])),
    "squared": ("is none of", lambda h, b: F.relu(h + b).square()),
    "a mask of it": ("is none of", lambda h, b: masked(h + b)),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_is_no_activation_is_left_alone_and_said(rewrite: Rewrite, name: str) -> None:
    why, between = LEFT[name]
    random = name in ("dropout", "noise")
    result = rewrite(FuseMlp(), mlp(between), x(5, 8), compare=not random, **frozen())
    assert result.after.count("block_linear") == 2 and "block_mlp" not in result.after
    assert result.fired == [] and why in result.left[0] and result.where == ["i1, i2"]


def test_a_permutation_between_the_layers_is_left_alone(rewrite: Rewrite) -> None:
    def run(x: Tensor, p: Tensor, b: Tensor, **t: Tensor) -> Tensor:
        h = F.relu(linear(x, t["v1"], t["i1"], None, 12) + b)
        y: Tensor = linear(permute(h, p), t["v2"], t["i2"], None, 4)
        return y

    result = rewrite(FuseMlp(), run, x(5, 8), p=torch.randperm(12), **frozen())
    assert result.left == ["a permutation stands between the layers"]
    assert "block_mlp" not in result.after


@pytest.mark.parametrize("which", ["sums", "biased", "activated", "output"])
def test_hidden_features_with_another_reader_are_left_alone(rewrite: Rewrite, which: str) -> None:
    def run(x: Tensor, b: Tensor, **t: Tensor) -> tuple[Tensor, Tensor]:
        sums = linear(x, t["v1"], t["i1"], None, 12)
        biased = sums + b
        activated = F.relu(biased)
        y = linear(activated, t["v2"], t["i2"], None, 4)
        seen = {"sums": sums.sum(-1), "biased": biased.exp(), "activated": activated.mean()}
        return y, seen.get(which, activated)

    result = rewrite(FuseMlp(), run, x(5, 8), **frozen())
    assert result.left == ["the hidden features have another reader"]
    assert "block_mlp" not in result.after


def test_hidden_features_of_tokens_that_are_combined_are_left_alone(rewrite: Rewrite) -> None:
    """A product of all pairs of tokens repeats them: it is silu by its numbers alone."""

    def between(h: Tensor, b: Tensor) -> Tensor:
        return h[:, None] * torch.sigmoid(h)

    result = rewrite(FuseMlp(), mlp(between), x(5, 8), **frozen())
    assert "block_mlp" not in result.after and result.fired == []


@pytest.mark.parametrize("case", ["gated", "bias inside", "norm", "residual", "prelu"])
def test_other_graphs_are_left_alone(rewrite: Rewrite, case: str) -> None:
    def run(x: Tensor, b: Tensor, **t: Tensor) -> Tensor:
        inside = b if case == "bias inside" else None
        h = linear(x, t["v1"], t["i1"], inside, 12)
        if case == "gated":
            h = h.relu() * linear(x, t["v1"], t["i1"], None, 12)
        if case == "norm":
            h = F.layer_norm(h, (12,))
        if case == "residual":
            h = h.relu() + torch.cat([x, x[..., :4]], -1)
        h = F.prelu(h, b) if case == "prelu" else h.relu()
        y: Tensor = linear(h, t["v2"], t["i2"], None, 4)
        return y

    result = rewrite(FuseMlp(), run, x(5, 8), **frozen())
    assert "block_mlp" not in result.after and result.fired == []
    inside = ["a bias is part of a layer, no kernel of ours"]
    assert result.left == (inside if case == "bias inside" else [])


def test_a_model_says_which_layers_are_one_kernel() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)).eval()
    config = padst.SparseConfig("block:16", sparsity=0.5, permutation="random")
    padst.harden(padst.sparsify(net, config, filter_fn=lambda site: True))
    report = padst.explain(net, torch.randn(5, 64), options={"kernels": "sparse"})
    said = [row[1:] for row in report.passes if row[0] == "fuse_mlp"]
    assert said == [("0, 2", "fired", "one kernel, gelu between the layers")]
    dense = padst.explain(net, torch.randn(5, 64), options={"kernels": "dense"})
    assert not [row for row in dense.passes if row[0] == "fuse_mlp"]
