"""What a practitioner does around a training loop: mixed precision, clipping, compiling, seeds."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

import padst_compiler as padst
from padst_compiler.layers import sparse_layers
from padst_compiler.methods import SRigL


def net(structure: str = "nm:8", permutation: str = "learned", seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.Linear(32, 8))
    config = padst.SparseConfig(structure, sparsity=0.75, permutation=permutation)
    padst.sparsify(model, {"0": config, "2": config})
    return model


def batch(step: int) -> tuple[Tensor, Tensor]:
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(step))
    return x, x[:, :8].tanh()


def topology(model: nn.Module) -> list[list[int]]:
    return [m.indices.flatten().tolist() for m in sparse_layers(model).values()]


class SignMomentum(torch.optim.Optimizer):
    """An optimiser that nobody knows: signs of two momenta, one scalar and one odd tensor."""

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["fast"], state["slow"] = torch.zeros_like(p), torch.zeros_like(p)
                    state["count"], state["odd"] = torch.zeros(()), torch.zeros(3)
                state["count"] += 1
                state["fast"].lerp_(p.grad, 0.1)
                state["slow"].lerp_(p.grad, 0.01)
                p.sub_(group["lr"] * (state["fast"] + state["slow"]).sign())


def test_an_optimiser_that_nobody_knows_forgets_what_changed() -> None:
    model = net("fan_in", "none")
    optimizer = SignMomentum(model.parameters(), lr=0.01)
    training = padst.DynamicSparsity(model, optimizer, total_steps=40, update_every=4)
    layer = sparse_layers(model)["0"]
    for step in range(4):
        x, y = batch(step)
        before = layer.indices.clone()
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    changed = layer.indices != before
    state = optimizer.state[layer.values]
    assert bool(changed.any()) and not bool(changed.all())
    for key in ("fast", "slow"):
        assert bool((state[key][changed] == 0).all()) and bool((state[key][~changed] != 0).any())
    assert float(state["count"]) == 4 and layer.values[changed].abs().max() == 0
    assert training.step_count == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("structure", ["block:8", "nm:8", "diagonal", "fan_in"])
def test_autocast_with_a_scaler_trains_and_skipped_steps_do_not_count(
    structure: str, dtype: torch.dtype
) -> None:
    model = net(structure, "learned" if structure != "fan_in" else "none")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    training = padst.DynamicSparsity(model, optimizer, total_steps=60, update_every=4)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    losses, skipped = [], 0
    for step in range(40):
        x, y = batch(step % 5)
        with torch.autocast("cpu", dtype):
            loss = (model(x).float() - y).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        scaler.scale(loss + training.penalty()).backward()
        if step % 10 == 7:  # an overflow
            gradient = sparse_layers(model)["0"].values.grad
            assert gradient is not None
            gradient.fill_(torch.inf)
            before, count, skipped = topology(model), training.step_count, skipped + 1
        scaler.step(optimizer)
        if step % 10 == 7:
            assert topology(model) == before and training.step_count == count
        scaler.update()
    assert training.step_count == 40 - skipped
    assert sum(losses[-5:]) < sum(losses[:5])
    assert all(m.values.dtype == torch.float32 for m in sparse_layers(model).values())


def test_accumulated_batches_are_one_step_and_move_masks_alike() -> None:
    """Two halves of a batch give the gradient of the whole; fan-in sums scores, see limits.md."""
    results = []
    for parts in (1, 2):
        model = net("fan_in", "none")
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        training = padst.DynamicSparsity(
            model, optimizer, "set", total_steps=40, update_every=4, seed=3
        )
        for step in range(20):
            x, y = batch(step)
            optimizer.zero_grad()
            for half, wanted in zip(x.chunk(parts), y.chunk(parts), strict=True):
                ((model(half) - wanted).square().mean() / parts).backward()
            optimizer.step()
        assert training.step_count == 20
        results.append((topology(model), model.state_dict()))
    assert results[0][0] == results[1][0]
    for name, tensor in results[0][1].items():
        torch.testing.assert_close(tensor, results[1][1][name], rtol=1e-3, atol=1e-5)


def test_clipping_sees_every_gradient_and_rigl_the_direction_only() -> None:
    models = [net("fan_in", "none") for _ in range(2)]
    for clip, model in zip((1e9, 1e-3), models, strict=True):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        training = padst.DynamicSparsity(model, optimizer, total_steps=40, update_every=2)
        for step in range(2):
            x, y = batch(step)
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip)
            squares = [
                float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None
            ]
            total = sum(squares) ** 0.5
            assert float(norm) > 1e-3 and total <= clip * 1.001
            optimizer.step()
        assert training.history
    assert topology(models[0]) == topology(models[1])  # a factor on all changes no order


@pytest.mark.parametrize("method", ["rigl", "set", "srigl"])
def test_a_seed_decides_everything_and_the_global_generator_is_left_alone(method: str) -> None:
    results = []
    state = torch.get_rng_state()
    for _ in range(2):
        model = net("fan_in" if method == "srigl" else "nm:8", "none")
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        padst.DynamicSparsity(model, optimizer, method, total_steps=40, update_every=3, seed=7)
        for step in range(20):
            x, y = batch(step)
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        results.append((topology(model), [p.tolist() for p in model.parameters()]))
    assert results[0] == results[1]
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.slow
def test_a_compiled_step_recompiles_at_hardenings_only() -> None:
    torch._dynamo.reset()
    model = net("nm:8")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    training = padst.DynamicSparsity(
        model, optimizer, total_steps=200, update_every=4, penalty_weight=20.0
    )
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, dynamic=False)
    def objective(x: Tensor, y: Tensor) -> Tensor:
        error: Tensor = (model(x) - y).square().mean()
        return error

    compiled_at = []
    for step in range(200):
        x, y = batch(step)
        before = counter.frame_count
        optimizer.zero_grad()
        (objective(x, y) + training.penalty()).backward()
        optimizer.step()
        if counter.frame_count > before:
            compiled_at.append(step)
    hardened = sorted({event["step"] for event in training.history if event["hardened"]})
    updates = {event["step"] for event in training.history if event["churn"] > 0}
    assert len(updates) > 20 and hardened
    assert compiled_at == [0, *hardened]  # the step after the one that hardened


def test_a_compiled_step_recompiles_at_most_once_for_each_ablation() -> None:
    torch._dynamo.reset()
    model = net("fan_in", "none")
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    method = SRigL(gamma_sal=0.95)
    training = padst.DynamicSparsity(model, optimizer, method, total_steps=120, update_every=4)
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(model, backend=counter)
    rows, ablations = [0, 0], 0
    for step in range(120):
        x, y = batch(step)
        optimizer.zero_grad()
        (call(x) - y).square().mean().backward()
        optimizer.step()
        now = [layer.ablated for layer in sparse_layers(model).values()]
        ablations, rows = ablations + (now != rows), now
    updates = len({event["step"] for event in training.history if event["churn"] > 0})
    assert updates > 15 and ablations > 0
    assert counter.frame_count <= 1 + ablations


def test_a_third_party_optimiser_forgets_what_changed() -> None:
    lion = pytest.importorskip("lion_pytorch")
    model = net("fan_in", "none")
    optimizer = lion.Lion(model.parameters(), lr=0.003)
    padst.DynamicSparsity(model, optimizer, total_steps=40, update_every=4)
    layer = sparse_layers(model)["0"]
    for step in range(4):
        x, y = batch(step)
        before = layer.indices.clone()
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        optimizer.step()
    changed = layer.indices != before
    average = optimizer.state[layer.values]["exp_avg"]
    assert bool(changed.any()) and float(average[changed].abs().max()) == 0.0
    assert bool((average[~changed] != 0).any())
