import csv
import sys
from pathlib import Path

import pytest
import torch

from padst_compiler.layer_benchmark import HEADERS, Case, cases, in_onnxruntime, measure, report


def test_cases_are_all_combinations() -> None:
    found = list(cases([(8, 16)], ["nm:4", "fan_in"], [0.5, 0.9], [1, 8], [1], [False, True]))
    assert len(set(found)) == len(found) == 16
    assert found[0] == Case((8, 16), "nm:4", 0.5, 1, 1, False)


def test_a_row_holds_every_peer_and_the_ratio_to_the_best_dense_one() -> None:
    before = torch.get_num_threads()
    try:
        row = dict(
            zip(HEADERS, measure(Case((32, 64), "block:8", 0.5, 3, 1), rounds=2), strict=True)
        )
    finally:
        torch.set_num_threads(before)
    assert (row["layer"], row["density"], row["weights"]) == ("32-64", "0.500", "hot")
    times = {name: float(row[f"{name} ms"]) for name in ("F.linear", "Inductor", "onnxruntime")}
    others = ("padst", "masked dense", "torch CSR", "torch BSR", "scipy CSR")
    assert min(*times.values(), *(float(row[f"{name} ms"]) for name in others)) > 0.0
    low, middle, high = (float(row[name]) for name in ("low", "x best dense", "high"))
    assert low <= middle <= high and float(row["% of peak"]) >= 0.0


@pytest.mark.slow
def test_a_report_writes_what_it_prints_and_says_what_does_not_fit(tmp_path: Path) -> None:
    said: list[str] = []
    path, picture = tmp_path / "rows.csv", tmp_path / "rows.png"
    selected = [Case((32, 48), kind, 0.5, 3, 1, cold=True) for kind in ("nm:16", "block:64")]
    before = torch.get_num_threads()
    try:
        text = report(selected, rounds=2, path=path, picture=picture, say=said.append)
    finally:
        torch.set_num_threads(before)
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["structure"] for row in rows] == ["nm:16"] and rows[0]["weights"] == "cold"
    assert "of 1 rows below 0.97 of the best dense peer" in text and rows[0]["padst ms"] in text
    assert said[0].startswith("[1/2] 32-48") and "block:64" in said[1]
    assert picture.stat().st_size > 10_000


def test_without_onnxruntime_there_is_no_such_peer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert in_onnxruntime(torch.nn.Linear(2, 2), torch.randn(1, 2)) is None
