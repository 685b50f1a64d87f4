"""Training with moving masks: invariants, any optimiser, no recompiles, exact resuming."""

import copy
import io
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from padst_compiler.layers import SparseLayer, SparseLinear, sparse_layers
from padst_compiler.methods import NonFiniteGradientWarning
from padst_compiler.recorder import Recorder
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation
from padst_compiler.structures import (
    NM,
    STRUCTURES,
    Block,
    FanIn,
    Shape,
    Structure,
)
from padst_compiler.training import DynamicSparsity

SMALL: dict[str, Structure] = {kind.name: kind() for kind in STRUCTURES}
SMALL |= {"block": Block(4), "nm": NM(m=8)}
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=False),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


def convert(
    dense: nn.Linear,
    structure: Structure,
    generator: torch.Generator,
    sparsity: float = 0.75,
    soft: bool = False,
) -> SparseLayer:
    shape = Shape(dense.out_features, dense.in_features)
    scores = torch.rand(*dense.weight.shape, generator=generator, dtype=dense.weight.dtype)
    indices = structure.select(scores, structure.kept(shape, sparsity))
    permutation = SinkhornPermutation(shape.in_features, generator) if soft else None
    return SparseLinear.adopt(dense, structure, indices, permutation, "input")


class Net(nn.Module):
    """Two sparse layers, 16 -> 32 -> 16, and a dense head."""

    first: SparseLayer
    second: SparseLayer

    def __init__(self, structure: Structure, seed: int, soft: bool, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        torch.manual_seed(seed)
        self.first = convert(nn.Linear(16, 32, dtype=dtype), structure, generator, soft=soft)
        self.second = convert(nn.Linear(32, 16, dtype=dtype), structure, generator, soft=soft)
        self.head = nn.Linear(16, 4, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.second(torch.tanh(self.first(x))))
        return y


def make(
    structure: Structure, seed: int = 0, soft: bool = False, dtype: torch.dtype = torch.float32
) -> Net:
    return Net(structure, seed, soft, dtype)


def soft_of(layer: SparseLayer) -> SinkhornPermutation:
    assert isinstance(layer.soft_permutation, SinkhornPermutation)
    return layer.soft_permutation


def batches(
    dtype: torch.dtype = torch.float32, seed: int = 0
) -> Callable[[int], tuple[Tensor, Tensor]]:
    def batch(step: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        x = torch.randn(24, 16, generator=generator, dtype=dtype)
        return x, torch.stack([x[:, 0], x[:, 3] * x[:, 5], x[:, 7].sin(), x[:, 11]], dim=1)

    return batch


def run(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    training: DynamicSparsity,
    steps: range,
    forward: Callable[[Tensor], Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> list[float]:
    batch, losses = batches(dtype), []
    call = model if forward is None else forward
    for step in steps:
        x, target = batch(step)
        loss = (call(x) - target).square().mean()
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        (loss + training.penalty()).backward()
        optimizer.step()
    return losses


def check_masks(model: nn.Module) -> None:
    for layer in sparse_layers(model).values():
        slots = layer.structure.slots(layer.indices, layer.shape)
        ordered = slots.sort(dim=1).values
        assert bool((ordered[:, 1:] > ordered[:, :-1]).all())
        assert (
            int(ordered.min()) >= 0 and int(ordered.max()) < layer.structure.table(layer.shape)[1]
        )
        assert int(layer.structure.mask(layer.indices, layer.shape).sum()) == layer.values.numel()


@pytest.mark.parametrize("method", ["rigl", "set"])
@pytest.mark.parametrize("name", SMALL)
def test_fifty_updates_keep_every_count(name: str, method: str) -> None:
    model = make(SMALL[name])
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    before = {n: (p.shape, p.data_ptr()) for n, p in model.state_dict(keep_vars=True).items()}
    start = {n: layer.indices.clone() for n, layer in sparse_layers(model).items()}
    training = DynamicSparsity(model, optimizer, method, total_steps=102, update_every=2, end=1.0)
    state = torch.get_rng_state()
    run(model, optimizer, training, range(102))
    assert torch.equal(state, torch.get_rng_state())
    assert sum(event["layer"] == "first" for event in training.history) == 50
    check_masks(model)
    after = {n: (p.shape, p.data_ptr()) for n, p in model.state_dict(keep_vars=True).items()}
    assert before == after  # nothing changed its size or its place in memory
    for n, layer in sparse_layers(model).items():
        assert bool((layer.indices != start[n]).any())
    assert all(0 <= event["churn"] <= 0.3 for event in training.history)
    assert max(event["churn"] for event in training.history) > 0.05


@pytest.mark.parametrize("method", ["rigl", "set"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_any_optimiser_forgets_the_slots_that_changed(name: str, method: str) -> None:
    model = make(FanIn())
    optimizer = OPTIMIZERS[name](model.parameters())
    options = {"total_steps": 20, "update_every": 5, "end": 1.0}
    training = DynamicSparsity(model, optimizer, method, **options)  # type: ignore[arg-type]
    start = {n: layer.indices.clone() for n, layer in sparse_layers(model).items()}
    losses = run(model, optimizer, training, range(5))
    for n, layer in sparse_layers(model).items():
        moved = layer.indices != start[n]
        assert bool(moved.any())
        remembered = [
            tensor
            for tensor in optimizer.state[layer.values].values()
            if isinstance(tensor, Tensor) and tensor.shape == layer.values.shape
        ]
        assert bool(remembered) == (name not in ("sgd", "adafactor"))
        for tensor in [layer.values, layer.values.grad, *remembered]:
            assert tensor is not None
            assert bool((tensor[moved] == 0).all())
            assert bool((tensor[~moved] != 0).any())
    losses += run(model, optimizer, training, range(5, 20))
    assert all(torch.isfinite(torch.tensor(losses)))
    check_masks(model)


def test_state_is_kept_on_request() -> None:
    model = make(FanIn())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    options = {"total_steps": 20, "update_every": 5, "keep_state": True}
    training = DynamicSparsity(model, optimizer, "set", **options)  # type: ignore[arg-type]
    start = model.first.indices.clone()
    run(model, optimizer, training, range(5))
    moved = model.first.indices != start
    assert bool((model.first.values[moved] == 0).all())
    assert bool((optimizer.state[model.first.values]["exp_avg_sq"][moved] != 0).any())


def test_rigl_grows_what_the_dense_gradient_says() -> None:
    """One update against the rule, with the gradient of an explicit dense weight."""
    torch.manual_seed(0)
    layer = convert(nn.Linear(16, 8, bias=False), FanIn(), torch.Generator().manual_seed(0))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    DynamicSparsity(layer, optimizer, total_steps=10, update_every=1, drop_fraction=0.5)
    x, target = torch.randn(20, 16), torch.randn(20, 8)
    dense = layer.weight.detach().requires_grad_()
    (grad,) = torch.autograd.grad((x @ dense.t() - target).square().sum(), dense)
    slots, scores = layer.indices.clone(), layer.values.detach().abs()
    (layer(x) - target).square().sum().backward()
    optimizer.step()

    fraction = 0.25 * (1 + torch.cos(torch.tensor(torch.pi / 7.5)))
    weakest = scores.flatten().argsort()[: int(fraction * scores.numel())]
    dropped = torch.zeros(scores.numel(), dtype=torch.bool)
    dropped[weakest] = True
    for row, out, gradient, now in zip(
        slots.tolist(),
        dropped.view_as(scores).tolist(),
        grad.abs(),
        layer.indices.tolist(),
        strict=True,
    ):
        kept = {unit for unit, gone in zip(row, out, strict=True) if not gone}
        rest = sorted(set(range(16)) - kept, key=lambda unit: -float(gradient[unit]))
        assert set(now) == kept | set(rest[: sum(out)])


def test_recorders_are_armed_for_the_backward_before_an_update_only() -> None:
    model = make(FanIn())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    training = DynamicSparsity(model, optimizer, total_steps=20, update_every=5)
    armed = []
    for step in range(20):
        recorder = model.first.recorder
        assert isinstance(recorder, Recorder)
        armed.append(bool(recorder.armed))
        run(model, optimizer, training, range(step, step + 1))
    assert [step + 1 for step, on in enumerate(armed) if on] == [5, 10]


def test_an_update_at_every_step_is_armed_from_the_start() -> None:
    model = make(FanIn())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    training = DynamicSparsity(model, optimizer, total_steps=10, update_every=1, end=1.0)
    run(model, optimizer, training, range(10))
    assert [e["step"] for e in training.history if e["layer"] == "first"] == list(range(1, 10))
    assert training.history[0]["churn"] > 0


def test_micro_batches_count_as_one_step() -> None:
    one, many = make(FanIn(), dtype=torch.float64), make(FanIn(), dtype=torch.float64)
    for model, parts in ((one, 1), (many, 2)):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
        training = DynamicSparsity(model, optimizer, "set", total_steps=20, update_every=5)
        for step in range(20):
            x, target = batches(torch.float64)(step)
            optimizer.zero_grad()
            for xs, ts in zip(x.chunk(parts), target.chunk(parts), strict=True):
                ((model(xs) - ts).square().mean() / parts).backward()
            optimizer.step()
        assert training.step_count == 20
    assert torch.equal(one.first.indices, many.first.indices)
    torch.testing.assert_close(one.first.values, many.first.values)


@pytest.mark.parametrize("fused", [False, True])
def test_a_step_that_the_scaler_skips_does_not_count(fused: bool) -> None:
    model = make(FanIn())
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=fused)
    training = DynamicSparsity(model, optimizer, total_steps=20, update_every=2)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for step in range(6):
        x, target = batches()(step)
        loss = (model(x) - target).square().mean() * (torch.inf if step in (1, 3) else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    assert training.step_count == 4
    assert [e["step"] for e in training.history if e["layer"] == "first"] == [2, 4]
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    check_masks(model)


def test_gradients_that_are_not_finite_leave_the_mask() -> None:
    model = make(FanIn())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    training = DynamicSparsity(model, optimizer, total_steps=20, update_every=2)
    start = [layer.indices.clone() for layer in sparse_layers(model).values()]
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        for step in range(2):
            (model(batches()(step)[0]).sum() * torch.nan).backward()
            for parameter in model.parameters():
                parameter.grad = None
            optimizer.step()
    assert [e["churn"] for e in training.history] == [0.0, 0.0]
    assert all(
        torch.equal(a, b.indices) for a, b in zip(start, sparse_layers(model).values(), strict=True)
    )
    assert [issubclass(w.category, NonFiniteGradientWarning) for w in said] == [True, True]
    assert "Expected finite gradients in first at step 2. Got NaN" in str(said[0].message)


def test_a_frozen_layer_keeps_its_mask() -> None:
    model = make(FanIn())
    model.first.values.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    training = DynamicSparsity(model, optimizer, total_steps=20, update_every=2)
    start = model.first.indices.clone()
    run(model, optimizer, training, range(10))
    assert torch.equal(start, model.first.indices)
    assert {e["layer"] for e in training.history} == {"second"}


def test_lambda_ramps_and_the_penalty_is_zero_where_nothing_is_soft() -> None:
    model = make(FanIn(), soft=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)
    training = DynamicSparsity(model, optimizer, total_steps=20, end=0.5, penalty_weight=2.0)
    soft = [soft_of(model.first), soft_of(model.second)]
    mean = sum(float(each.penalty().detach()) / (2 * each.size) for each in soft) / 2
    seen = []
    for step in range(20):
        seen.append(float(training.penalty().detach()))
        run(model, optimizer, training, range(step, step + 1))
    # From ``end`` on the permutations are sharpened, which the penalty sees.
    expected = [2.0 * mean * step / 10 for step in range(10)]
    assert seen[:10] == pytest.approx(expected, rel=1e-3)
    assert seen[10] <= 2.0 * mean and seen[10:] == sorted(seen[10:], reverse=True)
    training.penalty().backward()

    plain = make(FanIn())
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    nothing = DynamicSparsity(plain, optimizer, total_steps=20).penalty()
    assert nothing.shape == () and float(nothing) == 0.0


@pytest.mark.parametrize("method", ["rigl", "set"])
@pytest.mark.parametrize("cut", [12, 19])
def test_resuming_is_exact(method: str, cut: int) -> None:
    """Cut at 19: recorders armed for step 20. One layer hardens before the cuts, one after."""

    def start() -> tuple[Net, torch.optim.Optimizer, DynamicSparsity]:
        model = make(FanIn(), soft=True)
        with torch.no_grad():
            soft_of(model.first).logits.copy_(torch.eye(16).roll(3, 0) * 0.35)
            soft_of(model.second).logits.copy_(torch.eye(32).roll(5, 0) * 0.2)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
        return (
            model,
            optimizer,
            DynamicSparsity(
                model,
                optimizer,
                method,
                total_steps=40,
                update_every=5,
                penalty_weight=5.0,
                harden_every=3,
                seed=7,
            ),
        )

    model, optimizer, training = start()
    whole = run(model, optimizer, training, range(40))
    hardened = {e["layer"]: e["step"] for e in training.history if e["hardened"]}
    assert min(hardened.values()) <= 12 and max(hardened.values()) > 19

    first, first_optimizer, first_training = start()
    losses = run(first, first_optimizer, first_training, range(cut))
    file = io.BytesIO()
    torch.save(
        [first_training.state_dict(), first.state_dict(), first_optimizer.state_dict()], file
    )
    file.seek(0)
    saved = torch.load(file, weights_only=True)

    second, second_optimizer, second_training = start()
    for part, state in zip((second_training, second, second_optimizer), saved, strict=True):
        part.load_state_dict(state)  # type: ignore[attr-defined]
    losses += run(second, second_optimizer, second_training, range(cut, 40))
    assert losses == whole
    assert second_training.history == training.history
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, second.state_dict()[name]), name


def test_a_checkpoint_between_backward_and_step_keeps_what_was_recorded() -> None:
    def start() -> tuple[Net, torch.optim.Optimizer, DynamicSparsity]:
        model = make(FanIn())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.02)
        return model, optimizer, DynamicSparsity(model, optimizer, total_steps=20, update_every=1)

    (model, optimizer, training), (twin, other, resumed) = start(), start()
    model(batches()(0)[0]).square().sum().backward()
    state = copy.deepcopy(training.state_dict())
    resumed.load_state_dict(state)
    for a, b in zip(model.parameters(), twin.parameters(), strict=True):
        assert a.grad is not None
        b.grad = a.grad.clone()
    optimizer.step()
    other.step()
    assert training.history == resumed.history and training.history[0]["churn"] > 0
    assert torch.equal(model.first.indices, twin.first.indices)


def test_another_runs_state_is_refused_and_nothing_changes() -> None:
    model = make(FanIn())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = DynamicSparsity(model, optimizer, total_steps=20, update_every=5)
    run(model, optimizer, training, range(3))
    state = training.state_dict()
    for key, value in (
        ("method", "SET()"),
        ("update_every", 7),
        ("layers", ["first"]),
        ("keep_state", True),
    ):
        wrong = copy.deepcopy(state)
        wrong["settings"][key] = value
        with pytest.raises(ValueError, match=rf"^Expected {key} = .* as in the checkpoint\. Got "):
            training.load_state_dict(wrong)
    assert training.step_count == 3


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        ({"method": "rigel"}, "Got 'rigel'. Did you mean"),
        ({"total_steps": 0}, "Expected total_steps"),
        ({"drop_fraction": 1.5}, "Expected 0 <= drop_fraction < 1. Got 1.5"),
    ],
)
def test_bad_arguments_are_refused_and_the_model_stays_free(bad: dict[str, Any], said: str) -> None:
    model = make(FanIn())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        DynamicSparsity(model, optimizer, **({"total_steps": 10} | bad))
    assert model.first.recorder is None
    DynamicSparsity(model, optimizer, total_steps=10)


def test_models_and_optimisers_that_do_not_fit_are_refused() -> None:
    dense = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="Expected a model with sparse layers"):
        DynamicSparsity(dense, torch.optim.SGD(dense.parameters(), lr=0.1), total_steps=10)
    model = make(FanIn())
    early = torch.optim.SGD(make(FanIn()).parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"Expected an optimizer that holds first\.values"):
        DynamicSparsity(model, early, total_steps=10)


def test_one_controller_a_model_until_it_is_detached() -> None:
    model = make(FanIn())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    names = set(model.state_dict())
    first = DynamicSparsity(model, optimizer, total_steps=10, update_every=1)
    assert set(model.state_dict()) == names
    with pytest.raises(ValueError, match="Expected one controller per model"):
        DynamicSparsity(model, optimizer, total_steps=10)
    first.detach()
    assert model.first.recorder is None
    second = DynamicSparsity(model, optimizer, total_steps=10, update_every=1)
    run(model, optimizer, second, range(3))
    assert (first.step_count, second.step_count) == (0, 3)


def test_it_needs_no_variable_to_live_in() -> None:
    model = make(FanIn())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    DynamicSparsity(model, optimizer, total_steps=10, update_every=1)
    start = model.first.indices.clone()
    model(batches()(0)[0]).square().sum().backward()
    optimizer.step()
    assert bool((model.first.indices != start).any())


def train_both_ways(
    build: Callable[[], nn.Module], backend: Any
) -> list[tuple[list[Tensor], list[float]]]:
    """Train with more than 20 updates, eager and compiled; return masks and losses."""
    results = []
    for compiled in (False, True):
        model = build()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        training = DynamicSparsity(model, optimizer, total_steps=60, update_every=2, end=1.0)
        call = torch.compile(model, backend=backend, fullgraph=True) if compiled else model
        losses = run(model, optimizer, training, range(60), call, torch.float64)
        assert len({e["step"] for e in training.history if e["churn"] > 0}) >= 20
        results.append(([m.indices for m in sparse_layers(model).values()], losses))
    return results


def test_twenty_updates_of_a_compiled_step_compile_once() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    # float64, so that rounding does not choose a mask
    (masks, slow), (same, fast) = train_both_ways(
        lambda: make(FanIn(), dtype=torch.float64), counter
    )
    assert counter.frame_count == 1
    assert all(torch.equal(one, other) for one, other in zip(masks, same, strict=True))
    assert fast == pytest.approx(slow, rel=1e-12)


@pytest.mark.slow
def test_inductor_trains_the_same_model() -> None:
    def build() -> nn.Module:
        torch.manual_seed(0)
        dense = nn.Linear(16, 4, dtype=torch.float64)
        return convert(dense, FanIn(), torch.Generator().manual_seed(0))

    torch._dynamo.utils.counters.clear()
    (masks, slow), (same, fast) = train_both_ways(build, "inductor")
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert all(torch.equal(one, other) for one, other in zip(masks, same, strict=True))
    assert fast == pytest.approx(slow, rel=1e-9)


@pytest.mark.slow
def test_a_compiled_loss_with_penalty_compiles_once() -> None:
    model = make(FanIn(), soft=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    training = DynamicSparsity(model, optimizer, total_steps=20, update_every=2)
    counter = CompileCounterWithBackend("aot_eager")

    @torch.compile(backend=counter, fullgraph=True)
    def loss_of(x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = (model(x) - target).square().mean() + training.penalty()
        return loss

    for step in range(10):
        optimizer.zero_grad()
        loss_of(*batches()(step)).backward()
        optimizer.step()
    assert counter.frame_count == 1


@pytest.mark.slow
def test_rigl_finds_more_of_a_planted_mask_than_a_static_one() -> None:
    shares: dict[float, list[float]] = {0.0: [], 0.3: []}
    for drop_fraction, found in shares.items():
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            teacher = convert(nn.Linear(64, 32, bias=False), FanIn(), generator, sparsity=0.9)
            truth = teacher.weight.detach() * 4
            layer = convert(nn.Linear(64, 32, bias=False), FanIn(), generator, sparsity=0.9)
            optimizer = torch.optim.Adam(layer.parameters(), lr=0.02)
            options = {"total_steps": 400, "update_every": 10, "drop_fraction": drop_fraction}
            DynamicSparsity(layer, optimizer, **options)  # type: ignore[arg-type]
            for _ in range(400):
                x = torch.randn(64, 64, generator=generator)
                optimizer.zero_grad()
                (layer(x) - x @ truth.t()).square().mean().backward()
                optimizer.step()
            both = (layer.weight != 0) & (truth != 0)
            found.append(float(both.sum() / (truth != 0).sum()))
    assert max(shares[0.0]) < 0.3
    assert min(shares[0.3]) > 0.9


@pytest.fixture
def _one_thread() -> Iterator[None]:
    """Small products wait longer for a second thread than they take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_a_planted_permutation_is_recovered_and_hardens_by_the_gap_rule() -> None:
    """method.md 8B, N = 64, 8 blocks of 8: identity and random permutations leave 0.82-0.98.

    A start at the identity under a strong penalty stays there: not tested, and not offered.
    """
    errors = []
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        blocks = torch.block_diag(*torch.randn(8, 8, 8, generator=generator))
        target = blocks[:, torch.randperm(64, generator=generator)]
        soft = SinkhornPermutation(64, generator, iterations=10, noise=0.3)
        start = 0.1 * torch.randn(8, 1, 8, 8, generator=generator)
        diagonal = torch.arange(8, dtype=torch.int32).view(8, 1)
        layer = SparseLinear.adopt(
            nn.Linear(64, 64, bias=False), Block(8), diagonal, soft, "input", start
        )
        groups = [{"params": [layer.values], "lr": 0.02}, {"params": [soft.logits], "lr": 0.002}]
        optimizer = torch.optim.Adam(groups)
        training = DynamicSparsity(
            layer,
            optimizer,
            total_steps=1200,
            drop_fraction=0.0,
            penalty_weight=1.0,
            harden_every=20,
        )
        for _ in range(1200):
            optimizer.zero_grad()
            error = (layer(torch.eye(64)).t() - target).square().sum() / target.square().sum()
            (error + training.penalty()).backward()
            optimizer.step()
            if layer.soft_permutation is None and float(error.detach()) < 0.01**2:
                break
        assert layer.soft_permutation is None and training.history[-1]["hardened"]
        errors.append(float((layer.weight.detach() - target).norm() / target.norm()))
    assert max(errors) <= 0.05
