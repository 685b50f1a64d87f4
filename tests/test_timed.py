"""``kernels="timed"`` from end to end: right numbers, timed once, in inference and in training."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch._functorch._aot_autograd.utils import make_boxed_func
from torch._inductor.compile_fx import compile_fx
from torch.nn import functional as F

from padst_compiler import compat
from padst_compiler.backend import WAYS, padst
from padst_compiler.explanation import explain
from padst_compiler.formulation import Formulation
from padst_compiler.index_map import IndexMap
from padst_compiler.kernels import CANDIDATES
from padst_compiler.layers import SparseLayer, SparseLinear
from padst_compiler.ops import LINEAR
from padst_compiler.permutation import FixedPermutation
from padst_compiler.stopwatch import Stopwatch
from padst_compiler.structures import Block, Diagonal, FanIn, Shape, Structure

TIMED: dict[str, Any] = {"kernels": "timed", "verify": "strict"}


def sparse(inputs: int, outputs: int, structure: Structure, side: str) -> SparseLayer:
    shape, size = Shape(outputs, inputs), inputs if side == "input" else outputs
    indices = structure.select(torch.rand(outputs, inputs), structure.kept(shape, 0.75))
    table = FixedPermutation(IndexMap.of(torch.randperm(size)))
    return SparseLinear.adopt(nn.Linear(inputs, outputs), structure, indices, table, side)


class Mlp(nn.Module):
    def __init__(self, structure: Structure = Block(8)) -> None:  # noqa: B008
        super().__init__()
        self.fc1 = sparse(16, 32, structure, "output")
        self.fc2 = sparse(32, 16, structure, "input")

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return y


def compiled(model: nn.Module, **options: Any) -> Callable[..., Any]:
    torch.compiler.reset()
    result: Callable[..., Any] = torch.compile(
        model, backend=padst, fullgraph=True, options={**TIMED, **options}
    )
    return result


def same(one: Any, two: Any) -> None:
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def step(run: Callable[..., Tensor], model: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    y = run(x)
    return y, *torch.autograd.grad(y.square().sum(), list(model.parameters()))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Start with no timings."""
    monkeypatch.setattr("padst_compiler.timings.inductor_cache", lambda: tmp_path)
    return tmp_path / "padst" / "timings"


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return the sites that are timed, as they are."""
    seen: list[str] = []
    run = Stopwatch._run

    def record(self: Stopwatch, contest: Any, step: Any) -> Any:
        seen.append(str(contest))
        return run(self, contest, step)

    monkeypatch.setattr(Stopwatch, "_run", record)
    return seen


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run what Inductor would generate code for as it is."""

    def as_it_is(graph: fx.GraphModule, *rest: Any, **keywords: Any) -> Any:
        return make_boxed_func(graph.forward)

    def run(module: fx.GraphModule, examples: Any, options: Any) -> Any:
        return compile_fx(module, [*examples], inner_compile=as_it_is, config_patches=options)

    with monkeypatch.context() as patch:
        patch.setattr(compat, "compile_with_inductor", run)
        patch.setattr("padst_compiler.stopwatch.SECONDS", 1e-4)
        patch.setattr("padst_compiler.measure.SWEPT", 1 << 12)
        yield


uses_aten = pytest.mark.usefixtures("uncompiled")


def timed_twice(model: nn.Module, x: Tensor, timed: list[str]) -> list[int]:
    """Infer and train, twice; return how much had been timed after each."""
    counts = []
    for _ in range(2):
        with torch.no_grad():
            same(compiled(model)(x), model(x))
        counts.append(len(timed))
        same(step(compiled(model), model, x), step(model, model, x))
        counts.append(len(timed))
    return counts


@pytest.mark.parametrize(
    "structure",
    [Block(8), *(pytest.param(s, marks=pytest.mark.slow) for s in (FanIn(), Diagonal()))],
    ids=str,
)
@uses_aten
def test_inference_and_training_equal_eager_and_are_timed_once(
    structure: Structure, timed: list[str], cache: Path
) -> None:
    model, x = Mlp(structure), torch.randn(9, 16)
    counts = timed_twice(model, x, timed)
    assert counts[0] == 2
    assert counts[1] >= 4  # the weights are not frozen, and gradients have formulations too
    assert counts[1] == counts[2] == counts[3] == len(list(cache.iterdir()))


