import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from padst_compiler.index_map import IndexMap
from padst_compiler.layers import (
    SparseConv1D,
    SparseLayer,
    SparseLinear,
    SparsePointwiseConv,
    sparse_layers,
)
from padst_compiler.permutation import FixedPermutation, Permutation
from padst_compiler.recorder import Recorder
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured

INPUTS, OUTPUTS = 16, 24
STRUCTURES: list[Structure] = [Block(4), NM(4), Diagonal(), FanIn(), Unstructured()]
Structures = pytest.mark.parametrize("structure", STRUCTURES, ids=lambda s: str(s.name))
Sides = pytest.mark.parametrize("side", ["input", "output"])
States = pytest.mark.parametrize("state", ["none", "random", "learned"])


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    build: Callable[[int, int], nn.Module] = Conv1D
    return build(OUTPUTS, INPUTS)


# -- each kind: its dense module, an input, and the dense product with a weight of its own shape --

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]
KINDS: dict[str, tuple[type[SparseLayer], Callable[[], nn.Module], tuple[int, ...], Product]] = {
    "linear": (SparseLinear, lambda: nn.Linear(INPUTS, OUTPUTS), (2, 3, INPUTS), F.linear),
    "conv1d": (
        SparseConv1D,
        conv1d,
        (2, 3, INPUTS),
        lambda x, w, b: x @ w + (0.0 if b is None else b),
    ),
    "pointwise 1d": (
        SparsePointwiseConv,
        lambda: nn.Conv1d(INPUTS, OUTPUTS, 1),
        (2, INPUTS, 5),
        F.conv1d,
    ),
    "pointwise 1d, one sample": (
        SparsePointwiseConv,
        lambda: nn.Conv1d(INPUTS, OUTPUTS, 1),
        (INPUTS, 5),
        F.conv1d,
    ),
    "pointwise 2d": (
        SparsePointwiseConv,
        lambda: nn.Conv2d(INPUTS, OUTPUTS, 1),
        (2, INPUTS, 5, 3),
        F.conv2d,
    ),
    "pointwise 2d, stride": (
        SparsePointwiseConv,
        lambda: nn.Conv2d(INPUTS, OUTPUTS, 1, stride=(2, 3)),
        (2, INPUTS, 5, 7),
        lambda x, w, b: F.conv2d(x, w, b, stride=(2, 3)),
    ),
    "pointwise 2d, stride, one sample": (
        SparsePointwiseConv,
        lambda: nn.Conv2d(INPUTS, OUTPUTS, 1, stride=2),
        (INPUTS, 6, 5),
        lambda x, w, b: F.conv2d(x, w, b, stride=2),
    ),
    "pointwise 3d": (
        SparsePointwiseConv,
        lambda: nn.Conv3d(INPUTS, OUTPUTS, 1),
        (2, INPUTS, 2, 3, 2),
        F.conv3d,
    ),
}
Kinds = pytest.mark.parametrize("kind", KINDS)


def permutation_of(state: str, side: str) -> Permutation | None:
    size = INPUTS if side == "input" else OUTPUTS
    generator = torch.Generator().manual_seed(1)
    if state == "random":
        return FixedPermutation(IndexMap.of(torch.randperm(size, generator=generator)))
    return SinkhornPermutation(size, generator) if state == "learned" else None


def adopt(
    module: nn.Module,
    structure: Structure = STRUCTURES[0],
    state: str = "random",
    side: str = "input",
    kind: type[SparseLayer] = SparseLinear,
    values: Tensor | None = None,
) -> SparseLayer:
    matrix = kind.matrix_of(module)
    indices = structure.select(matrix, 2)
    return kind.adopt(module, structure, indices, permutation_of(state, side), side, values)


def linear(bias: bool = True) -> nn.Linear:
    return nn.Linear(INPUTS, OUTPUTS, bias=bias)


def made(kind: str, state: str = "random", side: str = "input") -> SparseLayer:
    sparse, build, _, _ = KINDS[kind]
    layer = adopt(build(), NM(4), state, side, sparse)
    assert layer.bias is not None
    nn.init.normal_(layer.bias)  # transformers starts at zero, which would hide a lost bias
    return layer


# -- what a layer computes ------------------------------------------------------------------------


