"""Planted permutations: is a hidden shuffle found again, by which form, from which start?

    python benchmarks/planted.py            # both tables, a few minutes on one core
    python benchmarks/planted.py --quick    # one repeat and fewer steps

The teacher is ``S* P*`` with S* block-diagonal and P* random; the student minimises
``|S M - S* P*|^2 / |S* P*|^2`` with the teacher's mask and Adam. The error is taken after M has
hardened and S was fitted again: 0 is found, 1 - 1/blocks is what chance leaves.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from padst_compiler.permutation import SoftPermutation
from padst_compiler.relaxations.autoshuffle import AutoShufflePermutation
from padst_compiler.relaxations.blockwise import BlockwisePermutation
from padst_compiler.relaxations.clos import ClosPermutation
from padst_compiler.relaxations.low_rank import LowRankPermutation
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation
from padst_compiler.rules import DELTA, GapRule
from padst_compiler.text import table

LOOK = 100  # steps between two looks of the gap rule


class Teacher(NamedTuple):
    """``S* P*``: the planted weight, and the permutation in it."""

    weight: Tensor  # (n, n)
    perm: Tensor  # (n,)
    block: int


class Found(NamedTuple):
    """What a run ended with."""

    error: float  # after hardening and fitting S again
    fixed: float  # share of fixed points
    fired: int | None  # first step with a mean gap below the paper's delta
    decided: int | None  # the look at which the gap rule decided


@dataclass(frozen=True)
class Run:
    """How the student is trained."""

    steps: int = 2000
    penalty: float = 0.3  # weight of the mean gap
    ramp: bool = True
    rate: float = 2e-2
    cosine: bool = True


def plant(size: int, block: int, seed: int) -> Teacher:
    """Return a teacher of ``size / block`` diagonal blocks."""
    generator = torch.Generator().manual_seed(seed)
    blocks = torch.randn(size // block, block, block, generator=generator)
    perm = torch.randperm(size, generator=generator)
    weight = torch.zeros(size, size)
    weight[:, perm] = torch.block_diag(*blocks)  # S* P*: column j of S* reads input perm[j]
    return Teacher(weight, perm, block)


def refitted(teacher: Teacher, perm: Tensor) -> float:
    """Return the relative error of the best S with the permutation ``perm``."""
    count = len(perm) // teacher.block
    tiles = teacher.weight[:, perm].view(count, teacher.block, count, teacher.block)
    kept = tiles.diagonal(dim1=0, dim2=2).square().sum()
    return float(1.0 - kept / teacher.weight.square().sum())


def learn(teacher: Teacher, soft: SoftPermutation, run: Run, seed: int) -> Found:
    """Train S and M on the teacher."""
    generator = torch.Generator().manual_seed(seed)
    block, size = teacher.block, len(teacher.perm)
    start = torch.randn(size // block, block, block, generator=generator)
    s = nn.Parameter(0.1 * start)
    optimizer = torch.optim.Adam([s, *soft.parameters()], lr=run.rate)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, run.steps)
    scale, fired, decided, rule = teacher.weight.square().sum(), None, None, GapRule()
    rule.note(soft.gap())
    for step in range(run.steps):
        optimizer.zero_grad()
        matrix = soft.soft()
        product = torch.bmm(s, matrix.view(-1, block, size)).view(size, size)
        loss = (product - teacher.weight).square().sum() / scale
        l1, l2 = soft.norms()
        gap = (l1 - l2).mean()
        weight = run.penalty * (min(1.0, 2.0 * step / run.steps) if run.ramp else 1.0)
        (loss + weight * gap).backward()
        optimizer.step()
        if run.cosine:
            scheduler.step()
        soft.anneal(soft.annealing ** (1.0 / run.steps))
        if fired is None and float(gap.detach()) < DELTA:
            fired = step
        if decided is None and step and step % LOOK == 0:
            rule.ready(soft.gap(), lambda: soft.harden().perm)
            decided = step if rule.settling else None
    perm = soft.harden().perm
    fixed = float((perm == torch.arange(size)).float().mean())
    return Found(refitted(teacher, perm), fixed, fired, decided)


Make = Callable[[int, torch.Generator], SoftPermutation]


def sinkhorn(size: int, generator: torch.Generator) -> SoftPermutation:
    """Return full logits, near uniform, at temperature 1."""
    return SinkhornPermutation(size, generator, temperature=1.0, noise=0.1)


def low_rank(rank: int) -> Make:
    """Return a maker of low-rank logits."""
    return lambda n, generator: LowRankPermutation(n, generator, rank=rank, scale=1.0)


def clos(factors: int) -> Make:
    """Return a maker of Clos factors."""
    return lambda n, generator: ClosPermutation(
        n, generator, factors=factors, temperature=1.0, noise=0.5
    )


def blockwise(block: int) -> Make:
    """Return a maker of block-wise logits."""
    return lambda n, generator: BlockwisePermutation(
        n, generator, block=block, temperature=1.0, noise=0.1
    )


def autoshuffle(size: int, generator: torch.Generator) -> SoftPermutation:
    """Return AutoShuffleNet's magnitudes, near uniform."""
    return AutoShufflePermutation(size, generator, scale=1.0, noise=0.1)


