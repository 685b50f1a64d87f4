"""The recorder sees the dense gradient, keeps the best of it, and changes nothing else."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from padst_compiler import watch as watch_module
from padst_compiler.layers import SparseLayer, SparseLinear
from padst_compiler.recorder import Recorder
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation
from padst_compiler.structure_text import describe
from padst_compiler.structures import NM, STRUCTURES, Block, Diagonal, FanIn, Shape, Structure

FORMS = [kind() for kind in STRUCTURES]
FORMS += [Block(16, 8), Block(8, balanced=False), Diagonal(band=8), Diagonal(modulus=16)]
Forms = pytest.mark.parametrize("structure", FORMS, ids=str)
SHAPES = [(64, 96), (96, 64), (64, 64), (32, 32)]  # a block is 32 by default, a group of N:M 16


def make(
    structure: Structure, out_features: int, in_features: int, sparsity: float = 0.5
) -> tuple[SparseLayer, Recorder]:
    dense = nn.Linear(in_features, out_features, dtype=torch.float64)
    kept = structure.kept(Shape(out_features, in_features), sparsity)
    indices = structure.select(torch.randn_like(dense.weight), kept)
    layer = SparseLinear.adopt(dense, structure, indices, None, "input")
    layer.recorder = recorder = Recorder(layer)
    return layer, recorder


def dense_scores(layer: SparseLayer, x: Tensor, grad: Tensor) -> Tensor:
    return layer.structure.unit_scores(grad.flatten(0, -2).t() @ x.flatten(0, -2))


def at_slots(layer: SparseLayer, scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scores of the kept units, and the table with those set to -inf."""
    slots = layer.structure.slots(layer.indices, layer.shape).long()
    return scores.gather(1, slots), scores.scatter(1, slots, -torch.inf)


def check_recorded(recorder: Recorder, active: Tensor, others: Tensor) -> None:
    torch.testing.assert_close(recorder.active, active, rtol=1e-5, atol=1e-6)
    best = others.topk(recorder.gains.shape[1], dim=1).values
    torch.testing.assert_close(recorder.gains, best, rtol=1e-5, atol=1e-6)
    named = others.gather(1, recorder.candidates.long())
    real = best.isfinite()
    torch.testing.assert_close(named[real], best[real], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("slab", [2**20, 500])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@Forms
def test_it_records_the_best_of_the_dense_gradient(
    structure: Structure, shape: tuple[int, int], slab: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch_module, "SLAB", slab)
    layer, recorder = make(structure, *shape)
    x = torch.randn(3, 5, shape[1], dtype=torch.float64)
    grad = torch.randn(3, 5, shape[0], dtype=torch.float64)
    recorder.arm()
    layer(x).backward(grad)
    check_recorded(recorder, *at_slots(layer, dense_scores(layer, x, grad)))


@Forms
def test_it_changes_neither_outputs_nor_gradients(structure: Structure) -> None:
    layer, recorder = make(structure, 64, 96)
    x = torch.randn(5, 96, dtype=torch.float64, requires_grad=True)
    results = []
    for armed in (False, True):
        recorder.arm() if armed else recorder.disarm()
        y = layer(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])])
    for plain, watched in zip(*results, strict=True):
        assert torch.equal(plain, watched)


