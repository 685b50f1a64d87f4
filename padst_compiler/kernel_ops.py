"""Operators that kernels run: storage laid out for them, and maps that they read and write through.

================================================  ===============================================
``<structure>_linear_mapped(x, values, indices,   the structured operator without bias on
width, in_map, out_map)``                         ``x[..., in_map]``, of it ``y[..., out_map]``;
                                                  ``<structure>_linear_dx_mapped`` too
``gathered_sums(x, weights, inputs, in_map,       ``y[t, o] = sum_k weights[o, k] *
out_map)``                                        x[t, inputs[o, k]]``
``picked_sums(x, weights, places, groups,         slot k of output n picks input ``places`` of its
in_map, out_map)``                                group of inputs; ``(o/n, slots, n)`` both
``diagonal_sums(x, weights, places, starts,       crossing j adds ``weights[j] * x[places[j]:][:n]``
width, in_map, out_map)``                         to the n outputs of its tile. Tiles begin at
                                                  ``starts``, and x has n zeros on either side;
                                                  or, without, tiles are alike and x wraps around
``block_mlp(x, values1, indices1, bias1,          two layers of blocks, ``hidden`` features between
values2, indices2, hidden, width, activation,     them: ``activation`` is a name of
in_map, out_map)``                                ``activation.py``, the second has no bias
``block_pairs``, ``block_pairs_dx``               blocks of 16-bit numbers: see ``pairs_ops.py``
``..._into(..., in_map, into)``                   the same as an operator with maps, output n stored
                                                  at ``into[n]``: GPUs store through the inverse
================================================  ===============================================

Formulations put them into a graph in the place of structured operators; none has a gradient. Here
each is plain PyTorch, on any device: what runs where no kernel does, and the truth for ``verify``.

Example:
    >>> x = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    >>> weights, places = torch.ones(1, 2, 3), torch.tensor([[[0, 1, 1], [1, 0, 1]]])
    >>> torch.ops.padst.picked_sums(x, weights, places, 2, None, None).tolist()
    [[5.0, 5.0, 6.0]]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from padst_compiler.activation import ACTIVATIONS
from padst_compiler.index_map import invert
from padst_compiler.ops import LINEAR, LINEAR_DX
from padst_compiler.pairs_ops import BLOCK_PAIRS, BLOCK_PAIRS_DX, moved

__all__ = [
    "BLOCK_MLP",
    "DIAGONAL_SUMS",
    "GATHERED_SUMS",
    "INTO",
    "IN_MAP",
    "MAPPED",
    "PICKED_SUMS",
]


def _picked_sums(
    x: Tensor,
    weights: Tensor,
    places: Tensor,
    groups: int,
    in_map: Tensor | None,
    out_map: Tensor | None,
) -> Tensor:
    x = moved(x, in_map)
    weights, columns = (t.transpose(1, 2).flatten(0, 1) for t in (weights, places.long()))
    slots, inputs = weights.shape[1], x.shape[-1]
    columns = columns + torch.arange(slots, device=x.device) // (slots // groups) * (
        inputs // groups
    )
    dense = weights.new_zeros(weights.shape[0], inputs).scatter_add_(1, columns, weights)
    return moved(x @ dense.t(), out_map)


def _diagonal_sums(
    x: Tensor,
    weights: Tensor,
    places: Tensor,
    starts: Tensor | None,
    width: int,
    in_map: Tensor | None,
    out_map: Tensor | None,
) -> Tensor:
    x = moved(x, in_map)
    count, n = weights.shape
    tiles, inputs = width // n, x.shape[-1]
    along, each = torch.arange(n, device=x.device), torch.arange(count, device=x.device)
    if starts is None:
        tile = each // (count // tiles)
    else:
        tile = torch.searchsorted(starts, each, right=True) - 1
    rows = tile[:, None] * n + along
    columns = places.long()[:, None] + along
    if starts is not None:
        around = inputs + 2 * n
        x = torch.nn.functional.pad(x, (n, n))
    else:
        around, columns = inputs, columns % inputs
    dense = weights.new_zeros(tiles * n * around)
    dense.scatter_add_(0, (rows * around + columns).flatten(), weights.flatten())
    return moved(x @ dense.view(tiles * n, around).t(), out_map)


def _gathered_sums(
    x: Tensor, weights: Tensor, inputs: Tensor, in_map: Tensor | None, out_map: Tensor | None
) -> Tensor:
    x = moved(x, in_map)
    dense = weights.new_zeros(weights.shape[0], x.shape[-1])
    return moved(x @ dense.scatter_add_(1, inputs.long(), weights).t(), out_map)


def _block_mlp(
    x: Tensor,
    values1: Tensor,
    indices1: Tensor,
    bias1: Tensor | None,
    values2: Tensor,
    indices2: Tensor,
    hidden: int,
    width: int,
    activation: str,
    in_map: Tensor | None,
    out_map: Tensor | None,
) -> Tensor:
    linear = LINEAR["block"]
    y = ACTIVATIONS[activation](linear(moved(x, in_map), values1, indices1, bias1, hidden))
    return moved(linear(y, values2, indices2, None, width), out_map)


def _fake(x: Tensor, outputs: int, out_map: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs if out_map is None else out_map.shape[0]))


torch.library.custom_op(
    "padst::picked_sums",
    _picked_sums,
    mutates_args=(),
    schema="(Tensor x, Tensor weights, Tensor places, SymInt groups, Tensor? in_map, "
    "Tensor? out_map) -> Tensor",
).register_fake(
    lambda x, w, places, groups, in_map, out_map: _fake(x, w.shape[0] * w.shape[2], out_map)
)
torch.library.custom_op(
    "padst::diagonal_sums",
    _diagonal_sums,
    mutates_args=(),
    schema="(Tensor x, Tensor weights, Tensor places, Tensor? starts, SymInt width, "
    "Tensor? in_map, Tensor? out_map) -> Tensor",
).register_fake(lambda x, w, places, starts, width, in_map, out_map: _fake(x, width, out_map))
torch.library.custom_op(
    "padst::gathered_sums",
    _gathered_sums,
    mutates_args=(),
    schema="(Tensor x, Tensor weights, Tensor inputs, Tensor? in_map, Tensor? out_map) -> Tensor",
).register_fake(lambda x, w, inputs, in_map, out_map: _fake(x, w.shape[0], out_map))

torch.library.custom_op(
    "padst::block_mlp",
    _block_mlp,
    mutates_args=(),
    schema="(Tensor x, Tensor values1, Tensor indices1, Tensor? bias1, Tensor values2, "
    "Tensor indices2, SymInt hidden, SymInt width, str activation, Tensor? in_map, "
    "Tensor? out_map) -> Tensor",
).register_fake(
    lambda x, v1, i1, b1, v2, i2, hidden, width, activation, in_map, out_map: _fake(
        x, width, out_map
    )
)

BLOCK_MLP = torch.ops.padst.block_mlp.default
GATHERED_SUMS = torch.ops.padst.gathered_sums.default
PICKED_SUMS = torch.ops.padst.picked_sums.default
DIAGONAL_SUMS = torch.ops.padst.diagonal_sums.default

MAPPED: dict[torch._ops.OpOverload, torch._ops.OpOverload] = {}
"""What reads and writes through maps, by what does not."""


def _register_mapped(op: torch._ops.OpOverload, *bias: None) -> None:
    def mapped(
        x: Tensor,
        values: Tensor,
        indices: Tensor,
        width: int,
        in_map: Tensor | None,
        out_map: Tensor | None,
    ) -> Tensor:
        return moved(op(moved(x, in_map), values, indices, *bias, width), out_map)

    name = f"{op.name()}_mapped"
    torch.library.custom_op(
        name,
        mapped,
        mutates_args=(),
        schema="(Tensor x, Tensor values, Tensor indices, SymInt width, Tensor? in_map, "
        "Tensor? out_map) -> Tensor",
    ).register_fake(lambda x, v, i, width, in_map, out_map: _fake(x, width, out_map))
    MAPPED[op] = getattr(torch.ops.padst, name.removeprefix("padst::")).default


for _name in LINEAR:
    _register_mapped(LINEAR[_name], None)
    _register_mapped(LINEAR_DX[_name])

IN_MAP: dict[torch._ops.OpOverload, int] = dict.fromkeys(MAPPED.values(), 4)
"""The place of ``in_map`` among an operator's arguments; that of ``out_map`` is the next."""
IN_MAP |= {BLOCK_MLP: 9, GATHERED_SUMS: 3, PICKED_SUMS: 4, DIAGONAL_SUMS: 5}
IN_MAP |= dict.fromkeys((BLOCK_PAIRS, BLOCK_PAIRS_DX), 4)

INTO: dict[torch._ops.OpOverload, torch._ops.OpOverload] = {}
"""What stores through the inverse of ``out_map``, by what takes the map itself."""


def _register_into(op: torch._ops.OpOverload) -> None:
    def stored(*args: Any) -> Tensor:
        y: Tensor = op(*args[:-1], None if args[-1] is None else invert(args[-1]))
        return y

    name = f"{op.name()}_into"
    schema = str(op._schema).removeprefix(op.name()).replace("out_map", "into")
    form = torch.library.custom_op(name, stored, mutates_args=(), schema=schema)
    form.register_fake(lambda *args: op(*args))
    INTO[op] = getattr(torch.ops.padst, name.removeprefix("padst::")).default


for _op in (*MAPPED.values(), BLOCK_MLP):
    _register_into(_op)
    IN_MAP[INTO[_op]] = IN_MAP[_op]
