"""What passes put into a graph: traced functions, constants, copies."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor

from padst_compiler.compat import trace_aten

__all__ = ["as_contiguous", "constant", "inline"]

ATEN = torch.ops.aten


def inline(
    graph: fx.Graph,
    before: fx.Node,
    function: Callable[..., Any],
    arguments: Sequence[fx.Node | int | list[int] | None],
    table: Mapping[Any, Callable[..., Any]] | None = None,
    traces: dict[object, fx.GraphModule] | None = None,
) -> Any:
    """Insert the ATen graph of ``function(*arguments)`` before a node; return its result node(s).

    ``None``, integers and lists of them are constants; nodes bring their fake values. With
    ``traces`` a function is traced once for all arguments that are laid out alike.
    """
    nodes = [a for a in arguments if isinstance(a, fx.Node)]
    fakes = [n.meta["val"] for n in nodes]

    def on_tensors(*tensors: Tensor) -> Any:
        feed = iter(tensors)
        return function(*(next(feed) if isinstance(a, fx.Node) else a for a in arguments))

    key = (function, *map(_laid_out, arguments))
    traced = traces.get(key) if traces is not None else None
    if traced is None:
        traced = trace_aten(on_tensors, fakes, table=table)
    if traces is not None:
        traces[key] = traced
    env: dict[fx.Node, fx.Node] = {}
    holders = iter(nodes)
    with graph.inserting_before(before):
        for node in traced.graph.nodes:
            if node.op == "placeholder":
                env[node] = next(holders)
            elif node.op == "output":
                return fx.map_arg(node.args[0], lambda n: env[n])
            else:
                env[node] = graph.node_copy(node, lambda n: env[n])
    raise AssertionError("a traced graph ends with its output")


def _laid_out(argument: object) -> str:
    """Return all that a trace depends on of an argument."""
    value = argument.meta["val"] if isinstance(argument, fx.Node) else argument
    if not isinstance(value, Tensor):
        return repr(value)
    return f"{value.dtype} {value.device} {tuple(value.shape)} {value.stride()}"


def constant(graph: fx.Graph, name: str, tensor: Tensor) -> fx.Node:
    """Return a node that holds ``tensor``, at the start of a graph that belongs to a module."""
    module = graph.owning_module
    assert module is not None
    count = sum(1 for held, _ in module.named_buffers() if held.startswith(f"_{name}_"))
    module.register_buffer(f"_{name}_{count}", tensor)
    first = next(node for node in graph.nodes if node.op != "placeholder")
    fakes = (node.meta.get("val") for node in graph.nodes)
    like = next(fake for fake in fakes if isinstance(fake, FakeTensor))
    with graph.inserting_before(first):
        node = graph.get_attr(f"_{name}_{count}")
    node.meta["val"] = like.fake_mode.from_tensor(tensor, static_shapes=True)
    return node


def as_contiguous(graph: fx.Graph, before: fx.Node, x: fx.Node) -> fx.Node:
    """Return ``x`` with the strides that a permutation's result has: later views rely on them."""
    if x.meta["val"].is_contiguous():
        return x
    with graph.inserting_before(before):
        copied = graph.call_function(
            ATEN.clone.default, (x,), {"memory_format": torch.contiguous_format}
        )
    copied.meta["val"] = x.meta["val"].contiguous()
    return copied
