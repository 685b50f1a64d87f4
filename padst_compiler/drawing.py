"""Draw a graph, inputs at the top; what moves features stands out. Needs the ``[plot]`` extra."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import networkx
import torch
from torch import fx

__all__ = ["LIMIT", "draw"]

LIMIT = 400  # nodes: more cannot be read
INK, RUST, SEA, SAND = "#22303c", "#c2542d", "#2b7a78", "#d9b44a"


def draw(graph: fx.Graph, path: Path) -> Path | None:
    """Draw ``graph`` into ``path``; return None where it has more than ``LIMIT`` nodes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            "Expected matplotlib to draw a graph. Got none. "
            "Install the [plot] extra: pip install 'padst-compiler[plot]'."
        ) from error
    if len(graph.nodes) > LIMIT:
        return None
    flow = layered(graph)
    places = networkx.multipartite_layout(flow, subset_key="layer", align="horizontal")
    depth = 1 + max((at for _, at in flow.nodes(data="layer")), default=0)
    width = max((len(layer) for layer in networkx.topological_generations(flow)), default=1)
    figure = Figure(figsize=(max(4.0, 1.6 * width), max(3.0, 0.6 * depth)))
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.set_axis_off()
    axis.invert_yaxis()
    for one, two in flow.edges:
        arrow = {"arrowstyle": "-|>", "color": "#9aa5ad", "linewidth": 0.7}
        axis.annotate("", xy=places[two], xytext=places[one], arrowprops=arrow)
    for node in flow.nodes:
        box = {"boxstyle": "round", "facecolor": "white", "edgecolor": _colour(node)}
        x, y = places[node]
        axis.text(x, y, node.name, size=7, color=_colour(node), ha="center", va="center", bbox=box)
    figure.savefig(path, dpi=110, bbox_inches="tight")
    return path


def layered(graph: fx.Graph) -> Any:
    """Return the nodes as a networkx graph; ``layer`` is how deep each lies below the inputs."""
    flow: Any = networkx.DiGraph()
    for node in graph.nodes:
        inputs = node.all_input_nodes
        depth = 1 + max((flow.nodes[source]["layer"] for source in inputs), default=-1)
        flow.add_node(node, layer=depth)
        flow.add_edges_from((source, node) for source in inputs)
    return flow


def _colour(node: fx.Node) -> str:
    if node.op != "call_function":
        return SEA
    name = str(node.target)
    if "padst.permute" in name or "index_select" in name:
        return RUST
    linear = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)
    return SAND if "_linear" in name or node.target in linear else INK
