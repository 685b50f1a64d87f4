import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import padst_compiler as padst
from padst_compiler.config import SparseConfig
from padst_compiler.convert import to_dense
from padst_compiler.layers import SparseLayer, sparse_layers

SPECS = ["block:8", "nm:8", "diagonal", "fan_in", "unstructured"]
STATES = ["none", "random", "learned"]
Specs = pytest.mark.parametrize("spec", SPECS)
States = pytest.mark.parametrize("state", STATES)
Sides = pytest.mark.parametrize("side", ["input", "output"])
X = torch.randn(4, 32, generator=torch.Generator().manual_seed(9))


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 48), nn.LayerNorm(48), nn.Linear(48, 32, bias=False))


def sparse(spec: str = "block:8", state: str = "random", side: str = "input") -> nn.Sequential:
    config = SparseConfig(spec, 0.5, state, side, force_permutation=state == "learned")
    model = dense()
    padst.sparsify(model, {"0": config, "2": config})
    assert list(sparse_layers(model)) == ["0", "2"]
    return model


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# -- the copy --------------------------------------------------------------------------------------


@Sides
@States
@Specs
def test_the_outputs_are_the_same(spec: str, state: str, side: str) -> None:
    model = sparse(spec, state, side)
    plain = to_dense(model)
    torch.testing.assert_close(plain(X), model(X), rtol=1e-5, atol=1e-5)
    for name, layer in sparse_layers(model).items():
        assert torch.equal(plain.get_parameter(f"{name}.weight"), layer.weight)


@Sides
@States
@Specs
def test_nothing_of_the_library_is_left(spec: str, state: str, side: str) -> None:
    original, plain = dense(), to_dense(sparse(spec, state, side))
    assert [type(m) for m in plain.modules()] == [type(m) for m in original.modules()]
    assert repr(plain) == repr(original)
    assert list(plain.state_dict()) == list(original.state_dict())
    wanted = [(name, p.shape) for name, p in original.named_parameters()]
    assert [(name, p.shape) for name, p in plain.named_parameters()] == wanted
    for name, module in original.named_modules():
        assert vars(plain.get_submodule(name)).keys() == vars(module).keys()
    original.load_state_dict(plain.state_dict())
    assert torch.equal(original(X), plain(X))


@States
def test_the_original_is_untouched_and_shares_no_memory(state: str) -> None:
    model = sparse(state=state)
    before, y = snapshot(model), model(X)
    parameters = [id(p) for p in model.parameters()]
    plain = to_dense(model)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.zero_()
    assert all(isinstance(layer, SparseLayer) for layer in (model[0], model[2]))
    assert [id(p) for p in model.parameters()] == parameters
    assert torch.equal(model(X), y)
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@States
def test_it_trains_like_any_dense_model(state: str) -> None:
    plain = to_dense(sparse(state=state))
    plain(X).square().sum().backward()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    before = plain.get_parameter("0.weight").detach().clone()
    optimizer.step()
    assert all(p.is_leaf and p.grad is not None for p in plain.parameters())
    assert not torch.equal(plain.get_parameter("0.weight"), before)


def test_the_zeros_stay_zeros_unless_the_permutation_is_soft() -> None:
    for state in ("none", "random"):
        weight = to_dense(sparse(state=state)).get_parameter("0.weight")
        assert float((weight == 0).float().mean()) == 0.5
    soft = sparse(state="learned")
    assert not (to_dense(soft).get_parameter("0.weight") == 0).any()
    padst.harden(soft)
    assert float((to_dense(soft).get_parameter("0.weight") == 0).float().mean()) == 0.5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
@States
def test_the_dtype_is_kept(state: str, dtype: torch.dtype) -> None:
    plain = to_dense(sparse(state=state).to(dtype))
    assert {p.dtype for p in plain.parameters()} == {dtype}
    assert plain(X.to(dtype)).dtype is dtype


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("trainable", [True, False])
def test_mode_and_requires_grad_are_kept(trainable: bool, training: bool) -> None:
    model = sparse().train(training)
    model[0].requires_grad_(trainable)
    plain = to_dense(model)
    assert plain.get_parameter("0.weight").requires_grad is trainable
    assert plain.get_parameter("2.weight").requires_grad
    assert all(m.training is training for m in plain.modules())


