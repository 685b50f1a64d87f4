"""Compile graphs for an H200 that is not there, as ``torch.compile`` does but for binaries.

``python -m tests.kernels.graphs [FOLDER ...]`` prints JSON: of every graph what Inductor's cache
said, and what CUDA graphs would record. Then one graph is compiled again for each folder: one with
other sources of ours, which are not run but hashed. Triton must not be in its interpreter here.
"""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx
from torch._dynamo.utils import counters
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._inductor import compile_fx, config, decomposition
from torch._inductor.async_compile import AsyncCompile
from torch._inductor.fx_passes import joint_graph, post_grad
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from padst_compiler import compat, digest
from padst_compiler.backend import _Lower as Lower
from padst_compiler.backend import prepare
from padst_compiler.kernels import install
from padst_compiler.ops import LINEAR, LINEAR_DW, LINEAR_DX
from padst_compiler.static_inputs import mark
from padst_compiler.structure_text import describe
from padst_compiler.structures.base import unit_of

from .fake_h200 import ATEN, h200, index_select, main_graph
from .generate import CASES, INPUTS, OUTPUTS, SHAPE, STRUCTURES, given, transformer

TOKENS = ("x", "three", "grad", "residual")  # all else lies where it lay, between calls
MISSING = {  # what a build of torch without CUDA lacks
    (torch._C, "_cuda_getCurrentRawStream"): lambda index: 0,
    (torch._C, "_cuda_cudaCachingAllocator_is_enabled"): lambda: True,
    (torch.cuda, "_exchange_device"): lambda index: 0,
    (torch.cuda, "_maybe_exchange_device"): lambda index: 0,
    (torch.cuda, "get_rng_state"): lambda *device: torch.zeros(16, dtype=torch.uint8),
    (torch.cuda, "set_rng_state"): lambda *state: None,
    # Patterns of Inductor's own are traced on the device that they are for.
    (joint_graph, "lazy_init"): lambda *device: None,
    (post_grad, "lazy_init"): lambda *device: None,
    (compat.force_strides(), "prim_meta_impl"): lambda x, strides: x.new_empty_strided(
        x.shape, strides
    ),
    (AsyncCompile, "triton"): lambda *kernel, **how: None,
}

FAST = "epilogue in tf32"

Records = list[dict[str, Any]]


@contextmanager
def compiling() -> Iterator[Records]:
    """Yield what is recorded of every graph that is compiled in the meantime."""
    found: Records = []
    inner: Any = compile_fx.compile_fx_inner
    recorded: list[tuple[int, ...]] = []  # what each part of a graph would write to

    def record(run: Any, static_input_idxs: Sequence[int] = (), **how: Any) -> Any:
        recorded.append(how["mutated_input_idxs"])
        return run

    def note(graph: fx.GraphModule, inputs: Sequence[Any], **how: Any) -> Any:
        recorded.clear()
        before = counters["inductor"].copy()
        compiled = inner(graph, inputs, **how)
        seen = counters["inductor"] - before
        info = compiled.cudagraph_info
        found.append(
            {
                "backward": bool(how.get("is_backward")),
                "cache": [name for name in seen if name.startswith("fxgraph_cache")],
                "key": compiled._fx_graph_cache_key,
                "refusals": [*info.cudagraph_fail_reasons],
                "reason": compiled.disabled_cudagraphs_reason,
                "inputs": len(inputs),
                "static": list(how.get("static_input_idxs", ())),
                "mutated": list(compiled.mutated_input_idxs),
                "recorded": [*recorded],
                "devices": sorted(compiled.device_types),
                "code": compiled.source_code,
            }
        )
        return compiled

    table = {ATEN.index_select.default: index_select}
    options = {"joint_graph_constant_folding": False, "compile_threads": 1}
    with h200(), ExitStack() as stack:
        for (where, name), answer in MISSING.items():
            stack.enter_context(mock.patch.object(where, name, answer, create=True))
        stack.enter_context(mock.patch.dict(decomposition.select_decomp_table(), table))
        stack.enter_context(mock.patch.object(compile_fx, "compile_fx_inner", note))
        stack.enter_context(mock.patch.object(compile_fx, "cudagraphify", record))
        stack.enter_context(config.patch(options))
        yield found


