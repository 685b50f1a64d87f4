"""Every private name of torch that we use, in one place, for torch 2.11 to 2.13.

Nothing else in the package imports from ``torch._inductor``, ``torch._dynamo`` or
``torch._guards``. Each use has a test in ``tests/test_compat.py``; when a release moves a name,
this file changes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._subclasses.functional_tensor import FunctionalTensor, FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._pytree import tree_map_only

from padst_compiler.static_inputs import told

__all__ = ["CustomGraphPass", "compile_with_inductor", "composed", "force_strides"]
__all__ += ["inductor_cache", "inductor_decompositions", "inductor_defaults"]
__all__ += ["inductor_option_names", "is_module_state", "many_graphs"]
__all__ += ["mode_options", "owner_name", "reset_inductor", "size_hint"]
__all__ += ["source_name", "trace_aten"]

Callback = Callable[..., Any]

# Names that torch's stubs leave out.
_SYNC: Callback = vars(torch)["_sync"]
_HAS_NEW_DATA: Callback = vars(torch)["_functionalize_has_data_mutation"]
_HAS_NEW_METADATA: Callback = vars(torch)["_functionalize_has_metadata_mutation"]


def trace_aten(
    function: Callback,
    arguments: Sequence[Any],
    *,
    functional: bool = False,
    table: Mapping[Any, Callback] | None = None,
) -> fx.GraphModule:
    """Trace ``function`` on fake arguments into an ATen graph whose nodes carry ``meta["val"]``.

    Args:
        function: takes the arguments positionally.
        arguments: FakeTensors of one mode, SymInts and constants; all become placeholders.
        functional: rewrite mutations of inputs into a final ``copy_``.
        table: decompositions to apply on the way.
    """
    mode = detect_fake_mode(list(arguments))
    target = _functional(function) if functional else function
    if mode is None:
        return _traced(target, arguments, table)
    before = mode.allow_non_fake_inputs
    mode.allow_non_fake_inputs = True  # constants that Dynamo lifted are real tensors
    try:
        with mode:
            return _traced(target, arguments, table)
    finally:
        mode.allow_non_fake_inputs = before


def _functional(function: Callback) -> Callback:
    """Return ``function`` without mutations; those of its inputs become one ``copy_`` at the end.

    AOTAutograd's way; ``torch.func.functionalize`` would fix symbolic sizes to the example's.
    """

    def run(*arguments: Any) -> Any:
        with FunctionalTensorMode():
            wrapped = [
                FunctionalTensor.to_functional(a) if isinstance(a, Tensor) else a for a in arguments
            ]
            results = tree_map_only(FunctionalTensor, _plain, function(*wrapped))
            written = {}
            for position, value in enumerate(wrapped):
                if not isinstance(value, FunctionalTensor):
                    continue
                if _HAS_NEW_METADATA(value.elem):
                    raise RuntimeError(f"input {position} changes its shape or strides in place")
                if _HAS_NEW_DATA(value.elem):
                    written[position] = _plain(value)
        for position, value in written.items():
            arguments[position].copy_(value)
        return results

    return run


def _plain(tensor: FunctionalTensor) -> Tensor:
    _SYNC(tensor)
    plain: Tensor = torch._from_functional_tensor(tensor.elem)
    return plain


def _traced(
    function: Callback, arguments: Sequence[Any], table: Mapping[Any, Callback] | None
) -> fx.GraphModule:
    with torch.no_grad(), enable_python_dispatcher():
        graph_module: fx.GraphModule = make_fx(function, dict(table or {}))(*arguments)
    return graph_module


def inductor_decompositions() -> Mapping[Any, Callback]:
    """Return the decompositions that a joint graph of Inductor has already seen."""
    from torch._inductor.decomposition import select_decomp_table

    table: Mapping[Any, Callback] = select_decomp_table()
    return table


def force_strides() -> torch._ops.OpOverload:
    """Return Inductor's operator ``(tensor, strides)`` that keeps the strides of a tensor."""
    from torch._inductor import inductor_prims

    op: torch._ops.OpOverload = inductor_prims.force_stride_order
    return op


