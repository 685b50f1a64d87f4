import copy
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from padst_compiler import checkpoint
from padst_compiler.checkpoint import FORMAT, VERSION, load, save
from padst_compiler.config import SparseConfig
from padst_compiler.index_map import IndexMap
from padst_compiler.layers import (
    SparseConv1D,
    SparseLayer,
    SparseLinear,
    SparsePointwiseConv,
    sparse_layers,
)
from padst_compiler.permutation import FixedPermutation, Permutation
from padst_compiler.recorder import Recorder
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured

WIDTH = 16
STRUCTURES: list[Structure] = [
    Block(4),
    Block(4, 2),
    Block(4, balanced=False),
    NM(m=4, n=2),
    NM(8),
    Diagonal(),
    Diagonal(band=2),
    Diagonal(modulus=4),
    FanIn(),
    Unstructured(),
]
Structures = pytest.mark.parametrize("structure", STRUCTURES, ids=str)
Change = Callable[[dict[str, Any]], object]  # of a header
States = pytest.mark.parametrize("state", ["none", "fixed", "soft"])


def permutation_of(state: str, size: int) -> Permutation | None:
    if state == "fixed":
        return FixedPermutation(IndexMap.of(torch.randperm(size)))
    seed = torch.Generator().manual_seed(int(torch.randint(99, ())))
    soft = SinkhornPermutation(size, seed, temperature=0.3, iterations=7)
    return soft if state == "soft" else None


def adopt(
    module: nn.Module,
    structure: Structure | None = None,
    state: str = "none",
    side: str = "input",
    sparsity: float = 0.5,
) -> SparseLayer:
    structure = structure or Block(4)
    conv = isinstance(module, (nn.Conv1d, nn.Conv2d))
    linear = SparseLinear if isinstance(module, nn.Linear) else SparseConv1D
    kind: type[SparseLayer] = SparsePointwiseConv if conv else linear
    shape = Shape(*kind.matrix_of(module).shape)
    table = torch.rand(shape.out_features, shape.in_features)
    indices = structure.select(table, structure.kept(shape, sparsity))
    size = shape.in_features if side == "input" else shape.out_features
    return kind.adopt(module, structure, indices, permutation_of(state, size), side)