@Forms
def test_the_dense_gradient_exists_in_slabs_only(
    structure: Structure, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, recorder = make(structure, 1024, 512, sparsity=0.95)
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and func.__name__ != "t.default":
                largest = max(largest, result.numel())
            return result

    monkeypatch.setattr(watch_module, "SLAB", 2**15)
    recorder.arm()
    grad, x = torch.randn(4, 1024).double(), torch.randn(4, 512).double()
    seen = tuple(recorder.buffers())
    with Watch():  # type: ignore[no-untyped-call]
        torch.ops.padst.observe(*seen, recorder.armed, grad, x, layer.indices, describe(structure))
    # A slab, a column to spare, the kept units merged with it; of 2**19 weights.
    assert largest <= 2**15 + recorder.gains.numel() + layer.shape.out_features


def test_what_it_keeps_is_in_the_order_of_the_kept_units() -> None:
    layer, recorder = make(FanIn(), 256, 512, sparsity=0.9)
    kept = sum(buffer.numel() for buffer in recorder.buffers())
    assert kept == 3 * layer.values.numel() + 1


def test_the_state_dict_and_the_parameters_stay_as_they_were() -> None:
    layer, _ = make(FanIn(), 8, 16)
    names = set(layer.state_dict())
    assert names == {"values", "bias", "indices"}
    assert {name for name, _ in layer.named_parameters()} == {"values", "bias"}
    layer.load_state_dict(layer.state_dict(), strict=True)
    layer.recorder = None
    assert set(layer.state_dict()) == names


def test_with_several_passes_scores_add_up() -> None:
    """Every unit fits on the list (2 kept of 4), so totals are sums over all passes."""
    layer, recorder = make(NM(m=4, n=2), 8, 16)
    recorder.arm()
    total = torch.zeros(32, 4)
    for _ in range(3):
        x = torch.randn(5, 16, dtype=torch.float64)
        grad = torch.randn(5, 8, dtype=torch.float64)
        layer(x).backward(grad)
        total += dense_scores(layer, x, grad)
    check_recorded(recorder, *at_slots(layer, total))


def test_a_unit_counts_from_the_pass_in_which_it_entered_the_list() -> None:
    layer = SparseLinear.adopt(
        nn.Linear(4, 1, bias=False), FanIn(), torch.tensor([[0]]).int(), None, "input"
    )
    layer.recorder = recorder = Recorder(layer)
    recorder.arm()
    for x, unit, gain in (
        ([1.0, 3.0, 2.0, 0.0], 1, 3.0),  # unit 1 enters; unit 2's 2.0 is forgotten
        ([1.0, 1.0, 3.5, 0.0], 1, 4.0),  # 3 + 1 beats 3.5
        ([1.0, 1.0, 5.5, 0.0], 2, 5.5),  # unit 2 enters with this pass's score alone
    ):
        layer(torch.tensor([x])).sum().backward()
        assert (recorder.candidates.item(), recorder.gains.item()) == (unit, gain)
    assert recorder.active.item() == 3.0


class Twice(nn.Module):
    """One layer, used twice in one forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, _ = make(NM(m=4, n=2), 16, 16)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.layer(torch.relu(self.layer(x)))
        return hidden


@pytest.mark.parametrize("compiled", [False, True])
def test_a_module_used_twice_records_both_uses(compiled: bool) -> None:
    model = Twice()
    layer = model.layer
    recorder = layer.recorder
    assert isinstance(recorder, Recorder)
    run = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    x = torch.randn(5, 16, dtype=torch.float64)
    recorder.arm()
    run(x).square().sum().backward()

    weight = layer.weight.detach().requires_grad_()
    total = torch.zeros(64, 4)
    assert layer.bias is not None
    first = x @ weight.t() + layer.bias
    second = torch.relu(first) @ weight.t() + layer.bias
    grads = torch.autograd.grad(second.square().sum(), [first, second])
    total += dense_scores(layer, x, grads[0])
    total += dense_scores(layer, torch.relu(first).detach(), grads[1])
    check_recorded(recorder, *at_slots(layer, total))


def test_arming_forgets_and_a_disarmed_recorder_sees_nothing() -> None:
    layer, recorder = make(FanIn(), 8, 16)
    x = torch.randn(5, 16, dtype=torch.float64)
    recorder.arm()
    layer(x).sum().backward()
    assert recorder.has_seen
    recorder.arm()
    assert not recorder.has_seen and bool(recorder.gains.isneginf().all())
    recorder.disarm()
    layer(x).sum().backward()
    assert not recorder.has_seen


def test_a_recorder_at_rest_costs_eager_nothing() -> None:
    layer, recorder = make(FanIn(), 8, 16)
    x = torch.randn(5, 16, dtype=torch.float64)
    assert "watch" not in layer(x).grad_fn.name()
    recorder.arm()
    assert "watch" in layer(x).grad_fn.name()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_a_pass_that_is_not_finite_wipes_the_record(bad: float) -> None:
    layer, recorder = make(FanIn(k=2), 3, 8)
    x, grad = torch.rand(4, 8).double() + 1, torch.ones(4, 3).double()
    poisoned = x.clone()
    poisoned[2, 5] = bad
    recorder.arm()
    layer(x).backward(grad)
    layer(poisoned).backward(grad)
    assert recorder.is_poisoned and not recorder.has_seen
    assert bool(recorder.gains.isneginf().all()) and not bool(recorder.active.any())
    layer(x).backward(grad)  # the next pass starts anew
    assert recorder.has_seen and not recorder.is_poisoned
    check_recorded(recorder, *at_slots(layer, dense_scores(layer, x, grad)))


def test_wide_lists_and_the_largest_of_the_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch_module, "SLAB", 40)
    layer, _ = make(NM(m=8, n=2), 16, 32)
    recorder = Recorder(layer, width=5, top=70)
    layer.recorder = recorder
    recorder.arm()
    total = torch.zeros(64, 8)
    for _ in range(2):
        x, grad = torch.randn(5, 32).double(), torch.randn(5, 16).double()
        layer(x).backward(grad)
        total += dense_scores(layer, x, grad)
    active, _ = at_slots(layer, total)
    torch.testing.assert_close(recorder.active, active)
    recorder.arm()
    layer(x).backward(grad)
    once = dense_scores(layer, x, grad)
    torch.testing.assert_close(recorder.top, once.flatten().topk(70).values)
    check_recorded(recorder, *at_slots(layer, once))


def test_it_reads_what_the_structure_reads_behind_a_permutation() -> None:
    soft = SinkhornPermutation(16, torch.Generator().manual_seed(0), noise=20.0)
    for side in ("input", "output"):
        dense = nn.Linear(16, 16)
        layer = SparseLinear.adopt(dense, FanIn(), torch.zeros(16, 1).int(), soft, side)
        layer.recorder = recorder = Recorder(layer)
        recorder.arm()
        x, grad = torch.randn(5, 16), torch.randn(5, 16)
        layer(x).backward(grad)
        read, came = (soft(x), grad) if side == "input" else (x, grad @ soft.soft())
        check_recorded(recorder, *at_slots(layer, dense_scores(layer, read, came).detach()))


def test_it_follows_the_model_in_type_and_in_copies() -> None:
    layer, recorder = make(FanIn(), 8, 16)
    layer.to(torch.bfloat16)
    recorder.arm()
    x, grad = torch.randn(5, 16).bfloat16(), torch.randn(5, 8).bfloat16()
    layer(x).backward(grad)
    assert recorder.has_seen and recorder.armed.dtype == torch.bool
    twin = copy.deepcopy(layer)
    assert isinstance(twin.recorder, Recorder) and twin.recorder._layer[0] is twin
    twin.recorder.arm()
    assert recorder.has_seen and not twin.recorder.has_seen


def test_under_autocast_it_records_too() -> None:
    layer, recorder = make(FanIn(), 8, 16)
    layer.float()
    x, grad = torch.randn(5, 16), torch.randn(5, 8)
    recorder.arm()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.backward(grad.bfloat16())
    active, _ = at_slots(layer, dense_scores(layer, x, grad))
    torch.testing.assert_close(recorder.active, active, rtol=5e-2, atol=5e-2)


def test_the_operators_are_sound() -> None:
    layer, recorder = make(FanIn(), 8, 16)
    recorder.arm()
    x, y = torch.randn(5, 16), torch.randn(5, 8, requires_grad=True)
    seen = tuple(recorder.buffers())
    ops = torch.ops.padst
    rest = (y.detach(), x, layer.indices, "fan_in")
    torch.library.opcheck(ops.observe.default, (*seen, recorder.armed, *rest))
    torch.library.opcheck(ops.watch.default, (y, x, recorder.armed, *seen, layer.indices, "fan_in"))
