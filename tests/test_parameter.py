"""Weights that other people's code reads, against code that has the dense weight."""

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

import padst_compiler as padst
from padst_compiler.parameter import SparseParameter, as_matrix, matrix_shape, put_back
from padst_compiler.structures import FanIn


class Raw(nn.Module):
    """Parameters in F.linear, x @ W, addmm, and einsum."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Parameter(torch.randn(32, 16) / 4)
        self.b = nn.Parameter(torch.randn(32, 16) / 4)
        self.c = nn.Parameter(torch.randn(16, 16) / 4)
        self.heads = nn.Parameter(torch.randn(16, 2, 8) / 4)
        self.offset = nn.Parameter(torch.randn(16))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.a).relu() @ self.b
        x = torch.addmm(self.offset, x.flatten(0, -2), self.c).view(x.shape)
        return torch.einsum("bti,ihk->bthk", x, self.heads).flatten(-2)


class Experts(nn.Module):
    """Stacked experts in a batched product, and one taken by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Parameter(torch.randn(3, 16, 32) / 4)
        self.down = nn.Parameter(torch.randn(3, 16, 32) / 4)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, -2).expand(3, -1, -1)
        hidden = torch.bmm(tokens, self.up).relu()
        parts = [F.linear(hidden[at], self.down[at]) for at in range(3)]
        return torch.stack(parts).sum(0).view(x.shape)


