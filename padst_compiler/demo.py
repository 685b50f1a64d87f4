"""The demo: sparsify, train, harden, compile, export and compare, on real images, in minutes."""

from __future__ import annotations

import multiprocessing
import os
import queue
import statistics
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from padst_compiler.backend import export_onnx
from padst_compiler.config import SparseConfig
from padst_compiler.layers import sparse_layers
from padst_compiler.measure import machine, paired, ratio
from padst_compiler.mixer import Images, Mixer, digits, load_images
from padst_compiler.sites import Site
from padst_compiler.sparsify import sparsify
from padst_compiler.text import table
from padst_compiler.training import DynamicSparsity, harden

__all__ = ["Run", "run", "train"]

VARIANTS = ("dense", "block", "block + permutation")
BATCH = 96
COMPILED_BATCH = 256
UPDATE_EVERY = 20


@dataclass
class Run:
    """One trained model and what happened on the way."""

    variant: str
    seed: int
    model: nn.Module
    accuracy: float
    soft_accuracy: float  # before the last hardening; equal where nothing was soft
    optimizer_bytes: int
    curve: list[tuple[int, float]] = field(default_factory=list)  # (step, test accuracy)
    history: list[Any] = field(default_factory=list)
    soft: dict[str, Tensor] = field(default_factory=dict)  # soft matrices just before hardening


def train(
    images: Images, variant: str, seed: int, epochs: int, tick: Callable[[int], object]
) -> Run:
    """Train one variant; every random number comes from ``seed``.

    Args:
        images: the data.
        variant: one of ``VARIANTS``.
        seed: of the weights, the order of the data and the topology.
        epochs: passes over the training images.
        tick: called with the number of every epoch that is done.
    """
    with torch.random.fork_rng(devices=[]):
        torch.random.default_generator.manual_seed(seed)
        model = Mixer(images.side, patch=images.side // 4)
    if variant != "dense":
        permutation = "learned" if "permutation" in variant else "none"
        config = SparseConfig("block:8", sparsity=0.9, permutation=permutation, seed=seed)
        sparsify(model, config, filter_fn=_channel_mixing)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-3)
    batches = len(images.train_x) // BATCH
    steps = epochs * batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    training = None
    if variant != "dense":
        training = DynamicSparsity(
            model, optimizer, "rigl", total_steps=steps, update_every=UPDATE_EVERY, seed=seed
        )
    result = Run(variant, seed, model, 0.0, 0.0, 0)
    order = torch.Generator().manual_seed(seed)
    for epoch in range(epochs):
        model.train()
        for rows in torch.randperm(len(images.train_x), generator=order).split(BATCH)[:batches]:
            loss = F.cross_entropy(model(images.train_x[rows]), images.train_y[rows])
            if training is not None:
                if training.step_count % UPDATE_EVERY == UPDATE_EVERY - 1:
                    _keep_soft(model, result.soft)  # the next step may harden it
                loss = loss + training.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        result.curve.append(((epoch + 1) * batches, accuracy(model, images)))
        tick(epoch)
    result.soft_accuracy = result.curve[-1][1]
    if training is not None:
        result.history = list(training.history)
        training.detach()
        _keep_soft(model, result.soft)
        harden(model)
    result.accuracy = accuracy(model, images)
    state = [t for s in optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
    result.optimizer_bytes = sum(t.numel() * t.element_size() for t in state)
    return result


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Return the share of test images that are classified right, in percent."""
    model.eval()
    guesses = torch.cat([model(x).argmax(dim=1) for x in images.test_x.split(1000)])
    return 100.0 * float((guesses == images.test_y).float().mean())


def run(data: Path | None, out: Path, *, seeds: int = 3, epochs: int | None = None) -> str:
    """Train every variant, compile, export, compare; write the picture; return the table.

    Args:
        data: an ``.npz`` file of images; the bundled digits without it.
        out: folder for the picture and the ONNX file; made if missing.
        seeds: trainings per variant.
        epochs: passes over the data; by default 25 for the digits and 6 for ``data``.
    """
    images = digits() if data is None else load_images(data)
    epochs = epochs or (25 if data is None else 6)
    out.mkdir(parents=True, exist_ok=True)
    runs = _train_all(images, seeds, epochs)
    print("compiling, exporting and timing ...", flush=True)
    rows = _compare([r for r in runs if r.seed == 0], runs, images, out)
    lines = [
        table(_HEADERS, rows),
        "",
        f"{images.name}: {len(images.train_x)} training and {len(images.test_x)} test images, "
        f"{epochs} epochs, {seeds} seeds; mean and standard deviation of the test accuracy.",
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
        times = paired({v: (lambda c=c: c(x)) for v, c in compiled.items()})
    for r in firsts:
        same = [other for other in runs if other.variant == r.variant]
        scores = [other.accuracy for other in same]
        moved = max(abs(other.accuracy - other.soft_accuracy) for other in same)
        report = export_onnx(r.model, x, out / f"{r.variant.replace(' + ', '-')}.onnx")
        layers = sparse_layers(r.model).values()
        zeros = statistics.mean(layer.sparsity for layer in layers) if layers else 0.0
        rows.append(
            [
                r.variant,
                f"{statistics.mean(scores):.2f} ± {statistics.pstdev(scores):.2f}",
                f"{moved:.2f}",
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


def _channel_mixing(site: Site) -> bool:
    """Sparsify the wide MLPs; the token-mixing ones are too narrow for blocks of 8."""
    return ".channels." in site.name


def _keep_soft(model: nn.Module, kept: dict[str, Tensor]) -> None:
    for name, layer in sparse_layers(model).items():
        if layer.soft_permutation is not None:
            kept[name] = layer.soft_permutation.soft().detach()
