"""``padst bench gpu``: everything that is claimed of GPUs, in one run of minutes.

First the kernels are compared with float64, then layers, fused MLPs, permutations, training and
models are timed against their peers; last come the goals. Rows are written as they come, so a run
that is cut keeps them. What was left out for time, and who could not take part, is said.
"""

from __future__ import annotations

import datetime
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from padst_compiler.bench_plots import layers_picture
from padst_compiler.compat import many_graphs
from padst_compiler.gpu_budget import Budget
from padst_compiler.gpu_cases import PARTS, Case, ModelCase, cases, models
from padst_compiler.gpu_contestants import Guard
from padst_compiler.gpu_layers import Layers
from padst_compiler.gpu_measure import cpu_clock, cuda_clock
from padst_compiler.gpu_models import measure_model
from padst_compiler.gpu_parts import Bench, measure
from padst_compiler.gpu_rows import Row, Rows, goals_table

__all__ = ["ONLY", "Report", "Wanted", "machine", "report"]

ONLY = PARTS[1:]
QUERY = "name,driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit"

Say = Callable[[str], None]


@dataclass(frozen=True)
class Wanted:
    """What is asked of a run.

    Args:
        minutes: that it may take.
        csv: a file for the rows.
        plots: a folder for pictures.
        only: one part, and its correctness; None for all.
        tiny: a dry run on the CPU, in Triton's interpreter.
        full: compile every case, however long that takes.
        rounds: paired rounds of a measurement.
    """

    minutes: float = 8.0
    csv: Path | None = None
    plots: Path | None = None
    only: str | None = None
    tiny: bool = False
    full: bool = False
    rounds: int = 7


@dataclass(frozen=True)
class Report:
    """What a run found: its tables, and whether all of ours ran and computed the right numbers."""

    text: str
    right: bool

    def __str__(self) -> str:
        """The tables."""
        return self.text


def report(wanted: Wanted, *, say: Say = print) -> Report:
    """Run the benchmark and return its tables.

    Args:
        wanted: which parts, and where results go.
        say: gets a line a row, as they come.

    Raises:
        RuntimeError: there is no GPU, or for a dry run no interpreter.
    """
    _check(wanted.tiny)
    clock = cpu_clock() if wanted.tiny else cuda_clock()
    guard = Guard(say, compiles=not wanted.tiny, wait=clock.wait)
    rounds, seconds = (1, 1e-4) if wanted.tiny else (wanted.rounds, 5e-3)
    bench = Bench(Layers("cpu" if wanted.tiny else "cuda"), guard, clock, rounds, seconds)
    parts = PARTS if wanted.only is None else ("correctness", wanted.only)
    rows, budget = Rows(wanted.csv), Budget(60.0 * wanted.minutes, parts)
    head = machine()
    say(head)
    if wanted.tiny:
        say("a dry run: all that torch.compile makes is left out, and no time means anything")
    with many_graphs():
        for part in parts:
            if not _run(part, wanted, bench, budget, rows, say):
                break
    if wanted.plots is not None:
        _draw(rows, wanted.plots, say)
    wrong = [row for row in rows.all if row["right"] == "WRONG"]
    text = _text(head, parts, rows, wrong)
    text += "".join(f"\nFAILED: {one}" for one in guard.broken)
    return Report(text, not wrong and not guard.broken)


def machine() -> str:
    """Name GPU, driver, clocks, versions, date and command: what figures belong to."""
    lines = [f"GPU: {torch.cuda.get_device_name() if torch.cuda.is_available() else 'none'}"]
    if torch.cuda.is_available() and shutil.which("nvidia-smi"):
        asked = ["nvidia-smi", f"--query-gpu={QUERY}", "--format=csv,noheader"]
        answer = subprocess.run(asked, capture_output=True, text=True, check=False)
        lines.append(f"{QUERY}: {answer.stdout.strip() or answer.stderr.strip()}")
    try:
        import triton
    except ImportError:
        version = "none"
    else:
        version = triton.__version__
    lines.append(f"torch {torch.__version__}, CUDA {torch.version.cuda}, triton {version}")
    now = datetime.datetime.now(datetime.timezone.utc)
    lines.append(f"{now:%Y-%m-%d %H:%M} UTC: {' '.join(sys.argv)}")
    return "\n".join(lines)


