"""Two-layer MLPs on this machine: every structure against the best dense peer, wins and losses.

    python benchmarks/mlp.py                     # the README's table
    python benchmarks/mlp.py --tokens 197 --csv mlp.csv

Each row is one run in which all contestants take turns. Dense peers: eager PyTorch, Inductor, and
onnxruntime where it is installed; the ratio is to the fastest of them in that row.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import padst_compiler as padst
from padst_compiler.explanation import Explanation
from padst_compiler.layer_contestants import in_onnxruntime
from padst_compiler.measure import Timing, machine, paired, ratio
from padst_compiler.text import table

HEADERS = (
    "case",
    "structure",
    "tokens",
    "density",
    "gathers",
    "eager ms",
    "Inductor ms",
    "ORT ms",
    "padst ms",
    "x best dense [95 %]",
    "kernels",
)
STRUCTURES = ("block:32", "block:64", "block:16", "nm:16", "diagonal", "fan_in", "unstructured")


def mlp(width: int, hidden: int) -> nn.Sequential:
    """Return ``width -> hidden -> width`` with GELU, seeded."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        return nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width)).eval()


def row(
    case: str,
    structure: str,
    tokens: int,
    model: nn.Module,
    contestants: dict[str, Callable[[], Any]],
    report: Explanation | None,
) -> list[str]:
    """Time the contestants together and format their row."""
    times = paired(contestants, settle=0.1)
    dense = {name: time for name, time in times.items() if name != "padst"}
    best = min(dense.values(), key=lambda time: time.median)
    middle, low, high = ratio(best, times["padst"])

    def show(time: Timing | None) -> str:
        return "-" if time is None else f"{1e3 * time.median:.2f}"

    layers = padst.sparse_layers(model).values()
    density = sum(v.values.numel() for v in layers) / sum(v.shape.numel for v in layers)
    return [
        case,
        structure,
        str(tokens),
        f"{density:.3f}",
        "-" if report is None else str(report.gathers),
        *(show(times.get(name)) for name in ("eager", "inductor", "ort", "padst")),
        f"{middle:.2f} [{low:.2f}, {high:.2f}]",
        "-" if report is None else ", ".join(kernel for _, kernel, _ in report.kernels),
    ]


def inference(structure: str, tokens: int, sparsity: float) -> list[str]:
    """Time inference of the MLP with random permutations where the structure has a use for them."""
    dense, sparse = mlp(768, 3072), mlp(768, 3072)
    config = padst.SparseConfig(structure, sparsity=sparsity, permutation="random")
    if structure in ("fan_in", "unstructured"):  # every permutation is absorbed: none is there
        config = padst.SparseConfig(structure, sparsity=sparsity, permutation="none")
    padst.sparsify(sparse, config, filter_fn=lambda site: True)
    x = torch.randn(tokens, 768, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    compiled = torch.compile(sparse, backend="padst")
    inductor = torch.compile(dense)
    contestants: dict[str, Callable[[], Any]] = {
        "eager": lambda: dense(x),
        "inductor": lambda: inductor(x),
        "padst": lambda: compiled(x),
    }
    ort = in_onnxruntime(dense, x)
    if ort is not None:
        contestants["ort"] = ort
    with torch.no_grad():
        report = padst.explain(sparse, x, options={"verify": False})
        return row("inference", structure, tokens, sparse, contestants, report)


def training_step(structure: str, tokens: int, sparsity: float) -> list[str]:
    """Time forward and backward, both compiled."""
    dense, sparse = mlp(768, 3072), mlp(768, 3072)
    config = padst.SparseConfig(structure, sparsity=sparsity, permutation="none")
    padst.sparsify(sparse, config, filter_fn=lambda site: True)
    x = torch.randn(tokens, 768, generator=torch.Generator().manual_seed(0))
    torch.compiler.reset()
    compiled, inductor = torch.compile(sparse, backend="padst"), torch.compile(dense)

    def step(model: Callable[[Tensor], Tensor], of: nn.Module) -> Callable[[], None]:
        def run() -> None:
            of.zero_grad(set_to_none=True)
            model(x).square().sum().backward()

        return run

    contestants = {
        "eager": step(dense, dense),
        "inductor": step(inductor, dense),
        "padst": step(compiled, sparse),
    }
    return row("fwd + bwd", structure, tokens, sparse, contestants, None)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 32, 197, 1576])
    parser.add_argument("--structures", nargs="*", default=list(STRUCTURES))
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--csv", type=Path, help="write the rows here too")
    options = parser.parse_args()
    rows = []
    for tokens in options.tokens:
        for structure in options.structures:
            rows.append(inference(structure, tokens, options.sparsity))
            print("  ".join(rows[-1]), flush=True)
    for structure in ("block:32", "fan_in"):
        rows.append(training_step(structure, 197, options.sparsity))
        print("  ".join(rows[-1]), flush=True)
    print()
    print(table(HEADERS, rows))
    print(f"\nMLP 768-3072-768, fp32, {options.sparsity:.0%} asked, medians; {machine()}")
    if options.csv is not None:
        with options.csv.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([HEADERS, *rows])


if __name__ == "__main__":
    main()
