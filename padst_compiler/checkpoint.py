"""One file for a sparse model (safetensors): its tensors, and what each sparse layer is.

The file holds every tensor of ``model.state_dict()`` and, as JSON under one metadata key::

    format, version
    aliases   {name: the name that its numbers stand under}
    layers    [{names, kind, dims, structure, shape, side, dtype, config,
                permutation: {kind: none | fixed | soft, form, settings}}]
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from padst_compiler.convert import from_description, to_description
from padst_compiler.differences import differences
from padst_compiler.layers import SparseLayer
from padst_compiler.permutation import Permutation
from padst_compiler.sites import Site, discover, site_of_parameter
from padst_compiler.tensors import is_plain, storage_key

__all__ = ["FORMAT", "VERSION", "load", "save"]

FORMAT, VERSION = "padst_compiler", 1

_DAMAGED = "The file is damaged: take another copy."
_ODD = (ArithmeticError, AttributeError, LookupError, TypeError)  # what a strange header may cause
_EMPTY = "Give it memory with model.to_empty(device=...) first."


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write the model's tensors, and what its sparse layers are, into one file.

    The file appears at once and whole; if anything fails, the old file stays. Tensors that are one
    (tied weights) are written once.

    Args:
        model: may hold soft or hard permutations, or no sparse layer at all.
        path: the file, by custom ``.safetensors``.

    Raises:
        ValueError: the state holds something that is no plain tensor.
        FileNotFoundError: there is no such folder.

    Example:
        >>> import tempfile, padst_compiler as padst
        >>> model = padst.sparsify(nn.Sequential(nn.Linear(8, 8)), structure="fan_in")
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save(model, f"{folder}/a.safetensors")
        ...     load(nn.Sequential(nn.Linear(8, 8)), f"{folder}/a.safetensors")[0].values.shape
        torch.Size([8, 1])
    """
    from safetensors.torch import save_file

    model, path = _plain(model), Path(os.path.realpath(path))  # a link stays a link
    if not path.parent.is_dir():
        raise FileNotFoundError(f"Expected a folder. Got no {path.parent}. Create it first.")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    layers = [to_description(m, mine) for m, mine in names.items() if isinstance(m, SparseLayer)]
    tensors, aliases = _collect(model)
    header = {"format": FORMAT, "version": VERSION, "aliases": aliases, "layers": layers}
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        draft.touch()
        mode = draft.stat().st_mode  # as other files here: safetensors makes private ones
        save_file(tensors, draft, metadata={FORMAT: json.dumps(header)})
        draft.chmod(mode)
        with draft.open("rb+") as file:
            os.fsync(file.fileno())  # so that a power cut leaves the old file or the new one
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def load(model: nn.Module, path: str | os.PathLike[str]) -> nn.Module:
    """Read a file of ``save`` into ``model``, in place, and return it.

    Dense layers become the sparse ones of the file; sparse layers of the same configuration take
    its topology and permutation. No number is written before everything is checked. A Parameter
    stays the same object where its shape stays; where layers change, make the optimizer afterwards.

    Args:
        model: the same architecture, dense or sparse, on any device.
        path: the file.

    Raises:
        ValueError: not such a file, a damaged one, another version, architecture or sparsity; the
            message says what and where, and the model is as it was.
        FileNotFoundError: there is no such file.

    Example:
        >>> load(nn.Linear(2, 2), "missing.safetensors")
        Traceback (most recent call last):
        FileNotFoundError: Expected a file. Got missing.safetensors, which is none. Check the path.
    """
    path, given, model = Path(path), model, _plain(model)
    header, tensors = _read(path)
    sites = {name: site for site in discover(model) for name in site.names + site.layers}
    with _unchanged_on_error(model):
        try:
            tensors |= {name: tensors[source] for name, source in header["aliases"].items()}
            for fields in header["layers"]:  # what only a run would find
                if "columns" in fields and fields["names"][0] not in sites:
                    site = site_of_parameter(model, fields["names"], fields["columns"])
                    sites |= dict.fromkeys(site.layers, site) if site else {}
            _convert(sites, header, tensors)
            _check(model, tensors)
        except ValueError as error:
            raise ValueError(f"{error} (From {path}: the model is as it was.)") from error
        except _ODD as error:
            raise ValueError(
                f"Expected a whole header in {path}. Got {error!r}. {_DAMAGED}"
            ) from error
        model.load_state_dict(tensors)
    return given


def _plain(model: nn.Module) -> nn.Module:
    """Return the model inside ``torch.compile(model)``, which has the names of its state."""
    inside = getattr(model, "_orig_mod", model)
    assert isinstance(inside, nn.Module)
    return inside


