import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from padst_compiler.fold import Folded, fold
from padst_compiler.frozen import FrozenCall, Split, split

CHANGED = "A permutation that was folded at compile time has changed"


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


# -- the call --------------------------------------------------------------------------------------


class Recorded:
    """A frozen call on ``x * w.exp()``, with a count of what ran."""

    def __init__(self, net: Any = None, size: int = 3, watched: Sequence[int] = (2,)) -> None:
        self.tensors: list[Tensor] = [*given((size,), (size,)), torch.arange(size).roll(1)]
        self.net = net or (lambda x, w, p: (x * w.exp() + p.sum() * 0,))
        result = folded(self.net, self.tensors, [1, 2])
        self.parts = split(result.graph_module, result.facts)
        assert self.parts.prologue is not None
        self.count = {"prologue": 0, "main": 0, "original": 0}
        prologue, main = self.parts.prologue, self.parts.main
        self.parts.prologue = self.counted("prologue", prologue)
        self.call = FrozenCall(
            self.parts,
            self.counted("main", main),
            self.counted("original", self.net),
            watched,  # the permutation shaped the graph
            self.tensors,
        )

    def counted(self, name: str, function: Any) -> Any:
        def call(*arguments: Any) -> Any:
            self.count[name] += 1
            return function(*arguments)

        return call

    def agrees(self) -> bool:
        return torch.equal(self.call(*self.tensors)[0], self.net(*self.tensors)[0])

    def counts(self, **expected: int) -> bool:
        return {k: v for k, v in self.count.items() if v} == expected


def test_the_prologue_runs_once() -> None:
    it = Recorded()
    assert all(it.agrees() for _ in range(3))
    assert it.counts(prologue=1, main=3)


WRITES: Mapping[str, Callable[[list[Tensor]], Any]] = {
    "mul_": lambda t: t[1].mul_(2),
    "copy_": lambda t: t[1].copy_(torch.ones(3)),
    "an element": lambda t: t[1].__setitem__(0, 7.0),
    "a view": lambda t: t[1][1:].zero_(),
    "a detached alias": lambda t: t[1].detach().add_(1),
    "another tensor": lambda t: t.__setitem__(1, torch.ones(3, dtype=torch.float64)),
    "set_": lambda t: t[1].set_(torch.ones(3, dtype=torch.float64).untyped_storage()),
    "data": lambda t: setattr(t[1], "data", torch.ones(3, dtype=torch.float64)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_write_to_a_frozen_tensor_is_noticed(write: Callable[[list[Tensor]], Any]) -> None:
    it = Recorded()
    assert it.agrees()
    write(it.tensors)
    assert it.agrees()
    assert it.agrees()
    assert it.counts(prologue=2, main=3)


@pytest.mark.parametrize("position", [1, 2])
def test_a_new_tensor_at_an_old_address_is_noticed(position: int) -> None:
    """The allocator hands out a freed address at once, and a new tensor starts at version 0."""
    it = Recorded(net=lambda x, w, p: (x * w.exp() * (p + w).exp(),), size=4096, watched=[])
    it.tensors[2] = torch.zeros(4096, dtype=torch.float64)
    for value in range(20):
        it.tensors[position] = torch.empty(0)
        it.tensors[position] = torch.full((4096,), float(value) / 8, dtype=torch.float64)
        assert it.agrees()


def test_a_new_permutation_at_an_old_address_is_noticed() -> None:
    it = Recorded(net=lambda x, w, p: ((x * w.exp())[p],), size=4096)
    for shift in range(20):
        it.tensors[2] = torch.empty(0)
        it.tensors[2] = torch.arange(4096).roll(shift)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=CHANGED)
            assert it.agrees()
    assert it.count["original"] == 19  # all but the first one's own shift


def test_a_new_input_is_no_write() -> None:
    it = Recorded()
    it.agrees()
    it.tensors[0] = torch.randn(3, dtype=torch.float64)
    it.tensors[0].mul_(2)
    assert it.agrees()
    assert it.counts(prologue=1, main=2)


def test_a_changed_permutation_runs_the_original_and_warns_once() -> None:
    it = Recorded()
    assert it.agrees()
    it.tensors[2].copy_(torch.tensor([1, 2, 0]))
    with pytest.warns(UserWarning, match=CHANGED):
        assert it.agrees()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert it.agrees()
        it.tensors[1].mul_(2)
        assert it.agrees()
    assert it.counts(prologue=1, main=1, original=3)


def test_a_permutation_replaced_by_another_tensor_is_noticed() -> None:
    it = Recorded()
    it.tensors[2] = torch.tensor([1, 2, 0])
    with pytest.warns(UserWarning, match=CHANGED):
        assert it.agrees()
    assert it.counts(original=1)


def test_a_result_may_be_written_to() -> None:
    it = Recorded(net=lambda x, w, p: (x + p, w.exp()))
    it.call(*it.tensors)[1].add_(5)
    assert torch.equal(it.call(*it.tensors)[1], it.tensors[1].exp())


def test_parameters_that_need_gradients_stay_out_of_the_graph_of_gradients() -> None:
    it = Recorded()
    it.tensors[1] = nn.Parameter(it.tensors[1])
    with torch.no_grad():
        assert it.agrees()
    assert not it.call(*it.tensors)[0].requires_grad
