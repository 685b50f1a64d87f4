"""Triton kernels as text: one source for Inductor's templates and for launches of our own.

A kernel's text is what Inductor's ``TritonTemplate`` takes: Jinja with the hooks ``def_kernel``,
``size``, ``load_input`` and ``store_output``. Inductor renders it with what it fuses in front and
behind; ``written`` renders it alone: a plain Triton function, all sizes numbers but the tokens.
So what is launched eagerly, interpreted in tests and compiled ahead of time is what Inductor runs.

Example:
    >>> body = '''
    ...     m, n = tl.program_id(0), tl.arange(0, 4)
    ...     {{load_input("X", "x", ("m", "n"), mask="n < 3")}}
    ...     {{store_output(("m", "n"), "x * SCALE", "n < 3")}}'''
    >>> scale = Kernel("scale", ("X",), body)
    >>> print(written(scale, {"X": (None, 3)}, 3, {"SCALE": 2.0}).split("tl", 1)[1])
    <BLANKLINE>
    <BLANKLINE>
    @triton.jit(do_not_specialize=("M",))
    def scale(X, OUT, M):
        SCALE: tl.constexpr = 2.0
        m, n = tl.program_id(0), tl.arange(0, 4)
        x = tl.load(X + (m) * 3 + (n) * 1, mask=n < 3, other=0.0)
        tl.store(OUT + (m) * 3 + (n), (x * SCALE).to(OUT.dtype.element_ty), mask=n < 3)
"""

from __future__ import annotations

import functools
import hashlib
import linecache
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from jinja2 import Environment, StrictUndefined
from torch import Tensor

__all__ = [
    "TOKENS",
    "Kernel",
    "Launch",
    "function_of",
    "is_interpreted",
    "launch",
    "mapped",
    "template_of",
    "written",
]

TOKENS = ("X", "G")  # inputs with a row for each token

