"""Rows of the GPU benchmark: what was timed, how it compares, and whether the goals are reached.

All parts fill the same columns; "-" stands for what was not timed. A table leaves out the columns
that none of its rows has. "x best dense" is the ratio of medians of paired rounds to the fastest of
the dense peers, with the 95 % interval; a row that computes something wrong has no ratio.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from padst_compiler.gpu_cost import products
from padst_compiler.measure import Timing, ratio
from padst_compiler.text import table

__all__ = ["DENSE", "GOALS", "HEADERS", "Goal", "Row", "Rows", "filled", "goals_table", "roofline"]

Row = dict[str, str]

DENSE = ("cuBLAS", "Inductor")
OTHERS = ("masked", "CSR", "BSR", "2:4")
BLOCKS = ("block:64", "block:32", "block:16")
LAYERS = ("768-3072", "3072-768", "4096-11008")
OURS = ("call", "graph", "kernel", "eager", "two kernels")
HEADERS = (
    "part",
    "case",
    "tokens",
    "dtype",
    "structure",
    "asked",
    "density",
    "map",
    "mode",
    "which",
    "way",
    "right",
    "error",
    *(f"{name} us" for name in (*OURS, *DENSE, *OTHERS)),
    "unit",
    "speed",
    "dense speed",
    "peak MB",
    "dense peak MB",
    "ours",
    "x best dense",
    "low",
    "high",
    "x two kernels",
    "x unmapped",
    *(f"x {name}" for name in OTHERS),
    "% of roofline",
)
BANDWIDTH = 4.3e12  # bytes a second that an H200 copies, measured by others


def filled(
    told: Mapping[str, object],
    times: Mapping[str, Timing],
    ours: Sequence[str],
    *,
    right: bool | None,
    limit: float | None = None,
) -> Row:
    """Return a row: what is told, microseconds, and ratios of the first of ``ours`` that was timed.

    Args:
        told: cells by header.
        times: of the contestants.
        ours: names, the one that is compared first.
        right: whether ours computed what it should; None where nothing was compared.
        limit: seconds that physics allows; None where it is not known.

    Example:
        >>> row = filled({"case": "a"}, {"kernel": Timing((1.0,)), "cuBLAS": Timing((3.0,))},
        ...              ["graph", "kernel"], right=True, limit=0.5)
        >>> row["ours"], row["x best dense"], row["% of roofline"], row["BSR us"]
        ('kernel', '3.00', '50', '-')
    """
    row = dict.fromkeys(HEADERS, "-") | {key: str(value) for key, value in told.items()}
    row["right"] = "-" if right is None else "yes" if right else "WRONG"
    row |= {f"{n} us": f"{1e6 * t.median:.4g}" for n, t in times.items() if f"{n} us" in row}
    mine = next((name for name in ours if name in times), None)
    if mine is None:
        return row
    row["ours"], dense = mine, [times[name] for name in DENSE if name in times]
    if right is False:
        return row
    if dense:
        best = min(dense, key=lambda timing: timing.median)
        numbers = ratio(best, times[mine])
        headers = ("x best dense", "low", "high")
        row |= {h: _short(n) for h, n in zip(headers, numbers, strict=True)}
    for name in ("two kernels", *OTHERS):
        if name in times:
            row[f"x {name}"] = _short(ratio(times[name], times[mine])[0])
    if limit is not None:
        row["% of roofline"] = f"{100 * limit / times[mine].median:.0f}"
    return row


def roofline(tokens: int, sides: int, kept: int, dtype: torch.dtype, layers: int = 1) -> float:
    """Return the seconds that no kernel can beat on an H200: traffic or products.

    Args:
        tokens: how many.
        sides: features that are read and written for each.
        kept: weights.
        dtype: of all; tf32 as torch's flag allows it.
        layers: 3 for a forward and both gradients.

    Example:
        >>> round(1e6 * roofline(6304, 768 + 3072, 235_930, torch.bfloat16), 1)
        11.4
    """
    moved = (tokens * sides + kept) * dtype.itemsize
    return layers * max(moved / BANDWIDTH, 2.0 * tokens * kept / products(dtype))


class Rows:
    """The rows so far; a file has them as they come.

    Args:
        path: a CSV file; None for none.
    """

    def __init__(self, path: Path | None) -> None:
        self.all, self._path = list[Row](), path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerow(HEADERS)

    def add(self, rows: Iterable[Row]) -> None:
        """Keep rows, and write them at once."""
        new = list(rows)
        self.all += new
        if self._path is not None:
            with self._path.open("a", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([row[name] for name in HEADERS] for row in new)

    def of(self, part: str) -> list[Row]:
        """Return the rows of a part."""
        return [row for row in self.all if row["part"] == part]

    def table(self, part: str) -> str:
        """Return the table of a part, without the columns that are empty."""
        rows = self.of(part)
        named = [h for h in HEADERS[1:] if any(row[h] != "-" for row in rows)]
        return table(named, [[row[name] for name in named] for row in rows])


@dataclass(frozen=True)
class Goal:
    """What is to be reached: the lowest number of a column in the rows that match."""

    case: str
    least: float
    aim: float | None
    ceiling: float | None
    where: Mapping[str, str | tuple[str, ...]]
    column: str = "x best dense"

    def matches(self, row: Row) -> bool:
        """Whether the goal is about a row."""
        return all(
            row[key] in wanted if isinstance(wanted, tuple) else row[key] == wanted
            for key, wanted in self.where.items()
        )

    def measured(self, rows: Iterable[Row]) -> list[float]:
        """Return the numbers of all rows that match."""
        found = (row[self.column] for row in rows if self.matches(row))
        return [float(cell) for cell in found if cell != "-"]


def goals_table(rows: Sequence[Row]) -> str:
    """Return what is asked for, what was measured, and whether that is enough."""
    body = []
    for goal in GOALS:
        wrong = [r for r in rows if r["right"] == "WRONG" and goal.matches(r)]
        found = goal.measured(rows)
        reached = "not measured" if not found else "yes" if min(found) >= goal.least else "no"
        low = f"{min(found):.2f}" if found else "-"
        limits = ("" if n is None else f"{n:g}" for n in (goal.aim, goal.ceiling))
        body.append(
            (goal.case, f"{goal.least:g}", *limits, low, len(found), "WRONG" if wrong else reached)
        )
    headers = ("goal", "at least", "aim", "ceiling", "measured", "rows", "reached")
    return table(headers, body)


def _short(number: float) -> str:
    return f"{number:.2f}" if number >= 0.1 else f"{number:.1e}"  # pictures need no zeros


def _goals() -> list[Goal]:
    layers: dict[str, str | tuple[str, ...]] = {"part": "layers", "asked": "0.90", "dtype": "bf16"}
    layers["mode"] = "graphs"
    found = []
    for case, tokens, bounds in (
        ("768-3072", "6304", {64: (1.5, 2.7, 3.3), 32: (1.3, 2.4, 3.3), 16: (1.05, 2.0, 3.3)}),
        ("1024-4096", "8192", {64: (1.8, 3.5, 4.4)}),
        ("4096-11008", "8192", {64: (3, 7.5, 10), 32: (2, 4.7, 6.7), 16: (1.3, 3, 4)}),
    ):
        for side, (least, aim, ceiling) in bounds.items():
            where = {**layers, "case": case, "tokens": tokens, "structure": f"block:{side}"}
            found.append(Goal(f"block {side}, {case}, {tokens} tokens", least, aim, ceiling, where))
    for kind, name, least, aim, ceiling in (
        (BLOCKS, "block", 2.5, 5, 5.6),
        ("diagonal", "diagonal", 2.5, 5, 5.6),
        ("nm:16", "N:M", 2, 4.5, 5),
        ("fan_in", "fan_in", 1.5, 3.2, 3.7),
    ):
        where = {**layers, "case": "4096-11008", "tokens": ("1", "8", "16"), "structure": kind}
        found.append(Goal(f"{name}, 4096-11008, 1 to 16 tokens", least, aim, ceiling, where))
    mlp: dict[str, str | tuple[str, ...]] = {**layers, "part": "mlp", "tokens": "6304"}
    mlp |= {"case": "768-3072-768", "structure": "block:64"}
    found.append(Goal("fused sparse MLP, ViT-B, 6304 tokens", 1.8, 5, 10, mlp))
    vit: dict[str, str | tuple[str, ...]] = {"part": "models", "case": "vit_b16 batch 256"}
    for which, least, aim, ceiling in (
        ("MLPs", 1.25, 1.5, 1.6),
        ("all", 1.4, 2.0, 2.2),
        ("all, MLPs fused", 1.5, 2.4, 2.7),
    ):
        where = {**vit, "mode": "inference", "which": which}
        found.append(Goal(f"ViT-B/16 batch 256, {which}", least, aim, ceiling, where))
    where = {**vit, "mode": "training"}
    found.append(Goal("training step of ViT-B/16, all linears", 1.1, 1.6, 1.9, where))
    for mode in ("graphs", "hot"):  # what waits for the host is in no graph
        where = {"part": "layers", "mode": mode, "structure": BLOCKS}
        found.append(Goal(f"against torch's BSR kernel, {mode}", 1.2, 2.5, None, where, "x BSR"))
    for name, kinds, least, aim in (
        ("fused in the kernel", ("fused input", "fused output"), 0.91, 0.98),
        ("folded (1 % is noise)", "folded", 0.99, 1.0),
    ):
        where = {"part": "maps", "case": LAYERS, "mode": "graphs", "map": kinds}
        found.append(Goal(f"permutation {name}", least, aim, None, where, "x unmapped"))
    where = {"ours": ("call", "graph")}
    return [*found, Goal("anything that is compiled, any way of timing", 0.97, None, None, where)]


GOALS = tuple(_goals())
"""The goals of the project on an H200."""
