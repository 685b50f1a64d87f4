"""Every net under every structure: eager, folded, trained and compiled give the same numbers.

The ordinary suite takes part of the cases, another structure from net to net; some are slow, the
rest is exhaustive.
"""

import copy
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch._inductor.config
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from padst_compiler.backend import padst
from padst_compiler.structures import Structure

from . import attention, chains, convolutions, effects, norms, sharing, streams, views
from .net import STRUCTURES, Net, expected, nets, reference

FAMILIES = (attention, chains, convolutions, effects, norms, sharing, streams, views)
NETS = sorted(nets(), key=lambda net: net.__name__)


@dataclass(frozen=True)
class Case:
    net: type[Net]
    structure: Structure

    def __str__(self) -> str:
        return f"{self.net.__name__}-{self.structure.name}"

    def build(self, dtype: torch.dtype, train: bool = False) -> tuple[Net, tuple[Any, ...]]:
        torch.manual_seed(0)
        model = self.net(self.structure).to(dtype).train(train)
        return model, model.inputs(dtype)


def cases(step: int, start: int = 0, slow: int = 1) -> list[Any]:
    """Return all cases; one of each ``step``-th net is in CI, each ``slow``-th of it ordinary."""
    found = []
    for position, net in enumerate(NETS):
        for turn, structure in enumerate(STRUCTURES):
            chosen = position % step == start and turn == position // step % len(STRUCTURES)
            mark = pytest.mark.slow if chosen else pytest.mark.exhaustive
            marks = () if chosen and position // step % slow == 0 else (mark,)
            case = Case(net, structure)
            found.append(pytest.param(case, marks=marks, id=str(case)))
    return found


def run(call: Callable[..., Any], inputs: tuple[Any, ...]) -> Any:
    """Call on copies of the inputs, with the same random numbers each time."""
    torch.manual_seed(1)
    kept = [copied(t) for t in inputs]
    return call(*kept), kept


def copied(tensor: Tensor) -> Tensor:
    copy = tensor.detach().clone(memory_format=torch.preserve_format)
    return copy.requires_grad_(tensor.requires_grad)


def same(one: Any, two: Any, tolerance: float) -> None:
    torch.testing.assert_close(one, two, rtol=tolerance, atol=tolerance, equal_nan=True)


