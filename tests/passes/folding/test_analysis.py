from collections.abc import Callable
from typing import Any

import pytest
import sympy
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from padst_compiler.compat import trace_aten
from padst_compiler.index_map import IndexMap
from padst_compiler.passes.folding.analysis import Analysis
from padst_compiler.passes.folding.factors import Factor, Field, fresh
from padst_compiler.passes.folding.problem import ANY
from padst_compiler.passes.folding.rules import RULES
from padst_compiler.passes.folding.rules.pointwise import pointwise
from padst_compiler.passes.folding.spaces import Space, leaves
from padst_compiler.rewrite import Facts

ATEN = torch.ops.aten


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def analysed(function: Callable[..., Any], *inputs: Tensor, frozen: int = 0) -> Analysis:
    """Walk a graph whose last inputs are frozen."""
    mode = FakeTensorMode()
    graph = trace_aten(function, [mode.from_tensor(t) for t in inputs], functional=True).graph
    holders = list(graph.find_nodes(op="placeholder"))
    known = dict(list(zip(holders, inputs, strict=True))[len(inputs) - frozen :])
    return Analysis(graph, Facts(frozen=known), RULES, pointwise)


def reasons(analysis: Analysis) -> list[str]:
    return list(dict.fromkeys(e.why for e in analysis.problem.endpoints if e.why))


def node(analysis: Analysis, target: Callable[..., Any]) -> fx.Node:
    (found,) = analysis.graph.find_nodes(op="call_function", target=target)
    assert isinstance(found, fx.Node)
    return found


def test_inputs_and_outputs_are_fixed_and_both_could_be_moved() -> None:
    analysis = analysed(lambda x: x.exp(), x(2, 3))
    assert reasons(analysis) == [
        "it permutes a graph input (arg0_1)",
        "it reaches an output of the graph",
    ]
    assert [e.allows for e in analysis.problem.endpoints] == [None] * 4
    gathers = [e.gather for e in analysis.problem.endpoints]
    assert [(g.dim, g.bytes) for g in gathers if g] == [(0, 48.0), (1, 48.0)] * 2


def test_pointwise_by_tag_keeps_the_spaces_and_the_unknown_has_new_ones() -> None:
    analysis = analysed(lambda x: x.exp().sort(0).values, x(2, 3))
    (holder,) = analysis.graph.find_nodes(op="placeholder")
    exp, value = node(analysis, ATEN.exp.default), analysis.graph.output_node().all_input_nodes[0]
    old, new = analysis.dims(exp), analysis.dims(value)
    for one, two in zip(analysis.dims(holder), old, strict=True):
        assert one[0].same(two[0])
    assert not any(one[0].same(two[0]) for one, two in zip(old, new, strict=True))
    assert "sort.default is not proved to move with a permutation" in reasons(analysis)


def test_random_numbers_are_unknown_for_all_their_tags() -> None:
    analysis = analysed(lambda x: torch.bernoulli(x.sigmoid()), x(2, 3))
    assert any("bernoulli" in why for why in reasons(analysis))


def test_what_is_frozen_is_no_tensor_of_the_walk_but_follows() -> None:
    analysis = analysed(lambda x, v: x * v.exp(), x(2, 3), x(3), frozen=1)
    exp = node(analysis, ATEN.exp.default)
    assert analysis.is_constant(exp) and not analysis.is_live(exp)
    (edit,) = (e for e in analysis.problem.endpoints if e.edit is not None)
    assert edit.allows is ANY


def test_sizes_of_one_have_no_order() -> None:
    analysis = analysed(lambda x: x.exp(), x(1, 3, 1))
    assert [len(f) for f in analysis.dims(node(analysis, ATEN.exp.default))] == [0, 1, 0]


@pytest.fixture
def empty() -> Analysis:
    return analysed(lambda x: x.exp(), x(1, 1))


def halves(axis: tuple[Space, ...], *sizes: int) -> tuple[Factor, Factor]:
    field = Field(axis, sizes)
    return Factor(field, 0), Factor(field, 1)


def test_align_joins_whole_fields_and_pins_what_does_not_fit(empty: Analysis) -> None:
    reader = node(empty, ATEN.exp.default)
    (a,), (b,), (c,) = fresh([6, 6, 4])
    empty.align([(((a,), None, 0), ((b,), None, 0))], reader, "why")
    assert leaves(a.field.axis) == leaves(b.field.axis)
    assert "why" not in reasons(empty)
    empty.align([(((a,), None, 0), ((c,), None, 0))], reader, "why")
    assert sum(e.why == "why" and e.allows is None for e in empty.problem.endpoints) == 2


def test_align_couples_heads_whose_features_differ(empty: Analysis) -> None:
    reader = node(empty, ATEN.exp.default)
    one, two = halves((Space(6),), 3, 2), halves((Space(6),), 3, 2)
    empty.align([((one[:1], None, 0), (two[:1], None, 0))], reader, "why")
    (coupling,) = empty.problem.couplings
    assert (coupling.one, coupling.two) == (one[0].field, two[0].field)
    empty.align([((one[1:], None, 0), (two[1:], None, 0))], reader, "why")
    assert [c.held for c in empty.problem.couplings] == [(0,), (1,)]


def test_align_divides_heads_in_groups(empty: Analysis) -> None:
    reader = node(empty, ATEN.exp.default)
    (heads,), (groups,), (copies,) = fresh([4, 2, 2])
    empty.align([(((heads,), None, 0), ((groups, copies), None, 0))], reader, "why")
    found = [(c.held, c.other, c.two.sizes) for c in empty.problem.couplings]
    assert found == [((0,), (0,), (2,)), ((1,), (0,), (2,))]


def test_a_field_that_stands_twice_in_a_tensor_is_fixed(empty: Analysis) -> None:
    heads, features = halves((Space(6),), 3, 2)
    empty.checked(((heads,), (heads,), (features,), (features,)))
    allows = empty.problem.endpoints[-1].allows
    assert allows is not None
    assert allows(IndexMap.of([0, 1, 2, 3, 4, 5])) and not allows(IndexMap.of([2, 3, 0, 1, 4, 5]))


def test_dimensions_put_together_are_one_field_where_sizes_are_known(empty: Analysis) -> None:
    heads, features = halves((Space(6),), 3, 2)
    whole = empty.whole((features, heads), "why")
    assert whole is not None and whole.sizes == (6,)
    assert [(c.held, c.other) for c in empty.problem.couplings] == [((1, 0), (0, 1))]
    assert empty.whole((heads, heads), "why") is None
    (symbol,) = fresh([sympy.Symbol("s")])
    assert empty.whole((*symbol, heads), "why") is None


def test_a_part_of_a_field_allows_what_keeps_it_apart(empty: Analysis) -> None:
    heads, features = halves((Space(6),), 3, 2)
    before = len(empty.problem.endpoints)
    empty.checked(((heads,), (features,)))
    assert len(empty.problem.endpoints) == before
    empty.checked(((heads,),))
    empty.checked(((features,),))
    whole, common = empty.problem.endpoints[before:]
    swapped = IndexMap.of([1, 0, 2, 3, 4, 5])
    assert whole.allows is not None and common.allows is not None
    assert whole.allows(swapped) and not common.allows(swapped)
