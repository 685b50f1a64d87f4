"""C++ kernels inside Inductor: beside ``compat.py`` the one place with private names of Inductor.

A kernel computes tiles of a two-dimensional result; Inductor generates what follows (a bias, an
activation, a residual, a cast) inside its loops, on the tile. Its source is text: the headers in
``kernels/`` and a body with Jinja's ``{{...}}``, so that a compiled graph needs no file of ours.
Each name used here has a test in ``tests/test_cpp_templates.py``.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from unittest.mock import patch

import torch

__all__ = [
    "are_numbers",
    "contiguous",
    "fallback",
    "has_compiler",
    "lower",
    "numbers",
    "opaque_strides",
    "run",
    "takes_opaque_inputs",
    "threads",
    "view",
]


def has_compiler(options: Mapping[str, Any]) -> bool:
    """Whether Inductor finds a C++ compiler.

    Args:
        options: of Inductor, which may name one (``cpp.cxx``).
    """
    from torch._inductor import config
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    with config.patch(dict(options)):
        try:
            get_cpp_compiler()
        except InvalidCxxCompiler:
            return False
    return True


def lower(op: torch._ops.OpOverload, lowering: Callable[..., Any]) -> None:
    """Let Inductor lower an operator of ours by ``lowering``."""
    from torch._inductor.lowering import register_lowering

    register_lowering(op, type_promotion_kind=None)(lowering)


def fallback(op: torch._ops.OpOverload, *args: Any) -> Any:
    """Call the operator itself from generated code."""
    from torch._inductor.lowering import fallback_handler

    return fallback_handler(op, add_to_fallback_set=False)(*args)


@functools.cache
def takes_opaque_inputs() -> bool:
    """Whether oneDNN is there, and a compiled graph takes its opaque tensors as inputs.

    Such a graph checks strides; an opaque tensor says that it has those of ``opaque_strides``.
    """
    if not torch.backends.mkldnn.is_available():
        return False
    try:
        check = vars(torch._C._dynamo.guards)["assert_size_stride"]
        packed = torch.ops.mkldnn._reorder_linear_weight(torch.zeros(2, 2), 3)
        check(packed, (2, 2), opaque_strides(2))
    except (AssertionError, AttributeError, KeyError, RuntimeError):
        return False
    return True


def opaque_strides(dimensions: int) -> tuple[int, ...]:
    """Return the strides that graphs see of an opaque tensor."""
    return (1,) + (0,) * (dimensions - 1)


def view(x: Any, sizes: Sequence[Any]) -> Any:
    """Return a tensor of the graph in another shape."""
    from torch._inductor.lowering import lowerings

    return lowerings[torch.ops.aten.reshape.default](x, list(sizes))


def contiguous(x: Any) -> Any:
    """Return a tensor of the graph that lies in order: itself, or a copy."""
    from torch._inductor.ir import ExternKernel

    return ExternKernel.require_contiguous(x)


def are_numbers(sizes: Sequence[Any]) -> bool:
    """Whether no size is symbolic."""
    return all(isinstance(size, int) or bool(size.is_number) for size in sizes)


def numbers(sizes: Sequence[Any]) -> list[int]:
    """Return sizes as numbers, a guard on each that is symbolic."""
    from torch._inductor.virtualized import V

    return [int(V.graph.sizevars.guard_int(size)) for size in sizes]


def threads() -> int:
    """Return the number of threads that generated code uses."""
    from torch._inductor.utils import parallel_num_threads

    return int(parallel_num_threads())


def run(
    name: str,
    source: str,
    inputs: Mapping[str, Any],
    sizes: tuple[Any, int],
    values: Mapping[str, Any],
) -> Any:
    """Return what a kernel computes, in fp32.

    Args:
        name: in generated code.
        source: the body; it knows the inputs, ``Y``, ``values`` and ``threads`` by name, where it
            takes ``buffers`` and points to the inputs in them.
        inputs: tensors of the graph: two-dimensional ones with unit stride in their last dimension,
            others contiguous.
        sizes: of the result.
        values: what else the source names.
    """
    from torch._inductor import ir
    from torch._inductor.select_algorithm import autotune_select_algorithm, realize_inputs

    real = [_laid_out(realize_inputs(tensor)) for tensor in inputs.values()]
    layout = ir.FixedLayout(real[0].get_device(), torch.float32, list(sizes))
    choices: list[Any] = []
    template = _template()(name, source, dict(zip(inputs, real, strict=True)), layout, values)
    template.maybe_append_choice(choices)
    result: Any = autotune_select_algorithm(name, choices, real, layout)
    return result[0] if isinstance(result, tuple) else result


def _laid_out(x: Any) -> Any:
    """Return a tensor of the graph with unit stride in its last dimension, or a copy that has it.

    Of more than two dimensions, contiguous.
    """
    from torch._inductor.ir import ExternKernel

    if len(x.get_size()) == 2:
        x = ExternKernel.require_stride_order(x, [1, 0])
        if x.get_stride()[-1] == 1:
            return x
    return ExternKernel.require_contiguous(x)


@functools.cache
def _template() -> Any:
    """Return the class of our templates; importing its base takes a second."""
    from torch._inductor import ir
    from torch._inductor.codegen.cpp import get_export_declaration
    from torch._inductor.codegen.cpp_gemm_template import gen_2d_view_of_epilogue_buf
    from torch._inductor.codegen.cpp_template import CppTemplate
    from torch._inductor.virtualized import V

    class Template(CppTemplate):
        def __init__(
            self,
            name: str,
            source: str,
            inputs: Mapping[str, Any],
            layout: Any,
            values: Mapping[str, Any],
        ) -> None:
            super().__init__(name, list(inputs.values()), layout, num_threads=threads())
            self.names, self.source, self.values = list(inputs), source, dict(values)

        def render(self, **given: Any) -> str:
            kernel, node = given["kernel"], given.get("template_buffer_node")
            followers = given.get("epilogue_nodes")
            shared = given.get("flag_template_buffer_has_other_users")
            out: Any = self.output_node if node is None else node
            result, flat, made = out, out, out
            nodes: list[Any] = []
            reindexers: list[Any] = []
            aliases: list[str] = []
            if shared:  # others read a copy of the tiles
                made = ir.Buffer(name=f"{out.get_name()}_tiles", layout=out.get_layout())
                nodes.append(_copy(made, out))
                reindexers.append(None)
                aliases.append(made.get_name())
            if followers:
                if not shared:
                    aliases.append(out.get_name())
                nodes += followers
                result = nodes[-1]
                plain: list[Any] = [None] * len(followers)
                flat, reindexers = gen_2d_view_of_epilogue_buf(
                    result, out, followers, reindexers, default_reindexers=plain
                )
            inputs = dict(zip(self.names, self.input_nodes, strict=True))
            buffers = {x.get_name(): (f"{name}_buffer", x) for name, x in inputs.items()}
            with ExitStack() as stack:
                if made is not out:
                    types = self._fake_get_dtype(made)
                    stack.enter_context(patch.object(V.graph, "get_dtype", types))
                text = self._template_from_string(self.source).render(
                    template=self,
                    kernel=kernel,
                    export=get_export_declaration(),
                    inputs=inputs,
                    buffers=dict(buffers.values()),  # two inputs may be parts of one
                    result=result,
                    flat=flat,
                    made=made,
                    nodes=nodes or None,
                    reindexers=reindexers,
                    aliases={alias: result.get_name() for alias in aliases},
                    threads=self.num_threads,
                    **inputs,
                    **self.values,
                )
            return str(text)

    def _copy(source: Any, target: Any) -> Any:
        load = source.make_loader()
        data = ir.Pointwise(
            device=target.get_device(),
            dtype=target.get_dtype(),
            inner_fn=lambda index: load(index),
            ranges=target.get_size(),
        )
        return ir.ComputedBuffer(name=target.get_name(), layout=target.get_layout(), data=data)

    return Template
