"""Small nets on which permutation folding by others went silently wrong, and ours may not.

In every net ``free`` makes the linears whose rows absorb any map, and ``shuffled`` the ones that
read a permuted input. ``gathers`` says how many of those maps must stay a gather while the shuffled
layers run on sparse kernels: fewer is a fold that was not proved, more is one that was missed. A
shuffled layer that runs dense or is constant fan-in absorbs its own map: there none may stay.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch.nn import functional as F

from padst_compiler import compat
from padst_compiler.backend import padst
from padst_compiler.explanation import explain
from padst_compiler.index_map import IndexMap
from padst_compiler.layers import SparseLinear, SparsePointwiseConv
from padst_compiler.permutation import FixedPermutation
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure

D = 16
Layer = Callable[[int, int], Any]


def adopted(module: nn.Module, structure: Structure, side: str, permuted: bool) -> Any:
    kind = SparseLinear if isinstance(module, nn.Linear) else SparsePointwiseConv
    shape = Shape(*kind.matrix_of(module).shape)
    size = shape.in_features if side == "input" else shape.out_features
    table = FixedPermutation(IndexMap.of(torch.randperm(size))) if permuted else None
    scores = torch.rand(shape.out_features, shape.in_features)
    indices = structure.select(scores, structure.kept(shape, 0.75))
    return kind.adopt(module, structure, indices, table, side)


class Net(nn.Module):
    """Layers to build from; ``structure`` is that of the shuffled ones."""

    shape: tuple[int, ...] = (9, D)
    gathers: int | tuple[int, ...] = 1  # a tuple: one for each of STRUCTURES
    whole = True  # one graph

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure
        self.build()

    def build(self) -> None:
        self.a, self.r = self.free(D, D), self.shuffled(D, D)

    def free(self, inputs: int, outputs: int, bias: bool = True) -> Any:
        if isinstance(self.structure, Diagonal):  # now and then the writer is dense
            return nn.Linear(inputs, outputs, bias)
        return adopted(nn.Linear(inputs, outputs, bias), FanIn(), "input", permuted=False)

    def shuffled(self, inputs: int, outputs: int, side: str = "input", bias: bool = True) -> Any:
        return adopted(nn.Linear(inputs, outputs, bias), self.structure, side, permuted=True)

    def convolution(self, shuffled: bool) -> Any:
        structure = self.structure if shuffled else FanIn()
        return adopted(nn.Conv2d(D, D, 1), structure, "input", permuted=shuffled)


class Control(Net):
    gathers = 0

    def forward(self, x: Tensor) -> Any:
        return self.r(F.relu(self.a(x)))


class InputPermuted(Net):
    def forward(self, x: Tensor) -> Any:
        return F.relu(self.a(F.relu(self.r(x))))


class ResidualFromTheInput(Net):
    def forward(self, x: Tensor) -> Any:
        return self.r(x + self.a(x))


class ResidualBetweenWriters(Net):
    gathers = 0

    def build(self) -> None:
        super().build()
        self.b = self.free(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.b(x) + F.gelu(self.a(x)))


class Attention(Net):
    shape = (2, 5, D)

    def build(self) -> None:
        self.q, self.k, self.v = (self.free(D, D) for _ in range(3))
        self.o = self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        b, t, _ = x.shape
        q, k, v = (f(x).view(b, t, 4, 4).transpose(1, 2) for f in (self.q, self.k, self.v))
        mixed = (q @ k.transpose(-2, -1) / 2.0).softmax(-1) @ v
        return self.o(mixed.transpose(1, 2).reshape(b, t, D))


class SharedInputAttention(Attention):
    """q, k and v each read the normed input in an order of their own."""

    gathers = 4

    def build(self) -> None:
        self.norm = nn.LayerNorm(D)
        self.q, self.k, self.v, self.o = (self.shuffled(D, D) for _ in range(4))

    def forward(self, x: Tensor) -> Any:
        return x + super().forward(self.norm(x))


class PackedAttention(Net):
    shape = (2, 5, D)

    def build(self) -> None:
        self.qkv, self.o = self.free(D, 3 * D), self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        q, k, v = self.qkv(x).split(D, dim=-1)
        return self.o(torch.sigmoid(q * k) * v)


class RotateHalf(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        turned = torch.cat([-y[..., D // 2 :], y[..., : D // 2]], dim=-1)
        return self.r(0.5 * y + 0.8 * turned)


class ChannelShuffle(Net):
    shape = (2, D, 3, 3)

    def build(self) -> None:
        self.a, self.r = self.convolution(shuffled=False), self.convolution(shuffled=True)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        y = y.view(-1, 4, D // 4, 3, 3).transpose(1, 2).reshape(-1, D, 3, 3)
        return self.r(y)


class PReluPerChannel(ChannelShuffle):
    """Its weight could be reordered; the channel axis is not the last, and nobody has proved it."""

    def build(self) -> None:
        super().build()
        self.slope = nn.PReLU(D)
        nn.init.normal_(self.slope.weight)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.slope(self.a(x)))


class TwoConvolutionsJoined(Net):
    shape = (2, D, 3, 3)

    def build(self) -> None:
        self.a, self.b = self.convolution(shuffled=False), self.convolution(shuffled=False)
        self.r = adopted(nn.Conv2d(2 * D, D, 1), self.structure, "input", permuted=True)

    def forward(self, x: Tensor) -> Any:
        return self.r(torch.cat(tensors=[self.a(x), self.b(x)], dim=1))


class JoinedByKeyword(Net):
    def build(self) -> None:
        self.a, self.b, self.r = self.free(D, D), self.free(D, D), self.shuffled(2 * D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(F.relu(torch.cat(tensors=[self.a(x), self.b(x)], dim=-1)))


class ConstantMadeInForward(Net):
    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x) * torch.linspace(0, 1, D, dtype=x.dtype))


class ScaleAndShift(Net):
    gathers = 0
    shift: Tensor

    def build(self) -> None:
        super().build()
        self.scale = nn.Parameter(torch.randn(D))
        self.register_buffer("shift", torch.randn(D))

    def forward(self, x: Tensor) -> Any:
        return self.r(F.relu(self.a(x)) * self.scale + self.shift)


class Roll(Net):
    def forward(self, x: Tensor) -> Any:
        return self.r(torch.roll(self.a(x), 1, -1))


class CumulativeSum(Net):
    def forward(self, x: Tensor) -> Any:
        return self.r(torch.cumsum(self.a(x), -1))


class SoftmaxOverTheAxis(Net):
    def forward(self, x: Tensor) -> Any:
        return self.r(torch.softmax(self.a(x), -1))


class SoftmaxByHand(Net):
    """Pointwise but for a sum over the axis, which reads the old order."""

    def forward(self, x: Tensor) -> Any:
        y = self.a(x).exp()
        return self.r(y / y.sum(-1, keepdim=True))


class ModuleReused(Net):
    """N:M rows absorb any map: there the second use folds into the first; blocks keep it."""

    gathers = (1, 0, 1, 0)

    def forward(self, x: Tensor) -> Any:
        return self.r(torch.tanh(self.r(torch.tanh(self.a(x)))))


class WriterReused(Net):
    gathers = 0

    def forward(self, x: Tensor) -> Any:
        return self.r(torch.tanh(self.a(torch.tanh(self.a(x)))))


class Tied(Net):
    """``c`` reads ``a``'s weights, and nothing permutes what ``c`` writes."""

    gathers = 0

    def build(self) -> None:
        super().build()
        self.a, self.c = nn.Linear(D, D), nn.Linear(D, D)
        self.c.weight = self.a.weight

    def forward(self, x: Tensor) -> Any:
        return self.c(torch.tanh(self.r(torch.tanh(self.a(x)))))


