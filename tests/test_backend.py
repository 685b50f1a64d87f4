import copy
import importlib.metadata
import os
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch.nn import functional as F

from padst_compiler import compat
from padst_compiler.backend import Settings, padst
from padst_compiler.index_map import IndexMap
from padst_compiler.layers import SparseLayer, SparseLinear
from padst_compiler.passes import inference_passes
from padst_compiler.permutation import FixedPermutation
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation
from padst_compiler.rewrite import Facts, Report
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured

ROOT = Path(__file__).resolve().parents[1]
ALL = (Block(8), NM(8), Diagonal(), FanIn(), Unstructured())
SOME = [ALL[0], *(pytest.param(s, marks=pytest.mark.slow) for s in ALL[1:])]
Structures = pytest.mark.parametrize("structure", ALL, ids=lambda s: s.name)
SomeOrdinary = pytest.mark.parametrize("structure", SOME, ids=lambda s: s.name)
STRICT, SPARSE = {"verify": "strict"}, {"verify": "strict", "kernels": "sparse"}
UNFOLDED = "padst compiles without folding"
CHANGED = "A permutation that was folded at compile time has changed"


def sparse(inputs: int, outputs: int, structure: Structure, side: str = "") -> SparseLayer:
    shape, size = Shape(outputs, inputs), inputs if side == "input" else outputs
    table = FixedPermutation(IndexMap.of(torch.randperm(size))) if side else None
    indices = structure.select(torch.rand(outputs, inputs), structure.kept(shape, 0.75))
    dense = nn.Linear(inputs, outputs)
    return SparseLinear.adopt(dense, structure, indices, table, side or "input")


class Mlp(nn.Module):
    def __init__(self, structure: Structure = Block(8)) -> None:  # noqa: B008
        super().__init__()
        self.fc1 = sparse(16, 32, structure, "output")
        self.fc2 = sparse(32, 16, structure, "input")
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.fc2(F.gelu(self.fc1(x))))
        return y


def compiled(model: nn.Module, **keywords: Any) -> Callable[..., Any]:
    result: Callable[..., Any] = torch.compile(model, backend=padst, fullgraph=True, **keywords)
    return result


def same(one: Callable[..., Any], two: Callable[..., Any], *inputs: Tensor) -> None:
    torch.testing.assert_close(one(*inputs), two(*inputs), rtol=1e-4, atol=1e-5)


@pytest.fixture
def silent() -> Iterator[None]:
    """Let a warning of ours fail the test."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=UNFOLDED)
        warnings.filterwarnings("error", message=CHANGED)
        yield


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Run what Inductor would generate code for as it is: every pass runs, no C++ compiler does."""

    def as_it_is(graph: fx.GraphModule, *rest: Any, **keywords: Any) -> Any:
        return make_boxed_func(graph.forward)

    def run(module: fx.GraphModule, examples: Any, options: Any) -> Any:
        return compile_fx(module, [*examples], inner_compile=as_it_is, config_patches=options)

    monkeypatch.setattr(compat, "compile_with_inductor", run)


uses_aten = pytest.mark.usefixtures("uncompiled")


# -- found by name ---------------------------------------------------------------------------------


def entry() -> importlib.metadata.EntryPoint:
    text = (ROOT / "pyproject.toml").read_text("utf-8")
    section = text.split("[project.entry-points.torch_dynamo_backends]\n")[1]
    name, value = re.findall(r'^(\w+) = "(.+)"$', section, re.MULTILINE)[0]
    return importlib.metadata.EntryPoint(name, value, "torch_dynamo_backends")


def test_the_entry_point_is_the_backend() -> None:
    assert entry().name == "padst"
    assert entry().load() is padst
    assert callable(vars(padst)["reset"])


@pytest.mark.slow
def test_torch_finds_an_installed_backend_by_name(tmp_path: Path) -> None:
    info = tmp_path / "padst_compiler-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: padst-compiler\nVersion: 0\n")
    (info / "entry_points.txt").write_text(
        f"[torch_dynamo_backends]\n{entry().name} = {entry().value}\n"
    )
    program = """
import sys, torch
assert "padst" in torch._dynamo.list_backends()
assert "padst_compiler" not in sys.modules
model = torch.nn.Linear(3, 3)
compiled = torch.compile(model, backend="padst", options={"verify": "strict"})
with torch.no_grad():
    torch.testing.assert_close(compiled(torch.ones(2, 3)), model(torch.ones(2, 3)))
assert "padst_compiler" in sys.modules
"""
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {**os.environ, "PYTHONPATH": path}
    subprocess.run([sys.executable, "-c", program], check=True, env=environment)