FORMS: dict[str, Make] = {
    "full (sinkhorn)": sinkhorn,
    "autoshuffle": autoshuffle,
    "low_rank m=12": low_rank(12),
    "low_rank m=16": low_rank(16),
    "low_rank m=32": low_rank(32),
    "clos:3": clos(3),
    "clos:2": clos(2),
    "blockwise:16": blockwise(16),
    "blockwise:32": blockwise(32),
}


def near_identity(size: int, generator: torch.Generator, logit: float) -> SoftPermutation:
    """Return full logits that start near the identity (0: near uniform), 5 Sinkhorn steps."""
    soft = SinkhornPermutation(size, generator, temperature=1.0, noise=0.1, iterations=5)
    with torch.no_grad():
        soft.logits.add_(logit * torch.eye(size))
    return soft


def compare(repeats: int, run: Run, size: int = 64, block: int = 8, only: str = "") -> str:
    """Return the table of the forms whose name contains ``only``."""
    rows = []
    teachers = [plant(size, block, seed) for seed in range(repeats)]
    shuffles = [torch.Generator().manual_seed(100 + seed) for seed in range(repeats)]
    rows.append(["identity", 0, _span([refitted(t, torch.arange(size)) for t in teachers]), ""])
    drawn = [torch.randperm(size, generator=generator) for generator in shuffles]
    errors = [refitted(t, perm) for t, perm in zip(teachers, drawn, strict=True)]
    rows.append(["random", 0, _span(errors), ""])
    for name, make in FORMS.items():
        if only not in name or (name.startswith("clos") and math.isqrt(size) ** 2 != size):
            continue
        start, found, numbers = time.perf_counter(), [], 0
        for seed, teacher in enumerate(teachers):
            soft = make(size, torch.Generator().manual_seed(200 + seed))
            numbers = sum(p.numel() for p in soft.parameters())
            found.append(learn(teacher, soft, run, seed).error)
        spent = (time.perf_counter() - start) / repeats
        rows.append([name, numbers, _span(found), f"{spent:.1f}"])
    return table(["form", "parameters", "error of each repeat", "s a run"], rows)


def sweep(repeats: int, steps: int, size: int = 64, block: int = 8) -> str:
    """Return the table of starts and constant penalty weights."""
    rows = []
    for logit in (0.0, 4.0, 8.0):
        for weight in (0.0, 0.03, 0.3, 3.0):
            run = Run(steps=steps, penalty=weight, ramp=False, cosine=False)
            found = []
            for seed in range(repeats):
                soft = near_identity(size, torch.Generator().manual_seed(200 + seed), logit)
                found.append(learn(plant(size, block, seed), soft, run, seed))
            name = f"identity, logit {logit:g}" if logit else "near uniform"
            fixed = " ".join(f"{100 * one.fixed:.0f}" for one in found)
            fired = " ".join("-" if one.fired is None else str(one.fired) for one in found)
            decided = " ".join("-" if one.decided is None else str(one.decided) for one in found)
            errors = _span([one.error for one in found])
            rows.append([name, weight, errors, fixed, fired, decided])
    headers = ["start", "lambda", "error of each repeat", "% fixed points"]
    return table([*headers, "mean gap < 0.22 at step", "gap rule decides at step"], rows)


def _span(errors: list[float]) -> str:
    return " ".join(f"{abs(error):.3f}" for error in errors)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one repeat and fewer steps")
    parser.add_argument("--size", type=int, default=64, help="features, n")
    parser.add_argument("--block", type=int, default=8, help="side of the teacher's blocks")
    parser.add_argument("--repeats", type=int, help="how many teachers")
    parser.add_argument("--steps", type=int, help="how long a student is trained")
    parser.add_argument("--form", default="", help="forms whose name contains this")
    parser.add_argument("--only", choices=("forms", "sweep"), help="one of the two tables")
    chosen = parser.parse_args()
    repeats, steps = (1, 1000) if chosen.quick else (3, 2000)
    repeats, steps = chosen.repeats or repeats, chosen.steps or steps
    size, block = chosen.size, chosen.block
    left = 1.0 - block / size
    print(f"n = {size}, {size // block} blocks of {block}, {repeats} repeats; chance {left:.3f}")
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    if chosen.only != "sweep":
        print(f"{steps} steps, Adam 2e-2 with cosine decay, mean gap ramped to 0.3")
        print(compare(repeats, Run(steps=steps), size, block, chosen.form))
    if chosen.only != "forms":
        print(f"\n{steps} steps, Adam 2e-2, constant weight of the mean gap, 5 Sinkhorn steps")
        print(sweep(repeats, steps, size, block))


if __name__ == "__main__":
    main()
