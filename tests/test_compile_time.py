"""The benchmark of compile times: it measures every pass, and its parts add up."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_one_layer_gives_a_time_for_every_pass() -> None:
    printed = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile_time", "--one", "1"],
        cwd=Path(__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    lines = [line.split("\t") for line in printed.splitlines() if "\t" in line]
    times = {name: float(seconds) for name, seconds in lines}
    assert {"fold_permutations", "choose_formulation", "lower_maps"} < set(times)
    total, ours, inductor = (times.pop(name) for name in ("total", "ours", "inductor"))
    assert 0 < sum(times.values()) <= ours and inductor > 0 and ours + inductor <= total
