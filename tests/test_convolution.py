"""Sparse k x k convolutions: against patches and explicit matrices in float64."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

import padst_compiler as padst
from padst_compiler.convolution import SparseConv2d
from padst_compiler.index_map import IndexMap
from padst_compiler.layers import sparse_layers
from padst_compiler.methods import SRigL
from padst_compiler.permutation import FixedPermutation, Permutation
from padst_compiler.recorder import Recorder
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured

STRUCTURES: list[Structure] = [
    Block(4),
    Block(2, 9),
    Block(4, balanced=False),
    NM(6),
    Diagonal(),
    Diagonal(modulus=4),
    FanIn(),
    Unstructured(),
]
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "stride": {"stride": (2, 1), "padding": 1},
    "dilation": {"dilation": 2, "padding": (1, 2)},
    "same": {"padding": "same"},
    "valid": {"padding": "valid", "bias": False},
    "reflect": {"padding": 2, "padding_mode": "reflect"},
    "circular": {"padding": 1, "padding_mode": "circular", "stride": 2},
    "rectangular": {"kernel_size": (1, 3), "padding": (0, 1)},
}
Structures = pytest.mark.parametrize("structure", STRUCTURES, ids=str)


def make(
    structure: Structure, perm: str = "none", side: str = "input", **options: Any
) -> tuple[SparseConv2d, nn.Conv2d]:
    """Return a sparse convolution of 4 to 8 channels, and the dense one that it came from."""
    given = {"kernel_size": 3, **options}
    dense = nn.Conv2d(4, 8, dtype=torch.float64, **given)
    matrix = dense.weight.detach().flatten(1)
    shape = Shape(*matrix.shape)
    size = shape.in_features if side == "input" else shape.out_features
    generator = torch.Generator().manual_seed(0)
    permutation: Permutation | None = None
    if perm == "fixed":
        permutation = FixedPermutation(IndexMap.of(torch.randperm(size, generator=generator)))
    if perm == "soft":
        permutation = SinkhornPermutation(size, generator).double()
    indices = structure.select(matrix, structure.kept(shape, 0.5))
    layer = SparseConv2d.adopt(copy.deepcopy(dense), structure, indices, permutation, side)
    assert isinstance(layer, SparseConv2d)
    return layer, dense


def padded(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Pad as the convolution's documentation says."""
    if conv.padding == "valid":
        return x
    if conv.padding == "same":  # the odd place goes behind
        whole = [d * (k - 1) for d, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        pads = [n for total in whole[::-1] for n in (total // 2, total - total // 2)]
    else:
        assert isinstance(conv.padding, tuple)
        pads = [n for one in conv.padding[::-1] for n in (one, one)]
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    return F.pad(x, pads, mode=mode)


def reference(x: Tensor, matrix: Tensor, bias: Tensor | None, conv: nn.Conv2d) -> Tensor:
    """Return the convolution as a loop over places: every output is a product with one patch."""
    (kh, kw), (sh, sw), (dh, dw) = conv.kernel_size, conv.stride, conv.dilation
    x = padded(x, conv)
    high, wide = x.shape[-2] - dh * (kh - 1), x.shape[-1] - dw * (kw - 1)
    rows = []
    for top in range(0, high, sh):
        places = []
        for left in range(0, wide, sw):
            patch = x[:, :, top : top + dh * kh : dh, left : left + dw * kw : dw]
            places.append(patch[:, :, :kh, :kw].flatten(1) @ matrix.t())
        rows.append(torch.stack(places, dim=-1))
    y = torch.stack(rows, dim=-2)
    return y if bias is None else y + bias[:, None, None]


def effective(layer: SparseConv2d, values: Tensor) -> Tensor:
    matrix = layer.structure.unpack(values, layer.indices, layer.shape)
    if layer.permutation is None:
        return matrix
    perm = layer.permutation.matrix().double()
    return matrix @ perm if layer.side == "input" else perm @ matrix


# -- numbers ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("perm", ["none", "fixed", "soft"])
def test_forward_and_gradients_equal_a_loop_over_patches(perm: str, side: str, name: str) -> None:
    structure = Block(4, 3) if name == "rectangular" else Block(4)
    layer, dense = make(structure, perm, side, **OPTIONS[name])
    x = torch.randn(2, 4, 7, 6, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    values = layer.values.detach().clone().requires_grad_()
    wanted = reference(x, effective(layer, values), layer.bias, dense)
    torch.testing.assert_close(y, wanted)
    upstream = torch.randn_like(y)
    parameters = list(layer.parameters())
    others = [p for p in parameters if p is not layer.values]
    found = torch.autograd.grad(y, [x, layer.values, *others], upstream)
    torch.testing.assert_close(found, torch.autograd.grad(wanted, [x, values, *others], upstream))
    assert found[1].shape == layer.values.shape  # only what is stored has a gradient


@Structures
def test_every_structure_and_no_batch(structure: Structure) -> None:
    layer, dense = make(structure, padding=1)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    wanted = reference(x, effective(layer, layer.values), layer.bias, dense)
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer(x[0]), wanted[0])
    assert layer.weight.shape == (8, 4, 3, 3)
    torch.testing.assert_close(F.conv2d(x, layer.weight, layer.bias, padding=1), wanted)


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("perm", ["none", "fixed", "soft"])
def test_ablated_neurons_leave_the_convolution_and_keep_their_bias(perm: str, side: str) -> None:
    layer, _ = make(FanIn(), perm, side, padding=1)
    rows = torch.tensor([0, 2, 3, 6])
    width = layer.values.numel() // 4
    units = torch.stack([torch.randperm(36)[:width] for _ in rows]).int()
    layer.store(units, rows)
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    matrix = torch.zeros(8, 36, dtype=torch.float64)
    numbers = layer.values.detach().reshape(-1)[: 4 * width].view(4, width)
    for place, row in enumerate(rows.tolist()):
        matrix[row, units[place].long()] = numbers[place]
    if layer.permutation is not None:
        soft = layer.permutation.matrix().detach().double()
        matrix = matrix @ soft if side == "input" else soft @ matrix
    wanted = F.conv2d(x, matrix.view(8, 4, 3, 3), layer.bias, padding=1)
    torch.testing.assert_close(layer(x), wanted)
    torch.testing.assert_close(layer(x[0]), wanted[0])
    layer.recorder = Recorder(layer)
    layer.recorder.arm()
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast_computes_in_half_precision(dtype: torch.dtype) -> None:
    layer, _ = make(FanIn(), padding=1)
    layer = layer.float()
    x = torch.randn(2, 4, 5, 5)
    with torch.autocast("cpu", dtype):
        y = layer(x)
    assert y.dtype is dtype
    torch.testing.assert_close(y.float(), layer(x), rtol=2e-2, atol=3e-2)
    y.float().sum().backward()
    assert layer.values.grad is not None and layer.values.grad.dtype is torch.float32


def test_inputs_that_do_not_fit_are_named() -> None:
    layer, _ = make(FanIn())
    for size in ((2, 3, 5, 5), (4, 5), (1, 2, 4, 5, 5)):
        with pytest.raises(ValueError, match=r"Expected 4 channels before two axes of space\. Got"):
            layer(torch.randn(size).double())
    with pytest.raises(ValueError, match=r"Expected input on cpu\. Got meta"):
        layer(torch.randn(2, 4, 5, 5, device="meta"))


# -- what a growth method sees ---------------------------------------------------------------------


@pytest.mark.parametrize("side", ["input", "output"])
@pytest.mark.parametrize("perm", ["none", "fixed", "soft"])
@Structures
def test_the_recorder_sees_the_dense_gradient_of_s(
    structure: Structure, perm: str, side: str
) -> None:
    layer, _ = make(structure, perm, side, padding=1, stride=2)
    layer.recorder = recorder = Recorder(layer)
    x = torch.randn(3, 4, 6, 6, dtype=torch.float64)
    upstream = torch.randn_like(layer(x))
    layer(x).backward(upstream)
    assert not recorder.has_seen  # not armed
    recorder.arm()
    layer(x).backward(upstream)
    full = layer.structure.unpack(layer.values.detach(), layer.indices, layer.shape)
    full.requires_grad_()
    weight = full
    if layer.permutation is not None:
        soft = layer.permutation.matrix().detach().double()
        weight = full @ soft if side == "input" else soft @ full
    F.conv2d(x, weight.view(8, 4, 3, 3), None, stride=2, padding=1).backward(upstream)
    assert full.grad is not None
    scores = structure.unit_scores(full.grad)
    slots = structure.slots(layer.indices, layer.shape).long()
    torch.testing.assert_close(recorder.active, scores.gather(1, slots), rtol=1e-4, atol=1e-5)
    others = scores.scatter(1, slots, -torch.inf)
    best = others.topk(recorder.gains.shape[1], dim=1).values
    torch.testing.assert_close(recorder.gains, best, rtol=1e-4, atol=1e-5)


# -- a network -------------------------------------------------------------------------------------


class Residual(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.short = nn.Sequential()
        if stride != 1 or inputs != outputs:
            short = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.short = nn.Sequential(short, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm1(self.conv1(x)).relu()
        out: Tensor = (self.norm2(self.conv2(y)) + self.short(x)).relu()
        return out


def network() -> nn.Sequential:
    """A narrow ResNet-18: a stem, four stages of two blocks each, a head."""
    torch.manual_seed(0)
    stages: list[nn.Module] = [nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU()]
    width = 8
    for stage in range(4):
        for block in range(2):
            outputs = 8 * 2 ** min(stage, 2)
            stages.append(Residual(width, outputs, 2 if stage and not block else 1))
            width = outputs
    return nn.Sequential(*stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


def test_a_narrow_resnet_trains_with_constant_fan_in_and_rigl() -> None:
    net = network()
    chosen = padst.plan(net, torch.randn(1, 3, 16, 16), structure="fan_in", sparsity=0.9)
    reasons = {site.name: site.reason for site in chosen.sites if site.decision == "dense"}
    assert reasons == {
        "0": "first convolution: it reads the input",
        "13": "output head: no layer reads its 10 features",
    }
    assert sum(site.kind == "conv2d" for site in chosen.sparse) == 16
    assert all(site.tokens == site.uses * site.flops // (2 * site.weights) for site in chosen.sites)
    padst.sparsify(net, structure="fan_in", sparsity=0.9)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    training = padst.DynamicSparsity(net, optimizer, "rigl", total_steps=16, update_every=4)
    before = {name: layer.indices.clone() for name, layer in sparse_layers(net).items()}
    x, target = torch.randn(16, 3, 16, 16), torch.arange(16) % 10
    losses = []
    for _ in range(16):
        loss = F.cross_entropy(net(x), target) + training.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    for name, layer in sparse_layers(net).items():
        assert layer.indices.shape == before[name].shape
        assert (layer.mask().sum(1) == layer.kept).all()
        assert not torch.equal(layer.indices, before[name])
        assert {event["layer"] for event in training.history} >= {name}


def test_a_compiled_training_step_is_not_compiled_again_when_masks_move() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, padding=1))
    config = {"2": padst.SparseConfig("block:4", 0.75, permutation="none")}
    padst.sparsify(net, config)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    training = padst.DynamicSparsity(net, optimizer, total_steps=12, update_every=2, end=1.0)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(net, backend=counter, fullgraph=True)
    x = torch.randn(4, 3, 8, 8)
    for _ in range(10):
        torch.testing.assert_close(step(x), net(x))
        step(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert counter.frame_count == 1
    assert len(training.history) == 5 and sum(event["churn"] for event in training.history) > 0


def sparse_network(structure: str, permutation: str = "random") -> nn.Sequential:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 16, 3, 2, 1), nn.ReLU())
    net.append(nn.Conv2d(16, 8, (1, 3), padding="same"))
    config = padst.SparseConfig(structure, 0.75, permutation=permutation)
    padst.sparsify(net, {"2": config, "4": config})
    return net.eval()


@pytest.mark.parametrize(
    "structure", ["block:8", pytest.param("diagonal:modulus=4", marks=pytest.mark.slow)]
)
def test_compiled_and_exported_it_is_one_dense_convolution(structure: str, tmp_path: Path) -> None:
    net, x = sparse_network(structure), torch.randn(2, 3, 9, 9)
    layer = sparse_layers(net)["2"]
    with torch.no_grad():
        fast = torch.compile(net, backend="padst", options={"verify": "strict"}, fullgraph=True)
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
        layer.values.mul_(2.0)  # noticed: what was unpacked once is unpacked again
        torch.testing.assert_close(fast(x), net(x), rtol=1e-4, atol=1e-5)
    report = padst.export_onnx(net, (x,), tmp_path / "net.onnx")
    assert report.nodes["Conv"] == 3 and report.gathers == 0
    assert not {"ScatterElements", "ScatterND"} & report.nodes.keys()


@pytest.mark.slow
def test_plain_inductor_compiles_it() -> None:
    net, x = sparse_network("fan_in"), torch.randn(2, 3, 9, 9)
    fast = torch.compile(net, fullgraph=True)
    y = fast(x)
    torch.testing.assert_close(y, net(x), rtol=1e-4, atol=1e-5)
    layer = sparse_layers(net)["2"]
    (found,) = torch.autograd.grad(y.square().sum(), [layer.values])
    (wanted,) = torch.autograd.grad(net(x).square().sum(), [layer.values])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("permutation", ["none", "random", "learned"])
def test_dense_again_and_through_a_file(permutation: str, tmp_path: Path) -> None:
    net, x = sparse_network("block:8", permutation), torch.randn(2, 3, 9, 9)
    plain = padst.to_dense(net)
    assert isinstance(plain, nn.Sequential)
    assert type(plain[2]) is nn.Conv2d and type(plain[4]) is nn.Conv2d
    assert plain[4].padding == "same"
    torch.testing.assert_close(plain(x), net(x))
    padst.save(net, tmp_path / "net.safetensors")
    fresh = padst.to_dense(sparse_network("fan_in", "none"))
    padst.load(fresh, tmp_path / "net.safetensors")
    found = sparse_layers(fresh)["2"]
    assert isinstance(found, SparseConv2d) and found.structure == Block(8)
    torch.testing.assert_close(fresh(x), net(x))
    other = nn.Sequential(*list(plain)[:4], nn.Conv2d(16, 8, (3, 1), padding="same"))
    with pytest.raises(ValueError, match=r"Expected a conv2d of 8x48 with kernel \[1, 3\]"):
        padst.load(other, tmp_path / "net.safetensors")


def test_a_dense_state_dict_loads_under_the_mask() -> None:
    layer, dense = make(Block(4), "fixed")
    layer.load_state_dict(dense.state_dict())
    mask = layer.weight != 0
    torch.testing.assert_close(layer.weight, dense.weight * mask)


def test_erk_counts_the_axes_of_the_kernel() -> None:
    net = nn.Sequential(nn.Conv2d(8, 16, 3), nn.Conv2d(16, 32, (1, 5)), nn.Conv2d(32, 64, 1))
    net.append(nn.Conv2d(64, 64, 3))
    config = padst.SparseConfig("fan_in", 0.8, permutation="none", distribution="erk")
    plan = padst.plan(net, config={"re:.*": config})
    dims = [(16, 8, 3, 3), (32, 16, 1, 5), (64, 32, 1, 1), (64, 64, 3, 3)]
    sizes = [o * i * h * w for o, i, h, w in dims]
    eps = 0.2 * sum(sizes) / sum(map(sum, dims))
    densities = [eps * sum(d) / n for d, n in zip(dims, sizes, strict=True)]
    full = [at for at, density in enumerate(densities) if density >= 1]
    open_ = [at for at in range(4) if at not in full]
    eps = (0.2 * sum(sizes) - sum(sizes[at] for at in full)) / sum(sum(dims[at]) for at in open_)
    for at, site in enumerate(plan.sites):
        if at in full:
            assert site.decision == "dense" and "erk leaves it dense" in site.reason
        else:
            assert site.sparsity == pytest.approx(1 - eps * sum(dims[at]) / sizes[at])


def test_srigl_ablates_channels_and_they_leave_the_convolution() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 3))
    config = padst.SparseConfig("fan_in", 0.9, permutation="none")
    padst.sparsify(net, {"1": config, "3": config})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    method = SRigL(gamma_sal=0.9)
    training = padst.DynamicSparsity(net, optimizer, method, total_steps=24, update_every=4)
    x = torch.randn(4, 3, 9, 9)
    for _ in range(24):
        (net(x).square().mean() + training.penalty()).backward()
        optimizer.step()
        optimizer.zero_grad()
    first, last = sparse_layers(net).values()
    assert first.ablated > 0 and last.ablated == 0
    assert isinstance(first, SparseConv2d) and first.rows is not None
    y, wanted = first(net[0](x)), F.conv2d(net[0](x), first.weight, first.bias)
    torch.testing.assert_close(y, wanted)
    active = torch.zeros(16, dtype=torch.bool).index_fill(0, first.rows, True)
    assert not bool(first.weight[~active].any())
    assert bool((first.mask().sum(1)[active] == first.kept).all())
