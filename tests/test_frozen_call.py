import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from padst_compiler.fold import Folded, fold
from padst_compiler.frozen import Split, outline, split
from padst_compiler.frozen_call import FrozenCall
from padst_compiler.passes import FOLDS

CHANGED = "A permutation that was folded at compile time has changed"


def folded(function: Callable[..., Any], tensors: Sequence[Tensor], state: Sequence[int]) -> Folded:
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) for t in tensors]
    return fold(function, fakes, tensors, dict.fromkeys(state, "fc"), (), verify=False)


def given(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(*shape, dtype=torch.float64) for shape in shapes]


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


# -- other permutations ----------------------------------------------------------------------------


class Refolded:
    """``relu(x @ w)[..., p] @ v``, whose map is absorbed by the columns of ``w``."""

    def __init__(self) -> None:
        self.folds, self.originals = 0, 0
        mode = FakeTensorMode()
        self.fakes = [mode.from_tensor(t) for t in self.fresh(0)]
        self.first = self.fresh(0)
        parts, watched = self.fold(self.first)
        self.outline = outline(parts)
        self.call = FrozenCall(parts, parts.main, self.original, watched, self.first, self.again)

    @staticmethod
    def net(x: Tensor, w: Tensor, p: Tensor, v: Tensor) -> tuple[Tensor]:
        return (torch.ops.padst.permute((x @ w).relu(), p) @ v.exp(),)

    def original(self, *tensors: Tensor) -> Any:
        self.originals += 1
        return self.net(*tensors)

    @staticmethod
    def fresh(seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        x, w, v = (torch.randn(6, 6, generator=generator, dtype=torch.float64) for _ in range(3))
        return [x, w, torch.randperm(6, generator=generator), v]

    def fold(self, tensors: Sequence[Any]) -> tuple[Split, list[int]]:
        self.folds += 1
        result = fold(self.net, self.fakes, tensors, dict.fromkeys([1, 2, 3], "fc"), FOLDS)
        watched = result.relied_on
        return split(result.graph_module, result.facts), watched

    def again(self, tensors: Sequence[Any]) -> tuple[Split, list[int]] | None:
        parts, watched = self.fold(tensors)
        return (parts, watched) if outline(parts) == self.outline else None

    def agrees(self, tensors: list[Tensor]) -> bool:
        return torch.allclose(self.call(*tensors)[0], self.net(*tensors)[0], rtol=1e-12)


def test_other_permutations_are_folded_once_and_share_the_compiled_graph() -> None:
    it = Refolded()
    blocks = [it.fresh(seed) for seed in (0, 1, 2, 4)]
    for _ in range(3):
        assert all(it.agrees(block) for block in (it.first, *blocks))
    assert (it.folds, it.originals) == (4, 0)  # the first block has the first numbers


def test_a_permutation_that_comes_back_is_not_folded_again() -> None:
    it = Refolded()
    tensors, other = it.first, it.fresh(1)[2]
    before = tensors[2].clone()
    for table in (before, other, before, other):
        tensors[2].copy_(table)
        assert it.agrees(tensors)
    assert (it.folds, it.originals) == (2, 0)


def test_where_another_graph_comes_out_the_captured_one_runs() -> None:
    it = Refolded()
    tensors = it.first
    tensors[2].copy_(torch.arange(6))  # an identity vanishes and leaves nothing to absorb
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert it.agrees(tensors)
    plain, folded_once = it.originals, it.folds
    assert plain <= 1 and folded_once == 2


def test_what_cannot_be_folded_says_so_and_runs_as_captured() -> None:
    it = Refolded()

    def fails(tensors: Sequence[Any]) -> tuple[Split, list[int]]:
        raise RuntimeError("no luck")

    parts, watched = it.fold(it.first)
    call = FrozenCall(parts, parts.main, it.original, watched, it.first, fails)
    with pytest.warns(UserWarning) as said:
        (result,) = call(*it.fresh(2))
    assert "could not be folded (no luck)" in str(said[0].message)
    assert CHANGED in str(said[1].message)
    assert torch.equal(result, it.net(*it.fresh(2))[0])