class TiedSparse(Net):
    gathers = (2, 1, 2, 0)

    def build(self) -> None:
        self.a, self.b = self.shuffled(D, D), self.shuffled(D, D)
        self.b.values = self.a.values

    def forward(self, x: Tensor) -> Any:
        return self.b(torch.tanh(self.a(x)))


class HiddenReturned(Net):
    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.a(x))
        return self.r(h), h


class HiddenJoined(Net):
    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.a(x))
        return torch.cat([h, self.r(h)], -1)


class SwiGlu(Net):
    gathers = 0

    def build(self) -> None:
        self.gate, self.up = self.free(D, 2 * D), self.free(D, 2 * D)
        self.down = self.shuffled(2 * D, D)

    def forward(self, x: Tensor) -> Any:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class PackedGlu(Net):
    def build(self) -> None:
        self.a, self.r = self.free(D, 2 * D), self.shuffled(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(F.glu(self.a(x)))


class LayerNormBetween(Net):
    """Its affine part could be reordered; nobody has proved it yet."""

    def build(self) -> None:
        super().build()
        self.norm = nn.LayerNorm(D)
        nn.init.normal_(self.norm.weight)
        nn.init.normal_(self.norm.bias)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.norm(self.a(x)))


class GateOfOneColumn(Net):
    gathers = 0

    def build(self) -> None:
        super().build()
        self.gate = nn.Linear(D, 1)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x) * torch.sigmoid(self.gate(x)))


class DataDependentBranch(Net):
    """Behind a graph break the hidden features are a graph input."""

    whole = False

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.a(x))
        return self.r(h) if float(h.sum()) > 1e6 else self.r(-h)


class HeadsRegrouped(Net):
    shape = (2, 5, D)

    def forward(self, x: Tensor) -> Any:
        y = self.a(x).view(2, 5, 4, 4).flip(-1)
        return self.r(y.view(2, 5, D))