# -- options and modes -----------------------------------------------------------------------------


def test_our_options_are_split_from_inductors() -> None:
    given = {"fold": "off", "verify": "strict", "max_autotune": True, "epilogue-fusion": False}
    assert Settings.parse(given) == (
        Settings(fold="off", verify="strict"),
        {"max_autotune": True, "epilogue_fusion": False},
    )
    assert Settings.parse(None) == (Settings(), {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fould": "off"}, r"Expected an option of \['codegen', 'fold', .*\].*Got 'fould'"),
        ({"fold": "on"}, r"Expected option 'fold' to be one of \('safe', 'off'\)\. Got 'on'"),
        ({"verify": "loose"}, "Expected option 'verify' .*Got 'loose'"),
        ({"kernels": "fast"}, "Expected option 'kernels' .*Got 'fast'"),
        ({"verify": 2}, "Expected option 'verify' .*Got 2"),
        ({"kernels": ["dense"]}, "Expected option 'kernels' .*Got"),
    ],
)
def test_unknown_options_and_values_are_refused(options: dict[str, Any], message: str) -> None:
    module = fx.symbolic_trace(nn.ReLU())
    with pytest.raises(ValueError, match=message):
        padst(module, [torch.ones(3)], options=options)
    with pytest.raises(Exception, match=message):
        compiled(Mlp(), options=options)(torch.randn(2, 16))


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Expected a mode of .*Got 'turbo'"):
        padst(fx.symbolic_trace(nn.ReLU()), [torch.ones(3)], mode="turbo")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
@pytest.mark.usefixtures("silent")
def test_modes_compute_the_same(mode: str) -> None:
    model, x = Mlp().eval(), torch.randn(9, 16)
    fast = compiled(model, mode=mode)
    with torch.no_grad():
        same(fast, model, x)
        same(fast, model, -x)


def test_mode_and_options_reach_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    def record(module: fx.GraphModule, examples: Any, options: dict[str, Any]) -> Any:
        seen.append(options)
        return module.forward

    monkeypatch.setattr(compat, "compile_with_inductor", record)
    module = fx.symbolic_trace(nn.ReLU())
    padst(module, [torch.ones(3)], options={"cpp.threads": 1, "fold": "off"})
    padst(module, [torch.ones(3)], mode="max-autotune-no-cudagraphs")
    padst(module, [torch.ones(3)], options={"kernels": "sparse"})
    steps = [options.pop("joint_custom_pre_pass") for options in seen]
    assert all(isinstance(step, compat.CustomGraphPass) for step in steps)
    assert len({step.uuid() for step in steps}) == 3  # our options are part of the cache key
    assert seen == [
        {"cpp.threads": 1},
        torch._inductor.list_mode_options("max-autotune-no-cudagraphs"),
        {},
    ]


# -- inference -------------------------------------------------------------------------------------


@SomeOrdinary
def test_inference_equals_eager(structure: Structure) -> None:
    model = Mlp(structure).eval()
    with torch.no_grad():
        same(compiled(model, options=SPARSE), model, torch.randn(9, 16))


@Structures
@pytest.mark.parametrize("kernels", ["auto", "sparse"])
@uses_aten
def test_inference_in_double_precision_equals_eager(structure: Structure, kernels: str) -> None:
    model, x = Mlp(structure).eval().double(), torch.randn(9, 16, dtype=torch.float64)
    with torch.no_grad():
        fast = compiled(model, options={"verify": "strict", "kernels": kernels})
        torch.testing.assert_close(fast(x), model(x), rtol=1e-10, atol=1e-10)


@Structures
@pytest.mark.usefixtures("silent", "uncompiled")
def test_half_precision_equals_eager(structure: Structure) -> None:
    model, x = Mlp(structure).eval().bfloat16(), torch.randn(9, 16).bfloat16()
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x), rtol=2e-2, atol=2e-2)


