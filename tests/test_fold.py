from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.nn import functional as F

from padst_compiler.fold import Folded, fold
from padst_compiler.kernels import CANDIDATES, PORTABLE
from padst_compiler.ops import LINEAR
from padst_compiler.passes import FOLDS, inference_passes, training_passes
from padst_compiler.rewrite import Facts, Pass, Report
from padst_compiler.structures import Block, Shape
from padst_compiler.verify import MismatchError

permute = torch.ops.padst.permute


def folded(
    function: Callable[..., Any],
    *inputs: Tensor,
    passes: tuple[Pass, ...] = (),
    verify: bool = True,
    **frozen: Tensor,
) -> Folded:
    """Fold ``function(*inputs, **frozen)``."""
    names, given = list(frozen), [*inputs, *frozen.values()]

    def run(*tensors: Tensor) -> Any:
        named = dict(zip(names, tensors[len(inputs) :], strict=True))
        return function(*tensors[: len(inputs)], **named)

    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) for t in given]
    state = {len(inputs) + i: f"net.{name}" for i, name in enumerate(names)}
    return fold(run, fakes, given, state, passes, verify=verify)


def linear(x: Tensor, p: Tensor, w: Tensor) -> Tensor:
    return F.linear(permute(x, p), w)


def targets(result: Folded) -> list[str]:
    nodes = result.graph_module.graph.nodes
    return [n.target.__name__ for n in nodes if n.op == "call_function"]


X, P, W = torch.ones(3, 8), torch.randperm(8), torch.ones(4, 8)
DENSE = inference_passes(CANDIDATES, prefer="dense", fold=True)


def test_a_folded_graph_takes_the_inputs_of_the_function() -> None:
    x, w = torch.randn(3, 8), torch.randn(4, 8)
    result = folded(linear, x, passes=DENSE, p=P, w=w)
    assert len(result.inputs) == 3
    assert "permute.default" not in targets(result)
    torch.testing.assert_close(result.graph_module(x, P, w), linear(x, P, w))
    torch.testing.assert_close(result.graph_module(-x, P, 2 * w), linear(-x, P, 2 * w))


def test_reports_come_in_the_order_of_the_passes() -> None:
    result = folded(linear, X, passes=DENSE, p=P, w=W)
    assert [r.name for r in result.reports] == [step.name for step in DENSE]
    fired = {r.name: r.fired for r in result.reports if r.fired}
    assert list(fired) == ["fold_permutations"]
    assert fired["fold_permutations"][0].where == "net.p"


def test_the_inputs_whose_numbers_shaped_the_graph_are_named() -> None:
    """A block reader absorbs some maps and not others: the map's numbers were read, not w's."""
    block, shape = Block(4), Shape(4, 8)
    indices = block.select(torch.randn(4, 8), 1)
    values = torch.randn(*indices.shape, *block.unit(shape))

    def run(x: Tensor, p: Tensor, v: Tensor, i: Tensor) -> Any:
        return LINEAR["block"](permute(x, p), v, i, None, 4)

    assert folded(run, X, passes=FOLDS, p=torch.arange(8), v=values, i=indices).relied_on == [1]
    assert folded(run, X, passes=(), p=torch.arange(8), v=values, i=indices).relied_on == []


def test_what_passes_rely_on_is_only_what_is_frozen() -> None:
    result = folded(linear, X, P, W, passes=FOLDS)
    assert result.relied_on == []
    assert "permute.default" in targets(result)


@dataclass(frozen=True)
class Break:
    """A pass with a bug: it drops every permutation, without folding it."""

    name: str = "break"

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        for node in graph.find_nodes(op="call_function", target=permute.default):
            source = node.args[0]
            assert isinstance(source, fx.Node)
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        return Report(self.name)


def test_a_pass_that_changes_what_is_computed_is_caught() -> None:
    w = torch.randn(4, 8)
    with pytest.raises(MismatchError):
        folded(linear, X, passes=(Break(),), p=torch.arange(8).flip(0), w=w)


def test_it_is_caught_on_random_inputs_though_the_example_hides_it() -> None:
    with pytest.raises(MismatchError):
        folded(lambda x, p: permute(x, p), X, passes=(Break(),), p=torch.arange(8).flip(0))


