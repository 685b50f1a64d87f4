"""What a topology may be is written here a second time, as Python sets."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from padst_compiler.structures import (
    NM,
    Block,
    Diagonal,
    FanIn,
    Shape,
    Structure,
    Unstructured,
)
from padst_compiler.topology import fault, width_of

SHAPE = Shape(8, 16)
KINDS: list[Structure] = [
    Block(4),
    Block(4, 2),
    Block(4, balanced=False),
    NM(m=4),
    Diagonal(),
    Diagonal(band=2),
    Diagonal(modulus=4),
    FanIn(),
    Unstructured(),
]


def candidates(structure: Structure) -> int:
    if isinstance(structure, Block):
        wide = 16 // (structure.columns or structure.size)
        return wide if structure.balanced else wide * (8 // structure.size)
    if isinstance(structure, NM):
        return structure.m
    if isinstance(structure, Diagonal):
        return 16 // (structure.band or 1) if structure.modulus is None else structure.modulus
    return 16 if isinstance(structure, FanIn) else 128


def test_widths_follow_the_budget() -> None:
    assert width_of(FanIn(), 30, Shape(4, 12)) == 7
    assert width_of(FanIn(), 30, Shape(2, 12)) == 12  # no more than there are inputs
    assert width_of(NM(m=4), 18, Shape(3, 12)) == 2
    assert width_of(NM(m=4, n=1), 18, Shape(1, 12)) == 1


@pytest.mark.parametrize("structure", KINDS, ids=str)
def test_every_choice_of_a_structure_is_sound(structure: Structure) -> None:
    for kept in (1, 2, candidates(structure)):
        for _ in range(5):
            indices = structure.select(torch.randn(8, 16), kept)
            for given_as in (torch.int32, torch.int64):
                assert fault(structure, SHAPE, indices.to(given_as), None) is None


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([k for k in KINDS if k.indices_per_unit(SHAPE) == 1]), st.data())
def test_it_is_sound_exactly_where_units_are_inside_and_differ(
    structure: Structure, data: st.DataObject
) -> None:
    groups, most = structure.table(SHAPE)[0], candidates(structure)
    kept = data.draw(st.integers(1, min(3, most)))
    numbers = st.integers(-2, most + 1) if data.draw(st.booleans()) else st.integers(0, most - 1)
    table = data.draw(
        st.lists(st.lists(numbers, min_size=kept, max_size=kept), min_size=groups, max_size=groups)
    )
    sound = all(len(set(row)) == kept and set(row) <= set(range(most)) for row in table)
    layout = structure.index_shape(SHAPE, kept)
    said = fault(structure, SHAPE, torch.tensor(table).view(layout), None)
    assert (said is None) is sound, said
    assert sound or str(said).startswith(f"Expected unique indices below {most}. Got ")


@pytest.mark.parametrize(
    ("structure", "offsets", "got"),
    [
        (Diagonal(band=2), [0, 1, 4, 6], "parts of units"),
        (Diagonal(band=2), [0, 4, 1, 5], "parts of units"),
        (Diagonal(band=2), [1, 2], "parts of units"),
        (Diagonal(band=2), [4, 5, 4, 5], "some twice"),
        (Diagonal(band=2), [16, 17], "8 to 8"),
        (Diagonal(band=2), [-2, -1], "-1 to -1"),
        (Diagonal(modulus=4), [1, 5, 9, 17], "parts of units"),
        (Diagonal(modulus=4), [17, 5, 9, 13], "parts of units"),
        (FanIn(), [2**31], f"0 to {2**31}"),
        (FanIn(), [0.5], "parts of units"),
        (FanIn(), [float("nan")], "nan to nan"),
    ],
    ids=str,
)
def test_what_is_no_unit_is_named(structure: Structure, offsets: list[float], got: str) -> None:
    indices = torch.tensor([offsets])
    if structure == FanIn():
        indices = torch.cat([indices, torch.zeros(7, 1, dtype=indices.dtype)])
    assert f"Got {got}" in str(fault(structure, SHAPE, indices, None))


@pytest.mark.parametrize(
    "rows", [[], [0, 0], [3, 1], [-1, 2], [1, 8], [0.0, 1.0], [[0, 1]], 3], ids=str
)
def test_rows_are_neurons_and_ascend(rows: object) -> None:
    indices = FanIn().select(torch.randn(8, 16), 2)
    assert fault(FanIn(), SHAPE, indices, torch.tensor([0, 7])) is not None  # 8 units a neuron now
    wanted = "Expected ascending rows below 8. Got others."
    assert fault(FanIn(), SHAPE, indices, torch.tensor(rows)) == wanted
    assert fault(Diagonal(), SHAPE, torch.zeros(1, 1).int(), torch.tensor([0])) == wanted


def test_what_lies_behind_the_rows_that_are_left_is_not_read() -> None:
    indices = torch.zeros(8, 2, dtype=torch.int32)
    indices.view(-1)[:15] = torch.arange(15) % 5  # three rows of five, then one number more
    indices.view(-1)[15] = 99
    assert fault(FanIn(), SHAPE, indices, torch.tensor([1, 4, 6])) is None
