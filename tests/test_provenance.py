"""What an operand of a recorded run is made of."""

import torch
from torch import Tensor, nn

from padst_compiler.provenance import without_reshapes
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
