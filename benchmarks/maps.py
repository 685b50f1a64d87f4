"""What a permutation costs that the kernel of a layer reads or writes through, against none.

    python benchmarks/maps.py
    python benchmarks/maps.py --layers 768-3072 --structures block:32 --tokens 197

One layer without a permutation, with one of its inputs and with one of its outputs: the compiled
graphs are called in turns, one thread. A permutation that folds is not in the graph at all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import padst_compiler as padst
from padst_compiler.layer_contestants import compiled
from padst_compiler.measure import machine, paired, ratio
from padst_compiler.text import table


def graph(
    structure: str, shape: tuple[int, int], tokens: int, side: str | None
) -> Callable[[], Any]:
    """Return a call of the compiled graph of one layer."""
    torch.compiler.reset()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        model, x = nn.Sequential(nn.Linear(*shape)).eval(), torch.randn(tokens, shape[0])
    form = "none" if side is None else "random"
    config = padst.SparseConfig(structure, sparsity=0.9, permutation=form, side=side or "auto")
    padst.sparsify(model, config, filter_fn=lambda site: True)
    return compiled(model, x)[1]


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", nargs="*", default=["768-3072", "3072-768"])
    parser.add_argument("--structures", nargs="*", default=["block:16", "block:32", "block:64"])
    parser.add_argument("--tokens", nargs="*", type=int, default=[32, 197, 1576])
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for layer in options.layers:
        inputs, outputs = map(int, layer.split("-"))
        for structure in options.structures:
            for tokens in options.tokens:
                with torch.no_grad():
                    calls = {
                        str(side): graph(structure, (inputs, outputs), tokens, side)
                        for side in (None, "input", "output")
                    }
                    times = paired(calls, rounds=15, seconds=0.03)
                slower = [ratio(times[side], times["None"]) for side in ("input", "output")]
                said = [
                    f"{100 * (r - 1):+.0f} [{100 * (a - 1):+.0f}, {100 * (b - 1):+.0f}]"
                    for r, a, b in slower
                ]
                rows.append((layer, structure, str(tokens), *said))
    print(table(("layer", "structure", "tokens", "inputs, % slower", "outputs, % slower"), rows))
    print(f"\n90 %, fp32, 95 % intervals; {machine()}")


if __name__ == "__main__":
    main()