def is_module_state(value: object) -> bool:
    """Whether Dynamo passed this graph input as a Parameter or buffer of a module."""
    return isinstance(value, Tensor) and hasattr(value, "_dynamo_static_input_type")


def source_name(placeholder: fx.Node) -> str:
    """Return where Dynamo read a graph input: ``L['self']._modules['fc1']``, or ""."""
    argument = placeholder.meta.get("grapharg")
    source = getattr(argument, "source", None)
    name = getattr(source, "name", "")
    return str(name() if callable(name) else name)  # a method in 2.11, a property in 2.13


def owner_name(placeholder: fx.Node) -> str:
    """Return the module that a Parameter or buffer among the graph's inputs belongs to, or ""."""
    return ".".join(re.findall(r"_modules\['([^']+)'\]", source_name(placeholder)))


def mode_options(mode: str | None) -> dict[str, Any]:
    """Return Inductor's settings for a ``torch.compile`` mode.

    Raises:
        ValueError: an unknown mode.
    """
    if mode is None or mode == "default":
        return {}
    from torch._inductor import list_mode_options

    known = list_mode_options()
    if mode not in known:
        raise ValueError(f"Expected a mode of {sorted(known)}. Got {mode!r}. Leave mode out.")
    return dict(known[mode])


def size_hint(size: int | torch.SymInt) -> int:
    """Return a size, or for a symbolic one the size that it was traced with."""
    if isinstance(size, int):
        return size
    hint = size.node.hint
    return 1024 if hint is None else int(hint)


def many_graphs() -> AbstractContextManager[None]:
    """Lift Dynamo's limit on graphs of one function for a while: asking is not recompiling."""
    from torch._dynamo import config

    return cast(
        "AbstractContextManager[None]",
        config.patch(recompile_limit=2**20, accumulated_recompile_limit=2**20),
    )


def reset_inductor() -> None:
    """Drop Inductor's CUDA graphs, as ``torch.compiler.reset()`` does for its own backend."""
    if torch.cuda.is_available():
        from torch._inductor.cudagraph_trees import reset_cudagraph_trees

        reset_cudagraph_trees()


def inductor_option_names() -> frozenset[str]:
    """Return the names that ``options`` may pass on to Inductor."""
    from torch._inductor import config

    return frozenset(config.get_config_copy())


def inductor_cache() -> Path:
    """Return the folder that Inductor caches in; it is made where it does not exist.

    Raises:
        OSError: it cannot be made.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def inductor_defaults() -> dict[str, Any]:
    """Return the options that Inductor gets unless the user says otherwise.

    Inductor of torch 2.11 puts nothing into a GPU template's stores that reads it through a view,
    as a layer on ``(batch, tokens, features)`` does, while it reorders loops.
    """
    return {"loop_ordering_after_fusion": False} if torch.__version__ < "2.12" else {}


def compile_with_inductor(
    graph_module: fx.GraphModule, examples: Sequence[Any], options: dict[str, Any]
) -> Callback:
    """Compile through ``compile_fx``, so that caches, autotuning, CUDA graphs and autograd work."""
    from torch._inductor.compile_fx import compile_fx, compile_fx_inner

    inner, patches = told(compile_fx_inner, examples), {**inductor_defaults(), **options}
    compiled: Any = compile_fx(graph_module, list(examples), inner, config_patches=patches)
    return cast("Callback", compiled)


def composed(ours: CustomGraphPass) -> CustomGraphPass:
    """Return ``ours`` after the joint pass that the user configured, if there is one."""
    from torch._inductor import config

    present: Any = config.joint_custom_pre_pass
    if present is None:
        return ours
    return _Both(tuple(present) if isinstance(present, list | tuple) else (present,), ours)


class _Both(CustomGraphPass):
    """Another library's joint passes, then ours; the cache key names both."""

    def __init__(self, others: tuple[Any, ...], ours: CustomGraphPass) -> None:
        self.others, self.ours = others, ours

    def __call__(self, graph: fx.Graph) -> None:
        for other in self.others:
            other(graph)
        self.ours(graph)

    def uuid(self) -> Any:
        ids = [
            other.uuid() if isinstance(other, CustomGraphPass) else None for other in self.others
        ]
        # None: not cacheable, as theirs is
        return None if None in ids else (*ids, self.ours.uuid())