def test_hooks_and_attributes_stay() -> None:
    model = sparse()
    model[0].register_forward_hook(lambda _m, _x, y: y + 1)
    model[0].note = "kept"  # type: ignore[assignment]
    plain = to_dense(model)
    assert plain.get_submodule("0").note == "kept"
    torch.testing.assert_close(plain(X), model(X), rtol=1e-5, atol=1e-5)


# -- where the layers are --------------------------------------------------------------------------


@States
def test_the_root_may_be_a_sparse_layer(state: str) -> None:
    config = SparseConfig("block:8", 0.5, state)
    model = padst.sparsify(nn.Linear(32, 48), config)
    plain = to_dense(model)
    assert type(plain) is nn.Linear and isinstance(model, SparseLayer)
    assert list(plain.state_dict()) == ["weight", "bias"]
    torch.testing.assert_close(plain(X), model(X), rtol=1e-5, atol=1e-5)


def test_a_model_without_sparse_layers_is_copied() -> None:
    model = dense()
    plain = to_dense(model)
    assert plain is not model and torch.equal(plain(X), model(X))


def test_a_module_used_twice_stays_one_module() -> None:
    shared = nn.Linear(32, 32)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    padst.sparsify(model, {"0": SparseConfig("block:8", 0.5, "random")})
    plain = to_dense(model)
    assert isinstance(plain, nn.Sequential) and plain[0] is plain[2]
    assert type(plain[0]) is nn.Linear
    assert len(list(plain.parameters())) == 2
    torch.testing.assert_close(plain(X), model(X), rtol=1e-5, atol=1e-5)


def test_dense_weights_that_are_tied_stay_tied() -> None:
    model = nn.ModuleDict(
        {"embed": nn.Embedding(40, 32), "fc": nn.Linear(32, 32), "head": nn.Linear(32, 40)}
    )
    model["head"].weight = model["embed"].weight
    padst.sparsify(model, {"fc": SparseConfig("block:8", 0.5, "random")})
    plain = to_dense(model)
    assert plain.get_parameter("head.weight") is plain.get_parameter("embed.weight")
    assert plain.get_parameter("head.weight") is not model.get_parameter("head.weight")


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    build: Callable[[int, int], nn.Module] = Conv1D
    return build(48, 32)


KINDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (conv1d, (2, 3, 32)),
    "pointwise 1d": (lambda: nn.Conv1d(32, 48, 1), (2, 32, 5)),
    "pointwise 2d, stride": (lambda: nn.Conv2d(32, 48, 1, stride=2), (2, 32, 5, 6)),
}


@Sides
@States
@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_layer(kind: str, state: str, side: str) -> None:
    build, size = KINDS[kind]
    original, model = nn.Sequential(build()), nn.Sequential(build())
    padst.sparsify(model, {"0": SparseConfig("nm:8", 0.5, state, side)})
    plain, x = to_dense(model), torch.randn(size)
    assert [type(m) for m in plain.modules()] == [type(m) for m in original.modules()]
    assert repr(plain) == repr(original)
    assert list(plain.state_dict()) == list(original.state_dict())
    torch.testing.assert_close(plain(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_dense_copy_can_become_sparse_again() -> None:
    plain = to_dense(sparse())
    again = padst.sparsify(plain, structure="block:8", sparsity=0.75)
    assert list(sparse_layers(again)) == ["0", "2"]
    assert to_dense(again).get_parameter("0.weight").shape == (48, 32)


def test_an_open_run_is_not_part_of_the_copy() -> None:
    model = sparse(state="learned")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = padst.DynamicSparsity(model, optimizer, total_steps=10)
    plain = to_dense(model)
    assert repr(plain) == repr(dense())
    torch.testing.assert_close(plain(X), copy.deepcopy(model)(X), rtol=1e-5, atol=1e-5)
    assert training is not None
