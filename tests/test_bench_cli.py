from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from padst_compiler import gpu_benchmark, layer_benchmark
from padst_compiler.bench_cli import DEVICES, add_arguments
from padst_compiler.cli import main
from padst_compiler.gpu_benchmark import ONLY, Report, Wanted

ROOT = Path(__file__).resolve().parent.parent


def test_parts_that_can_be_asked_for_are_those_there_are() -> None:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    for part in ONLY:
        assert parser.parse_args(["--only", part]).only == part
    assert set(DEVICES) == {"cpu", "gpu"}


def test_bench_cpu_times_the_layers_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[object] = []

    def report(selected: list[layer_benchmark.Case], **how: object) -> str:
        seen.extend([selected, how["rounds"]])
        return "a table"

    monkeypatch.setattr(layer_benchmark, "report", report)
    words = ["--layers", "8-16", "--structures", "nm:4", "--tokens", "3", "--threads", "1"]
    assert main(["bench", "cpu", *words]) == 0
    assert seen == [[layer_benchmark.Case((8, 16), "nm:4", 0.9, 3, 1)], 11]


@pytest.mark.parametrize("right", [True, False])
def test_bench_gpu_exits_with_1_where_numbers_are_wrong(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], right: bool
) -> None:
    seen: list[Wanted] = []

    def report(wanted: Wanted, **how: object) -> Report:
        seen.append(wanted)
        return Report("the tables", right)

    monkeypatch.setattr(gpu_benchmark, "report", report)
    words = ["--minutes", "3", "--only", "mlp", "--csv", "rows.csv", "--rounds", "5"]
    assert main(["bench", "gpu", *words]) == (0 if right else 1)
    assert seen == [Wanted(3.0, Path("rows.csv"), None, "mlp", rounds=5)]
    assert capsys.readouterr().out == "the tables\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_bench_gpu_without_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu"]) == 2
    assert capsys.readouterr().err.startswith("padst: Expected a CUDA device. Got")


@pytest.mark.slow
def test_the_script_is_the_command(tmp_path: Path) -> None:
    inherited = {name: text for name, text in os.environ.items() if name != "TRITON_INTERPRET"}
    path = tmp_path / "rows.csv"
    words = ["--tiny", "--only", "mlp", "--csv", str(path)]
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu.py"), *words],
        env=inherited | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "goals, on an H200" in done.stdout and "a dry run" in done.stdout
    assert path.stat().st_size > 1000
