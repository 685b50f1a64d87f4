import csv
from pathlib import Path

import pytest

from padst_compiler.layer_benchmark import HEADERS, Case, cases, measure, report


def test_cases_are_all_combinations() -> None:
    found = list(
        cases(
            [(8, 16)],
            ["nm:4", "fan_in"],
            [0.5, 0.9],
            [1, 8],
            [1],
            cold=[False, True],
            dtypes=["fp32", "bf16"],
            train=[False, True],
        )
    )
    assert len(set(found)) == len(found) == 64
    assert found[0] == Case((8, 16), "nm:4", 0.5, 1, 1)
    assert {case.permutation for case in found if case.structure == "fan_in"} == {"none"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "case",
    [
        Case((32, 64), "block:8", 0.5, 3, 1),
        Case((32, 64), "nm:4", 0.5, 3, 1, dtype="bf16"),
        Case((32, 64), "block:8", 0.5, 3, 1, train=True, permutation="none"),
    ],
    ids=["inference", "bf16", "training"],
)
def test_a_row_holds_every_peer_and_the_ratio_to_the_best_dense_one(case: Case) -> None:
    row = dict(zip(HEADERS, measure(case, rounds=2), strict=True))
    assert (row["layer"], row["density"], row["weights"]) == ("32-64", "0.500", "hot")
    assert (row["dtype"], row["map"]) == (case.dtype, case.permutation)
    assert row["mode"] == ("training" if case.train else "inference")
    assert (row["kernel"] == "-") == case.train
    everywhere = ("padst", "F.linear", "Inductor", "masked dense")
    times = {name: float(row[f"{name} ms"]) for name in everywhere}
    in_fp32 = {row[f"{name} ms"] == "-" for name in ("onnxruntime", "torch CSR", "scipy CSR")}
    assert in_fp32 == {case.train or case.dtype != "fp32"} and min(times.values()) > 0.0
    assert (row["graph ms"] == "-") == case.train
    low, middle, high = (float(row[name]) for name in ("low", "x best dense", "high"))
    assert low <= middle <= high and float(row["% of peak"]) >= 0.0


@pytest.mark.slow
def test_a_report_writes_what_it_prints_and_says_what_does_not_fit(tmp_path: Path) -> None:
    said: list[str] = []
    path, picture = tmp_path / "rows.csv", tmp_path / "rows.png"
    selected = [Case((32, 48), kind, 0.5, 3, 1, cold=True) for kind in ("nm:16", "block:64")]
    text = report(selected, rounds=2, path=path, picture=picture, say=said.append)
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["structure"] for row in rows] == ["nm:16"] and rows[0]["weights"] == "cold"
    assert "of 1 rows below 0.97 of the best dense peer" in text and rows[0]["padst ms"] in text
    assert said[0].startswith("[1/2] 32-48") and "block:64" in said[1]
    assert picture.stat().st_size > 10_000