@Structures
@pytest.mark.usefixtures("silent", "uncompiled")
def test_autocast_is_folded_and_equals_eager(structure: Structure) -> None:
    model, x = Mlp(structure).eval(), torch.randn(64, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(compiled(model)(x), model(x), rtol=2e-2, atol=2e-2)


@uses_aten
@pytest.mark.parametrize("shape", [(16,), (1, 16), (2, 3, 5, 16), (0, 16)], ids=str)
@pytest.mark.parametrize("structure", [Block(8), FanIn()], ids=lambda s: s.name)
def test_inputs_of_any_rank(structure: Structure, shape: tuple[int, ...]) -> None:
    model = Mlp(structure).eval()
    with torch.no_grad():
        same(compiled(model, options=STRICT), model, torch.randn(shape))


@pytest.mark.parametrize("structure", [Block(8), FanIn(), NM(8)], ids=lambda s: s.name)
def test_a_result_may_be_viewed_inside_the_graph(structure: Structure) -> None:
    model = nn.Sequential(sparse(16, 32, structure), nn.Flatten()).eval()
    with torch.no_grad():
        same(compiled(model, options=SPARSE), model, torch.randn(2, 40, 16))


@Structures
def test_a_result_has_the_strides_of_eager(structure: Structure) -> None:
    model, x = sparse(16, 32, structure).eval(), torch.randn(2, 40, 16)
    with torch.no_grad():
        assert compiled(model, options=SPARSE)(x).stride() == model(x).stride()


@pytest.mark.usefixtures("silent", "uncompiled")
def test_inference_mode_and_no_grad_share_a_model() -> None:
    model, x = Mlp().eval(), torch.randn(9, 16)
    fast = compiled(model)
    with torch.inference_mode():
        same(fast, model, x)
    with torch.no_grad():
        same(fast, model, x)
    same(fast, model, x)


@uses_aten
def test_soft_permutations_compile() -> None:
    model = Mlp().eval()
    model.fc2.permutation = SinkhornPermutation(32, torch.Generator().manual_seed(0))
    with torch.no_grad():
        same(fast := compiled(model, options=STRICT), model, torch.randn(9, 16))
        model.fc2.permutation.logits.normal_()
        same(fast, model, torch.randn(9, 16))


@uses_aten
def test_a_model_that_counts_in_place_keeps_counting() -> None:
    class Counts(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.fc = sparse(16, 16, FanIn(), "input")
            self.norm = nn.BatchNorm1d(16)
            self.register_buffer("seen", torch.zeros(16))

        def forward(self, x: Tensor) -> Tensor:
            self.seen.add_(1)
            h = self.fc(x).tanh_()
            h += self.seen
            y: Tensor = self.norm(h)
            return y

    model = Counts()  # in training mode the norm writes its statistics, also without gradients
    eager = copy.deepcopy(model)
    fast = compiled(model, options=STRICT)
    with torch.no_grad():
        for _ in range(3):
            x = torch.randn(9, 16)
            same(fast, eager, x)
    for name, tensor in eager.state_dict().items():
        torch.testing.assert_close(model.state_dict()[name], tensor)


@pytest.mark.usefixtures("silent", "uncompiled")
def test_two_models_of_one_class_keep_their_folds() -> None:
    one, two, x = Mlp().eval(), Mlp().eval(), torch.randn(9, 16)
    fast = compiled(one), compiled(two)
    with torch.no_grad():
        for call, model in zip(2 * fast, (one, two, one, two), strict=True):
            same(call, model, x)


@pytest.mark.usefixtures("silent", "uncompiled")
def test_blocks_compiled_one_by_one_keep_their_folds() -> None:
    model = nn.Sequential(*(sparse(16, 16, Block(8), "input") for _ in range(3))).eval()
    eager, x = copy.deepcopy(model), torch.randn(9, 16)
    for block in model:
        block.compile(backend=padst)
    with torch.no_grad():
        for _ in range(2):
            same(model, eager, x)


# -- models that are not ours ----------------------------------------------------------------------


def test_a_model_without_sparse_layers_goes_straight_through(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*arguments: Any, **keywords: Any) -> Any:
        raise AssertionError("nothing to fold")

    monkeypatch.setattr("padst_compiler.backend.fold", never)
    model, x = nn.Sequential(nn.Linear(16, 8), nn.GELU(), nn.Linear(8, 4)), torch.randn(9, 16)
    fast = compiled(model, options=STRICT)
    with torch.no_grad():
        same(fast, model, x)
    same(fast, model, x)


# -- training --------------------------------------------------------------------------------------


def gradients(call: Callable[..., Any], model: nn.Module, x: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(call(x).square().sum(), [x, *model.parameters()]))


@Structures
@pytest.mark.parametrize("kernels", ["auto", "sparse"])
@uses_aten
def test_training_in_double_precision_equals_eager(structure: Structure, kernels: str) -> None:
    model, x = Mlp(structure).double(), torch.randn(9, 16, dtype=torch.float64, requires_grad=True)
    fast = compiled(model, options={"kernels": kernels})
    for one, two in zip(gradients(fast, model, x), gradients(model, model, x), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-10, atol=1e-10)


@Structures
@uses_aten
def test_training_takes_any_batch_size_in_one_graph(structure: Structure) -> None:
    model, graphs = Mlp(structure), Count({"kernels": "sparse"})
    fast = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    for batch in (2, 5, 33):
        x = torch.randn(batch, 3, 16, requires_grad=True)
        for one, two in zip(gradients(fast, model, x), gradients(model, model, x), strict=True):
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)
    assert graphs.count == 1


@uses_aten
def test_training_steps_equal_eager_steps() -> None:
    model = Mlp(Block(8)).double()
    eager = copy.deepcopy(model)
    fast = compiled(model)
    ours, theirs = (torch.optim.AdamW(m.parameters(), 1e-2) for m in (model, eager))
    for _ in range(5):
        x = torch.randn(9, 16, dtype=torch.float64)
        for call, optimizer in ((fast, ours), (eager, theirs)):
            call(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    for one, two in zip(model.parameters(), eager.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-8)


@pytest.mark.usefixtures("silent", "uncompiled")
def test_one_compiled_model_trains_and_infers() -> None:
    model, x = Mlp(), torch.randn(9, 16)
    fast, optimizer = compiled(model), torch.optim.SGD(model.parameters(), 0.1)
    for _ in range(3):
        fast(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            same(fast, model, x)


# -- batch sizes -----------------------------------------------------------------------------------


class Count:
    """The backend, counting the graphs that it is asked to compile."""

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.count, self.options = 0, options

    def __call__(self, module: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        self.count += 1
        return padst(module, examples, options=self.options)


@Structures
@pytest.mark.parametrize("tokens", [(), (3,)], ids=["2d", "3d"])
@uses_aten
def test_dynamic_inference_takes_any_batch_size_in_one_graph(
    structure: Structure, tokens: tuple[int, ...]
) -> None:
    model, graphs = Mlp(structure).eval(), Count(SPARSE)
    fast = torch.compile(model, backend=graphs, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (2, 5, 33):
            same(fast, model, torch.randn(batch, *tokens, 16))
    assert graphs.count == 1


@uses_aten
def test_a_second_batch_size_makes_the_batch_symbolic() -> None:
    model, graphs = Mlp().eval(), Count()
    fast = torch.compile(model, backend=graphs, fullgraph=True)
    with torch.no_grad():
        for batch in (4, 5, 9, 33, 64):
            same(fast, model, torch.randn(batch, 16))
    assert graphs.count == 2


# -- writes to frozen tensors ----------------------------------------------------------------------


def replace(model: Mlp) -> None:
    model.fc1.values = nn.Parameter(torch.randn_like(model.fc1.values))


def renew(model: Mlp) -> None:
    """Free the Parameter first: the allocator may hand out its address again."""
    shape = model.fc1.values.shape
    del model.fc1.values
    model.fc1.values = nn.Parameter(torch.randn(shape))


def doubled(model: Mlp) -> dict[str, Tensor]:
    return {name: 2 * t for name, t in model.state_dict().items() if name.endswith("values")}


def move(model: Mlp) -> None:
    shape = model.fc1.shape
    scores = torch.rand(shape.out_features, shape.in_features)
    model.fc1.indices.copy_(model.fc1.structure.select(scores, model.fc1.indices.shape[1]))


WRITES: Mapping[str, Callable[[Mlp], Any]] = {
    "values.copy_": lambda m: m.fc1.values.copy_(torch.randn_like(m.fc1.values)),
    "values.mul_": lambda m: m.fc2.values.mul_(2),
    "bias": lambda m: m.fc1.bias.add_(1) if m.fc1.bias is not None else None,
    "a dense weight": lambda m: m.head.weight.zero_(),
    "indices": move,
    "load_state_dict": lambda m: m.load_state_dict(doubled(m), strict=False),
    "load_state_dict by assignment": lambda m: m.load_state_dict(
        doubled(m), strict=False, assign=True
    ),
    "requires_grad": lambda m: m.requires_grad_(False),
    "a new Parameter": replace,
    "a new Parameter after the old one": renew,
    "another type and back": lambda m: m.double().float(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.usefixtures("silent", "uncompiled")
def test_a_write_is_seen_and_the_fold_stays(write: Callable[[Mlp], Any]) -> None:
    model, x = Mlp().eval(), torch.randn(9, 16)
    fast = compiled(model, options=STRICT)
    with torch.no_grad():
        same(fast, model, x)
        for _ in range(6):
            write(model)
            same(fast, model, x)
            same(fast, model, -x)


PERMUTED: Mapping[str, Callable[[Mlp], Any]] = {
    "copy_": lambda m: m.get_buffer("fc2.permutation.perm").copy_(torch.randperm(32)),
    "load_state_dict": lambda m: m.load_state_dict(Mlp().state_dict()),
    "another module": lambda m: setattr(
        m.fc2, "permutation", FixedPermutation(IndexMap.of(torch.randperm(32)))
    ),
}


@uses_aten
@pytest.mark.parametrize("dropped", [False, True])  # an identity map vanishes for its numbers
@pytest.mark.parametrize("write", PERMUTED.values(), ids=PERMUTED.keys())
def test_a_new_permutation_is_seen(write: Callable[[Mlp], Any], dropped: bool) -> None:
    model, x, perm = Mlp().eval(), torch.randn(9, 16), "fc2.permutation.perm"
    if dropped:
        model.get_buffer(perm).copy_(torch.arange(32))
    fast = compiled(model, options=STRICT)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        same(fast, model, x)
        write(model)
        with pytest.warns(UserWarning, match=CHANGED) if dropped else nullcontext():
            same(fast, model, x)


@pytest.mark.usefixtures("uncompiled")
def test_a_reset_folds_a_new_permutation() -> None:
    model, x = Mlp().eval(), torch.randn(9, 16)
    graphs = Count(STRICT)
    fast = torch.compile(model, backend=graphs)
    with torch.no_grad():
        same(fast, model, x)
        PERMUTED["copy_"](model)
        torch.compiler.reset()
        same(fast, model, x)
    assert graphs.count == 2


@uses_aten
def test_a_copy_and_its_original_go_separate_ways() -> None:
    model, x = Mlp().eval(), torch.randn(9, 16)
    fast: Any = torch.compile(model, backend=padst)
    with torch.no_grad():
        same(fast, model, x)
        twin = copy.deepcopy(fast)
        twin.fc1.values.mul_(2)
        assert not torch.allclose(twin(x), fast(x))
        same(twin, twin._orig_mod, x)
        same(fast, model, x)


@uses_aten
def test_a_derived_result_belongs_to_the_caller() -> None:
    class Shows(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc, self.scale = sparse(16, 16, FanIn(), "input"), nn.Parameter(torch.ones(16))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.fc(x), self.scale * 2

    model, x = Shows().eval(), torch.randn(9, 16)
    fast = compiled(model, options=STRICT)
    with torch.no_grad():
        fast(x)[1].add_(5)
        same(fast, model, x)


# -- a pass with a bug -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Bug:
    """Drop every permutation without folding it, or crash."""

    name: str

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        if self.name == "crash":
            raise KeyError("nothing there")
        for node in graph.find_nodes(op="call_function", target=torch.ops.padst.permute.default):
            node.replace_all_uses_with(node.args[0])
        return Report(self.name)


@pytest.mark.parametrize(
    ("bug", "said"), [("wrong", "relative difference"), ("crash", "Pass crash failed")]
)
@uses_aten
def test_a_pass_with_a_bug_never_makes_wrong_numbers(
    monkeypatch: pytest.MonkeyPatch, bug: str, said: str
) -> None:
    monkeypatch.setattr(
        "padst_compiler.backend.inference_passes",
        lambda *given, **named: (Bug(bug), *inference_passes(*given, **named)),
    )
    model, x = Mlp().eval(), torch.randn(9, 16)
    with torch.no_grad():
        fast = compiled(model)
        with pytest.warns(UserWarning, match=f"{UNFOLDED}.*{said}"):
            same(fast, model, x)
        with pytest.raises(Exception, match=said):
            compiled(model, options=STRICT)(x)
