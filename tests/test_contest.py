import dataclasses

import pytest
import torch
from torch import Tensor

from padst_compiler.contest import Contest, Measured
from padst_compiler.formulation import Geometry
from padst_compiler.kernels import CANDIDATES
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure, Unstructured

FORMS = (Block(8), NM(8), Diagonal(), FanIn(), Unstructured(), Block(4, 8, balanced=False))
KINDS = {"linear": LINEAR, "dx": LINEAR_DX, "dw": LINEAR_DW}
SHAPE = Shape(48, 32)


def contest(
    structure: Structure,
    kind: str = "linear",
    dtype: torch.dtype = torch.float32,
    tokens: int = 70,
    bias: bool = False,
    shape: Shape = SHAPE,
) -> Contest:
    op = KINDS[kind][structure.name]
    kept = structure.kept(shape, 0.75)
    geometry = Geometry(structure, shape, kept, tokens, dtype, "cpu", frozen=kind == "linear")
    ways = [way for way in CANDIDATES[op] if way.cost(geometry) is not None]
    return Contest(op, geometry, bias, tuple(ways))


@pytest.mark.parametrize("structure", FORMS, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [SHAPE, Shape(32, 48)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_every_formulation_is_right_on_the_arguments(
    structure: Structure, kind: str, shape: Shape, dtype: torch.dtype
) -> None:
    made = contest(structure, kind, dtype, bias=kind == "linear", shape=shape)
    arguments = made.arguments()
    op = made.op(*arguments)
    assert op.dtype is dtype
    assert made.is_right(arguments, op)
    for way in made.ways:
        assert made.is_right(arguments, way.run(*arguments)), way.name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_wrong_is_seen(kind: str, dtype: torch.dtype) -> None:
    made = contest(Block(8), kind, dtype)
    arguments = made.arguments()
    right = made.op(*arguments)
    missing, unwritten = right.clone(), right.clone()
    missing[-1] = 0.0  # the last tokens of an uneven number, or the last blocks
    unwritten.flatten()[0] = float("nan")
    wrong: list[Tensor] = [missing, unwritten, 1.2 * right, right.roll(1, -1), right[..., :-1]]
    for result in (*wrong, right.double()):
        assert not made.is_right(arguments, result)


def test_arguments_are_the_same_every_time_and_leave_the_global_generator() -> None:
    state = torch.get_rng_state()
    one, two = (contest(FanIn(), bias=True).arguments() for _ in range(2))
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert torch.equal(torch.get_rng_state(), state)


def test_a_bias_only_where_the_operator_has_one() -> None:
    for bias in (False, True):
        assert (contest(FanIn(), bias=bias).arguments()[3] is not None) is bias


@pytest.mark.parametrize("tokens", [1, 2, 64, 65, 1000])
def test_the_last_row_is_compared_for_any_number_of_tokens(tokens: int) -> None:
    made = contest(FanIn(), tokens=tokens)
    arguments = made.arguments()
    result = made.op(*arguments)
    assert made.is_right(arguments, result)
    result[-1] = 0.0
    assert not made.is_right(arguments, result)


def test_alike_sites_are_one_contest_and_say_so_without_addresses() -> None:
    one, two = contest(Block(8)), contest(Block(8))
    assert {one, two} == {one}
    others = [
        contest(Block(8), bias=True),
        contest(Block(8), tokens=71),
        contest(Block(8), "dx"),
        contest(Block(8), dtype=torch.bfloat16),
        contest(Block(16)),
        dataclasses.replace(one, geometry=dataclasses.replace(one.geometry, frozen=False)),
    ]
    assert len({repr(c) for c in (one, *others)}) == 7 == len({one, *others})
    assert "0x" not in repr(one)
    assert str(one) == "block_linear 48x32, 70 tokens"


@pytest.mark.parametrize(
    ("seconds", "low", "cached", "said"),
    [
        (0.42e-3, 2.9, True, "timed 3.1x dense (0.420 against 1.300 ms), cached"),
        (1.4e-3, 0.9, False, "timed 0.93x dense (1.400 against 1.300 ms)"),
        (1.25e-3, 0.98, False, "timed 1.04x dense (1.250 against 1.300 ms), within the noise"),
        (1.25e-3, 1.01, False, "timed 1.04x dense (1.250 against 1.300 ms)"),
    ],
)
def test_a_comparison_in_words(seconds: float, low: float, cached: bool, said: str) -> None:
    measured = Measured({"a": seconds, "dense": 1.3e-3}, {"a": low}, {}, cached)
    assert measured.against("a") == said
    assert measured.is_faster("a") is (low > 1.0)
    assert not measured.is_faster("dense")
