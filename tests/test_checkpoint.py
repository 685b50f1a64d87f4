import copy
import json
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

import padst_compiler as padst
from padst_compiler.checkpoint import FORMAT, VERSION
from padst_compiler.config import SparseConfig
from padst_compiler.layers import SparseLayer, sparse_layers
from padst_compiler.permutation import FixedPermutation, SinkhornPermutation

SPECS = ["block:8", "nm:8", "diagonal", "fan_in", "unstructured"]
Specs = pytest.mark.parametrize("spec", SPECS)
States = pytest.mark.parametrize("state", ["none", "random", "learned"])
X = torch.randn(4, 32, generator=torch.Generator().manual_seed(9))


def dense() -> nn.Sequential:
    return nn.Sequential(nn.Linear(32, 48), nn.BatchNorm1d(48), nn.GELU(), nn.Linear(48, 32))


def sparse(
    spec: str = "block:8", state: str = "random", sparsity: float = 0.5, seed: int = 0
) -> nn.Sequential:
    """Return a model with a permuted input in its first layer and a permuted output in its last."""
    config = SparseConfig(
        spec, sparsity, state, side="input", seed=seed, force_permutation=state == "learned"
    )
    last = {"structure": spec, "side": "output"}
    other = SparseConfig.from_dict(config.to_dict() | last)
    model = dense()
    padst.sparsify(model, {"0": config, "3": other})
    assert list(sparse_layers(model)) == ["0", "3"]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.3)
    model(torch.randn(16, 32))  # running means that are not zero
    return model


def layer_of(model: nn.Module, name: str = "0") -> SparseLayer:
    found = model.get_submodule(name)
    assert isinstance(found, SparseLayer)
    return found


def same_outputs(first: nn.Module, second: nn.Module, x: Tensor = X) -> bool:
    """Whether both give the same bits, in training and in evaluation."""
    pairs = [(copy.deepcopy(m).train(mode)(x) for m in (first, second)) for mode in (True, False)]
    return all(torch.equal(a, b) for a, b in pairs)


def picture(model: nn.Module) -> dict[str, Any]:
    """Return all that a refused file must not change."""
    modules = dict(model.named_modules())
    tensors = model.state_dict()
    return {
        "classes": {name: type(m) for name, m in modules.items()},
        "modules": {name: id(m) for name, m in modules.items()},
        "attributes": {name: sorted(vars(m)) for name, m in modules.items()},
        "parameters": {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)},
        "grads": {name: p.requires_grad for name, p in model.named_parameters()},
        "buffers": {name: id(b) for name, b in model.named_buffers()},
        "numbers": {name: t.tolist() for name, t in tensors.items()},
        "layers": {
            name: (repr(m), m.structure, m.side, m.config)
            for name, m in sparse_layers(model).items()
        },
    }


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    before, seed = picture(model), torch.get_rng_state()
    yield
    assert picture(model) == before and torch.equal(seed, torch.get_rng_state())


# -- round trips -----------------------------------------------------------------------------------


@States
@Specs
def test_into_a_dense_model(spec: str, state: str, tmp_path: Path) -> None:
    model, target = sparse(spec, state), dense()
    padst.save(model, tmp_path / "model.safetensors")
    biases = {name: target.get_parameter(name) for name in ("0.bias", "3.bias", "1.weight")}
    assert padst.load(target, tmp_path / "model.safetensors") is target
    assert same_outputs(model, target)
    assert list(target.state_dict()) == list(model.state_dict())
    assert [n for n, _ in target.named_parameters()] == [n for n, _ in model.named_parameters()]
    assert all(target.get_parameter(name) is bias for name, bias in biases.items())
    for name, layer in sparse_layers(target).items():
        original = layer_of(model, name)
        assert repr(layer) == repr(original) and layer.structure == original.structure
        assert layer.config == original.config and layer.side == original.side
        assert layer.dense_type is nn.Linear
        assert layer.indices.dtype is torch.int32


