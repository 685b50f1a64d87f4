"""The pages of docs/: their code runs as it is written, and their tables list what there is."""

from __future__ import annotations

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import padst_compiler as padst
from padst_compiler.methods import METHODS
from padst_compiler.relaxations import RELAXATIONS
from padst_compiler.reporting import _TITLES, LayerReport
from padst_compiler.rules import RULES
from padst_compiler.schedule import PENALTIES
from padst_compiler.structures import STRUCTURES

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "training.md").read_text("utf-8")
BLOCKS = re.findall(r"^## (.*?)$|```python\n(.*?)```", PAGE, re.MULTILINE | re.DOTALL)


def blocks() -> list[tuple[str, str]]:
    """Return every block under the heading that it follows."""
    heading, found = "setup", []
    for title, code in BLOCKS:
        heading = title or heading
        if code:
            found.append((heading, code))
    return found


def section(title: str) -> str:
    found = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL)
    assert found, title
    return found[1]


def rows(title: str) -> dict[str, tuple[str, str]]:
    """Return a section's table by its first column."""
    cells = re.findall(r"^\| (.*?) \| (.*?) \| (.*?) \|$", section(title), re.MULTILINE)
    return {name.strip("`"): (second, third) for name, second, third in cells[2:]}


@pytest.mark.parametrize(
    ("heading", "code"), blocks()[1:], ids=[heading for heading, _ in blocks()[1:]]
)
def test_every_block_runs_after_the_first(
    heading: str, code: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "docs"}
    exec(compile(blocks()[0][1], "training.md, setup", "exec"), names)
    exec(compile(code, f"training.md, {heading}", "exec"), names)


def test_no_block_is_left_out() -> None:
    assert len(blocks()) == PAGE.count("```python") == PAGE.count("```") // 2 >= 8


def shown(default: object) -> str:
    return f"`{default!r}`".replace("'", '"')


def test_every_option_of_the_config_is_listed_with_its_default() -> None:
    listed = {name: default for name, (default, _) in rows("Options of `SparseConfig`").items()}
    fields = {f.name: shown(f.default) for f in dataclasses.fields(padst.SparseConfig)}
    assert listed == fields


def test_every_option_of_the_controller_is_listed_with_its_default() -> None:
    listed = {name: default for name, (default, _) in rows("Options of `DynamicSparsity`").items()}
    taken = inspect.signature(padst.DynamicSparsity).parameters
    options = {
        name: "required" if option.default is option.empty else shown(option.default)
        for name, option in taken.items()
        if name not in ("model", "optimizer")
    }
    assert listed == options


def test_every_choice_is_named() -> None:
    ours, theirs = rows("Options of `DynamicSparsity`"), rows("Options of `SparseConfig`")
    for row, known in (
        (ours["method"], list(METHODS)),
        (ours["penalty"], list(PENALTIES)),
        (ours["hardening"], list(RULES)),
        (theirs["structure"], [kind.name for kind in STRUCTURES]),
        (theirs["permutation"], [kind.name for kind in RELAXATIONS]),
    ):
        missing = [name for name in known if not re.search(rf"\b{name}\b", " ".join(row))]
        assert not missing, row


def test_every_column_that_needs_reading_is_explained() -> None:
    explained = {name for cell in rows("Reading the report") for name in cell.split(", ")}
    titles = {_TITLES.get(f.name, f.name) for f in dataclasses.fields(LayerReport)}
    assert explained <= titles, explained - titles
    assert titles - explained == {"layer", "structure", "shape", "nnz"}
