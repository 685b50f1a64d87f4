import csv
from dataclasses import replace
from pathlib import Path

import pytest

from padst_compiler.bench_models import Size
from padst_compiler.model_benchmark import HEADERS, Case, cases, measure, report

VIT = Size(text=False, depth=1, width=32, heads=2, side=32, outputs=7)
GPT = Size(text=True, depth=1, width=32, heads=2, side=9, outputs=11)
TINY = Case("tiny", VIT, "block:16", 0.5, batch=2, threads=1)


def test_cases_are_all_combinations() -> None:
    found = list(cases(["gpt2:2", "vit_b16"], ["nm:16"], [0.9], [1, 8], [1, 2], [False, True]))
    assert len(set(found)) == len(found) == 16
    assert found[0].size.depth == 2 and found[0].size.text and not found[-1].size.text
    with pytest.raises(ValueError, match="Got 'vgg'"):
        list(cases(["vgg"], ["nm:16"], [0.9], [1], [1], [False]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "train", "structure"),
    [(VIT, False, "block:16"), (GPT, False, "fan_in"), (VIT, True, "block:16")],
    ids=["vit", "gpt", "training"],
)
def test_a_row_holds_every_contestant(size: Size, train: bool, structure: str) -> None:
    case = replace(TINY, size=size, structure=structure, train=train)
    row = dict(zip(HEADERS, measure(case, rounds=2), strict=True))
    assert (row["model"], row["density"], row["batch"]) == ("tiny", "0.500", "2")
    assert row["mode"] == ("training" if train else "inference")
    assert row["unit"] == ("tokens/s" if size.text else "images/s")
    assert (row["onnxruntime"] == "-") is train
    assert all(float(row[name]) > 0.0 for name in ("padst", "eager", "Inductor"))
    assert float(row["low"]) <= float(row["x best dense"]) <= float(row["high"])
    assert float(row["difference"]) < 1e-4


@pytest.mark.slow
def test_a_report_writes_what_it_prints_and_says_what_does_not_fit(tmp_path: Path) -> None:
    said: list[str] = []
    path, picture = tmp_path / "rows.csv", tmp_path / "rows.png"
    selected = [replace(TINY, structure="block:64"), TINY]
    text = report(selected, rounds=2, path=path, picture=picture, say=said.append)
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["structure"] for row in rows] == ["block:16"] and rows[0]["padst"] in text
    assert "block:64" in said[0] and said[1].startswith("[2/2] tiny")
    assert picture.stat().st_size > 10_000