TYPES = {torch.float32: "tl.float32", torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16"}

HEAD = "import triton\nimport triton.language as tl\n\n\n"


@dataclass(frozen=True)
class Kernel:
    """A Triton kernel of ours: its name, the tensors that it reads, and what it does.

    The body is indented by 4: Triton with Jinja's hooks, in which constants are known by name.
    """

    name: str
    inputs: tuple[str, ...]
    body: str

    def reading(self, *more: str) -> Kernel:
        """Return the kernel that reads more tensors, under a name that says so."""
        name = "_".join((self.name, *(tensor.lower() for tensor in more)))
        return Kernel(name, (*self.inputs, *more), self.body)


@dataclass(frozen=True)
class Launch:
    """How a kernel runs: its constants and a program's means.

    Attributes:
        values: constants of the text, but for those that follow from the inputs.
        tiles: programs for each ``BLOCK_M`` rows of the output; None where ``programs`` are all.
        programs: all of them, where rows have no say.
        warps: of a program.
        stages: of its pipeline of loads.
    """

    values: Mapping[str, Any]
    tiles: int | None = None
    programs: int = 0
    warps: int = 4
    stages: int = 3

    def grid(self, rows: int) -> int:
        """Return the number of programs for an output of so many rows."""
        if self.tiles is None:
            return self.programs
        return -(-rows // int(self.values["BLOCK_M"])) * self.tiles


def launch(
    kernel: Kernel,
    inputs: Mapping[str, Tensor],
    shape: tuple[int, int],
    how: Launch,
    *,
    bias: Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return what a kernel computes.

    Args:
        kernel: what runs.
        inputs: by name; those that do not lie in order are copied.
        shape: of the output.
        how: constants and programs.
        bias: added to what is stored, one number a column.
        dtype: of the output; None for that of ``X``.
    """
    given = {name: inputs[name].contiguous() for name in kernel.inputs}
    x, *_ = given.values()
    tokens = x.shape[0] if kernel.inputs[0] in TOKENS else shape[0]
    sizes = tuple((n, (None if n in TOKENS else len(t), *t.shape[1:])) for n, t in given.items())
    out = x.new_empty(shape, dtype=dtype)
    most = max(out.numel(), *(t.numel() for t in given.values()))
    values = {**how.values, "INDEX_DTYPE": "tl.int32" if most < 2**31 else "tl.int64"}
    values |= numbers(torch.float32 if is_interpreted() else x.dtype)
    function = _function(kernel, sizes, shape[1], tuple(values.items()), bias is not None)
    given |= {} if bias is None else {"BIAS": bias}
    if out.numel():
        run = function[(how.grid(shape[0]),)]
        with torch.cuda.device_of(x):  # Triton launches on the device that is current
            run(*given.values(), out, tokens, num_warps=how.warps, num_stages=how.stages)
    return out


def numbers(dtype: torch.dtype) -> dict[str, str]:
    """Return the constants that say how numbers are multiplied: fp32 as torch's dense products."""
    fast = dtype is torch.float32 and torch.backends.cuda.matmul.allow_tf32
    return {"DOT": TYPES[dtype], "PRECISION": repr("tf32" if fast else "ieee")}


@functools.lru_cache(maxsize=4096)
def _function(
    kernel: Kernel,
    sizes: tuple[tuple[str, tuple[int | None, ...]], ...],
    width: int,
    values: tuple[tuple[str, Any], ...],
    bias: bool,
) -> Any:
    """Return the Triton function of a launch; a text is written once."""
    return function_of(kernel.name, written(kernel, dict(sizes), width, dict(values), bias=bias))


def mapped(
    kernel: Kernel,
    inputs: Mapping[str, Tensor],
    width: int,
    how: Launch,
    in_map: Tensor | None,
    into: Tensor | None,
    bias: Tensor | None = None,
) -> Tensor:
    """Return what a kernel computes that can read inputs and store outputs through maps."""
    maps = {name: table for name, table in (("FROM", in_map), ("INTO", into)) if table is not None}
    values = {**how.values, "IN_MAP": in_map is not None, "OUT_MAP": into is not None}
    shape = (inputs["X"].shape[0], width)
    return launch(
        kernel.reading(*maps), {**inputs, **maps}, shape, replace(how, values=values), bias=bias
    )


def template_of(kernel: Kernel) -> str:
    """Return the text that ``TritonTemplate`` takes."""
    return f"{{{{def_kernel({', '.join(map(repr, kernel.inputs))})}}}}\n{kernel.body}"


def written(
    kernel: Kernel,
    sizes: Mapping[str, Sequence[int | None]],
    width: int,
    values: Mapping[str, Any],
    *,
    bias: bool = False,
) -> str:
    """Return the kernel as a Triton function of ``(*inputs, [BIAS,] OUT, M)``.

    Args:
        kernel: what is written.
        sizes: of its inputs, which lie in order; None is M, the number of tokens.
        width: of its output, whose rows lie in order.
        values: its constants.
        bias: add ``BIAS``, one number for each column, to what is stored.
    """

    def def_kernel(*names: str) -> str:
        given = ", ".join((*names, *(["BIAS"] if bias else []), "OUT", "M"))
        constants = "".join(f"\n    {key}: tl.constexpr = {value}" for key, value in values.items())
        return f'@triton.jit(do_not_specialize=("M",))\ndef {kernel.name}({given}):{constants}'

    def size(name: str | None, axis: int) -> str:
        known = sizes[name][axis] if name else None
        return "M" if known is None else str(known)

    def load_input(
        name: str, to: str, indices: Sequence[str], mask: str, **how: Any
    ) -> str:  # Inductor's arguments: `how` is for what it puts in between
        del how
        steps = [
            math.prod(int(n or 0) for n in sizes[name][axis + 1 :]) for axis in range(len(indices))
        ]
        place = " + ".join(f"({at}) * {step}" for at, step in zip(indices, steps, strict=True))
        return f"{to} = tl.load({name} + {place}, mask={mask}, other=0.0)"

    def store_output(indices: Sequence[str], value: str, mask: str, **how: Any) -> str:
        del how
        row, column = indices
        if bias:
            there = f"({column}) < {width}"
            value = f"{value} + tl.load(BIAS + ({column}), mask={there}, other=0.0).to(tl.float32)"
        place = f"({row}) * {width} + ({column})"
        return f"tl.store(OUT + {place}, ({value}).to(OUT.dtype.element_ty), mask={mask})"

    hooks = {f.__name__: f for f in (def_kernel, size, load_input, store_output)}
    template = Environment(undefined=StrictUndefined).from_string(template_of(kernel))
    lines = template.render(**values, **hooks).splitlines()
    return HEAD + "\n".join(line for line in lines if line.strip()) + "\n"


def is_interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter, on a CPU; it multiplies no bf16 there."""
    from triton import knobs

    return bool(knobs.runtime.interpret)


@functools.lru_cache(maxsize=1024)
def function_of(name: str, source: str) -> Any:
    """Return the Triton function of this name in ``source``; it runs once a text.

    Raises:
        ImportError: Triton is not installed.
    """
    import triton
    import triton.language as tl

    place = f"<{name} {hashlib.sha256(source.encode()).hexdigest()[:16]}>"
    linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
    space: dict[str, Any] = {"__name__": __name__, "triton": triton, "tl": tl}
    exec(compile(source, place, "exec"), space)  # Triton reads the source back, through linecache
    return space[name]
