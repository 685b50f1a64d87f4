import pytest
from torch import fx

from padst_compiler.passes.folding.factors import Factor, fresh
from padst_compiler.passes.folding.refinement import Side, refined

NODE = fx.Graph().placeholder("x")


def side(*sizes: int) -> Side:
    return tuple(f for factors in fresh(sizes) for f in factors), NODE, 0


def sizes(factors: tuple[Factor, ...]) -> list[object]:
    return [f.size for f in factors]


@pytest.mark.parametrize(
    ("one", "two", "both"),
    [
        ([4], [2, 2], [2, 2]),
        ([2, 6], [4, 3], [2, 2, 3]),
        ([12], [12], [12]),
        ([8], [2, 2, 2], [2, 2, 2]),
    ],
)
def test_both_sides_get_the_same_sizes(one: list[int], two: list[int], both: list[int]) -> None:
    ((first, second),) = refined([(side(*one), side(*two))])
    assert sizes(first[0]) == sizes(second[0]) == both
    assert (first[1:], second[1:]) == ((NODE, 0), (NODE, 0))


def test_sizes_that_no_division_makes_equal_are_left() -> None:
    ((first, second),) = refined([(side(2, 3), side(3, 2))])
    assert (sizes(first[0]), sizes(second[0])) == ([2, 3], [3, 2])


def test_a_factor_is_divided_wherever_it_stands() -> None:
    four, (halves, other) = side(4), (side(2, 2), side(4))
    (one, _), (again, _) = refined([(four, halves), (four, other)])
    assert sizes(again[0]) == [2, 2]
    assert [f.field for f in one[0]] == [f.field for f in again[0]]
    assert len({f.field for f in one[0]}) == 1
