import sympy
import torch
from torch import fx

from padst_compiler.index_map import IndexMap
from padst_compiler.passes.folding.pieces import pieces
from padst_compiler.passes.folding.problem import Edge
from padst_compiler.passes.folding.spaces import Axis, Space, leaves

NODE = fx.Graph().placeholder("x")


def edge(source: Axis, target: Axis, perm: list[int]) -> Edge:
    return Edge(NODE, source, target, IndexMap.of(perm), 12.0)


def sizes(axis: Axis) -> list[object]:
    return [space.size for space in leaves(axis)]


def test_a_map_that_keeps_the_parts_falls_into_one_a_part() -> None:
    source, target = (Space(2), Space(4)), (Space(6),)
    one, two = pieces([edge(source, target, [1, 0, 5, 2, 3, 4])])
    assert [part.perm.perm.tolist() for part in (one, two)] == [[1, 0], [3, 0, 1, 2]]
    assert (one.source, two.source) == ((source[0],), (source[1],))
    assert (*one.target, *two.target) == leaves(target)
    assert (one.bytes, two.bytes) == (4.0, 8.0)


def test_a_map_that_mixes_the_parts_stays_one() -> None:
    source, target = (Space(2), Space(4)), (Space(6),)
    given = edge(source, target, [2, 0, 1, 3, 4, 5])
    assert pieces([given]) == [given]
    assert sizes(target) == [6]


def test_a_cut_goes_on_along_the_maps() -> None:
    middle, end = (Space(4),), (Space(4),)
    first = edge((Space(2), Space(2)), middle, [1, 0, 2, 3])
    assert len(pieces([edge(middle, end, [0, 1, 3, 2]), first])) == 4
    assert sizes(end) == [2, 2]


def test_a_space_that_stands_twice_is_cut_once() -> None:
    half, target = Space(2), (Space(4),)
    one, two = pieces([edge((half, half), target, [1, 0, 3, 2])])
    assert one.source == two.source == (half,)
    assert torch.equal(one.perm.perm, two.perm.perm)


def test_what_has_no_number_for_its_size_is_not_cut() -> None:
    source = (Space(sympy.Symbol("s")), Space(2))
    given = edge(source, (Space(4),), [1, 0, 2, 3])
    assert pieces([given]) == [given]
