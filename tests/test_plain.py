import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from padst_compiler import compat
from padst_compiler.backend import padst
from padst_compiler.index_map import IndexMap
from padst_compiler.kernels import CANDIDATES
from padst_compiler.layers import SparseLinear
from padst_compiler.permutation import FixedPermutation
from padst_compiler.plain import compile_plain, lacks_compiler
from padst_compiler.rewrite import PassError
from padst_compiler.sparsify import sparsify
from padst_compiler.structures import Block, Shape
from padst_compiler.training import harden

OFF = {"codegen": "off", "kernels": "sparse"}
UNTOUCHED = "padst compiles without its passes"


def sparse() -> Any:
    block = Block(4)
    indices = block.select(torch.rand(16, 16), block.kept(Shape(16, 16), 0.75))
    table = FixedPermutation(IndexMap.of(torch.randperm(16)))
    return SparseLinear.adopt(nn.Linear(16, 16), block, indices, table, "input")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(16, 16), nn.GELU(), sparse()).double()


def off(model: nn.Module, **options: Any) -> Callable[..., Any]:
    call: Callable[..., Any] = torch.compile(
        model, backend=padst, fullgraph=True, options={**OFF, **options}
    )
    return call


@pytest.fixture(autouse=True)
def _no_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> Any:
        raise AssertionError("Inductor was called")

    monkeypatch.setattr(compat, "compile_with_inductor", never)


def test_inference_runs_the_folded_graph() -> None:
    model, x = net().eval(), torch.randn(5, 16, dtype=torch.float64)
    fast = off(model, verify="strict")
    with torch.no_grad():
        torch.testing.assert_close(fast(x), model(x), rtol=1e-12, atol=1e-12)
        model.get_parameter("0.weight").mul_(2)  # work done once on frozen weights is done again
        torch.testing.assert_close(fast(x), model(x), rtol=1e-12, atol=1e-12)


def test_a_training_step_has_the_outputs_and_gradients_of_eager() -> None:
    model = net()
    x = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    results = []
    for call in (off(model), model):
        y = call(x)
        results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-12, atol=1e-12)


def test_writes_to_inputs_and_to_buffers_arrive() -> None:
    class Counts(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("seen", torch.zeros(()))
            self.layer = net()

        def forward(self, x: Tensor) -> Any:
            self.seen += 1
            x.mul_(2)
            return self.layer(x)

    model, plain = Counts(), torch.ones(2, 16, dtype=torch.float64)
    fast, other = off(model), plain.clone()
    one, two = fast(plain), model.layer(2 * other)
    torch.testing.assert_close(one, two)
    assert float(model.seen) == 1 and torch.equal(plain, 2 * other)


def test_the_joint_pass_sees_forward_and_backward_together() -> None:
    seen: list[int] = []

    def count(graph: fx.Graph) -> None:
        tangents = [n for n in graph.find_nodes(op="placeholder") if "tangents" in str(n.target)]
        seen.append(len(tangents))

    def backend(module: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        return compile_plain(module, examples, count)

    fast = torch.compile(torch.sin, backend=backend)
    fast(torch.ones(3, requires_grad=True)).sum().backward()
    with torch.no_grad():
        fast(torch.ones(3))
    assert seen == [1, 0]


@pytest.mark.parametrize("grad", [True, False])
def test_a_failing_pass_costs_speed_and_never_the_result(
    grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: Any) -> Any:
        raise PassError("Pass choose_formulation failed (after: none)")

    monkeypatch.setattr("padst_compiler.backend.run_pipeline", broken)
    monkeypatch.setattr("padst_compiler.fold.run_pipeline", broken)
    model, x = net(), torch.randn(5, 16, dtype=torch.float64)
    with torch.set_grad_enabled(grad):
        with pytest.warns(UserWarning, match=UNTOUCHED):
            y = off(model)(x)
        torch.testing.assert_close(y, model(x))
        torch._dynamo.reset()
        with pytest.raises(Exception, match="Pass choose_formulation failed"):
            off(model, verify="strict")(x)


def test_other_peoples_errors_stay_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arguments: Any) -> Any:
        raise OSError("no disk")

    monkeypatch.setattr("padst_compiler.backend.compile_plain", broken)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Exception, match="no disk"):
            off(net())(torch.randn(5, 16, dtype=torch.float64))


