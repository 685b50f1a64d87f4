from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from padst_compiler import verify
from padst_compiler.compat import trace_aten
from padst_compiler.verify import MismatchError, compare


def traced(function: Callable[..., Any], *tensors: Tensor) -> fx.GraphModule:
    mode = FakeTensorMode()
    return trace_aten(function, [mode.from_tensor(t) for t in tensors])


def both(
    one: Callable[..., Any], two: Callable[..., Any], *tensors: Tensor, frozen: tuple[int, ...] = ()
) -> str:
    return compare(traced(one, *tensors), traced(two, *tensors), tensors, set(frozen))


X = torch.ones(3, 4)


def test_equal_graphs_are_verified() -> None:
    assert both(lambda x: x.exp(), lambda x: x.exp(), X) == (
        "verified in float64: relative difference 0e+00"
    )


def test_rounding_in_float64_is_no_difference() -> None:
    verdict = both(lambda x: x.sum(-1), lambda x: x.flip(-1).cumsum(-1)[..., -1], X)
    assert verdict.startswith("verified in float64")


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: x.exp() * (1 + 1e-7),  # below float32's rounding
        lambda x: x.exp().roll(1, -1),
        lambda x: x.exp().flip(-1),
        lambda x: x.exp() + torch.tensor([0.0, 0.0, 0.0, 1e-6], dtype=x.dtype),
    ],
)
def test_a_difference_raises(wrong: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(MismatchError, match=r"Expected the folded graph to equal .*'fold': 'off'"):
        both(lambda x: x.exp(), wrong, X)


def test_any_of_several_results_counts() -> None:
    with pytest.raises(MismatchError):
        both(lambda x: (x, x.exp()), lambda x: (x, x.exp().flip(-1)), X)


def test_inputs_are_random_and_frozen_tensors_keep_their_numbers() -> None:
    """On the example itself, all ones, these two agree; on frozen ones they do too."""
    one, two = (lambda x, w: x * w), (lambda x, w: x * w.square())
    assert both(one, two, X, torch.ones(4), frozen=(1,)).startswith("verified")
    with pytest.raises(MismatchError):
        both(one, two, X, torch.ones(4))
    with pytest.raises(MismatchError):
        both(lambda x: x, lambda x: x.square(), X)


def test_integers_keep_their_numbers() -> None:
    table = torch.tensor([2, 0, 1])

    def run(x: Tensor, p: Tensor) -> Tensor:
        return x.index_select(0, p)

    assert both(run, run, X, table).startswith("verified")


def test_the_arguments_are_not_written_to() -> None:
    x, w = torch.ones(3), torch.ones(3, dtype=torch.float64)
    both(lambda x, w: x.add_(w.mul_(2)), lambda x, w: x.add_(w.mul_(2)), x, w, frozen=(1,))
    assert x.tolist() == w.tolist() == [1.0] * 3


# -- numbers that are no numbers -------------------------------------------------------------------


@pytest.mark.parametrize("bad", ["nan", "inf"])
def test_a_folded_graph_that_makes_numbers_not_finite_raises(bad: str) -> None:
    with pytest.raises(MismatchError):
        both(lambda x: x.exp(), lambda x: x.exp() * float(bad), X)


@pytest.mark.parametrize("bad", ["nan", "inf", "-inf"])
def test_what_is_not_finite_in_both_is_equal(bad: str) -> None:
    def run(x: Tensor) -> Tensor:
        return torch.cat([x, x.masked_fill(x == x, float(bad))], dim=-1)

    assert both(run, run, X).startswith("verified")


def test_a_difference_beside_an_infinity_raises() -> None:
    def run(x: Tensor) -> Tensor:
        return torch.cat([x, torch.full_like(x, torch.inf)], dim=-1)

    with pytest.raises(MismatchError):
        both(run, lambda x: run(x.flip(-1)), X)


# -- results of other kinds ------------------------------------------------------------------------


def test_a_difference_in_integers_raises() -> None:
    with pytest.raises(MismatchError):
        both(lambda x: x.argmax(-1), lambda x: x.argmin(-1), X)


def test_a_difference_in_booleans_raises() -> None:
    with pytest.raises(MismatchError):
        both(lambda x: x > 0, lambda x: x <= 0, X)


def test_a_difference_in_shape_raises() -> None:
    with pytest.raises(MismatchError):
        both(lambda x: x.sum(-1), lambda x: x.sum(-1).expand(2, 3), X)


def test_a_difference_in_what_is_written_back_raises() -> None:
    def write(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        def run(x: Tensor, seen: Tensor) -> Tensor:
            seen.copy_(change(x))
            return x.exp()

        return run

    with pytest.raises(MismatchError):
        both(write(lambda x: x), write(lambda x: x.flip(-1)), X, X.clone())


def test_complex_results_are_compared() -> None:
    with pytest.raises(MismatchError):
        both(lambda x: torch.fft.fft(x), lambda x: torch.fft.fft(x.flip(-1)), X)


def test_empty_results_and_none_are_no_difference() -> None:
    verdict = both(lambda x: (x[:0], None, 3), lambda x: (x[:0], None, 3), X)
    assert verdict.startswith("verified")


# -- when it is not done ---------------------------------------------------------------------------


def test_random_numbers_are_not_verified() -> None:
    run: Callable[[Tensor], Tensor] = lambda x: x * torch.rand(4)  # noqa: E731
    assert both(run, run, X) == "not verified: rand draws random numbers"


def test_large_graphs_are_not_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "LIMIT", 11)
    run: Callable[[Tensor], Tensor] = lambda x: x.exp()  # noqa: E731
    assert both(run, run, X) == "not verified: the graph computes 12 numbers, over 11"


def test_a_graph_on_another_device_is_not_verified() -> None:
    run: Callable[[Tensor], Tensor] = lambda x: x.exp()  # noqa: E731
    captured = traced(run, torch.ones(3, device="meta"))
    assert compare(captured, captured, [X], set()).startswith("not verified")


def test_what_reads_the_bits_of_numbers_is_not_verified() -> None:
    def run(x: Tensor, w: Tensor) -> Tensor:
        return (x @ w) + x.view(torch.int32).abs()  # twice as many in float64

    captured = traced(run, torch.ones(3, 4), torch.ones(4, 4))
    assert compare(captured, captured, [X, torch.ones(4, 4)], set()).startswith("not verified")


def test_a_graph_that_rounds_to_half_precision_is_not_a_mismatch() -> None:
    """Autocast: the order of a sum shows in bfloat16, whatever the inputs are."""

    def run(order: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda x, w: order(x.bfloat16()) @ order(w.bfloat16()).t()

    x, w = torch.randn(256, 1024), torch.randn(256, 1024)
    verdict = both(run(lambda t: t), run(lambda t: t.flip(-1)), x, w, frozen=(1,))
    assert "verified" in verdict


def test_symbolic_sizes_are_read_without_fixing_them() -> None:
    mode = FakeTensorMode(shape_env=ShapeEnv())
    assert mode.shape_env is not None
    fake = mode.from_tensor(torch.ones(5, 4), static_shapes=False)
    size = fake.shape[0]
    assert isinstance(size, torch.SymInt)

    captured = trace_aten(lambda n, x: x.exp() * n, [size, fake])
    assert compare(captured, captured, [size, torch.ones(5, 4)], set()).startswith("verified")
    assert mode.shape_env.guards == []


# -- what is widened, and what is compared ---------------------------------------------------------


def test_tensors_made_inside_and_constants_are_float64_too() -> None:
    constant = torch.tensor([0.1, 0.2, 0.3, 0.4])

    def run(x: Tensor) -> Tensor:
        return (x @ torch.eye(4)).index_put((torch.tensor([1]),), constant) + torch.ones(4)

    assert both(run, run, X).startswith("verified in float64")
    with pytest.raises(MismatchError):
        both(run, lambda x: run(x) * (1 + 1e-7), X)
    assert constant.dtype is torch.float32


def attend(x: Tensor, dropout: float) -> Tensor:
    q = x.view(1, 1, 3, 4)
    return torch.nn.functional.scaled_dot_product_attention(q, q, q, dropout_p=dropout)


def test_attention_without_dropout_draws_nothing() -> None:
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    module = traced(lambda x: attend(x, 0.0), X)
    assert module.graph.find_nodes(op="call_function", target=attention)
    assert both(lambda x: attend(x, 0.0), lambda x: attend(x, 0.0), X).startswith("verified")
    with pytest.raises(MismatchError):
        both(lambda x: attend(x, 0.0), lambda x: attend(x, 0.0).flip(-1), X)
    verdict = both(lambda x: attend(x, 0.5), lambda x: attend(x, 0.5), X)
    assert verdict.startswith("not verified") and "random" in verdict


def test_inputs_keep_the_strides_that_views_rely_on() -> None:
    x = torch.ones(2, 3, 4, 5).to(memory_format=torch.channels_last)

    def run(x: Tensor) -> Tensor:
        return x.permute(0, 2, 3, 1).view(40, 3).exp()

    assert both(run, run, x).startswith("verified in float64")
    with pytest.raises(MismatchError):
        both(run, lambda x: run(x).flip(-1), x)
