"""SRigL's update against the published steps, written as loops; ablation in layer and optimiser."""

import copy
import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import padst_compiler as padst
from padst_compiler.layers import SparseLayer, SparseLinear, sparse_layers
from padst_compiler.methods import RigL, SRigL
from padst_compiler.methods.srigl import least_salient
from padst_compiler.ops import LINEAR
from padst_compiler.structures import NM, Block, FanIn, Structure
from padst_compiler.training import DynamicSparsity


def published_update(
    weight: Tensor,
    mask: Tensor,
    grad: Tensor,
    share: float,
    numbers: int,
    group: int,
    fixed: int,
    gamma: float | None,
    reach: int,
) -> tuple[Tensor, Tensor]:
    """Return weight and mask after one update of method.md 6.1; lists over (row, column)."""
    rows, columns = weight.shape
    kept = [(r, c) for r in range(rows) for c in range(columns) if mask[r, c]]
    everywhere = [(r, c) for r in range(rows) for c in range(columns)]
    n_prune = int(len(kept) * share)
    n_keep = min(len(kept) - n_prune, sum(weight[p] != 0 for p in kept))
    by_weight = sorted(kept, key=lambda p: -abs(float(weight[p])))
    by_grad = sorted(everywhere, key=lambda p: -abs(float(grad[p])))
    ablated: set[int] = set()
    if gamma is not None:
        salient = set(by_weight[:n_keep]) | set(by_grad[:n_prune])
        counts = [sum(p[0] == r for p in salient) for r in range(rows)]
        need = max(1, int(gamma * (numbers // rows) if gamma < 1 else gamma))
        stay = max(1, numbers // columns, math.ceil(numbers / (columns // group * reach)))
        need = min(need, sorted(counts, reverse=True)[min(stay, rows) - 1])
        ablated = {r for r in range(rows) if counts[r] < need}
    groups = (rows - len(ablated)) * (columns // group)
    width = fixed or min(group, numbers // groups)
    left = [p for p in by_weight if p[0] not in ablated and weight[p] != 0][:n_keep]
    new_weight, new_mask = torch.zeros_like(weight), torch.zeros_like(mask)
    for r in set(range(rows)) - ablated:
        for start in range(0, columns, group):
            inside = [p for p in left if p[0] == r and start <= p[1] < start + group][:width]
            others = [p for p in by_grad if p[0] == r and start <= p[1] < start + group]
            others = [p for p in others if p not in inside][: width - len(inside)]
            for p in [*inside, *others]:
                new_mask[p] = True
                new_weight[p] = weight[p] if mask[p] else 0.0
    return new_weight, new_mask


def make(structure: Structure, rows: int, columns: int, kept: int, seed: int) -> SparseLayer:
    torch.manual_seed(seed)
    dense = nn.Linear(columns, rows, dtype=torch.float64)
    indices = structure.select(torch.randn(rows, columns), kept)
    return SparseLinear.adopt(dense, structure, indices, None, "input")


def uneven(layer: SparseLayer, steps: range, optimizer: torch.optim.Optimizer) -> None:
    """Train on gradients of very different size per neuron, so that some neurons are ablated."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        x = torch.randn(8, layer.shape.in_features, generator=generator, dtype=torch.float64)
        scale = torch.randn(layer.shape.out_features, generator=generator).double().exp().pow(3)
        layer.values.grad = None
        (layer(x) * scale).square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("family", ["fan_in", "nm", "nm_fixed"])
@pytest.mark.parametrize("ablation", [True, False])
def test_two_updates_are_the_published_ones(family: str, ablation: bool) -> None:
    seen_ablated, returned = 0, 0
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        rows = int(torch.randint(2, 8, (), generator=generator))
        group = 4 if family != "fan_in" else int(torch.randint(4, 12, (), generator=generator))
        columns = 12 if family != "fan_in" else group
        kept = int(torch.randint(1, group, (), generator=generator))
        fixed = kept if family == "nm_fixed" else 0
        structure = FanIn() if family == "fan_in" else NM(m=group, n=fixed or None)
        layer = make(structure, rows, columns, kept, seed)
        gamma = float(torch.rand((), generator=generator) * 0.9 + 0.1)
        gamma = gamma if seed % 3 else 2.0
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
        method = SRigL(ablation=ablation, gamma_sal=gamma, spare=())
        training = DynamicSparsity(
            layer, optimizer, method, total_steps=10, update_every=1, drop_fraction=0.6, end=1.0
        )
        for step in range(1, 6):
            reach = min(group, 4 * layer.kept)
            before, mask = layer.matrix().detach(), layer.mask()
            x = torch.randn(5, columns, generator=generator, dtype=torch.float64)
            scale = torch.randn(rows, generator=generator).double().exp().pow(2)
            wanted = torch.randn(5, rows, generator=generator, dtype=torch.float64) * scale
            grad = wanted.t() @ x
            gone = mask.sum(dim=1) == 0
            layer(x).backward(wanted)
            optimizer.step()
            expected, expected_mask = published_update(
                before,
                mask,
                grad,
                training.schedule.drop_at(step),
                layer.values.numel(),
                group,
                fixed,
                gamma if ablation else None,
                reach,
            )
            assert torch.equal(layer.mask(), expected_mask)
            torch.testing.assert_close(layer.matrix().detach(), expected)
            empty = expected_mask.sum(dim=1) == 0
            assert layer.ablated == int(empty.sum()) == training.history[-1]["ablated"]
            assert layer.sparsity == pytest.approx(1 - float(expected_mask.double().mean()))
            seen_ablated += layer.ablated
            returned += int((gone & ~empty).sum())
    assert (seen_ablated > 20 and returned > 0) is ablation


def test_without_ablation_it_is_rigl_where_no_weight_is_zero() -> None:
    for seed in range(20):
        results = []
        for method in (SRigL(ablation=False), RigL()):
            layer = make(FanIn(), 6, 16, 4, seed)
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
            DynamicSparsity(layer, optimizer, method, total_steps=10, update_every=1)
            layer(torch.randn(5, 16).double()).square().sum().backward()
            optimizer.step()
            results.append(layer.matrix())
        torch.testing.assert_close(results[0], results[1])


def ablated_layer(structure: Structure, kept: int = 3) -> SparseLayer:
    layer = make(structure, 8, 24, kept, 0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    method = SRigL(gamma_sal=0.9, spare=())
    training = DynamicSparsity(layer, optimizer, method, total_steps=50, update_every=2)
    uneven(layer, range(6), optimizer)
    training.detach()
    assert 0 < layer.ablated < 8
    return layer


@pytest.mark.parametrize("structure", [FanIn(), NM(m=8)], ids=str)
def test_what_is_ablated_leaves_the_product_and_keeps_its_bias(structure: Structure) -> None:
    layer = ablated_layer(structure)
    x = torch.randn(5, 24, dtype=torch.float64, requires_grad=True)
    layer.values.grad = None
    y = layer(x)
    weight = layer.weight.detach()
    assert layer.bias is not None and x.grad is None
    torch.testing.assert_close(y, x @ weight.t() + layer.bias)
    gone = (layer.mask().sum(dim=1) == 0).nonzero()[:, 0]
    assert gone.numel() == layer.ablated
    assert torch.equal(y[:, gone], layer.bias[gone].expand(5, -1))
    y.square().sum().backward()
    full = (2 * y.detach()).t() @ x.detach()
    used = layer.packed(layer.values.grad).values
    torch.testing.assert_close(used, layer.packed(layer.pack(full)).values)
    torch.testing.assert_close(x.grad, (2 * y.detach()) @ weight)
    shapes = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            if func is LINEAR[structure.name]:
                shapes.append(tuple(result.shape))
            return result

    with Watch():  # type: ignore[no-untyped-call]
        layer(x.detach())
    assert shapes == [(5, 8 - layer.ablated)]


@pytest.mark.parametrize("structure", [FanIn(), NM(m=8)], ids=str)
def test_an_ablated_layer_is_saved_loaded_and_made_dense(
    structure: Structure, tmp_path: Path
) -> None:
    layer = ablated_layer(structure)
    model = nn.Sequential(layer)
    x = torch.randn(5, 24, dtype=torch.float64)
    torch.testing.assert_close(padst.to_dense(model)(x), model(x))
    assert type(next(padst.to_dense(model).children())) is nn.Linear
    padst.save(model, tmp_path / "a.safetensors")
    fresh = nn.Sequential(nn.Linear(24, 8, dtype=torch.float64))
    padst.load(fresh, tmp_path / "a.safetensors")
    assert torch.equal(fresh(x), model(x))
    assert sparse_layers(fresh)["0"].ablated == layer.ablated
    plain = nn.Sequential(make(structure, 8, 24, 3, 1))  # ours may have other neurons left
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), model(x))
    whole = nn.Sequential(make(structure, 8, 24, 3, 1))
    model.load_state_dict(whole.state_dict())
    assert torch.equal(whole(x), model(x)) and sparse_layers(model)["0"].ablated == 0
    layer = ablated_layer(structure)
    dense = nn.Linear(24, 8, dtype=torch.float64)
    layer.load_state_dict(dense.state_dict())
    torch.testing.assert_close(layer.weight, dense.weight * layer.mask())


def test_the_optimiser_remembers_each_weight_at_its_new_place() -> None:
    layer = make(FanIn(), 8, 24, 3, 0)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    before: dict[str, Tensor] = {}

    def dense() -> dict[str, Tensor]:
        state = optimizer.state[layer.values]
        found = {"mask": layer.mask(), "weight": layer.matrix().detach()}
        values = layer.values.detach().clone()
        for key in ("exp_avg", "exp_avg_sq"):
            layer.values.data.copy_(state[key])
            found[key] = layer.matrix().detach()
            assert not bool(state[key].flatten()[layer.packed().values.numel() :].any())
        layer.values.data.copy_(values)
        return found

    optimizer.register_step_post_hook(lambda *_: before.update(dense()))  # runs before the update
    method = SRigL(gamma_sal=0.9, spare=())
    training = DynamicSparsity(layer, optimizer, method, total_steps=50, update_every=2)
    pointer, shape = layer.values.data_ptr(), layer.values.shape
    for step in range(24):
        uneven(layer, range(step, step + 1), optimizer)
        after = dense()
        stayed = before.pop("mask") & after.pop("mask")
        for key, tensor in after.items():
            assert torch.equal(tensor, before[key] * stayed), key
        assert layer.values.data_ptr() == pointer and layer.values.shape == shape
    assert len({event["ablated"] for event in training.history}) > 1


def test_the_last_layer_and_named_ones_are_never_ablated() -> None:
    model = nn.Sequential(*(make(FanIn(), 16, 16, 2, seed) for seed in range(3)))
    for spare, whole in ((None, ["2"]), (("0", "2"), ["0", "2"])):
        twin = copy.deepcopy(model)
        optimizer = torch.optim.SGD(twin.parameters(), lr=0.01)
        method = SRigL(gamma_sal=2.0, spare=spare)
        training = DynamicSparsity(twin, optimizer, method, total_steps=50, update_every=2)
        for _ in range(6):
            twin(torch.randn(8, 16).double()).square().sum().backward()
            optimizer.step()
        lost = {event["layer"] for event in training.history if event["ablated"]}
        assert lost == {"0", "1", "2"} - set(whole)


def test_the_guard_keeps_enough_neurons() -> None:
    counts = torch.tensor([0, 7, 3, 3, 1])
    assert least_salient(counts, 100, 1).tolist() == [True, False, True, True, True]
    assert least_salient(counts, 100, 2).tolist() == [True, False, False, False, True]
    assert least_salient(counts, 2, 1).tolist() == [True, False, False, False, True]
    assert not least_salient(torch.zeros(3), 5, 1).any()


def test_a_compiled_step_compiles_again_at_most_once_for_each_ablation() -> None:
    model = nn.Sequential(make(FanIn(), 16, 24, 3, 0), nn.Tanh(), make(FanIn(), 8, 16, 3, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    training = DynamicSparsity(
        model, optimizer, SRigL(gamma_sal=0.7), total_steps=60, update_every=2, end=1.0
    )
    counter = CompileCounterWithBackend("aot_eager")
    call = torch.compile(model, backend=counter, fullgraph=True)
    with torch._dynamo.config.patch(recompile_limit=100):
        for step in range(60):
            generator = torch.Generator().manual_seed(step)
            x = torch.randn(8, 24, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            (call(x) * torch.arange(8)).square().sum().backward()
            torch.testing.assert_close(call(x), model(x))
            optimizer.step()
    counts = [event["ablated"] for event in training.history if event["layer"] == "0"]
    changes = sum(a != b for a, b in zip([0, *counts], counts, strict=False))
    assert len(counts) > 20 and 0 < changes < 20
    assert counter.frame_count <= 1 + changes


@pytest.mark.parametrize(
    ("method", "structure", "said"),
    [
        (SRigL(), Block(4), "Expected structure fan_in or nm in the model for srigl. Got block"),
        (SRigL(spare=("x",)), FanIn(), "Expected names of sparse layers in spare. Got 'x'"),
    ],
)
def test_what_it_cannot_train_is_refused(method: SRigL, structure: Structure, said: str) -> None:
    layer = make(structure, 8, 8, 1, 0)
    with pytest.raises(ValueError, match=said):
        DynamicSparsity(layer, torch.optim.SGD(layer.parameters()), method, total_steps=10)
    assert layer.recorder is None


def test_other_methods_refuse_a_layer_with_ablated_neurons() -> None:
    layer = ablated_layer(FanIn())
    with pytest.raises(ValueError, match="Expected method 'srigl' or 'static' for the model"):
        DynamicSparsity(layer, torch.optim.SGD(layer.parameters()), "rigl", total_steps=10)


@pytest.mark.parametrize("gamma", [0.0, -1.0, math.nan, math.inf])
def test_a_share_of_nothing_is_refused(gamma: float) -> None:
    with pytest.raises(ValueError, match="Expected gamma_sal above 0"):
        SRigL(gamma_sal=gamma)