@uses_aten
def test_explain_shows_what_was_timed_and_what_the_compiler_will_find(timed: list[str]) -> None:
    model, x = Mlp().eval(), torch.randn(9, 16)
    first, again = (explain(model, x, options=TIMED) for _ in range(2))
    assert [site for site, _, _ in first.kernels] == ["fc1", "fc2"]
    for (_, kernel, why), (_, later, said) in zip(first.kernels, again.kernels, strict=True):
        assert kernel == later
        assert "timed " in why and " against " in why
        assert said == f"{why}, cached"
    with torch.no_grad():
        compiled(model)(x)
    assert len(timed) == 2


@pytest.mark.slow
@uses_aten
def test_other_options_of_inductor_are_timed_anew(timed: list[str]) -> None:
    model, x = Mlp().eval(), torch.randn(9, 16)
    with torch.no_grad():
        for options, count in (({}, 2), ({"max_fusion_size": 7}, 4), ({"max_fusion_size": 7}, 4)):
            same(compiled(model, **options)(x), model(x))
            assert len(timed) == count


@uses_aten
def test_a_symbolic_batch_is_timed_at_the_size_that_was_seen(timed: list[str]) -> None:
    model = Mlp().eval()
    torch.compiler.reset()
    fast = torch.compile(model, backend=padst, dynamic=True, options=dict(TIMED))
    with torch.no_grad():
        for size in (9, 5, 30):
            x = torch.randn(size, 16)
            same(fast(x), model(x))
    assert sorted(timed) == ["block_linear 16x32, 9 tokens", "block_linear 32x16, 9 tokens"]


@uses_aten
def test_new_permutations_are_folded_without_timing(
    timed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused() -> Path:
        raise PermissionError

    monkeypatch.setattr("padst_compiler.timings.inductor_cache", refused)  # nothing is kept
    model, other, x = Mlp().eval(), Mlp().eval(), torch.randn(9, 16)
    fast = compiled(model)
    with torch.no_grad():
        same(fast(x), model(x))
        model.load_state_dict(other.state_dict())
        same(fast(x), other(x))
    assert len(timed) == 2


@pytest.mark.parametrize("training", [False, True])
@uses_aten
def test_a_wrong_formulation_is_left_out_or_raised(
    monkeypatch: pytest.MonkeyPatch, training: bool
) -> None:
    op = LINEAR["fan_in"]
    dense = CANDIDATES[op][-1]
    wrong = Formulation("wrong", lambda *given: 2.0 * dense.run(*given), lambda _: 1.0)
    monkeypatch.setitem(WAYS, "inductor", {**CANDIDATES, op: (wrong, dense)})
    model, x = Mlp(FanIn()), torch.randn(9, 16)
    with torch.set_grad_enabled(training):
        with pytest.warns(UserWarning, match="wrong of fan_in_linear .* is not used") as said:
            same(compiled(model, verify=True)(x), model(x))
        assert len(said) == 2
        with pytest.raises(Exception, match=r"wrong of fan_in.* it disagrees with the reference"):
            compiled(model)(x)


@uses_aten
def test_max_autotune_times_unless_told_otherwise(timed: list[str]) -> None:
    model, x = Mlp().eval(), torch.randn(9, 16)
    for options, count in (({"kernels": "auto"}, 0), ({}, 2)):
        torch.compiler.reset()
        keywords: Any = {"mode": "max-autotune-no-cudagraphs", "backend": padst}
        with torch.no_grad():  # torch.compile takes a mode or options, our backend both
            module = torch.compile(model, **keywords) if not options else compiled(model, **options)
            same(module(x), model(x))
        assert len(timed) == count


def test_a_graph_in_inductors_cache_is_for_this_machine_and_these_threads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module, ids = fx.symbolic_trace(nn.ReLU()), []

    def record(graph: fx.GraphModule, examples: Any, options: dict[str, Any]) -> Any:
        ids.append(options["joint_custom_pre_pass"].uuid())
        return graph.forward

    monkeypatch.setattr(compat, "compile_with_inductor", record)
    for kernels in ("timed", "timed", "auto"):
        padst(module, [torch.ones(3)], options={"kernels": kernels})
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    padst(module, [torch.ones(3)], options={"kernels": "timed"})
    monkeypatch.setattr("padst_compiler.stopwatch.processor", lambda: "another CPU")
    padst(module, [torch.ones(3)], options={"kernels": "timed"})
    assert ids[0] == ids[1]
    assert len(set(ids)) == 4


@pytest.mark.slow
def test_with_inductor_too(timed: list[str]) -> None:
    model, x = Mlp(Diagonal()), torch.randn(9, 16)
    counts = timed_twice(model, x, timed)
    assert counts[0] == 2  # what was chosen for the folded graph is not chosen again by Inductor's
    assert counts[1] == counts[2] == counts[3] > 2
