"""What an operand is made of is checked by building it from what ``find_operand`` says of it."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensorMode

from padst_compiler.compat import trace_aten
from padst_compiler.dense_operand import (
    Map,
    Operand,
    find_operand,
    follow,
    readers,
    structure_of,
    undo,
)
from padst_compiler.structures import Block, FanIn, Shape, Structure

O, I = 12, 8  # noqa: E741
permute: Callable[..., Tensor] = torch.ops.padst.permute
inverse: Callable[..., Tensor] = torch.ops.padst.invert


def captured(function: Callable[..., Tensor], *tensors: Tensor) -> tuple[fx.Node, fx.Interpreter]:
    """Return the node that ``function`` returns, and an interpreter that has run."""
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(t) for t in tensors]
    module = trace_aten(function, fakes, functional=True)
    runner = fx.Interpreter(module, garbage_collect_values=False)
    runner.run(*tensors)
    output = next(n for n in module.graph.nodes if n.op == "output")
    (result,) = output.all_input_nodes
    return result, runner


def gathered(matrix: Tensor, maps: Sequence[Map], env: dict[fx.Node, Tensor]) -> Tensor:
    for one in maps:
        perm = env[one.perm]
        matrix = matrix[:, perm.argsort() if one.inverted else perm]
    return matrix


def built(operand: Operand, env: dict[fx.Node, Tensor]) -> Tensor:
    """Return the operand from its base, by the words of ``Operand`` alone."""
    matrix = env[operand.base]
    if matrix.dim() == 3:
        return matrix.mT if operand.flipped else matrix
    matrix = gathered(matrix, operand.columns, env)
    matrix = gathered(matrix.t(), operand.rows, env).t()
    end = operand.start + operand.batch * operand.height
    matrix = matrix[operand.start : end]
    if operand.batch > 1:
        matrix = matrix.view(operand.batch, operand.height, -1)
    matrix = matrix.mT if operand.flipped else matrix
    return matrix if operand.cast is None else matrix.to(operand.cast.meta["val"].dtype)


Function = Callable[[Tensor, Tensor, Tensor], Tensor]
FOUND: dict[str, Function] = {
    "itself": lambda w, p, q: w * 1,
    "transposed": lambda w, p, q: (w * 1).t(),
    "twice": lambda w, p, q: (w * 1).t().t(),
    "rows": lambda w, p, q: (w * 1)[4:8],
    "rows, transposed": lambda w, p, q: (w * 1)[4:8].t(),
    "stacked": lambda w, p, q: (w * 1).view(3, 4, I),
    "stacked, transposed": lambda w, p, q: (w * 1).view(3, 4, I).mT,
    "one of a stack": lambda w, p, q: (w * 1).view(3, 4, I)[1].t(),
    "a chunk": lambda w, p, q: (w * 1).chunk(3)[1],
    "a split, transposed": lambda w, p, q: (w * 1).split([4, 8])[1].t(),
    "unbound": lambda w, p, q: (w * 1).view(3, 4, I).unbind()[2],
    "an axis of one": lambda w, p, q: (w * 1).unsqueeze(0).expand(5, -1, -1),
    "columns moved": lambda w, p, q: permute(w * 1, p),
    "columns moved back": lambda w, p, q: permute(w * 1, inverse(p)),
    "rows moved": lambda w, p, q: permute((w * 1).t(), q).t(),
    "both": lambda w, p, q: permute(permute(w * 1, p).t(), inverse(q)),
    "moved twice": lambda w, p, q: permute(permute(w * 1, p), inverse(inverse(p))),
    "cast": lambda w, p, q: (w * 1).float(),
    "moved, cast, transposed": lambda w, p, q: permute(w * 1, p).float().t(),
    "cast, moved": lambda w, p, q: permute((w * 1).float(), p),
    "a slice behind a map": lambda w, p, q: permute(w * 1, p)[4:8],
    "copied": lambda w, p, q: permute((w * 1).t().contiguous(), q).clone(),
}


@pytest.mark.parametrize("name", FOUND)
def test_an_operand_is_what_is_said_of_it(name: str) -> None:
    weight = torch.randn(O, I, dtype=torch.float64)
    node, runner = captured(FOUND[name], weight, torch.randperm(I), torch.randperm(O))
    operand = find_operand(node)
    assert operand is not None
    assert operand.base.target is torch.ops.aten.mul.Tensor
    result = built(operand, runner.env)
    given = runner.env[node]
    given = given[0] if given.dim() > result.dim() else given
    assert torch.equal(result, given)
    assert operand.whole == (operand.height == O)


NONE: dict[str, Function] = {
    "two casts": lambda w, p, q: (w * 1).float().double(),
    "a part, cast": lambda w, p, q: (w * 1)[4:8].float(),
    "every other row": lambda w, p, q: (w * 1)[::2],
    "columns": lambda w, p, q: (w * 1)[:, 2:6],
    "a chunk of columns": lambda w, p, q: (w * 1).chunk(2, dim=1)[1],
    "other rows": lambda w, p, q: (w * 1).view(6, 16),
    "four axes": lambda w, p, q: (w * 1).view(3, 2, 2, I),
    "one axis": lambda w, p, q: (w * 1).view(-1),
    "a row": lambda w, p, q: (w * 1)[3],
    "a stack the other way": lambda w, p, q: (w * 1).view(3, 4, I).transpose(0, 1),
    "rows of what moved": lambda w, p, q: permute((w * 1).t(), q).t()[4:8],
    "a part of the transpose": lambda w, p, q: permute((w * 1).t(), q)[2:4],
}


@pytest.mark.parametrize("name", NONE)
def test_what_is_no_such_matrix_is_none(name: str) -> None:
    weight = torch.randn(O, I, dtype=torch.float64)
    node, runner = captured(NONE[name], weight, torch.randperm(I), torch.randperm(O))
    operand = find_operand(node)
    if operand is not None:  # the node itself, which is no view of a weight
        assert operand.base is node or torch.equal(built(operand, runner.env), runner.env[node])


def test_batched_products_are_one_matrix_of_all_rows() -> None:
    a, b = torch.randn(3, 4, 5), torch.randn(3, 5, I)
    node, runner = captured(lambda a, b: torch.bmm(a, b).view(12, I), a, b)
    operand = find_operand(node)
    assert operand is not None and (operand.batch, operand.height) == (3, 4)
    assert torch.equal(runner.env[operand.base].view(12, I), runner.env[node])
    node, _ = captured(lambda a, b: torch.bmm(a, b).view(6, 2 * I), a, b)
    assert find_operand(node) is None


def test_unknown_sizes_are_none() -> None:
    graph = fx.Graph()
    assert find_operand(graph.placeholder("x")) is None


def test_maps_are_followed_and_undone() -> None:
    graph = fx.Graph()
    one, two = Map(graph.placeholder("p")), Map(graph.placeholder("q"), inverted=True)
    tensors, x = [torch.randperm(I), torch.randperm(I)], torch.randn(3, I)
    there = follow(x, (one, two), tensors)
    assert torch.equal(there, x[:, tensors[0]][:, tensors[1].argsort()])
    assert torch.equal(follow(there, undo((one, two)), tensors[::-1]), x)


def test_readers_stand_behind_views_and_maps() -> None:
    def run(w: Tensor, p: Tensor) -> Tensor:
        w = w * 1
        return permute(w.t().contiguous(), p).t().sum() + w.view(-1).mean() + w.chunk(2)[1].exp()

    node, _ = captured(run, torch.randn(O, I), torch.randperm(O))
    source = next(n for n in node.graph.nodes if n.target is torch.ops.aten.mul.Tensor)
    said = {getattr(user.target, "overloadpacket", None) for user in readers(source)}
    aten = torch.ops.aten
    assert said == {aten.clone, aten.mean, aten.exp}
    moved = next(n for n in node.graph.nodes if n.target is torch.ops.padst.permute.default)
    assert [getattr(u.target, "overloadpacket", None) for u in readers(moved)] == [aten.sum]


@pytest.mark.parametrize("structure", [Block(4), Block(2, 4), FanIn()], ids=str)
def test_the_structure_of_a_weight_is_read_from_its_storage(structure: Structure) -> None:
    shape = Shape(O, I)
    indices = structure.select(torch.rand(O, I), structure.kept(shape, 0.5))
    values = structure.pack(torch.randn(O, I), indices)
    unit = list(values.shape[indices.dim() :])
    name = structure.name
    for made in (
        lambda v, i: torch.ops.padst.unpack(v, i, name, O, I),
        lambda v, i: torch.ops.padst.pack(torch.ops.padst.unpack(v, i, name, O, I), i, name, unit),
    ):
        node, _ = captured(made, values, indices)
        assert structure_of(node) == structure
