"""What is timed on a GPU, the most important first."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

from padst_compiler.bench_models import Size

__all__ = ["PARTS", "Case", "ModelCase", "cases", "models"]

PARTS = ("correctness", "layers", "mlp", "maps", "training", "models")
"""In the order in which they run."""

VIT, BACK, GPT, LLAMA = (768, 3072), (3072, 768), (1024, 4096), (4096, 11008)
BLOCKS = ("block:64", "block:32", "block:16")
SUMS = ("diagonal", "nm:16", "fan_in")
ALL = (*BLOCKS, *SUMS)


@dataclass(frozen=True)
class Case:
    """A layer: what is timed.

    Attributes:
        part: one of ``PARTS``.
        layer: inputs and outputs.
        tokens: how many.
        structure: as ``SparseConfig`` spells it.
        sparsity: that is asked for.
        dtype: bf16, fp16, fp32, or tf32, which is fp32 with tf32 allowed in products.
        full: with what must be compiled, which takes seconds, and all peers.
    """

    part: str
    layer: tuple[int, int]
    tokens: int
    structure: str
    sparsity: float = 0.9
    dtype: str = "bf16"
    full: bool = True

    def __str__(self) -> str:
        inputs, outputs = self.layer
        return (
            f"{inputs}-{outputs} {self.tokens} tokens {self.structure} {self.sparsity} {self.dtype}"
        )


@dataclass(frozen=True)
class ModelCase:
    """A model, and ``which`` of its layers are sparse: "MLPs", "all" or "all, MLPs fused"."""

    name: str
    size: Size
    batch: int
    which: str = "all, MLPs fused"
    train: bool = False
    structure: str = "block:64"
    sparsity: float = 0.9

    def __str__(self) -> str:
        mode = "training" if self.train else "inference"
        return f"{self.name} batch {self.batch} {mode} {self.which} {self.structure}"


def cases(part: str, *, tiny: bool = False, full: bool = False) -> list[Case]:
    """Return the cases of a part that times layers, the most important first.

    Args:
        part: any of ``PARTS`` but "models".
        tiny: shapes for Triton's interpreter.
        full: compile everywhere, however long it takes.

    Example:
        >>> print(cases("layers")[0])
        768-3072 6304 tokens block:64 0.9 bf16
    """
    if tiny:
        return _tiny(part)
    found = dict.fromkeys(_MAKERS[part]())  # each once
    if full:
        return list(dict.fromkeys(replace(case, full=True) for case in found))
    return [case for case in found if case.full or replace(case, full=True) not in found]


def models(*, tiny: bool = False) -> list[ModelCase]:
    """Return the cases of whole models, the most important first."""
    if tiny:
        vit = Size(text=False, depth=1, width=32, heads=2, side=32, outputs=7)
        gpt = Size(text=True, depth=1, width=32, heads=2, side=9, outputs=11)
        return [
            ModelCase("vit", vit, 2, "MLPs", structure="block:16", sparsity=0.5),
            ModelCase("vit", vit, 2, "all", train=True, structure="block:16", sparsity=0.5),
            ModelCase("gpt", gpt, 1, structure="block:16", sparsity=0.5),
        ]
    vit = Size(text=False, depth=12, width=768, heads=12, side=224, outputs=1000)
    gpt = Size(text=True, depth=12, width=768, heads=12, side=1024, outputs=50257)
    medium = replace(gpt, depth=24, width=1024, heads=16)
    return [
        ModelCase("vit_b16", vit, 256),
        ModelCase("vit_b16", vit, 256, "all", train=True),
        ModelCase("vit_b16", vit, 256, "all"),
        ModelCase("vit_b16", vit, 256, "MLPs"),
        ModelCase("vit_b16", vit, 1),
        ModelCase("gpt2", gpt, 32),
        ModelCase("gpt2", gpt, 32, "all", train=True),
        ModelCase("gpt2_medium", medium, 32),
        ModelCase("gpt2", gpt, 1),
        ModelCase("gpt2_medium", medium, 1),
        ModelCase("vit_b16", vit, 256, structure="block:32"),
        ModelCase("gpt2_medium", medium, 32, "MLPs"),
        ModelCase("gpt2_medium", medium, 8, "all", train=True),
        ModelCase("vit_b16", vit, 32),
        ModelCase("vit_b16", vit, 8),
    ]


def _correctness() -> Iterator[Case]:
    kinds = (*BLOCKS, "nm:2:4", "nm:1:8", "nm:2:16", "diagonal", "fan_in")
    for layer, tokens, dtype in (
        (VIT, 6304, "bf16"),
        (LLAMA, 1, "bf16"),
        (BACK, 197, "fp32"),
        (VIT, 1576, "fp16"),
        (VIT, 1576, "tf32"),
        (LLAMA, 8192, "bf16"),
    ):
        for kind in kinds:
            yield Case("correctness", layer, tokens, kind, dtype=dtype)


def _layers() -> Iterator[Case]:
    yield from (Case("layers", VIT, 6304, kind) for kind in BLOCKS)
    yield Case("layers", GPT, 8192, "block:64")
    for tokens, kinds in ((8192, BLOCKS), (1, ("block:64", *SUMS)), (16, ("block:64", *SUMS))):
        yield from (Case("layers", LLAMA, tokens, kind) for kind in kinds)
    sweep = [(VIT, n) for n in (6304, 197, 1576, 50432)]
    sweep += [(BACK, n) for n in (6304, 197)] + [(GPT, 8192)]
    sweep += [(LLAMA, n) for n in (1, 16, 8, 64, 8192)] + [(BACK, n) for n in (1576, 50432)]
    for sparsity in (0.9, 0.8, 0.95):
        for layer, tokens in sweep:
            for kind in ALL:
                if kind in BLOCKS or tokens <= 1576:
                    yield Case("layers", layer, tokens, kind, sparsity, full=False)
    for dtype in ("fp16", "fp32", "tf32"):
        for tokens, kind in ((6304, "block:64"), (6304, "block:16"), (197, "diagonal")):
            yield Case("layers", VIT, tokens, kind, dtype=dtype, full=False)
    for layer, tokens in sweep:  # losses count too
        yield from (Case("layers", layer, tokens, kind, full=False) for kind in (*SUMS, "nm:2:4"))


def _mlp() -> Iterator[Case]:
    for tokens, kind in ((6304, "block:64"), (50432, "block:64"), (6304, "block:32")):
        yield Case("mlp", VIT, tokens, kind)
    yield from (Case("mlp", VIT, n, "block:64") for n in (197, 1))
    yield Case("mlp", GPT, 8192, "block:64")
    yield Case("mlp", VIT, 6304, "block:64", 0.95)


def _maps() -> Iterator[Case]:
    yield from (Case("maps", VIT, 6304, kind) for kind in BLOCKS)
    yield from (Case("maps", LLAMA, 1, kind) for kind in ("nm:16", "diagonal", "block:64"))
    yield from (Case("maps", BACK, 6304, kind) for kind in BLOCKS)
    yield from (Case("maps", VIT, 197, kind) for kind in (*BLOCKS, "nm:16", "diagonal"))


def _training() -> Iterator[Case]:
    yield from (Case("training", VIT, 6304, kind) for kind in BLOCKS)
    yield Case("training", BACK, 6304, "block:64")
    yield Case("training", GPT, 8192, "block:64")
    yield from (Case("training", LLAMA, 8192, kind) for kind in BLOCKS)
    yield from (Case("training", VIT, 6304, kind) for kind in SUMS)


_MAKERS: dict[str, Callable[[], Iterator[Case]]] = {
    "correctness": _correctness,
    "layers": _layers,
    "mlp": _mlp,
    "maps": _maps,
    "training": _training,
}


def _tiny(part: str) -> list[Case]:
    kinds: tuple[str, ...] = ("block:16", "nm:2:4", "nm:1:8", "nm:2:16", "diagonal", "fan_in")
    if part == "mlp":
        kinds = ("block:16",)
    elif part != "correctness":
        kinds = ("block:16", "diagonal", *(["nm:8"] if part == "layers" else []))
    found = [Case(part, (32, 64), 5, kind, 0.75) for kind in kinds]
    if part == "layers":
        found += [Case(part, (32, 64), n, "block:16", 0.5, "fp32", False) for n in (1, 5)]
        found += [Case(part, (32, 48), 5, "block:64", 0.5)]  # does not fit, which is said
    return found
