"""Run a graph as it is: every pass runs on it, and no code is generated.

So with ``codegen: "plain"`` or ``"off"``, and where a machine has no C++ compiler.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from functorch.compile import aot_module_simplified, default_partition, make_boxed_func
from torch import Tensor, fx

from padst_compiler.compat import inductor_decompositions
from padst_compiler.cpp_templates import has_compiler

__all__ = ["compile_plain", "lacks_compiler"]

GraphPass = Callable[[fx.Graph], None]


def lacks_compiler(examples: Sequence[Any], options: Mapping[str, Any]) -> bool:
    """Whether Inductor needs a C++ compiler for a graph and there is none; warns if so.

    Args:
        examples: inputs of the graph: on a GPU no such compiler is asked for.
        options: of Inductor.

    Example:
        >>> import torch
        >>> lacks_compiler([torch.zeros(2, device="meta")], {})
        False
    """
    if any(isinstance(t, Tensor) and t.device.type != "cpu" for t in examples):
        return False
    if has_compiler(options):
        return False
    warnings.warn(
        "Expected a C++ compiler. Got none. Install gcc or clang, or name one in the environment "
        "variable CXX. Until then padst folds and runs plain PyTorch: results stay right, slowly.",
        stacklevel=2,
    )
    return True


def compile_plain(
    graph_module: fx.GraphModule, examples: Sequence[Any], joint_pass: GraphPass | None
) -> Callable[..., Any]:
    """Return what runs a Dynamo graph through AOTAutograd, node by node.

    The graphs that ``joint_pass`` sees are those that Inductor would show it: the joint graph of
    forward and backward where something needs a gradient, else the forward graph.

    Args:
        graph_module: captured by Dynamo.
        examples: its inputs.
        joint_pass: changes a graph in place; None leaves it.
    """

    def partition(joint: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
        if joint_pass is not None:
            joint_pass(joint.graph)
            joint.recompile()
        return default_partition(joint, *args, **kwargs)

    def inference(forward: fx.GraphModule, _: Sequence[Any]) -> Any:
        if joint_pass is not None:
            joint_pass(forward.graph)
            forward.recompile()
        return make_boxed_func(forward.forward)

    def as_it_is(part: fx.GraphModule, _: Sequence[Any]) -> Any:
        return make_boxed_func(part.forward)

    compiled: Callable[..., Any] = aot_module_simplified(
        graph_module,
        examples,
        fw_compiler=as_it_is,
        inference_compiler=inference,
        partition_fn=partition,
        decompositions=dict(inductor_decompositions()),
        keep_inference_input_mutations=True,
    )
    return compiled
