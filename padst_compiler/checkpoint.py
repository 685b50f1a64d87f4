"""One file for a sparse model: values, indices, permutations and the configuration (safetensors)."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from padst_compiler.config import SparseConfig, describe, parse_structure
from padst_compiler.index_map import IndexMap
from padst_compiler.layers import (
    SparseConv1D,
    SparseLayer,
    SparseLinear,
    SparsePointwiseConv,
    sparse_layers,
)
from padst_compiler.permutation import FixedPermutation, Permutation, SinkhornPermutation
from padst_compiler.structures import Shape

__all__ = ["FORMAT", "VERSION", "load", "save"]

FORMAT = "padst_compiler"
VERSION = 1

_KINDS: dict[str, type[SparseLayer]] = {
    kind.__name__: kind for kind in (SparseLinear, SparseConv1D, SparsePointwiseConv)
}


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's tensors and its sparse layers' configuration; an old file stays on failure.

    Tensors that share their storage (tied weights) are written once.

    Args:
        model: may hold soft or hard permutations, or no sparse layer at all.
        path: the file, by custom ``.safetensors``.
    """
    from safetensors.torch import save_file

    path = Path(path)
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in model.state_dict().items():
        key = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), tensor.stride())
        if tensor.numel() and key in first:
            aliases[name] = first[key]
            continue
        first[key] = name
        tensors[name] = tensor.detach().cpu().contiguous().clone()
    layers = {name: _describe(layer) for name, layer in sparse_layers(model).items()}
    header = {"format": FORMAT, "version": VERSION, "layers": layers, "aliases": aliases}
    handle, draft = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        save_file(tensors, draft, metadata={FORMAT: json.dumps(header)})
        Path(draft).replace(path)
    except BaseException:
        Path(draft).unlink(missing_ok=True)
        raise


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Read a file of ``save`` into ``model``, in place, and return it.

    Dense layers become the sparse ones of the file; sparse layers take its structure, topology and
    permutation. Everything is checked before the first change.

    Args:
        model: the same architecture, dense or sparse.
        path: the file.

    Raises:
        ValueError: not such a file, a damaged one, a newer version, or another architecture; the
            message names what and where, and the model is as it was.
        FileNotFoundError: there is no such file.
    """
    path = Path(path)
    header, tensors = _read(path)
    layers: Mapping[str, dict[str, Any]] = header["layers"]
    modules = dict(model.named_modules())
    for name, entry in layers.items():
        _check_layer(path, name, entry, modules.get(name), tensors)
    extra = [name for name in sparse_layers(model) if name not in layers]
    if extra:
        raise ValueError(
            f"Expected {', '.join(extra[:3])} to be sparse in {path} too. Got a dense layer there. "
            "Load into the model before it is sparsified."
        )
    _check_rest(path, model, layers, tensors)
    for name, entry in layers.items():
        _apply(modules[name], entry, name, tensors)
    model.load_state_dict(tensors)
    return model


def _describe(layer: SparseLayer) -> dict[str, Any]:
    soft = layer.soft_permutation
    kind = "none" if layer.permutation is None else "fixed" if soft is None else "soft"
    entry: dict[str, Any] = {
        "structure": describe(layer.structure),
        "shape": [layer.shape.out_features, layer.shape.in_features],
        "side": layer.side,
        "permutation": kind,
        "kind": type(layer).__name__,
        "dense_type": layer.dense_type.__name__,
    }
    if soft is not None:
        entry |= {"temperature": soft.temperature, "iterations": soft.iterations}
    if isinstance(layer.config, SparseConfig):
        entry["config"] = layer.config.to_dict()
    return entry


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"Expected a file. Got {path}, which is not there. Check the path.")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            header = json.loads(metadata.get(FORMAT, "null"))
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"Expected a file written by padst.save. Got {path}, which cannot be read ({error}). "
            "It is damaged or foreign: take another copy."
        ) from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise ValueError(
            f"Expected a file written by padst.save. Got {path}, a safetensors file of something "
            "else. Load dense weights with model.load_state_dict instead."
        )
    if not isinstance(header.get("version"), int) or header["version"] > VERSION:
        raise ValueError(
            f"Expected format version {VERSION} or older. Got {header.get('version')} in {path}. "
            "Upgrade padst-compiler."
        )
    for name, source in header.get("aliases", {}).items():
        if source in tensors:
            tensors[name] = tensors[source]
    return header, tensors


def _check_layer(
    path: Path,
    name: str,
    entry: Mapping[str, Any],
    module: nn.Module | None,
    tensors: Mapping[str, Tensor],
) -> None:
    """Check one sparse layer of the file against the module of that name."""
    where = f"layer {name!r} of {path}"
    if module is None:
        raise ValueError(f"Expected a module for {where}. Got none. Build the same architecture.")
    kind = _KINDS[entry["kind"]]
    present = type(module).__name__
    if present not in (entry["kind"], entry["dense_type"]):
        raise ValueError(
            f"Expected a {entry['dense_type']} for {where}. Got {present}. "
            "Build the same architecture."
        )
    shape = Shape(*entry["shape"])
    there = (
        module.shape if isinstance(module, SparseLayer) else Shape(*kind.matrix_of(module).shape)
    )
    if there != shape:
        raise ValueError(
            f"Expected {there} weights for {where}. Got {shape}. Build the same architecture."
        )
    structure = parse_structure(entry["structure"])
    indices, values = tensors.get(_join(name, "indices")), tensors.get(_join(name, "values"))
    if indices is None or values is None:
        raise ValueError(f"Expected values and indices of {where}. Got none. Take another copy.")
    slots = structure.slots(indices, shape)
    candidates = structure.table(shape)[1]
    unique = slots.sort(dim=1).values.diff(dim=1).ne(0).all()
    if slots.shape[1] == 0 or int(slots.min()) < 0 or int(slots.max()) >= candidates or not unique:
        raise ValueError(
            f"Expected unique indices below {candidates} in {where}. Got others. "
            "The file is damaged: take another copy."
        )
    if tuple(values.shape) != (*indices.shape, *structure.unit(shape)):
        raise ValueError(
            f"Expected values {(*indices.shape, *structure.unit(shape))} in {where}. "
            f"Got {tuple(values.shape)}. The file is damaged: take another copy."
        )
    if entry["permutation"] == "fixed":
        perm = tensors.get(_join(name, "permutation.perm"))
        size = shape.in_features if entry["side"] == "input" else shape.out_features
        if perm is None or perm.numel() != size:
            raise ValueError(
                f"Expected a permutation of {size} in {where}. Got "
                f"{None if perm is None else tuple(perm.shape)}. Take another copy."
            )
        IndexMap.of(perm)


def _check_rest(
    path: Path, model: nn.Module, layers: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Check that every other tensor of model and file has its partner."""
    prefixes = tuple(_join(name, "") for name in layers)
    own = ("values", "indices", "weight")

    def inside(key: str) -> bool:
        return any(
            key.startswith(p) and (key[len(p) :] in own or key[len(p) :].startswith("permutation."))
            for p in prefixes
        )

    have = {k: t for k, t in model.state_dict().items() if not inside(k)}
    given = {k: t for k, t in tensors.items() if not inside(k)}
    missing, unknown = sorted(have.keys() - given.keys()), sorted(given.keys() - have.keys())
    if missing or unknown:
        raise ValueError(
            f"Expected the tensors of this model in {path}. Got none for {missing[:3]} and unknown "
            f"{unknown[:3]}. Build the same architecture."
        )
    for key, tensor in have.items():
        if tensor.shape != given[key].shape:
            raise ValueError(
                f"Expected {key} of shape {tuple(tensor.shape)} in {path}. "
                f"Got {tuple(given[key].shape)}. Build the same architecture."
            )