# -- no compiler -----------------------------------------------------------------------------------

NOWHERE: dict[str, Any] = {"cpp.cxx": "no-such-compiler"}
PROGRAM = """
import warnings, torch, padst_compiler as padst
from torch import nn

model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))
padst.harden(padst.sparsify(model, structure="block:16", sparsity=0.5, permutation="random"))
fast, x = torch.compile(model, backend="padst"), torch.randn(8, 32)
for inference in (True, False):
    with warnings.catch_warnings(record=True) as seen, torch.inference_mode(inference):
        warnings.simplefilter("always")
        y = fast(x)
    assert torch.allclose(y, model(x), atol=1e-5)
    said = [str(w.message) for w in seen if "C++ compiler" in str(w.message)]
    assert len(said) == 1, seen
y.sum().backward()
"""


@pytest.mark.parametrize("structure", ["block:4", "fan_in", "nm:4", "diagonal", "unstructured"])
@pytest.mark.parametrize("kernels", ["auto", "sparse"])
def test_without_a_compiler_both_graphs_run_and_say_so_once(structure: str, kernels: str) -> None:
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 16))
    harden(sparsify(model, structure=structure, sparsity=0.5, permutation="random"))
    options = {**NOWHERE, "kernels": kernels, "verify": "strict"}
    fast = torch.compile(model, backend=padst, fullgraph=True, options=options)
    x = torch.randn(9, 16, requires_grad=True)
    with torch.no_grad(), pytest.warns(UserWarning, match=r"Expected a C\+\+ comp") as seen:
        torch.testing.assert_close(fast(x), model(x))
    assert len(seen) == 1
    results = []
    with pytest.warns(UserWarning, match=r"Expected a C\+\+ comp") as seen:
        for call in (fast, model):
            y = call(x)
            results.append([y, *torch.autograd.grad(y.square().sum(), [x, *model.parameters()])])
    assert len(seen) == 1
    for one, two in zip(*results, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("grad", [True, False])
def test_without_a_compiler_no_operator_waits_for_a_kernel(
    grad: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(geometry: Any) -> float:
        raise AssertionError(f"a kernel was asked for: {geometry}")

    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    harden(sparsify(model, structure="block:32", sparsity=0.75, permutation="random"))
    x = torch.randn(512, 256)
    kernels = {way for ways in CANDIDATES.values() for way in ways if "kernel" in way.name}
    for way in kernels:
        monkeypatch.setitem(vars(way), "cost", never)
    with torch.set_grad_enabled(grad), pytest.warns(UserWarning, match="compiler"):
        y = torch.compile(model, backend=padst, options=NOWHERE)(x)
    torch.testing.assert_close(y, model(x))


def test_one_that_is_asked_for_warns_of_nothing() -> None:
    model, x = net().eval(), torch.randn(5, 16, dtype=torch.float64)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        fast = torch.compile(model, backend=padst, options={"codegen": "plain", **NOWHERE})
        torch.testing.assert_close(fast(x), model(x), rtol=1e-12, atol=1e-12)


def test_only_graphs_on_the_cpu_ask_for_a_compiler() -> None:
    assert not lacks_compiler([torch.ones(2, device="meta"), 3], NOWHERE)
    assert not lacks_compiler([torch.ones(2), 3], {})
    for examples in ([torch.ones(2)], [3], []):
        with pytest.warns(UserWarning, match="Install gcc or clang"):
            assert lacks_compiler(examples, NOWHERE)


@pytest.mark.slow
def test_a_machine_without_a_compiler() -> None:
    nothing = {"PATH": "", "CXX": "no-such-compiler"}
    subprocess.run([sys.executable, "-c", PROGRAM], check=True, env={**os.environ, **nothing})
