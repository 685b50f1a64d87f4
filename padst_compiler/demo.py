"""The demo: sparsify, train, harden, compile, export and compare, on real images, in minutes."""

from __future__ import annotations

import multiprocessing
import os
import queue
import statistics
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch

from padst_compiler.backend import export_onnx
from padst_compiler.layers import sparse_layers
from padst_compiler.measure import machine, paired, ratio
from padst_compiler.mixer import Images, digits, load_images
from padst_compiler.text import table
from padst_compiler.trial import VARIANTS, Run, train

__all__ = ["run"]

COMPILED_BATCH = 256


def run(data: Path | None, out: Path, *, seeds: int = 3, epochs: int | None = None) -> str:
    """Train every variant, compile, export, compare; write the picture; return the table.

    Args:
        data: an ``.npz`` file of images; the bundled digits without it.
        out: folder for the picture and the ONNX file; made if missing.
        seeds: trainings per variant.
        epochs: passes over the data; by default 25 for the digits and 4 for ``data``.
    """
    images = digits() if data is None else load_images(data)
    epochs = epochs or (25 if data is None else 4)
    out.mkdir(parents=True, exist_ok=True)
    runs = _train_all(images, seeds, epochs)
    print("compiling, exporting and timing ...", flush=True)
    rows = _compare([r for r in runs if r.seed == 0], runs, images, out)
    lines = [
        table(_HEADERS, rows),
        "",
        f"{images.name}: {len(images.train_x)} training and {len(images.test_x)} test images, "
        f"{epochs} epochs, {seeds} seeds; mean and standard deviation of the test accuracy.",
        "hardening: largest change of the accuracy, in points, at any hardening by the gap rule "
        "(how many).",
        f"time: compiled inference, batch {COMPILED_BATCH}, fp32, medians of paired rounds; "
        "x: times faster than compiled dense.",
        machine(),
    ]
    try:
        from padst_compiler.plots import demo_picture

        lines.append(f"picture: {demo_picture(runs, out / 'demo.png')}")
    except ImportError as error:
        lines.append(f'no picture: {error}. pip install "padst-compiler[plot]" draws it.')
    return "\n".join(lines)


def _train_all(images: Images, seeds: int, epochs: int) -> list[Run]:
    """Train every variant with every seed: one thread and one process each, a bar for all."""
    from tqdm import tqdm

    jobs = [(variant, seed) for seed in range(seeds) for variant in VARIANTS]
    context = multiprocessing.get_context("spawn")
    workers = min(len(jobs), os.cpu_count() or 1)
    with (
        context.Manager() as manager,
        ProcessPoolExecutor(
            workers, context, initializer=torch.set_num_threads, initargs=(1,)
        ) as pool,
        tqdm(total=len(jobs) * epochs, unit="epoch", desc=f"train {len(jobs)} models") as bar,
    ):
        ticks = manager.Queue()
        futures = [pool.submit(train, images, *job, epochs, ticks.put) for job in jobs]
        while not all(future.done() for future in futures) or not ticks.empty():
            with suppress(queue.Empty):
                ticks.get(timeout=0.2)
                bar.update()
            if any(future.done() and future.exception() for future in futures):
                pool.shutdown(cancel_futures=True)
        return [future.result() for future in futures]


_HEADERS = (
    "model",
    "accuracy %",
    "hardening",
    "sparsity",
    "parameters",
    "optimiser bytes",
    "time ms",
    "x",
    "to eager",
    "to onnxruntime",
)


def _compare(firsts: list[Run], runs: list[Run], images: Images, out: Path) -> list[list[str]]:
    """Compile and export the first seed's models; return one row a variant."""
    x = images.test_x[:COMPILED_BATCH].contiguous()
    compiled = {r.variant: torch.compile(r.model.eval(), backend="padst") for r in firsts}
    rows, differences = [], {}
    with torch.no_grad():
        for r in firsts:
            differences[r.variant] = float((compiled[r.variant](x) - r.model(x)).abs().max())
        times = paired({v: partial(c, x) for v, c in compiled.items()})
    for r in firsts:
        same = [other for other in runs if other.variant == r.variant]
        scores = [other.accuracy for other in same]
        moved = [abs(change) for other in same for change in other.moved]
        report = export_onnx(r.model, x, out / f"{r.variant.replace(' + ', '-')}.onnx")
        layers = sparse_layers(r.model).values()
        zeros = statistics.mean(layer.sparsity for layer in layers) if layers else 0.0
        rows.append(
            [
                r.variant,
                f"{statistics.mean(scores):.2f} ± {statistics.pstdev(scores):.2f}",
                f"{max(moved):.2f} ({len(moved)})" if moved else "-",
                f"{zeros:.3f}",
                f"{sum(p.numel() for p in r.model.parameters()):,}",
                f"{r.optimizer_bytes:,}",
                f"{1e3 * times[r.variant].median:.2f}",
                f"{ratio(times['dense'], times[r.variant])[0]:.2f}",
                f"{differences[r.variant]:.0e}",
                f"{report.difference:.0e}",
            ]
        )
    return rows
