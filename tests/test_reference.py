import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from padst_compiler.reference import load_factory, model_and_inputs

SOURCE = """
import torch
from torch import nn

ready = nn.Linear(3, 3)
number = 7


def alone():
    return nn.Linear(3, 5)


def both():
    return nn.Linear(3, 5), torch.zeros(2, 3)


def many():
    return nn.Linear(3, 5), (torch.zeros(2, 3),)


def wrong():
    return "a model"


def three():
    return nn.Linear(3, 5), 1, 2


def fails():
    raise RuntimeError("from the factory")
"""


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Return a file of factories in the current folder; forget what was imported afterwards."""
    path = tmp_path / "padst_factories.py"
    path.write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    known = set(sys.modules)
    yield path
    for name in set(sys.modules) - known:
        if name.startswith("padst_factories"):
            del sys.modules[name]


@pytest.mark.parametrize("way", ["module", "file", "path"])
def test_three_ways_to_name_a_factory(way: str, file: Path) -> None:
    name = {"module": file.stem, "file": file.name, "path": str(file)}[way]
    model, inputs = model_and_inputs(f"{name}:alone")
    assert isinstance(model, nn.Linear) and inputs is None


def test_a_factory_may_return_inputs_too(file: Path) -> None:
    model, inputs = model_and_inputs(f"{file}:both")
    assert isinstance(model, nn.Module) and isinstance(inputs, torch.Tensor)
    _, several = model_and_inputs(f"{file}:many")
    assert isinstance(several, tuple) and several[0].shape == (2, 3)


def test_a_model_itself_is_taken_as_it_is_and_not_called(file: Path) -> None:
    model, inputs = model_and_inputs(f"{file}:ready")
    assert isinstance(model, nn.Linear) and model.in_features == 3 and inputs is None


def test_a_module_of_the_library_and_any_object() -> None:
    assert load_factory("torch.nn:Linear") is nn.Linear
    assert load_factory("json:loads").__name__ == "loads"


def test_a_file_does_not_replace_a_module_of_its_name(tmp_path: Path) -> None:
    import json

    path = tmp_path / "json.py"
    path.write_text("def make():\n    return 1\n")
    assert load_factory(f"{path}:make")() == 1
    assert sys.modules["json"] is json


def test_the_classes_of_a_file_can_be_pickled(file: Path) -> None:
    import pickle

    file.write_text("class Own:\n    pass\n\n\ndef make():\n    return Own()\n")
    made = load_factory(f"{file}:make")()
    assert type(pickle.loads(pickle.dumps(made))) is type(made)


@pytest.mark.parametrize(
    ("reference", "said"),
    [
        ("nothing", r"^Expected a reference module:factory\. Got 'nothing'\. Write for example"),
        ("", r"^Expected a reference module:factory\. Got ''"),
        ("module:", r"^Expected a reference module:factory\. Got 'module:'"),
        ("no_such_module_xyz:make", r"^Expected an importable module .* Got 'no_such_module_xyz'"),
        ("no/such/file.py:make", r"^Expected an importable module .*no file no/such/file\.py"),
        (
            "json:no_such_name",
            r"^Expected a name in json\. Got 'no_such_name'\. It has .*JSONDecoder",
        ),
    ],
)
def test_a_wrong_reference_is_refused_with_the_cure(reference: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_factory(reference)


@pytest.mark.parametrize(
    ("name", "found"), [("wrong", "str"), ("number", "int"), ("three", "tuple")]
)
def test_something_that_is_no_model_is_refused(name: str, found: str, file: Path) -> None:
    with pytest.raises(ValueError, match=rf"^Expected .*{name} to return a model.* Got {found}\."):
        model_and_inputs(f"{file}:{name}")


def test_what_the_factory_raises_comes_through(file: Path) -> None:
    with pytest.raises(RuntimeError, match="from the factory"):
        model_and_inputs(f"{file}:fails")
