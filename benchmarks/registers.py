"""What Triton's compiler makes of every kernel: registers, spills, shared memory, matrix units.

    python benchmarks/registers.py [--arch 90 80 100] [--kernel NAME] [--quick] [--tuned] [--json]

No GPU is needed: kernels are compiled ahead of time, in every tile that typical layers get, and
what ptxas used is read back. Equal kernels are compiled and printed once, under their first layer.

A new family of kernels is a function that returns its ``Case``s, and a row of ``FAMILIES``.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, astuple, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from padst_compiler.kernels import (
    triton_block,
    triton_expand,
    triton_mlp,
    triton_sums,
    triton_turned,
)
from padst_compiler.structure_text import describe
from padst_compiler.structures import NM, Block, Diagonal, FanIn, Shape, Structure
from padst_compiler.text import table
from padst_compiler.triton_text import TYPES, Kernel, Launch, function_of, written

SPARSITY = 0.9
LAYERS = (Shape(3072, 768), Shape(768, 3072), Shape(11008, 4096))  # outputs, inputs
TOKENS = (1, 16, 64, 6304)
NUMBERS = {  # how products are made: the type of the inputs, and the precision of fp32
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "fp16": (torch.float16, "ieee"),
    "bf16": (torch.bfloat16, "ieee"),
}
POINTERS = {
    torch.float32: "*fp32",
    torch.float16: "*fp16",
    torch.bfloat16: "*bf16",
    torch.uint8: "*u8",
    torch.int16: "*i16",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
MATRIX = ("wgmma", "tcgen05.mma", "mma")  # in PTX; the last also begins "mma.sync"


class Setting(NamedTuple):
    """What a kernel is asked to do."""

    layer: Shape
    tokens: int
    numbers: str
    maps: bool

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the inputs."""
        return NUMBERS[self.numbers][0]


@dataclass(frozen=True)
class Case:
    """A kernel as it is launched.

    Attributes:
        kernel: what runs.
        inputs: size and type of each; a size of None is the number of tokens.
        width: of the output.
        how: constants and programs.
        bias: whether one is added.
        out: type of the output; None for that of the features.
    """

    kernel: Kernel
    inputs: Mapping[str, tuple[tuple[int | None, ...], torch.dtype]]
    width: int
    how: Launch
    bias: bool = False
    out: torch.dtype | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of the first input, of tokens."""
        return next(iter(self.inputs.values()))[1]

    def source(self, precision: str) -> str:
        """Return the text that ``triton_text.launch`` would run."""
        values = {**self.how.values, "INDEX_DTYPE": "tl.int32", "DOT": TYPES[self.dtype]}
        values["PRECISION"] = repr(precision)
        sizes = {name: size for name, (size, _) in self.inputs.items()}
        return written(self.kernel, sizes, self.width, values, bias=self.bias)

    def signature(self) -> dict[str, str]:
        """Return the types of the arguments, by Triton's names."""
        types = {name: dtype for name, (_, dtype) in self.inputs.items()}
        bias = {"BIAS": self.dtype} if self.bias else {}
        pointers = {**types, **bias, "OUT": self.out or self.dtype}
        return {name: POINTERS[dtype] for name, dtype in pointers.items()} | {"M": "i32"}


# -- cases: one function for each family of kernels ------------------------------------------------


def mapped(case: Case, setting: Setting) -> Case:
    """Return the case with maps on both sides, or with none, as ``triton_text.mapped`` does."""
    inputs, outputs = case.inputs["X"][0][-1], case.width
    maps = {"FROM": ((inputs,), torch.int64), "INTO": ((outputs,), torch.int64)}
    values = {**case.how.values, "IN_MAP": setting.maps, "OUT_MAP": setting.maps}
    plain = replace(case, how=replace(case.how, values=values))
    if not setting.maps:
        return plain
    return replace(plain, kernel=case.kernel.reading(*maps), inputs={**case.inputs, **maps})


