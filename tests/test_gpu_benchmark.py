from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from padst_compiler import gpu_benchmark
from padst_compiler.gpu_benchmark import ONLY, Wanted, machine, report
from padst_compiler.gpu_cases import Case
from padst_compiler.gpu_parts import Bench, measure
from padst_compiler.gpu_rows import GOALS, HEADERS, Row

GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


@GPU
def test_without_a_gpu_the_error_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match=r"Expected a CUDA device\. Got .*\. Do .*--tiny"):
        report(Wanted())


@GPU
def test_a_dry_run_asks_for_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("padst_compiler.triton_text.is_interpreted", lambda: False)
    with pytest.raises(RuntimeError, match=r"Expected Triton's interpreter.*TRITON_INTERPRET=1"):
        report(Wanted(tiny=True))


def test_the_machine_is_named_with_versions_date_and_command() -> None:
    text = machine()
    assert torch.__version__ in text and "triton" in text and "UTC" in text and "GPU" in text


@GPU
def test_what_is_wrong_is_marked_and_what_fails_does_not_end_the_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def measured(case: Case, bench: Bench) -> list[Row]:
        if case.structure == "diagonal":
            raise RuntimeError("a launch failed")
        if case.structure == "block:16":
            return measure(case, bench)
        row = dict.fromkeys(HEADERS, "-") | {"part": case.part, "case": "x", "right": "WRONG"}
        return [row]

    monkeypatch.setattr(gpu_benchmark, "measure", measured)
    said: list[str] = []
    path = tmp_path / "rows.csv"
    found = report(Wanted(tiny=True, only="training", csv=path), say=said.append)
    assert not found.right and "WRONG: correctness  x" in found.text
    assert any("diagonal" in line and "a launch failed" in line for line in said)
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["error"] for row in rows if row["right"] == "WRONG"} == {"-", "failed"}
    assert any(row["right"] == "yes" for row in rows if row["part"] == "training")


@GPU
def test_a_gpu_that_does_not_answer_ends_the_run_with_its_tables(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(case: Case, bench: Bench) -> list[Row]:
        def dead() -> None:
            raise RuntimeError("an illegal memory access was encountered")

        object.__setattr__(bench.clock, "wait", dead)
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(gpu_benchmark, "measure", fails)
    said: list[str] = []
    found = report(Wanted(tiny=True), say=said.append)
    assert not found.right and sum("== " in line for line in said) == 1
    assert "does not answer" in said[-1] and "models: no rows" in found.text


@GPU
@pytest.mark.slow
def test_a_dry_run_goes_through_all_parts(tmp_path: Path) -> None:
    said: list[str] = []
    path, folder = tmp_path / "rows.csv", tmp_path / "pictures"
    found = report(Wanted(tiny=True, csv=path, plots=folder), say=said.append)
    assert found.right
    with path.open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["part"] for row in rows} == {"correctness", *ONLY}
    assert {row["right"] for row in rows} == {"yes"}
    kinds = {row["structure"] for row in rows if row["part"] == "correctness"}
    assert kinds == {"block:16", "nm:2:4", "nm:1:8", "nm:2:16", "diagonal", "fan_in"}
    assert all(goal.case in found.text for goal in GOALS) and "not measured" in found.text
    assert any("torch.compile makes is left out" in line for line in said)
    assert any("block:64" in line and "Expected" in line for line in said)  # does not fit
    (picture,) = folder.iterdir()
    assert picture.stat().st_size > 10_000


@GPU
@pytest.mark.slow
def test_a_budget_that_is_spent_leaves_cases_out_and_says_so() -> None:
    said: list[str] = []
    found = report(Wanted(tiny=True, minutes=1e-6, only="mlp"), say=said.append)
    assert found.right and "mlp: no rows" in found.text
    assert sum("left out for time" in line for line in said) >= 1
