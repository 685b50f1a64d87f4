"""The pages of docs/: tables that list what there is. (test_training_page.py runs the code.)"""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import padst_compiler as padst
from padst_compiler.backend import padst as backend
from padst_compiler.relaxations import RELAXATIONS
from padst_compiler.settings import Settings
from padst_compiler.structures import STRUCTURES

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGE = (DOCS / "training.md").read_text("utf-8")
COMPILING = (DOCS / "compiling.md").read_text("utf-8")


def rows(title: str, page: str = PAGE) -> dict[str, tuple[str, str]]:
    """Return the default and the meaning of every option in a section's table."""
    found = re.search(rf"^## {re.escape(title)}$(.*?)(?=^## |\Z)", page, re.MULTILINE | re.DOTALL)
    assert found, title
    cells = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \|$", found[1], re.MULTILINE)
    return {name: (default, meaning) for name, default, meaning in cells}


def test_every_option_of_the_config_is_listed_with_its_default() -> None:
    listed = {name: default for name, (default, _) in rows("Options of `SparseConfig`").items()}
    fields = dataclasses.fields(padst.SparseConfig)
    assert listed == {f.name: f"`{f.default!r}`".replace("'", '"') for f in fields}


def test_every_structure_and_permutation_is_named() -> None:
    table = rows("Options of `SparseConfig`")
    for option, kinds in (("structure", STRUCTURES), ("permutation", RELAXATIONS)):
        text = " ".join(table[option])
        missing = [kind.name for kind in kinds if not re.search(rf"\b{kind.name}\b", text)]
        assert not missing, option


def test_every_compile_option_is_listed_with_its_default() -> None:
    listed = {name: default for name, (default, _) in rows("Options", COMPILING).items()}
    fields = dataclasses.fields(Settings)
    assert listed == {f.name: f"`{f.default!r}`".replace("'", '"') for f in fields}


def test_the_code_of_the_compiling_page_runs() -> None:
    (block,) = re.findall(r"^```python\n(.*?)^```$", COMPILING, re.MULTILINE | re.DOTALL)
    # Not every checkout is installed: the entry point by name is tested in test_backend.py.
    names: dict[str, Any] = {"backend": backend}
    exec(compile(block.replace('"padst"', "backend"), "compiling.md", "exec"), names)
    assert callable(names["fast"])