def test_verification_can_be_switched_off() -> None:
    result = folded(
        linear, X, passes=(Break(),), verify=False, p=torch.arange(8).flip(0), w=torch.randn(4, 8)
    )
    assert result.verdict == "not verified: switched off"
    assert folded(linear, X, passes=DENSE, p=P, w=W).verdict.startswith("verified in float64")


def test_a_buffer_that_the_graph_writes_to_is_not_frozen() -> None:
    def run(x: Tensor, p: Tensor) -> Any:
        y = permute(x, p)
        p.copy_(p.flip(0))
        return y

    result = folded(run, X, passes=DENSE, p=P.clone())
    assert list(result.facts.frozen) == []
    assert result.relied_on == []
    table = P.clone()
    result.graph_module(X, table)
    assert torch.equal(table, P.flip(0))


def test_an_inference_tensor_is_not_frozen() -> None:
    with torch.inference_mode():
        table = torch.randperm(8)
    result = folded(linear, X, passes=DENSE, p=table, w=W)
    assert [result.inputs.index(n) for n in result.facts.frozen] == [2]
    assert "index_select.default" in targets(result)


def test_a_constant_of_the_function_comes_along() -> None:
    constant = torch.randn(4)
    result = folded(lambda x, p, w: linear(x, p, w) + constant, X, passes=DENSE, p=P, w=W)
    torch.testing.assert_close(result.graph_module(X, P, W), linear(X, P, W) + constant)


def test_a_function_without_our_operators_is_left_as_it_is() -> None:
    result = folded(lambda x, w: F.linear(x, w).relu(), X, passes=DENSE, w=W)
    assert targets(result) == ["t.default", "mm.default", "relu.default"]


# -- the pipelines ---------------------------------------------------------------------------------


def names(passes: tuple[Pass, ...]) -> list[str]:
    return [step.name for step in passes]


def test_inference_folds_before_and_after_the_choice_and_lowers_last() -> None:
    passes = names(inference_passes(CANDIDATES, prefer="auto", fold=True))
    folds = names(FOLDS)
    weights = ["open_attention", "use_sparse_operator", "lower_weights", "recognise_maps"]
    last = ["choose_formulation", *folds, "fuse_mlp", "lower_maps", "invert_maps"]
    assert passes == ["drop_watch", *weights, *folds, *last]


def test_without_folding_maps_are_only_lowered() -> None:
    passes = names(inference_passes(PORTABLE, prefer="auto", fold=False))
    weights = ["open_attention", "use_sparse_operator", "lower_weights"]
    assert passes == [
        "drop_watch",
        *weights,
        "choose_formulation",
        "fuse_mlp",
        "lower_maps",
        "invert_maps",
    ]


def test_training_relies_on_no_number() -> None:
    passes = names(training_passes(CANDIDATES, prefer="auto"))
    weights = ["use_sparse_operator", "take_sparse_gradient", "lower_weights"]
    rest = ["cancel_inverse", "choose_formulation", "lower_maps", "invert_maps"]
    assert passes == ["drop_watch", *weights, *rest]


def test_passes_are_values_and_their_text_names_them_for_the_cache() -> None:
    one, two = (inference_passes(CANDIDATES, prefer="auto", fold=True) for _ in range(2))
    assert one == two
    assert repr(one) == repr(two)
    assert "0x" not in repr(one)
    assert repr(one) != repr(inference_passes(CANDIDATES, prefer="dense", fold=True))


def test_a_site_that_was_chosen_dense_absorbs_what_its_structure_could_not() -> None:
    block, shape = Block(4), Shape(8, 8)
    indices = block.select(torch.randn(8, 8), 1)
    given: dict[str, Any] = {
        "v": torch.randn(*indices.shape, *block.unit(shape)),
        "i": indices,
    }
    table = torch.tensor([7, 1, 2, 3, 4, 5, 6, 0])  # no map of blocks

    def run(x: Tensor, p: Tensor, v: Tensor, i: Tensor) -> Any:
        y = LINEAR["block"](permute(x, p), v, i, None, 8)
        return permute(y, p)

    for prefer, gathers in (("dense", 0), ("sparse", 2)):
        passes = inference_passes(CANDIDATES, prefer=prefer, fold=True)
        result = folded(run, torch.randn(5, 8), passes=passes, p=table, **given)
        (lowered,) = (report for report in result.reports if report.name == "lower_maps")
        assert len(lowered.left) == gathers
        assert result.verdict.startswith("verified")
