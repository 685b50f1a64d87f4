from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from padst_compiler.compat import trace_aten
from padst_compiler.index_map import IndexMap
from padst_compiler.passes.folding.problem import Edge, Gather
from padst_compiler.passes.folding.rewriting import Rewriter
from padst_compiler.passes.folding.spaces import Space

ATEN = torch.ops.aten
TURN = IndexMap.of([1, 2, 0])
permute = torch.ops.padst.permute


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def traced(function, *inputs: Tensor) -> fx.GraphModule:  # type: ignore[no-untyped-def]
    mode = FakeTensorMode()
    return trace_aten(function, [mode.from_tensor(t) for t in inputs], functional=True)


def node(module: fx.GraphModule, target: Callable[..., Any]) -> fx.Node:
    (found,) = module.graph.find_nodes(op="call_function", target=target)
    assert isinstance(found, fx.Node)
    return found


def done(module: fx.GraphModule) -> fx.GraphModule:
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return module


def test_replace_reorders_an_operand_of_one_reader_only() -> None:
    given = x(3), x(3)
    module = traced(lambda a, w: (a * w, a + w), *given)
    rewriter, mul = Rewriter(module.graph), node(module, ATEN.mul.Tensor)
    (_, w) = module.graph.find_nodes(op="placeholder")
    rewriter.replace(mul, w, lambda t, p: t[p], TURN)
    rewriter.replace(mul, w, lambda t, p: t[p], TURN)  # on top of the first
    one, two = done(module)(*given)
    assert torch.equal(one, given[0] * given[1][TURN.perm][TURN.perm])
    assert torch.equal(two, given[0] + given[1])


def test_equal_orders_are_one_constant() -> None:
    module = traced(lambda a: a.exp(), x(3))
    rewriter = Rewriter(module.graph)
    assert rewriter.order(TURN) is rewriter.order(IndexMap.of([1, 2, 0]))
    assert rewriter.order(TURN) is not rewriter.order(TURN.inverse)


def test_gather_after_a_node_moves_it_for_all_and_twice_along_two_dimensions() -> None:
    given = x(3, 3)
    module = traced(lambda a: (a.exp().tanh(), a.exp().neg()), given)
    first, second = module.graph.find_nodes(op="call_function", target=ATEN.exp.default)
    second.replace_all_uses_with(first)
    rewriter = Rewriter(module.graph)
    rewriter.gather(Gather(first, 1), TURN)
    rewriter.gather(Gather(first, 0), TURN)
    moved = given.exp()[TURN.perm][:, TURN.perm]
    one, two = done(module)(given)
    assert torch.equal(one, moved.tanh()) and torch.equal(two, moved.neg())
    assert len(module.graph.find_nodes(op="call_function", target=permute.default)) == 1


def test_gather_after_an_input_stands_behind_all_inputs() -> None:
    given = x(3), x(3)
    module = traced(lambda a, b: a * b, *given)
    a, _ = module.graph.find_nodes(op="placeholder")
    Rewriter(module.graph).gather(Gather(a, 0), TURN)
    assert torch.equal(done(module)(*given), given[0][TURN.perm] * given[1])


def test_gather_before_a_reader_moves_back_for_that_reader() -> None:
    given = x(2, 3)
    module = traced(lambda a: (a.exp(), a.neg()), given)
    (a,) = module.graph.find_nodes(op="placeholder")
    Rewriter(module.graph).gather(Gather(a, 1, node(module, ATEN.exp.default)), TURN)
    one, two = done(module)(given)
    assert torch.equal(one, given[:, TURN.inverse.perm].exp()) and torch.equal(two, given.neg())


def test_settle_drops_a_map_of_which_nothing_is_left_and_keeps_its_strides() -> None:
    given = x(3, 2), TURN.perm
    module = traced(lambda a, p: permute(a.t(), p), *given)
    edge = Edge(node(module, permute.default), (Space(3),), (Space(3),), TURN, 1.0)
    rewriter = Rewriter(module.graph)
    rewriter.settle(edge, IndexMap(torch.arange(3)))
    result = done(module)(*given)
    assert torch.equal(result, given[0].t()) and result.is_contiguous()
    assert rewriter.current(module.graph.output_node(), edge.node) is not edge.node


def test_settle_gives_a_map_what_is_left() -> None:
    given = x(2, 3), TURN.perm
    module = traced(lambda a, p: permute(a, p), *given)
    edge = Edge(node(module, permute.default), (Space(3),), (Space(3),), TURN, 1.0)
    Rewriter(module.graph).settle(edge, TURN.inverse)
    assert torch.equal(done(module)(*given), given[0][:, TURN.inverse.perm])
