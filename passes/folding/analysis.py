"""Walk a graph by the rules: which axes keep one order, what fixes it, what follows it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TypeAlias

import torch
from torch import Tensor, fx

from padst_compiler.compat import size_hint
from padst_compiler.passes.folding.factors import (
    Dims,
    Factor,
    Field,
    fields_of,
    fresh,
    settled,
)
from padst_compiler.passes.folding.problem import (
    ANY,
    Coupling,
    Edit,
    Endpoint,
    Gather,
    Problem,
    apart,
)
from padst_compiler.passes.folding.refinement import Side, refined
from padst_compiler.passes.folding.spaces import Axis, Size, Space, size_of, unify
from padst_compiler.rewrite import Facts

__all__ = ["Analysis", "Rule", "Side", "on_live", "unknown"]


class Analysis:
    """The state of the walk.

    Args:
        graph: functional, in ATen.
        facts: what is frozen in it.
        rules: by operator; what is pointwise by its tag needs none.
        pointwise: the rule for those.
    """

    def __init__(
        self, graph: fx.Graph, facts: Facts, rules: dict[object, Rule], pointwise: Rule
    ) -> None:
        """Walk."""
        self.graph, self.facts, self.problem = graph, facts, Problem()
        self.table: dict[fx.Node, Dims | list[Dims | None]] = {}
        for node in graph.nodes:
            if node.op == "placeholder" and not self.is_constant(node):
                self.fix_result(node, f"it permutes a graph input ({node.name})")
            elif node.op == "output":
                for operand in node.all_input_nodes:
                    self.fix(operand, node, "it reaches an output of the graph")
            elif node.op == "call_function" and not self.is_constant(node):
                tags = getattr(node.target, "tags", ())
                by_tag = pointwise if torch.Tag.pointwise in tags else unknown
                if torch.Tag.nondeterministic_seeded in tags:
                    by_tag = unknown
                rules.get(node.target, by_tag)(self, node)

    # -- what is known ------------------------------------------------------------------------

    def is_constant(self, node: object) -> bool:
        """Whether ``node`` is a tensor that follows an order by being reordered once."""
        return isinstance(node, fx.Node) and self.facts.is_settled(node)

    def dims(self, node: fx.Node) -> Dims:
        """Return what the dimensions of a result run over."""
        known = self.table[node]
        assert isinstance(known, tuple)
        return known

    def is_live(self, node: object) -> bool:
        """Whether ``node`` is a tensor that depends on an input."""
        return isinstance(node, fx.Node) and isinstance(self.table.get(node), tuple)

    @staticmethod
    def shape(node: fx.Node) -> tuple[Size, ...]:
        """Return the shape, symbols unguarded."""
        value = node.meta["val"]
        assert isinstance(value, Tensor)
        return tuple(size_of(n) for n in value.shape)

    # -- what rules say -----------------------------------------------------------------------

    def keep(self, node: fx.Node, dims: Dims) -> None:
        """Note what a result runs over; a field of which only some factors are left is apart."""
        self.table[node] = self.checked(dims)

    def checked(self, dims: Dims) -> Dims:
        """Return ``dims`` settled, with what it asks of the fields that it holds in part."""
        dims = settled(dims)
        for field, held in fields_of(dims).items():
            if len(set(held)) < len(held) and len(field.sizes) > 1:
                self.restrict(field, range(len(field.sizes)), "still", "an axis stands in it twice")
            elif len(set(held)) < len(field.sizes):
                self.restrict(field, held, "any", "uses a part of an axis")
        return dims

    def free(self, axis: Axis, why: str, edit: Edit, absorbs: str = "") -> None:
        """Note that something follows every order of ``axis``."""
        self.problem.endpoints.append(Endpoint(axis, why, ANY, edit, absorbs=absorbs))

    def restrict(self, field: Field, held: Sequence[int], how: str, why: str) -> None:
        """Note which orders of a divided field are left; see ``apart``."""
        sizes = [n for n in field.sizes if isinstance(n, int)]
        allows = apart(sizes, tuple(held), how) if len(sizes) == len(field.sizes) else None
        self.problem.endpoints.append(Endpoint(field.axis, why, allows))

    def pin(self, factors: Iterable[Factor], why: str, gather: Gather | None = None) -> None:
        """Fix the order of what one dimension runs over; a gather helps where it is one field."""
        factors = tuple(factors)
        only = gather if len(factors) == 1 and factors[0].is_whole else None
        for field, held in fields_of([factors]).items():
            if len(set(held)) < len(field.sizes):
                self.restrict(field, held, "alone", why)
            else:
                self.problem.endpoints.append(Endpoint(field.axis, why, gather=only))

    def fix(
        self, operand: fx.Node, reader: fx.Node, why: str, dims: Sequence[int] | None = None
    ) -> None:
        """Fix the order of an operand's dimensions, by default of all."""
        if not self.is_live(operand):
            return
        for at, factors in enumerate(self.dims(operand)):
            if dims is None or at in dims:
                self.pin(factors, why, self.before(operand, at, reader))

    def fix_result(self, node: fx.Node, why: str) -> None:
        """Note that a result comes in its own order; several results are known one by one."""
        if not isinstance(node.meta.get("val"), Tensor):
            self.table[node] = []
            return
        dims = fresh(self.shape(node))
        for at, factors in enumerate(dims):
            self.pin(factors, why, Gather(node, at, None, self.bytes(node)))
        self.table[node] = dims

    def before(self, operand: fx.Node, dim: int, reader: fx.Node) -> Gather:
        """Return the place before ``reader`` reads ``operand``."""
        return Gather(operand, dim, reader, self.bytes(operand))

    def _beside(self, side: Side, reader: fx.Node) -> Gather | None:
        """Return the place before ``reader`` where a movement there helps one side of a pair."""
        operand = side[1]
        return None if operand is None else self.before(operand, side[2], reader)

    @staticmethod
    def bytes(node: fx.Node) -> float:
        """Return the size of a result."""
        value = node.meta["val"]
        numbers = math.prod(size_hint(n) for n in value.shape)
        return float(max(1, numbers) * value.element_size())  # an empty one too costs something

    def align(self, pairs: Iterable[tuple[Side, Side]], reader: fx.Node, why: str) -> None:
        """Make paired dimensions of two operands keep one order, or fix both."""
        met: dict[tuple[Field, Field], list[tuple[Factor, Factor, Side, Side]]] = {}
        for one, two in refined(list(pairs)):
            if [f.size for f in one[0]] != [f.size for f in two[0]]:
                for side in (one, two):
                    self.pin(side[0], why, self._beside(side, reader))
                continue
            for f, g in zip(one[0], two[0], strict=True):
                if not f.same(g):
                    met.setdefault((f.field, g.field), []).append((f, g, one, two))
        for (field, other), found in met.items():
            held = tuple(dict.fromkeys(f.at for f, *_ in found))
            theirs = tuple(dict.fromkeys(g.at for _, g, *_ in found))
            straight = field.sizes == other.sizes and held == theirs
            if straight and len(held) == len(field.sizes):
                if unify(field.axis, other.axis):
                    continue
            elif len(held) == len(theirs) == len(found) and len(field.sizes) + len(other.sizes) > 2:
                self.couple(Coupling(field, other, held, theirs), why)
                continue
            self.part(field, held, found[0][2], reader, why)
            self.part(other, theirs, found[0][3], reader, why)

    def couple(self, coupling: Coupling, why: str) -> None:
        """Make digits of two fields move in one way."""
        for field, held in coupling.sides:
            if len(held) < len(field.sizes):
                self.restrict(field, held, "any", why)
        self.problem.couplings.append(coupling)

    def part(
        self, field: Field, held: Sequence[int], side: Side, reader: fx.Node, why: str
    ) -> None:
        """Fix the factors ``held`` of a field."""
        if len(field.sizes) == 1:
            self.pin((field.whole,), why, self._beside(side, reader))
        else:
            self.restrict(field, held, "still", why)

    def whole(self, factors: tuple[Factor, ...], why: str) -> Field | None:
        """Return one field for what a dimension runs over, tied to the fields that it is made of.

        None where a size is a symbol or a factor stands in it twice.
        """
        if len(factors) == 1 and factors[0].is_whole:
            return factors[0].field
        sizes = [f.size for f in factors if isinstance(f.size, int)]
        known = [n for f in factors for n in f.field.sizes if isinstance(n, int)]
        if not sizes or len(set(factors)) < len(factors) or len(sizes) < len(factors):
            return None
        if len(known) < sum(len(f.field.sizes) for f in factors):
            return None
        made = Field((Space(math.prod(sizes)),), tuple(sizes))
        for field, held in fields_of([factors]).items():
            own = tuple(at for at, f in enumerate(factors) if f.field is field)
            self.couple(Coupling(field, made, tuple(held), own), why)
        return Field(made.axis, (math.prod(sizes),))


BY_STRIDES = (torch.ops.aten.as_strided.default, torch.ops.aten.as_strided_scatter.default)
"""What reads memory as it lies: what a movement would put before them lies in another way."""
Rule: TypeAlias = Callable[[Analysis, fx.Node], None]


def on_live(rule: Rule) -> Rule:
    """Return ``rule`` for operators whose first operand depends on an input; else it is unknown."""

    def guarded(analysis: Analysis, node: fx.Node) -> None:
        first = node.args[0] if node.args else None
        known = isinstance(first, fx.Node) and first in analysis.table
        (rule if known else unknown)(analysis, node)

    return guarded


def unknown(analysis: Analysis, node: fx.Node) -> None:
    """Fix everything that an operator without a rule reads and writes."""
    name = str(getattr(node.target, "__name__", node.target))
    why = f"{name} is not proved to move with a permutation"
    schema = getattr(node.target, "_schema", None)  # what it writes must be the tensor itself
    own = node.target in BY_STRIDES or (schema is not None and schema.is_mutable)
    for operand in node.all_input_nodes:
        if own and analysis.is_live(operand):
            for factors in analysis.dims(operand):
                analysis.pin(factors, why)
        else:
            analysis.fix(operand, node, why)
    analysis.fix_result(node, why)
