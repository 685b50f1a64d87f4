from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from padst_compiler.gpu_rows import GOALS, HEADERS, Rows, filled, goals_table, roofline
from padst_compiler.measure import Timing

TIMES = {
    "kernel": Timing((1e-5, 1e-5)),
    "cuBLAS": Timing((4e-5, 4e-5)),
    "Inductor": Timing((2e-5, 3e-5)),
    "BSR": Timing((3e-5, 3e-5)),
}
TOLD = {
    "part": "layers",
    "case": "768-3072",
    "tokens": 6304,
    "dtype": "bf16",
    "structure": "block:64",
    "asked": "0.90",
    "mode": "graphs",
}


def test_a_row_compares_ours_with_the_fastest_dense_peer() -> None:
    row = filled(TOLD, TIMES, ["graph", "kernel"], right=True, limit=5e-6)
    assert set(row) == set(HEADERS) and row["tokens"] == "6304" and row["right"] == "yes"
    assert (row["ours"], row["x best dense"], row["x BSR"]) == ("kernel", "2.50", "3.00")
    assert float(row["low"]) <= 2.5 <= float(row["high"])
    assert (row["kernel us"], row["graph us"], row["% of roofline"]) == ("10", "-", "50")


def test_what_computes_something_wrong_has_times_but_no_ratio() -> None:
    row = filled(TOLD, TIMES, ["kernel"], right=False, limit=5e-6)
    assert row["right"] == "WRONG" and row["kernel us"] == "10"
    assert {row[name] for name in ("x best dense", "x BSR", "% of roofline")} == {"-"}
    assert filled(TOLD, {}, ["kernel"], right=None)["right"] == "-"


def test_rows_are_in_the_file_at_once_and_empty_columns_are_not_shown(tmp_path: Path) -> None:
    path = tmp_path / "new" / "rows.csv"
    rows = Rows(path)
    rows.add([filled(TOLD, TIMES, ["kernel"], right=True)])
    with path.open(encoding="utf-8") as file:
        (written,) = csv.DictReader(file)
    assert written == rows.all[0] and list(written) == list(HEADERS)
    head = rows.table("layers").splitlines()[0]
    assert "BSR us" in head and "2:4" not in head and "peak" not in head
    assert rows.of("mlp") == [] and Rows(None).all == []


def test_the_goals_say_what_was_measured_and_what_was_not() -> None:
    good = filled(TOLD, TIMES, ["kernel"], right=True)
    bad = filled({**TOLD, "tokens": 1, "case": "4096-11008"}, TIMES, ["kernel"], right=False)
    other = {**TOLD, "case": "1024-4096", "tokens": 8192}
    slow = filled(other, TIMES | {"kernel": Timing((1, 1))}, ["kernel"], right=True)
    printed = goals_table([good, bad, slow]).splitlines()
    lines = {line.split("|")[0].strip(): line for line in printed}
    assert len(printed) == len(GOALS) + 2
    assert lines["block 64, 768-3072, 6304 tokens"].split("|")[4].strip() == "2.50"
    assert lines["block 64, 768-3072, 6304 tokens"].endswith("yes")
    assert lines["block 64, 1024-4096, 8192 tokens"].endswith("no")
    assert lines["block, 4096-11008, 1 to 16 tokens"].endswith("WRONG")
    assert lines["fused sparse MLP, ViT-B, 6304 tokens"].endswith("not measured")
    assert lines["against torch's BSR kernel, graphs"].endswith("WRONG")  # one is enough


def test_every_goal_asks_for_columns_that_are_there() -> None:
    for goal in GOALS:
        assert goal.column in HEADERS and set(goal.where) <= set(HEADERS)
        assert goal.aim is None or goal.least <= goal.aim
        assert goal.ceiling is None or (goal.aim or goal.least) <= goal.ceiling
    assert len({goal.case for goal in GOALS}) == len(GOALS)


def test_the_roofline_is_traffic_or_products(monkeypatch: pytest.MonkeyPatch) -> None:
    few, many = (roofline(1, 2, kept, torch.bfloat16) for kept in (100, 200))
    assert many / few == pytest.approx(202 / 102)
    dense = roofline(8192, 4096 + 11008, 4096 * 11008, torch.bfloat16)
    assert dense == pytest.approx(2 * 8192 * 4096 * 11008 / 790e12)
    assert roofline(1, 2, 100, torch.float32) == pytest.approx(2 * few)
    assert roofline(1, 2, 100, torch.bfloat16, layers=3) == pytest.approx(3 * few)
