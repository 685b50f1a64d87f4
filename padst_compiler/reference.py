"""Python references on the command line: ``package.module:factory`` or ``file.py:factory``."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

from torch import nn

__all__ = ["load_factory", "model_and_inputs"]


def load_factory(reference: str) -> Any:
    """Return the object that ``module:name`` names; the current folder is searched too.

    Raises:
        ValueError: no colon, no such module or no such name.
    """
    module_name, _, name = reference.partition(":")
    if not name:
        raise ValueError(
            f"Expected a reference module:factory. Got {reference!r}. "
            "Write for example my_models.py:make_vit."
        )
    try:
        module = _load(module_name)
    except (ImportError, FileNotFoundError) as error:
        raise ValueError(
            f"Expected an importable module or a .py file. Got {module_name!r} ({error}). "
            "Run from the folder that holds it, or give its path."
        ) from error
    if not hasattr(module, name):
        public = [n for n in vars(module) if not n.startswith("_")][:8]
        raise ValueError(
            f"Expected a name in {module_name}. Got {name!r}. It has {', '.join(public)}."
        )
    return getattr(module, name)


def model_and_inputs(reference: str) -> tuple[nn.Module, Any]:
    """Call a factory that returns a model, or a model and example inputs.

    Raises:
        ValueError: the factory returns something else.
    """
    factory = load_factory(reference)
    made = factory() if callable(factory) and not isinstance(factory, nn.Module) else factory
    model, inputs = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"Expected {reference} to return a model, or (model, example_inputs). "
            f"Got {type(made).__name__}. Return nn.Module and a tensor or tuple of tensors."
        )
    return model, inputs


def _load(name: str) -> Any:
    if name.endswith(".py"):
        path = Path(name)
        if not path.is_file():
            raise FileNotFoundError(f"no file {name}")
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules.setdefault(path.stem, module)
        spec.loader.exec_module(module)
        return module
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    return importlib.import_module(name)
