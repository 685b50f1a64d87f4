"""Accuracy of sparse training: structures, permutations, growth rules, depth, on real images.

    python -m benchmarks.accuracy mlp --data fashion_mnist.npz --csv mlp.csv --seeds 5
    python -m benchmarks.accuracy depth --data fashion_mnist.npz --csv depth.csv --seeds 3
    python -m benchmarks.accuracy resnet --data cifar10.npz --csv resnet.csv
    python -m benchmarks.accuracy table --csv mlp.csv          # the table of what is there so far

The data are .npz files with x_train, y_train, x_test, y_test, uint8, grey or RGB. Each finished
training is one row of the CSV; what is there already is not run again, so an interrupted run goes
on. One process and one thread per training.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields, replace
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import padst_compiler as padst
from benchmarks.grids import GRIDS, Case
from benchmarks.nets import build, sparse_names
from padst_compiler.config import SparseConfig
from padst_compiler.mixer import Images, load_images
from padst_compiler.permutation import FixedPermutation
from padst_compiler.text import table

BATCH = 256


@cache
def load(data: Path) -> Images:
    """Return all images, standardised, once per process."""
    raw = load_images(data, limit=60_000)
    mean, deviation = raw.train_x.mean(), raw.train_x.std()
    x, y = ((each - mean) / deviation for each in (raw.train_x, raw.test_x))
    if x.dim() == 4:  # colours come last in the file
        x, y = x.movedim(-1, 1).contiguous(), y.movedim(-1, 1).contiguous()
    return Images(raw.name, x, raw.train_y, y, raw.test_y)


def train(case: Case, data: Path) -> dict[str, Any]:
    """Train one case; return its row."""
    torch.set_num_threads(1)
    found = None
    if case.permutation == "found":
        _, found = train_model(replace(case, permutation="sinkhorn"), data)
    return train_model(case, data, found)[0]


def train_model(
    case: Case, data: Path, fixed: dict[str, Tensor] | None = None
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Train once, with the permutations ``fixed`` if given; return the row and the last ones."""
    images = load(data)
    x, y, test_x = images.train_x[: case.images], images.train_y[: case.images], images.test_x
    if case.shuffled:
        order = torch.randperm(x[0].numel(), generator=torch.Generator().manual_seed(case.seed))
        x, test_x = (part.flatten(1)[:, order].view_as(part) for part in (x, test_x))
    model = build(case.network, tuple(x.shape[1:]), int(y.max()) + 1, case.seed)
    start = time.process_time()
    sparse = case.structure != "dense"
    if sparse:
        config = SparseConfig(
            case.structure,
            sparsity=case.sparsity,
            permutation="random" if fixed else case.permutation,
            side=case.side,
            seed=case.seed,
            force_permutation=case.permutation in ("learned", "sinkhorn"),
        )
        padst.sparsify(model, dict.fromkeys(sparse_names(model), config))
    first = orders(model)
    for name, order in (fixed or {}).items():
        first[name].copy_(order)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    per_epoch = len(x) // BATCH
    steps = case.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    training = controller(case, model, optimizer, steps) if sparse else None
    draws = torch.Generator().manual_seed(case.seed)
    for _ in range(case.epochs):
        for rows in torch.randperm(len(x), generator=draws).split(BATCH)[:per_epoch]:
            loss = F.cross_entropy(model(x[rows]), y[rows])
            if training is not None:
                loss = loss + training.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    history = [] if training is None else training.history
    soft = sum(getattr(m, "soft_permutation", None) is not None for m in model.modules())
    if training is not None:
        training.detach()
        padst.harden(model)
    hardened = [event["step"] / steps for event in history if event["hardened"]]
    layers = padst.report(model).layers.values() if sparse else ()
    moved = [e.distance_modulo for e in layers if e.distance_modulo is not None]
    last = orders(model)
    kept = [float((first[name] == order).double().mean()) for name, order in last.items()]
    row = asdict(case) | {
        "accuracy": round(accuracy(model, test_x, images.test_y), 2),
        "hardened_at": round(statistics.mean(hardened), 3) if hardened else "",
        "left_soft": soft,
        "moved": round(statistics.mean(moved), 3) if moved else "",  # from all that is absorbed
        "kept": round(statistics.mean(kept), 3) if kept else "",  # of where it started
        "ablated": sum(e.ablated for e in layers),
        "cpu_seconds": round(time.process_time() - start, 1),
    }
    return row, last