def block(setting: Setting, structure: Structure) -> Iterator[Case]:
    """Return the products of ``kernels/triton_block.py``."""
    layer, tokens, dtype = setting.layer, setting.tokens, setting.dtype
    (rows, columns), (c, r) = structure.table(layer), structure.unit(layer)
    size = (rows, structure.kept(layer, SPARSITY), c, r)
    x, g = ((None, layer.in_features), dtype), ((None, layer.out_features), dtype)
    w, indices = (size, dtype), (size[:2], torch.int32)
    order, starts = ((rows * size[1],), torch.int32), ((columns + 1,), torch.int32)

    given: dict[str, Any] = {"X": x, "W": w, "INDICES": indices}
    how = triton_block.sums(size, rows, c, tokens, dtype, gathered=setting.maps)
    yield mapped(
        Case(triton_block.LINEAR, given, layer.out_features, how, bias=not setting.maps), setting
    )
    given = {"X": g, "W": w, "ORDER": order, "STARTS": starts}
    how = triton_block.sums(size, columns, r, tokens, dtype, gathered=setting.maps)
    yield mapped(Case(triton_block.DX, given, layer.in_features, how), setting)
    if not setting.maps:  # gradients of weights read no maps
        how = triton_block.gradient(size, tokens, layer.in_features, dtype)
        out = torch.float32 if how.values["SPLIT"] > 1 else dtype
        yield Case(triton_block.DW, {"X": x, "G": g, "INDICES": indices}, r, how, out=out)


def element(setting: Setting, structure: Structure) -> Iterator[Case]:
    """Return the sums of ``triton_sums.py``, and the products of ``triton_expand.py``."""
    layer, tokens, dtype = setting.layer, setting.tokens, setting.dtype
    inputs, outputs = layer.in_features, layer.out_features
    table = structure.index_shape(layer, structure.kept(layer, SPARSITY))
    size, diagonal = (*table, *structure.unit(layer)), structure.name == "diagonal"
    x, g = ((None, inputs), dtype), ((None, outputs), dtype)
    w, indices = (size, dtype), (table, torch.int32)
    lists = {"ORDER": ((math.prod(table),), torch.int32), "STARTS": ((inputs + 1,), torch.int32)}

    given: dict[str, Any] = {"X": x, "W": w, "INDICES": indices}
    turned: dict[str, Any] = {"X": g, "W": w, "INDICES": indices}
    if diagonal:
        text = text_dx = triton_sums.DIAGONAL
        how = triton_sums.diagonal_sums(size, inputs, outputs, tokens)
        how_dx = triton_sums.diagonal_sums(size, outputs, inputs, tokens, dx=True)
    else:
        text, text_dx, turned = triton_sums.GATHERED, triton_sums.LISTED, {"X": g, "W": w, **lists}
        how = triton_sums.gathered_sums(size, inputs, tokens)
        how_dx = triton_sums.listed_sums(size, inputs, tokens)
    yield mapped(Case(text, given, outputs, how, bias=not setting.maps), setting)
    if not diagonal:  # indices of frozen weights
        narrow = torch.uint8 if structure.name == "nm" else torch.int16
        frozen = {**given, "INDICES": (table, narrow)}
        yield mapped(Case(text, frozen, outputs, how, bias=not setting.maps), setting)
        if triton_expand.pays(size, inputs, tokens, dtype):
            how = triton_expand.expanded(size, inputs, tokens)
            for read in (given, frozen):
                case = Case(triton_expand.EXPANDED, read, outputs, how, bias=not setting.maps)
                yield mapped(case, setting)
        yield from few(setting, structure, size, narrow)
    yield mapped(Case(text_dx, turned, inputs, how_dx), setting)
    if not setting.maps:
        text = triton_sums.DIAGONAL_DW if diagonal else triton_sums.GATHERED_DW
        how = (
            triton_sums.diagonal_gradient(size, inputs, outputs, tokens)
            if diagonal
            else triton_sums.gathered_gradient(size, inputs, tokens)
        )
        out = torch.float32 if how.values["SPLIT"] > 1 else dtype
        given = {"X": x, "G": g, "INDICES": indices}
        yield Case(text, given, int(how.values["WIDE"]), how, out=out)


def few(
    setting: Setting, structure: Structure, size: tuple[int, ...], places: torch.dtype
) -> Iterator[Case]:
    """Return the sums of ``kernels/triton_turned.py``, fan-in for a few tokens."""
    layer, tokens, dtype = setting.layer, setting.tokens, setting.dtype
    if structure.name != "fan_in" or not 1 < tokens <= triton_turned.TOKENS:
        return
    how = triton_turned.gathered(size, tokens)
    how = replace(how, values={**how.values, "OUT_MAP": setting.maps})
    x = (layer.in_features, how.values["ROWS"])
    given: dict[str, Any] = {"XT": (x, dtype), "W": (size, dtype), "INDICES": (size, places)}
    into = {"INTO": ((layer.out_features,), torch.int64)} if setting.maps else {}
    kernel = triton_turned.GATHERED.reading(*into)
    yield Case(kernel, {**given, **into}, layer.out_features, how, bias=not setting.maps)


