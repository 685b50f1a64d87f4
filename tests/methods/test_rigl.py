"""RigL's rule grows what it promises to grow."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from padst_compiler.methods.rigl import rigl
from padst_compiler.methods.slots import Regrown


def random_slots(groups: int, kept: int, candidates: int, generator: torch.Generator) -> Tensor:
    order = torch.rand(groups, candidates, generator=generator).argsort(dim=1)
    return order[:, :kept].to(torch.int32)


def offered(slots: Tensor, dense: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return candidates, gains and active scores from a dense table, as a recorder would."""
    at = slots.long()
    gains, candidates = dense.scatter(1, at, -torch.inf).topk(slots.shape[1], dim=1)
    return candidates.to(torch.int32), gains, dense.gather(1, at)


@st.composite
def tables(draw: st.DrawFn) -> tuple[Tensor, Tensor, int, int, torch.Generator]:
    candidates = draw(st.integers(1, 12))
    groups, kept = draw(st.integers(1, 6)), draw(st.integers(1, candidates))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    slots = random_slots(groups, kept, candidates, generator)
    scores = torch.randint(0, 4, slots.shape, generator=generator).float()  # with ties
    return scores, slots, draw(st.integers(0, slots.numel())), candidates, generator


def check_invariants(old: Tensor, new: Regrown, candidates: int) -> None:
    slots, changed = new
    assert slots.shape == old.shape and slots.dtype == old.dtype and changed.dtype == torch.bool
    assert all(len(set(row)) == len(row) for row in slots.tolist())
    assert int(slots.min()) >= 0 and int(slots.max()) < candidates
    assert torch.equal(slots[~changed], old[~changed])  # who stays keeps its place
    for row, before, moved in zip(slots.tolist(), old.tolist(), changed.tolist(), strict=True):
        came = {unit for unit, new_here in zip(row, moved, strict=True) if new_here}
        assert not came & set(before)  # who is called new is new


@settings(max_examples=200, deadline=None)
@given(tables())
def test_rigl_keeps_counts_and_grows_the_largest_gradients(
    table: tuple[Tensor, Tensor, int, int, torch.Generator],
) -> None:
    scores, slots, n_drop, candidates, generator = table
    dense = torch.rand(slots.shape[0], candidates, generator=generator)
    new = rigl(scores, slots, n_drop, *offered(slots, dense))
    check_invariants(slots, new, candidates)
    dropped = torch.zeros(scores.numel(), dtype=torch.bool)
    dropped[scores.flatten().argsort(stable=True)[:n_drop]] = True
    for row, before, out, gradient in zip(
        new.slots.tolist(), slots.tolist(), dropped.view(slots.shape).tolist(), dense, strict=True
    ):
        kept = {unit for unit, gone in zip(before, out, strict=True) if not gone}
        rest = sorted(set(range(candidates)) - kept, key=lambda u: -float(gradient[u]))
        assert set(row) == kept | set(rest[: sum(out)])


def test_weak_units_drop_wherever_they_are_in_the_layer() -> None:
    scores = torch.tensor([[1.0, 1.0], [9.0, 9.0]])
    slots = torch.tensor([[0, 1], [0, 1]])
    new = rigl(scores, slots, 2, torch.tensor([[2, 3]] * 2), torch.ones(2, 2), torch.zeros(2, 2))
    assert new.changed.tolist() == [[True, True], [False, False]]


def test_ties_drop_the_earlier_slot_and_favour_the_unit_that_is_there() -> None:
    scores, slots = torch.ones(2, 2), torch.tensor([[0, 1], [0, 1]])
    zero = torch.zeros(2, 2)
    new = rigl(scores, slots, 1, torch.tensor([[2, 3]] * 2), zero, zero)
    assert not new.changed.any()
    new = rigl(scores, slots, 1, torch.tensor([[2, 3]] * 2), zero + 1, zero)
    assert new.slots.tolist() == [[2, 1], [0, 1]]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_gradients_that_are_not_finite_choose_nothing(bad: float) -> None:
    scores, slots = torch.ones(1, 3), torch.tensor([[0, 1, 2]])
    candidates, gains = torch.tensor([[3, 4, 5]]), torch.full((1, 3), bad)
    new = rigl(scores, slots, 3, candidates, gains, torch.full((1, 3), bad))
    assert not new.changed.any() and torch.equal(new.slots, slots)
    gains[0, 1] = 0.0  # one finite gain, however small, may grow; the others may not
    new = rigl(scores, slots, 3, candidates, gains, torch.full((1, 3), bad))
    assert new.changed.sum() == 1 and 4 in new.slots[0].tolist()
