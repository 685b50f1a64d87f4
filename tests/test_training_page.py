"""docs/training.md: its code runs, and its tables name every option and every column."""

import contextlib
import inspect
import io
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch

import padst_compiler as padst
from padst_compiler.methods import METHODS
from padst_compiler.reporting import LayerReport
from padst_compiler.rules import RULES
from padst_compiler.schedule import PENALTIES

PAGE = (Path(__file__).resolve().parent.parent / "docs" / "training.md").read_text("utf-8")


def test_every_block_of_the_page_runs_in_order() -> None:
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.M | re.S)
    assert len(blocks) == PAGE.count("```") / 2 >= 6
    names: dict[str, Any] = {}
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        for number, block in enumerate(blocks):
            exec(compile(block, f"training.md, block {number}", "exec"), names)
    assert names["training"].step_count == 60
    assert torch.isfinite(names["logits"]).all()
    assert any(event["churn"] > 0 for event in names["training"].history)
    rows = names["result"].layers.values()
    assert all(row.permutation == "hard" and 0.25 <= row.explored <= 1.0 for row in rows)
    assert "ITOP" in said.getvalue() and "[16, 32, 48, 64, 64]" in said.getvalue()


def test_the_tables_name_every_option_and_column() -> None:
    page = PAGE[PAGE.index("## Options of `DynamicSparsity`") :]
    named = set(re.findall(r"^\| `(\w+)` \|", page, re.M))
    options = inspect.signature(padst.DynamicSparsity.__init__).parameters
    assert named == set(options) - {"self", "model", "optimizer"}
    for line in re.findall(r"^\| `\w+` \| .* \|", page, re.M):
        _, name, default, _ = line.split("|", 3)
        given = options[name.strip(" `")].default
        text = {None: "None", inspect.Parameter.empty: "required"}.get(given, str(given))
        assert text in default or "update_every" in default, line
    columns = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\| \w.*?\|.*?\|", PAGE, re.M))))
    wanted = {field.name for field in fields(LayerReport)} - {"name", "structure", "shape"}
    assert columns >= wanted
    for name in [*METHODS, *RULES, *PENALTIES]:
        assert f"`{name}`" in PAGE, name