@contextmanager
def reported() -> Iterator[list[tuple[Any, ...]]]:
    """Record what the backend says of every graph: ``(pass, fired, left)`` and ``(verdict,)``."""
    said: list[tuple[Any, ...]] = []

    class Record(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            assert isinstance(record.args, tuple)
            said.append(record.args)

    log, handler = logging.getLogger("padst_compiler.backend"), Record()
    before = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield said
    finally:
        log.removeHandler(handler)
        log.setLevel(before)


def compiled(model: Net, **options: Any) -> Callable[..., Any]:
    options = {"verify": "strict", "kernels": "sparse", "codegen": "off", **options}
    return torch.compile(model, backend=padst, fullgraph=model.whole, options=options)


def test_the_zoo_is_large_and_every_family_is_in_it() -> None:
    assert len(NETS) >= 200
    homes = {net.__module__ for net in NETS}
    assert homes == {family.__name__ for family in FAMILIES}
    names = [net.__name__ for net in NETS]
    assert len(names) == len(set(names))


def test_what_must_remain_says_why_and_the_present_passes_leave_no_less() -> None:
    for net in NETS:
        for structure in STRUCTURES:
            ideal = expected(net.gathers, structure)
            assert bool(net.why) or not ideal, net
            if net.today is not None:
                assert expected(net.today, structure) >= ideal, net
        assert net.today is None or net.today != net.gathers, f"{net}: leave today out"


@pytest.mark.parametrize("case", cases(3, slow=3))
def test_folding(case: Case) -> None:
    """No map is folded that must stay, none stays that folds, and the results are right."""
    model, inputs = case.build(torch.float32)
    other = copy.deepcopy(model)  # some nets write to their buffers
    with torch.no_grad(), reported() as said:
        same(run(compiled(model), inputs), run(other, inputs), 1e-4)
    left = sum(row[2] for row in said if row[0] == "lower_maps")
    today = case.net.gathers if case.net.today is None else case.net.today
    assert left == expected(today, case.structure)
    verdicts = [str(row[0]) for row in said if len(row) == 1]
    expect = "not verified: native_dropout" if case.net.random else "verified in float64"
    assert verdicts and all(verdict.startswith(expect) for verdict in verdicts)


@pytest.mark.parametrize("case", cases(1))
def test_eager_equals_the_dense_reference(case: Case) -> None:
    model, inputs = case.build(torch.float64)
    with torch.no_grad():
        same(run(reference(model), inputs), run(model, inputs), model.tolerance)


@pytest.mark.parametrize("case", cases(18, 1, slow=2))
def test_folding_in_double_precision(case: Case) -> None:
    for kernels in ("auto", "sparse"):
        torch._dynamo.reset()
        model, inputs = case.build(torch.float64)
        other = copy.deepcopy(model)
        with torch.no_grad():
            result = run(compiled(model, kernels=kernels), inputs)
            same(result, run(other, inputs), model.tolerance)


def step(model: Net, call: Callable[..., Any], inputs: tuple[Any, ...]) -> list[Any]:
    """Return the outputs, all gradients, the inputs and the buffers after one step."""
    wanted = [t.requires_grad_() if t.is_floating_point() else t for t in map(copied, inputs)]
    torch.manual_seed(1)
    outputs = [t for t in tree_leaves(call(*wanted)) if isinstance(t, Tensor)]
    loss = sum(t.square().sum() for t in outputs if t.is_floating_point() and t.requires_grad)
    assert isinstance(loss, Tensor)
    wrt = [t for t in (*wanted, *model.parameters()) if t.requires_grad]
    gradients = torch.autograd.grad(loss, wrt, allow_unused=True)
    return [*outputs, *gradients, *wanted, *model.buffers()]


@pytest.mark.parametrize("case", cases(12, 5, slow=3))
def test_a_training_step(case: Case) -> None:
    """The sparse kernels of some structures take float32 only: both types say something."""
    for dtype in (torch.float64, torch.float32):
        torch._dynamo.reset()
        model, inputs = case.build(dtype, train=True)
        other = copy.deepcopy(model)
        tolerance = model.tolerance if dtype is torch.float64 else 3e-4
        with patch.object(torch._inductor.config, "fallback_random", True):  # eager's dropout
            found = step(model, compiled(model), inputs)
        same(found, step(other, other, inputs), tolerance)


def turns(step: int) -> list[Any]:
    """Return one case a net, another structure from net to net."""
    return [
        pytest.param(case := Case(net, STRUCTURES[i // step % 5]), marks=marks, id=str(case))
        for i, net in enumerate(net for net in NETS if not net.random)
        for mark in [pytest.mark.slow if i % step % 50 == 9 else pytest.mark.exhaustive]
        for marks in [() if i % step == 8 else (mark,)]
    ]


@pytest.mark.parametrize("case", turns(100))
def test_through_inductor(case: Case) -> None:
    model, inputs = case.build(torch.float32)
    other = copy.deepcopy(model)
    with torch.no_grad():
        fast = compiled(model, codegen="inductor")
        for _ in range(2):
            same(run(fast, inputs), run(other, inputs), 1e-4)


@pytest.mark.parametrize("net", [net for net in NETS if not net.whole], ids=lambda n: n.__name__)
def test_as_many_graphs_as_without_us(net: type[Net]) -> None:
    """Whole nets compile with ``fullgraph``; these break, with us where they would without."""
    counts = []
    for ours in (True, False):
        model, inputs = Case(net, STRUCTURES[0]).build(torch.float32)
        count = []

        def backend(module: fx.GraphModule, examples: list[Any], ours: bool = ours) -> Any:
            count.append(module)  # noqa: B023
            return padst(module, examples, options={"codegen": "off"}) if ours else module.forward

        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(model if ours else reference(model).float(), backend=backend)(*inputs)
        counts.append(len(count))
    assert counts[0] <= counts[1]


@pytest.mark.parametrize(
    "case",
    [Case(chains.Control, s) for s in STRUCTURES] + [Case(chains.SwiGlu, STRUCTURES[0])],
    ids=str,
)
def test_any_batch_size_in_one_graph(case: Case) -> None:
    model, _ = case.build(torch.float32)
    seen = []

    def backend(module: fx.GraphModule, examples: list[Any]) -> Any:
        seen.append(module)
        return padst(module, examples, options={"codegen": "off", "verify": "strict"})

    fast = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for batch in (2, 7, 33):
            x = torch.randn(batch, 3, 16)
            same(fast(x), model(x), 1e-4)
    assert len(seen) == 1


@pytest.mark.parametrize(
    "case",
    [
        Case(n, s)
        for n, s in zip((chains.Control, attention.Attention) * 3, STRUCTURES, strict=False)
    ],
    ids=str,
)
def test_bfloat16(case: Case) -> None:
    model, inputs = case.build(torch.bfloat16)
    with torch.no_grad():
        result = compiled(model)(*inputs)
        assert result.dtype is torch.bfloat16
        wide = copy.deepcopy(model).double()(*(t.double() for t in inputs))
        torch.testing.assert_close(result.double(), wide, rtol=5e-2, atol=5e-2)


def test_nothing_is_folded_where_it_is_switched_off() -> None:
    model, inputs = Case(chains.Control, STRUCTURES[0]).build(torch.float32)
    with torch.no_grad(), warnings.catch_warnings(), reported() as said:
        warnings.simplefilter("error")
        same(compiled(model, fold="off")(*inputs), model(*inputs), 1e-4)
    assert sum(row[2] for row in said if row[0] == "lower_maps") == 1