def there(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Return fake tensors like these on a GPU, but for flags, which are on the CPU."""
    with FakeTensorMode(shape_env=ShapeEnv()):
        return [
            torch.empty(t.shape, dtype=t.dtype, device="cpu" if t.dtype is torch.bool else "cuda")
            for t in tensors
        ]


def compile_case(name: str) -> None:
    """Compile a graph of operators in inference, all but its tokens frozen."""
    case = CASES[name]
    made = given(case.needs, torch.float32)
    inputs = there([made[need] for need in case.needs])
    mark(t for need, t in zip(case.needs, inputs, strict=True) if need not in TOKENS)
    _compile(case.run, inputs, digest.Unchanged())


def compile_model() -> None:
    """Compile a layer of a transformer as the backend does after it folded it."""
    graph, inputs = main_graph(transformer("random"), torch.zeros(1, 100, 256))
    _compile(graph, inputs, digest.Unchanged())


def compile_backward(name: str, recorded: bool) -> None:
    """Compile a layer's backward pass; autograd itself would need the device to be there.

    Args:
        name: of the structure.
        recorded: a recorder stands behind the product, as growth by gradients has it.
    """
    linear, structure = LINEAR[name], STRUCTURES[name]
    to_x, to_w = LINEAR_DX[name], LINEAR_DW[name]
    made = given(("grad", "x", f"v.{name}", f"i.{name}"), torch.float32)
    values, indices = made[f"v.{name}"], made[f"i.{name}"]
    slots, unit = structure.slots(indices, SHAPE), list(unit_of(values, indices))
    lists = slots, slots.float(), slots.float(), torch.zeros(0), torch.zeros((), dtype=torch.int32)

    def run(grad: Any, x: Any, v: Any, i: Any, *recorder: Any) -> Any:
        grad = grad * linear(x, v, i, None, OUTPUTS).sigmoid()
        if recorded:
            torch.ops.padst.observe(*recorder, grad, x, i, describe(structure))
        return to_x(grad, v, i, INPUTS), to_w(grad, x, i, unit)

    armed = torch.zeros((), dtype=torch.bool)
    inputs = there([made["grad"], made["x"], values, indices, *lists, armed])
    settings, _ = prepare({"kernels": "sparse"}, None, inputs)
    # Of diagonals other ways are tried, with an index that needs the device to be there.
    ours = digest.Unchanged() if name == "diagonal" else Lower(settings)
    if recorded:
        _compile_inner(run, inputs, ours)
    else:
        _compile(run, inputs[:4], ours)


def _compile(run: Callable[..., Any], inputs: Sequence[Tensor], ours: Any) -> None:
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)
    feed = [fx.Proxy(graph.placeholder(f"input{at}"), tracer) for at in range(len(inputs))]
    result = run(*feed)
    outputs = result if isinstance(result, tuple) else (result,)
    graph.output(tuple(output.node for output in outputs))
    options = {**compat.mode_options("reduce-overhead"), "joint_custom_pre_pass": ours}
    with torch.no_grad():
        compat.compile_with_inductor(fx.GraphModule({}, graph), inputs, options)


def _compile_inner(run: Callable[..., Any], inputs: Sequence[Tensor], ours: Any) -> None:
    """Compile what writes to its inputs; to functionalise it needs the device to be there."""
    mode = detect_fake_mode(inputs)
    assert mode is not None
    with mode, torch.no_grad():
        graph = make_fx(run, decomposition_table=decomposition.select_decomp_table())(*inputs)
    ours(graph.graph)
    graph.recompile()
    options = {**compat.mode_options("reduce-overhead"), "joint_custom_pre_pass": ours}
    with config.patch(options), V.set_fake_mode(mode), tracing(TracingContext(mode)):
        compile_fx.compile_fx_inner(graph, inputs, is_backward=True)


INFERENCE = ("epilogue", "maps", "mlp", "dx", "dw", "fan_in", "nm", "narrow", "diagonal")
GRAPHS: dict[str, Callable[[], None]] = {
    **{name: functools.partial(compile_case, name) for name in INFERENCE},
    "model": compile_model,
}
for _name in STRUCTURES:
    GRAPHS[f"{_name} backward"] = functools.partial(compile_backward, _name, recorded=False)
    GRAPHS[f"{_name} recorded"] = functools.partial(compile_backward, _name, recorded=True)


def main(folders: list[str]) -> None:
    """Print what was recorded of every graph, and of one in tf32 and with other sources of ours."""
    install()
    found: dict[str, Records] = {}
    with compiling() as seen:
        for name, run in GRAPHS.items():
            seen.clear()
            run()
            found[name] = seen.copy()
        seen.clear()
        torch.backends.cuda.matmul.allow_tf32 = True
        compile_case("epilogue")
        torch.backends.cuda.matmul.allow_tf32 = False
        found[FAST] = seen.copy()
        for folder in folders:
            seen.clear()
            with mock.patch.object(digest, "__file__", f"{folder}/digest.py"):
                compile_case("epilogue")
            found[folder] = seen.copy()
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
