"""Verify and time formulations, each compiled by Inductor on its own: ``{"kernels": "timed"}``.

A formulation is compiled as it would be in the graph: with the user's options and our last passes,
what is frozen made ready once and outside of the timed part. Every round times all formulations of
a site in turn, hot (weights in the cache from the call before) and cold (only the input is); a
model's weights are neither all the one nor all the other, so the mean of the two decides.

This happens while another graph is being compiled. What surrounds that (fake tensors, tracing,
autograd and dispatch modes) belongs to its thread, so the work is done in one of its own.
"""

from __future__ import annotations

import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from tqdm import tqdm

from padst_compiler import compat, gpu_measure
from padst_compiler.contest import Contest, Measured
from padst_compiler.digest import Unchanged, source_digest
from padst_compiler.formulation import Formulation
from padst_compiler.frozen import split
from padst_compiler.measure import Timing, cold, paired, processor, ratio
from padst_compiler.ops import LINEAR_DW
from padst_compiler.rewrite import Facts, Pass, run_pipeline
from padst_compiler.settings import Settings
from padst_compiler.timings import Timings
from padst_compiler.verify import MismatchError

__all__ = ["Stopwatch", "with_stopwatch"]

log = logging.getLogger(__name__)
SECONDS = 0.01  # that a hot measurement lasts at least
SLOW = 0.1  # seconds of a call that is timed in fewer rounds

Call = Callable[[], Any]