@States
@Specs
def test_into_the_same_sparse_model_keeps_every_parameter(
    spec: str, state: str, tmp_path: Path
) -> None:
    model, target = sparse(spec, state, seed=0), sparse(spec, state, seed=1)
    assert not same_outputs(model, target)
    before = dict(target.named_parameters())
    padst.save(model, tmp_path / "model.safetensors")
    padst.load(target, tmp_path / "model.safetensors")
    assert same_outputs(model, target)
    after = dict(target.named_parameters())
    assert before.keys() == after.keys() and all(after[n] is p for n, p in before.items())


@pytest.mark.parametrize("other", ["none", "random", "learned"])
@States
@Specs
def test_into_a_model_with_another_sparsity_and_permutation(
    spec: str, state: str, other: str, tmp_path: Path
) -> None:
    model, target = sparse(spec, state, 0.5), sparse(spec, other, 0.75)
    bias = target.get_parameter("0.bias")
    padst.save(model, tmp_path / "model.safetensors")
    padst.load(target, tmp_path / "model.safetensors")
    assert same_outputs(model, target)
    assert target.get_parameter("0.bias") is bias
    assert list(target.state_dict()) == list(model.state_dict())
    assert [n for n, _ in target.named_parameters()] == [n for n, _ in model.named_parameters()]


@pytest.mark.parametrize("other", SPECS)
@Specs
def test_into_a_model_of_another_structure(spec: str, other: str, tmp_path: Path) -> None:
    model, target = sparse(spec, "learned"), sparse(other, "random")
    padst.save(model, tmp_path / "model.safetensors")
    padst.load(target, tmp_path / "model.safetensors")
    assert same_outputs(model, target)
    assert layer_of(target).structure == layer_of(model).structure


@pytest.mark.parametrize("other", ["diagonal", "nm:4", "fan_in", "unstructured"])
@pytest.mark.parametrize("spec", ["diagonal", "nm:4", "fan_in", "unstructured"])
def test_one_output_stored_in_another_layout(spec: str, other: str, tmp_path: Path) -> None:
    # Layouts of the same size: values may have the same shape where indices do not.
    def model(spec: str) -> nn.Module:
        config = SparseConfig(spec, 0.75, "none")
        return padst.sparsify(nn.Sequential(nn.Linear(16, 1)), {"0": config})

    first, second = model(spec), model(other)
    padst.save(first, tmp_path / "model.safetensors")
    padst.load(second, tmp_path / "model.safetensors")
    assert same_outputs(first, second, torch.randn(3, 16))


def test_a_hardened_model_into_a_soft_one_and_back(tmp_path: Path) -> None:
    soft, hard = sparse(state="learned"), sparse(state="learned")
    for layer in sparse_layers(hard).values():
        layer.harden()
    padst.save(soft, tmp_path / "soft.safetensors")
    padst.save(hard, tmp_path / "hard.safetensors")
    first, second = copy.deepcopy(soft), copy.deepcopy(hard)
    padst.load(first, tmp_path / "hard.safetensors")
    padst.load(second, tmp_path / "soft.safetensors")
    assert same_outputs(first, hard) and same_outputs(second, soft)
    assert isinstance(layer_of(first).permutation, FixedPermutation)
    assert isinstance(layer_of(second).permutation, SinkhornPermutation)


def test_temperature_and_iterations_are_kept(tmp_path: Path) -> None:
    model, present, plain = sparse(state="learned"), sparse(state="learned"), dense()
    for layer in sparse_layers(model).values():
        assert layer.soft_permutation is not None
        layer.soft_permutation.temperature, layer.soft_permutation.iterations = 0.7, 3
    padst.save(model, tmp_path / "model.safetensors")
    for target in (present, plain):
        padst.load(target, tmp_path / "model.safetensors")
        found = layer_of(target).soft_permutation
        assert found is not None and (found.temperature, found.iterations) == (0.7, 3)
        assert same_outputs(model, target)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_another_dtype(dtype: torch.dtype, tmp_path: Path) -> None:
    model, target = sparse(state="learned").to(dtype), dense().to(dtype)
    padst.save(model, tmp_path / "model.safetensors")
    padst.load(target, tmp_path / "model.safetensors")
    assert layer_of(target).values.dtype is dtype
    assert same_outputs(model, target, X.to(dtype))


