"""Gradual magnitude pruning follows the cubic schedule, and storage shrinks with it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import padst_compiler as padst
from padst_compiler import SparseConfig
from padst_compiler.methods import GMP
from padst_compiler.methods.gmp import cubic

FAMILIES = ["block:4", "nm:4", "diagonal", "fan_in", "unstructured"]


def make(structure: str, start: float = 0.0, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    config = SparseConfig(structure, 0.75, "none", start_sparsity=start)
    return padst.sparsify(nn.Sequential(nn.Linear(16, 8, dtype=torch.float64)), {"0": config})


def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    loss: Tensor = (model(x) - x[:, :8]).square().mean()
    optimizer.zero_grad(set_to_none=False)
    loss.backward()
    optimizer.step()
    return loss  # alive during the next forward, as in anybody's loop


def test_the_schedule_is_zhu_and_guptas() -> None:
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        start, final, at, begin, length = torch.rand(5, generator=generator).tolist()
        begin, length, at = 100 * begin, 1 + 500 * length, 800 * at
        expected = final + (start - final) * (1 - (at - begin) / length) ** 3
        expected = start if at < begin else final if at >= begin + length else expected
        assert cubic(at, begin, begin + length, start, final) == pytest.approx(expected)


@pytest.mark.parametrize("structure", FAMILIES)
def test_each_update_keeps_the_largest_units_of_each_group(structure: str) -> None:
    """40 cases for each of five structures, against sorting the units of the dense weight."""
    for seed in range(40):
        model = make(structure, seed=seed, start=0.0 if seed % 2 else 0.25)
        (layer,) = padst.sparse_layers(model).values()
        assert layer.config is not None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        seen: dict[str, Tensor] = {}
        optimizer.register_step_post_hook(
            lambda *_, seen=seen, layer=layer: seen.update(
                weight=layer.weight.detach(),
                slots=layer.structure.slots(layer.indices, layer.shape),
            )
        )
        padst.DynamicSparsity(model, optimizer, "gmp", total_steps=12, update_every=3, end=0.8)
        for at in range(1, 13):
            step(model, optimizer, at)
            begin = 0.0 if seed % 2 else 0.25
            sparsity = cubic(at, 0, 9.6, begin, layer.config.sparsity)
            due = at % 3 == 0 or at >= 9.6
            width = layer.structure.kept(layer.shape, sparsity) if due else seen["slots"].shape[1]
            scores = layer.structure.unit_scores(seen["weight"])
            after = layer.structure.slots(layer.indices, layer.shape)
            for row, before, score in zip(
                after.tolist(), seen["slots"].tolist(), scores.tolist(), strict=True
            ):
                ranked = sorted(before, key=lambda unit: -score[unit])
                assert set(row) == set(ranked[:width])
            assert torch.equal(layer.weight.detach(), seen["weight"] * layer.mask())
        assert layer.kept == layer.structure.kept(layer.shape, layer.config.sparsity)


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "Adafactor", "SGD"])
def test_the_parameter_stays_and_the_optimisers_memory_follows(name: str) -> None:
    model = make("fan_in")
    (layer,) = padst.sparse_layers(model).values()
    options: dict[str, Any] = {"momentum": 0.9} if name == "SGD" else {}
    optimizer = getattr(torch.optim, name)(model.parameters(), lr=0.01, **options)
    parameter, kept, loss = layer.values, [layer.kept], torch.zeros(())
    seen: dict[str, Tensor] = {}

    def dense(tensor: Tensor) -> Tensor:
        return layer.structure.unpack(tensor, layer.indices, layer.shape)

    def memory() -> dict[str, Tensor]:
        state = optimizer.state[layer.values]
        same = {k: t for k, t in state.items() if getattr(t, "shape", None) == layer.values.shape}
        return {key: dense(tensor) for key, tensor in same.items()}

    optimizer.register_step_post_hook(lambda *_: seen.update(memory()))
    padst.DynamicSparsity(model, optimizer, "gmp", total_steps=20, update_every=2)
    for at in range(20):
        loss = step(model, optimizer, at)
        assert layer.values is parameter and bool(loss.isfinite())
        assert parameter.shape == layer.indices.shape
        for key, tensor in memory().items():
            assert torch.equal(tensor, seen[key] * layer.mask())
        kept.append(layer.kept)
    assert bool(seen) == (name != "Adafactor")
    assert kept == sorted(kept, reverse=True) and len(set(kept)) > 3


def test_a_compiled_step_compiles_once_more_at_each_update_only() -> None:
    model = make("fan_in")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    training = padst.DynamicSparsity(model, optimizer, "gmp", total_steps=20, update_every=4)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(model, backend=counter, fullgraph=True)
    for at in range(20):
        generator = torch.Generator().manual_seed(at)
        x = torch.randn(8, 16, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        call(x).square().mean().backward()
        torch.testing.assert_close(call(x), model(x))
        optimizer.step()
    assert counter.frame_count <= 1 + len(training.history) <= 5


def test_gradients_that_are_not_finite_put_pruning_off() -> None:
    model = make("fan_in")
    (layer,) = padst.sparse_layers(model).values()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    training = padst.DynamicSparsity(model, optimizer, "gmp", total_steps=8, update_every=3)
    for at in range(6):
        x = torch.randn(4, 16, dtype=torch.float64)
        optimizer.zero_grad()
        (model(x).sum() * (torch.nan if at == 5 else 1.0)).backward()
        with torch.no_grad():
            saved = {p: p.clone() for p in model.parameters()}
            if at == 5:
                with pytest.warns(padst.methods.NonFiniteGradientWarning):
                    optimizer.step()
                for parameter, value in saved.items():
                    parameter.copy_(value)
            else:
                optimizer.step()
    assert layer.config is not None
    assert layer.kept > layer.structure.kept(layer.shape, 0.75)
    step(model, optimizer, 0)
    assert layer.kept == layer.structure.kept(layer.shape, 0.75)
    assert training.history[-1]["step"] == 7


def test_what_does_not_fit_is_refused() -> None:
    plain = padst.sparsify(nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 8)), structure="fan_in")
    with pytest.raises(ValueError, match=r"Expected a start_sparsity in 0 for gmp\. Got none"):
        optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
        padst.DynamicSparsity(plain, optimizer, "gmp", total_steps=8)
    model = make("fan_in")
    with pytest.raises(ValueError, match="Expected method 'gmp' for 0, which starts at sparsity"):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        padst.DynamicSparsity(model, optimizer, "rigl", total_steps=8)
    with pytest.raises(ValueError, match="Expected 0 <= start < 1"):
        GMP(start=1.0)
