from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import nn

from padst_compiler.inputs import bind, check_device

X = torch.ones(2, 3)


@pytest.mark.parametrize(
    ("given", "args", "kwargs"),
    [
        (X, (X,), {}),
        ((X, X), (X, X), {}),
        ([X], (X,), {}),
        ({"x": X}, (), {"x": X}),
        (OrderedDict(x=X, mask=None), (), {"x": X, "mask": None}),
        ((), (), {}),
        (({"x": X}, 3), ({"x": X}, 3), {}),
        (None, (None,), {}),
    ],
)
def test_inputs_become_arguments(given: Any, args: Any, kwargs: Any) -> None:
    found_args, found_kwargs = bind(nn.Linear(3, 3), given)
    assert len(found_args) == len(args)
    assert all(a is b or a == b for a, b in zip(found_args, args, strict=True))
    assert found_kwargs.keys() == kwargs.keys()
    assert all(found_kwargs[k] is kwargs[k] for k in kwargs)


def test_an_input_on_another_device_is_refused_with_both_names_and_the_cure() -> None:
    with pytest.raises(
        ValueError, match=r"on cpu, where the model is\. Got meta\. .*\.to\('cpu'\)"
    ):
        bind(nn.Linear(3, 3), (X, X.to("meta")))


def test_an_input_inside_a_container_is_seen() -> None:
    with pytest.raises(ValueError, match="Got meta"):
        check_device(nn.Linear(3, 3), {"batch": [{"x": X.to("meta")}]})


def test_a_model_of_buffers_only_has_a_device() -> None:
    model = nn.BatchNorm1d(3, affine=False)
    with pytest.raises(ValueError, match="Got meta"):
        check_device(model, X.to("meta"))


def test_a_model_on_two_devices_takes_inputs_on_either() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, device="meta"))
    check_device(model, (X, X.to("meta")))


def test_a_model_without_tensors_takes_any_input() -> None:
    check_device(nn.ReLU(), (X, X.to("meta"), 3, None, "text"))
