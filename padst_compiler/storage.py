"""How a sparse layer stores its weights: compact, and without the neurons that are ablated.

SRigL (arXiv 2305.02299, section 3) takes whole neurons out of a layer. The trainable ``values``
keep their object and their shape then, so optimisers and compiled graphs keep what they hold; only
their meaning changes. With ``rows (a,)``, the neurons that are left, the first ``a * k'`` numbers
are theirs, ``k' = floor(numbers / a)`` each; the few after them stay zero. What is computed shrinks
to a rows: an ablated neuron costs nothing and its output is its bias.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from padst_compiler.ops import LINEAR
from padst_compiler.selection import SoftSelection
from padst_compiler.structures import Shape, Structure
from padst_compiler.tensors import is_plain
from padst_compiler.topology import fault, width_of

__all__ = ["Packed", "Storage", "replace_data"]


class Packed(NamedTuple):
    """The stored part of a layer, in the structure's layout for the neurons that are left."""

    values: Tensor
    indices: Tensor
    shape: Shape


class Storage(nn.Module):
    """The stored weights of one sparse layer, and their product.

    ``rows`` (int64) names the neurons that are not ablated, None where all are there. ``selection``
    scales the units while they are chosen softly (DynaDiag), else None.
    """

    structure: Structure
    shape: Shape
    values: nn.Parameter
    indices: Tensor
    rows: Tensor | None
    selection: SoftSelection | None

    def packed(self, values: Tensor | None = None) -> Packed:
        """Return what is stored, without copies.

        Args:
            values: in the place of the layer's own, of the same shape.
        """
        values, rows = self.values if values is None else values, self.rows
        if rows is None:
            return Packed(values, self.indices, self.shape)
        active = Shape(rows.shape[0], self.shape.in_features)
        width = width_of(self.structure, self.indices.numel(), active)
        layout = self.structure.index_shape(active, width)
        used = math.prod(layout)
        parts = [tensor.reshape(-1)[:used].view(layout) for tensor in (values, self.indices)]
        return Packed(parts[0], parts[1], active)

    def structured(self, x: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """Return ``x S^T + bias``: ``(..., i) -> (..., o)``."""
        if self.selection is not None:
            values = self.selection(values)
        operator, out_features = LINEAR[self.structure.name], self.shape.out_features
        y: Tensor
        if self.rows is None:
            y = operator(x, values, self.indices, bias, out_features)
            return y
        values, indices, active = self.packed(values)
        part: Tensor = operator(x, values, indices, None, active.out_features)
        y = part.new_zeros(*part.shape[:-1], out_features).index_copy(-1, self.rows, part)
        return y if bias is None else y + bias

    def matrix(self, values: Tensor | None = None) -> Tensor:
        """Return S, the structured weight: ``(o, i)``, differentiable.

        Args:
            values: in the place of the layer's own, of the same shape.
        """
        values = self.values if values is None else values
        values = values if self.selection is None else self.selection(values)
        values, indices, active = self.packed(values)
        part = self.structure.unpack(values, indices, active)
        return part if self.rows is None else self._spread(part)

    def mask(self) -> Tensor:
        """Return where S may differ from zero: ``(o, i)``, bool."""
        _, indices, active = self.packed()
        part = self.structure.mask(indices, active)
        return part if self.rows is None else self._spread(part)

    def pack(self, matrix: Tensor) -> Tensor:
        """Return the numbers of ``matrix (o, i)`` under the mask, in the shape of ``values``."""
        _, indices, _ = self.packed()
        if self.rows is None:
            return self.structure.pack(matrix, indices)
        used = self.structure.pack(matrix[self.rows], indices)
        whole = used.new_zeros(self.values.numel())
        whole[: used.numel()] = used.reshape(-1)
        return whole.view(self.values.shape)

    @property
    def kept(self) -> int:
        """How many units each group of an active neuron keeps."""
        _, indices, active = self.packed()
        return self.structure.slots(indices, active).shape[1]

    @property
    def ablated(self) -> int:
        """How many neurons are ablated."""
        return 0 if self.rows is None else self.shape.out_features - self.rows.numel()

    @property
    def sparsity(self) -> float:
        """The fraction of zeros in the structured weight."""
        return 1.0 - self.packed().values.numel() / self.shape.numel

    def kept_units(self) -> Tensor:
        """Return the kept units of all neurons, ``indices`` with -1 for those of ablated ones."""
        _, indices, _ = self.packed()
        return indices if self.rows is None else self._spread(indices, fill=-1)

    @torch.no_grad()
    def store(self, indices: Tensor, rows: Tensor | None) -> None:
        """Take another topology, in place where its size stays; ``values`` are the caller's work.

        Args:
            indices: of the neurons that are left, in the structure's layout.
            rows: those neurons, ascending; None for all.
        """
        flat = self.indices.view(-1)
        flat[: indices.numel()] = indices.reshape(-1)
        flat[indices.numel() :] = 0
        if rows is None or self.rows is None or rows.shape != self.rows.shape:
            self.rows = rows
        else:
            self.rows.copy_(rows)

    def size(self) -> tuple[list[int], int | None, bool]:
        """Return the shape of ``indices``, how many neurons are left, whether units are soft."""
        left = None if self.rows is None else self.rows.numel()
        return list(self.indices.shape), left, self.selection is not None

    def resize(self, layout: Sequence[int], active: int | None, soft: bool) -> SoftSelection | None:
        """Make room for a topology of another size, whose numbers are loaded next.

        Args:
            layout: shape of ``indices``.
            active: number of neurons that are left; None for all.
            soft: whether the units are chosen softly still.

        Returns:
            The soft selection that the layer gave up, or None.
        """
        device, given_up = self.indices.device, None
        if tuple(self.indices.shape) != tuple(layout):
            shape = (*layout, *self.structure.unit(self.shape))
            replace_data(self.values, self.values.detach().new_zeros(shape))
            self.indices = torch.zeros(tuple(layout), dtype=self.indices.dtype, device=device)
        if not soft:
            given_up, self.selection = self.selection, None
        self.rows = None if active is None else torch.arange(active, device=device)
        return given_up

    def _spread(self, part: Tensor, fill: float = 0) -> Tensor:
        """Put the rows of ``part`` where they belong among all neurons."""
        assert self.rows is not None
        whole = part.new_full((self.shape.out_features, *part.shape[1:]), fill)
        return whole.index_copy(0, self.rows, part)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Make room for the neurons that a state has left; refuse a topology that is none."""
        given = f"{prefix}values" in state_dict
        rows = state_dict.get(f"{prefix}rows", None if given else self.rows)
        indices = state_dict.get(f"{prefix}indices", self.indices)
        if (wrong := self._fault(indices, rows)) is not None:
            error_msgs.append(
                f"{wrong} Load what a layer like {prefix.rstrip('.') or 'this'!r} saved."
            )
            for name in [name for name in state_dict if name.startswith(prefix)]:
                del state_dict[name]  # in place: children read from it next, and stay too
            state_dict.update(self.state_dict(prefix=prefix, keep_vars=True))
        elif given:
            self.rows = None if rows is None else rows.to(self.indices.device, copy=True)
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _fault(self, indices: Tensor, rows: Tensor | None) -> str | None:
        """Return what is wrong with a topology that has numbers; torch compares the shapes."""
        readable = all(is_plain(t) and not t.is_meta for t in (indices, rows) if t is not None)
        if not readable or indices.shape != self.indices.shape:
            return None
        return fault(self.structure, self.shape, indices, rows)


@torch.no_grad()
def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give ``parameter`` numbers of another shape; it stays the same object, without a gradient.

    Example:
        >>> weight = nn.Parameter(torch.ones(4))
        >>> replace_data(weight, torch.zeros(2))
        >>> weight.shape
        torch.Size([2])
    """
    parameter.grad = None
    # A graph of the last step that is still alive holds a gradient accumulator, which remembers
    # the old shape. Torch makes another one only where the type changes; so it changes, twice.
    other = torch.float64 if data.dtype != torch.float64 else torch.float32
    parameter.data = data.new_empty(0, dtype=other)
    parameter.data = data
