"""What a call of a graph that ``torch.compile`` made costs, before anything of ours runs.

    python benchmarks/call_overhead.py

The graph of one layer returns a tensor that is there already, so that guards and Python remain.
Before each call so many bytes are read, as a kernel's weights and tokens would be: what the call
itself needs then comes from farther away. The layer is dense, then sparse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx, nn

import padst_compiler as padst
from padst_compiler.measure import machine, paired
from padst_compiler.text import table

READ = (0, 1 << 16, 1 << 20, 1 << 22, 3072 * 768 * 4)


def overhead(model: nn.Module, count: int) -> float:
    """Return the seconds that a call takes beside reading ``count`` bytes."""
    torch.compiler.reset()
    x, result, other = torch.randn(1, 768), (torch.zeros(1, 3072),), torch.zeros(count // 4)

    def backend(graph: fx.GraphModule, arguments: Sequence[Any]) -> Callable[..., Any]:
        del graph, arguments

        def run(*_: Any) -> Any:
            other.sum()
            return result

        return run

    with torch.no_grad():
        compiled = torch.compile(model, backend=backend)
        compiled(x)
        calls: dict[str, Callable[[], Any]] = {"call": lambda: compiled(x), "read": other.sum}
        times = paired(calls, rounds=21, seconds=0.02)
    return times["call"].median - times["read"].median


def main() -> None:
    """Print the table."""
    torch.set_num_threads(1)
    dense = nn.Linear(768, 3072).eval()
    sparse = nn.Sequential(nn.Linear(768, 3072)).eval()
    padst.sparsify(sparse, structure="block:32", sparsity=0.9, filter_fn=lambda site: True)
    padst.harden(sparse)
    rows = [
        (f"{count:,}", *(f"{1e6 * overhead(model, count):.0f}" for model in (dense, sparse)))
        for count in READ
    ]
    print(table(("bytes read before", "nn.Linear, us a call", "block:32, us a call"), rows))
    print(f"\n{machine()}")


if __name__ == "__main__":
    main()
