"""Make one kernel of two layers of blocks with an activation between them.

    before   h = padst.block_linear(x, values1, indices1, None, 3072)
             y = padst.block_linear(gelu(h + bias1), values2, indices2, None, 768)
    after    y = padst.block_mlp(x, values1, indices1, bias1, values2, indices2, 3072, 768, "gelu",
                                 None, None)

The hidden features of a few tokens then stay in the cache of the thread that computes them. It runs
after the choice: a structured operator that is left is one that a kernel of ours computes. What is
between the two may be spelled in any way, and is known by the numbers it computes; casts between
types drop out, as they do where Inductor fuses. Left alone: hidden features that something else
reads, or that are moved, masked at random or combined with another tensor, and activations that the
kernel has not; on a GPU what is predicted to lose.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from padst_compiler.activation import ACTIVATIONS, recognise
from padst_compiler.compat import size_hint
from padst_compiler.gpu_cost import mlp_pays
from padst_compiler.insertion import inline
from padst_compiler.kernel_ops import BLOCK_MLP
from padst_compiler.ops import LINEAR
from padst_compiler.rewrite import ATEN, Facts, Refusal, Report, Rule, as_node, is_random, shape_of

__all__ = ["FuseMlp"]

SITE = LINEAR["block"]
PERMUTE = torch.ops.padst.permute.default
VIEWS = frozenset({ATEN.view.default, ATEN._unsafe_view.default, ATEN.reshape.default})
CASTS = frozenset({ATEN._to_copy.default, torch.ops.prims.convert_element_type.default})
SAME = VIEWS | CASTS | {ATEN.clone.default, ATEN.alias.default}


@dataclass(frozen=True)
class FuseMlp:
    """Fuse pairs of block layers."""

    name: str = "fuse_mlp"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        """Fuse every pair of the graph that can be; a layer belongs to one pair."""
        fired, left = [], []
        for second in list(graph.find_nodes(op="call_function", target=SITE)):
            between = _Between.of(second, facts)
            if between is None:
                continue
            names = [facts.owner(_indices(site)) for site in (between.first, second)]
            where = ", ".join(dict.fromkeys(names))
            try:
                name = between.activation()
                if second.meta["val"].device.type == "cuda":
                    between.check_gpu()
            except _NotFusedError as obstacle:
                left.append(Refusal(where, str(obstacle)))
                continue
            _fuse(graph, between, name, facts)
            fired.append(Rule(where, f"one kernel, {name} between the layers"))
        return Report(self.name, tuple(fired), tuple(left))


class _NotFusedError(Exception):
    """Why two layers are not fused."""


@dataclass
class _Between:
    """What stands between two sites: nodes in the order of the graph, and what else they read."""

    first: fx.Node
    second: fx.Node
    nodes: list[fx.Node]
    others: set[fx.Node]
    bias: fx.Node | None = None

    @staticmethod
    def of(second: fx.Node, facts: Facts) -> _Between | None:
        """Return what is between a site and the one whose features it reads.

        None where it reads those of several, or what other inputs have been mixed into.
        """
        sites, nodes, others = set(), set(), set()
        waiting = [as_node(second.args[0])]
        while waiting:
            node = waiting.pop()
            if node in nodes:
                continue
            if node.target in (SITE, BLOCK_MLP):
                sites.add(node)
            elif not _keeps_features(node):
                others.add(node)
            else:
                nodes.add(node)
                near = {source for source in node.all_input_nodes if _is_alike(source, node)}
                others |= set() if node.target in VIEWS else set(node.all_input_nodes) - near
                waiting += near
        if len(sites) != 1 or not all(facts.is_settled(other) for other in others):
            return None
        return _Between(sites.pop(), second, [n for n in second.graph.nodes if n in nodes], others)

    def activation(self) -> str:
        """Return the name of the activation that follows the bias; that one is noted.

        Raises:
            _NotFusedError: something else stands there.
        """
        inside = {self.first, *self.nodes}
        if self.first.target is BLOCK_MLP:
            raise _NotFusedError("the first layer is fused with the one before it")
        if any(site.args[3] is not None for site in (self.first, self.second)):
            raise _NotFusedError("a bias is part of a layer, no kernel of ours")
        if any(node.target is PERMUTE for node in self.nodes):
            raise _NotFusedError("a permutation stands between the layers")
        if any(is_random(node) for node in self.nodes):
            raise _NotFusedError("dropout is active between the layers")
        if any(user not in {*inside, self.second} for node in inside for user in node.users):
            raise _NotFusedError("the hidden features have another reader")
        start = self._start()
        strangers = self.others - {self.bias}
        if strangers:
            names = ", ".join(sorted(node.name for node in strangers))
            raise _NotFusedError(f"more than a bias and numbers stand between the layers: {names}")
        after = self.nodes[self.nodes.index(start) + 1 :] if start in self.nodes else self.nodes

        def run(x: Tensor) -> Tensor:
            values: dict[fx.Node, Any] = {start: x}
            for node in after:
                if node.target in SAME:
                    values[node] = values[as_node(node.args[0])]
                    continue
                args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
                assert callable(node.target)
                values[node] = node.target(*args, **kwargs)
            result = values[as_node(self.second.args[0])]
            assert isinstance(result, Tensor)
            return result

        name = recognise(run)
        if name is None:
            spelled = ", ".join(n.name for n in after if n.target not in SAME) or "nothing"
            known = ", ".join(ACTIVATIONS)
            raise _NotFusedError(f"what stands between the layers ({spelled}) is none of {known}")
        return name

    def check_gpu(self) -> None:
        """Let pass what the kernel of a GPU computes, and faster than two do.

        Raises:
            _NotFusedError: two kernels run.
        """
        first, second = ([*map(int, shape_of(n.args[1]) or ())] for n in (self.first, self.second))
        x = self.first.meta["val"]
        if first[3] != second[2] or first[3] % 16:
            raise _NotFusedError(f"blocks of {first[3]} outputs meet blocks of {second[2]} inputs")
        tokens = math.prod(size_hint(n) for n in x.shape[:-1])
        if not mlp_pays(tokens, first, second, x.dtype):
            raise _NotFusedError("hidden features would be computed more often than that saves")

    def _start(self) -> fx.Node:
        """Return what the activation reads, and note the bias that is in it."""
        node = self.first
        while len(node.users) == 1:
            (user,) = node.users
            if user.target is ATEN.add.Tensor and not user.kwargs:
                (bias,) = {*user.args} - {node} or {node}
                if bias in self.others and _sizes(bias) == _sizes(self.first)[-1:]:
                    self.bias = as_node(bias)
                    return user
            if user not in self.nodes or user.target not in SAME:
                break
            node = user
        return node


def _indices(site: fx.Node) -> fx.Node:
    return as_node(site.args[5 if site.target is BLOCK_MLP else 2])


def _keeps_features(node: fx.Node) -> bool:
    """Whether every feature is made of the same one alone, or of others that are moved to it."""
    if is_random(node):
        return True
    if node.target is operator.getitem:
        return is_random(as_node(node.args[0]))
    if node.target in CASTS:
        return bool(node.meta["val"].dtype.is_floating_point)
    if node.target in VIEWS:
        return _sizes(node.args[0])[-1:] == _sizes(node)[-1:]
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ())
    return pointwise or node.target in SAME or node.target is PERMUTE


def _is_alike(source: fx.Node, node: fx.Node) -> bool:
    """Whether a node reads as many features of as many tokens as it makes: nothing is repeated."""
    if node.target in VIEWS or node.target is PERMUTE or node.target is operator.getitem:
        return source is node.args[0]
    if is_random(node):
        return True
    return _sizes(source) == _sizes(node)


def _sizes(node: object) -> list[str]:
    """Return sizes to compare: symbols by their names, so that nothing is guarded."""
    return [str(size) for size in shape_of(node) or ()]


def _fuse(graph: fx.Graph, between: _Between, activation: str, facts: Facts) -> None:
    first, second = between.first, between.second
    x, values1, indices1, _, hidden = first.args
    _, values2, indices2, _, width = second.args
    given = [x, values1, indices1, values2, indices2, *([between.bias] if between.bias else [])]

    def run(
        x: Tensor, v1: Tensor, i1: Tensor, v2: Tensor, i2: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        bias = None if bias is None else bias.to(x.dtype)
        y: Tensor = BLOCK_MLP(x, v1, i1, bias, v2, i2, hidden, width, activation, None, None)
        return y

    new = inline(graph, second, run, [as_node(node) for node in given], facts.table)
    if _sizes(new) != _sizes(second):  # tokens were viewed in another way
        read = _sizes(second.args[0])
        views = (n for n in between.nodes if n.target in VIEWS and _sizes(n) == read)
        sizes: Any = next(views).args[1]
        with graph.inserting_before(second):
            new = graph.call_function(ATEN.view.default, (new, [*sizes[:-1], width]))
        new.meta["val"] = second.meta["val"]
    second.replace_all_uses_with(new)
    graph.erase_node(second)
    for node in reversed([first, *between.nodes]):
        graph.erase_node(node)