class OutputSide(Net):
    """The map stands between its layer and a reader that absorbs it."""

    gathers = 0

    def build(self) -> None:
        self.r, self.a = self.shuffled(D, D, "output", bias=False), self.free(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.a(self.r(x))


class OutputSideActivated(Net):
    """No rule moves a map down through an activation; N:M rows absorb it where it stands."""

    gathers = (1, 0, 1, 0)

    def build(self) -> None:
        self.r, self.a = self.shuffled(D, D, "output"), self.free(D, D)

    def forward(self, x: Tensor) -> Any:
        return self.a(torch.tanh(self.r(x)))


NETS: tuple[type[Net], ...] = (
    Control,
    InputPermuted,
    ResidualFromTheInput,
    ResidualBetweenWriters,
    Attention,
    SharedInputAttention,
    PackedAttention,
    RotateHalf,
    ChannelShuffle,
    PReluPerChannel,
    TwoConvolutionsJoined,
    JoinedByKeyword,
    ConstantMadeInForward,
    ScaleAndShift,
    Roll,
    CumulativeSum,
    SoftmaxOverTheAxis,
    SoftmaxByHand,
    ModuleReused,
    WriterReused,
    Tied,
    TiedSparse,
    HiddenReturned,
    HiddenJoined,
    SwiGlu,
    PackedGlu,
    LayerNormBetween,
    GateOfOneColumn,
    DataDependentBranch,
    HeadsRegrouped,
    OutputSide,
    OutputSideActivated,
)
STRUCTURES: tuple[Structure, ...] = (Block(4), NM(m=8), Diagonal(), FanIn())


@dataclass(frozen=True)
class Case:
    net: type[Net]
    structure: Structure = field(default_factory=FanIn)

    def __str__(self) -> str:
        return f"{self.net.__name__}-{self.structure.name}"


TURNS = [Case(net, STRUCTURES[turn // 2 % len(STRUCTURES)]) for turn, net in enumerate(NETS)]
EACH = [Case(net, structure) for net in NETS for structure in STRUCTURES]


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what Inductor would generate code for as it is: every pass runs, no C++ compiler does."""

    def as_it_is(graph: fx.GraphModule, *rest: Any, **keywords: Any) -> Any:
        return make_boxed_func(graph.forward)

    def run(module: fx.GraphModule, examples: Any, options: Any) -> Any:
        return compile_fx(module, [*examples], inner_compile=as_it_is, config_patches=options)

    monkeypatch.setattr(compat, "compile_with_inductor", run)


def compiled(model: Net, kernels: str) -> Callable[..., Any]:
    options: dict[str, Any] = {"verify": "strict", "kernels": kernels}
    return torch.compile(model, backend=padst, fullgraph=model.whole, options=options)


@pytest.mark.parametrize("case", EACH, ids=str)
def test_no_map_is_folded_that_must_stay_and_none_stays_that_folds(case: Case) -> None:
    model = case.net(case.structure).eval()
    report = explain(model, torch.randn(case.net.shape), options={"kernels": "sparse"})
    expected = case.net.gathers
    if isinstance(expected, tuple):
        expected = expected[STRUCTURES.index(case.structure)]
    elif isinstance(case.structure, FanIn):
        expected = 0  # it absorbs any map itself
    assert report.gathers == expected, report
    assert all(verdict.startswith("verified in float64") for verdict in report.verdicts)


@pytest.mark.parametrize("case", TURNS, ids=str)
def test_a_layer_that_runs_dense_absorbs_its_own_map(case: Case) -> None:
    report = explain(case.net(case.structure).eval(), torch.randn(case.net.shape))
    assert {kernel for _, kernel, _ in report.kernels} <= {"dense"}  # nets this small run dense
    assert report.gathers == 0, report


@pytest.mark.parametrize("case", TURNS[::2], ids=str)
def test_compiled_equals_eager(case: Case) -> None:
    model, x = case.net(case.structure).eval(), torch.randn(case.net.shape)
    with torch.no_grad():
        fast = compiled(model, "sparse")
        for scale in (1.0, -2.0):
            expected = model(scale * x)
            torch.testing.assert_close(fast(scale * x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", TURNS, ids=str)
@pytest.mark.usefixtures("uncompiled")
def test_folded_inference_equals_eager_in_double_precision(case: Case) -> None:
    model, x = case.net(case.structure).eval().double(), torch.randn(case.net.shape).double()
    with torch.no_grad():
        for kernels in ("auto", "sparse"):
            fast = compiled(model, kernels)
            torch.testing.assert_close(fast(x), model(x), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("case", TURNS, ids=str)
@pytest.mark.usefixtures("uncompiled")
def test_gradients_equal_eager_in_double_precision(case: Case) -> None:
    model = case.net(case.structure).train().double()
    x = torch.randn(case.net.shape, dtype=torch.float64, requires_grad=True)

    def gradients(call: Callable[..., Any]) -> tuple[Tensor, ...]:
        results = call(x)
        total = sum(
            r.square().sum() for r in (results if isinstance(results, tuple) else [results])
        )
        assert isinstance(total, Tensor)
        return torch.autograd.grad(total, [x, *model.parameters()])

    for one, two in zip(gradients(compiled(model, "sparse")), gradients(model), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)
