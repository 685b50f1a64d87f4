"""What every net of the zoo is made of, and the dense reference that it is compared with.

In every net ``free`` makes linears whose rows and columns absorb any map, and ``shuffled`` those
that have a random map of their own. ``gathers`` says how many maps have to stay a gather when the
shuffled layers run on sparse kernels and everything that can be proved is folded: fewer is a fold
that was not proved. ``today`` says how many the present passes leave, where that is more.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from padst_compiler.convolution import SparseConv2d
from padst_compiler.index_map import IndexMap
from padst_compiler.layers import SparseLayer, SparseLinear, SparsePointwiseConv, sparse_layers
from padst_compiler.permutation import FixedPermutation
from padst_compiler.structures import (
    NM,
    Block,
    Diagonal,
    FanIn,
    Shape,
    Structure,
    Unstructured,
)

D = 16
STRUCTURES: tuple[Structure, ...] = (Block(4), NM(m=8), Diagonal(), FanIn(), Unstructured())


class Each(NamedTuple):
    """One count for each structure; fan-in and unstructured layers absorb every map."""

    block: int = 0
    nm: int = 0
    diagonal: int = 0


Counts = int | Each


class Net(nn.Module):
    """Layers to build from; ``structure`` is that of the shuffled ones.

    Attributes:
        gathers: that must remain; one number is for blocks, N:M and diagonals alike.
        today: that the present passes leave; None for the same.
        why: what makes them remain.
        whole: whether Dynamo captures one graph.
        random: whether it draws random numbers in inference too.
        tolerance: between folded and eager results in float64.
    """

    shape: tuple[int, ...] = (9, D)
    gathers: Counts = 0
    today: Counts | None = None
    why: str = ""
    whole = True
    random = False
    tolerance = 1e-9

    def __init__(self, structure: Structure) -> None:
        super().__init__()
        self.structure = structure
        self.build()

    def build(self) -> None:
        self.a, self.r = self.free(D, D), self.shuffled(D, D)

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.randn(self.shape, dtype=dtype),)

    def free(self, inputs: int, outputs: int, bias: bool = True) -> Any:
        if isinstance(self.structure, Diagonal):  # now and then the writer is dense
            return nn.Linear(inputs, outputs, bias)
        return adopted(nn.Linear(inputs, outputs, bias), FanIn(), "input", None)

    def shuffled(
        self,
        inputs: int,
        outputs: int,
        side: str = "input",
        bias: bool = True,
        table: Tensor | None = None,
    ) -> Any:
        size = inputs if side == "input" else outputs
        table = torch.randperm(size) if table is None else table
        return adopted(nn.Linear(inputs, outputs, bias), self.structure, side, table)

    def convolution(
        self, inputs: int = D, outputs: int = D, shuffled: bool = False, table: Tensor | None = None
    ) -> Any:
        conv = nn.Conv2d(inputs, outputs, 1)
        if not shuffled:
            return adopted(conv, FanIn(), "input", None)
        table = torch.randperm(inputs) if table is None else table
        return adopted(conv, self.structure, "input", table)


def adopted(module: nn.Module, structure: Structure, side: str, table: Tensor | None) -> Any:
    """Make a dense module sparse, with 3 of 4 weights zero."""
    kind: type[SparseLayer] = SparseLinear
    if isinstance(module, nn.Conv2d):
        kind = SparsePointwiseConv if set(module.kernel_size) == {1} else SparseConv2d
    shape = Shape(*kind.matrix_of(module).shape)
    permutation = None if table is None else FixedPermutation(IndexMap.of(table))
    scores = torch.rand(shape.out_features, shape.in_features)
    indices = structure.select(scores, structure.kept(shape, 0.75))
    return kind.adopt(module, structure, indices, permutation, side)


def within(size: int, group: int) -> Tensor:
    """Return a random map of ``size`` features that moves them within groups, in each alike."""
    return (torch.arange(0, size, group)[:, None] + torch.randperm(group)).flatten()


def across(size: int, group: int) -> Tensor:
    """Return a random map of ``size`` features that moves whole groups."""
    return (torch.randperm(size // group)[:, None] * group + torch.arange(group)).flatten()


def partwise(*sizes: int) -> Tensor:
    """Return random maps side by side: each part stays where it is."""
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    return torch.cat([s + torch.randperm(n) for s, n in zip(starts, sizes, strict=True)])


def expected(counts: Counts, structure: Structure) -> int:
    """Return how many gathers are meant for a structure."""
    each = Each(counts, counts, counts) if isinstance(counts, int) else counts
    return int(getattr(each, structure.name, 0))


def nets(base: type[Net] = Net) -> Iterator[type[Net]]:
    """Yield every net that is defined: all subclasses but those with an underscore."""
    for net in base.__subclasses__():
        if not net.__name__.startswith("_"):
            yield net
        yield from nets(net)


def reference(model: nn.Module) -> nn.Module:
    """Return a copy in float64 whose sparse layers are dense: ``W = S P`` by index arithmetic."""
    dense = copy.deepcopy(model).double()
    for name, layer in sparse_layers(dense).items():
        parent, _, last = name.rpartition(".")
        setattr(dense.get_submodule(parent), last, _dense(layer))
    return dense


def _dense(layer: SparseLayer) -> Any:
    matrix = layer.matrix().detach().clone()
    if isinstance(layer.permutation, FixedPermutation):
        order = layer.permutation.perm
        if layer.side == "output":
            matrix = torch.stack([matrix[int(row)] for row in order])
        else:
            moved = torch.empty_like(matrix)
            for column, source in enumerate(order.tolist()):
                moved[:, source] = matrix[:, column]
            matrix = moved
    module: Any = nn.Linear(1, 1)
    if not isinstance(layer, nn.Linear):
        conv: Any = layer
        module = nn.Conv2d(
            conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding
        )
        matrix = matrix.reshape(module.weight.shape)
    module.weight = nn.Parameter(matrix)
    module.bias = layer.bias
    module.train(layer.training)
    return module
