"""Draw the README's picture: a learned permutation, and the graph before and after compilation."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import fx, nn
from torch.nn.functional import mse_loss

import padst_compiler as padst
from padst_compiler.backend import Settings, fold_dynamo
from padst_compiler.plots import readme_picture


def operations(graph: fx.Graph) -> list[str]:
    """Return the calls of a graph by their short names."""
    calls = [node for node in graph.nodes if node.op == "call_function"]
    return [f"{node.name:14} {getattr(node.target, '__name__', node.target)}" for node in calls]


def main(path: Path) -> None:
    """Learn a planted shuffle, compile the model, draw both."""
    seeded = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 64))
    planted = nn.Linear(64, 64, bias=False).requires_grad_(False)
    padst.sparsify(planted, padst.SparseConfig("block:8", permutation="random", seed=3))
    config = padst.SparseConfig("block:8", sparsity=0.8, permutation="learned")
    padst.sparsify(model, {"0": config, "2": padst.SparseConfig("fan_in")})
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
        plain = fold_dynamo(graph_module, inputs, Settings(fold="off"))
        folded = fold_dynamo(graph_module, inputs, Settings())
        seen.append((operations(plain.graph_module.graph), operations(folded.graph_module.graph)))
        return graph_module.forward

    with torch.no_grad():
        torch.compile(model, backend=record)(torch.randn(4, 64))
    layer = padst.sparse_layers(model)["0"]
    print(readme_picture(layer, *seen[0], path))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "readme.png"))
