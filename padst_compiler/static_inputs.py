"""Frozen tensors among a graph's inputs: CUDA graphs read them where they lie, and copy the rest.

Inductor learns which inputs stay at their address from marks that Dynamo leaves in a graph, and a
folded graph is not Dynamo's. Without this every replay of ``mode="reduce-overhead"`` would copy the
weights first. Inductor itself looks whether an address has changed after all, and records anew.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import Tensor, fx

__all__ = ["mark", "told"]

MARK = "_dynamo_static_input_type"  # Dynamo's own


def mark(tensors: Iterable[Any]) -> None:
    """Mark tensors that stay at their address between calls."""
    for tensor in tensors:
        if isinstance(tensor, Tensor):  # an operator may return several
            setattr(tensor, MARK, "unguarded")


def told(compile_inner: Callable[..., Any], examples: Sequence[Any]) -> Callable[..., Any]:
    """Return Inductor's inner compiler that learns which inputs were marked.

    Args:
        compile_inner: Inductor's; it takes a graph, its inputs and ``static_input_idxs``.
        examples: inputs of the graph before constants were put in front of them.
    """
    marked = [at for at, example in enumerate(examples) if hasattr(example, MARK)]
    if not marked:
        return compile_inner

    def compile_told(graph: fx.GraphModule, inputs: Sequence[Any], **how: Any) -> Any:
        ahead = len(inputs) - len(examples)
        if not how.get("is_backward") and ahead >= 0 and _alike(inputs[ahead:], examples):
            known = {*how.get("static_input_idxs", ()), *(ahead + at for at in marked)}
            how["static_input_idxs"] = sorted(known)
        return compile_inner(graph, inputs, **how)

    return compile_told


def _alike(inputs: Sequence[Any], examples: Sequence[Any]) -> bool:
    """Whether inputs are the examples, in their order: nothing was merged or left out."""
    return all(
        isinstance(a, Tensor) == isinstance(b, Tensor)
        and (not isinstance(a, Tensor) or (a.shape == b.shape and a.dtype is b.dtype))
        for a, b in zip(inputs, examples, strict=True)
    )
