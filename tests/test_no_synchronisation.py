"""Which steps of a training would wait for a GPU to say what it computed.

On a CPU everything is there at once. So whatever hands numbers of a tensor to Python, or makes a
tensor whose size depends on numbers, is noted, but for tensors that stay on the CPU. Products are
not looked into: on a GPU they are other kernels. Nor is a copy from one device to another seen.
"""

import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import padst_compiler as padst
from padst_compiler import notes, watch
from padst_compiler.exploration import Exploration
from padst_compiler.kernels.triton_block import by_column
from padst_compiler.kernels.triton_sums import columns
from padst_compiler.methods import NonFiniteGradientWarning

from .test_every_method import CASES, Built, build

WAITS = ["_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "bincount"]
WAITS += ["unique_dim", "unique_consecutive", "_unique", "_unique2", "repeat_interleave"]
INDEXED = ("index", "index_put", "index_put_", "_index_put_impl_")


class Noted(TorchDispatchMode):
    """Note what would wait, also where a recorder observes a gradient."""

    def __init__(self, here: set[int]) -> None:
        """Take the addresses of tensors that are on the CPU whatever the model is on."""
        super().__init__()  # type: ignore[no-untyped-call]
        self.here, self.seen = here, set[str]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        del types
        name, kwargs = func.overloadpacket.__name__, kwargs or {}
        if func is torch.ops.padst.observe.default:
            with self:
                return watch._observe(*args, **kwargs)
        at = args[1] if name in INDEXED else ()
        by_mask = any(t is not None and t.dtype in (torch.bool, torch.uint8) for t in at)
        if by_mask or (name in WAITS and args[0].data_ptr() not in self.here):
            self.seen.add(f"{name} by a mask" if by_mask else name)
        return func(*args, **kwargs)


def on_the_cpu(built: Built) -> set[int]:
    """Return the addresses of flags of recorders, and of what Adam counts."""
    model, optimizer, _ = built
    flags = [r.armed for layer in padst.sparse_layers(model).values() if (r := layer.recorder)]
    counts = [state["step"] for state in optimizer.state.values() if "step" in state]
    return {tensor.data_ptr() for tensor in (*flags, *counts)}


@contextmanager
def noted(here: set[int]) -> Iterator[set[str]]:
    mode = Noted(here)
    with ExitStack() as stack:
        for name in ("tolist", "numpy", "cpu"):  # no operator on a CPU
            stack.enter_context(mock.patch.object(Tensor, name, _telling(name, mode.seen)))
        stack.enter_context(mode)
        yield mode.seen


def _telling(name: str, seen: set[str]) -> Callable[..., Any]:
    method = getattr(Tensor, name)

    def told(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        seen.add(name)
        return method(self, *args, **kwargs)

    return told


class Late:
    """An arrival that is not there until one waits for it."""

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        pass


@pytest.fixture(autouse=True)
def _sent_late(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let what is sent to the CPU come late, as from a GPU."""
    monkeypatch.setattr(notes, "_sent", lambda numbers: (numbers.clone(), Late()))


def step(built: Built, at: int) -> set[str]:
    """Take one step; return what would have waited in it."""
    model, optimizer, training = built
    x = torch.randn(12, 16, generator=torch.Generator().manual_seed(at))
    with noted(on_the_cpu(built)) as seen:
        loss = (model(x) - x[:, :4]).square().mean() + training.penalty()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return seen


@pytest.mark.parametrize(
    "waits",
    [
        lambda t: t.sum().item(),
        lambda t: t.tolist(),
        lambda t: bool((t > 0).any()),
        lambda t: t[t > 0],
        lambda t: t.nonzero(),
        lambda t: t.unique(),
        lambda t: torch.equal(t, t),
        lambda t: t.__setitem__(t > 0, t[:1]),
    ],
)
def test_what_waits_is_noted(waits: Callable[[Tensor], object]) -> None:
    with noted(set()) as seen:
        waits(torch.arange(3.0))
    assert seen


@pytest.mark.parametrize("permutation", ["learned", "random"])
@pytest.mark.parametrize("case", CASES)
def test_no_step_between_updates_waits(case: str, permutation: str) -> None:
    built = build(case, permutation=permutation, update_every=4, harden_every=100, total_steps=100)
    step(built, 0)  # Adam makes its state
    assert [step(built, at) for at in (1, 2)] == [set(), set()]


READS = {"_local_scalar_dense"}
GROWS = {*READS, "nonzero", "index by a mask", "_unique2"}
ALLOWED = {  # at an update: shapes that follow from numbers, and random units drawn on the CPU
    "srigl": {*READS, "nonzero", "index by a mask", "index_put_ by a mask"},
    "set": GROWS,
    "mest": GROWS,
    "gmp": READS,  # whether the gradients are finite
    "dynadiag": READS,
    "rigl": set[str](),
    "static": set[str](),
}


@pytest.mark.parametrize("case", CASES)
def test_an_update_waits_where_shapes_follow_from_numbers_alone(case: str) -> None:
    """RigL, the default, does not: it moves topologies, and records what it did, on the GPU."""
    name = CASES[case][0].name
    often: dict[str, Any] = {
        "update_every": 4,
        "harden_every": 100,
        "total_steps": 13,
        "drop_fraction": 0.9,
    }
    built = build(case, permutation="random", **often)
    explored = Exploration(built[0], built[1]) if name in ("rigl", "static") else None
    step(built, 0)  # Adam makes its state
    found = set().union(*(step(built, at) for at in range(1, 9)))
    assert found <= ALLOWED[name]
    if name in ("rigl", "static"):
        assert found == set()
    if name == "rigl":
        assert explored is not None and max(explored.rates().values()) > 0.25
        assert any(event["churn"] > 0 for event in built[2].history)


@pytest.mark.parametrize("recorded", [True, False])
def test_a_gradient_that_is_not_finite_is_found_without_waiting(recorded: bool) -> None:
    """Where a recorder saw it, and where it came afterwards: scaled, say, or reduced."""
    often: dict[str, Any] = {"update_every": 2, "harden_every": 100, "drop_fraction": 0.9}
    built = build("rigl", permutation="random", total_steps=9, **often)
    model, optimizer, training = built
    step(built, 0)
    layers = padst.sparse_layers(model).values()
    before = [layer.indices.clone() for layer in layers]
    with noted(on_the_cpu(built)) as seen, warnings.catch_warnings():
        warnings.simplefilter("error")
        factor = torch.nan if recorded else 1.0
        (model(torch.randn(12, 16)).square().mean() * factor).backward()
        for layer in layers:
            assert layer.values.grad is not None
            layer.values.grad.view(-1)[0] = torch.nan
        optimizer.step()
    assert not seen
    assert all(torch.equal(old, layer.indices) for old, layer in zip(before, layers, strict=True))
    with pytest.warns(NonFiniteGradientWarning, match="at step 2") as said:
        assert [event["churn"] for event in training.history] == [0.0, 0.0]
    assert len(said) == 2


def test_lists_of_indices_are_made_without_waiting() -> None:
    """What the kernels of ``dx`` read, in every backward pass."""
    indices = torch.randint(4, (6, 2), dtype=torch.int32)
    with noted(set()) as seen:
        by_column(indices, 4)
        by_column(columns(indices.view(6, 2, 1), 64), 64)
    assert not seen