class Reused(nn.Module):
    """One weight, twice, under a branch without gradients too; in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(16, 16) / 4, torch.randn(16, 16) / 4])

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            shift = x @ self.weights[0]
        if x.mean() > 100.0:
            x = -x
        for weight in self.weights:
            x = (x @ weight + shift).relu() @ self.weights[0]
        return x


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def normed() -> nn.Module:
    first: Any = parametrizations.weight_norm(nn.Linear(16, 32))
    return nn.Sequential(first, nn.ReLU(), nn.Linear(32, 16))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "raw": Raw,
    "experts": Experts,
    "reused": Reused,
    "attention": attention,
    "normed": normed,
}
X = torch.randn(2, 5, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
each = pytest.mark.parametrize("name", MODELS)


def sparse(name: str, permutation: str = "random", structure: str = "fan_in") -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = MODELS[name]().double()
    config = padst.SparseConfig(structure=structure, sparsity=0.5, permutation=permutation)
    return padst.sparsify(model, config, example_inputs=X, filter_fn=lambda site: not site.obstacle)


def owners(model: nn.Module) -> dict[str, SparseParameter]:
    return {n: m for n, m in model.named_modules() if isinstance(m, SparseParameter)}


@each
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("permutation", ["none", "random", "learned"])
def test_forward_and_gradients_are_those_of_the_dense_weights(
    name: str, mode: str, permutation: str
) -> None:
    model = getattr(sparse(name, permutation), mode)()
    dense = padst.to_dense(model)
    assert owners(model) and not owners(dense)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    result, expected = model(x), dense(y)
    torch.testing.assert_close(result, expected, rtol=0, atol=1e-10)
    result.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad, rtol=0, atol=1e-9)
    weights = dict(dense.named_parameters())
    for path, layer in owners(model).items():
        grad = weights[path.removesuffix("_sparse")].grad
        assert grad is not None
        matrix = layer.weight
        (through,) = torch.autograd.grad(matrix, layer.values, grad)
        assert layer.values.grad is not None
        torch.testing.assert_close(layer.values.grad, through, rtol=0, atol=1e-9)
    with torch.no_grad():
        torch.testing.assert_close(model(X), expected.detach(), rtol=0, atol=1e-10)
    with torch.inference_mode():
        torch.testing.assert_close(model(X), expected.detach(), rtol=0, atol=1e-10)


@each
def test_zeros_are_where_the_structure_says(name: str) -> None:
    for layer in owners(sparse(name)).values():
        zeros = as_matrix(layer.weight, layer.columns) == 0
        kept = (~zeros).sum(1)
        assert bool((kept == layer.shape.in_features // 2).all())


def by_pickle(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))  # type: ignore[no-any-return]


def by_save(model: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)  # type: ignore[no-any-return]


PARAMETRIZED = "only supported through state_dict"  # torch's own words of its own modules


@each
@pytest.mark.parametrize("through", [by_pickle, by_save, copy.deepcopy])
def test_copies_compute_the_same_and_share_nothing(
    name: str, through: Callable[[nn.Module], nn.Module]
) -> None:
    model = sparse(name).eval()
    if name == "normed" and through is not copy.deepcopy:
        for refused in (model, MODELS[name]()):
            with pytest.raises(RuntimeError, match=PARAMETRIZED):
                through(refused)
        return
    other = through(model)
    assert torch.equal(other(X), model(X)) and type(other) is type(model)
    assert list(other.state_dict()) == list(model.state_dict())
    before = model(X)
    with torch.no_grad():
        for layer in owners(other).values():
            layer.values.add_(1.0)
    assert torch.equal(model(X), before) and not torch.equal(other(X), before)


@each
def test_files_and_state_dicts_are_read_back(name: str, tmp_path: Path) -> None:
    model = sparse(name).eval()
    padst.save(model, tmp_path / "m.safetensors")
    fresh = MODELS[name]().double().eval()
    padst.load(fresh, tmp_path / "m.safetensors")
    assert torch.equal(fresh(X), model(X))
    again = sparse(name).eval()
    with torch.no_grad():
        for layer in owners(again).values():
            layer.values.zero_()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(X), model(X))


@each
def test_a_dense_checkpoint_is_packed_under_the_mask(name: str) -> None:
    model, dense = sparse(name).eval(), padst.to_dense(sparse(name)).eval()
    with torch.no_grad():
        for layer in owners(model).values():
            layer.values.zero_()
    assert not torch.allclose(model(X), dense(X))
    layers = {f"{n}_sparse" for n, _ in dense.named_parameters()} & set(owners(model))
    given = {k: v for k, v in dense.state_dict().items() if f"{k}_sparse" in layers}
    rest = {k: v for k, v in model.state_dict().items() if k.partition("_sparse")[0] not in given}
    model.load_state_dict({**rest, **given}, strict=False)
    torch.testing.assert_close(model(X), dense(X), rtol=0, atol=1e-12)


@each
def test_to_dense_gives_names_order_types_and_attributes_back(name: str) -> None:
    model = MODELS[name]().double()
    names, kinds = list(model.state_dict()), [type(m).__name__ for m in model.modules()]
    parameters = [n for n, _ in model.named_parameters()]
    calls: list[str] = []
    made = sparse(name)
    made.note = "mine"  # type: ignore[assignment]
    made.register_forward_hook(lambda *_: calls.append("called"))
    dense = padst.to_dense(made)
    assert list(dense.state_dict()) == names
    assert [type(m).__name__ for m in dense.modules()] == kinds
    assert [n for n, _ in dense.named_parameters()] == parameters
    dense(X)
    assert dense.note == "mine" and calls == ["called"]
    assert all(not layer.training for layer in made.eval().modules())


@each
def test_training_grows_and_hardens(name: str) -> None:
    model = sparse(name, "learned").train()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    training = padst.DynamicSparsity(model, optimizer, "rigl", total_steps=12, update_every=3)
    before = {n: layer.indices.clone() for n, layer in owners(model).items()}
    first = last = 0.0
    for step in range(12):
        optimizer.zero_grad()
        loss = (model(X) - 1.0).square().mean()
        (loss + training.penalty()).backward()
        optimizer.step()
        first, last = (float(loss.detach()) if step == 0 else first), float(loss.detach())
    assert last < first
    moved = [not torch.equal(layer.indices, before[n]) for n, layer in owners(model).items()]
    assert any(moved)
    training.detach()
    padst.harden(model)
    model.eval()
    assert all(layer.soft_permutation is None for layer in owners(model).values())
    torch.testing.assert_close(model(X), padst.to_dense(model)(X), rtol=0, atol=1e-10)


def test_shapes_and_matrices() -> None:
    weight = torch.randn(3, 4, 5)
    for columns in ((0,), (1,), (2,), (0, 2), (1, 2)):
        matrix = as_matrix(weight, columns)
        shape = matrix_shape(weight.shape, columns)
        assert tuple(matrix.shape) == (shape.out_features, shape.in_features)
        rows = [axis for axis in range(3) if axis not in columns]
        by_sum = weight.sum(columns)
        torch.testing.assert_close(matrix.sum(1), by_sum.flatten())
        assert [by_sum.dim()] == [len(rows)]
    assert str(matrix_shape((0, 4), (1,))) == "0x4"


def counted(layer: SparseParameter) -> list[int]:
    """Count the matrices that the layer forms, by the calls of its ``dense_form``."""
    calls: list[int] = []
    original = layer.dense_form
    layer.dense_form = lambda matrix: calls.append(1) or original(matrix)  # type: ignore
    return calls


def test_one_pass_of_the_owner_computes_a_weight_once() -> None:
    model = Reused().double()
    weight = model.weights[0].detach()
    kept = FanIn().select(weight, 4)
    layer = SparseParameter.of(model.weights, "0", (0,), FanIn(), kept)
    calls = counted(layer)
    assert model.weights[0] is not model.weights[0] and len(calls) == 2
    with torch.no_grad():
        layer.readers += 1
        assert model.weights[0] is model.weights[0] and len(calls) == 3
        layer.values.mul_(2.0)
        assert torch.equal(model.weights[0], layer.weight)  # a write is noticed
        with torch.enable_grad():
            assert model.weights[0].requires_grad
        layer.readers -= 1
    assert layer._last is None


def test_several_parameters_go_back_to_their_places() -> None:
    model = Raw()
    names = [n for n, _ in model.named_parameters()]
    for name, columns in (("c", (0,)), ("a", (1,)), ("heads", (0,))):
        weight: Any = getattr(model, name)
        kept = FanIn().select(as_matrix(weight.detach(), columns), 4)
        SparseParameter.of(model, name, columns, FanIn(), kept)
    assert "32x16 as 16 -> 32, FanIn(" in repr(model)
    put_back(model)
    assert [n for n, _ in model.named_parameters()] == names and type(model) is Raw
    put_back(model)


def test_a_frozen_parameter_stays_frozen() -> None:
    model = Raw()
    model.a.requires_grad_(False)
    kept = FanIn().select(model.a.detach(), 4)
    layer = SparseParameter.of(model, "a", (1,), FanIn(), kept)
    assert not layer.values.requires_grad and not model.a.requires_grad
    put_back(model)
    assert not model.a.requires_grad
