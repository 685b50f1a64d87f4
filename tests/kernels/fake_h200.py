"""An H200 that is not there: Inductor generates code for it, nothing is launched.

Only what Inductor and Triton ask of a device is answered. The answers are patched into torch for
the time of a ``with``, in a process of its own (``generate.py``).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch._dynamo import device_interface
from torch._guards import detect_fake_mode
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.select_algorithm import AlgorithmSelectorCache
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode, fake_tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from padst_compiler import triton_templates
from padst_compiler.compat import inductor_defaults
from padst_compiler.flat import exported
from padst_compiler.fold import fold
from padst_compiler.frozen import split
from padst_compiler.kernels import CANDIDATES
from padst_compiler.passes import inference_passes

ATEN = torch.ops.aten

FACTS: Any = types.SimpleNamespace(
    name="NVIDIA H200 (not there)",
    major=9,
    minor=0,
    multi_processor_count=132,
    warp_size=32,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    total_memory=141 << 30,
    shared_memory_per_block_optin=232448,
    shared_memory_per_block=49152,
    L2_cache_size=50 << 20,
    gcnArchName="",
)


class _Interface(device_interface.CudaInterface):
    class Worker(device_interface.CudaInterface.Worker):
        set_device = staticmethod(lambda device: None)
        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: FACTS)

    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 1)
    current_device = staticmethod(lambda: 0)
    get_compute_capability = staticmethod(lambda device=None: 90)
    is_triton_capable = staticmethod(lambda device=None: True)
    raise_if_triton_unavailable = staticmethod(lambda device=None: None)
    get_raw_stream = staticmethod(lambda index: 0)
    synchronize = staticmethod(lambda device=None: None)
    get_device_properties = staticmethod(lambda device=None: FACTS)
    is_bf16_supported = staticmethod(lambda including_emulation=False: True)


class _Driver:
    """What Triton asks before a launch."""

    launcher_cls = None
    binary_ext = "cubin"

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_device_capability(self, device: int = 0) -> tuple[int, int]:
        return 9, 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)

    def get_device_interface(self) -> type[_Interface]:
        return _Interface


@contextmanager
def h200() -> Iterator[None]:
    """Answer for an H200."""
    import torch._inductor.utils
    from torch.utils import _triton
    from triton.runtime import driver

    if not device_interface._device_initialized:
        device_interface.init_device_reg()
    for name in ("cuda", "cuda:0"):
        device_interface.register_interface_for_device(name, _Interface)
    _triton.has_triton.cache_clear()
    answers: list[Any] = [
        mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: FACTS),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(fake_tensor, "init_gpu_context", lambda device: None),
        mock.patch.object(torch.cuda, "is_tf32_supported", lambda: True),
        mock.patch.object(torch.version, "cuda", "13.0"),
        mock.patch.object(torch._inductor.utils, "get_max_num_sms", lambda: 132),
    ]
    driver.set_active(_Driver())
    with ExitStack() as stack:
        for answer in answers:
            stack.enter_context(answer)
        yield


@dataclass
class Timed:
    """What Inductor would time of one graph: a kernel by its choices, before anything is fused.

    ``grid`` is the number of programs of each, ``lists`` what is made for inputs that are lists.
    """

    name: str = ""
    sources: list[str] = field(default_factory=list)
    grid: list[int] = field(default_factory=list)
    lists: dict[str, list[Any]] = field(default_factory=dict)


@contextmanager
def tuned(fastest: int) -> Iterator[Timed]:
    """Let Inductor tune, and one of several choices be the fastest; nothing is timed.

    Args:
        fastest: its place among the choices.
    """
    timed = Timed()

    def timings(selector: Any, *given: Any, **more: Any) -> dict[Any, float]:
        _, nodes, _, makers, _, choices, *_ = given
        timed.name = choices[0].bmreq.kernel_name
        timed.sources = [Path(choice.bmreq.module_path).read_text() for choice in choices]
        timed.grid = [choice.bmreq.extra_args[-3] for choice in choices]
        for place, make in makers.items():
            make(nodes[place])
        return {choice: float(at != fastest) for at, choice in enumerate(choices)}

    def keep(name: str, *how: Any) -> Any:
        timed.lists[name] = example(name, *how).tolist()
        return mock.Mock()  # there is no GPU to move it to

    example = triton_templates.example
    with ExitStack() as stack:
        stack.enter_context(config.patch(max_autotune=True, precompilation_timeout_seconds=0))
        stack.enter_context(mock.patch.object(AlgorithmSelectorCache, "do_autotuning", timings))
        stack.enter_context(mock.patch.object(triton_templates, "example", keep))
        yield timed


def code_of(
    function: Callable[..., Any],
    arguments: Callable[[], list[torch.Tensor]],
    *,
    dynamic: bool = False,
) -> str:
    """Return the code that Inductor generates for a graph of operators.

    Args:
        function: what is traced.
        arguments: makes its arguments, on "cuda": they are fake.
        dynamic: let the first size of the first argument be a symbol.
    """
    from torch._dynamo.source import ConstantSource
    from torch.fx.experimental.symbolic_shapes import DimDynamic

    shapes = ShapeEnv()
    mode = FakeTensorMode(shape_env=shapes)
    with mode:
        given = arguments()
        if dynamic:
            first, size = given[0], given[0].shape[0]
            symbol = shapes.create_symbol(size, ConstantSource("s0"), DimDynamic.DYNAMIC)
            rows = shapes.create_symintnode(symbol, hint=size)
            given[0] = torch.empty(rows, *first.shape[1:], dtype=first.dtype, device="cuda")
        graph = make_fx(function, decomposition_table=select_decomp_table())(*given)
    return _generated(graph, given, mode)


def main_graph(model: nn.Module, x: torch.Tensor) -> tuple[fx.GraphModule, list[torch.Tensor]]:
    """Return what is compiled of a model in inference after our passes, and its fake inputs.

    Args:
        model: in eval mode, on a CPU.
        x: its input, on a CPU; the graph is for both on "cuda".
    """
    function, fakes, reals, state = exported(model, (x,), False)
    with FakeTensorMode(shape_env=ShapeEnv()):
        there = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in fakes]
    passes = inference_passes(CANDIDATES, prefer="sparse", fold=True)
    folded = fold(function, there, reals, state, passes, verify=False)
    before = [node.meta["val"] for node in folded.inputs]
    parts = split(folded.graph_module, folded.facts)
    return parts.main, [*(before[i] for i in parts.main_inputs), *parts.derived]


def code_of_model(model: nn.Module, x: torch.Tensor) -> str:
    """Return the code that is generated for a model in inference, after our passes.

    Args:
        model: in eval mode, on a CPU.
        x: its input, on a CPU; the code is for both on "cuda".
    """
    graph, given = main_graph(model, x)
    mode = detect_fake_mode(given)
    assert mode is not None
    table = {**select_decomp_table(), ATEN.index_select.default: index_select}
    with mode:
        graph = make_fx(graph, decomposition_table=table)(*given)
    return _generated(graph, given, mode)


def index_select(x: torch.Tensor, dim: int, index: torch.Tensor) -> Any:
    """Return what Inductor's own decomposition does, which needs a device that is there."""
    return ATEN.index.Tensor(x, [None] * (dim % x.dim()) + [index])


def _generated(graph: fx.GraphModule, given: list[torch.Tensor], mode: FakeTensorMode) -> str:
    options = {**inductor_defaults(), "compile_threads": 1}
    lowering = GraphLowering(graph, shape_env=mode.shape_env, is_inference=True)
    handlers = (V.set_fake_mode(mode), DebugContext(), V.set_graph_handler(lowering))
    with ExitStack() as stack:
        for handler in (*handlers, config.patch(options)):
            stack.enter_context(handler)
        lowering.run(*given)
        code: Any = lowering.codegen()[0]
    return str(getattr(code, "value", code))
