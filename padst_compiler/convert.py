"""A sparse layer and the description of it that a file holds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from padst_compiler.config import SparseConfig, describe, parse_structure
from padst_compiler.index_map import IndexMap
from padst_compiler.layers import SparseLayer
from padst_compiler.parameter import SparseParameter
from padst_compiler.permutation import FixedPermutation, Permutation, SoftPermutation
from padst_compiler.relaxations.spelling import read_back
from padst_compiler.selection import SoftSelection
from padst_compiler.sites import Site
from padst_compiler.starts import KINDS, adopt, weight_of
from padst_compiler.structures import Shape, Structure
from padst_compiler.topology import fault

__all__ = ["from_description", "to_description"]

_Space = tuple[int, list[int], list[int]]
_REBUILD = "Build the same architecture."
_DAMAGED = "The file is damaged: take another copy."


def to_description(layer: SparseLayer, names: Sequence[str]) -> dict[str, Any]:
    """Return what ``layer`` is, without its numbers, as plain JSON.

    Args:
        layer: any sparse layer.
        names: all its qualified names in the model.

    Example:
        >>> import padst_compiler as padst
        >>> model = padst.sparsify(nn.Sequential(nn.Linear(8, 8)), structure="nm:2:4")
        >>> to_description(model[0], ["0"])["structure"]
        'nm:2:4'
    """
    soft = layer.soft_permutation
    # What few layers have, and files of before do not name.
    dims, kernel, columns = _space(layer)
    extra: dict[str, Any] = {"kernel": kernel} if kernel else {}
    extra |= {"columns": columns} if columns else {}
    if layer.selection is not None:
        extra["selection"] = layer.selection.kept
    state: dict[str, Any] = {"kind": "none" if layer.permutation is None else "fixed"}
    if soft is not None:
        state = {"kind": "soft", "form": soft.name, "settings": soft.settings()}
    return {
        "names": list(names),
        "kind": _word(layer),
        "dims": dims,
        "structure": describe(layer.structure),
        "shape": [layer.shape.out_features, layer.shape.in_features],
        "side": layer.side,
        "permutation": state,
        "dtype": str(layer.values.dtype).removeprefix("torch."),
        "config": layer.config.to_dict() if isinstance(layer.config, SparseConfig) else None,
    } | extra


def from_description(
    site: Site | None, fields: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> SparseLayer:
    """Make a module the sparse layer that ``fields`` describes; its numbers are not loaded yet.

    A Parameter whose shape stays is the same object afterwards. An error may leave the module half
    changed, but no number: ``checkpoint.load`` puts it back.

    Args:
        site: where the layer goes, dense or sparse; None where the model has no such module.
        fields: from ``to_description``.
        tensors: by name, at least the layer's.

    Raises:
        ValueError: the module, or a tensor, is not what the description needs.
        ArithmeticError, AttributeError, LookupError, TypeError: the description is not whole.

    Example:
        >>> from padst_compiler.sites import discover
        >>> fields = {"names": ["0"], "kind": "linear", "dims": 0, "structure": "fan_in"}
        >>> fields |= {"shape": [2, 4], "side": "input", "permutation": {"kind": "none"}}
        >>> tensors = {"0.indices": torch.zeros(2, 1).int(), "0.values": torch.zeros(2, 1)}
        >>> (site,) = discover(nn.Sequential(nn.Linear(4, 2)))
        >>> from_description(site, fields | {"config": None}, tensors).sparsity
        0.75
    """
    names, kind, shape = list(fields["names"]), fields["kind"], Shape(*fields["shape"])
    space = int(fields["dims"]), fields.get("kernel", []), fields.get("columns", [])
    site = _site_at(site, names, kind, shape, space)
    structure = parse_structure(fields["structure"])
    prefix = f"{names[0]}." if names[0] else ""
    indices, values = tensors[f"{prefix}indices"], tensors[f"{prefix}values"]
    rows = tensors.get(f"{prefix}rows")
    _check_topology(structure, shape, indices, values, rows)
    side = fields["side"]
    _require(side in ("input", "output"), "side 'input' or 'output'", repr(side), _DAMAGED)
    layer = site.module
    if not isinstance(layer, SparseLayer):
        layer = adopt(site, structure, indices, None, side, values)
    resized = layer.size()[:2] != (list(indices.shape), None if rows is None else rows.numel())
    if layer.recorder is not None and (resized or layer.structure != structure):
        ours = f"{layer.structure} with {tuple(layer.indices.shape)} units"
        raise ValueError(
            f"Expected {ours}, as in the model that DynamicSparsity trains. Got {structure} with "
            f"{tuple(indices.shape)}. Call training.detach() first, and make a new one afterwards."
        )
    if layer.values.shape != values.shape:
        empty = layer.values.new_empty(values.shape)
        layer.values = nn.Parameter(empty, layer.values.requires_grad)
    if resized:
        layer.indices = indices.to(layer.values.device, copy=True)
    layer.rows = None if rows is None else rows.to(layer.values.device, copy=True)
    layer.selection = _selection(layer, fields.get("selection"))
    layer.structure, layer.side = structure, side
    config = fields["config"]
    layer.config = None if config is None else SparseConfig.from_dict(config)
    layer.permutation = _permutation(layer, fields["permutation"], prefix, tensors)
    return layer


def _word(layer: SparseLayer) -> str:
    if isinstance(layer, SparseParameter):
        return "parameter"
    return next(word for word, kind in KINDS.items() if isinstance(layer, kind))


def _space(module: nn.Module | None, site: Site | None = None) -> _Space:
    """Return the axes of a convolution, its kernel if larger than 1; of a parameter all axes."""
    if isinstance(module, SparseParameter):
        return len(module.sizes), list(module.sizes), list(module.columns)
    if site is not None and site.columns:
        sizes = list(weight_of(site).shape)
        return len(sizes), sizes, list(site.columns)
    kernel = list(getattr(module, "kernel_size", ()))
    return len(getattr(module, "stride", ())), [] if set(kernel) <= {1} else kernel, []


def _site_at(site: Site | None, names: list[str], kind: str, shape: Shape, space: _Space) -> Site:
    """Return ``site`` if it is the one that a file describes."""
    if site is None or site.module is None or set(site.layers) != set(names):
        found = f"one under {list(site.layers)} {site.note}".strip() if site else "none"
        raise ValueError(f"Expected one linear module under {names}. Got {found}. {_REBUILD}")
    module, sparse = site.module, site.kind == "sparse"
    word = "parameter" if site.columns else site.kind
    word = _word(module) if isinstance(module, SparseLayer) else word
    obstacle = "" if sparse else site.obstacle
    fits = word == kind and site.shape == shape and (obstacle or _space(module, site) == space)
    need = f"a {kind} of {shape}" + (f" with kernel {space[1]}" if space[1] else "")
    need += f", inputs on axes {space[2]}" if space[2] else ""
    _require(bool(fits), need, f"{type(module).__name__} of {site.shape}", _REBUILD)
    _require(not obstacle, "a module that can become sparse", f"one where {obstacle}", _REBUILD)
    return site


def _check_topology(
    structure: Structure, shape: Shape, indices: Tensor, values: Tensor, rows: Tensor | None
) -> None:
    groups, candidates = structure.table(shape)
    kept = indices.numel() // max(1, groups * structure.indices_per_unit(shape))
    layout = structure.index_shape(shape, kept)
    whole = structure.refusal(shape) is None and 1 <= kept <= candidates
    whole = whole and tuple(indices.shape) == layout and indices.dtype is torch.int32
    got = f"{indices.dtype} {tuple(indices.shape)}"
    _require(whole, f"int32 indices of {structure} on {shape}", got, _DAMAGED)
    size = (*layout, *structure.unit(shape))
    _require(tuple(values.shape) == size, f"values {size}", tuple(values.shape), _DAMAGED)
    fine = rows is None or rows.dtype is torch.int64
    _require(fine, "int64 rows", None if rows is None else rows.dtype, _DAMAGED)
    if (wrong := fault(structure, shape, indices, rows)) is not None:
        raise ValueError(f"{wrong} {_DAMAGED}")


def _selection(layer: SparseLayer, kept: int | None) -> SoftSelection | None:
    """Return a soft selection of ``kept`` units; the present one where it is of the same kind."""
    present, units = layer.selection, layer.structure.table(layer.shape)[1]
    if kept is None or (present is not None and present.kept == kept):
        return None if kept is None else present
    fits = layer.structure.name == "diagonal" and layer.kept == units and 0 < kept <= units
    _require(fits, f"all {units} diagonals for a soft selection", layer.kept, _DAMAGED)
    soft = SoftSelection(units, kept, layer.values.device)
    return soft.requires_grad_(layer.values.requires_grad)


def _permutation(
    layer: SparseLayer, fields: Mapping[str, Any], prefix: str, tensors: Mapping[str, Tensor]
) -> Permutation | None:
    """Return a permutation of the file's kind; the present one where that is of the same kind."""
    present, device = layer.permutation, layer.values.device
    size = layer.shape.in_features if layer.side == "input" else layer.shape.out_features
    if fields["kind"] == "fixed":
        index_map = IndexMap.of(tensors[f"{prefix}permutation.perm"])
        _require(index_map.size == size, f"a permutation of {size}", index_map.size, _DAMAGED)
        same = isinstance(present, FixedPermutation) and present.size == size
        return present if same else FixedPermutation(index_map, device)
    if fields["kind"] == "soft":
        return _soft(layer, fields, size, f"{prefix}permutation.", tensors)
    _require(fields["kind"] == "none", "a permutation none, fixed or soft", dict(fields), _DAMAGED)
    return None


