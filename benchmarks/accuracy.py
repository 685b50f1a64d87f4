"""Accuracy of sparse training on Fashion-MNIST: structures, permutations, growth rules and depth.

    python benchmarks/accuracy.py mlp --data fashion_mnist.npz --csv mlp.csv --seeds 5
    python benchmarks/accuracy.py depth --data fashion_mnist.npz --csv depth.csv --seeds 3
    python benchmarks/accuracy.py table --csv mlp.csv          # the table of what is there so far

Each finished training is one row of the CSV; what is there already is not run again, so a run that
was interrupted goes on. One process and one thread per training.
"""

from __future__ import annotations

import argparse
import csv
import os
import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields
from functools import cache
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import padst_compiler as padst
from padst_compiler.config import SparseConfig
from padst_compiler.mixer import Images, load_images
from padst_compiler.text import table

STRUCTURES = ("block:16", "nm:16", "diagonal", "fan_in")


@dataclass(frozen=True)
class Case:
    """One training; every random number comes from ``seed``."""

    depth: int  # hidden layers
    width: int
    structure: str  # "dense" for none
    permutation: str
    method: str
    sparsity: float
    epochs: int
    seed: int


def mlp_cases(seeds: int, epochs: int) -> Iterator[Case]:
    """784-1024-1024-10: every structure and permutation against dense, RigL, SET and SRigL."""
    for seed in range(seeds):
        yield Case(2, 1024, "dense", "none", "static", 0.0, epochs, seed)
        for sparsity in (0.9, 0.95):
            for method in ("rigl", "set"):
                yield Case(2, 1024, "unstructured", "none", method, sparsity, epochs, seed)
            for method in ("srigl", "srigl-no-ablation"):
                yield Case(2, 1024, "fan_in", "none", method, sparsity, epochs, seed)
            for structure in STRUCTURES:
                for permutation in ("none", "random", "learned"):
                    yield Case(2, 1024, structure, permutation, "rigl", sparsity, epochs, seed)


def depth_cases(seeds: int, epochs: int) -> Iterator[Case]:
    """3 to 16 hidden layers of 256 at 95 %: static and growing masks, with and without mixing."""
    for seed in range(seeds):
        for depth in (3, 6, 10, 16):
            yield Case(depth, 256, "dense", "none", "static", 0.0, epochs, seed)
            yield Case(depth, 256, "unstructured", "none", "rigl", 0.95, epochs, seed)
            for structure in ("block:16", "diagonal", "nm:16"):
                for method in ("static", "rigl"):
                    for permutation in ("none", "random", "learned"):
                        yield Case(depth, 256, structure, permutation, method, 0.95, epochs, seed)


