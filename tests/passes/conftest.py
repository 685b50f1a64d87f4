"""One way to try a pass: trace a few lines, run it, compare operators and float64 numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext

import padst_compiler.recorder  # noqa: F401  (padst::watch)
from padst_compiler.compat import trace_aten
from padst_compiler.fold import fold
from padst_compiler.rewrite import Pass

MOVES = (torch.ops.padst.permute.default, torch.ops.aten.index_select.default)


@dataclass(frozen=True)
class Rewritten:
    """The operators that depend on an input before and after, and what the last pass said."""

    before: list[str]
    after: list[str]
    fired: list[str]
    left: list[str]
    where: list[str]
    graph: fx.Graph

    moves: int
    """How often data that depend on an input are moved."""


def operators(graph: fx.Graph, inputs: int) -> list[str]:
    """Name the operators that read one of the first placeholders, directly or not."""
    return [getattr(node.target, "__name__", "").split(".")[0] for node in live(graph, inputs)]


def live(graph: fx.Graph, inputs: int) -> list[fx.Node]:
    """Return the operators that read one of the first placeholders, directly or not."""
    seen = set([node for node in graph.nodes if node.op == "placeholder"][:inputs])
    found = []
    for node in graph.nodes:
        if node.op == "call_function" and any(source in seen for source in node.all_input_nodes):
            seen.add(node)
            found.append(node)
    return found


def rewritten(
    steps: Pass | Sequence[Pass],
    function: Callable[..., object],
    *inputs: Tensor,
    dynamic: bool = False,
    compare: bool = True,
    **frozen: Tensor,
) -> Rewritten:
    """Run passes on ``function(*inputs, **frozen)``; keywords are frozen, and name their owners."""
    given, names = [*inputs, *frozen.values()], list(frozen)

    def positional(*tensors: Tensor) -> object:
        named = dict(zip(names, tensors[len(inputs) :], strict=True))
        return function(*tensors[: len(inputs)], **named)

    mode = FakeTensorMode(shape_env=ShapeEnv() if dynamic else None)
    batch: Any = StatelessSymbolicContext(
        [DimDynamic.DYNAMIC, *[DimDynamic.STATIC] * (inputs[0].dim() - 1)]
    )
    fakes = [mode.from_tensor(t, static_shapes=not dynamic) for t in inputs]
    if dynamic:
        fakes = [mode.from_tensor(t, symbolic_context=batch) for t in inputs]
    fakes += [mode.from_tensor(t, static_shapes=True) for t in frozen.values()]
    captured = trace_aten(positional, fakes, functional=True)
    state = {len(inputs) + position: name for position, name in enumerate(names)}
    pipeline = steps if isinstance(steps, Sequence) else (steps,)
    folded = fold(positional, fakes, given, state, pipeline, verify=False)
    if compare:
        exact = all(t.dtype in (torch.float64, torch.int64, torch.int32) for t in given)
        limit = 1e-12 if exact else 2e-2
        expected, result = function(*inputs, **frozen), folded.graph_module(*given)
        torch.testing.assert_close(result, expected, rtol=limit, atol=limit)
    last = folded.reports[-1]
    return Rewritten(
        operators(captured.graph, len(inputs)),
        operators(folded.graph_module.graph, len(inputs)),
        [rule.what for rule in last.fired],
        [refusal.why for refusal in last.left],
        [rule.where for rule in last.fired] + [refusal.where for refusal in last.left],
        folded.graph_module.graph,
        sum(node.target in MOVES for node in live(folded.graph_module.graph, len(inputs))),
    )


@pytest.fixture(scope="session")
def rewrite() -> Callable[..., Rewritten]:
    """Return the function that tries a pass."""
    return rewritten
