import json
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from padst_compiler.config import SparseConfig
from padst_compiler.convert import from_description, to_description
from padst_compiler.index_map import IndexMap
from padst_compiler.layers import SparseConv1D, SparseLayer, SparseLinear, SparsePointwiseConv
from padst_compiler.permutation import FixedPermutation, Permutation
from padst_compiler.recorder import Recorder
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation
from padst_compiler.sites import discover
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured

IN, OUT = 16, 24
STRUCTURES: list[Structure] = [
    Block(4),
    Block(4, 2),
    Block(4, balanced=False),
    NM(4),
    Diagonal(),
    Diagonal(band=2),
    Diagonal(modulus=4),
    FanIn(),
    Unstructured(),
]
Structures = pytest.mark.parametrize("structure", STRUCTURES, ids=str)
States = pytest.mark.parametrize("state", ["none", "fixed", "soft"])
Sides = pytest.mark.parametrize("side", ["input", "output"])


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    make: Callable[[int, int], nn.Module] = Conv1D
    return make(OUT, IN)


# (dense module, its sparse class, the size of an input)
Kind = tuple[Callable[[], nn.Module], type[SparseLayer], tuple[int, ...]]
KINDS: dict[str, Kind] = {
    "linear": (lambda: nn.Linear(IN, OUT), SparseLinear, (3, IN)),
    "without bias": (lambda: nn.Linear(IN, OUT, bias=False), SparseLinear, (3, IN)),
    "hugging face": (conv1d, SparseConv1D, (2, 3, IN)),
    "conv1d": (lambda: nn.Conv1d(IN, OUT, 1), SparsePointwiseConv, (2, IN, 5)),
    "conv2d": (lambda: nn.Conv2d(IN, OUT, 1, 2), SparsePointwiseConv, (2, IN, 5, 4)),
    "conv3d": (lambda: nn.Conv3d(IN, OUT, 1), SparsePointwiseConv, (2, IN, 2, 3, 2)),
}
Kinds = pytest.mark.parametrize("kind", KINDS)


def permutation_of(state: str, size: int) -> Permutation | None:
    if state == "fixed":
        return FixedPermutation(IndexMap.of(torch.randperm(size)))
    return SinkhornPermutation(size, torch.Generator()) if state == "soft" else None


def adopt(
    module: nn.Module,
    structure: Structure | None = None,
    state: str = "none",
    side: str = "input",
    kind: type[SparseLayer] = SparseLinear,
) -> SparseLayer:
    structure = structure or Block(4)
    matrix = kind.matrix_of(module)
    shape = Shape(*matrix.shape)
    indices = structure.select(torch.randn(matrix.shape), structure.kept(shape, 0.5))
    size = shape.in_features if side == "input" else shape.out_features
    return kind.adopt(module, structure, indices, permutation_of(state, size), side)


# -- to_dense --------------------------------------------------------------------------------------


@Sides
@States
@Structures
def test_a_description_makes_a_dense_module_the_same_layer(
    structure: Structure, state: str, side: str
) -> None:
    source = nn.Sequential(nn.Linear(IN, OUT))
    layer = adopt(source[0], structure, state, side)
    layer.config = SparseConfig(structure, 0.5)
    fields = json.loads(json.dumps(to_description(layer, ["0"])))
    target = nn.Sequential(nn.Linear(IN, OUT))
    (site,) = discover(target)
    found = from_description(site, fields, source.state_dict())
    assert found is target[0] and repr(found) == repr(layer)
    assert found.config == layer.config
    assert list(target.state_dict()) == list(source.state_dict())
    target.load_state_dict(source.state_dict())
    x = torch.randn(2, IN)
    assert torch.equal(target(x), source(x))


def test_a_layer_without_a_config_says_so() -> None:
    fields = to_description(adopt(nn.Linear(IN, OUT)), ["a", "b.c"])
    assert (fields["config"], fields["names"]) == (None, ["a", "b.c"])
    assert (fields["dtype"], fields["permutation"]) == ("float32", {"kind": "none"})


@Kinds
def test_each_kind_has_a_word_and_its_axes(kind: str) -> None:
    make, sparse, size = KINDS[kind]
    fields = to_description(adopt(make(), kind=sparse), [""])
    words = {SparseLinear: "linear", SparseConv1D: "conv1d", SparsePointwiseConv: "conv1x1"}
    assert fields["kind"] == words[sparse]
    assert fields["dims"] == (len(size) - 2 if sparse is SparsePointwiseConv else 0)


def refused(module: nn.Module, change: dict[str, Any] | None = None) -> str:
    """Return what is said about ``module`` where a Linear of 24x16 is described."""
    source = nn.Sequential(nn.Linear(IN, OUT))
    fields = to_description(adopt(source[0]), ["0"]) | (change or {})
    site = next(iter(discover(nn.Sequential(module))), None)
    with pytest.raises(ValueError, match=r"^Expected .*\. Got .*\. [A-Z]") as error:
        from_description(site, fields, source.state_dict())
    return str(error.value)


class OwnForward(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_another_module_is_refused() -> None:
    assert "Got none. Build the same architecture." in refused(nn.ReLU())
    assert "Got Linear of 16x24." in refused(nn.Linear(OUT, IN))
    assert "Got Conv1d of 24x16." in refused(nn.Conv1d(IN, OUT, 1))
    assert "OwnForward computes forward in its own way" in refused(OwnForward(IN, OUT))
    weight_norm = nn.utils.parametrizations.weight_norm(nn.Linear(IN, OUT))
    assert "below WeightNorm" in refused(weight_norm)
    orthogonal = nn.utils.parametrizations.orthogonal(nn.Linear(IN, OUT))
    assert "remove_parametrizations" in refused(orthogonal)
    conv = adopt(nn.Conv1d(IN, OUT, 1), kind=SparsePointwiseConv)
    assert "Got SparsePointwiseConv of 24x16." in refused(conv)


def test_a_layer_in_training_takes_no_other_structure() -> None:
    layer = adopt(nn.Linear(IN, OUT), NM(4))
    layer.recorder = Recorder(layer)
    said = refused(layer)
    assert "NM(m=4, n=None) with (24, 4, 2) units" in said and "training.detach()" in said


@pytest.mark.parametrize(
    ("offsets", "said"),
    [
        ([0, 1, 4, 6], "Expected unique indices below 12"),  # no whole band
        ([0, 4, 1, 5], "Expected unique indices below 12"),  # bands that lie across one another
        ([4, 5, 4, 5], "Expected unique indices below 12"),
        ([24, 25, 0, 1], "Expected unique indices below 12"),
        ([0, 1, 2], "Expected int32 indices of Diagonal(band=2)"),
    ],
    ids=str,
)
def test_offsets_must_be_whole_bands(offsets: list[int], said: str) -> None:
    layer = adopt(nn.Linear(IN, OUT), Diagonal(band=2))
    tensors = {"0.indices": torch.tensor([offsets], dtype=torch.int32)}
    tensors["0.values"] = torch.zeros(1, len(offsets), IN)
    (site,) = discover(nn.Sequential(nn.Linear(IN, OUT)))
    with pytest.raises(ValueError, match=re.escape(said)):
        from_description(site, to_description(layer, ["0"]), tensors)
