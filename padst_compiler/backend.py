"""The ``torch.compile`` backend: the one module that knows passes, kernels and Inductor.

Inference (no gradients): the graph is captured in ATen, its permutations are folded into frozen weights,
every structured operator gets its formulation, work on frozen tensors is done once, Inductor compiles
the rest. Training: the same choice of formulations, on Inductor's joint graph.

Options beside Inductor's own: ``fold`` ("safe" or "off"), ``verify`` (True, False or "strict"),
``kernels`` ("auto", "dense" or "sparse").
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from padst_compiler import compat, recorder
from padst_compiler.frozen import FrozenCall, split
from padst_compiler.kernels import CANDIDATES
from padst_compiler.passes import FOLDS, ChooseFormulation, DropWatch
from padst_compiler.rewrite import Facts, Pass, Report, run_pipeline
from padst_compiler.verify import Mismatch, compare

__all__ = ["Folded", "Settings", "fold", "padst"]

log = logging.getLogger(__name__)
assert recorder  # its operators must exist when a cached graph is loaded

_CHOICES: dict[str, tuple[object, ...]] = {
    "fold": ("safe", "off"),
    "verify": (True, False, "strict"),
    "kernels": ("auto", "dense", "sparse"),
}


@dataclass(frozen=True)
class Settings:
    """Our own compile options."""

    fold: str = "safe"
    verify: bool | str = True
    kernels: str = "auto"

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> tuple[Settings, dict[str, Any]]:
        """Split ``options`` into ours and Inductor's.

        Raises:
            ValueError: an unknown option or value.
        """
        ours: dict[str, Any] = {}
        theirs: dict[str, Any] = {}
        for key, value in (options or {}).items():
            if key in _CHOICES:
                if value not in _CHOICES[key]:
                    raise ValueError(
                        f"Expected option {key!r} to be one of {_CHOICES[key]}. Got {value!r}. "
                        "Leave it out for the default."
                    )
                ours[key] = value
            elif key.replace("-", "_") in compat.inductor_option_names():
                theirs[key.replace("-", "_")] = value
            else:
                raise ValueError(
                    f"Expected an option of {sorted(_CHOICES)} or one of Inductor's. Got {key!r}. "
                    "See torch._inductor.list_options()."
                )
        return cls(**ours), theirs

    def lowering(self) -> tuple[Pass, ...]:
        """Return the passes that every graph needs."""
        return (DropWatch(), ChooseFormulation(CANDIDATES, prefer=self.kernels))


@dataclass
class Folded:
    """A captured inference graph, folded and lowered, before the split."""

    captured: fx.GraphModule
    graph_module: fx.GraphModule
    facts: Facts
    reports: tuple[Report, ...]
    verdict: str


class _Lower(compat.CustomGraphPass):
    """Our passes on Inductor's joint graph; the uuid hashes every source that shapes the result."""

    def __init__(self, settings: Settings) -> None:
        self._passes: tuple[Pass, ...] = settings.lowering()
        self._id = compat.source_digest(repr((settings, self._passes)))

    def __call__(self, graph: fx.Graph) -> None:
        run_pipeline(self._passes, graph, Facts(table=compat.inductor_decompositions()))

    def uuid(self) -> str:
        return self._id


def padst(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph; found by name as ``torch.compile(model, backend="padst")``."""
    settings, inductor = Settings.parse(options)
    inductor = {**compat.mode_options(mode), **inductor}
    inductor["joint_custom_pre_pass"] = compat.composed(_Lower(settings))
    if not torch.is_grad_enabled() and _has_padst(graph_module):
        folded = _fold_or_none(graph_module, example_inputs, settings)
        if folded is not None:
            return _compile_folded(graph_module, folded, example_inputs, inductor)
    return compat.compile_with_inductor(graph_module, example_inputs, inductor)


padst.reset = compat.reset_inductor  # type: ignore[attr-defined]


def fold(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings
) -> Folded:
    """Capture an inference graph, fold its permutations and choose its formulations.

    Raises:
        Mismatch: the folded graph computes something else.
    """
    holders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    fakes = [n.meta.get("example_value", e) for n, e in zip(holders, example_inputs, strict=True)]
    captured = compat.trace_aten(graph_module, fakes, functional=True)
    working = fx.GraphModule(captured, fx.Graph())
    mapping: dict[fx.Node, fx.Node] = {}
    output = working.graph.graph_copy(captured.graph, mapping)
    working.graph.output(output)
    written = _written(captured.graph)
    frozen, names = {}, {}
    inputs = [n for n in captured.graph.nodes if n.op == "placeholder"]
    for node, holder, example in zip(inputs, holders, example_inputs, strict=True):
        names[mapping[node]] = _owner(compat.source_name(holder))
        if compat.is_module_state(example) and node not in written and not example.is_inference():
            frozen[mapping[node]] = example
    facts = Facts(frozen, {n: name for n, name in names.items() if name})
    passes = (*(FOLDS if settings.fold == "safe" else ()), *settings.lowering())
    reports = run_pipeline(passes, working.graph, facts)
    working.recompile()
    verdict = "not asked for"
    if settings.verify:
        positions = {i for i, n in enumerate(inputs) if mapping[n] in frozen}
        verdict = compare(captured, working, example_inputs, positions)
    return Folded(captured, working, facts, reports, verdict)


def _fold_or_none(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings
) -> Folded | None:
    try:
        return fold(graph_module, example_inputs, settings)
    except Exception as error:  # capture runs the user's graph: anything can come out of it
        if settings.verify == "strict":
            raise
        what = "disagrees with" if isinstance(error, Mismatch) else "cannot be made from"
        warnings.warn(
            f"padst compiles without folding: a folded graph {what} this model ({error}). Results "
            "stay right. options={'verify': 'strict'} raises instead.",
            stacklevel=2,
        )
        return None


def _compile_folded(
    original: fx.GraphModule,
    folded: Folded,
    example_inputs: Sequence[Any],
    inductor: dict[str, Any],
) -> Callable[..., Any]:
    inputs = [n for n in folded.graph_module.graph.nodes if n.op == "placeholder"]
    watched = [i for i, node in enumerate(inputs) if node in folded.facts.read]
    fakes = [node.meta["val"] for node in inputs]
    parts = split(folded.graph_module, folded.facts)
    main_inputs = [*(fakes[i] for i in parts.main_inputs), *parts.derived]
    compiled = compat.compile_with_inductor(parts.main, main_inputs, inductor)
    for report in folded.reports:
        log.info("%s: fired %d, left %d", report.name, len(report.fired), len(report.left))
    log.info("%s", folded.verdict)
    return FrozenCall(parts, compiled, original.forward, watched, example_inputs)


def _has_padst(graph_module: fx.GraphModule) -> bool:
    return any("padst." in str(n.target) for n in graph_module.graph.nodes)


def _written(graph: fx.Graph) -> set[fx.Node]:
    """Return the placeholders that a functional graph writes back to."""
    copies = graph.find_nodes(op="call_function", target=torch.ops.aten.copy_.default)
    return {node.args[0] for node in copies}


def _owner(source: str) -> str:
    """Return the module path in a Dynamo source: ``L['self']._modules['mlp']._modules['fc1']...``."""
    return ".".join(re.findall(r"_modules\['([^']+)'\]", source))
