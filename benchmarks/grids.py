"""What the accuracy benchmark trains: one ``Case`` a training, one function a question."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

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


def mlp(seed: int) -> Iterator[Case]:
    """784-1024-1024-10: every structure and permutation against dense, RigL, SET and SRigL."""
    yield Case("mlp:2x1024", seed=seed)
    for sparsity in (0.9, 0.95):
        for structure, method in (
            ("unstructured", "rigl"),
            ("unstructured", "set"),
            ("fan_in", "srigl:0.3"),
            ("fan_in", "srigl:none"),
        ):
            yield Case("mlp:2x1024", structure, "none", method, sparsity, seed=seed)
        for structure in STRUCTURES:
            for permutation in PERMUTATIONS:
                yield Case("mlp:2x1024", structure, permutation, "rigl", sparsity, seed=seed)


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


def strength(seed: int) -> Iterator[Case]:
    """The penalty's weight, from none to ten times the default."""
    for penalty in (0.0, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0):
        yield Case("mlp:6x256", "block:16", "learned", "rigl", 0.95, penalty, epochs=3, seed=seed)


def mixer(seed: int) -> Iterator[Case]:
    """A small MLP-Mixer on CIFAR-10 at 90 %."""
    yield Case("mixer:3x96", epochs=5, images=10_000, seed=seed)
    yield Case("mixer:3x96", "unstructured", "none", "rigl", 0.9, images=10_000, seed=seed)
    for structure in ("block:16", "nm:16", "diagonal"):
        for permutation in PERMUTATIONS:
            yield Case("mixer:3x96", structure, permutation, "rigl", 0.9, images=10_000, seed=seed)


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
    "strength": strength,
    "mixer": mixer,
    "resnet": resnet,
}
