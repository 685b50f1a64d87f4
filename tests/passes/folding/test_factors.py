import math

import pytest
import sympy
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from padst_compiler.passes.folding.factors import (
    Dims,
    Factor,
    Field,
    fields_of,
    fresh,
    regroup,
    renewed,
    settled,
)
from padst_compiler.passes.folding.spaces import leaves


def described(dims: Dims, sources: dict[int, int]) -> list[list[tuple[int, int, int]]]:
    """Return for every dimension (source dimension, stride in it, size) of its factors."""
    found = []
    for factors in dims:
        mine = []
        for factor in factors:
            (space,) = leaves(factor.field.axis)
            sizes = factor.field.sizes[factor.at + 1 :]
            assert isinstance(factor.size, int) and all(isinstance(n, int) for n in sizes)
            mine.append((sources[id(space)], math.prod(map(int, sizes)), factor.size))
        found.append(mine)
    return found


def rebuilt(dims: Dims, sources: dict[int, int], shape: list[int], rank: int) -> Tensor:
    """Return the tags that the factors say: the position along every source dimension."""
    tags = torch.zeros(*shape, rank, dtype=torch.int64)
    for at, factors in enumerate(described(dims, sources)):
        place = torch.arange(shape[at]).view([-1 if d == at else 1 for d in range(len(shape))])
        below = 1
        for source, stride, size in reversed(factors):
            tags[..., source] += place // below % size * stride
            below *= size
    return tags


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[int], list[tuple[str, list[int]]]]:
    shape = draw(st.lists(st.sampled_from([1, 2, 3, 4, 6, 8]), min_size=1, max_size=4))
    now, made = list(shape), []
    for _ in range(draw(st.integers(1, 5))):
        if draw(st.booleans()):
            order = draw(st.permutations(range(len(now))))
            made.append(("permute", list(order)))
            now = [now[at] for at in order]
        else:
            rest = math.prod(now)
            new: list[int] = []
            while rest > 1 and len(new) < 4:
                size = draw(st.sampled_from([n for n in range(1, rest + 1) if rest % n == 0]))
                new.append(size)
                rest //= size
            new.append(rest)
            made.append(("view", new))
            now = new
    return shape, made


@given(steps())
def test_factors_describe_what_views_and_transpositions_do(
    case: tuple[list[int], list[tuple[str, list[int]]]],
) -> None:
    shape, made = case
    tags = torch.stack(torch.meshgrid(*map(torch.arange, shape), indexing="ij"), dim=-1)
    dims: Dims | None = fresh(shape)
    assert dims is not None
    sources = {id(d[0].field.axis[0]): at for at, d in enumerate(dims) if d}
    for kind, argument in made:
        if kind == "permute":
            tags = tags.permute(*argument, len(argument))
            dims = tuple(dims[at] for at in argument)
        else:
            tags = tags.reshape(*argument, len(shape))
            dims = regroup(dims, argument)
            if dims is None:
                return  # no factors say it, and so nothing is said
        assert torch.equal(rebuilt(dims, sources, list(tags.shape[:-1]), len(shape)), tags)
        assert [math.prod(int(f.size) for f in d) for d in dims] == list(tags.shape[:-1])


@pytest.mark.parametrize(
    ("shape", "new"),
    [([4, 6], [6, 4]), ([4, 6], [3, 8]), ([5], [2, 2]), ([0, 6], [0, 2, 3]), ([4, 0], [2, 0])],
)
def test_what_no_factors_say_is_refused(shape: list[int], new: list[int]) -> None:
    assert regroup(fresh(shape), new) is None


def test_heads_and_back_are_one_field_again() -> None:
    dims = fresh([5, 12])
    heads = regroup(dims, [5, 3, 4])
    assert heads is not None and not heads[1][0].is_whole
    assert heads[1][0].field is heads[2][0].field
    back = regroup(heads, [5, 12])
    assert back is not None and back[1][0].is_whole
    assert leaves(back[1][0].field.axis) == leaves(dims[1][0].field.axis)
    swapped = regroup((heads[0], heads[2], heads[1]), [5, 12])
    assert swapped is not None and len(swapped[1]) == 2  # a channel shuffle is no axis


def test_symbols_pass_through_views() -> None:
    n = sympy.Symbol("n", integer=True, positive=True)
    merged = regroup(fresh([n, 3, 8]), [3 * n, 8])
    assert merged is not None and len(merged[0]) == 2
    split = regroup(merged, [n, 3, 2, 4])
    assert split is not None and [[f.size for f in d] for d in split] == [[n], [3], [2], [4]]
    assert regroup(fresh([n, 8]), [2, sympy.Rational(1, 2) * n, 8]) is None


def test_renewed_dims_have_fields_of_their_own_in_the_same_order() -> None:
    dims = regroup(fresh([12]), [3, 4])
    assert dims is not None
    copy = renewed(dims)
    assert not set(fields_of(dims)) & set(fields_of(copy))
    assert all(a[0].same(b[0]) for a, b in zip(dims, copy, strict=True))


def test_settled_joins_only_neighbours_in_order() -> None:
    (axis,) = (d[0].field.axis for d in fresh([24]))
    field = Field(axis, (2, 3, 4))
    a, b, c = (Factor(field, at) for at in range(3))
    assert settled(((a, b, c),))[0][0].is_whole
    for dims in (((a, b), (c,)), ((b, a, c),), ((a, c, b),), ((a,), (b,))):
        assert settled(dims) == dims
    assert fields_of(((a, c), (b,))) == {field: [0, 2, 1]}
    with pytest.raises(AssertionError):
        _ = field.whole