def _collect(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors to write, and the names that repeat one of them."""
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    first: dict[tuple[Any, ...], str] = {}
    written: set[int] = set()
    for name, tensor in model.state_dict().items():
        plain = isinstance(tensor, Tensor) and is_plain(tensor) and not tensor.is_meta
        kind = f"{type(tensor).__name__} on {getattr(tensor, 'device', 'no device')}"
        cure = "Convert it, or leave it out of state_dict()."
        _require(plain, f"a plain tensor with numbers as {name!r}", kind, cure)
        if (source := first.setdefault(_view(tensor), name)) != name:
            aliases[name] = source
            continue
        flat = tensor.detach().cpu().contiguous()
        address = flat.untyped_storage().data_ptr()
        tensors[name] = flat.clone() if address in written else flat  # another part of one tensor
        written.add(address)
    return tensors, aliases


def _view(tensor: Tensor) -> tuple[Any, ...]:
    return (*storage_key(tensor), tensor.dtype, tuple(tensor.shape), tensor.stride())


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise FileNotFoundError(f"Expected a file. Got {path}, which is none. Check the path.")
    need = "a file written by padst.save"
    try:
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get(FORMAT, "null"))
            ours = isinstance(header, dict) and header.get("format") == FORMAT
            foreign = f"{path}, a safetensors file of something else"
            cure = (
                "Load dense weights with model.load_state_dict(safetensors.torch.load_file(path))."
            )
            _require(ours, need, foreign, cure)
            need, got = f"format version {VERSION}", f"{header.get('version')} in {path}"
            cure = "Load it with the release of padst-compiler that wrote it, or upgrade."
            _require(header.get("version") == VERSION, need, got, cure)
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise ValueError(f"Expected {need}. Got {path}: {error}. {_DAMAGED}") from error


def _convert(
    sites: Mapping[str, Site], header: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Make the layers of the model those of the file."""
    left = {name for name, site in sites.items() if site.kind == "sparse"}
    shared: dict[str, Permutation] = {}
    found = [text for fields in header["layers"] for text in differences(sites, fields)]
    more = f", and {len(found) - 3} more" if len(found) > 3 else ""
    cure = "Load into the model before it is sparsified, or into to_dense(model)."
    _require(not found, "the sparse layers of the model", ", ".join(found[:3]) + more, cure)
    for fields in header["layers"]:
        name = fields["names"][0]
        left -= set(fields["names"])
        try:
            layer = from_description(sites.get(name), fields, tensors)
        except ValueError as error:
            raise ValueError(f"{error} (Layer {name!r}.)") from error
        except _ODD as error:
            need = f"Expected a whole description of layer {name!r}. Got {error!r}."
            raise ValueError(f"{need} {_DAMAGED}") from error
        if (held := layer.permutation) is not None:  # several layers may have one together
            key = f"{name}.permutation.{next(iter(held.state_dict()))}".lstrip(".")
            layer.permutation = shared.setdefault(header["aliases"].get(key, key), held)
    _require(not left, "the sparse layers of the model", f"dense {sorted(left)[:3]}", cure)


def _check(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Check that every tensor of the model has its like in the file, and the file has no other."""
    live = model.state_dict()
    missing, unknown = sorted(live.keys() - tensors.keys()), sorted(tensors.keys() - live.keys())
    need = "the tensors of this model, no more and no less"
    got = f"none for {missing[:3]}, and unknown {unknown[:3]}"
    _require(not missing and not unknown, need, got, "Build the same architecture.")
    holders: dict[tuple[Any, ...], str] = {}
    for name, tensor in live.items():
        _require(not tensor.is_meta, f"a model with memory at {name!r}", "device meta", _EMPTY)
        ours, theirs = ((t.dtype, tuple(t.shape)) for t in (tensor, tensors[name]))
        cure = "Build the same architecture, or convert the model with model.to(dtype)."
        _require(
            ours == theirs, f"{name!r} as {ours[0]} {ours[1]}", f"{theirs[0]} {theirs[1]}", cure
        )
        twin = tensors[holders.setdefault(_view(tensor), name)]
        same = twin is tensors[name] or torch.equal(twin, tensors[name])
        need = f"the same numbers for {holders[_view(tensor)]!r} and {name!r}, one tensor here"
        _require(same, need, "different ones", "Untie them in the model first.")


@contextmanager
def _unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Put classes, parameters, buffers and attributes back if what runs inside fails."""
    tables = [(m, (vars(m), m._parameters, m._buffers, m._modules)) for m in model.modules()]
    before = [(m, type(m), [(held, dict(held)) for held in mine]) for m, mine in tables]
    try:
        yield
    except BaseException:
        for module, kind, saved in before:
            module.__class__ = kind
            for held, copied in saved:
                held.clear()
                held.update(copied)
        raise


def _require(ok: bool, need: str, got: object, cure: str) -> None:
    if not ok:
        raise ValueError(f"Expected {need}. Got {got}. {cure}")
