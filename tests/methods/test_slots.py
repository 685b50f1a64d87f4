"""Dropping and growing at random keeps every group's number of units."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from padst_compiler.methods.slots import Regrown, fill, swap_for_random, weakest


def random_slots(groups: int, kept: int, candidates: int, generator: torch.Generator) -> Tensor:
    order = torch.rand(groups, candidates, generator=generator).argsort(dim=1)
    return order[:, :kept].to(torch.int32)


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


@given(tables())
def test_set_keeps_counts_and_the_strong_units(
    table: tuple[Tensor, Tensor, int, int, torch.Generator],
) -> None:
    scores, slots, n_drop, candidates, generator = table
    new = swap_for_random(scores, slots, n_drop, candidates, generator)
    check_invariants(slots, new, candidates)
    strong = scores.flatten().argsort(stable=True)[n_drop:]
    assert not new.changed.flatten()[strong].any()


def test_set_grows_every_position_that_is_not_kept_equally_often() -> None:
    generator = torch.Generator().manual_seed(0)
    slots = torch.tensor([[0, 3, 7], [1, 2, 4]])
    scores = torch.tensor([[1.0, 1.0, 9.0], [1.0, 9.0, 9.0]])
    counts, draws = torch.zeros(2, 8), 4000
    for _ in range(draws):
        new = swap_for_random(scores, slots, 3, 8, generator).slots
        counts.scatter_add_(1, new, torch.ones(2, 3))
    # Group 0 keeps unit 7 and grows 2 of the other 7; group 1 keeps 2 and 4 and grows 1 of 6.
    chance = torch.full((2, 8), 2 / 7)
    chance[1] = 1 / 6
    chance[0, 7] = chance[1, 2] = chance[1, 4] = 1.0
    deviation = (draws * chance * (1 - chance)).sqrt()
    assert bool(((counts - draws * chance).abs() <= 4.5 * deviation).all())


def test_set_draws_from_its_own_generator_only() -> None:
    slots, scores = torch.arange(50)[None], torch.rand(1, 50)
    before = torch.get_rng_state()
    one = swap_for_random(scores, slots, 20, 1000, torch.Generator().manual_seed(3))
    two = swap_for_random(scores, slots, 20, 1000, torch.Generator().manual_seed(3))
    assert torch.equal(one.slots, two.slots) and torch.equal(before, torch.get_rng_state())


def test_set_needs_no_table_over_all_candidates() -> None:
    candidates = 2**40  # a table of bools would be a terabyte
    slots = torch.arange(1000).view(10, 100)
    new = swap_for_random(
        torch.rand(10, 100), slots, 300, candidates, torch.Generator().manual_seed(0)
    )
    check_invariants(slots, new, candidates)
    assert new.changed.sum() == 300


def test_a_full_group_does_not_change() -> None:
    slots = torch.arange(6).view(1, 6)
    new = swap_for_random(torch.rand(1, 6), slots, 6, 6, torch.Generator().manual_seed(0))
    assert not new.changed.any() and torch.equal(new.slots, slots)


def test_the_weakest_are_the_lowest_and_a_nan_is_strong() -> None:
    scores = torch.tensor([[3.0, torch.nan], [1.0, 1.0]])
    assert weakest(scores, 1).tolist() == [[False, False], [True, False]]
    assert weakest(scores, 3).tolist() == [[True, False], [True, True]]


def test_filling_keeps_the_type_and_the_other_slots() -> None:
    opened = torch.tensor([[False, True], [True, False]])
    new = fill(torch.tensor([[0, 1], [2, 3]], dtype=torch.int32), opened, torch.tensor([7, 9]))
    assert new.slots.tolist() == [[0, 7], [9, 3]] and new.slots.dtype == torch.int32