class Stopwatch:
    """Times contests, once on a machine.

    Args:
        options: Inductor's, with which the graph is compiled.
        timings: where results are kept.
        strict: raise where a formulation is wrong, rather than warn.
        passes: that run on every graph of ours before Inductor has it.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        timings: Timings,
        *,
        strict: bool,
        passes: Sequence[Pass] = (),
    ) -> None:
        """Remember how formulations are compiled."""
        self._passes = tuple(passes)
        self._options, self._timings, self._strict = dict(options), timings, strict
        self._threads = torch.get_num_threads()
        self._known: dict[Contest, Measured] = {}

    def __repr__(self) -> str:
        """Name all that timings depend on beside the site and the sources."""
        options = ", ".join(f"{name}={self._options[name]!r}" for name in sorted(self._options))
        machine = f"{processor()}, {torch.backends.cpu.get_cpu_capability()}"
        if torch.cuda.is_available():
            machine += f", {torch.cuda.get_device_name()}"
        return f"Stopwatch({machine}, {self._threads} threads; {options})"

    def time(self, contests: Sequence[Contest]) -> Mapping[Contest, Measured]:
        """Return what each contest came to; those of devices without a clock are left out.

        Raises:
            MismatchError: a formulation is wrong or does not compile, and the stopwatch is strict.
        """
        new = [c for c in dict.fromkeys(contests) if c not in self._known and _is_timed(c)]
        stored = {contest: self._timings.load(self._key(contest)) for contest in new}
        self._known |= {contest: found for contest, found in stored.items() if found is not None}
        missing = [contest for contest in new if contest not in self._known]
        if missing:
            with ThreadPoolExecutor(1) as thread:  # in our context: that has the user's settings
                self._known |= thread.submit(copy_context().run, self._measure, missing).result()
            for contest in missing:
                if contest.ways[-1].name in self._known[contest].seconds:
                    self._timings.store(self._key(contest), repr(contest), self._known[contest])
        for contest in new:
            self._tell(contest)
        return {contest: self._known[contest] for contest in contests if contest in self._known}

    def _key(self, contest: Contest) -> str:
        names = [way.name for way in contest.ways]
        return hashlib.sha256(f"{self._salt}|{contest!r}|{names}".encode()).hexdigest()

    @cached_property
    def _salt(self) -> str:
        return source_digest(repr(self))

    def _tell(self, contest: Contest) -> None:
        for name, why in self._known[contest].dropped.items():
            said = f"{name} of {contest} is not used: {why}"
            if self._strict:
                raise MismatchError(f"{said}. Leave out options={{'kernels': 'timed'}}.")
            warnings.warn(f"{said}. options={{'verify': 'strict'}} raises instead.", stacklevel=2)

    def _measure(self, contests: Sequence[Contest]) -> dict[Contest, Measured]:
        torch.set_num_threads(self._threads)
        count = sum(len(contest.ways) for contest in contests)
        title = f"timing {count} formulations of {len(contests)} sites"
        log.info("%s", title)
        with torch.no_grad(), tqdm(total=count, desc=title, leave=False, disable=None) as bar:
            return {contest: self._run(contest, bar) for contest in contests}

    def _run(self, contest: Contest, bar: tqdm[None]) -> Measured:
        arguments = contest.arguments()
        calls: dict[str, Call] = {}
        dropped: dict[str, str] = {}
        for way in contest.ways:
            bar.set_postfix_str(f"{contest}: {way.name}")
            bar.update()
            try:
                call = self._compiled(contest, way, arguments)
                right = contest.is_right(arguments, call())
            except Exception as error:  # a compiler's: anything can come out of it
                dropped[way.name] = f"it does not run ({str(error).strip()[:200]})"
                continue
            if right:
                calls[way.name] = call
            else:
                dropped[way.name] = "it disagrees with the reference in float64"
        dense = contest.ways[-1].name
        if dense not in calls:
            return Measured({}, {}, dropped)
        live = arguments[: 2 if contest.op in LINEAR_DW.values() else 1]  # no weights
        times = _times(calls, live, contest.geometry.device)
        low = {name: ratio(times[dense], times[name])[1] for name in calls if name != dense}
        return Measured({name: times[name].median for name in calls}, low, dropped)

    def _compiled(self, contest: Contest, way: Formulation, arguments: Sequence[Any]) -> Call:
        """Return a call of a formulation; what depends on frozen arguments only is done before."""
        tensors = [a for a in arguments if isinstance(a, Tensor)]

        def function(*given: Tensor) -> Any:
            feed = iter(given)
            return way.run(*(next(feed) if isinstance(a, Tensor) else a for a in arguments))

        mode = FakeTensorMode()
        fakes = [mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]
        graph = compat.trace_aten(function, fakes)
        holders = graph.graph.find_nodes(op="placeholder")
        frozen = holders[1:] if contest.geometry.frozen else ()
        facts = Facts(frozen=dict(zip(frozen, tensors[1:], strict=False)))
        run_pipeline(self._passes, graph.graph, facts)
        parts = split(graph, facts)
        examples = [*(fakes[i] for i in parts.main_inputs), *parts.derived]
        options = {**self._options, "joint_custom_pre_pass": Unchanged(self._salt)}
        compiled = compat.compile_with_inductor(parts.main, examples, options)
        inputs = [tensors[i] for i in parts.main_inputs]
        if parts.prologue is not None:
            inputs += parts.prologue(*(tensors[i] for i in parts.prologue_inputs))
        return lambda: compiled(*inputs)


def with_stopwatch(
    settings: Settings, options: Mapping[str, Any], passes: Sequence[Pass] = ()
) -> Settings:
    """Return settings with a stopwatch in the place of "timed", where code is generated.

    Args:
        settings: ours.
        options: Inductor's.
        passes: that run on every graph before Inductor has it.
    """
    if settings.kernels != "timed" or settings.codegen != "inductor":
        return settings
    strict = settings.verify == "strict"
    stopwatch = Stopwatch(options, Timings.beside_inductor(), strict=strict, passes=passes)
    return replace(settings, kernels=stopwatch)


def _is_timed(contest: Contest) -> bool:
    return contest.geometry.device in ("cpu", "cuda") and len(contest.ways) > 1


def _times(calls: Mapping[str, Call], live: Sequence[Any], device: str) -> dict[str, Timing]:
    """Return seconds per call, hot and cold in equal parts, a round each.

    Hot calls on a GPU are replayed from CUDA graphs: of short ones Python would be the figure.
    """
    if device == "cuda":
        hot = gpu_measure.in_graphs(calls, say=log.info)
        if len(hot) < len(calls):
            hot = gpu_measure.on_gpu(calls)
        swept = gpu_measure.on_gpu(calls, cold=True, live=live)
    else:
        start = time.perf_counter()
        for call in calls.values():
            call()
        rounds = 5 if time.perf_counter() - start > SLOW * len(calls) else 9
        hot = paired(calls, rounds=rounds, seconds=SECONDS)
        swept = cold(calls, rounds=rounds, live=live)
    return {
        name: Timing(
            tuple(0.5 * (a + b) for a, b in zip(hot[name].rounds, swept[name].rounds, strict=True))
        )
        for name in calls
    }
