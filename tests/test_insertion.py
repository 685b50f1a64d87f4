"""What passes insert: traced functions with their values, constants, laid out copies."""

from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from padst_compiler.compat import inductor_decompositions, trace_aten
from padst_compiler.insertion import as_contiguous, constant, inline
from padst_compiler.rewrite import shape_of

ATEN = torch.ops.aten


def traced(function: Any, *tensors: Tensor) -> fx.GraphModule:
    mode = FakeTensorMode()
    return trace_aten(function, [mode.from_tensor(t) for t in tensors])


def placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return list(module.graph.find_nodes(op="placeholder"))


def node(module: fx.GraphModule, target: Any) -> fx.Node:
    found: fx.Node
    (found,) = module.graph.find_nodes(op="call_function", target=target)
    return found


def test_inlined_nodes_carry_values_and_come_before_their_reader() -> None:
    module = traced(lambda x, w: x * w, torch.ones(2, 3), torch.ones(3))
    x, w = placeholders(module)
    mul = node(module, ATEN.mul.Tensor)
    twice = inline(module.graph, mul, lambda a, n, b, nothing: a * n + b, (x, 2, w, None))
    mul.update_arg(0, twice)
    module.graph.lint()
    module.recompile()
    torch.testing.assert_close(module(torch.ones(2, 3), torch.ones(3)), torch.full((2, 3), 3.0))
    assert shape_of(twice) == (2, 3)
    assert all("val" in n.meta for n in module.graph.nodes if n.op == "call_function")


def test_several_results_come_back_in_order() -> None:
    module = traced(lambda x: x.relu(), torch.ones(4))
    relu = node(module, ATEN.relu.default)
    small, large = inline(module.graph, relu, lambda x: (x[:1], x.exp()), placeholders(module))
    assert (shape_of(small), shape_of(large)) == ((1,), (4,))


def test_a_function_that_returns_its_argument_inserts_nothing() -> None:
    module = traced(lambda x: x.relu(), torch.ones(4))
    (x,) = placeholders(module)
    before = len(module.graph.nodes)
    assert inline(module.graph, node(module, ATEN.relu.default), lambda t: t, (x,)) is x
    assert len(module.graph.nodes) == before


def test_one_node_may_be_given_twice() -> None:
    module = traced(lambda x: x.relu(), torch.ones(4))
    (x,) = placeholders(module)
    relu = node(module, ATEN.relu.default)
    relu.update_arg(0, inline(module.graph, relu, lambda a, b: a + 2 * b, (x, x)))
    module.recompile()
    assert module(torch.ones(4)).tolist() == [3.0] * 4


def test_inlined_nodes_are_decomposed_by_the_graphs_own_table() -> None:
    module = traced(lambda x: x.relu(), torch.ones(4))
    (x,) = placeholders(module)
    relu, table = node(module, ATEN.relu.default), inductor_decompositions()
    assert ATEN.silu.default in table
    result = inline(module.graph, relu, torch.nn.functional.silu, (x,), table)
    assert result.target is not ATEN.silu.default


def test_alike_arguments_share_a_trace_and_others_do_not() -> None:
    module = traced(lambda a, b, c: (a + b).relu() @ c, *(torch.ones(4, 4) for _ in range(3)))
    (a, b, c), relu = placeholders(module), node(module, ATEN.relu.default)
    runs = []

    def scaled(x: Tensor, times: int) -> Tensor:
        runs.append(times)
        return x * times

    traces: dict[object, fx.GraphModule] = {}
    results = [
        inline(module.graph, relu, scaled, (x, times), None, traces)
        for x, times in ((a, 2), (b, 2), (c, 3), (c, 2))
    ]
    assert runs == [2, 3]
    assert [new.all_input_nodes for new in results] == [[a], [b], [c], [c]]
    with module.graph.inserting_before(relu):
        turned = module.graph.call_function(ATEN.t.default, (a,))
    turned.meta["val"] = a.meta["val"].t()
    inline(module.graph, relu, scaled, (turned, 2), None, traces)
    assert runs == [2, 3, 2]


def test_constants_are_buffers_at_the_start_and_have_names_of_their_own() -> None:
    module = traced(lambda x: x.relu(), torch.ones(4))
    relu = node(module, ATEN.relu.default)
    held = [constant(module.graph, "order", torch.full((4,), float(i))) for i in range(3)]
    for one in held:
        with module.graph.inserting_before(relu):
            added = module.graph.call_function(ATEN.add.Tensor, (relu.args[0], one))
        relu.update_arg(0, added)
    module.graph.lint()
    module.recompile()
    assert module(torch.ones(4)).tolist() == [4.0] * 4
    assert [name for name, _ in module.named_buffers()] == ["_order_0", "_order_1", "_order_2"]
    assert {shape_of(one) for one in held} == {(4,)}


def test_what_lies_contiguous_is_not_copied() -> None:
    module = traced(lambda x: x.mT.relu(), torch.ones(3, 4))
    (x,), relu = placeholders(module), node(module, ATEN.relu.default)
    assert as_contiguous(module.graph, relu, x) is x
    turned = relu.args[0]
    assert isinstance(turned, fx.Node)
    copied = as_contiguous(module.graph, relu, turned)
    assert copied is not turned and copied.meta["val"].stride() == (3, 1)
