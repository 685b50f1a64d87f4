"""DynaDiag's soft top-K over all diagonals against explicit sums, and its freeze."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import padst_compiler as padst
from padst_compiler.layers import SparseLayer
from padst_compiler.methods import DynaDiag, NonFiniteGradientWarning

SHAPES = [(8, 8), (6, 10), (10, 6)]


def make(rows: int, columns: int, seed: int = 0, sparsity: float = 0.7) -> SparseLayer:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(columns, rows, dtype=torch.float64))
    config = padst.SparseConfig("dynadiag", sparsity, "none")
    (layer,) = padst.sparse_layers(padst.sparsify(model, {"0": config})).values()
    return layer


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_the_soft_weight_is_the_published_sum_of_diagonals(rows: int, columns: int) -> None:
    """70 random cases for each of three shapes: weight, product and gradients."""
    size = max(rows, columns)
    layer = make(rows, columns)
    selection = layer.selection
    assert layer.bias is not None
    assert selection is not None and layer.values.shape == (1, size, min(rows, columns))
    assert selection.kept == max(1, math.ceil(round(0.3 * rows * columns) / min(rows, columns)))
    for seed in range(70):
        generator = torch.Generator().manual_seed(seed)
        alpha = torch.randn(size, generator=generator)
        temperature = 10 ** float(torch.rand((), generator=generator) * 2 - 1.5)
        values = torch.randn(layer.values.shape, generator=generator, dtype=torch.float64)
        selection.alpha.data.copy_(alpha)
        selection.temperature.fill_(temperature)
        layer.values.data.copy_(values)
        a = alpha.double().requires_grad_()
        v = values.clone().requires_grad_()
        scaled = (selection.kept * torch.softmax(a / float(selection.temperature), 0)).clamp(0, 1)
        expected = torch.zeros(rows, columns, dtype=torch.float64)
        for offset in range(size):
            for at in range(min(rows, columns)):
                if rows >= columns:
                    place = ((at + offset) % rows, at)
                else:
                    place = (at, (at + offset) % columns)
                single = torch.zeros(rows, columns, dtype=torch.float64)
                single[place] = 1.0
                expected = expected + single * scaled[offset] * v[0, offset, at]
        torch.testing.assert_close(layer.weight, expected, rtol=1e-5, atol=1e-6)
        x = torch.randn(4, columns, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(layer(x), x @ expected.t() + layer.bias, rtol=1e-5, atol=1e-6)
        layer.zero_grad()
        layer(x).square().sum().backward()
        (x @ expected.t() + layer.bias).square().sum().backward()
        assert layer.values.grad is not None and selection.alpha.grad is not None
        torch.testing.assert_close(layer.values.grad, v.grad, rtol=1e-4, atol=1e-5)
        if temperature > 0.3:  # colder, float32 softmax saturates
            torch.testing.assert_close(selection.alpha.grad.double(), a.grad, rtol=1e-3, atol=1e-3)


def train(
    layer: SparseLayer, optimizer: torch.optim.Optimizer, training: Any, steps: range
) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, layer.shape.in_features, generator=generator, dtype=torch.float64)
        loss = layer(x).square().mean() + training.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
@pytest.mark.parametrize("name", ["Adam", "SGD", "Adafactor"])
def test_the_freeze_keeps_the_largest_with_their_state(rows: int, columns: int, name: str) -> None:
    layer = make(rows, columns)
    selection, parameter = layer.selection, layer.values
    assert selection is not None
    optimizer = getattr(torch.optim, name)(layer.parameters(), lr=0.05)
    training = padst.DynamicSparsity(layer, optimizer, DynaDiag(freeze=0.5), total_steps=20)
    seen: dict[str, Any] = {}

    def note(*_: object) -> None:
        if layer.selection is not None:
            state = optimizer.state[layer.values]
            seen.update(alpha=selection.alpha.detach().clone(), values=parameter.detach().clone())
            seen.update(state={k: t.clone() for k, t in state.items() if isinstance(t, Tensor)})

    hook = optimizer.register_step_pre_hook(note)
    train(layer, optimizer, training, range(9))
    assert layer.selection is selection and training.history == []
    hook.remove()
    training._hook.remove()  # note what stands right before the freeze
    train(layer, optimizer, training, range(9, 10))
    note()
    training._after_step(optimizer, (), {})
    order = sorted(range(len(seen["alpha"])), key=lambda j: (-float(seen["alpha"][j]), j))
    chosen = sorted(order[: selection.kept])
    assert layer.selection is None and layer.indices.tolist() == [chosen]
    assert layer.values is parameter and torch.equal(parameter.detach(), seen["values"][:, chosen])
    state = optimizer.state[parameter]
    if name == "Adam":
        assert torch.equal(state["exp_avg"], seen["state"]["exp_avg"][:, chosen])
        assert torch.equal(state["exp_avg_sq"], seen["state"]["exp_avg_sq"][:, chosen])
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert id(selection.alpha) not in held and selection.alpha not in optimizer.state
    assert float(training.penalty()) == 0.0
    event = training.history[-1]
    assert event["step"] == 10 and event["churn"] == 1 - selection.kept / max(rows, columns)
    x = torch.randn(3, columns, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ layer.weight.t() + layer.bias)
    train(layer, optimizer, training, range(10, 12))


def test_temperature_falls_and_the_penalty_is_the_mean_share() -> None:
    layer = make(8, 8)
    selection = layer.selection
    assert selection is not None
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    training = padst.DynamicSparsity(layer, optimizer, DynaDiag(0.5, l1=2.0), total_steps=20)
    for step in range(10):
        expected = 0.05 + (5.0 - 0.05) * (1 + math.cos(math.pi * step / 10)) / 2
        assert float(selection.temperature) == pytest.approx(expected)
        shares = selection.weights().sum() / selection.kept
        assert float(training.penalty().detach()) == pytest.approx(2 * float(shares.detach()))
        train(layer, optimizer, training, range(step, step + 1))
    assert selection.alpha.requires_grad


def test_a_compiled_step_compiles_twice() -> None:
    layer = make(8, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    padst.DynamicSparsity(layer, optimizer, "dynadiag", total_steps=20)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(12):
        optimizer.zero_grad()
        x = torch.randn(4, 8, dtype=torch.float64)
        call(x).square().mean().backward()
        optimizer.step()
    assert layer.selection is None and counter.frame_count == 2


def test_a_soft_layer_is_saved_loaded_and_made_dense(tmp_path: Path) -> None:
    model = nn.Sequential(make(8, 8))
    x = torch.randn(4, 8, dtype=torch.float64)
    torch.testing.assert_close(padst.to_dense(model)(x), model(x))
    padst.save(model, tmp_path / "a.safetensors")
    fresh = padst.load(nn.Sequential(nn.Linear(8, 8).double()), tmp_path / "a.safetensors")
    assert torch.equal(fresh(x), model(x))
    again = nn.Sequential(make(8, 8, seed=1))
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(x), model(x))


def test_an_optimiser_from_before_gets_alpha_without_decay() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.1)
    padst.sparsify(model, structure="dynadiag", sparsity=0.7, optimizer=optimizer)
    (layer,) = padst.sparse_layers(model).values()
    assert layer.selection is not None
    (group,) = [g for g in optimizer.param_groups if layer.selection.alpha in set(g["params"])]
    assert group["weight_decay"] == 0.0


def test_gradients_that_are_not_finite_put_the_freeze_off() -> None:
    layer = make(8, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    training = padst.DynamicSparsity(layer, optimizer, "dynadiag", total_steps=10)
    train(layer, optimizer, training, range(2))
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    (layer(torch.ones(2, 8).double()) * torch.nan).sum().backward()
    with pytest.warns(NonFiniteGradientWarning):
        optimizer.step()
    assert layer.selection is not None
    layer.load_state_dict(state)
    train(layer, optimizer, training, range(3, 4))
    assert layer.selection is None and layer.kept == 3


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"freeze": 0.0}, "Expected 0 < freeze < 1"),
        ({"cold": 6.0}, "Expected 0 < cold <= hot"),
        ({"l1": -1.0}, "Expected a finite l1"),
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DynaDiag(**options)


def test_models_that_do_not_fit_are_refused() -> None:
    layer = make(8, 8)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="Expected method 'dynadiag' for the model"):
        padst.DynamicSparsity(layer, optimizer, "rigl", total_steps=10)
    model = padst.sparsify(nn.Sequential(nn.Linear(8, 8)), {"0": padst.SparseConfig("diagonal")})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="Expected soft diagonals for dynadiag"):
        padst.DynamicSparsity(model, optimizer, "dynadiag", total_steps=10)
