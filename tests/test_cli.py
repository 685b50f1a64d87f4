from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from padst_compiler.cli import main

FACTORY = """
import torch
from torch import nn

def make():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.GELU(), nn.Linear(128, 64)), torch.randn(4, 64)

def model_only():
    return make()[0]

def nonsense():
    return 3
"""


@pytest.fixture
def models(tmp_path: Path) -> str:
    path = tmp_path / "my_models.py"
    path.write_text(FACTORY)
    return str(path)


def test_plan_prints_the_sites(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", f"{models}:make", "--structure", "block:16"]) == 0
    printed = capsys.readouterr().out
    assert "128x64" in printed
    assert "block:16" in printed


def test_explain_names_every_kernel(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", f"{models}:make", "--structure", "fan_in"]) == 0
    printed = capsys.readouterr().out
    assert "gathers that remain: 0" in printed
    assert "verified in float64" in printed


def test_export_writes_a_checked_file(
    models: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "model.onnx"
    assert main(["export", f"{models}:make", str(path)]) == 0
    assert path.stat().st_size > 10_000
    assert "largest difference" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["plan", "no_colon"], "module:factory"),
        (["plan", "{models}:missing"], "Expected a name"),
        (["plan", "{models}:nonsense"], "Got int"),
        (["plan", "no_such_module_here:make"], "importable module"),
        (["plan", "{models}:make", "--structure", "blok"], "block"),
        (["plan", "{models}:make", "--sparsity", "1.5"], "sparsity"),
        (["explain", "{models}:model_only"], "example_inputs"),
        (["demo", "--data", "no_such_file.npz"], "no_such_file.npz"),
    ],
)
def test_a_refusal_names_the_cure_and_exits_with_2(
    models: str, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([a.format(models=models) for a in arguments]) == 2
    captured = capsys.readouterr()
    assert reason in captured.err
    assert captured.err.startswith("padst: Expected")


@pytest.mark.parametrize("command", ["plan", "demo", "bench", "explain", "export"])
def test_help_teaches_with_an_example(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    assert stop.value.code == 0
    assert f"example:\n    padst {command}" in capsys.readouterr().out


@pytest.mark.slow
def test_bench_compares_with_dense(models: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", f"{models}:make", "--rounds", "3"]) == 0
    printed = capsys.readouterr().out
    assert "dense, Inductor" in printed
    assert "sparse, padst" in printed


@pytest.mark.slow
def test_python_m_runs_the_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "padst_compiler", "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "plan" in done.stdout
