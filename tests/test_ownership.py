import copy
import io
import pickle
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from padst_compiler.ownership import SUFFIX, can_own, child_name, own, owned, release


class Doubled(nn.Module):
    """Stands for a sparse layer: computes a weight from another, and counts how often."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.stored = nn.Parameter(weight.detach() / 2)
        self.readers, self.calls = 0, 0

    def forward(self) -> Tensor:
        self.calls += 1
        return self.stored * 2


class Block(nn.Module):
    """Two raw parameters, a child between them, and an attribute of its user."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Parameter(torch.randn(4, 4))
        self.child = nn.Linear(4, 4)
        self.second = nn.Parameter(torch.randn(4, 4))
        self.scale = nn.Parameter(torch.ones(4))
        self.note = "mine"

    def forward(self, x: Tensor, twice: bool = False) -> Tensor:
        y: Tensor = self.child(x @ self.first) @ self.second * self.scale
        return y @ self.second if twice else y


class Inherited(Block):
    pass


def made(kind: type[Block] = Block, names: tuple[str, ...] = ("first", "second")) -> Block:
    block = kind()
    for name in names:
        own(block, name, Doubled(getattr(block, name)))
    return block


@pytest.mark.parametrize("kind", [Block, Inherited])
def test_reading_the_name_computes_the_weight(kind: type[Block]) -> None:
    block, x = kind(), torch.randn(3, 4)
    expected, weight = block(x), block.first
    own(block, "first", Doubled(block.first))
    assert torch.equal(block(x), expected) and torch.equal(block.first, weight)
    block(x).sum().backward()
    layer: Any = block.get_submodule(child_name("first"))
    assert layer.stored.grad is not None and "first" not in block._parameters


def test_one_forward_pass_knows_that_it_runs() -> None:
    block = made()
    layer: Any = block.get_submodule("second_sparse")
    seen = []
    block.child.register_forward_hook(lambda *_: seen.append(layer.readers))
    block(torch.randn(3, 4))
    assert seen == [1] and layer.readers == 0
    with pytest.raises(RuntimeError):
        block(torch.randn(3, 5))
    assert layer.readers == 0


def test_the_class_stays_itself_for_all_who_ask() -> None:
    block = made(Inherited)
    assert isinstance(block, Inherited) and isinstance(block, Block)
    kind = type(block)
    assert (kind.__name__, kind.__module__) == (Inherited.__name__, Inherited.__module__)
    assert kind.__qualname__ == Inherited.__qualname__ and kind.__doc__ == Inherited.__doc__
    assert repr(block).startswith("Inherited(")
    assert type(made(Inherited)) is kind  # one class for all of a kind
    assert type(made(Block)) is not kind
    assert owned(block) == ("first", "second") and owned(Inherited()) == ()


def test_names_order_hooks_modes_and_attributes_stay() -> None:
    block = Block()
    called = []
    block.register_forward_hook(lambda *_: called.append("hook"))
    block.eval()
    own(block, "first", Doubled(block.first))
    own(block, "second", Doubled(block.second))
    block(torch.randn(2, 4))
    assert called == ["hook"] and not block.training and block.note == "mine"
    assert [name for name, _ in block.named_parameters()] == [
        "scale",
        "first_sparse.stored",
        "second_sparse.stored",
        "child.weight",
        "child.bias",
    ]
    assert list(block.state_dict()) == [name for name, _ in block.named_parameters()]
    block.train()
    assert all(module.training for module in block.modules())


@pytest.mark.parametrize("value", [torch.zeros(4, 4), nn.Parameter(torch.zeros(4, 4)), None])
def test_an_assignment_says_where_to_write(value: Any) -> None:
    block = made()
    with pytest.raises(AttributeError, match=r"Write to first_sparse.values, or call"):
        block.first = value
    block.third = nn.Parameter(torch.zeros(4, 4))
    assert "third" in dict(block.named_parameters())


def by_pickle(block: Block) -> Any:
    return pickle.loads(pickle.dumps(block))


def by_save(block: Block) -> Any:
    file = io.BytesIO()
    torch.save(block, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("through", [by_pickle, by_save, copy.deepcopy, copy.copy])
def test_copies_are_owners_too(through: Callable[[Block], Any]) -> None:
    block, x = made(), torch.randn(3, 4)
    other: Any = through(block)
    assert type(other) is type(block) and torch.equal(other(x), block(x))
    if through is not copy.copy:
        layer: Any = other.first_sparse
        with torch.no_grad():
            layer.stored.zero_()
        assert not torch.equal(other(x), block(x))


def test_a_state_dict_goes_to_and_fro() -> None:
    source, target, x = made(), made(), torch.randn(3, 4)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(x), source(x))
    dense = Block()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*first_sparse.weight"):
        target.load_state_dict(dense.state_dict())  # Doubled takes no dense weight; ours do


def test_releasing_gives_the_class_back() -> None:
    block = made()
    layer = release(block, "second")
    assert isinstance(layer, Doubled) and owned(block) == ("first",)
    release(block, "first")
    assert type(block) is Block and owned(block) == ()
    assert [name for name, _ in block.named_children()] == ["child"]


class Computes(nn.Module):
    @property
    def weight(self) -> Tensor:
        return torch.zeros(2, 2)


class Taken(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2, 2))
        self.weight_sparse = 3


REFUSED: dict[str, tuple[Callable[[], nn.Module], str, str]] = {
    "recurrent": (lambda: nn.LSTM(2, 2), "weight_hh_l0", "keeps its weights in a list of its own"),
    "script": (lambda: torch.jit.script(nn.Linear(2, 2)), "weight", "is a script"),
    "sequential": (lambda: nn.Sequential(OrderedDict()), "weight", "runs its children"),
    "list": (lambda: nn.ModuleList(), "weight", "runs its children"),
    "property": (lambda: Computes(), "weight", "Computes computes weight itself"),
    "taken": (lambda: Taken(), "weight", f"has a weight{SUFFIX} already"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_who_cannot_own_says_why(name: str) -> None:
    build, attribute, said = REFUSED[name]
    assert said in can_own(build(), attribute)


def test_others_can_own() -> None:
    normed = parametrizations.weight_norm(nn.Linear(2, 2))
    lists: Any = normed.parametrizations
    assert can_own(lists["weight"], "original1") == ""
    assert can_own(nn.MultiheadAttention(4, 2), "in_proj_weight") == ""
    assert can_own(nn.ParameterList([torch.zeros(2, 2)]), "0") == ""
