from pathlib import Path

import pytest
import torch
from torch import Tensor, fx

from padst_compiler.drawing import LIMIT, draw, layered


def test_a_node_lies_below_everything_that_it_reads() -> None:
    graph = fx.symbolic_trace(lambda x, y: (x.relu() + y).exp() + y).graph
    flow = layered(graph)
    assert {node.name for node in flow} == {node.name for node in graph.nodes}
    for node in graph.nodes:
        for source in node.all_input_nodes:
            assert flow.has_edge(source, node)
            assert flow.nodes[source]["layer"] < flow.nodes[node]["layer"]


@pytest.mark.parametrize("name", ["graph.png", "graph.svg"])
def test_a_picture_is_written(tmp_path: Path, name: str) -> None:
    graph = fx.Graph()
    x, p = graph.placeholder("x"), graph.placeholder("p")
    graph.output(graph.call_function(torch.ops.aten.index_select.default, (x, -1, p)))
    assert draw(graph, tmp_path / name) == tmp_path / name
    assert (tmp_path / name).stat().st_size > 1000


def test_what_nobody_can_read_is_not_drawn(tmp_path: Path) -> None:
    def long(x: Tensor) -> Tensor:
        for _ in range(LIMIT):
            x = x.relu()
        return x

    assert draw(fx.symbolic_trace(long).graph, tmp_path / "graph.png") is None
    assert not list(tmp_path.iterdir())
