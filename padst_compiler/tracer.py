"""The tracer: run a model once and record its ATen calls, with every linear use of a parameter.

The model's own Python runs, so any control flow works, and what is recorded lies below every
module and function: ``F.linear`` on raw parameters, einsum, packed attention and fused fast paths
alike. The model is left as it was (``untouched.py``).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from operator import getitem
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from padst_compiler.products import FUSED, PRODUCTS, Use, flops_of, summed_dims
from padst_compiler.provenance import (
    scaled_weight,
    weights_behind,
    without_reshapes,
)
from padst_compiler.tensors import is_plain, storage_key, tensors_in, written_by
from padst_compiler.untouched import call_arguments, eager, left_as_it_was

__all__ = ["Trace", "Use", "trace"]

_ATEN = torch.ops.aten


@dataclass
class Trace:
    """One run of a model: its ATen graph and its linear operations."""

    graph: fx.Graph
    uses: dict[str, Use] = field(default_factory=dict)  # by a parameter's first name
    linear_flops: int = 0  # of all products with a parameter, convolutions of any size included


def trace(model: nn.Module, example_inputs: Any) -> Trace:
    """Run ``model`` once without gradients and record it.

    Args:
        model: any module, in the mode it is in.
        example_inputs: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.

    Raises:
        ValueError: an input lies on a device where the model has nothing.

    Example:
        >>> recorded = trace(nn.Sequential(nn.Linear(4, 8)), torch.ones(3, 4))
        >>> recorded.uses["0.weight"].tokens, recorded.linear_flops
        (3, 192)
    """
    args, kwargs = call_arguments(model, example_inputs)
    recorder = _Recorder(model, (args, kwargs))
    with (
        left_as_it_was(model, recorder.written),
        eager(),
        torch.no_grad(),
        recorder,
    ):
        output = model(*args, **kwargs)
    nodes = [recorder.nodes[t] for t in tensors_in(output) if t in recorder.nodes]
    recorder.result.graph.output(tuple(nodes))
    return recorder.result


class _Recorder(TorchDispatchMode):
    """Runs every call and writes it into the graph."""

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.result = Trace(fx.Graph())
        self.nodes: Any = WeakTensorKeyDictionary()
        self.written: dict[int, tuple[Tensor, Tensor]] = {}  # parameters, and what they were
        self.held: dict[int, list[tuple[int, Use, Tensor]]] = {}  # parameters by storage
        self.buffers = {id(b): name for name, b in model.named_buffers()}
        known: dict[tuple[int, int], Use] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if not is_plain(parameter):
                continue
            storage, offset = key = storage_key(parameter)
            if key not in known:
                known[key] = Use((), tuple(parameter.shape))
                self.held.setdefault(storage, []).append((offset, known[key], parameter))
            known[key].names += (name,)
        for tensor in tensors_in(inputs):
            if tensor not in self.nodes:
                holder = self.result.graph.placeholder(f"input_{len(self.nodes)}")
                holder.meta["made_of"] = None
                self._name(holder, tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):  # higher-order operators run as they are
            return func(*args, **kwargs)
        packet = func.overloadpacket
        if packet not in PRODUCTS:  # under inference_mode composite operators arrive whole
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        for tensor in filter(is_plain, written_by(func, args, kwargs)):
            for _, _, held in self.held.get(storage_key(tensor)[0], ()):
                self.written.setdefault(id(held), (held, held.detach().clone()))
        result = func(*args, **kwargs)
        node = self._record(func, args, kwargs, result)
        if packet in FUSED:
            at = FUSED[packet]
            rows = args[0].numel() // (args[at] if at else args[0].shape[-1])
            for weight in tensors_in(args[1:]):
                flops = 2 * rows * weight.numel()
                self._product(node, packet.__name__, (weight,), ((-1,),), flops)
        elif packet in PRODUCTS:
            first, second = (args[at] for at in PRODUCTS[packet])
            flops = flops_of(packet, args, first, second, result)
            sums = summed_dims(packet, args, second)
            self._product(node, packet.__name__, (first, second), sums, flops)
        elif packet is _ATEN.embedding:
            for use in weights_behind(self._node_of(args[0])):
                use.looked_up = True
        return result

    def _record(self, func: Any, args: Any, kwargs: Any, result: Any) -> fx.Node:
        graph = self.result.graph
        arguments = pytree.tree_map_only(Tensor, self._node_of, (args, kwargs))
        node = graph.create_node("call_function", func, *arguments)
        made_of = [n.meta["made_of"] for n in node.all_input_nodes]
        node.meta["made_of"] = None if None in made_of else frozenset().union(*made_of)
        if isinstance(result, Tensor):
            self._name(node, result)
        elif isinstance(result, (tuple, list)):
            for at, part in enumerate(result):
                if isinstance(part, Tensor):
                    piece = graph.create_node("call_function", getitem, (node, at))
                    piece.meta["made_of"] = node.meta["made_of"]
                    self._name(piece, part)
        return node

    def _name(self, node: fx.Node, tensor: Tensor) -> None:
        if is_plain(tensor):
            node.meta["shape"], node.meta["dtype"] = tuple(tensor.shape), tensor.dtype
        self.nodes[tensor] = node

    def _node_of(self, tensor: Tensor) -> fx.Node:
        if tensor not in self.nodes:  # nothing that ran made it: the model holds it
            use = self._use_of(tensor)
            name = use.names[0] if use else self.buffers.get(id(tensor))
            target = name or f"_constant_{len(self.nodes)}"
            node = self.result.graph.create_node("get_attr", target)
            node.meta["use"] = use
            weight = use is not None and len(use.shape) >= 2
            node.meta["made_of"] = frozenset([name]) if weight else frozenset()
            self._name(node, tensor)
        return self.nodes[tensor]  # type: ignore[no-any-return]

    def _use_of(self, tensor: Tensor) -> Use | None:
        """Find the parameter whose numbers these are; views made before the run count."""
        if not is_plain(tensor):
            return None
        storage, offset = storage_key(tensor)
        held = self.held.get(storage, [])
        exact = [use for place, use, _ in held if place == offset]
        return exact[0] if exact else held[0][1] if len(held) == 1 else None

    def _product(
        self,
        node: fx.Node,
        op: str,
        operands: tuple[Tensor, ...],
        sums: tuple[tuple[int, ...], ...],
        flops: int,
    ) -> None:
        """Count a product, and what each parameter in it has of it."""
        nodes = [self._node_of(operand) for operand in operands]
        sources = [weights_behind(operand) for operand in nodes]
        if not any(sources):
            if len(operands) == 2 and (operands[0].dim() < 3 or len(operands[0]) == 1):
                self._computed(op, nodes, sums, flops)
            return
        if any(n.meta["made_of"] for n, uses in zip(nodes, sources, strict=True) if not uses):
            node.meta["made_of"] = None  # of two weights it would be one as well
        self.result.linear_flops += flops
        for uses, own, other, dims in zip(sources, nodes, nodes[::-1], sums, strict=True):
            whole = sum(use.weights for use in uses)
            for use in uses:
                self._count(use, op, round(flops * use.weights / whole), own, dims)
                use.reads += (without_reshapes(other).name,)
                use.met |= other is own or not other.meta["made_of"]

    def _computed(
        self, op: str, nodes: list[fx.Node], sums: tuple[tuple[int, ...], ...], flops: int
    ) -> None:
        """Count a product with what was computed from parameters alone."""
        for own, other, dims in zip(nodes, nodes[::-1], sums, strict=True):
            if not own.meta["made_of"] or other.meta["made_of"]:
                continue
            self.result.linear_flops += flops
            scaled, size = scaled_weight(own), math.prod(own.meta.get("shape", ()))
            held = [use for entries in self.held.values() for _, use, _ in entries]
            uses = [use for use in held if not own.meta["made_of"].isdisjoint(use.names)]
            for use in uses if scaled is None else [scaled]:
                if use.weights == size:
                    self._count(use, op, flops, own, dims)
                    use.met, use.computed = True, use.computed or scaled is None
                    use.reads += (without_reshapes(other).name,)

    def _count(
        self, use: Use, op: str, flops: int, operand: fx.Node, dims: tuple[int, ...]
    ) -> None:
        self.result.uses.setdefault(use.names[0], use)
        use.ops = tuple(dict.fromkeys((*use.ops, op)))
        use.count += 1
        use.flops += flops
        if use.largest is None or flops > use.largest[0]:
            use.largest = (flops, operand, dims)
