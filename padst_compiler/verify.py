"""Compare a folded graph with the graph as captured, in float64 on random inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_map_only

from padst_compiler.compat import size_hint
from padst_compiler.rewrite import is_random

__all__ = ["MismatchError", "compare"]

LIMIT = 2**26  # numbers that the captured graph computes: about a second


class MismatchError(RuntimeError):
    """A folded graph computes something else: a bug of ours."""


def compare(
    captured: fx.GraphModule, folded: fx.GraphModule, arguments: Sequence[Any], frozen: set[int]
) -> str:
    """Run both graphs in float64 and compare their results.

    Args:
        captured: the graph before folding.
        folded: the same placeholders, after folding.
        arguments: real example inputs; Parameters and buffers keep their numbers, floating inputs
            are replaced by random ones, integers stay.
        frozen: positions of Parameters and buffers.

    Returns:
        What was done: "verified ...", or "not verified: ..." with the reason.

    Raises:
        MismatchError: the results differ by more than rounding.
    """
    reason = _reason_against(captured)
    if reason is not None:
        return f"not verified: {reason}"
    one, two = _feed(arguments, frozen), _feed(arguments, frozen)
    try:
        with torch.no_grad():  # each graph gets tensors of its own: it may write to them
            expected = _tensors((_widened(captured)(*one), one))
            result = _tensors((_widened(folded)(*two), two))
    except RuntimeError as error:  # an operator without float64, or one that insists on a dtype
        return f"not verified: float64 does not run through this graph ({str(error)[:120]})"
    worst = 0.0
    if len(expected) != len(result):
        raise _mismatch(f"{len(result)} results for {len(expected)}")
    for left, right in zip(expected, result, strict=True):
        worst = max(worst, _difference(left, right))
    if not worst < 1e-9:
        raise _mismatch(f"a relative difference of {worst:.1e}")
    return f"verified in float64: relative difference {worst:.0e}"


def _mismatch(what: str) -> MismatchError:
    return MismatchError(
        f"Expected the folded graph to equal the captured one in float64. Got {what}. "
        "Compile with options={'fold': 'off'} and report the model."
    )


def _difference(left: Tensor, right: Tensor) -> float:
    """Return the largest difference over the largest finite number; inf if incomparable."""
    if left.shape != right.shape or left.dtype != right.dtype:
        return float("inf")
    if not (left.is_floating_point() or left.is_complex()):
        return 0.0 if torch.equal(left, right) else float("inf")
    finite = left.isfinite()
    if not torch.equal(finite, right.isfinite()):
        return float("inf")
    if not torch.equal(left[~finite].nan_to_num(nan=0.5), right[~finite].nan_to_num(nan=0.5)):
        return float("inf")
    left, right = left[finite], right[finite]
    if left.numel() == 0:
        return 0.0
    return float((left - right).abs().max()) / max(float(left.abs().max()), 1e-30)


def _reason_against(captured: fx.GraphModule) -> str | None:
    numbers = 0
    for node in captured.graph.nodes:
        if is_random(node):
            return f"{node.name} draws random numbers"
        value = node.meta.get("val")
        if isinstance(value, Tensor) and node.op == "call_function":
            if value.device.type != "cpu":
                return "the graph does not run on the CPU"
            numbers += size_hint(value.numel())
    return f"the graph computes {numbers} numbers, over {LIMIT}" if numbers > LIMIT else None


def _widened(graph_module: fx.GraphModule) -> fx.GraphModule:
    """Return a copy that computes in float64 throughout: casts, new tensors and constants too."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(graph_module.graph, {}))
    for node in graph.nodes:
        node.args = tree_map_only(torch.dtype, _wide, node.args)
        node.kwargs = tree_map_only(torch.dtype, _wide, node.kwargs)
        if _makes_default_floats(node):
            node.kwargs = {**node.kwargs, "dtype": torch.float64}
    widened = fx.GraphModule(graph_module, graph)
    for node in graph.find_nodes(op="get_attr"):
        constant = getattr(widened, node.target, None)
        if isinstance(constant, Tensor) and constant.is_floating_point():
            setattr(widened, node.target, constant.detach().double())
    return widened


def _makes_default_floats(node: fx.Node) -> bool:
    """Whether a node makes a tensor out of nothing and leaves its floating dtype to torch."""
    if not isinstance(node.target, torch._ops.OpOverload) or "dtype" in node.kwargs:
        return False
    takes = any(argument.name == "dtype" for argument in node.target._schema.arguments)
    value = node.meta.get("val")
    made = takes and not node.all_input_nodes
    return made and isinstance(value, Tensor) and value.is_floating_point()


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype.is_floating_point else dtype


def _feed(arguments: Sequence[Any], frozen: set[int]) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [_widen(a, i in frozen, generator) for i, a in enumerate(arguments)]


def _widen(argument: Any, keep: bool, generator: torch.Generator) -> Any:
    if not isinstance(argument, Tensor):
        return size_hint(argument) if isinstance(argument, torch.SymInt) else argument
    if not argument.is_floating_point():
        return argument.detach().clone()
    if keep:
        return argument.detach().to(torch.float64, copy=True)
    numbers = torch.randn(argument.shape, generator=generator, dtype=torch.float64)
    return torch.empty_like(argument, dtype=torch.float64).copy_(numbers)  # views need its strides


def _tensors(result: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
