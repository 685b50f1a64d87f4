"""Paired timing: every contestant once per round, in turn, so that noise is fair to all."""

from __future__ import annotations

import csv
import itertools
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

__all__ = ["Timing", "cold", "machine", "paired", "processor", "ratio", "rows_of"]

Case = TypeVar("Case")
SWEPT = 1 << 27  # bytes that push everything else out of the caches


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one contestant, one entry a round."""

    rounds: tuple[float, ...]

    @property
    def median(self) -> float:
        """Median seconds per call."""
        return statistics.median(self.rounds)


def paired(
    contestants: Mapping[str, Callable[[], Any]],
    *,
    rounds: int = 11,
    seconds: float = 0.05,
    settle: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time callables against each other.

    Args:
        contestants: name to a callable without arguments; synchronise inside it on a GPU.
        rounds: how often each is measured.
        seconds: how long one measurement lasts at least.
        settle: how long each is called before, uncounted: threads of the one before it may spin,
            and onnxruntime's do so for tens of milliseconds.
        clock: a monotonic clock in seconds.

    Example:
        >>> times = paired({"a": lambda: None, "b": lambda: None}, rounds=3, seconds=0.001)
        >>> sorted(times)
        ['a', 'b']
    """
    repeats = {}
    for name, call in contestants.items():
        call()  # compiles, where something has to be compiled
        start = clock()
        taken = 0.0
        for _ in range(3):  # warms up, unless one call is long enough for that
            before = clock()
            call()
            taken = clock() - before
            if clock() - start >= 4 * seconds:
                break
        repeats[name] = max(1, int(seconds / max(taken, 1e-7)))
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            start = clock()
            while clock() - start < settle:
                call()
            start = clock()
            for _ in range(repeats[name]):
                call()
            results[name].append((clock() - start) / repeats[name])
    return {name: Timing(tuple(times)) for name, times in results.items()}


def cold(
    contestants: Mapping[str, Callable[[], Any]], *, rounds: int = 11, live: Sequence[Any] = ()
) -> dict[str, Timing]:
    """Time single calls; before each the caches are swept, and what is live is read.

    Args:
        contestants: as for ``paired``; each has run before.
        rounds: how often each is measured.
        live: tensors that a caller would just have made.

    Example:
        >>> sorted(cold({"a": lambda: None, "b": lambda: None}, rounds=2))
        ['a', 'b']
    """
    other = torch.zeros(SWEPT // 4)
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, call in contestants.items():
            other.add_(1.0)
            for tensor in live:
                tensor.sum()
            start = time.perf_counter()
            call()
            results[name].append(time.perf_counter() - start)
    return {name: Timing(tuple(times)) for name, times in results.items()}


def ratio(slow: Timing, fast: Timing) -> tuple[float, float, float]:
    """Return how many times faster ``fast`` is: the median of the rounds, and its 95 % interval.

    The interval is that of order statistics (Conover, Practical Nonparametric Statistics, 3.2): it
    assumes no distribution. Fewer than six rounds have none, and give their extremes.

    Example:
        >>> ratio(Timing((4.0, 4.0, 4.0)), Timing((2.0, 2.0, 1.0)))
        (2.0, 2.0, 4.0)
    """
    each = sorted(s / f for s, f in zip(slow.rounds, fast.rounds, strict=True))
    count = len(each)
    outside = itertools.accumulate(2 * math.comb(count, k) / 2**count for k in range(count))
    at = max(0, sum(share <= 0.05 for share in outside) - 1)
    return statistics.median(each), each[at], each[-1 - at]


def rows_of(
    headers: Sequence[str],
    selected: Sequence[Case],
    measure: Callable[[Case], list[str]],
    path: Path | None,
    say: Callable[[str], None],
) -> list[list[str]]:
    """Return the rows of all cases; what does not fit, a ``ValueError``, is said and has none.

    Args:
        headers: of the rows.
        selected: the cases, one by one.
        measure: returns the row of a case.
        path: a CSV file, written row by row; None for none.
        say: gets a line a case, as they end.

    Example:
        >>> rows_of(["n", "square"], [2, 3], lambda n: [str(n), str(n * n)], None, print)
        [1/2] 2  4
        [2/2] 3  9
        [['2', '4'], ['3', '9']]
    """
    rows: list[list[str]] = []
    for at, case in enumerate(selected, start=1):
        try:
            rows.append(measure(case))
        except ValueError as error:  # 64 does not divide every width
            say(f"[{at}/{len(selected)}] {case}: {error}")
            continue
        say(f"[{at}/{len(selected)}] {'  '.join(rows[-1])}")
        if path is not None:
            with path.open("w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([headers, *rows])
    return rows


def processor() -> str:
    """Name this machine's CPU."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):  # not Linux: the short name will do
        return platform.processor() or platform.machine()


def machine() -> str:
    """Name the machine and the versions that a figure belongs to, in one line."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else processor()
    return (
        f"{device}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}, "
        f"torch {torch.__version__}"
    )
