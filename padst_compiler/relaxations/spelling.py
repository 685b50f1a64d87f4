"""The text forms of permutations that are learned: ``sinkhorn``, ``low_rank:16``, ``clos:3``."""

from __future__ import annotations

import torch

from padst_compiler.permutation import SoftPermutation
from padst_compiler.relaxations import RELAXATIONS
from padst_compiler.relaxations.sinkhorn import SinkhornPermutation
from padst_compiler.text import suggest

__all__ = ["FIXED", "FULL_LIMIT", "is_learned", "make", "parse", "read_back", "resolve"]

FULL_LIMIT = 2048
"""Widest side whose "learned" permutation has full logits; wider ones have low rank."""

PEAK = 0.4
"""Share that a full "learned" permutation gives to one entry of each row at its start, a random
permutation's. A start near uniform averages its inputs: activations nearly vanish until it has
settled. Planted permutations are found from here too (3 of 3, 64 features), and in an MLP of three
layers at 95 % they hardened after 36 % instead of 69-76 % of the training (2 seeds)."""

FIXED = ("none", "random", "magnitude")
"""Permutations that are not learned."""

_KINDS = {kind.name: kind for kind in RELAXATIONS}


def is_learned(text: str) -> bool:
    """Whether ``text`` names a permutation that is learned."""
    return text not in FIXED


def parse(text: str) -> tuple[type[SoftPermutation] | None, int | None]:
    """Return the kind and the number behind the colon; no kind for none, random and learned.

    Args:
        text: "none", "random", "learned", or a relaxation's name, with its number or without.

    Raises:
        ValueError: none of these.

    Example:
        >>> kind, rank = parse("low_rank:16")
        >>> kind.__name__, rank
        ('LowRankPermutation', 16)
    """
    known = (*FIXED, "learned", *_KINDS)
    name, colon, number = str(text).partition(":")
    if name not in known or not isinstance(text, str):
        raise ValueError(
            f"Expected permutation {', '.join(known[:-1])} or {known[-1]}. Got {text!r}. "
            f"{suggest(name, known)}"
        )
    kind = _KINDS.get(name)
    if not colon:
        return kind, None
    option = kind.option if kind is not None else ""
    if not option or not (number.isascii() and number.isdigit()) or int(number) < 1:
        forms = f"{name}:{option}, a whole number of at least 1" if option else f"{name} alone"
        raise ValueError(f"Expected permutation {forms}. Got {text!r}. Write {name!r}, say.")
    return kind, int(number)


def resolve(text: str, size: int) -> tuple[type[SoftPermutation], int | None]:
    """Return the kind that ``text`` means for ``size`` features, and its number.

    Args:
        text: a permutation that is learned.
        size: the width of the side that it acts on.

    Example:
        >>> [resolve("learned", n)[0].name for n in (768, 4096)]
        ['sinkhorn', 'low_rank']
    """
    kind, option = parse(text)
    default = "sinkhorn" if size <= FULL_LIMIT else "low_rank"
    return kind or _KINDS[default], option


def make(
    text: str, size: int, generator: torch.Generator, device: torch.device | None = None
) -> SoftPermutation:
    """Return the soft permutation that ``text`` means.

    Args:
        text: a permutation that is learned.
        size: the number of features.
        generator: of its start, on the CPU.
        device: of its parameters.

    Raises:
        ValueError: it cannot permute so many features.

    Example:
        >>> make("clos:2", 36, torch.Generator().manual_seed(0)).soft().shape
        torch.Size([36, 36])
    """
    kind, option = resolve(text, size)
    chosen: dict[str, float] = {} if option is None else {kind.option: option}
    if text == "learned" and kind is SinkhornPermutation:
        chosen["peak"] = PEAK
    return kind(size, generator, device=device, **chosen)


def read_back(name: str, size: int, settings: dict[str, float]) -> SoftPermutation:
    """Return the soft permutation of a file; its numbers are not loaded yet.

    Args:
        name: of its kind.
        size: the number of features.
        settings: what ``SoftPermutation.settings`` wrote.

    Raises:
        ValueError: no such kind, or numbers that it cannot have.
        TypeError: other settings than its own.
    """
    if name not in _KINDS:
        raise ValueError(f"Expected a known permutation. Got {name!r}. {suggest(name, _KINDS)}")
    if min(settings.values(), default=1) <= 0:
        raise ValueError(f"Expected settings above 0. Got {settings}. Take another copy.")
    return _KINDS[name](size, torch.Generator(), **settings)
