"""The sparse form of a k x k convolution: its weight, made anew from the stored numbers.

The structure acts on ``(o, i * kh * kw)``, the order in which a dense convolution's weight lies.
The weight is unpacked in each forward and torch convolves with it. A step took as long as a dense
one, and gathering patches (k^2 times the activations) for a sparse product 1.7 to 5.7 times as long
(64 to 256 channels, 90 %, one CPU core). Every option of ``nn.Conv2d`` stays, and only the stored
numbers have a gradient. While a recorder is armed, the gradient of the unpacked weight is the dense
gradient that it wants. Compute is that of a dense convolution, except for ablated neurons, which
leave it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from padst_compiler.index_map import invert
from padst_compiler.layers import SparseLayer
from padst_compiler.permutation import FixedPermutation
from padst_compiler.unpacking import dense_matrix, permuted, unpack

__all__ = ["SparseConv2d"]


class SparseConv2d(SparseLayer, nn.Conv2d):  # type: ignore[misc, override]
    """The sparse form of an ungrouped ``nn.Conv2d`` with a kernel larger than 1 x 1.

    A permutation acts on the ``i * kh * kw`` numbers of a patch, or on the output channels.

    Example:
        >>> from padst_compiler.structures import FanIn, Shape
        >>> conv = nn.Conv2d(4, 8, 3, padding=1)
        >>> kept = FanIn().select(conv.weight.detach().flatten(1), 9)
        >>> sparse = SparseConv2d.adopt(conv, FanIn(), kept, None, "input")
        >>> sparse(torch.ones(2, 4, 5, 5)).shape, sparse.values.shape
        (torch.Size([2, 8, 5, 5]), torch.Size([8, 9]))
    """

    @staticmethod
    def matrix_of(module: nn.Module) -> Tensor:
        """Return ``weight`` as ``(o, i * kh * kw)``."""
        assert isinstance(module, nn.Conv2d)
        return module.weight.detach().flatten(1)

    def dense_form(self, matrix: Tensor) -> Tensor:
        """Return ``(o, i, kh, kw)``, however many outputs there are."""
        return matrix.reshape(matrix.shape[0], self.in_channels, *self.kernel_size)

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution: ``(n, i, h, w) -> (n, o, h', w')``, with or without a batch.

        Raises:
            ValueError: ``x`` has other channels than the layer, or lies on another device.
        """
        if x.device != (here := self.values.device):
            raise ValueError(f"Expected input on {here}. Got {x.device}. Move model or input.")
        if x.dim() not in (3, 4) or x.shape[-3] != self.in_channels:
            raise ValueError(
                f"Expected {self.in_channels} channels before two axes of space. Got input "
                f"{tuple(x.shape)}. Check what feeds {type(self).__name__}({self.extra_repr()})."
            )
        recorder = self.recorder if torch.is_grad_enabled() else None
        watched = recorder is not None and (torch.compiler.is_compiling() or recorder.armed)
        if self.rows is not None and self.soft_permutation is None and not watched:
            return self._of_active(x, self.rows)
        weight = self.dense_form(dense_matrix(self))
        y: Tensor = self._conv_forward(x, weight, self.bias)
        return y

    def _of_active(self, x: Tensor, rows: Tensor) -> Tensor:
        """Convolve with the neurons that are left; the others are their bias."""
        values = self.values if self.selection is None else self.selection(self.values)
        values, indices, shape = self.packed(values)
        part, permutation = unpack(self.structure, values, indices, shape), self.permutation
        if isinstance(permutation, FixedPermutation) and self.side == "output":
            rows = invert(permutation.perm)[rows]
        elif permutation is not None:
            part = permuted(self, part)
        active: Tensor = self._conv_forward(x, self.dense_form(part), None)
        size = (*active.shape[:-3], self.out_channels, *active.shape[-2:])
        y = active.new_zeros(size).index_copy(active.dim() - 3, rows, active)
        return y if self.bias is None else y + self.bias.to(y.dtype)[:, None, None]
