"""Run the code that Inductor generated for a GPU on a CPU, its kernels in Triton's interpreter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from padst_compiler.triton_text import function_of

__all__ = ["Interpreted", "calls_of", "kernels_of", "run"]

KERNEL = re.compile(r"async_compile\.triton\('(\w+)', '''(.*?)''', device_str='cuda'\)", re.DOTALL)
DECORATOR = re.compile(r"@triton_heuristics\.\w+\(.*?\n\)\n(?=@triton\.jit)", re.DOTALL)
ELSEWHERE = {
    "from torch._C import _cuda_getCurrentRawStream as get_raw_stream": "get_raw_stream = int",
    "torch._C._dynamo.guards._empty_strided_cuda": (
        "lambda size, stride, dtype: torch.empty_strided(size, stride, dtype=dtype)"
    ),
    "with torch.cuda._DeviceGuard(0):": "if True:",
    "torch.cuda.set_device(0)": "pass",
    "async_compile = AsyncCompile()": "",
    "async_compile.wait(globals())": "",
    "del async_compile": "",
}
DRIVER = "triton_helpers.set_driver_to_gpu()"
BLOCK = 256  # numbers that a program of a pointwise kernel computes
SIDE = 32  # of a tile of a copy that turns


def kernels_of(code: str) -> dict[str, str]:
    """Return the sources of the kernels in generated code, by name."""
    return dict(KERNEL.findall(code))


def calls_of(code: str) -> str:
    """Return the lines that call kernels and operators."""
    lines = code.split("class Runner", 1)[1].splitlines()
    return "\n".join(line for line in lines if not line.strip().startswith("#"))


def run(code: str, arguments: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return what the code computes for tensors on a CPU."""
    for there, here in ELSEWHERE.items():
        code = code.replace(there, here)
    text = KERNEL.sub(lambda found: f"kernels[{found[1]!r}]", code)
    kernels = {name: Interpreted(name, source) for name, source in kernels_of(code).items()}
    space: dict[str, Any] = {"kernels": kernels, "__name__": "generated"}
    exec(compile(text, "<generated>", "exec"), space)
    result: tuple[Tensor, ...] = space["call"](list(arguments))
    return result


class Interpreted:
    """A kernel as generated code calls it."""

    def __init__(self, name: str, source: str) -> None:
        plain = DECORATOR.sub("", source)
        # The interpreter has no functions of other libraries, and no products of bf16.
        plain = plain.replace("libdevice.erf", "tl.erf").replace(DRIVER, "")
        plain = re.sub(r"DOT : tl.constexpr = tl.\w+", "DOT : tl.constexpr = tl.float32", plain)
        self._function, self._on_grid = function_of(name, plain), "_grid_0" in source
        self._reduces, self._turns = "persistent_reduction" in source, "YBLOCK" in source

    def run(self, *arguments: Any, stream: object) -> None:
        del stream
        if self._on_grid:
            *given, x, y, z = arguments
            self._function[(x, y, z)](*given)
            return
        across, *along = [a for a in arguments if isinstance(a, int)]
        if self._turns:  # rows, then columns
            grid = (-(-along[0] // SIDE), -(-across // SIDE))
            self._function[grid](*arguments, YBLOCK=SIDE, XBLOCK=SIDE)
            return
        assert len(along) == self._reduces, "what else Inductor generates is not run here"
        block = 1 if self._reduces else BLOCK  # a program of a sort or a sum takes a whole row
        self._function[(-(-across // block),)](*arguments, XBLOCK=block)
