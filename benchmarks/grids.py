"""What the accuracy benchmark trains: one ``Case`` a training, one function a question."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

__all__ = ["GRIDS", "Case"]

STRUCTURES = ("block:16", "nm:16", "diagonal", "fan_in")
PERMUTATIONS = ("none", "random", "learned")


@dataclass(frozen=True)
class Case:
    """One training; every random number comes from ``seed``."""

    network: str  # as ``nets.build`` reads it
    structure: str = "dense"
    permutation: str = "none"
    method: str = "rigl"  # "srigl:0.3" is SRigL with gamma_sal 0.3, "srigl:none" without ablation
    sparsity: float = 0.0
    penalty: float = 3.0
    epochs: int = 5
    images: int = 60_000
    seed: int = 0
    side: str = "auto"
    shuffled: bool = False  # the pixels of all images in one random order


def of_each(
    network: str, structures: tuple[str, ...], sparsity: float, **options: Any
) -> Iterator[Case]:
    """Yield every structure with every permutation."""
    for structure in structures:
        for permutation in PERMUTATIONS:
            yield Case(network, structure, permutation, sparsity=sparsity, **options)


def mlp(seed: int) -> Iterator[Case]:
    """784-1024-1024-10: every structure and permutation against dense, RigL, SET and SRigL."""
    options: dict[str, Any] = {"epochs": 3, "seed": seed}
    yield Case("mlp:2x1024", **options)
    for sparsity in (0.9, 0.95):
        for structure, method in (
            ("unstructured", "rigl"),
            ("unstructured", "set"),
            ("fan_in", "srigl:0.3"),
            ("fan_in", "srigl:none"),
        ):
            yield Case("mlp:2x1024", structure, "none", method, sparsity, **options)
        yield from of_each("mlp:2x1024", STRUCTURES, sparsity, **options)


def depth(seed: int) -> Iterator[Case]:
    """3 to 16 hidden layers of 256 at 95 %: static and growing masks, with and without mixing."""
    for count in (3, 6, 10, 16):
        network = f"mlp:{count}x256"
        yield Case(network, epochs=3, seed=seed)
        yield Case(network, "unstructured", "none", "rigl", 0.95, epochs=3, seed=seed)
        for structure in ("block:16", "diagonal", "nm:16"):
            for method in ("static", "rigl"):
                for permutation in PERMUTATIONS:
                    yield Case(network, structure, permutation, method, 0.95, epochs=3, seed=seed)


def sizes(seed: int) -> Iterator[Case]:
    """Blocks of 4 to 64 and groups of 8 to 32 in six layers."""
    structures = ("block:4", "block:8", "block:16", "block:32", "block:64", "nm:32", "diagonal")
    yield Case("mlp:6x256", "unstructured", sparsity=0.95, epochs=3, seed=seed)
    yield from of_each("mlp:6x256", structures, 0.95, epochs=3, seed=seed)


def shuffled(seed: int) -> Iterator[Case]:
    """Pixels in one random order: what neighbouring inputs have in common is gone."""
    for network in ("mlp:3x256", "mlp:10x256"):
        for order in (False, True):
            yield from of_each(network, ("block:16",), 0.95, epochs=3, seed=seed, shuffled=order)


def why(seed: int) -> Iterator[Case]:
    """Is it what was learned, or that it was learned: train again with what was found, fixed.

    What is found from a uniform start: from a random one, little moves.
    """
    for network, epochs in (("mlp:3x256", 3), ("mlp:3x256", 12), ("mlp:10x256", 3)):
        for permutation in (*PERMUTATIONS, "sinkhorn", "found"):
            yield Case(network, "block:16", permutation, sparsity=0.95, epochs=epochs, seed=seed)


def side(seed: int) -> Iterator[Case]:
    """Permuting inputs against permuting outputs."""
    for where in ("input", "output"):
        for permutation in ("random", "learned"):
            yield Case(
                "mlp:6x256", "block:16", permutation, sparsity=0.95, epochs=3, seed=seed, side=where
            )


def strength(seed: int) -> Iterator[Case]:
    """The penalty's weight, none to ten times the default; from a random and a uniform start."""
    for start in ("learned", "sinkhorn"):
        for penalty in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0):
            yield Case("mlp:6x256", "block:16", start, "rigl", 0.95, penalty, epochs=3, seed=seed)


def mixer(seed: int) -> Iterator[Case]:
    """A small MLP-Mixer on CIFAR-10 at 90 %."""
    yield Case("mixer:3x96", epochs=5, images=10_000, seed=seed)
    yield Case("mixer:3x96", "unstructured", "none", "rigl", 0.9, images=10_000, seed=seed)
    for structure in ("block:16", "nm:16", "diagonal"):
        for permutation in PERMUTATIONS:
            yield Case("mixer:3x96", structure, permutation, "rigl", 0.9, images=10_000, seed=seed)


def attention(seed: int) -> Iterator[Case]:
    """A small vision transformer, all its linears sparse."""
    options: dict[str, Any] = {"epochs": 4, "images": 10_000, "seed": seed}
    yield Case("vit:3x96", **options)
    yield Case("vit:3x96", "unstructured", sparsity=0.9, **options)
    yield from of_each("vit:3x96", ("block:16", "diagonal"), 0.9, **options)


def resnet(seed: int) -> Iterator[Case]:
    """A thin ResNet-18 on CIFAR-10: SRigL's ablation threshold swept, against RigL."""
    yield Case("resnet:16", epochs=4, images=10_000, seed=seed)
    for sparsity in (0.9, 0.99):
        yield Case("resnet:16", "unstructured", "none", "rigl", sparsity, 3.0, 4, 10_000, seed)
        for gamma in ("none", "0.1", "0.3", "0.5"):
            yield Case(
                "resnet:16", "fan_in", "none", f"srigl:{gamma}", sparsity, 3.0, 4, 10_000, seed
            )


GRIDS: dict[str, Callable[[int], Iterator[Case]]] = {
    "mlp": mlp,
    "depth": depth,
    "sizes": sizes,
    "shuffled": shuffled,
    "why": why,
    "side": side,
    "strength": strength,
    "mixer": mixer,
    "attention": attention,
    "resnet": resnet,
}