def _apply(
    module: nn.Module, entry: Mapping[str, Any], name: str, tensors: Mapping[str, Tensor]
) -> None:
    structure = parse_structure(entry["structure"])
    indices, values = tensors[_join(name, "indices")], tensors[_join(name, "values")]
    if not isinstance(module, SparseLayer):
        _KINDS[entry["kind"]].adopt(module, structure, indices, None, entry["side"], values)
        assert isinstance(module, SparseLayer)
    device = module.values.device
    if module.values.shape != values.shape:
        module.values = nn.Parameter(values.to(module.values), module.values.requires_grad)
        module.indices = indices.to(device)
    module.structure, module.side = structure, entry["side"]
    module.permutation = _permutation(module.permutation, entry, name, tensors, device)
    if "config" in entry:
        module.config = SparseConfig.from_dict(entry["config"])


def _permutation(
    present: Permutation | None,
    entry: Mapping[str, Any],
    name: str,
    tensors: Mapping[str, Tensor],
    device: torch.device,
) -> Permutation | None:
    """Return a permutation of the file's kind; the present one where that is of the same kind."""
    if entry["permutation"] == "none":
        return None
    if entry["permutation"] == "fixed":
        perm = tensors[_join(name, "permutation.perm")]
        same = isinstance(present, FixedPermutation) and present.size == perm.numel()
        return present if same else FixedPermutation(IndexMap.of(perm), device)
    size = tensors[_join(name, "permutation.logits")].shape[0]
    if isinstance(present, SinkhornPermutation) and present.size == size:
        present.temperature, present.iterations = entry["temperature"], entry["iterations"]
        return present
    return SinkhornPermutation(
        size,
        torch.Generator(),
        temperature=entry["temperature"],
        iterations=entry["iterations"],
        device=device,
    )


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