def test_a_model_without_sparse_layers(tmp_path: Path) -> None:
    model, target = dense(), dense()
    padst.save(model, tmp_path / "model.safetensors")
    padst.load(target, tmp_path / "model.safetensors")
    assert same_outputs(model, target)


def test_a_sparse_layer_that_is_the_whole_model(tmp_path: Path) -> None:
    model = padst.sparsify(nn.Linear(32, 32), structure="block:8", sparsity=0.5)
    target = nn.Linear(32, 32)
    padst.save(model, tmp_path / "model.safetensors")
    padst.load(target, tmp_path / "model.safetensors")
    assert isinstance(target, SparseLayer) and same_outputs(model, target)


@pytest.mark.parametrize("kind", ["conv1d", "conv1x1"])
def test_other_kinds_of_layer(kind: str, tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    def build() -> nn.Module:
        make: Callable[..., nn.Module] = Conv1D
        return nn.Sequential(make(48, 32) if kind == "conv1d" else nn.Conv2d(32, 48, 1, stride=2))

    config = SparseConfig("block:8", 0.5, "random")
    model, target = padst.sparsify(build(), {"0": config}), build()
    x = torch.randn(2, 32) if kind == "conv1d" else torch.randn(2, 32, 5, 5)
    padst.save(model, tmp_path / "model.safetensors")
    padst.load(target, tmp_path / "model.safetensors")
    assert same_outputs(model, target, x)
    assert layer_of(target).dense_type is type(build()[0])  # type: ignore[index]


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("into", ["dense", "sparse"])
def test_what_is_frozen_stays_frozen(into: str, trainable: bool, tmp_path: Path) -> None:
    padst.save(sparse(state="learned"), tmp_path / "model.safetensors")
    target = dense() if into == "dense" else sparse(state="random", sparsity=0.75)
    target.requires_grad_(trainable)
    padst.load(target, tmp_path / "model.safetensors")
    assert {n: p.requires_grad for n, p in target.named_parameters()} == {
        n: trainable for n, _ in target.named_parameters()
    }


def test_a_model_in_an_open_run(tmp_path: Path) -> None:
    model, target = sparse(state="learned"), dense()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    training = padst.DynamicSparsity(model, optimizer, total_steps=10)
    assert training is not None and layer_of(model).recorder is not None
    padst.save(model, tmp_path / "model.safetensors")
    padst.load(target, tmp_path / "model.safetensors")
    assert same_outputs(model, target)
    padst.load(model, tmp_path / "model.safetensors")  # and into the run itself
    assert same_outputs(model, target)


def test_saving_twice_gives_the_same_numbers_and_changes_nothing(tmp_path: Path) -> None:
    model = sparse(state="learned")
    with untouched(model):
        padst.save(model, tmp_path / "a.safetensors")
        padst.save(model, str(tmp_path / "b.safetensors"))
    (header, tensors), (other, others) = (read(tmp_path / f"{n}.safetensors") for n in "ab")
    assert header == other and tensors.keys() == others.keys()
    assert all(torch.equal(tensors[name], others[name]) for name in tensors)


# -- tied weights ----------------------------------------------------------------------------------


class Tied(nn.Module):
    """An embedding and a head with one weight; one block used twice under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, 32)
        self.first = nn.Linear(32, 32)
        self.second = self.first
        self.head = nn.Linear(32, 40, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(self.embed(x)).relu()
        result: Tensor = self.head(self.second(h))
        return result


def tied(seed: int = 0) -> nn.Module:
    return padst.sparsify(Tied(), {"first": SparseConfig("block:8", 0.5, "random", seed=seed)})


def test_tied_weights_are_written_once(tmp_path: Path) -> None:
    padst.save(tied(), tmp_path / "model.safetensors")
    header, tensors = read(tmp_path / "model.safetensors")
    assert sum(t.shape == (40, 32) for t in tensors.values()) == 1
    assert sum(name.endswith("values") for name in tensors) == 1
    assert header["aliases"]["head.weight"] == "embed.weight"


@pytest.mark.parametrize("into", ["sparse", "dense"])
def test_tied_weights_stay_tied(into: str, tmp_path: Path) -> None:
    model, target = tied(), tied(seed=1) if into == "sparse" else Tied()
    padst.save(model, tmp_path / "model.safetensors")
    padst.load(target, tmp_path / "model.safetensors")
    x = torch.randint(0, 40, (2, 7))
    assert same_outputs(model, target, x)
    assert target.get_parameter("head.weight") is target.get_parameter("embed.weight")
    assert target.get_submodule("first") is target.get_submodule("second")
    with torch.no_grad():
        target.get_parameter("embed.weight").zero_()
    assert not target.get_parameter("head.weight").any()


def test_a_tied_file_loads_into_an_untied_model(tmp_path: Path) -> None:
    padst.save(tied(), tmp_path / "model.safetensors")
    target = tied()
    target.get_submodule("head").weight = nn.Parameter(torch.zeros(40, 32))
    padst.load(target, tmp_path / "model.safetensors")
    assert torch.equal(target.get_parameter("head.weight"), target.get_parameter("embed.weight"))


# -- saving is atomic ------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [OSError("disk full"), KeyboardInterrupt()], ids=repr)
@pytest.mark.parametrize("there", [True, False])
def test_a_failed_save_leaves_the_old_file_and_no_other(
    failure: BaseException, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    if there:
        padst.save(sparse(), path)
    before = path.read_bytes() if there else b""

    def fail(_: Any, draft: str, **__: Any) -> None:
        Path(draft).write_bytes(b"half of it")
        raise failure

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(type(failure)):
        padst.save(sparse(seed=1), path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name] * there
    if there:
        assert path.read_bytes() == before


def test_a_second_save_replaces_the_first_and_leaves_one_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    padst.save(sparse(), path)
    model, target = sparse(seed=1), dense()
    padst.save(model, path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    assert same_outputs(model, padst.load(target, path))


def test_a_file_is_as_readable_as_any_other(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    padst.save(sparse(), tmp_path / "model.safetensors")
    modes = [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("plain", "model.safetensors")]
    assert modes[0] == modes[1]


# -- refusals: the model stays as it is ------------------------------------------------------------


def read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path, framework="pt") as file:
        names = list(file.keys())
        return json.loads(file.metadata()[FORMAT]), {n: file.get_tensor(n) for n in names}


Change = Callable[[dict[str, Any], dict[str, Tensor]], object]


def tamper(path: Path, change: Change) -> None:
    header, tensors = read(path)
    change(header, tensors)
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, path, metadata={FORMAT: json.dumps(header)})


def targets(state: str = "random") -> list[nn.Module]:
    return [dense(), sparse(state=state), sparse("nm:8", "learned")]


def refused(path: Path, *said: str, state: str = "random") -> None:
    """Load into a dense model and two sparse ones; each must refuse and stay as it is."""
    for model in targets(state):
        with untouched(model), pytest.raises(ValueError, match=r"^Expected ") as error:
            padst.load(model, path)
        text = str(error.value)
        assert all(part in text for part in said), text
        assert str(path) in text and text.endswith(".")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    padst.save(sparse(), tmp_path / "model.safetensors")
    return tmp_path / "model.safetensors"


@pytest.mark.parametrize("share", [0.0, 0.0005, 0.01, 0.1, 0.5, 0.9, 0.9999])
def test_a_truncated_file(share: float, path: Path) -> None:
    whole = path.read_bytes()
    path.write_bytes(whole[: int(len(whole) * share)])
    refused(path, "cannot be read", "take another copy")


@pytest.mark.parametrize("seed", range(4))
def test_random_bytes(seed: int, path: Path) -> None:
    noise = torch.randint(0, 256, (5000,), generator=torch.Generator().manual_seed(seed))
    path.write_bytes(bytes(noise.tolist()))
    refused(path, "cannot be read")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}, {FORMAT: "[1]"}, {FORMAT: "null"}])
def test_a_foreign_safetensors_file(metadata: dict[str, str] | None, path: Path) -> None:
    save_file(dense().state_dict(), path, metadata=metadata)
    refused(path, "something else", "load_state_dict")


def test_a_header_that_is_no_json(path: Path) -> None:
    save_file(dense().state_dict(), path, metadata={FORMAT: "{"})
    refused(path)


@pytest.mark.parametrize("version", [VERSION + 1, None, "1", 1.5])
def test_another_version(version: object, path: Path) -> None:
    tamper(path, lambda header, _: header.update(version=version))
    refused(path, "format version", str(version), "Upgrade")


def test_no_file(tmp_path: Path) -> None:
    for missing in (tmp_path / "missing.safetensors", tmp_path):
        for model in targets():
            with untouched(model), pytest.raises(FileNotFoundError, match=str(missing)):
                padst.load(model, missing)


ARCHITECTURES: dict[str, Callable[[], nn.Module]] = {
    "another width": lambda: nn.Sequential(nn.Linear(32, 56), nn.BatchNorm1d(56)),
    "the transpose": lambda: nn.Sequential(
        nn.Linear(48, 32), nn.BatchNorm1d(48), nn.GELU(), nn.Linear(48, 32)
    ),
    "a missing layer": lambda: dense()[:3],
    "another layer more": lambda: nn.Sequential(*dense(), nn.Linear(32, 5)),
    "another kind": lambda: nn.Sequential(
        nn.Conv1d(32, 48, 1), nn.BatchNorm1d(48), nn.GELU(), nn.Linear(48, 32)
    ),
    "no bias": lambda: nn.Sequential(
        nn.Linear(32, 48, bias=False), nn.BatchNorm1d(48), nn.GELU(), nn.Linear(48, 32)
    ),
    "no buffers": lambda: nn.Sequential(
        nn.Linear(32, 48), nn.LayerNorm(48), nn.GELU(), nn.Linear(48, 32)
    ),
    "other names": lambda: nn.ModuleDict({"a": dense()}),
}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_another_architecture(name: str, path: Path) -> None:
    model = ARCHITECTURES[name]()
    with untouched(model), pytest.raises(ValueError, match=r"^Expected ") as error:
        padst.load(model, path)
    assert "Build the same architecture." in str(error.value)


def test_a_layer_that_is_sparse_here_and_dense_in_the_file(path: Path) -> None:
    padst.save(dense(), path)
    for model in targets()[1:]:
        with untouched(model), pytest.raises(ValueError, match="before it is sparsified"):
            padst.load(model, path)


def swapped(tensors: dict[str, Tensor], name: str, at: int, value: int) -> None:
    flat = tensors[name].flatten()
    flat[at] = value
    tensors[name] = flat.view(tensors[name].shape)


TENSORS: dict[str, Change] = {
    "no values": lambda _, t: t.pop("0.values"),
    "no indices": lambda _, t: t.pop("0.indices"),
    "no bias": lambda _, t: t.pop("3.bias"),
    "no permutation": lambda _, t: t.pop("3.permutation.perm"),
    "no running mean": lambda _, t: t.pop("1.running_mean"),
    "an unknown tensor": lambda _, t: t.update({"junk": torch.zeros(2)}),
    "an unknown tensor of a layer": lambda _, t: t.update({"0.junk": torch.zeros(2)}),
    "a dense weight besides": lambda _, t: t.update({"0.weight": torch.zeros(48, 32)}),
    "logits besides": lambda _, t: t.update({"0.permutation.logits": torch.zeros(32, 32)}),
    "index too large": lambda _, t: swapped(t, "0.indices", -1, 4),
    "index negative": lambda _, t: swapped(t, "0.indices", 0, -1),
    "index twice": lambda _, t: swapped(t, "3.indices", 1, int(t["3.indices"].flatten()[0])),
    "indices of another shape": lambda _, t: t.update({"0.indices": t["0.indices"][:-1]}),
    "indices without slots": lambda _, t: t.update({"0.indices": t["0.indices"][:, :0]}),
    "indices that are fractions": lambda _, t: t.update({"0.indices": t["0.indices"] + 0.5}),
    "values of another shape": lambda _, t: t.update({"0.values": t["0.values"][:, :1]}),
    "bias of another shape": lambda _, t: t.update({"0.bias": t["0.bias"][:-1]}),
    "permutation twice": lambda _, t: swapped(
        t, "0.permutation.perm", 0, int(t["0.permutation.perm"][1])
    ),
    "permutation too large": lambda _, t: swapped(t, "3.permutation.perm", 0, 32),
    "permutation too short": lambda _, t: t.update(
        {"0.permutation.perm": t["0.permutation.perm"][:-1]}
    ),
    "permutation in two dimensions": lambda _, t: t.update(
        {"0.permutation.perm": t["0.permutation.perm"].view(4, 8)}
    ),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_file_with_wrong_tensors(name: str, path: Path) -> None:
    tamper(path, TENSORS[name])
    refused(path)


SOFT: dict[str, Change] = {
    "no logits": lambda _, t: t.pop("3.permutation.logits"),
    "logits of another width": lambda _, t: t.update({"3.permutation.logits": torch.zeros(31, 31)}),
    "logits that are not square": lambda _, t: t.update(
        {"3.permutation.logits": torch.zeros(32, 31)}
    ),
    "no temperature": lambda h, _: h["layers"]["3"].pop("temperature"),
    "no iterations": lambda h, _: h["layers"]["3"].pop("iterations"),
    "temperature is zero": lambda h, _: h["layers"]["3"].update(temperature=0.0),
    "iterations are a text": lambda h, _: h["layers"]["3"].update(iterations="ten"),
}


@pytest.mark.parametrize("name", SOFT)
def test_a_file_with_a_wrong_soft_permutation(name: str, path: Path) -> None:
    padst.save(sparse(state="learned"), path)
    tamper(path, SOFT[name])
    refused(path, state="learned")


HEADERS: dict[str, Change] = {
    "no layers": lambda h, _: h.pop("layers"),
    "layers are a list": lambda h, _: h.update(layers=["0", "3"]),
    "a layer is a text": lambda h, _: h["layers"].update({"3": "block"}),
    "one layer missing": lambda h, _: h["layers"].pop("3"),
    "another name": lambda h, _: h["layers"].update({"7": h["layers"].pop("3")}),
    "a module that is no layer": lambda h, _: h["layers"].update({"1": h["layers"].pop("3")}),
    "aliases are a list": lambda h, _: h.update(aliases=["x"]),
    "an unknown kind": lambda h, _: h["layers"]["3"].update(kind="SparseNothing"),
    "another kind": lambda h, _: h["layers"]["3"].update(kind="SparsePointwiseConv"),
    "an unknown structure": lambda h, _: h["layers"]["3"].update(structure="butterfly"),
    "another block size": lambda h, _: h["layers"]["3"].update(structure="block:16"),
    "a size that does not tile": lambda h, _: h["layers"]["3"].update(structure="block:5"),
    "another structure": lambda h, _: h["layers"]["3"].update(structure="diagonal"),
    "another shape": lambda h, _: h["layers"]["3"].update(shape=[48, 32]),
    "a shape of one number": lambda h, _: h["layers"]["3"].update(shape=[48]),
    "an unknown side": lambda h, _: h["layers"]["3"].update(side="left"),
    "an unknown permutation": lambda h, _: h["layers"]["3"].update(permutation="maybe"),
    "no permutation": lambda h, _: h["layers"]["3"].update(permutation="none"),
    "a soft permutation": lambda h, _: h["layers"]["3"].update(permutation="soft"),
    "a wrong config": lambda h, _: h["layers"]["3"].update(config={"sparsity": 7}),
    "an unknown field in the config": lambda h, _: h["layers"]["3"].update(config={"junk": 1}),
} | {
    f"no {key}": (lambda h, _, key=key: h["layers"]["3"].pop(key))
    for key in ("structure", "shape", "side", "permutation", "kind", "dense_type")
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_file_with_a_wrong_header(name: str, path: Path) -> None:
    tamper(path, HEADERS[name])
    refused(path)


def test_a_refused_file_leaves_a_model_that_a_good_file_loads_into(path: Path) -> None:
    good = path.read_bytes()
    tamper(path, TENSORS["index twice"])
    for model in targets():
        with pytest.raises(ValueError, match="Expected"):
            padst.load(model, path)
        (path.parent / "good.safetensors").write_bytes(good)
        padst.load(model, path.parent / "good.safetensors")
        assert isinstance(layer_of(model), SparseLayer)