def orders(model: nn.Module) -> dict[str, Tensor]:
    """Return every layer's permutation; of a soft one, the nearest."""
    found = {}
    for name, layer in padst.sparse_layers(model).items():
        if (soft := layer.soft_permutation) is not None:
            found[name] = soft.harden().perm
        elif isinstance(layer.permutation, FixedPermutation):
            found[name] = layer.permutation.perm
    return found


def controller(
    case: Case, model: nn.Module, optimizer: torch.optim.Optimizer, steps: int
) -> padst.DynamicSparsity:
    """Return the controller that a case asks for."""
    options: dict[str, Any] = {"total_steps": steps, "update_every": 50, "end": 0.7}
    method: padst.methods.Method | str = case.method
    name, _, gamma = case.method.partition(":")
    if name == "srigl" and gamma:
        none = gamma == "none"
        method = padst.methods.SRigL(ablation=not none, gamma_sal=0.3 if none else float(gamma))
    return padst.DynamicSparsity(
        model, optimizer, method, penalty_weight=case.penalty, seed=case.seed, **options
    )


@torch.no_grad()
def accuracy(model: nn.Module, x: Tensor, y: Tensor) -> float:
    """Return the share of images that are classified right, in percent."""
    model.eval()
    guesses = torch.cat([model(part).argmax(dim=1) for part in x.split(1000)])
    return 100.0 * (guesses == y).float().mean().item()


def run(cases: list[Case], data: Path, out: Path, workers: int) -> None:
    """Run the cases that ``out`` does not hold yet, and append their rows."""
    from tqdm import tqdm

    names = [field.name for field in fields(Case)]
    done = {tuple(row[n] for n in names) for row in read(out)}
    todo = [c for c in cases if tuple(str(getattr(c, n)) for n in names) not in done]
    with (
        ProcessPoolExecutor(workers, get_context("spawn")) as pool,
        tqdm(total=len(cases), initial=len(cases) - len(todo), unit="training") as bar,
    ):
        futures = [pool.submit(train, case, data) for case in todo]
        for future in as_completed(futures):
            append(out, future.result())
            bar.update()


def read(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file; none where there is no file."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def append(path: Path, row: dict[str, Any]) -> None:
    """Add one row, below a header."""
    fresh = not path.exists()
    with path.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if fresh:
            writer.writeheader()
        writer.writerow(row)


COLUMNS = (
    *("network", "epochs", "shuffled", "sparsity"),
    *("structure", "method", "penalty", "side", "permutation"),
)


def summary(rows: list[dict[str, str]]) -> str:
    """Return mean, deviation and the share of the gap to RigL that permutations close."""
    scores: dict[tuple[str, ...], list[float]] = defaultdict(list)
    hardened: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in rows:
        key = tuple(row[name] for name in COLUMNS)
        scores[key].append(float(row["accuracy"]))
        hardened[key] += [float(row["hardened_at"])] if row["hardened_at"] else []
    lines = []
    for key, found in sorted(scores.items()):
        permutation = key[-1]
        plain = scores.get((*key[:-2], "auto", "none"))
        rigl = scores.get((*key[:4], "unstructured", "rigl", key[6], "auto", "none"))
        closed = ""
        if permutation != "none" and plain and rigl:
            gap = statistics.mean(rigl) - statistics.mean(plain)
            gain = statistics.mean(found) - statistics.mean(plain)
            # A share of a gap that is smaller than the noise says nothing.
            closed = f"{gain / gap:.2f}" if gap > 0.3 else f"gap {gap:+.2f}"
        deviation = statistics.stdev(found) if len(found) > 1 else 0.0
        score = f"{statistics.mean(found):.2f} ± {deviation:.2f}"
        when = f"{statistics.mean(hardened[key]):.2f}" if hardened[key] else ""
        lines.append([*key, score, str(len(found)), closed, when])
    return table((*COLUMNS, "accuracy %", "n", "gap closed", "hardened at"), lines)


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("grid", choices=(*GRIDS, "table"))
    parser.add_argument("--data", type=Path, help="images as an .npz file")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="cases whose description contains this")
    args = parser.parse_args()
    if args.grid != "table":
        if args.data is None:
            parser.error("Expected --data. Got none. Pass the path of an .npz file of images.")
        cases = [c for seed in range(args.seeds) for c in GRIDS[args.grid](seed)]
        run([c for c in cases if args.only in repr(c)], args.data, args.csv, args.workers)
    print(summary(read(args.csv)))


if __name__ == "__main__":
    main()