def mlp(setting: Setting, structure: Structure) -> Iterator[Case]:
    """Return the layer with the one that turns it back, by ``kernels/triton_mlp.py``."""
    layer, tokens, dtype = setting.layer, setting.tokens, setting.dtype
    back = Shape(layer.in_features, layer.out_features)
    first, second = (
        (each.out_features // r, structure.kept(each, SPARSITY), c, r)
        for each, (c, r) in ((layer, structure.unit(layer)), (back, structure.unit(back)))
    )
    given: dict[str, Any] = {"X": ((None, layer.in_features), dtype)}
    for name, size in (("1", first), ("2", second)):
        given |= {f"W{name}": (size, dtype), f"I{name}": (size[:2], torch.int32)}
    given["B1"] = ((layer.out_features,), dtype)
    how = triton_mlp.programs(
        first, second, tokens, dtype, "gelu", biased=True, gathered=setting.maps
    )
    yield mapped(Case(triton_mlp.MLP.reading("B1"), given, back.out_features, how), setting)


FAMILIES: tuple[tuple[Callable[[Setting, Structure], Iterable[Case]], tuple[Structure, ...]], ...]
FAMILIES = (  # and the structures that each is compiled for; --quick takes the last, the heaviest
    (block, (Block(16), Block(32), Block(128), Block(64))),
    (element, (FanIn(), Diagonal(), NM(16))),
    (mlp, (Block(16), Block(32), Block(128), Block(64))),
)
QUICK = (
    Setting(LAYERS[0], TOKENS[-1], "fp32", maps=False),
    Setting(LAYERS[0], TOKENS[-1], "bf16", maps=False),
    Setting(LAYERS[0], TOKENS[-1], "bf16", maps=True),
)


def cases(quick: bool) -> Iterator[tuple[Setting, Structure, Case]]:
    """Return all cases, or the heaviest of each kernel."""
    every = itertools.starmap(Setting, itertools.product(LAYERS, TOKENS, NUMBERS, (False, True)))
    for setting in QUICK if quick else every:
        for family, structures in FAMILIES:
            for structure in structures[-1:] if quick else structures:
                for case in family(setting, structure):
                    yield setting, structure, case


# -- what the compiler makes of them ---------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One kernel for one architecture; its fields are the columns of the table."""

    kernel: str
    arch: int
    numbers: str
    layer: str
    structure: str
    tokens: int
    tile: str
    warps: int
    stages: int
    registers: int
    spilled: int  # bytes a thread
    shared: int  # bytes a program
    tensor: int  # columns of tensor memory a program, which sm_100 has
    matrix: str
    load: int  # bits of the widest from global memory


def disassembler() -> Path:
    """Return the program of Triton's that says what a compiled kernel uses.

    Raises:
        RuntimeError: there is no compiler to ask.
    """
    if os.environ.get("TRITON_INTERPRET", "0").lower() not in ("", "0", "false", "off", "no"):
        raise RuntimeError(
            "Expected Triton's compiler. Got TRITON_INTERPRET, its interpreter. Do unset it."
        )
    try:
        import triton
    except ImportError:
        raise RuntimeError(
            "Expected Triton, which compiles the kernels. Got none. Do pip install triton."
        ) from None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not path.exists():
        raise RuntimeError(
            f"Expected cuobjdump in Triton {triton.__version__}. Got none. "
            "Do install Triton's own wheel for Linux."
        )
    return path


def compiled(case: Case, source: str, arch: int) -> Any:
    """Return what Triton makes of a case."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, signature = function_of(case.kernel.name, source), case.signature()
    # What a launch finds: tensors begin at multiples of 16 bytes, and nothing is known of M.
    aligned = {(at,): [["tt.divisibility", 16]] for at in range(len(signature) - 1)}
    text = ASTSource(function, signature, constexprs={}, attrs=aligned)
    options = {
        "num_warps": case.how.warps,
        "num_stages": case.how.stages,
        "enable_fp_fusion": True,
    }
    try:
        return triton.compile(text, target=GPUTarget("cuda", arch, 32), options=options)
    except Exception as error:
        raise RuntimeError(
            f"Expected {case.kernel.name} to compile for sm_{arch}. Got {error!r}. "
            "Do choose another --arch, or mend the kernel."
        ) from error


def usage(cuobjdump: Path, cubin: bytes) -> dict[str, int]:
    """Return the registers and spilled bytes of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [str(cuobjdump), "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {name: int(count) for name, count in re.findall(r"\b([A-Z]+):(\d+)", said)}
    # ptxas counts what it spills as stack; local memory is for arrays, of which there are none.
    return {"registers": used["REG"], "spilled": used["STACK"] + used["LOCAL"]}


def widest(ptx: str) -> int:
    """Return the bits of the widest load from global memory, asynchronous or not.

    Example:
        >>> widest("ld.global.v4.b32 {%r1, %r2, %r3, %r4}, [ %rd1 + 0 ];")
        128
        >>> widest("cp.async.ca.shared.global [ %r1 + 0 ], [ %rd2 + 0 ], 0x4, %r3;")
        32
    """
    loads = re.findall(r"\bld\.global\S*?(?:\.v(\d))?\.[busf](\d+)\s", ptx)
    copies = re.findall(r"\bcp\.async\.c[ag]\.[^;]*?\], 0x([0-9a-f]+)", ptx)
    found = [int(count or 1) * int(bits) for count, bits in loads]
    return max(found + [8 * int(count, 16) for count in copies], default=0)


def row(cuobjdump: Path, arch: int, setting: Setting, structure: Structure, case: Case) -> Row:
    """Return the row of one case."""
    made = compiled(case, case.source(NUMBERS[setting.numbers][1]), arch)
    values = case.how.values
    tile = [values[key] for key in ("BLOCK_M", "BLOCK_N", "BLOCK_K") if key in values]
    return Row(
        kernel=case.kernel.name,
        arch=arch,
        numbers=setting.numbers,
        layer=f"{setting.layer.in_features}-{setting.layer.out_features}",
        structure=describe(structure),
        tokens=setting.tokens,
        tile="x".join(map(str, tile)),
        warps=case.how.warps,
        stages=case.how.stages,
        shared=int(made.metadata.shared),
        tensor=int(made.metadata.tmem_size or 0),
        matrix=next((word for word in MATRIX if word in made.asm["ptx"]), "none"),
        load=widest(made.asm["ptx"]),
        **usage(cuobjdump, made.asm["cubin"]),
    )


def ways(case: Case) -> list[Case]:
    """Return the case with all programs that Inductor times under ``max-autotune``."""
    if case.kernel.body not in (triton_block.LINEAR.body, triton_block.DX.body):
        return [case]
    return [replace(case, how=how) for how in triton_block.variants(case.how, case.dtype)]


def rows(archs: Iterable[int], quick: bool, name: str, tuned: bool = False) -> list[Row]:
    """Return the rows of all cases of a name; of equal kernels, that of the first."""
    cuobjdump = disassembler()
    distinct: dict[tuple[Any, ...], tuple[Setting, Structure, Case]] = {}
    every = (
        (s, t, one) for s, t, case in cases(quick) for one in (ways(case) if tuned else [case])
    )
    for setting, structure, case in every:
        source = case.source(NUMBERS[setting.numbers][1])
        key = (source, *case.signature().values(), case.how.warps, case.how.stages)
        if name in case.kernel.name:
            distinct.setdefault(key, (setting, structure, case))
    todo = list(itertools.product(archs, distinct.values()))
    return [row(cuobjdump, arch, *one) for arch, one in tqdm(todo, unit="kernel", ncols=80)]


def summary(found: list[Row]) -> str:
    """Return the most of everything, by architecture and kernel."""
    groups: dict[tuple[str, int], list[Row]] = {}
    for one in found:
        groups.setdefault((one.kernel, one.arch), []).append(one)
    lines = [
        (
            *key,
            len(group),
            max(one.registers for one in group),
            sum(one.spilled > 0 for one in group),
            max(one.shared for one in group),
            max(one.tensor for one in group),
            " ".join(sorted({one.matrix for one in group})),
        )
        for key, group in groups.items()
    ]
    counts = ("compiled", "registers", "that spill", "shared", "tensor")
    return table(("kernel", "arch", *counts, "matrix"), lines)


def main() -> None:
    """Print the table, or JSON."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--arch", nargs="+", type=int, default=[90, 80], help="such as 90 80 100")
    parser.add_argument("--kernel", default="", help="only those with this in their names")
    parser.add_argument("--quick", action="store_true", help="the heaviest of each kernel")
    parser.add_argument("--tuned", action="store_true", help="what max-autotune times, too")
    parser.add_argument("--json", action="store_true", help="print JSON")
    args = parser.parse_args()
    try:
        found = rows(args.arch, args.quick, args.kernel, args.tuned)
    except RuntimeError as error:
        sys.exit(str(error))
    if args.json:
        print(json.dumps([asdict(one) for one in found]))
        return
    print(table([field.name for field in fields(Row)], map(astuple, found)))
    print(f"\n{summary(found)}")


if __name__ == "__main__":
    main()
