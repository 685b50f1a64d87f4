"""The ``torch.compile`` backend: the one module that knows passes, kernels and Inductor.

Inference (no gradients): the graph is captured in ATen, its permutations are folded into frozen
weights, every structured operator gets its formulation, work on frozen tensors is done once,
Inductor compiles the rest. Training: the same choice of formulations, on Inductor's joint graph.
Options beside Inductor's own stand in ``settings.py``.
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from padst_compiler import compat, recorder
from padst_compiler.digest import Unchanged, source_digest
from padst_compiler.dump import dumped
from padst_compiler.export import FORMATS, ExportReport, FoldedModule
from padst_compiler.flat import exported
from padst_compiler.fold import Folded, fold
from padst_compiler.frozen import Split, outline, split
from padst_compiler.frozen_call import FrozenCall
from padst_compiler.inputs import bind
from padst_compiler.kernels import CANDIDATES, DENSE, PLAIN, PORTABLE, gpu_eager, install
from padst_compiler.layers import sparse_layers
from padst_compiler.passes import KeepStrides, inference_passes, training_passes
from padst_compiler.passes.keep_whole import KeepWhole
from padst_compiler.passes.pack_dense import PackDense
from padst_compiler.plain import compile_plain, lacks_compiler
from padst_compiler.rewrite import Facts, Pass, has_operators, is_from_a_pass, run_pipeline
from padst_compiler.settings import Settings
from padst_compiler.stopwatch import with_stopwatch
from padst_compiler.verify import MismatchError

__all__ = ["Settings", "export_onnx", "fold_dynamo", "gpu_eager", "padst", "prepare"]

log = logging.getLogger(__name__)
assert recorder  # its operators must exist when a cached graph is loaded
WAYS = {"inductor": CANDIDATES, "plain": PLAIN, "off": CANDIDATES}
LAST: Mapping[str, tuple[Pass, ...]] = {"inductor": (PackDense(DENSE), KeepWhole())}


class _Lower(compat.CustomGraphPass):
    """Our passes on Inductor's joint graph; the uuid hashes every source that shapes the result."""

    def __init__(self, settings: Settings) -> None:
        passes = training_passes(WAYS[settings.codegen], prefer=settings.kernels)
        self._passes = (*passes, *LAST.get(settings.codegen, ()))
        self._trace = settings.trace
        self._id = source_digest(repr((settings, self._passes)))

    def __call__(self, graph: fx.Graph) -> None:
        facts = Facts(table=compat.inductor_decompositions())
        run_pipeline(dumped(self._passes, self._trace), graph, facts)

    def uuid(self) -> str | None:
        return None if self._trace else self._id  # None: never cached, so that passes always run


