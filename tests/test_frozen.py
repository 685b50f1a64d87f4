from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from padst_compiler.fold import Folded, fold
from padst_compiler.frozen import Split, outline, split


def folded(function: Callable[..., Any], tensors: Sequence[Tensor], state: Sequence[int]) -> Folded:
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) for t in tensors]
    return fold(function, fakes, tensors, dict.fromkeys(state, "fc"), (), verify=False)


def parted(function: Callable[..., Any], tensors: Sequence[Tensor], state: Sequence[int]) -> Split:
    result = folded(function, tensors, state)
    return split(result.graph_module, result.facts)


def run(parts: Split, tensors: Sequence[Tensor]) -> Any:
    derived: Any = ()
    if parts.prologue is not None:
        derived = parts.prologue(*(tensors[i] for i in parts.prologue_inputs))
    return parts.main(*(tensors[i] for i in parts.main_inputs), *derived)


def names(parts: Split) -> tuple[list[str], list[str]]:
    graphs = [parts.prologue.graph if parts.prologue is not None else None, parts.main.graph]
    calls = [
        [] if graph is None else [n.target.__name__ for n in graph.nodes if n.op == "call_function"]
        for graph in graphs
    ]
    return calls[0], calls[1]


def given(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


# -- the split -------------------------------------------------------------------------------------


def test_work_on_frozen_tensors_moves_to_the_prologue() -> None:
    tensors = given((3, 4), (5, 4))
    parts = parted(lambda x, w: x @ w.exp().t(), tensors, [1])
    early, late = names(parts)
    assert early == ["exp.default"]
    assert late == ["t.default", "mm.default"]  # a view costs nothing in the main graph
    assert (parts.prologue_inputs, parts.main_inputs) == ([1], [0])
    assert [tuple(d.shape) for d in parts.derived] == [(5, 4)]
    torch.testing.assert_close(run(parts, tensors), tensors[0] @ tensors[1].exp().t())


def test_a_graph_without_such_work_is_not_split() -> None:
    tensors = given((3, 4), (5, 4))
    parts = parted(lambda x, w: x @ w.t(), tensors, [1])
    assert parts.prologue is None
    assert parts.main_inputs == [0, 1]
    assert parts.derived == []


def test_nothing_frozen_nothing_split() -> None:
    tensors = given((3, 4), (5, 4))
    assert parted(lambda x, w: x @ w.exp().t(), tensors, []).prologue is None


NETS: dict[str, Callable[..., Any]] = {
    "a view read early and late": lambda x, w, v: x @ w.t() + (w.t() * 2).sum(0),
    "a view of derived work": lambda x, w, v: (x @ w.exp().t(), w.exp().t().relu() * v.sum()),
    "two results of one step": lambda x, w, v: (
        x @ torch.sort(w, -1).values.t() + torch.sort(w, -1).indices.sum()
    ),
    "derived from derived": lambda x, w, v: (x @ w.exp().t()) * w.exp().sum(-1),
    "derived from two": lambda x, w, v: x @ (w + v).t() + (w - v).exp().sum(),
    "a frozen result": lambda x, w, v: (x.exp(), w.exp(), v),
    "only a frozen result": lambda x, w, v: w.exp(),
    "a frozen input twice": lambda x, w, v: (w @ w.t()).sum() * x,
    "constants": lambda x, w, v: x @ (w * torch.arange(4)).t() + torch.arange(5),
    "an unused one": lambda x, w, v: x.exp(),
    "nothing to do": lambda x, w, v: (x, w),
    "slices and selects": lambda x, w, v: (
        x * w[0] + w[1:3].exp()[0] * v[..., None].expand(4, 3)[:, 0]
    ),
}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS.keys())
def test_a_split_graph_computes_the_same(net: Callable[..., Any]) -> None:
    tensors = given((5, 4), (5, 4), (4,))
    parts = parted(net, tensors, [1, 2])
    expected = net(*tensors)
    torch.testing.assert_close(run(parts, tensors), expected, rtol=1e-12, atol=1e-12)


def test_random_numbers_are_drawn_on_each_call() -> None:
    tensors = given((3, 4), (4,))
    early, late = names(parted(lambda x, w: x * (w * torch.rand(4)), tensors, [1]))
    assert early == []
    assert "rand.default" in late


def test_a_buffer_that_the_graph_writes_is_not_frozen() -> None:
    def count(x: Tensor, seen: Tensor) -> Tensor:
        seen.add_(1)
        return x * seen.exp()

    tensors = given((3,), (3,))
    assert names(parted(count, tensors, [1]))[0] == []


# -- outlines --------------------------------------------------------------------------------------


def outlined(function: Callable[..., Any], *tensors: Tensor) -> object:
    return outline(parted(function, tensors, [1]))


def test_graphs_that_differ_in_names_and_frozen_numbers_have_one_outline() -> None:
    def one(x: Tensor, w: Tensor) -> Tensor:
        first = x * w.exp()
        return first.relu()

    def two(y: Tensor, w: Tensor) -> Tensor:
        return torch.relu(y * (w.exp() + w.sin()))

    tensors = given((3, 4), (4,))
    assert outlined(one, *tensors) == outlined(two, *tensors)


def test_other_operators_sizes_types_and_constants_have_another() -> None:
    def scaled(x: Tensor, w: Tensor) -> Tensor:
        return x * w.exp() * 2

    tensors = given((3, 4), (4,))
    base = outlined(scaled, *tensors)
    assert base != outlined(lambda x, w: x * w.exp() * 3, *tensors)
    assert base != outlined(lambda x, w: x + w.exp() * 2, *tensors)
    assert base != outlined(scaled, *given((2, 4), (4,)))
    assert base != outlined(scaled, *(t.float() for t in tensors))
    ones, twos = torch.ones(4), torch.full((4,), 2.0)
    held = [outlined(lambda x, w, c=c: x * w.exp() + c, *tensors) for c in (ones, ones, twos)]
    assert held[0] == held[1] != held[2]
