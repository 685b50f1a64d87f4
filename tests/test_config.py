import json
from typing import Any

import pytest

from padst_compiler.config import SparseConfig
from padst_compiler.structures import (
    FanIn,
)


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
