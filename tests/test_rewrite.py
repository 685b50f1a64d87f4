from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

import padst_compiler.ops  # noqa: F401  (torch.ops.padst)
from padst_compiler.compat import trace_aten
from padst_compiler.rewrite import (
    Facts,
    PassError,
    Refusal,
    Report,
    Rule,
    has_operators,
    is_from_a_pass,
    run_pipeline,
    shape_of,
)

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


# -- the pipeline ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Named:
    name: str = "named"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        return Report(self.name, (Rule("here", "something"),), (Refusal("there", "a reason"),))


@dataclass(frozen=True)
class Broken(Named):
    name: str = "broken"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        raise KeyError("no such thing")


@dataclass(frozen=True)
class Invalid(Named):
    name: str = "invalid"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        last = list(graph.nodes)[-2]
        with graph.inserting_before(last):
            graph.output(last)  # reads a node that comes later
        return Report(self.name)


def test_passes_run_in_order_and_report() -> None:
    module = traced(lambda x: x.relu(), torch.ones(3))
    reports = run_pipeline((Named("one"), Named("two")), module.graph, Facts())
    assert [r.name for r in reports] == ["one", "two"]
    assert reports[0].fired == (Rule("here", "something"),)
    assert reports[0].left == (Refusal("there", "a reason"),)


def test_an_error_names_the_pass_and_those_before_it() -> None:
    module = traced(lambda x: x.relu(), torch.ones(3))
    steps = (Named("one"), Named("two"), Broken())
    with pytest.raises(RuntimeError, match=r"Pass broken failed \(after: one, two\): 'no such"):
        run_pipeline(steps, module.graph, Facts())
    with pytest.raises(RuntimeError, match=r"\(after: none\)") as caught:
        run_pipeline((Broken(),), module.graph, Facts())
    assert isinstance(caught.value.__cause__, KeyError)


def test_a_pass_that_leaves_an_invalid_graph_is_named() -> None:
    module = traced(lambda x: x.relu().exp(), torch.ones(3))
    with pytest.raises(RuntimeError, match="Pass invalid failed"):
        run_pipeline((Invalid(),), module.graph, Facts())


def test_nodes_that_nobody_reads_vanish_between_passes() -> None:
    module = traced(lambda x: (x.exp(), x.relu())[1], torch.ones(3))
    run_pipeline((Named(),), module.graph, Facts())
    assert not module.graph.find_nodes(op="call_function", target=ATEN.exp.default)


# -- facts -----------------------------------------------------------------------------------------


def facts_of(module: fx.GraphModule, **frozen: tuple[int, Tensor]) -> Facts:
    inputs = placeholders(module)
    return Facts(
        frozen={inputs[i]: t for i, t in frozen.values()},
        names={inputs[i]: name for name, (i, _) in frozen.items()},
    )


def test_what_depends_on_frozen_inputs_only_is_frozen() -> None:
    def run(x: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return w.exp() + torch.arange(3), torch.arange(3) + 1, x + w, torch.rand(3) * w

    w = torch.ones(3)
    module = traced(run, torch.ones(3), w)
    facts = facts_of(module, w=(1, w))
    inputs = placeholders(module)
    results = module.graph.output_node().args[0]
    assert isinstance(results, tuple)
    assert facts.is_frozen(inputs[1])
    assert not facts.is_frozen(inputs[0])
    # arange alone is a constant, but no Parameter: nothing is gained by keeping it
    assert [facts.is_frozen(n) for n in results] == [True, False, False, False]
    assert not facts.is_frozen(3)
    assert not facts.is_frozen(None)


def test_a_graph_without_frozen_inputs_knows_nothing() -> None:
    module = traced(lambda x, p: torch.ops.padst.permute(x, p), torch.ones(3), torch.arange(3))
    facts = Facts()
    assert not any(facts.is_frozen(n) for n in module.graph.nodes)
    assert facts.map_of(placeholders(module)[1]) is None


def test_a_map_is_computed_and_what_was_read_is_remembered() -> None:
    def run(x: Tensor, p: Tensor, q: Tensor) -> Tensor:
        y: Tensor = torch.ops.padst.permute(x, torch.ops.padst.invert(p).flip(0))
        return y + q

    p = torch.tensor([2, 0, 1])
    module = traced(run, torch.ones(3), p, torch.ones(3))
    facts = facts_of(module, p=(1, p), q=(2, torch.ones(3)))
    known = facts.map_of(node(module, ATEN.flip.default))
    assert known is not None
    assert known.perm.tolist() == [0, 2, 1]
    assert facts.read == set()  # looking is not relying
    facts.rely_on(node(module, ATEN.flip.default))
    assert facts.read == {placeholders(module)[1]}


def test_looking_whether_a_tensor_is_frozen_does_not_rely_on_its_numbers() -> None:
    module = traced(lambda x, w: x * w.exp(), torch.ones(3), torch.ones(3))
    facts = facts_of(module, w=(1, torch.ones(3)))
    assert facts.is_frozen(node(module, ATEN.exp.default))
    assert facts.read == set()


def test_a_node_is_owned_by_the_module_whose_tensors_it_reads() -> None:
    def run(x: Tensor, p: Tensor, values: Tensor, indices: Tensor) -> Tensor:
        y: Tensor = torch.ops.padst.permute(x, torch.ops.padst.invert(p))
        z: Tensor = torch.ops.padst.fan_in_linear(y, values, indices, None, 3)
        return z.relu()

    given = (torch.ones(3), torch.arange(3), torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int32))
    module = traced(run, *given)
    facts = facts_of(
        module, **{"fc.permutation": (1, given[1]), "fc": (2, given[2]), "fc2": (3, given[3])}
    )
    permute = node(module, torch.ops.padst.permute.default)
    assert facts.owner(permute) == "fc.permutation"
    assert facts.owner(placeholders(module)[3]) == "fc2"
    relu = node(module, ATEN.relu.default)
    assert facts.owner(relu) == "relu"  # it reads no tensor of a module
    assert Facts().owner(relu) == "relu"


def test_the_shape_of_what_is_no_tensor_is_unknown() -> None:
    module = traced(lambda x: x.sort().values, torch.ones(4))
    sort = node(module, ATEN.sort.default)
    assert shape_of(sort) is None
    assert shape_of(3) is None
    assert shape_of(placeholders(module)[0]) == (4,)


def test_an_error_is_a_passs_however_it_is_wrapped() -> None:
    try:
        try:
            raise PassError("it")
        except PassError as error:
            raise RuntimeError("a backend") from error
    except RuntimeError as error:
        assert is_from_a_pass(error)
    assert not is_from_a_pass(RuntimeError("other")) and not is_from_a_pass(None)


def test_operators_of_ours_are_found_in_inner_graphs_too() -> None:
    def ours(x: Tensor, p: Tensor) -> Tensor:
        y: Tensor = torch.ops.padst.permute(x, p)
        return y

    inner, plain = fx.symbolic_trace(ours), fx.symbolic_trace(lambda x: x + 1)
    assert has_operators(inner)
    assert not has_operators(plain)
    plain.add_module("inner", inner)
    assert has_operators(plain)