def network(case: Case, pixels: int, classes: int) -> nn.Sequential:
    """Return the MLP of ``case``, seeded, with the global generator left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(case.seed)
        widths = [pixels] + [case.width] * case.depth
        layers: list[nn.Module] = []
        for inner, outer in pairwise(widths):
            layers += [nn.Linear(inner, outer), nn.ReLU()]
        return nn.Sequential(*layers, nn.Linear(case.width, classes))


@cache
def load(data: Path) -> Images:
    """Return all images, once per process."""
    return load_images(data, limit=60_000)


def train(case: Case, data: Path) -> dict[str, Any]:
    """Train one case; return its row."""
    torch.set_num_threads(1)
    images = load(data)
    train_x, test_x = images.train_x.flatten(1), images.test_x.flatten(1)
    mean, deviation = train_x.mean(), train_x.std()
    train_x, test_x = (train_x - mean) / deviation, (test_x - mean) / deviation
    model = network(case, train_x.shape[1], int(images.train_y.max()) + 1)
    start = time.process_time()
    if case.structure != "dense":
        forced = case.permutation == "learned"
        config = SparseConfig(
            case.structure,
            sparsity=case.sparsity,
            permutation=case.permutation,
            seed=case.seed,
            force_permutation=forced,
        )
        names = {str(2 * i): config for i in range(case.depth)}
        padst.sparsify(model, names)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=1e-4)
    batch = 256
    per_epoch = len(train_x) // batch
    steps = case.epochs * per_epoch
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    training = None
    if case.structure != "dense":
        training = padst.DynamicSparsity(
            model, optimizer, **controller(case.method), total_steps=steps, update_every=50, end=0.7
        )
    order = torch.Generator().manual_seed(case.seed)
    for _ in range(case.epochs):
        for rows in torch.randperm(len(train_x), generator=order).split(batch)[:per_epoch]:
            loss = F.cross_entropy(model(train_x[rows]), images.train_y[rows])
            if training is not None:
                loss = loss + training.penalty()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    left = soft_layers(model)
    if training is not None:
        training.detach()
        padst.harden(model)
    model.eval()
    with torch.no_grad():
        right = (model(test_x).argmax(dim=1) == images.test_y).float().mean().item()
    history = training.history if training is not None else []
    hardened = [event["step"] / steps for event in history if event["hardened"]]
    return asdict(case) | {
        "accuracy": round(100.0 * right, 2),
        "hardened_at": round(statistics.mean(hardened), 3) if hardened else "",
        "left_soft": left,
        "cpu_seconds": round(time.process_time() - start, 1),
    }


def controller(method: str) -> dict[str, Any]:
    """Return the arguments of ``DynamicSparsity`` that name a growth rule."""
    if method == "static":
        return {"method": "rigl", "drop_fraction": 0.0}
    return {"method": method}


def soft_layers(model: nn.Module) -> int:
    """Count the permutations that are still soft."""
    return sum(bool(getattr(m, "soft_permutation", None)) for m in model.modules())


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


def summary(rows: list[dict[str, str]]) -> str:
    """Return mean, deviation and the share of the gap to RigL that permutations close."""
    scores: dict[tuple[str, ...], list[float]] = defaultdict(list)
    for row in rows:
        key = tuple(row[n] for n in ("depth", "sparsity", "structure", "method", "permutation"))
        scores[key].append(float(row["accuracy"]))
    lines = []
    for (depth, sparsity, structure, method, permutation), found in sorted(scores.items()):
        plain = scores.get((depth, sparsity, structure, method, "none"))
        rigl = scores.get((depth, sparsity, "unstructured", "rigl", "none"))
        closed = ""
        if permutation != "none" and plain and rigl:
            gap = statistics.mean(rigl) - statistics.mean(plain)
            gain = statistics.mean(found) - statistics.mean(plain)
            # A share of a gap that is smaller than the noise says nothing.
            closed = f"{gain / gap:.2f}" if gap > 0.3 else f"gap {gap:+.2f}"
        deviation = statistics.stdev(found) if len(found) > 1 else 0.0
        name = (depth, sparsity, structure, method, permutation)
        lines.append([*name, f"{statistics.mean(found):.2f} ± {deviation:.2f}", len(found), closed])
    head = ("depth", "sparsity", "structure", "method", "permutation", "accuracy %", "n", "closed")
    return table(head, [[str(cell) for cell in line] for line in lines])


def main() -> None:
    """Read the command line, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("grid", choices=("mlp", "depth", "table"))
    parser.add_argument("--data", type=Path, help="Fashion-MNIST as an .npz file")
    parser.add_argument("--csv", type=Path, required=True)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--only", default="", help="cases whose description contains this")
    args = parser.parse_args()
    if args.grid != "table":
        if args.data is None:
            parser.error("Expected --data. Got none. Pass the path of Fashion-MNIST's .npz file.")
        grid = mlp_cases if args.grid == "mlp" else depth_cases
        cases = [c for c in grid(args.seeds, args.epochs) if args.only in repr(c)]
        run(cases, args.data, args.csv, args.workers)
    print(summary(read(args.csv)))


if __name__ == "__main__":
    main()
