"""Capture an inference graph in ATen, run passes on it, compare the result with the capture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from padst_compiler import compat
from padst_compiler.rewrite import Facts, Pass, Report, run_pipeline
from padst_compiler.verify import compare

__all__ = ["Folded", "fold"]


@dataclass
class Folded:
    """A captured inference graph after all passes, before the split into prologue and main.

    Attributes:
        graph_module: takes the inputs of the captured function.
        facts: what was known, and which numbers the passes relied on.
        reports: one per pass, in order.
        verdict: what the comparison with the capture said.
    """

    graph_module: fx.GraphModule
    facts: Facts
    reports: tuple[Report, ...]
    verdict: str

    @property
    def inputs(self) -> list[fx.Node]:
        """The placeholders."""
        return [n for n in self.graph_module.graph.nodes if n.op == "placeholder"]

    @property
    def relied_on(self) -> list[int]:
        """Positions of the inputs whose numbers shaped the graph."""
        return [i for i, node in enumerate(self.inputs) if node in self.facts.read]


def fold(
    function: Callable[..., Any],
    fakes: Sequence[Any],
    examples: Sequence[Any],
    state: Mapping[int, str],
    passes: Sequence[Pass],
    *,
    verify: bool = True,
) -> Folded:
    """Run ``passes`` on the ATen graph of ``function``.

    Args:
        function: takes the inputs positionally.
        fakes: one fake tensor, SymInt or constant an input.
        examples: the real inputs.
        state: positions of Parameters and buffers, with the module that owns each.
        passes: run in order.
        verify: compare with the capture in float64.

    Raises:
        MismatchError: the passes changed what the graph computes.
    """
    captured = compat.trace_aten(function, fakes, functional=True)
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    result: Any = graph.graph_copy(captured.graph, mapping)
    graph.output(result)
    working = fx.GraphModule(captured, graph)  # constants of the capture come along
    mapping = dict(zip(captured.graph.nodes, working.graph.nodes, strict=True))
    written = _written(captured.graph)
    inputs = [n for n in captured.graph.nodes if n.op == "placeholder"]
    kept = {
        i for i in state if inputs[i] not in written and not examples[i].is_inference()
    }  # an inference tensor has no version counter: a write to it could not be noticed
    facts = Facts(
        frozen={mapping[inputs[i]]: examples[i] for i in sorted(kept)},
        names={mapping[inputs[i]]: owner for i, owner in state.items() if owner},
    )
    reports = run_pipeline(passes, working.graph, facts)
    working.recompile()
    verdict = compare(captured, working, examples, kept) if verify else "not verified: switched off"
    return Folded(working, facts, reports, verdict)


def _written(graph: fx.Graph) -> set[object]:
    """Return the placeholders that a functional graph writes back to."""
    copies = graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    return {node.args[0] for node in copies}
