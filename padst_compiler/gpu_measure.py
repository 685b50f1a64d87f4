"""Paired timing on a GPU: calls in turns, by events or as CUDA graphs, with the L2 hot or cold.

Three ways to look at the same calls. They differ most for short ones:

========  ==========================================================================================
hot       calls one after another between two events: what a loop of them takes, Python included
          where it is slower than the GPU
cold      one call between two events; before it 256 MB are written, so that no weight is in the L2
graphs    calls captured once and replayed as a CUDA graph: the kernels alone, hot
========  ==========================================================================================

All of a clock can be given, so that what is decided here is tested without a GPU.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from padst_compiler.measure import Timing

__all__ = ["Call", "Clock", "captured", "cpu_clock", "cuda_clock", "in_graphs", "on_gpu"]

SWEPT = 1 << 28  # bytes; the L2 of an H200 has 50 MB
MOST = 2000  # calls of one measurement
MOST_CAPTURED = 50  # of one graph, which is replayed as often as it takes

Call = Callable[[], Any]


@dataclass(frozen=True)
class Clock:
    """What timing needs of a device.

    Attributes:
        mark: returns a mark in the device's queue, behind all that was called before it.
        between: returns the seconds between two marks that were reached.
        wait: returns when all that was called is done.
        sweep: pushes everything else out of the caches.
        capture: returns what runs so many calls of a callable again, without Python between them.
    """

    mark: Callable[[], Any]
    between: Callable[[Any, Any], float]
    wait: Callable[[], None]
    sweep: Callable[[], None]
    capture: Callable[[Call, int], Call]


def on_gpu(
    contestants: Mapping[str, Call],
    *,
    rounds: int = 9,
    seconds: float = 0.005,
    cold: bool = False,
    live: Sequence[Tensor] = (),
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Time callables against each other, between events.

    Args:
        contestants: name to a callable without arguments; each has run before.
        rounds: how often each is measured. Every round begins with another one.
        seconds: how long one measurement lasts about; cold ones count their calls alone.
        cold: sweep the caches before every call.
        live: tensors that a caller would just have made; they are read after a sweep.
        clock: of the GPU that is current, unless given.
    """
    clock = clock or cuda_clock()
    run = _each_swept if cold else _in_a_row
    repeats = {
        name: _repeats(call, seconds, MOST // 50 if cold else MOST, clock)
        for name, call in contestants.items()
    }
    results: dict[str, list[float]] = {name: [] for name in contestants}
    for name in _turns(list(contestants), rounds):
        results[name].append(run(contestants[name], repeats[name], live, clock))
    return {name: Timing(tuple(times)) for name, times in results.items()}


def in_graphs(
    contestants: Mapping[str, Call],
    *,
    rounds: int = 9,
    seconds: float = 0.005,
    say: Callable[[str], None] = print,
    clock: Clock | None = None,
) -> dict[str, Timing]:
    """Time CUDA graphs of callables against each other; the caches are hot.

    Args:
        contestants: name to a callable without arguments; each has run before.
        rounds: how often each is measured. Every round begins with another one.
        seconds: how long one measurement lasts about.
        say: gets a line for each that cannot be captured; it is left out.
        clock: of the GPU that is current, unless given.
    """
    clock = clock or cuda_clock()
    single = captured(contestants, {}, say=say, clock=clock)
    # By the time of a replay: outside of a graph it is often Python that takes the time.
    counts = {n: _repeats(replay, seconds, MOST_CAPTURED, clock) for n, replay in single.items()}
    kept = {name: contestants[name] for name in single}
    graphs = captured(kept, counts, say=say, clock=clock)
    replays = {name: _repeats(run, seconds, MOST, clock) for name, run in graphs.items()}
    results: dict[str, list[float]] = {name: [] for name in graphs}
    for name in _turns(list(graphs), rounds):
        taken = _in_a_row(graphs[name], replays[name], (), clock)
        results[name].append(taken / counts[name])
    return {name: Timing(tuple(times)) for name, times in results.items()}


def captured(
    contestants: Mapping[str, Call],
    counts: Mapping[str, int],
    *,
    say: Callable[[str], None] = print,
    clock: Clock | None = None,
) -> dict[str, Call]:
    """Return what replays each contestant; one that cannot be captured is said and left out.

    Args:
        contestants: name to a callable without arguments; each has run before.
        counts: calls that a replay holds, by name; one where there is none.
        say: gets a line for each that is left out.
        clock: of the GPU that is current, unless given.
    """
    clock, graphs = clock or cuda_clock(), dict[str, Call]()
    for name, call in contestants.items():
        try:
            replay = clock.capture(call, counts.get(name, 1))
            replay()
            clock.wait()
        except Exception as error:  # whatever a call does that no graph can hold
            said = (str(error).splitlines() or [type(error).__name__])[0]
            say(f"{name} is left out of CUDA graphs: {said}")
            continue
        graphs[name] = replay
    return graphs


def cuda_clock() -> Clock:
    """Return the clock of the GPU that is current."""
    swept = torch.empty(SWEPT // 4, dtype=torch.int32, device="cuda")

    def mark() -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def between(start: Any, end: Any) -> float:
        return float(start.elapsed_time(end)) * 1e-3

    def sweep() -> None:
        swept.zero_()

    return Clock(mark, between, torch.cuda.synchronize, sweep, _captured)


def cpu_clock() -> Clock:
    """Return a clock of this process, for a dry run without a GPU; nothing is swept or captured."""

    def capture(call: Call, count: int) -> Call:
        def run() -> None:
            for _ in range(count):
                call()

        return run

    def nothing() -> None: ...

    return Clock(
        time.perf_counter, lambda start, end: float(end - start), nothing, nothing, capture
    )


def _captured(call: Call, count: int) -> Call:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # what is made in a first call must not be made in the graph
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph):
            for _ in range(count):
                call()
    except BaseException:
        torch.cuda.set_stream(stream)  # a capture that fails may leave its own behind
        raise
    return graph.replay


def _turns(names: list[str], rounds: int) -> list[str]:
    """Return whose turn it is: all in every round, and each is first as often as any other."""
    if not names:
        return []
    starts = (at % len(names) for at in range(rounds))
    return [name for start in starts for name in (*names[start:], *names[:start])]


def _repeats(call: Call, seconds: float, most: int, clock: Clock) -> int:
    """Return how many calls take about so long; the first ones warm up."""
    call()
    taken = _in_a_row(call, 1, (), clock)
    if 10 * taken < seconds:
        taken = _in_a_row(call, 10, (), clock)
    return max(1, min(most, int(seconds / max(taken, 1e-9))))


def _in_a_row(call: Call, count: int, live: Sequence[Tensor], clock: Clock) -> float:
    """Return the seconds of one call among many."""
    del live  # the caches are not swept
    clock.wait()
    start = clock.mark()
    for _ in range(count):
        call()
    end = clock.mark()
    clock.wait()
    return clock.between(start, end) / count


def _each_swept(call: Call, count: int, live: Sequence[Tensor], clock: Clock) -> float:
    """Return the mean seconds of calls on swept caches; sweeping hides what Python takes."""
    clock.wait()
    marks = []
    for _ in range(count):
        clock.sweep()
        for tensor in live:
            tensor.sum()
        start = clock.mark()
        call()
        marks.append((start, clock.mark()))
    clock.wait()
    return sum(clock.between(start, end) for start, end in marks) / count
