import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from padst_compiler.densify import to_dense
from padst_compiler.index_map import IndexMap
from padst_compiler.layers import SparseConv1D, SparseLayer, SparseLinear, SparsePointwiseConv
from padst_compiler.layers import sparse_layers as layers_of
from padst_compiler.permutation import FixedPermutation, Permutation
from padst_compiler.recorder import Recorder
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured

IN, OUT = 16, 24
STRUCTURES: list[Structure] = [Block(4), NM(4), Diagonal(), FanIn(), Unstructured()]
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


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# -- to_dense --------------------------------------------------------------------------------------


@Sides
@States
@Kinds
def test_every_kind_becomes_its_own_class_with_the_same_outputs(
    kind: str, state: str, side: str
) -> None:
    make, sparse, size = KINDS[kind]
    dense = make()
    model = nn.Sequential(copy.deepcopy(dense))
    layer, x = adopt(model[0], None, state, side, sparse), torch.randn(size)
    before = bits(model)
    plain = to_dense(model)
    found = plain.get_submodule("0")
    assert type(found) is type(dense) and repr(found) == repr(dense)
    assert set(vars(found)) == set(vars(dense))
    for table in ("_parameters", "_buffers", "_modules"):
        assert list(getattr(found, table)) == list(getattr(dense, table))
    assert found.get_parameter("weight").is_contiguous()
    assert torch.equal(found.get_parameter("weight"), layer.weight)
    torch.testing.assert_close(plain(x), model(x))
    assert model[0] is layer and type(layer) is sparse
    after = model.state_dict()
    assert list(after) == list(before) and all(torch.equal(t, before[n]) for n, t in after.items())


@States
@Structures
def test_every_structure_and_permutation(structure: Structure, state: str) -> None:
    model, x = nn.Sequential(nn.Linear(IN, OUT), nn.ReLU(), nn.Linear(OUT, IN)), torch.randn(5, IN)
    keys, names = list(model.state_dict()), [name for name, _ in model.named_parameters()]
    adopt(model[0], structure, state, "input")
    last = adopt(model[2], structure, state, "output")
    plain = to_dense(model)
    assert not layers_of(plain)
    assert list(plain.state_dict()) == keys
    assert [name for name, _ in plain.named_parameters()] == names
    torch.testing.assert_close(plain(x), model(x))
    if state != "soft":  # hard ones leave the zeros
        assert int((plain.get_parameter("2.weight") != 0).sum()) == last.values.numel()
    again = copy.deepcopy(model)
    again.load_state_dict(model.state_dict())
    for name, layer in layers_of(again).items():  # and packing it again gives the same values
        if state != "soft":
            dense = plain.get_submodule(name).state_dict()
            layer.load_state_dict(dense)
            assert torch.equal(layer.values, layers_of(model)[name].values)


def test_the_root_may_be_a_sparse_layer() -> None:
    layer, x = adopt(nn.Linear(IN, OUT), state="fixed"), torch.randn(2, IN)
    plain = to_dense(layer)
    assert type(plain) is nn.Linear
    torch.testing.assert_close(plain(x), layer(x))
    assert isinstance(layer, SparseLinear)


def test_a_model_without_sparse_layers_is_copied() -> None:
    model = nn.Sequential(nn.Linear(IN, OUT))
    plain = to_dense(model)
    assert plain is not model
    assert torch.equal(plain.get_parameter("0.weight"), model.get_parameter("0.weight"))


def test_nothing_is_shared_with_the_original() -> None:
    model = nn.Sequential(adopt(nn.Linear(IN, OUT), state="soft"))
    plain, before = to_dense(model), bits(model)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())


@pytest.mark.parametrize("frozen", ["values", "bias"])
def test_dtype_mode_and_what_is_frozen_are_kept(frozen: str) -> None:
    layer = adopt(nn.Linear(IN, OUT), state="soft").to(torch.bfloat16).eval()
    layer.get_parameter(frozen).requires_grad_(False)
    plain, x = to_dense(layer), torch.randn(2, IN, dtype=torch.bfloat16)
    assert not plain.training
    assert all(p.dtype is torch.bfloat16 for p in plain.parameters())
    assert [p.requires_grad for p in plain.parameters()] == [frozen != "values", frozen != "bias"]
    assert (plain(x) - layer(x)).abs().max() <= 2e-2 * layer(x).abs().max()


def test_shared_modules_hooks_and_attributes_stay() -> None:
    shared, seen = nn.Linear(IN, IN), list[str]()
    shared.register_forward_hook(lambda *_: seen.append("called"))
    shared.note = "mine"  # type: ignore[assignment]
    model = nn.ModuleDict({"a": shared, "b": shared})
    adopt(shared, state="fixed")
    plain = to_dense(model)
    found = plain.get_submodule("a")
    assert found is plain.get_submodule("b") and found is not shared
    assert list(plain.state_dict()) == ["a.weight", "a.bias", "b.weight", "b.bias"]
    found(torch.randn(1, IN))
    assert seen == ["called"] and found.note == "mine"


def test_tied_weights_elsewhere_stay_tied() -> None:
    model = nn.ModuleDict(
        {"e": nn.Embedding(8, IN), "f": nn.Linear(IN, OUT), "h": nn.Linear(IN, 8)}
    )
    model["h"].weight = model["e"].weight
    adopt(model["f"])
    plain = to_dense(model)
    assert plain.get_parameter("h.weight") is plain.get_parameter("e.weight")


def test_a_layer_in_training_is_converted_without_its_recorder() -> None:
    layer = adopt(nn.Linear(IN, OUT), state="fixed")
    layer.recorder = recorder = Recorder(layer)
    recorder.arm()
    layer(torch.randn(3, IN)).sum().backward()
    plain = to_dense(layer)
    assert not list(plain.children()) and all(p.grad is None for p in plain.parameters())
    assert layer.recorder is recorder and recorder.has_seen
    plain(torch.randn(3, IN)).sum().backward()  # and it trains as a dense layer


def test_the_dense_weight_can_be_sparse_again() -> None:
    layer, x = adopt(nn.Linear(IN, OUT), state="none"), torch.randn(3, IN)
    values = layer.structure.pack(layer.weight.detach(), layer.indices)
    again = SparseLinear.adopt(
        to_dense(layer), layer.structure, layer.indices, None, "input", values
    )
    assert torch.equal(again(x), layer(x))


# -- descriptions ----------------------------------------------------------------------------------
