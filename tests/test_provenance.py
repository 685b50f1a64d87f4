"""What an operand of a recorded run is made of."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from padst_compiler.provenance import (
    scaled_weight,
    summed_axes,
    weights_behind,
    without_reshapes,
)
from padst_compiler.sites import discover
from padst_compiler.tracer import trace


class Reads(nn.Module):
    """Layers that read one tensor, in several shapes, and layers that read another."""

    def __init__(self) -> None:
        super().__init__()
        names = ("q", "k", "v", "joined", "turned", "later", "twice")
        self.layers = nn.ModuleDict({name: nn.Linear(8, 8) for name in names})

    def forward(self, x: Tensor) -> Tensor:
        layers = self.layers
        x = x * 2.0
        y = layers["q"](x) + layers["k"](x.view(-1, 8)).view(x.shape) + layers["v"](x.clone())
        y = y + layers["joined"](torch.cat([x[..., :4], x[..., :4]], dim=-1))
        y = y + layers["turned"](x.transpose(0, 1)).transpose(0, 1)
        y = y + layers["later"](y) + layers["twice"](x)
        y = y + layers["twice"](y)
        assert isinstance(y, Tensor)
        return y


def test_sites_that_read_one_tensor_have_the_same_word_for_it() -> None:
    model = Reads()
    sites = {site.name[7:]: site for site in discover(model, trace(model, torch.randn(2, 3, 8)))}
    reads = {name: site.reads for name, site in sites.items()}
    assert reads["q"] == reads["k"] == reads["v"] and len(reads["q"]) == 1
    others = [reads[name] for name in ("joined", "turned", "later", "twice")]
    assert len({reads["q"], *others}) == 5
    assert len(reads["twice"]) == 2 and reads["twice"][0] == reads["q"][0]


class One(nn.Module):
    """A function of the input and one parameter; what it returns is asked about."""

    def __init__(self, function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> None:
        super().__init__()
        self.w, self.v = nn.Parameter(torch.randn(shape)), nn.Parameter(torch.randn(shape))
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self.w)


def operand(function: Callable[[Tensor], Tensor], *shape: int) -> fx.Node:
    """Return the node of what ``function`` makes of a parameter."""
    graph = trace(One(function, shape), torch.randn(2)).graph
    node: fx.Node = next(n for n in graph.nodes if n.op == "output").all_input_nodes[0]
    return node


BEHIND: dict[str, tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = {
    "itself": (lambda w: w.detach(), (4, 6)),
    "views": (lambda w: w.view(2, 2, 6)[1].t().unsqueeze(0), (4, 6)),
    "copies": (lambda w: w.half().float().t().contiguous(), (4, 6)),
    "chunks": (lambda w: w.chunk(2)[1], (4, 6)),
    "joined": (lambda w: torch.cat([w, w]), (4, 6)),
    "stacked": (lambda w: torch.stack([w, w]), (4, 6)),
    "picked": (lambda w: w[[2, 0]], (3, 4, 6)),
    "selected": (lambda w: w.index_select(0, torch.tensor([1])), (3, 4, 6)),
}


@pytest.mark.parametrize("name", BEHIND)
def test_a_weight_is_seen_through_what_leaves_its_numbers(name: str) -> None:
    function, shape = BEHIND[name]
    found = weights_behind(operand(function, *shape))
    assert found and {use.names for use in found} == {("w",)}


@pytest.mark.parametrize(
    "function",
    [
        lambda w: w + 1.0,
        lambda w: w.softmax(0),
        lambda w: torch.cat([w, torch.ones(1, 6)]),
        lambda w: w[[2, 0]],  # rows of a matrix: an embedding
        lambda w: w @ w.t(),
    ],
)
def test_a_weight_is_not_seen_through_what_computes(function: Callable[[Tensor], Tensor]) -> None:
    assert weights_behind(operand(function, 4, 6)) == []


def test_a_vector_is_no_matrix() -> None:
    assert weights_behind(operand(lambda w: w.view(2, 3), 6)) == []


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (lambda w: w * 2.0, True),
        (lambda w: -(w / w.norm()).t(), True),
        (lambda w: w * torch.eye(4), True),
        (lambda w: torch._weight_norm(w, w.norm(dim=1, keepdim=True), 0), True),
        (lambda w: w + torch.eye(4), False),
        (lambda w: w.exp(), False),
        (lambda w: w.mean() * torch.ones(4, 4), False),
    ],
)
def test_scaling_keeps_zeros_and_other_computation_does_not(
    function: Callable[[Tensor], Tensor], found: bool
) -> None:
    scaled = scaled_weight(operand(function, 4, 4))
    assert (scaled is not None and scaled.names == ("w",)) == found


@pytest.mark.parametrize(
    ("function", "dims", "axes"),
    [
        (lambda w: w.detach(), (-1,), (1,)),
        (lambda w: w.t(), (-1,), (0,)),
        (lambda w: w.view(2, 2, 6), (0, 1), (0,)),
        (lambda w: w.view(2, 2, 6).permute(2, 0, 1).reshape(6, 4), (0,), (1,)),
        (lambda w: w.chunk(2)[1], (0,), (0,)),
        (lambda w: torch.cat([w, w]), (1,), (1,)),
        (lambda w: torch.cat([w, torch.ones(4, 6)]), (1,), None),
        (lambda w: w.view(8, 3), (1,), (1,)),
        (lambda w: w.view(2, 12), (1,), (0, 1)),
        (lambda w: w.unsqueeze(0).expand(3, 4, 6), (2,), (1,)),
        (lambda w: w / w.norm(), (1,), (1,)),
        (lambda w: w + 1.0, (1,), None),
        (lambda w: w[:, :1], (1,), None),
    ],
)
def test_summed_axes_are_where_neighbours_stood(
    function: Callable[[Tensor], Tensor], dims: tuple[int, ...], axes: tuple[int, ...] | None
) -> None:
    node = operand(function, 4, 6)
    use = next(n.meta["use"] for n in node.graph.nodes if n.target == "w")
    assert summed_axes(node, use, dims) == axes


def test_a_write_in_place_makes_another_tensor() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            x = x + 1.0
            y: Tensor = self.a(x)
            z: Tensor = self.b(x.mul_(2.0))
            return y + z

    model = Writes()
    first, second = discover(model, trace(model, torch.randn(3, 4)))
    assert first.reads != second.reads


def test_a_node_without_a_shape_is_itself() -> None:
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    view = graph.call_function(torch.ops.aten.view.default, (x, [4]))
    assert without_reshapes(view) is view and without_reshapes(x) is x
