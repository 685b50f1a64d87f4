import json
from typing import Any

import pytest

from padst_compiler.config import SparseConfig, describe, parse_structure
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
        ("block:16:16", "Expected structure block, block:size"),
        ("block:", "sizes of at least 1"),
        ("nm:1:2:3", "nm:n:m"),
        ("diagonal:3", "Expected structure diagonal with"),
        ("nm_2,4", "Use 'block', 'nm'"),
    ],
)
def test_unknown_spellings_are_refused_with_the_known_ones(text: str, said: str) -> None:
    with pytest.raises(ValueError, match=said) as caught:
        parse_structure(text)
    assert f"Got {text!r}" in str(caught.value)


def test_a_structure_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"Expected a structure or its name\. Got 16"):
        SparseConfig(structure=16)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "config",
    [
        SparseConfig(),
        SparseConfig("nm:2:4", 0.5, "random", "output", "erk", 7, True),
        SparseConfig(FanIn(8), 0, "none"),
    ],
)
def test_a_config_goes_through_json(config: SparseConfig) -> None:
    assert SparseConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert hash(config) == hash(SparseConfig.from_dict(config.to_dict()))


@pytest.mark.parametrize(
    ("fields", "error", "said"),
    [
        ({"sparsity": 1.0}, ValueError, r"Expected 0 <= sparsity < 1. Got 1.0"),
        ({"sparsity": -0.1}, ValueError, "Got -0.1"),
        ({"sparsity": float("nan")}, ValueError, "Got nan"),
        ({"sparsity": 90}, ValueError, "0.9 for 90 %"),
        ({"sparsity": "0.9"}, TypeError, "Expected a number"),
        ({"sparsity": True}, TypeError, "Expected a number"),
        ({"permutation": "learnt"}, ValueError, "Did you mean 'learned'"),
        (
            {"permutation": None},
            ValueError,
            "Expected permutation none, random, magnitude, learned",
        ),
        ({"side": "left"}, ValueError, "Expected side auto, input or output"),
        ({"distribution": "er"}, ValueError, "Did you mean 'erk'"),
        ({"seed": 1.5}, TypeError, "Expected an int"),
        ({"version": 2}, ValueError, "Expected config version 1. Got 2"),
        ({"sparcity": 0.5}, ValueError, "Got 'sparcity'. Did you mean 'sparsity'"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        SparseConfig.from_dict(fields)


def test_an_integer_sparsity_is_a_number() -> None:
    assert isinstance(SparseConfig(sparsity=0).sparsity, float)
