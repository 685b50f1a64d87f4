"""Sparse layers: ``y = S (P x) + b`` in the place of a linear layer, with its name, hooks and mode.

A dense module is converted by changing its class, so references to it, hooks and attributes stay.
The trainable Parameter is ``values`` (nnz numbers); ``weight`` reads as the effective dense
weight, so code that uses ``layer.weight`` directly computes with the right numbers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from padst_compiler.permutation import FixedPermutation, Permutation, SoftPermutation
from padst_compiler.soft_product import folded_weight
from padst_compiler.storage import Storage
from padst_compiler.structures import Shape, Structure
from padst_compiler.unpacking import dense_matrix, unpermuted

__all__ = ["SparseConv1D", "SparseLayer", "SparseLinear", "SparsePointwiseConv", "sparse_layers"]


class SparseLayer(Storage):
    """What every sparse layer has; made by ``adopt``, never constructed.

    ``side`` names where the permutation acts: "input" for ``S (P x)``, "output" for ``P (S x)``.
    """

    side: str
    permutation: Permutation | None
    recorder: nn.Module | None
    config: Any  # the SparseConfig that the layer was made from, if any
    dense_type: type[nn.Module]
    bias: nn.Parameter | None

    @classmethod
    def adopt(
        cls,
        module: nn.Module,
        structure: Structure,
        indices: Tensor,
        permutation: Permutation | None,
        side: str,
        values: Tensor | None = None,
    ) -> SparseLayer:
        """Turn ``module`` into a sparse layer in place.

        Args:
            module: a dense module of this class's kind; its ``weight`` is dropped.
            structure: the family of masks.
            indices: the kept units, in the structure's layout.
            permutation: of ``in_features`` or ``out_features``, by ``side``; None for none.
            side: "input" or "output".
            values: start values; by default the dense weights under the mask, rescaled to the
                sparse fan-in so that the outputs keep their variance.
        """
        weight, trainable = cls.matrix_of(module), bool(module.weight.requires_grad)
        dense_type, has_bias = type(module), "bias" in module._parameters
        del module.weight
        bias = module._parameters.pop("bias", None)
        module.__class__ = cls
        assert isinstance(module, cls)
        module.dense_type = dense_type
        module.begin(weight, trainable, structure, indices, permutation, side, values)
        if has_bias:
            module._parameters["bias"] = bias  # parameters() lists values where weight stood
        return module

    def begin(
        self,
        weight: Tensor,
        trainable: bool,
        structure: Structure,
        indices: Tensor,
        permutation: Permutation | None,
        side: str,
        values: Tensor | None,
    ) -> None:
        """Store a dense ``weight (o, i)``; the other arguments are those of ``adopt``."""
        shape, indices = Shape(*weight.shape), indices.to(weight.device)
        if values is None:
            kept = 1.0 - structure.actual_sparsity(shape, structure.slots(indices, shape).shape[1])
            values = structure.pack(weight, indices) / kept**0.5
        self.structure, self.shape, self.side = structure, shape, side
        self.values = nn.Parameter(values.detach().to(weight.dtype).clone(), trainable)
        self.register_buffer("indices", indices.clone())
        self.register_buffer("rows", None)
        self.selection, self.permutation = None, permutation
        self.recorder, self.config = None, None

    @staticmethod
    def matrix_of(module: nn.Module) -> Tensor:
        """Return the ``(o, i)`` weight of a dense module of this kind."""
        raise NotImplementedError("A kind of sparse layer must say where its dense weight is.")

    def dense_form(self, matrix: Tensor) -> Tensor:
        """Return ``matrix (o, i)`` in the shape of the dense module's ``weight``."""
        return matrix

    @property
    def weight(self) -> Tensor:
        """The effective dense weight ``S P`` (or ``P S``) in the dense module's shape; computed."""
        return self.dense_form(dense_matrix(self))

    @property
    def soft_permutation(self) -> SoftPermutation | None:
        """The permutation while it is soft, else None."""
        return self.permutation if isinstance(self.permutation, SoftPermutation) else None

    def harden(self) -> None:
        """Replace a soft permutation by its index map; nothing else changes."""
        if (soft := self.soft_permutation) is not None:
            self.permutation = FixedPermutation(soft.harden(), next(soft.parameters()).device)

    def product(self, x: Tensor) -> Tensor:
        """Return ``S (P x) + b`` for tokens ``x (..., i)``.

        Raises:
            ValueError: ``x`` has another width than the layer, or lies on another device.
        """
        if x.device != (here := self.values.device):
            raise ValueError(f"Expected input on {here}. Got {x.device}. Move model or input.")
        if x.shape[-1] != self.shape.in_features:
            raise ValueError(
                f"Expected {self.shape.in_features} features on the last axis. Got input "
                f"{tuple(x.shape)}. Check what feeds {type(self).__name__}({self.extra_repr()})."
            )
        values: Tensor = self.values
        bias: Tensor | None = self.bias
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, values = x.to(dtype), values.to(dtype)
            bias = None if bias is None else bias.to(dtype)
        if (folded := folded_weight(self, x, values)) is not None:
            return F.linear(x, folded, bias)
        permutation, inside = self.permutation, self.side == "input"
        if permutation is not None and inside:
            x = permutation(x)
        late_bias = permutation is not None and not inside
        y = self.structured(x, values, None if late_bias else bias)
        if self.recorder is not None and torch.is_grad_enabled():
            y = self.recorder(y, x)
        if permutation is not None and not inside:
            y = permutation(y)
            y = y if bias is None else y + bias
        return y

    def extra_repr(self) -> str:
        """Name shape, structure, sparsity and side."""
        return (
            f"{self.shape.in_features} -> {self.shape.out_features}, {self.structure}, "
            f"sparsity={self.sparsity:.4f}, side={self.side}, bias={self.bias is not None}"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Accept a dense checkpoint: its weight is packed under the present mask."""
        dense = state_dict.get(f"{prefix}weight")
        matrix = torch.empty(self.shape.out_features, self.shape.in_features, device="meta")
        fits = dense is not None and dense.shape == self.dense_form(matrix).shape
        if dense is not None and fits and f"{prefix}values" not in state_dict:
            # In place: torch hands each module a copy of its own, and children read from it next.
            del state_dict[f"{prefix}weight"]
            matrix = unpermuted(self, self._matrix_from(dense))
            state_dict[f"{prefix}values"] = self.pack(matrix)
            state_dict[f"{prefix}indices"] = self.indices
            if self.rows is not None:
                state_dict[f"{prefix}rows"] = self.rows
            if self.selection is not None:
                for name, tensor in self.selection.state_dict().items():
                    state_dict.setdefault(f"{prefix}selection.{name}", tensor)
            if self.permutation is not None:
                for name, tensor in self.permutation.state_dict().items():
                    state_dict.setdefault(f"{prefix}permutation.{name}", tensor)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def _matrix_from(self, dense: Tensor) -> Tensor:
        return dense.to(self.values.device).reshape(self.shape.out_features, -1)


class SparseLinear(SparseLayer, nn.Linear):  # type: ignore[misc, override]
    """The sparse form of ``nn.Linear``."""

    @staticmethod
    def matrix_of(module: nn.Module) -> Tensor:
        """Return ``weight``."""
        assert isinstance(module, nn.Linear)
        return module.weight.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``S (P x) + b``: ``(..., i) -> (..., o)``."""
        return self.product(x)


class SparseConv1D(SparseLayer):
    """The sparse form of Hugging Face's ``Conv1D``, whose weight is ``(i, o)``."""

    @staticmethod
    def matrix_of(module: nn.Module) -> Tensor:
        """Return ``weight`` transposed."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().t()

    def dense_form(self, matrix: Tensor) -> Tensor:
        """Return ``(i, o)``."""
        return matrix.t()

    def forward(self, x: Tensor) -> Tensor:
        """Return ``S (P x) + b``: ``(..., i) -> (..., o)``."""
        return self.product(x)

    def _matrix_from(self, dense: Tensor) -> Tensor:
        return dense.to(self.values.device).t()


class SparsePointwiseConv(SparseLayer):
    """The sparse form of a 1x1 convolution in one, two or three dimensions."""

    stride: tuple[int, ...]

    @staticmethod
    def matrix_of(module: nn.Module) -> Tensor:
        """Return ``weight`` without its spatial axes."""
        weight = module.weight
        assert isinstance(weight, Tensor)
        return weight.detach().flatten(1)

    def dense_form(self, matrix: Tensor) -> Tensor:
        """Return ``(o, i, 1, ...)``."""
        return matrix.view(*matrix.shape, *([1] * len(self.stride)))

    def forward(self, x: Tensor) -> Tensor:
        """Return the convolution: ``(n, i, *space) -> (n, o, *space / stride)``."""
        axis = x.dim() - len(self.stride) - 1  # the channel axis, with or without a batch
        if any(step != 1 for step in self.stride):
            steps: tuple[Any, ...] = tuple(slice(None, None, step) for step in self.stride)
            x = x[(..., *steps)]
        return self.product(x.movedim(axis, -1)).movedim(-1, axis)


def sparse_layers(model: nn.Module) -> dict[str, SparseLayer]:
    """Return the sparse layers of ``model`` by qualified name, each once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLayer)}
