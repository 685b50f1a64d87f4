"""Compare a folded graph with the graph as captured, in float64 on random inputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

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
    try:
        with torch.no_grad():  # each graph gets tensors of its own: it may write to them
            expected = captured(*_feed(arguments, frozen))
            result = folded(*_feed(arguments, frozen))
    except RuntimeError as error:  # an operator without float64, or one that insists on a dtype
        return f"not verified: float64 does not run through this graph ({str(error)[:120]})"
    worst = 0.0
    pairs = zip(_tensors(expected), _tensors(result), strict=True)
    for one, two in pairs:
        if one.numel() == 0 or not one.is_floating_point():
            continue
        scale = max(float(one.abs().max()), 1e-30)
        worst = max(worst, float((one - two).abs().max()) / scale)
    if not worst < 1e-9:
        raise MismatchError(
            "Expected the folded graph to equal the captured one in float64. Got a relative "
            f"difference of {worst:.1e}. Compile with options={{'fold': 'off'}} and report it."
        )
    return f"verified in float64: relative difference {worst:.0e}"


def _reason_against(captured: fx.GraphModule) -> str | None:
    numbers = 0
    for node in captured.graph.nodes:
        tags = getattr(node.target, "tags", ())
        if torch.Tag.nondeterministic_seeded in tags:
            return f"{node.name} draws random numbers"
        value = node.meta.get("val")
        if isinstance(value, Tensor) and node.op == "call_function":
            if value.device.type != "cpu":
                return "the graph does not run on the CPU"
            numbers += int(value.numel())
    return f"the graph computes {numbers} numbers, over {LIMIT}" if numbers > LIMIT else None


def _feed(arguments: Sequence[Any], frozen: set[int]) -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [_widen(a, i in frozen, generator) for i, a in enumerate(arguments)]


def _widen(argument: Any, keep: bool, generator: torch.Generator) -> Any:
    if not isinstance(argument, Tensor):
        return int(argument) if isinstance(argument, torch.SymInt) else argument
    if not argument.is_floating_point():
        return argument.detach().clone()
    if keep:
        return argument.detach().to(torch.float64, copy=True)
    return torch.randn(argument.shape, generator=generator, dtype=torch.float64)


def _tensors(result: Any) -> list[Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(result) if isinstance(t, Tensor)]