@Sides
@States
@Kinds
def test_the_output_is_the_dense_product_with_weight(kind: str, state: str, side: str) -> None:
    layer, (_, build, size, product) = made(kind, state, side), KINDS[kind]
    x = torch.randn(size, requires_grad=True)
    weight = layer.weight
    assert weight.shape == build().get_parameter("weight").shape
    y, wanted = layer(x), product(x, weight, layer.bias)
    assert y.shape == wanted.shape
    torch.testing.assert_close(y, wanted, rtol=1e-5, atol=1e-5)
    upstream, trained = torch.randn_like(y), [x, *layer.parameters()]
    found = torch.autograd.grad(y, trained, upstream)
    through_weight = torch.autograd.grad(wanted, trained, upstream)
    torch.testing.assert_close(found, through_weight, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "conv1d"])  # it always has one
def test_without_a_bias(kind: str) -> None:
    sparse, build, size, product = KINDS[kind]
    module = build()
    module.register_parameter("bias", None)
    layer = adopt(module, NM(4), "random", "output", sparse)
    x = torch.randn(size)
    assert layer.bias is None and [n for n, _ in layer.named_parameters()] == ["values"]
    torch.testing.assert_close(layer(x), product(x, layer.weight, None), rtol=1e-5, atol=1e-5)


def test_the_permutation_acts_on_the_named_side() -> None:
    x, order = torch.randn(3, INPUTS), permutation_of("random", "input")
    assert isinstance(order, FixedPermutation)
    inside = adopt(linear(), side="input")
    structured = inside.structure.unpack(inside.values, inside.indices, inside.shape)
    wanted = F.linear(x[:, order.perm], structured, inside.bias)  # y = S (P x) + b
    torch.testing.assert_close(inside(x), wanted)
    outside = adopt(linear(), side="output")
    structured = outside.structure.unpack(outside.values, outside.indices, outside.shape)
    order = permutation_of("random", "output")
    assert isinstance(order, FixedPermutation)
    assert outside.bias is not None
    wanted = F.linear(x, structured)[:, order.perm] + outside.bias  # y = P (S x) + b
    torch.testing.assert_close(outside(x), wanted)


@Structures
def test_start_values_keep_the_variance_of_the_outputs(structure: Structure) -> None:
    dense = nn.Linear(256, 192, bias=False)
    nn.init.normal_(dense.weight)
    if isinstance(structure, Block):
        structure = Block(32)
    matrix = dense.weight.detach().clone()
    # A mask that does not look at the weights, as sparsify draws it.
    indices = structure.select(torch.randn_like(matrix), structure.kept(Shape(192, 256), 0.75))
    layer = SparseLinear.adopt(dense, structure, indices, None, "input")
    kept = layer.values.numel() / matrix.numel()
    x = torch.randn(500, 256)
    assert torch.equal(layer.values, structure.pack(matrix, indices) / kept**0.5)
    assert float(layer(x).detach().std() / F.linear(x, matrix).std()) == pytest.approx(
        1.0, abs=0.05
    )


