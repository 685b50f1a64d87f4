"""Draw the README's picture: a learned permutation, and the graph before and after compilation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.functional import mse_loss

import padst_compiler as padst
from padst_compiler.compat import is_module_state
from padst_compiler.fold import Folded, fold
from padst_compiler.passes import FOLDS
from padst_compiler.passes.drop_watch import DropWatch
from padst_compiler.plots import readme_picture


def operations(folded: Folded) -> list[str]:
    """Return the calls of a graph that run for every input, one line each."""
    calls = [node for node in folded.graph_module.graph.nodes if node.op == "call_function"]
    letters: dict[fx.Node, str] = {}
    lines = []
    for node in calls:
        if folded.facts.is_frozen(node):
            continue
        letters[node] = "abcdefgh"[len(letters)]
        x = node.args[0]
        operand = letters.get(x, "x") if isinstance(x, fx.Node) else ""
        name = str(node.target).removesuffix(".default").replace("aten.", "")
        lines.append(f"{letters[node]} = {name}({operand})")
    return lines


def main(path: Path) -> None:
    """Learn a planted shuffle, compile the model, draw both."""
    seeded = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))  # fan-in, then block
    planted = nn.Linear(64, 64, bias=False).requires_grad_(False)
    padst.sparsify(planted, padst.SparseConfig("block:8", permutation="random", seed=3))
    config = padst.SparseConfig("block:8", sparsity=0.8, permutation="learned")
    padst.sparsify(model, {"0": padst.SparseConfig("fan_in"), "2": config})
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    training = padst.DynamicSparsity(model, optimizer, total_steps=800, update_every=50)
    for _ in range(800):
        x = torch.randn(128, 64, generator=seeded)
        loss = mse_loss(model(x), planted(x)) + training.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    padst.harden(model).eval()
    seen: list[tuple[list[str], list[str]]] = []

    def record(graph_module: fx.GraphModule, inputs: list[Any]) -> Any:
        fakes = [n.meta["example_value"] for n in graph_module.graph.find_nodes(op="placeholder")]
        state = {i: "" for i, t in enumerate(inputs) if is_module_state(t)}
        plain = fold(graph_module, fakes, inputs, state, (DropWatch(),))
        folded = fold(graph_module, fakes, inputs, state, (DropWatch(), *FOLDS))
        seen.append((operations(plain), operations(folded)))
        return graph_module.forward

    with torch.no_grad():
        torch.compile(model, backend=record)(torch.randn(4, 64))
    layer = padst.sparse_layers(model)["2"]
    print(readme_picture(layer, *seen[0], path))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "readme.png"))
