from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

from padst_compiler.layers import SparseLinear
from padst_compiler.sites import Site, discover, site_of_parameter
from padst_compiler.structures import Block, Shape
from padst_compiler.tracer import trace


class Own(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Renamed(nn.Linear):
    """A subclass that computes as its parent does."""


class Conv1D(nn.Module):
    """Hugging Face's layer, written down here."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf)), nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def only(module: nn.Module) -> Site:
    (site,) = discover(nn.Sequential(module))
    return site


KINDS: list[tuple[Callable[[], nn.Module], str, Shape]] = [
    (lambda: nn.Linear(8, 4), "linear", Shape(4, 8)),
    (lambda: Renamed(8, 4), "linear", Shape(4, 8)),
    (lambda: Conv1D(4, 8), "conv1d", Shape(4, 8)),
    (lambda: nn.Conv1d(8, 4, 1), "conv1x1", Shape(4, 8)),
    (lambda: nn.Conv2d(8, 4, 1, stride=2, dilation=3), "conv1x1", Shape(4, 8)),
    (lambda: nn.Conv2d(8, 4, 1, padding="same"), "conv1x1", Shape(4, 8)),
    (lambda: nn.Conv3d(8, 4, 1), "conv1x1", Shape(4, 8)),
    (lambda: nn.Conv2d(8, 4, 3, stride=2, padding=1), "conv2d", Shape(4, 72)),
    (lambda: nn.Conv2d(8, 4, (1, 5), padding_mode="reflect"), "conv2d", Shape(4, 40)),
]


@pytest.mark.parametrize(("build", "kind", "shape"), KINDS)
def test_each_kind_is_recognised(build: Callable[[], nn.Module], kind: str, shape: Shape) -> None:
    site = only(build())
    assert (site.kind, site.shape, site.obstacle, site.weights) == (kind, shape, "", shape.numel)
    assert site.name == "0" and site.parameter == "0.weight" and site.names == ("0",)


def patched(module: nn.Module) -> nn.Module:
    module.forward = lambda x: x
    return module


def halved(module: nn.Linear) -> nn.Linear:
    parametrize.register_parametrization(module, "weight", nn.Identity())
    return module


def integer(module: nn.Linear) -> nn.Linear:
    module.weight = nn.Parameter(torch.ones(4, 8, dtype=torch.int8), requires_grad=False)
    return module


def subclassed(module: nn.Linear) -> nn.Linear:
    class Fancy(nn.Parameter):
        pass

    module.weight = Fancy(torch.ones(4, 8))
    return module


OBSTACLES: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "parametrised": (lambda: halved(nn.Linear(8, 4)), "remove_parametrizations"),
    "held in a list": (lambda: Listed(), "Listed.all holds it too"),
    "recurrent": (lambda: Recurrent(), "GRU keeps its weights in a list of its own"),
    "integer": (lambda: integer(nn.Linear(8, 4)), "torch.int8"),
    "subclass": (lambda: subclassed(nn.Linear(8, 4)), "a Fancy of"),
    "meta": (lambda: nn.Linear(8, 4, device="meta"), "meta device"),
    "empty": (lambda: nn.Linear(0, 4), "no weights"),
}


class Listed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = Own(8, 4)
        self.all = [self.fc.weight]


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.GRU(8, 8)

    def forward(self, x: Tensor) -> Any:
        return self.rnn(x)[0]


@pytest.mark.parametrize("name", OBSTACLES)
def test_what_cannot_be_converted_says_why(name: str) -> None:
    build, said = OBSTACLES[name]
    model = nn.Sequential(build())
    run = name == "recurrent"  # nothing but a run finds its weights
    sites = discover(model, trace(model, torch.ones(2, 3, 8)) if run else None)
    assert sites and all(said in site.obstacle for site in sites)


STAYS: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "own forward": (lambda: Own(8, 4), "functional", "0.weight_sparse"),
    "patched": (lambda: patched(nn.Linear(8, 4)), "functional", "0.weight_sparse"),
    "patched conv1d": (lambda: patched(Conv1D(4, 8)), "functional", "0.weight_sparse"),
    "weight_norm": (
        lambda: parametrizations.weight_norm(nn.Linear(8, 4)),
        "functional",
        "0.parametrizations.weight.original1_sparse",
    ),
    "old weight_norm": (lambda: weight_norm(nn.Linear(8, 4)), "functional", "0.weight_v_sparse"),
    "pruned": (
        lambda: prune.identity(nn.Linear(8, 4), "weight"),
        "functional",
        "0.weight_orig_sparse",
    ),
    "groups": (lambda: nn.Conv2d(8, 4, 1, groups=2), "conv", "0.weight_sparse"),
    "one dimension": (lambda: nn.Conv1d(8, 4, 3), "conv", "0.weight_sparse"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", STAYS)
def test_code_of_its_own_stays_and_its_parameter_is_the_site(name: str) -> None:
    build, kind, layer = STAYS[name]
    site = only(build())
    assert (site.name, site.kind, site.obstacle, site.layers) == ("0", kind, "", (layer,))
    assert site.module is not None and f"{site.parameter}_sparse" == layer


@pytest.mark.parametrize(
    "module",
    [nn.Embedding(8, 4), nn.LayerNorm(8), nn.GRU(8, 4)],
)
def test_other_modules_are_no_sites(module: nn.Module) -> None:
    assert discover(nn.Sequential(module)) == []


def test_a_conv1d_in_name_only_is_no_site() -> None:
    module = Conv1D(4, 8)
    module.nf = 5
    assert discover(nn.Sequential(module)) == []


def test_the_model_itself_may_be_the_site() -> None:
    (site,) = discover(nn.Linear(8, 4))
    assert (site.name, site.label, site.parameter) == ("", "(root)", "weight")


def test_a_module_with_two_names_is_one_site() -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.Sequential(shared)})
    (site,) = discover(model)
    assert site.names == ("a", "b.0") and site.obstacle == "" and site.shared_with == ()
    assert site.note == "also named b.0"


def test_a_tied_embedding_is_named() -> None:
    model = nn.ModuleDict({"emb": nn.Embedding(16, 8), "out": nn.Linear(8, 16)})
    model["out"].weight = model["emb"].weight
    (site,) = discover(model)
    assert site.shared_with == ("emb.weight",)
    assert site.obstacle == "its weight is also emb.weight"


@pytest.mark.parametrize("whole", [True, False])
def test_two_layers_with_one_weight_name_each_other(whole: bool) -> None:
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)
    b.weight = a.weight if whole else nn.Parameter(a.weight.data)  # one storage, two Parameters
    first, second = discover(nn.Sequential(a, b))
    assert first.shared_with == ("1.weight",) and second.shared_with == ("0.weight",)


def test_neighbours_in_one_buffer_are_not_tied() -> None:
    flat = torch.randn(2, 8, 8)
    layers = [nn.Linear(8, 8), nn.Linear(8, 8)]
    for layer, part in zip(layers, flat, strict=True):
        layer.weight = nn.Parameter(part)
    assert [site.shared_with for site in discover(nn.Sequential(*layers))] == [(), ()]


def test_attention_has_its_packed_projection_and_its_output() -> None:
    packed, output = discover(attention := nn.MultiheadAttention(8, 2))
    assert (packed.name, packed.kind, packed.shape) == ("in_proj_weight", "mha", Shape(24, 8))
    assert (packed.obstacle, packed.module, packed.columns) == ("", attention, (1,))
    assert (output.name, output.kind, output.obstacle) == ("out_proj", "functional", "")
    assert "without calling" in output.note
    assert [*packed.layers, *output.layers] == ["in_proj_weight_sparse", "out_proj.weight_sparse"]
    split = discover(nn.MultiheadAttention(8, 2, kdim=4, vdim=4))
    assert [site.name for site in split] == [
        "q_proj_weight",
        "k_proj_weight",
        "v_proj_weight",
        "out_proj",
    ]


def test_a_layer_of_the_same_name_elsewhere_is_free() -> None:
    assert discover(nn.ModuleDict({"out_proj": nn.Linear(8, 8)}))[0].obstacle == ""


def test_sparse_layers_are_reported() -> None:
    layer = nn.Linear(8, 8)
    SparseLinear.adopt(layer, Block(4), torch.zeros(2, 1, dtype=torch.int32), None, "input")
    site = only(layer)
    assert (site.kind, site.shape, site.obstacle) == ("sparse", Shape(8, 8), "sparse already")
    (traced,) = discover(layer, trace(layer, torch.ones(3, 8)))
    assert traced.tokens == 3 and traced.flops == 2 * 3 * layer.values.numel()  # type: ignore[operator]


@pytest.mark.parametrize("build", [lambda: nn.LazyLinear(4), lambda: nn.LazyBatchNorm1d()])
def test_lazy_modules_are_refused(build: Callable[[], nn.Module]) -> None:
    with pytest.raises(ValueError, match=r"Expected initialised .* Got '0\..*' of a lazy module"):
        discover(nn.Sequential(build()))


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(8, 8)
        self.raw = nn.Parameter(torch.randn(8, 8))
        self.experts = nn.Parameter(torch.randn(3, 8, 8))
        self.emb = nn.Embedding(16, 8)
        self.idle = nn.Linear(8, 8)

    def forward(self, ids: Tensor) -> Any:
        x = self.fc(self.fc(self.emb(ids))) @ self.raw
        return torch.einsum("bti,eio->beto", x, self.experts).sum(1) @ self.emb.weight.t()


def test_the_trace_adds_counts_and_raw_parameters() -> None:
    model = Mixed()
    sites = {s.name: s for s in discover(model, trace(model, torch.zeros(2, 5).long()))}
    assert list(sites) == ["raw", "experts", "fc", "emb.weight", "idle"]  # as parameters stand
    assert (sites["fc"].uses, sites["fc"].tokens, sites["fc"].flops) == (2, 20, 2 * 20 * 64)
    assert (sites["idle"].uses, sites["idle"].tokens) == (0, 0)
    assert {sites[name].kind for name in ("raw", "experts", "emb.weight")} == {"functional"}
    assert (sites["experts"].shape, sites["experts"].columns) == (Shape(24, 8), (1,))
    assert (sites["raw"].obstacle, sites["raw"].columns) == ("", (0,))
    assert sites["emb.weight"].obstacle == "its rows are looked up too: an embedding"


class Learned(nn.Module):
    """Parameters in products that are no weights, or weights by way of something."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(3, 8))
        self.a, self.b = nn.Parameter(torch.randn(8, 2)), nn.Parameter(torch.randn(2, 8))
        self.centred = nn.Parameter(torch.randn(8, 8))
        self.masked = nn.Parameter(torch.randn(8, 8))
        self.mask: Tensor
        self.register_buffer("mask", torch.eye(8))
        self.twin = nn.Parameter(torch.randn(8, 8))
        self.fc = nn.Linear(8, 8)
        self.other = nn.Module()
        self.other.twin = self.twin

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([x, self.fc(self.tokens)])
        x = x @ (self.a @ self.b) @ (self.centred - self.centred.mean(0))
        return torch.nn.functional.linear(x, self.masked * self.mask) @ self.twin


def test_what_is_no_weight_of_its_own_is_refused_with_its_reason() -> None:
    model = Learned()
    sites = {s.name: s for s in discover(model, trace(model, torch.randn(5, 8)))}
    said = {name: site.obstacle for name, site in sites.items()}
    others = "it meets other parameters only: learned tokens, or a factor of a weight"
    assert said["tokens"] == said["a"] == said["b"] == others
    assert said["centred"] == "Learned computes another matrix from it before mm"
    assert said["twin"] == "its weight is also other.twin"
    assert (said["masked"], sites["masked"].columns) == ("", (1,))
    assert said["fc"] == "" and sites["fc"].tokens == 3


def test_a_parameter_is_found_again_by_the_name_of_its_sparse_layer() -> None:
    model = Mixed()
    site = site_of_parameter(model, ["experts_sparse"], [1])
    assert site is not None and (site.name, site.shape) == ("experts", Shape(24, 8))
    assert site_of_parameter(model, ["nobody_sparse"], [1]) is None
    assert site_of_parameter(model, ["no.body_sparse"], [1]) is None


def test_a_tied_head_is_one_site_with_the_trace() -> None:
    model = nn.Sequential(nn.Embedding(16, 8), nn.Linear(8, 16, bias=False))
    model[1].weight = model[0].weight
    (site,) = discover(model, trace(model, torch.zeros(5).long()))
    assert site.name == "1" and site.tokens == 5