def test_given_values_are_taken_as_they_are_and_copied() -> None:
    structure, module = NM(4), linear()
    values = torch.randn(OUTPUTS, INPUTS // 4, 2)
    layer = adopt(module, structure, values=values)
    assert torch.equal(layer.values, values)
    values.zero_()
    assert float(layer.values.abs().max()) > 0


# -- what a layer looks like ----------------------------------------------------------------------


@Kinds
def test_names_and_the_order_of_parameters(kind: str) -> None:
    _, build, _, _ = KINDS[kind]
    before = [name for name, _ in build().named_parameters()]
    layer = made(kind, "learned")
    own = [name for name, _ in layer.named_parameters(recurse=False)]
    assert own == ["values" if name == "weight" else name for name in before]
    assert [name for name, _ in layer.named_parameters()] == [*own, "permutation.logits"]
    assert set(layer.state_dict()) == {
        "values",
        "bias",
        "indices",
        "permutation.logits",
        "permutation.temperature",
    }
    fixed = made(kind, "random")
    assert set(fixed.state_dict()) == {"values", "bias", "indices", "permutation.perm"}
    assert [n for n, _ in fixed.named_buffers()] == ["indices", "permutation.perm"]


def test_the_bias_stays_the_same_parameter_and_the_weight_is_gone() -> None:
    module = linear()
    bias, weight = module.bias, module.weight
    layer = adopt(module)
    assert layer is module  # type: ignore[comparison-overlap]
    assert layer.bias is bias
    assert "weight" not in layer._parameters
    assert all(p is not weight for p in layer.parameters())


def test_it_stays_an_instance_of_linear_with_its_attributes() -> None:
    module = linear()
    module.note = "kept"  # type: ignore[assignment]
    layer = adopt(module)
    assert isinstance(layer, nn.Linear) and isinstance(layer, SparseLayer)
    assert (layer.in_features, layer.out_features) == (INPUTS, OUTPUTS)
    assert layer.note == "kept"
    assert layer.dense_type is nn.Linear


def test_repr_names_what_it_is() -> None:
    text = repr(adopt(linear(), state="learned"))
    for part in ("SparseLinear", "16 -> 24", "Block(size=4)", "sparsity=0.5000", "side=input"):
        assert part in text
    assert "bias=True" in text and "16, soft" in text


def test_sparsity_is_the_share_of_zeros_in_the_weight() -> None:
    layer = adopt(linear())
    zeros = (layer.weight == 0).double().mean().item()
    assert layer.sparsity == pytest.approx(zeros) == pytest.approx(0.5)


def test_sparse_layers_lists_each_once_by_name() -> None:
    shared = adopt(linear())
    model = nn.ModuleDict({"a": shared, "b": shared, "c": nn.Sequential(adopt(linear()))})
    assert list(sparse_layers(model)) == ["a", "c.0"]
    assert list(sparse_layers(shared)) == [""]
    assert sparse_layers(linear()) == {}


@pytest.mark.parametrize("trainable", [True, False])
def test_requires_grad_is_kept(trainable: bool) -> None:
    module = linear()
    module.weight.requires_grad_(trainable)
    layer = adopt(module)
    assert layer.values.requires_grad is trainable
    assert layer.bias is not None and layer.bias.requires_grad
    assert layer(torch.randn(2, INPUTS)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_the_dtype_is_kept(dtype: torch.dtype) -> None:
    layer = adopt(linear().to(dtype))
    assert layer.values.dtype is dtype and layer.indices.dtype is torch.int32
    assert layer(torch.randn(2, INPUTS, dtype=dtype)).dtype is dtype


@pytest.mark.parametrize("training", [True, False])
def test_the_mode_is_kept(training: bool) -> None:
    assert adopt(linear().train(training)).training is training


def test_moving_to_another_dtype_leaves_maps_and_indices_alone() -> None:
    layer = adopt(linear()).to(torch.bfloat16)
    assert layer.values.dtype is torch.bfloat16
    assert layer.indices.dtype is torch.int32
    assert layer.permutation is not None
    assert layer.permutation.get_buffer("perm").dtype is torch.int64


# -- hooks, copies, pickles -----------------------------------------------------------------------


def test_hooks_survive() -> None:
    module, seen = linear(), list[str]()
    module.register_forward_pre_hook(lambda *_: seen.append("pre"))
    module.register_forward_hook(lambda *_: seen.append("post"))
    module.register_full_backward_hook(lambda *_: seen.append("back"))
    module._register_state_dict_hook(lambda *_: seen.append("state"))
    layer = adopt(module)
    layer(torch.randn(2, INPUTS, requires_grad=True)).sum().backward()
    layer.state_dict()
    assert seen == ["pre", "post", "back", "state"]


def test_a_hook_that_changes_the_output_still_does() -> None:
    module = linear()
    module.register_forward_hook(lambda _m, _x, y: 2 * y)
    layer, x = adopt(module), torch.randn(2, INPUTS)
    torch.testing.assert_close(layer(x), 2 * F.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("way", ["deepcopy", "pickle"])
@States
@Kinds
def test_copies_are_independent_and_equal(kind: str, state: str, way: str) -> None:
    layer, (_, _, size, _) = made(kind, state), KINDS[kind]
    twin = copy.deepcopy(layer) if way == "deepcopy" else pickle.loads(pickle.dumps(layer))
    x = torch.randn(size)
    assert type(twin) is type(layer) and twin.structure == layer.structure
    assert twin.dense_type is layer.dense_type and repr(twin) == repr(layer)
    assert torch.equal(twin(x), layer(x))
    ours = {t.data_ptr() for t in layer.state_dict().values()}
    assert not ours & {t.data_ptr() for t in twin.state_dict().values()}
    before = layer(x)
    with torch.no_grad():
        twin.values.zero_()
    assert torch.equal(layer(x), before)


def test_torch_save_keeps_a_whole_model(tmp_path: Any) -> None:
    model = nn.Sequential(adopt(linear()), nn.ReLU())
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    x = torch.randn(2, INPUTS)
    assert torch.equal(again(x), model(x))


# -- weight: read, never written ------------------------------------------------------------------


@Kinds
def test_assigning_the_weight_fails_loudly(kind: str) -> None:
    layer = made(kind)
    before = layer.values.detach().clone()
    for new in (nn.Parameter(torch.zeros_like(layer.weight)), torch.zeros_like(layer.weight)):
        with pytest.raises((AttributeError, KeyError, TypeError)):
            layer.weight = new  # type: ignore[misc]
    assert torch.equal(layer.values, before)
    assert "weight" not in layer._parameters and "weight" not in vars(layer)


def test_the_weight_is_differentiable_in_what_is_trained() -> None:
    layer = adopt(linear(), state="learned")
    layer.weight.square().sum().backward()
    for name in ("values", "permutation.logits"):
        gradient = layer.get_parameter(name).grad
        assert gradient is not None and float(gradient.abs().max()) > 0


# -- autocast -------------------------------------------------------------------------------------


@Sides
@States
@Kinds
def test_autocast_computes_in_bfloat16_and_trains_in_float32(
    kind: str, state: str, side: str
) -> None:
    layer, (_, _, size, product) = made(kind, state, side), KINDS[kind]
    x = torch.randn(size)
    wanted = product(x, layer.weight, layer.bias).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    assert float((y.float() - wanted).abs().max()) <= 2e-2 * float(wanted.abs().max())
    y.float().square().sum().backward()
    for parameter in layer.parameters():
        assert parameter.grad is not None and parameter.grad.dtype is torch.float32
        assert bool(parameter.grad.isfinite().all())


# -- dense checkpoints ----------------------------------------------------------------------------


@Sides
@pytest.mark.parametrize("state", ["none", "random"])
@Kinds
def test_a_dense_checkpoint_loads_under_the_mask(kind: str, state: str, side: str) -> None:
    """Which is: the effective weight becomes the dense weight where the permuted mask is set."""
    layer, (_, build, _, _) = made(kind, state, side), KINDS[kind]
    dense = {name: torch.randn_like(t) for name, t in build().state_dict().items()}
    given = dict(dense)
    with torch.no_grad():
        layer.values.fill_(1.0)
    mask = layer.weight != 0
    indices = layer.indices.clone()
    values, bias = layer.values, layer.bias
    found = layer.load_state_dict(dense)
    assert not found.missing_keys and not found.unexpected_keys
    assert layer.values is values and layer.bias is bias
    assert torch.equal(layer.weight, dense["weight"] * mask)
    assert bias is not None and torch.equal(bias, dense["bias"])
    assert torch.equal(layer.indices, indices)
    assert dense.keys() == given.keys() and all(dense[k] is given[k] for k in given)


@Structures
@Sides
def test_a_dense_checkpoint_loads_for_every_structure(structure: Structure, side: str) -> None:
    layer = adopt(linear(), structure, "random", side)
    with torch.no_grad():
        layer.values.fill_(1.0)
    mask, dense = layer.weight != 0, linear()
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.weight, dense.weight * mask)


def test_a_dense_checkpoint_of_a_whole_model_loads_strictly() -> None:
    dense = nn.Sequential(linear(), nn.LayerNorm(OUTPUTS), nn.Linear(OUTPUTS, INPUTS))
    model = copy.deepcopy(dense)
    adopt(model[0], state="learned")
    for parameter in dense.parameters():
        nn.init.normal_(parameter)
    logits = model.get_parameter("0.permutation.logits").detach().clone()
    model.load_state_dict(dense.state_dict())
    layer = model[0]
    assert isinstance(layer, SparseLayer)
    packed = layer.structure.pack(dense.get_parameter("0.weight"), layer.indices)
    assert torch.equal(layer.values, packed)
    assert torch.equal(model.get_parameter("0.permutation.logits"), logits)
    assert torch.equal(model.get_parameter("2.weight"), dense.get_parameter("2.weight"))


def test_its_own_state_loads_with_topology_and_permutation() -> None:
    first, second, x = adopt(linear()), adopt(linear()), torch.randn(2, INPUTS)
    assert not torch.equal(first.indices, second.indices)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.indices, second.indices)
    assert torch.equal(first(x), second(x))


def test_a_dense_weight_of_another_shape_is_refused() -> None:
    layer = adopt(linear())
    before = layer.values.detach().clone()
    wrong = {"weight": torch.randn(OUTPUTS, INPUTS + 4), "bias": torch.randn(OUTPUTS)}
    with pytest.raises((RuntimeError, ValueError)):
        layer.load_state_dict(wrong)
    assert torch.equal(layer.values, before)


def test_a_transposed_dense_weight_is_refused_and_not_reshaped() -> None:
    # As many numbers in another shape: torch's own layers refuse it by name.
    layer = adopt(linear())
    before = layer.values.detach().clone()
    wrong = {"weight": torch.randn(INPUTS, OUTPUTS), "bias": torch.randn(OUTPUTS)}
    with pytest.raises((RuntimeError, ValueError)):
        layer.load_state_dict(wrong)
    assert torch.equal(layer.values, before)


# -- soft, then hard ------------------------------------------------------------------------------


@Sides
def test_hardening_replaces_the_permutation_and_nothing_else(side: str) -> None:
    layer = adopt(linear(), state="learned", side=side)
    soft = layer.soft_permutation
    assert soft is not None
    wanted, values, indices = soft.harden(), layer.values, layer.indices
    layer.harden()
    assert layer.soft_permutation is None
    assert isinstance(layer.permutation, FixedPermutation)
    assert torch.equal(layer.permutation.perm, wanted.perm)
    assert layer.values is values and layer.indices is indices
    again = layer.permutation
    layer.harden()
    assert layer.permutation is again
    assert [name for name, _ in layer.named_parameters()] == ["values", "bias"]


@Sides
def test_hardening_a_nearly_hard_permutation_changes_the_output_little(side: str) -> None:
    layer, x = adopt(linear(), state="learned", side=side), torch.randn(50, INPUTS)
    soft = layer.soft_permutation
    assert isinstance(soft, SinkhornPermutation)
    with torch.no_grad():
        soft.logits.copy_(torch.eye(soft.size)[torch.randperm(soft.size)] * 20 * soft.temperature)
    before = layer(x)
    layer.harden()
    torch.testing.assert_close(layer(x), before, rtol=1e-4, atol=1e-4)


# -- the recorder ---------------------------------------------------------------------------------


def test_the_recorder_sees_what_the_structure_sees_and_only_with_gradients() -> None:
    class Listener(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.seen: list[tuple[Tensor, Tensor]] = []

        def forward(self, y: Tensor, x: Tensor) -> Tensor:
            self.seen.append((y.detach(), x.detach()))
            return y

    layer, x = adopt(linear(), state="random", side="input"), torch.randn(2, INPUTS)
    layer.recorder = Listener()
    with torch.no_grad():
        layer(x)
    assert layer.recorder.seen == []
    layer(x)
    ((_, seen),) = layer.recorder.seen
    assert layer.permutation is not None and torch.equal(seen, layer.permutation(x))


# -- what must not pass in silence ----------------------------------------------------------------


@pytest.mark.parametrize("width", [INPUTS - 4, INPUTS + 4])
@Structures
def test_an_input_of_another_width_is_refused(structure: Structure, width: int) -> None:
    layer = adopt(linear(), structure, "none")
    with pytest.raises((RuntimeError, ValueError)):  # as nn.Linear does
        layer(torch.randn(2, width))


def test_a_dense_checkpoint_loads_while_gradients_are_recorded() -> None:
    layer, dense = adopt(linear(), state="none"), linear()
    layer.recorder = Recorder(layer)
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.values, layer.structure.pack(dense.weight, layer.indices))


@Sides
def test_a_dense_checkpoint_loads_twice_as_once(side: str) -> None:
    layer, dense = adopt(linear(), state="random", side=side), linear()
    layer.load_state_dict(dense.state_dict())
    once = layer.values.detach().clone()
    layer.load_state_dict(dense.state_dict())
    assert torch.equal(layer.values, once)


@pytest.mark.parametrize("missing", ["values", "bias", "indices", "permutation.perm"])
def test_a_state_with_a_hole_is_refused(missing: str) -> None:
    layer = adopt(linear())
    state = layer.state_dict()
    del state[missing]
    with pytest.raises(RuntimeError, match=f'Missing key.*"{missing}"'):
        layer.load_state_dict(state)


def test_a_frozen_bias_stays_frozen() -> None:
    module = linear()
    module.bias.requires_grad_(False)
    layer = adopt(module)
    assert layer.bias is not None and not layer.bias.requires_grad
    assert layer.values.requires_grad


def test_an_input_on_another_device_is_refused() -> None:
    layer = SparseLinear.adopt(
        nn.Linear(8, 4), FanIn(), torch.zeros(4, 1, dtype=torch.int32), None, "input"
    )
    with pytest.raises(ValueError, match=r"Expected input on cpu\. Got meta\. Move model"):
        layer(torch.ones(2, 8, device="meta"))
