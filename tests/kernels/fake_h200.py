"""An H200 that is not there: Inductor generates code for it, nothing is launched.

Only what Inductor and Triton ask of a device is answered. The answers are patched into torch for
the time of a ``with``, in a process of its own (``generate.py``).
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import fx, nn
from torch._dynamo import device_interface
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

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
        mock.patch.object(torch.cuda, "is_tf32_supported", lambda: True),
        mock.patch.object(torch.version, "cuda", "13.0"),
        mock.patch.object(torch._inductor.utils, "get_max_num_sms", lambda: 132),
    ]
    driver.set_active(_Driver())
    with ExitStack() as stack:
        for answer in answers:
            stack.enter_context(answer)
        yield


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


def code_of_model(model: nn.Module, x: torch.Tensor) -> str:
    """Return the code that is generated for a model in inference, after our passes.

    Args:
        model: in eval mode, on a CPU.
        x: its input, on a CPU; the code is for both on "cuda".
    """
    function, fakes, reals, state = exported(model, (x,), False)
    mode = FakeTensorMode(shape_env=ShapeEnv())
    with mode:
        there = [torch.empty(t.shape, dtype=t.dtype, device="cuda") for t in fakes]
    passes = inference_passes(CANDIDATES, prefer="sparse", fold=True)
    folded = fold(function, there, reals, state, passes, verify=False)
    before = [node.meta["val"] for node in folded.inputs]
    parts = split(folded.graph_module, folded.facts)
    given = [*(before[i] for i in parts.main_inputs), *parts.derived]
    table = {**select_decomp_table(), ATEN.index_select.default: _index_select}
    with mode:
        graph = make_fx(parts.main, decomposition_table=table)(*given)
    return _generated(graph, given, mode)


def _index_select(x: torch.Tensor, dim: int, index: torch.Tensor) -> Any:
    """Return what Inductor's own decomposition does, which needs a device that is there."""
    return ATEN.index.Tensor(x, [None] * (dim % x.dim()) + [index])


def _generated(graph: fx.GraphModule, given: list[torch.Tensor], mode: FakeTensorMode) -> str:
    options = {"compile_threads": 1, "benchmark_epilogue_fusion": False}
    lowering = GraphLowering(graph, shape_env=mode.shape_env, is_inference=True)
    handlers = (V.set_fake_mode(mode), DebugContext(), V.set_graph_handler(lowering))
    with ExitStack() as stack:
        for handler in (*handlers, config.patch(options)):
            stack.enter_context(handler)
        lowering.run(*given)
        code: Any = lowering.codegen()[0]
    return str(getattr(code, "value", code))