def _soft(
    layer: SparseLayer,
    fields: Mapping[str, Any],
    size: int,
    prefix: str,
    tensors: Mapping[str, Tensor],
) -> SoftPermutation:
    """Return a soft permutation of the file's form; the present one where it is such a one."""
    present, settings = layer.soft_permutation, dict(fields["settings"])
    soft = read_back(fields["form"], size, settings)
    sizes = {name: tensor.shape for name, tensor in soft.state_dict().items()}
    if (
        present is not None
        and present.name == soft.name
        and sizes == {name: tensor.shape for name, tensor in present.state_dict().items()}
    ):
        vars(present).update(settings)
        soft = present
    else:
        names = [n for n, _ in soft.named_parameters()]
        soft = soft.to(layer.values.device, tensors[f"{prefix}{names[0]}"].dtype)
        soft.requires_grad_(layer.values.requires_grad)  # a frozen layer stays frozen
    for name, ours in soft.state_dict().items():
        theirs = tensors[f"{prefix}{name}"]
        shapes = tuple(ours.shape), tuple(theirs.shape)
        _require(shapes[0] == shapes[1], f"{name} {shapes[0]}", shapes[1], _DAMAGED)
        if theirs.dim() == 0:
            fine = bool(theirs.isfinite()) and float(theirs) > 0.0
            _require(fine, f"a {name} above 0", theirs.item(), _DAMAGED)
    return soft


def _require(ok: bool, need: str, got: object, cure: str) -> None:
    if not ok:
        raise ValueError(f"Expected {need}. Got {got}. {cure}")
