from pathlib import Path
from typing import Any

import pytest

from padst_compiler.settings import Settings


def test_options_of_ours_are_split_from_inductors() -> None:
    given = {"codegen": "off", "trace": Path("there"), "kernels": "dense", "max-autotune": True}
    ours = Settings(codegen="off", trace="there", kernels="dense")
    assert Settings.parse(given) == (ours, {"max_autotune": True})
    assert Settings.parse(None) == (Settings(), {})
    assert Settings.parse({"trace": None}) == (Settings(), {})


@pytest.mark.parametrize(
    ("mode", "options", "kernels"),
    [
        (None, {"kernels": "timed"}, "timed"),
        ("default", {}, "auto"),
        ("reduce-overhead", {}, "auto"),
        ("max-autotune", {}, "timed"),
        ("max-autotune-no-cudagraphs", {"fold": "off"}, "timed"),
        ("max-autotune", {"kernels": "auto"}, "auto"),
        ("max-autotune", {"kernels": "dense"}, "dense"),
        ("max-autotune", {"codegen": "off"}, "auto"),
    ],
)
def test_max_autotune_times_kernels_unless_told_otherwise(
    mode: str | None, options: dict[str, Any], kernels: str
) -> None:
    assert Settings.parse(options, mode)[0].kernels == kernels


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trase": "x"}, r"Expected an option of \['codegen', .*, 'trace', 'verify'\].*'trase'"),
        (
            {"codegen": "on"},
            r"Expected option 'codegen' .*\('inductor', 'plain', 'off'\)\. Got 'on'",
        ),
        ({"kernels": "timed", "codegen": "off"}, "Expected generated code.*'codegen': 'off'"),
        ({"codegen": False}, "Expected option 'codegen' .*Got False"),
        ({"trace": True}, "Expected option 'trace' to be the path of a folder. Got True"),
        ({"trace": ""}, "Expected option 'trace' to be the path of a folder. Got ''"),
    ],
)
def test_what_it_cannot_be_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Settings.parse(options)
