"""Compile time of GPT-2 by number of layers: in all, and in each of our passes.

Run ``python -m benchmarks.compile_time`` for the table; ``--layers 2 6`` for a short one.

GPT-2 of transformers (random weights, 256 wide, 1,000 tokens, a sequence of 64), block:32 with
random permutations, one forward without gradients through ``torch.compile(backend="padst")`` and
Inductor, each number of layers in a process and a compile cache of its own. Times are CPU seconds
of that process, so a busy machine changes them little; what a C++ compiler takes in other
processes is left out. *Ours* is all that comes before Inductor gets the folded graph: capture in
ATen and verification in float64 beside the passes. *Inductor* is its own compile alone, so total
is these two, Dynamo, the first work on frozen weights and the first run.
"""

from __future__ import annotations

import argparse
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest.mock import patch

import torch

import padst_compiler as padst
from padst_compiler import backend, compat, fold
from padst_compiler.rewrite import run_pipeline
from padst_compiler.text import table

Times = dict[str, float]


def measure(layers: int) -> Times:
    """Compile once; return CPU seconds: total, ours, inductor, and of each pass by its name."""
    from transformers import GPT2Config, GPT2Model

    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=256,
        n_layer=layers,
        n_head=8,
        vocab_size=1000,
        n_positions=64,
        bos_token_id=1,
        eos_token_id=1,
        use_cache=False,
    )
    model = GPT2Model(config)
    model.train(False)
    padst.sparsify(model, structure="block:32", sparsity=0.9, permutation="random")
    tokens = torch.randint(1000, (1, 64))
    times: Times = {"total": 0.0, "ours": 0.0, "inductor": 0.0}
    whole, generate = backend.fold_dynamo, compat.compile_with_inductor

    def each_pass(passes: Sequence[Any], graph: Any, facts: Any) -> tuple[Any, ...]:
        reports: tuple[Any, ...] = ()
        for step in passes:
            reports += _timed(times, step.name, partial(run_pipeline, (step,), graph, facts))
        return reports

    def folding(*args: Any, **kwargs: Any) -> Any:
        return _timed(times, "ours", lambda: whole(*args, **kwargs))

    def inductor(*args: Any, **kwargs: Any) -> Any:
        return _timed(times, "inductor", lambda: generate(*args, **kwargs))

    with ExitStack() as stack:
        stack.enter_context(patch.object(fold, "run_pipeline", each_pass))
        stack.enter_context(patch.object(backend, "fold_dynamo", folding))
        stack.enter_context(patch.object(compat, "compile_with_inductor", inductor))
        stack.enter_context(torch.no_grad())
        fast: Callable[..., Any] = torch.compile(model, backend="padst")
        _timed(times, "total", partial(fast, tokens))
    return times


def _timed(times: Times, name: str, call: Callable[[], Any]) -> Any:
    start = time.process_time()
    result = call()
    times[name] = times.get(name, 0.0) + time.process_time() - start
    return result


def rows(layers: Sequence[int]) -> list[tuple[str, ...]]:
    """Return a row for each number of layers, measured in a fresh process each."""
    found: list[tuple[str, ...]] = []
    for count in layers:
        with tempfile.TemporaryDirectory() as cache:
            printed = subprocess.run(
                [sys.executable, "-m", "benchmarks.compile_time", "--one", str(count)],
                env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
                capture_output=True,
                text=True,
                check=True,
            ).stdout
        lines = [line.split("\t") for line in printed.splitlines() if "\t" in line]
        times = {name: float(seconds) for name, seconds in lines}
        total, ours, inductor = (times.pop(name) for name in ("total", "ours", "inductor"))
        passes = sum(times.values())
        slowest = sorted(times, key=times.__getitem__, reverse=True)[:4]
        found.append(
            (
                str(count),
                f"{total:.1f}",
                f"{ours:.1f}",
                f"{inductor:.1f}",
                f"{passes:.2f}",
                f"{passes / inductor:.1%}",
                f"{ours / inductor:.1%}",
                ", ".join(f"{name} {times[name]:.2f}" for name in slowest),
            )
        )
    return found


HEADER = (
    "layers",
    "total s",
    "ours s",
    "Inductor s",
    "passes s",
    "passes / Inductor",
    "ours / Inductor",
    "slowest passes, s",
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the table, or the times of one compile."""
    parser = argparse.ArgumentParser(description="compile time of GPT-2 by number of layers")
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 6, 12, 24])
    parser.add_argument("--one", type=int, help="compile once in this process, print raw times")
    chosen = parser.parse_args(arguments)
    if chosen.one is not None:
        for name, seconds in measure(chosen.one).items():
            print(f"{name}\t{seconds:.4f}")
        return
    print(table(HEADER, rows(chosen.layers)))
    print(
        f"\nCPU seconds of one process. Python {platform.python_version()}, "
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {platform.machine()}."
    )


if __name__ == "__main__":
    main()
