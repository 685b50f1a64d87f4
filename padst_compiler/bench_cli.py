"""``padst bench cpu`` and ``padst bench gpu``: their arguments, and what they run."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["DEVICES", "EXAMPLE", "TEXT", "add_arguments"]

TEXT = "time a model: dense against sparse, both compiled, side by side"
EXAMPLE = (
    "padst bench my_models.py:MODEL --structure block:32 --sparsity 0.9\n"
    "    padst bench cpu --tokens 1 197 --csv layers.csv     (single layers, every peer)\n"
    "    padst bench cpu --models vit_b16 --batches 1 8      (whole models)\n"
    "    padst bench gpu --csv gpu.csv --plots pictures      (everything on a GPU, 8 minutes)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``padst bench`` behind those of a model."""
    parser.add_argument("--rounds", type=int, help="paired rounds (default 11, gpu 7)")
    both = parser.add_argument_group("bench cpu, bench gpu")
    both.add_argument("--csv", type=Path, help="write the rows here, as they come")
    both.add_argument("--full", action="store_true", help="all there is to time: hours")
    grid = parser.add_argument_group("bench cpu")
    grid.add_argument("--layers", nargs="*", default=["768-3072"], help="default 768-3072")
    grid.add_argument("--structures", nargs="*", help="default: all")
    grid.add_argument("--sparsities", nargs="*", type=float, default=[0.9], help="default 0.9")
    grid.add_argument("--tokens", nargs="*", type=int, default=[1, 32, 197, 1576])
    grid.add_argument("--threads", nargs="*", type=int, help="default: 1 and all")
    grid.add_argument("--cold", action="store_true", help="cold weights as well")
    types = ("fp32", "bf16", "fp16")
    grid.add_argument("--dtypes", nargs="*", default=["fp32"], choices=types)
    grid.add_argument("--dense-peers", action="store_true", help="leave out CSR, BSR, scipy")
    grid.add_argument("--models", nargs="*", help="instead: vit_b16, gpt2, vit_b16:LAYERS")
    grid.add_argument("--batches", nargs="*", type=int, default=[1, 8], help="of models")
    grid.add_argument("--train", action="store_true", help="forward and backward as well")
    grid.add_argument("--plot", type=Path, help="draw the ratios here ([plot])")
    gpu = parser.add_argument_group("bench gpu")
    gpu.add_argument("--minutes", type=float, default=8.0, help="that it may take (default 8)")
    gpu.add_argument("--plots", type=Path, help="a folder for pictures ([plot])")
    parts = ("layers", "mlp", "training", "maps", "models")
    gpu.add_argument("--only", choices=parts, help="one part, and its correctness")
    gpu.add_argument("--tiny", action="store_true", help="a dry run on the CPU, interpreted")


def _cpu(options: argparse.Namespace) -> str:
    import torch

    from padst_compiler import layer_benchmark, model_benchmark

    before, every = torch.get_num_threads(), options.full
    cores = options.threads or sorted({1, before})
    modes = (False, True) if options.train else (False,)
    bench: Any = layer_benchmark if options.models is None else model_benchmark
    if bench is model_benchmark:
        names, kinds = options.models or ["vit_b16", "gpt2"], options.structures or ["block:32"]
        selected = bench.cases(names, kinds, options.sparsities, options.batches, cores, modes)
    else:
        pairs = [text.split("-") for text in options.layers]
        layers = [(int(inputs), int(outputs)) for inputs, outputs in pairs]
        selected = bench.cases(
            bench.LAYERS if every else layers,
            options.structures or bench.STRUCTURES,
            bench.SPARSITIES if every else options.sparsities,
            bench.TOKENS if every else options.tokens,
            cores,
            cold=(False, True) if every or options.cold else (False,),
            dtypes=options.dtypes,
            train=modes,
            others=not options.dense_peers,
            permutation="random" if options.permutation == "learned" else options.permutation,
        )
    rounds = options.rounds or 11
    try:
        return str(
            bench.report(list(selected), rounds=rounds, path=options.csv, picture=options.plot)
        )
    finally:
        torch.set_num_threads(before)


def _gpu(options: argparse.Namespace) -> object:
    """Return the report; ``right`` says whether all numbers are."""
    if options.tiny:  # Triton asks when it is imported
        os.environ["TRITON_INTERPRET"] = "1"
    from padst_compiler.gpu_benchmark import Wanted, report

    wanted = Wanted(
        minutes=options.minutes,
        csv=options.csv,
        plots=options.plots,
        only=options.only,
        tiny=options.tiny,
        full=options.full,
        rounds=options.rounds or 7,
    )
    return report(wanted, say=lambda text: print(text, flush=True))


DEVICES: Mapping[str, Callable[[argparse.Namespace], object]] = {"cpu": _cpu, "gpu": _gpu}
"""What is timed instead of a model, by what is said in its place."""