def padst(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph; found by name as ``torch.compile(model, backend="padst")``."""
    settings, inductor = prepare(options, mode, example_inputs)
    lower = _Lower(settings)
    plain = {**inductor, "joint_custom_pre_pass": compat.composed(Unchanged())}
    ours = {**inductor, "joint_custom_pre_pass": compat.composed(lower)}  # in every cache key
    if not torch.is_grad_enabled() and has_operators(graph_module):
        folded = _fold_or_none(graph_module, example_inputs, settings)
        if folded is not None:
            return _compile_folded(graph_module, folded, example_inputs, settings, plain)
    try:
        return _generate(graph_module, example_inputs, settings, ours, lower)
    except Exception as error:  # Dynamo and Inductor wrap what a pass raises
        if settings.verify == "strict" or not is_from_a_pass(error):
            raise
        warnings.warn(
            f"padst compiles without its passes: one of them failed ({error}). Results stay right, "
            "slowly. options={'verify': 'strict'} raises instead.",
            stacklevel=2,
        )
    return _generate(graph_module, example_inputs, settings, plain, None)


def prepare(
    options: Mapping[str, Any] | None, mode: str | None, examples: Sequence[Any]
) -> tuple[Settings, dict[str, Any]]:
    """Return our settings and Inductor's; what they ask for can be compiled for these inputs.

    Raises:
        ValueError: an unknown option, value or mode.
    """
    settings, inductor = Settings.parse(options, mode)
    inductor = {**compat.mode_options(mode), **inductor}
    install()
    if settings.codegen == "inductor" and lacks_compiler(examples, inductor):
        settings = replace(settings, codegen="plain")
    return with_stopwatch(settings, inductor, LAST["inductor"]), inductor


padst.reset = compat.reset_inductor  # type: ignore[attr-defined]


def fold_dynamo(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings
) -> Folded:
    """Fold a graph that Dynamo captured without gradients.

    Raises:
        MismatchError: the folded graph computes something else.
    """
    return _folder(graph_module, example_inputs, settings)(example_inputs)


def _folder(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings
) -> Callable[[Sequence[Any]], Folded]:
    """Return what folds a graph for tensors; Dynamo forgets the fake ones when it compiled."""
    holders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
    fakes = [n.meta.get("example_value", e) for n, e in zip(holders, example_inputs, strict=True)]
    state = {
        position: compat.owner_name(holder)
        for position, (holder, example) in enumerate(zip(holders, example_inputs, strict=True))
        if compat.is_module_state(example)
    }
    safe, verify = settings.fold == "safe", bool(settings.verify)
    passes = inference_passes(WAYS[settings.codegen], prefer=settings.kernels, fold=safe)
    steps = dumped((KeepStrides(), *passes, *LAST.get(settings.codegen, ())), settings.trace)
    return lambda given: fold(graph_module, fakes, given, state, steps, verify=verify)


def _fold_or_none(
    graph_module: fx.GraphModule, example_inputs: Sequence[Any], settings: Settings
) -> Folded | None:
    try:
        return fold_dynamo(graph_module, example_inputs, settings)
    except Exception as error:  # capture runs the user's graph: anything can come out of it
        if settings.verify == "strict":
            raise
        what = "disagrees with" if isinstance(error, MismatchError) else "cannot be made from"
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
    settings: Settings,
    inductor: dict[str, Any],
) -> Callable[..., Any]:
    fakes, watched = [node.meta["val"] for node in folded.inputs], folded.relied_on
    parts = split(folded.graph_module, folded.facts)
    shape, main_inputs = outline(parts), [*(fakes[i] for i in parts.main_inputs), *parts.derived]
    compiled: Callable[..., Any] = parts.main.forward
    if settings.codegen == "inductor":
        compiled = compat.compile_with_inductor(parts.main, main_inputs, inductor)
    for made in folded.reports:
        log.info("%s: fired %d, left %d", made.name, len(made.fired), len(made.left))
    log.info("%s", folded.verdict)
    refold = _folder(original, example_inputs, replace(settings, trace=None))

    def again(arguments: Sequence[Any]) -> tuple[Split, list[int]] | None:
        other = refold(arguments)
        relied_on = other.relied_on  # of all inputs: a split drops some
        apart = split(other.graph_module, other.facts)
        return (apart, relied_on) if outline(apart) == shape else None

    return FrozenCall(parts, compiled, original.forward, watched, example_inputs, again)


def _generate(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    settings: Settings,
    inductor: dict[str, Any],
    lower: _Lower | None,
) -> Callable[..., Any]:
    """Compile a graph whose numbers are not known; without ``lower`` none of our passes runs."""
    if settings.codegen == "inductor":
        return compat.compile_with_inductor(graph_module, example_inputs, inductor)
    return compile_plain(graph_module, example_inputs, lower)


def export_onnx(
    model: nn.Module,
    args: Any,
    path: str | os.PathLike[str],
    *,
    dynamic_batch: bool = True,
    tolerance: float = 1e-4,
) -> ExportReport:
    """Export the folded inference graph to ONNX, in standard operators only.

    The model is exported in eval mode and left in the mode it was in. The file appears only after
    onnxruntime agreed with PyTorch on it (at batch 1, 3 and the example's).

    Args:
        model: hardened; see ``padst.harden``.
        args: example input tensor, or a tuple of them; the first axis is the batch.
        path: the file to write.
        dynamic_batch: leave the batch size free.
        tolerance: largest difference allowed, relative to the largest output.

    Raises:
        ValueError: soft permutations remain, or inputs that are not tensors.
        RuntimeError: onnxruntime disagrees with PyTorch.
    """
    inputs, keywords = bind(model, args)
    if keywords or not all(isinstance(t, Tensor) for t in inputs):
        cure = "Wrap the model so that it takes tensors only."
        raise ValueError(f"Expected positional example tensors. Got other arguments. {cure}")
    soft = [name for name, layer in sparse_layers(model).items() if layer.soft_permutation]
    if soft:
        got = f"Got soft ones in {', '.join(soft[:3])}. Call padst.harden(model) first."
        raise ValueError(f"Expected hard permutations. {got}")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        function, fakes, examples, state = exported(model, inputs, dynamic_batch)
        passes = inference_passes(PORTABLE, prefer="auto", fold=True)
        folded = fold(function, fakes, examples, state, passes, verify=True)
        parts = split(folded.graph_module, folded.facts)
        derived: Sequence[Tensor] = ()
        if parts.prologue is not None:
            with torch.no_grad():
                derived = parts.prologue(*(examples[i] for i in parts.prologue_inputs))
        constants = {p: examples[i] for p, i in enumerate(parts.main_inputs) if i in state}
        constants |= {len(parts.main_inputs) + p: tensor for p, tensor in enumerate(derived)}
        module = FoldedModule(parts.main, constants, len(parts.main_inputs) + len(derived))
        return FORMATS["onnx"](
            module, model, inputs, path, dynamic_batch=dynamic_batch, tolerance=tolerance
        )
    finally:
        for part, training in modes:
            part.training = training