def _check(tiny: bool) -> None:
    if tiny:
        from padst_compiler.triton_text import is_interpreted

        if not is_interpreted():
            raise RuntimeError(
                "Expected Triton's interpreter for a dry run. Got its compiler. "
                "Do set TRITON_INTERPRET=1 before anything imports Triton."
            )
    elif not torch.cuda.is_available():
        raise RuntimeError(
            f"Expected a CUDA device. Got torch {torch.__version__} that sees none. "
            "Do run this on a machine with a GPU, or take --tiny for a dry run on the CPU."
        )


def _run(part: str, wanted: Wanted, bench: Bench, budget: Budget, rows: Rows, say: Say) -> bool:
    """Run a part; return whether the GPU can go on."""
    say(f"== {part}")
    selected: list[Case | ModelCase] = []
    if part == "models":
        selected += models(tiny=wanted.tiny)
    else:
        selected += cases(part, tiny=wanted.tiny, full=wanted.full)
    if part == "correctness" and wanted.only not in (None, "layers", "training"):
        selected = selected[:8]  # the first shape, all structures
    for case in budget.within(part, selected, say):
        try:
            found = (
                measure_model(case, bench) if isinstance(case, ModelCase) else measure(case, bench)
            )
        except Exception as failure:  # one case must not end the run; what it was is said
            text = " ".join(str(failure).split())[:300]
            say(f"{part}: {case}: {type(failure).__name__}: {text}")
            if not isinstance(failure, ValueError):  # a structure that does not fit is no error
                rows.add([_failed(part, case)])
            if not _lives(bench, say):
                return False
            continue
        rows.add(found)
        for row in found:
            say("  ".join(cell for cell in row.values() if cell != "-"))
    return True


def _failed(part: str, case: Case | ModelCase) -> Row:
    from padst_compiler.gpu_rows import HEADERS

    cells = {"part": part, "case": str(case), "right": "WRONG", "error": "failed"}
    return dict.fromkeys(HEADERS, "-") | cells


def _lives(bench: Bench, say: Say) -> bool:
    """Return whether the GPU still answers: after an illegal access nothing does."""
    try:
        bench.layers.kept.clear()
        bench.clock.wait()
    except RuntimeError as failure:
        say(f"the GPU does not answer any more, the run ends here: {failure}")
        return False
    return True


def _draw(rows: Rows, folder: Path, say: Say) -> None:
    """Draw where layers overtake dense ones: a picture a layer, a panel a structure."""
    shown = [
        {**row, "threads": row["dtype"], "weights": row["mode"]}
        for row in rows.of("layers")
        if row["x best dense"] != "-" and row["mode"] == "graphs" and row["dtype"] == "bf16"
    ]
    folder.mkdir(parents=True, exist_ok=True)
    for layer in dict.fromkeys(row["case"] for row in shown):
        mine = [{**row, "layer": layer} for row in shown if row["case"] == layer]
        try:
            say(f"drawn: {layers_picture(mine, folder / f'gpu_{layer}.png')}")
        except ImportError as failure:  # the tables are worth more than pictures
            say(str(failure))
            return


def _text(head: str, parts: Sequence[str], rows: Rows, wrong: Sequence[Row]) -> str:
    blocks = [head]
    for part in parts:
        count = len(rows.of(part))
        blocks.append(f"{part}\n{rows.table(part)}" if count else f"{part}: no rows")
    lost = [r for r in rows.all if r["x best dense"] != "-" and float(r["x best dense"]) < 0.97]
    blocks.append(f"goals, on an H200, ratios to the best dense peer\n{goals_table(rows.all)}")
    blocks.append(f"{len(lost)} of {len(rows.all)} rows below 0.97 of the best dense peer")
    for row in wrong:
        told = "  ".join(row[name] for name in ("part", "case", "tokens", "dtype", "structure"))
        blocks.append(f"WRONG: {told}  {row['which']}  {row['map']}  {row['error']}")
    return "\n\n".join(blocks)
