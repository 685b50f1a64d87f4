from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from padst_compiler.kernel_ops import GATHERED_SUMS, INTO, MAPPED
from padst_compiler.ops import LINEAR, LINEAR_DX
from padst_compiler.passes.invert_maps import InvertMaps

Rewrite = Callable[..., Any]
HERE = InvertMaps(device="cpu")  # numbers are compared on a CPU
linear, dx = MAPPED[LINEAR["block"]], MAPPED[LINEAR_DX["block"]]


def x(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def blocks() -> dict[str, Tensor]:
    return {"v": x(3, 1, 4, 4), "i": torch.tensor([[1], [0], [1]], dtype=torch.int32)}


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_kernel_stores_through_the_inverse_that_is_known_before(
    rewrite: Rewrite, dynamic: bool
) -> None:
    def run(x: Tensor, v: Tensor, i: Tensor, p: Tensor, q: Tensor) -> Tensor:
        y: Tensor = linear(x, v, i, 12, p, q)
        return y.exp()

    maps = {"p": torch.randperm(8), "q": torch.randperm(12)}
    result = rewrite(HERE, run, x(2, 5, 8), dynamic=dynamic, **blocks(), **maps)
    assert result.after == [INTO[linear].name().removeprefix("padst::"), "exp"]
    assert len(result.fired) == 1  # the inverse depends on no input, so it is made once


def test_gradients_do_too(rewrite: Rewrite) -> None:
    def run(g: Tensor, v: Tensor, i: Tensor, q: Tensor) -> Tensor:
        y: Tensor = dx(g, v, i, 8, None, q)
        return y

    result = rewrite(HERE, run, x(5, 12), **blocks(), q=torch.randperm(8))
    assert result.after == [INTO[dx].name().removeprefix("padst::")]


@pytest.mark.parametrize("case", ["no map", "another device", "no kernel of a GPU"])
def test_what_is_left_alone(rewrite: Rewrite, case: str) -> None:
    def run(x: Tensor, v: Tensor, i: Tensor, q: Tensor) -> Tensor:
        if case == "no kernel of a GPU":
            y: Tensor = GATHERED_SUMS(x, v.flatten(1), i.expand(-1, 16), None, q[:3].argsort())
        else:
            y = linear(x, v, i, 12, None, None if case == "no map" else q)
        return y

    step = InvertMaps() if case == "another device" else HERE
    result = rewrite(step, run, x(5, 8), **blocks(), q=torch.randperm(12))
    assert result.before == result.after and not result.fired