class Net(nn.Module):
    """Two linear layers, a norm with buffers, and a head tied to an embedding."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, width)
        self.fc1, self.norm = nn.Linear(width, 24), nn.BatchNorm1d(24)
        self.fc2 = nn.Linear(24, width, bias=False)
        self.head = nn.Linear(width, 10)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.head(self.fc2(self.norm(self.fc1(self.embed(ids))).relu()))
        return y


def sparse_net(structure: Structure | None = None, state: str = "none") -> Net:
    net = Net()
    adopt(net.fc1, structure, state)
    adopt(net.fc2, structure, state, side="output")
    net(torch.randint(10, (32,)))  # so that the norm has statistics
    return net


def same(found: nn.Module, wanted: nn.Module) -> None:
    """Assert the same structure, the same bits and the same outputs."""
    state = wanted.state_dict()
    assert list(found.state_dict()) == list(state)
    for name, tensor in found.state_dict().items():
        assert tensor.dtype is state[name].dtype and torch.equal(tensor, state[name]), name
    there = sparse_layers(wanted)
    assert list(sparse_layers(found)) == list(there)
    for name, layer in sparse_layers(found).items():
        assert layer.extra_repr() == there[name].extra_repr()
        assert repr(layer.permutation) == repr(there[name].permutation)
        assert (layer.side, layer.config) == (there[name].side, there[name].config)
    if isinstance(wanted, Net):
        ids = torch.arange(10)
        assert torch.equal(found.eval()(ids), wanted.eval()(ids))


def picture(model: nn.Module) -> dict[str, Any]:
    """Return all that a failed call must not change: objects, attributes and bits."""
    return {
        "classes": [type(m) for m in model.modules()],
        "attributes": [{k: id(v) for k, v in vars(m).items()} for m in model.modules()],
        "held": [
            [(k, id(v)) for k, v in table.items()]
            for m in model.modules()
            for table in (m._parameters, m._buffers, m._modules)
        ],
        "bits": {name: t.numpy().tobytes() for name, t in model.state_dict().items()},
        "grad": {name: p.requires_grad for name, p in model.named_parameters()},
        "soft": [m.extra_repr() for m in model.modules()],
        "random": torch.get_rng_state().tolist(),
    }


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    before = picture(model)
    yield
    assert picture(model) == before


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.safetensors"


def header_of(path: Path) -> dict[str, Any]:
    with safetensors.safe_open(path, framework="pt") as file:
        header: dict[str, Any] = json.loads(file.metadata()[FORMAT])
        return header


def rewrite(path: Path, change: Change, **tensors: Tensor | None) -> None:
    """Change the header, and replace or drop tensors, of a file."""
    header, held = header_of(path), safetensors.torch.load_file(path)
    change(header)
    for name, tensor in tensors.items():
        held.pop(name) if tensor is None else held.update({name: tensor})
    safetensors.torch.save_file(held, path, {FORMAT: json.dumps(header)})


# -- there and back --------------------------------------------------------------------------------


@pytest.mark.parametrize("into", ["dense", "sparse", "other"])
@States
@Structures
def test_a_model_comes_back_bit_for_bit(
    structure: Structure, state: str, into: str, path: Path
) -> None:
    model = sparse_net(structure, state)
    save(model, path)
    other = {"none": "soft", "fixed": "none", "soft": "fixed"}[state]
    targets = {"dense": Net, "sparse": lambda: sparse_net(structure, state)}
    target = targets.get(into, lambda: sparse_net(structure, other))()
    assert load(target, path) is target
    same(target, model)
    target.train()(torch.randint(10, (32,))).sum().backward()
    assert all(p.grad is not None for p in target.parameters())


def test_the_header_says_what_each_layer_is(path: Path) -> None:
    net = sparse_net(NM(m=4, n=2), "soft").bfloat16()
    net.fc1.config = SparseConfig("nm:2:4", 0.5)  # type: ignore[assignment]
    save(net, path)
    header = header_of(path)
    assert (header["format"], header["version"]) == ("padst_compiler", VERSION)
    assert header["aliases"] == {"head.weight": "embed.weight"}
    first, second = header["layers"]
    assert first == {
        "names": ["fc1"],
        "kind": "linear",
        "dims": 0,
        "structure": "nm:2:4",
        "shape": [24, WIDTH],
        "side": "input",
        "permutation": {"kind": "soft", "form": "sinkhorn", "settings": {"iterations": 7}},
        "dtype": "bfloat16",
        "config": SparseConfig("nm:2:4", 0.5).to_dict(),
    }
    assert (second["side"], second["config"]) == ("output", None)
    assert sorted(safetensors.torch.load_file(path)) == sorted(
        set(net.state_dict()) - {"head.weight"}
    )
    target = load(Net().bfloat16(), path)
    same(target, net)


@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "hugging face", "root"])
def test_every_kind_of_layer(kind: str, path: Path) -> None:
    def make() -> nn.Module:
        from transformers.pytorch_utils import Conv1D

        conv: Callable[[int, int], nn.Module] = Conv1D
        kinds: dict[str, Callable[[], nn.Module]] = {
            "conv1d": lambda: nn.Sequential(nn.Conv1d(WIDTH, 24, 1)),
            "conv2d": lambda: nn.Sequential(nn.Conv2d(WIDTH, 24, 1, stride=2)),
            "hugging face": lambda: nn.Sequential(conv(24, WIDTH)),
            "root": lambda: nn.Linear(WIDTH, 24),
        }
        return kinds[kind]()

    model, target = make(), make()
    layer = adopt(model if kind == "root" else model.get_submodule("0"), state="soft")
    save(model, path)
    same(load(target, path), model)
    found = target if kind == "root" else target.get_submodule("0")
    assert isinstance(found, type(layer)) and found.dense_type is layer.dense_type


def test_layers_that_learn_one_permutation_still_do(path: Path) -> None:
    model, target = sparse_net(state="soft"), Net()
    assert isinstance(model.fc1, SparseLayer) and isinstance(model.fc2, SparseLayer)
    model.fc2.permutation = model.fc1.permutation  # both of the residual width
    save(model, path)
    assert header_of(path)["aliases"]["fc2.permutation.logits"] == "fc1.permutation.logits"
    load(target, path)
    same(target, model)
    assert target.fc1.permutation is target.fc2.permutation


def test_a_module_under_two_names_and_a_tied_weight_are_written_once(path: Path) -> None:
    def make() -> nn.ModuleDict:
        shared = nn.Linear(WIDTH, WIDTH)
        return nn.ModuleDict({"a": shared, "b": nn.Sequential(shared), "c": Net()})

    model, target = make(), make()
    adopt(model["a"], state="fixed")
    save(model, path)
    written = safetensors.torch.load_file(path)
    names = sorted(name for name in written if name.startswith(("a.", "b.")))
    assert names == ["a.bias", "a.indices", "a.permutation.perm", "a.values"]
    assert header_of(path)["layers"][0]["names"] == ["a", "b.0"]
    load(target, path)
    same(target, model)
    assert target["a"] is target.get_submodule("b.0")
    net = target["c"]
    assert isinstance(net, Net) and net.head.weight is net.embed.weight


def test_parts_of_one_tensor_and_strided_tensors(path: Path) -> None:
    def make() -> nn.Module:
        model, whole = nn.Module(), torch.randn(6, 4)
        model.register_buffer("first", whole[:3])
        model.register_buffer("second", whole[3:])
        model.register_buffer("turned", whole.t())
        model.register_buffer("flat", whole.view(-1))
        model.register_buffer("none", torch.empty(0, 3))
        model.register_buffer("number", torch.tensor(3))
        return model

    model, target = make(), make()
    save(model, path)
    for buffer in target.buffers():
        buffer.zero_()
    same(load(target, path), model)
    assert not target.get_buffer("turned").is_contiguous()


def test_the_same_objects_stay_where_their_shapes_stay(path: Path) -> None:
    model, target = sparse_net(state="fixed"), sparse_net(state="fixed")
    save(model, path)
    tensors = {n: id(t) for n, t in target.state_dict(keep_vars=True).items()}
    permutation = target.fc1.permutation
    load(target, path)
    assert {n: id(t) for n, t in target.state_dict(keep_vars=True).items()} == tensors
    assert target.fc1.permutation is permutation


def test_soft_stays_the_same_parameter_and_takes_the_files_temperature(path: Path) -> None:
    model, target = sparse_net(state="soft"), sparse_net(state="soft")
    for net in (target.fc1, target.fc2):
        assert isinstance(net, SparseLayer) and net.soft_permutation is not None
        net.soft_permutation.get_buffer("temperature").fill_(2.0)
    logits = target.get_parameter("fc1.permutation.logits")
    save(model, path)
    load(target, path)
    same(target, model)
    assert target.get_parameter("fc1.permutation.logits") is logits
    assert "temperature=0.3" in repr(target.fc1)


@pytest.mark.parametrize("into", ["dense", "sparse"])
def test_what_is_frozen_in_the_model_stays_frozen(into: str, path: Path) -> None:
    save(sparse_net(NM(8), "soft"), path)
    target = Net() if into == "dense" else sparse_net(NM(8), "fixed")
    for parameter in target.fc1.parameters():
        parameter.requires_grad_(False)
    load(target, path)
    assert [n for n, p in target.named_parameters() if not p.requires_grad] == [
        *("fc1.values", "fc1.bias", "fc1.permutation.logits")
    ]


def test_a_compiled_model_has_the_names_of_the_model_inside(path: Path) -> None:
    model = sparse_net()
    compiled = torch.compile(model, backend="eager")
    assert isinstance(compiled, nn.Module)
    save(compiled, path)
    same(load(Net(), path), model)
    target = torch.compile(Net(), backend="eager")
    assert isinstance(target, nn.Module)
    assert load(target, path) is target


# -- a save that fails -----------------------------------------------------------------------------


class Text(nn.Module):
    def get_extra_state(self) -> str:
        return "no tensor"


@pytest.mark.parametrize("name", ["sparse", "meta", "text"])
def test_what_is_no_plain_tensor_is_named(name: str, path: Path) -> None:
    odd = nn.Module()
    if name == "text":
        odd.add_module("text", Text())
    else:
        sparse = torch.eye(3).to_sparse()
        odd.register_buffer(name, sparse if name == "sparse" else torch.ones(2, device="meta"))
    path.write_text("old")
    with pytest.raises(ValueError, match=rf"Expected a plain tensor.*'{name}.*Got .*Convert it"):
        save(odd, path)
    assert path.read_text() == "old" and list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("when", ["while writing", "while renaming"])
def test_a_failed_save_leaves_the_old_file_and_no_other(
    when: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(tensors: Any, file: Path, metadata: Any) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    def refuse(*_: Any) -> None:
        raise KeyboardInterrupt

    model = sparse_net()
    save(model, path)
    old = path.read_bytes()
    if when == "while writing":
        monkeypatch.setattr(safetensors.torch, "save_file", half)
    else:
        monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises((OSError, KeyboardInterrupt)):
        save(sparse_net(), path)
    assert path.read_bytes() == old and list(path.parent.iterdir()) == [path]
    same(load(Net(), path), model)


def test_a_file_has_usual_rights_and_may_stand_behind_a_link(tmp_path: Path, path: Path) -> None:
    save(Net(), path)
    (tmp_path / "plain").write_text("")
    assert path.stat().st_mode == (tmp_path / "plain").stat().st_mode
    link = tmp_path / "last.safetensors"
    link.symlink_to(path.name)
    model = sparse_net()
    save(model, link)
    assert link.is_symlink()
    same(load(Net(), path), model)


# -- a file that cannot be loaded ------------------------------------------------------------------


def damage(path: Path, how: str) -> None:
    whole = path.read_bytes()
    if how == "foreign":
        safetensors.torch.save_file({"x": torch.ones(2)}, path, {"format": "pt"})
    elif how == "without metadata":
        safetensors.torch.save_file({"x": torch.ones(2)}, path)
    elif how == "a pickle":
        torch.save({"x": torch.ones(2)}, path)
    elif how == "header no JSON":
        safetensors.torch.save_file({"x": torch.ones(2)}, path, {FORMAT: "{"})
    elif how.startswith("cut to"):
        path.write_bytes(whole[: int(len(whole) * float(how.split()[2]))])
    elif how == "random bytes":
        path.write_bytes(torch.randint(256, (5000,), dtype=torch.uint8).numpy().tobytes())
    elif how == "longer":
        path.write_bytes(whole + b"more")


@pytest.mark.parametrize("into", ["dense", "sparse"])
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("foreign", "a safetensors file of something else. Load dense weights with"),
        ("without metadata", "a safetensors file of something else."),
        ("header no JSON", "The file is damaged: take another copy."),
        ("a pickle", "The file is damaged: take another copy."),
        ("cut to 0.0", "The file is damaged: take another copy."),
        ("cut to 0.01", "The file is damaged: take another copy."),
        ("cut to 0.9", "The file is damaged: take another copy."),
        ("cut to 0.9999", "The file is damaged: take another copy."),
        ("longer", "The file is damaged: take another copy."),
        ("random bytes", "The file is damaged: take another copy."),
    ],
)
def test_a_foreign_or_broken_file(how: str, said: str, into: str, path: Path) -> None:
    save(sparse_net(), path)
    damage(path, how)
    target = Net() if into == "dense" else sparse_net(state="soft")
    with untouched(target), pytest.raises(ValueError, match="Expected a file written by") as error:
        load(target, path)
    assert said in str(error.value) and str(path) in str(error.value)


def test_a_missing_file_or_folder(tmp_path: Path) -> None:
    target = Net()
    with pytest.raises(FileNotFoundError, match=r"Expected a folder\. Got no .*gone.*Create it"):
        save(target, tmp_path / "gone" / "model.safetensors")
    for path in (tmp_path / "gone", tmp_path):
        with untouched(target), pytest.raises(FileNotFoundError, match=r"Expected a file\. Got"):
            load(target, path)


def layer(index: int, **fields: Any) -> Change:
    return lambda header: header["layers"][index].update(fields)


def soft(**fields: Any) -> Change:
    return lambda header: header["layers"][1]["permutation"].update(fields)


def tensor(key: str, size: tuple[int, ...], dtype: torch.dtype, fill: int = 0) -> dict[str, Tensor]:
    return {key: torch.full(size, fill, dtype=dtype)}


def indices(*row: int) -> dict[str, Tensor]:
    return {"fc1.indices": torch.tensor([row] * 6, dtype=torch.int32)}


FLOAT, INT, LONG = torch.float32, torch.int32, torch.int64
PERM, LOGITS = "fc1.permutation.perm", "fc2.permutation.logits"
# How a whole file may lie, and what is said.
HEADERS: dict[str, tuple[Change, str]] = {
    "newer": (lambda h: h.update(version=VERSION + 1), "or upgrade"),
    "no version": (lambda h: h.pop("version"), "Got None in"),
    "no layers": (lambda h: h.pop("layers"), "Got KeyError('layers')"),
    "layers a number": (lambda h: h.update(layers=3), "damaged"),
    "a field less": (lambda h: h["layers"][1].pop("side"), "of layer 'fc2'. Got KeyError('side')"),
    "no names": (layer(0, names=[]), "Got IndexError"),
    "other names": (layer(0, names=["fc1", "x"]), "Got one under ['fc1']"),
    "no such name": (layer(0, names=["fc9"]), "under ['fc9']. Got none"),
    "a strange size": (layer(0, dims=float("inf")), "damaged"),
    "axes": (layer(0, dims=2), "Build the same architecture"),
    "structure": (layer(0, structure="blok:4"), "Did you mean"),
    "structure that does not tile": (layer(0, structure="block:5"), "Expected int32 indices of"),
    "kind": (layer(0, kind="conv1d"), "Expected a conv1d of 24x16"),
    "unknown kind": (layer(0, kind="lstm"), "lstm"),
    "side": (layer(0, side="left"), "Got 'left'"),
    "config": (layer(0, config={"sparsity": 2}), "0 <= sparsity < 1"),
    "shape": (layer(0, shape=[24, 8]), "Expected a linear of 24x8"),
    "alias": (lambda h: h["aliases"].update(x="y"), "Got KeyError('y')"),
    "state": (soft(kind="hot"), "none, fixed or soft"),
    "form": (soft(form="sinkhron"), "Did you mean 'sinkhorn'"),
    "iterations": (soft(settings={"iterations": -1}), "Expected settings above 0"),
    "settings": (soft(settings={"rank": 3}), "of layer 'fc2'"),
}
NUMBERS: dict[str, tuple[dict[str, Tensor] | dict[str, None], str]] = {
    "index too large": (indices(0, 4), "Expected unique indices below 4"),
    "index below zero": (indices(0, -1), "Expected unique indices below 4"),
    "index twice": (indices(2, 2), "Expected unique indices below 4"),
    "index dtype": (tensor("fc1.indices", (6, 2), LONG), "24x16. Got torch.int64"),
    "index shape": (tensor("fc1.indices", (5, 2), INT), "Expected int32 indices of Block(size=4)"),
    "no index": (tensor("fc1.indices", (6, 0), INT), "Expected int32 indices of Block(size=4)"),
    "no indices": ({"fc1.indices": None}, "Got KeyError('fc1.indices')"),
    "values": (tensor("fc1.values", (6, 1, 4, 4), FLOAT), "Expected values (6, 2, 4, 4)"),
    "values dtype": (tensor("fc1.values", (6, 2, 4, 4), torch.half), "Got torch.float16"),
    "perm twice": (tensor(PERM, (16,), LONG), "Expected a permutation of 0..n-1"),
    "perm size": ({PERM: torch.arange(8)}, "Expected a permutation of 16. Got 8"),
    "perm dtype": ({PERM: torch.arange(16).int()}, "as torch.int64 (16,). Got torch.int32"),
    "logits": (tensor(LOGITS, (16, 8), FLOAT), "Expected logits (16, 16). Got (16, 8)"),
    "logits dtype": (tensor(LOGITS, (16, 16), INT), "fc2"),
    "temperature": (tensor("fc2.permutation.temperature", (), FLOAT), "a temperature above 0"),
    "missing": ({"norm.weight": None}, "Got none for ['norm.weight']"),
    "unknown": (tensor("more", (2,), FLOAT), "unknown ['more']"),
    "other shape": (tensor("norm.weight", (23,), FLOAT), "Got torch.float32 (23,)"),
}


@pytest.mark.parametrize("into", ["dense", "alike", "other"])
@pytest.mark.parametrize("lie", [*HEADERS, *NUMBERS])
def test_a_file_that_does_not_fit_changes_nothing(lie: str, into: str, path: Path) -> None:
    model = Net()
    adopt(model.fc1, Block(4), "fixed")
    adopt(model.fc2, Block(4), "soft", side="output")
    save(model, path)
    nothing: dict[str, None] = {}
    change, said = HEADERS.get(lie, (layer(0), ""))
    tensors, said = NUMBERS.get(lie, (nothing, said))
    rewrite(path, change, **tensors)
    target = copy.deepcopy(model) if into == "alike" else Net()
    if into == "other":
        adopt(target.fc1, Block(4), "soft", sparsity=0.75)
        adopt(target.fc2, Block(4), "fixed", side="output")
    with untouched(target), pytest.raises(ValueError, match="Expected ") as error:
        load(target, path)
    if lie.startswith("structure") and into != "dense":
        said = "Load into the model before it is sparsified"
    assert said in str(error.value) and str(path) in str(error.value)


def test_different_numbers_for_tied_weights(path: Path) -> None:
    save(Net(), path)
    rewrite(path, lambda h: h["aliases"].clear(), **{"head.weight": torch.zeros(10, 16)})
    target = Net()
    with untouched(target), pytest.raises(ValueError, match=r"the same numbers for 'embed\.weight"):
        load(target, path)
    target.head.weight = nn.Parameter(torch.ones(10, 16))
    load(target, path)
    assert not bool(target.head.weight.any())


def wider() -> nn.Module:
    return Net(20)


def half() -> nn.Module:
    return Net().bfloat16()


def without_layer() -> nn.Module:
    net = Net()
    del net.fc2
    return net


def recorded() -> nn.Module:
    net = Net()
    adopt(net.fc1, Block(4), sparsity=0.75)
    assert isinstance(net.fc1, SparseLayer)
    net.fc1.recorder = Recorder(net.fc1)
    return net


def on_meta() -> nn.Module:
    return Net().to("meta")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (wider, "Expected a linear of 24x16. Got Linear of 24x20. Build the same"),
        (half, "model.to(dtype)"),
        (without_layer, "Expected one linear module under ['fc2']. Got none."),
        (recorded, "Call training.detach() first"),
        (on_meta, "on the meta device"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_another_model_is_left_as_it_is(
    make: Callable[[], nn.Module], said: str, path: Path
) -> None:
    save(sparse_net(), path)
    target = make()
    before = {n: id(t) for n, t in target.state_dict(keep_vars=True).items()}
    with pytest.raises(ValueError, match="Expected ") as error:
        load(target, path)
    assert said in str(error.value)
    assert {n: id(t) for n, t in target.state_dict(keep_vars=True).items()} == before


def test_a_layer_that_is_dense_in_the_file_is_named(path: Path) -> None:
    save(Net(), path)
    target = sparse_net()
    with untouched(target), pytest.raises(ValueError, match=r"Got dense \['fc1', 'fc2'\]") as error:
        load(target, path)
    assert "to_dense(model)" in str(error.value)


def test_an_error_after_the_conversion_brings_the_objects_back(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(sparse_net(NM(8), "soft"), path)
    monkeypatch.setattr(checkpoint, "_check", lambda *_: 1 / 0)
    for target in (Net(), sparse_net(NM(8), "fixed")):
        with untouched(target), pytest.raises(ValueError, match="ZeroDivisionError"):
            load(target, path)
