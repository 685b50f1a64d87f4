import pytest

from padst_compiler.structure_text import describe, parse_structure
from padst_compiler.structures import (
    NM,
    STRUCTURES,
    Block,
    Diagonal,
    FanIn,
    Structure,
    Unstructured,
)

SPELLINGS: list[tuple[str, Structure]] = [
    ("block", Block()),
    ("block:16", Block(16)),
    ("nm", NM()),
    ("nm:16", NM(m=16)),
    ("nm:2:4", NM(m=4, n=2)),
    ("diagonal", Diagonal()),
    ("fan_in", FanIn()),
    ("fan_in:8", FanIn(8)),
    ("unstructured", Unstructured()),
    ("block:16:64", Block(16, 64)),
    ("block:16:16", Block(16)),
    ("block:balanced=false", Block(balanced=False)),
    ("block:16:64:balanced=false", Block(16, 64, balanced=False)),
    ("block:16:balanced=true", Block(16)),
    ("diagonal:band=8", Diagonal(band=8)),
    ("diagonal:modulus=16", Diagonal(modulus=16)),
]


@pytest.mark.parametrize(("text", "structure"), SPELLINGS)
def test_structures_are_spelled_and_read_back(text: str, structure: Structure) -> None:
    assert parse_structure(text) == structure
    assert parse_structure(describe(structure)) == structure
    assert parse_structure(structure) is structure


@pytest.mark.parametrize("kind", STRUCTURES)
def test_every_structure_has_its_name(kind: type[Structure]) -> None:
    assert parse_structure(kind.name) == kind()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("blok", "Did you mean 'block'"),
        ("", "Expected structure block, nm"),
        ("Block", "Did you mean 'block'"),
        ("block:0", "sizes of at least 1"),
        ("block:-4", "sizes of at least 1"),
        ("block:x", "sizes of at least 1"),
        ("block:16:16:16", "Expected structure block, block:size, block:size:columns, block:bal"),
        ("block:balanced=no", "block:balanced=false"),
        ("block:balanced=", "block:balanced=false"),
        ("block:balanced=false:16", "sizes of at least 1"),
        ("block:balanced=false:balanced=true", "sizes of at least 1"),
        ("diagonal:band=0", "diagonal:band=8, diagonal:modulus=16 with"),
        ("diagonal:band=true", "diagonal:band=8"),
        ("diagonal:bnd=8", "diagonal:band=8"),
        ("fan_in:k=3", "fan_in:k with"),
        ("block:", "sizes of at least 1"),
        ("nm:1:2:3", "nm:n:m"),
        ("diagonal:3", "Expected structure diagonal, diagonal:band=8"),
        ("nm_2,4", "Use 'block', 'nm'"),
    ],
)
def test_unknown_spellings_are_refused_with_the_known_ones(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        parse_structure(text)
    assert f"Got {text!r}" in str(caught.value)
