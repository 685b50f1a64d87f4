"""Structures as text: ``block:16:64``, ``nm:2:4``, ``diagonal:band=8``; and back."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from padst_compiler.structures import STRUCTURES, Structure
from padst_compiler.text import suggest

__all__ = ["describe", "parse_structure"]

# Numbers after a colon name a structure's fields in order, except where people write another one.
_SPELLING: dict[str, tuple[tuple[str, ...], ...]] = {"nm": (("m",), ("n", "m"))}
# Fields that are written with their names, after the numbers.
_OPTIONS = {"block": {"balanced": "false"}, "diagonal": {"band": "8", "modulus": "16"}}
_SWITCH = {"false": False, "true": True}


def parse_structure(spec: Structure | str) -> Structure:
    """Return the structure that ``spec`` names.

    Args:
        spec: a structure, or a name with sizes and options behind colons: ``block``, ``block:16``,
            ``block:16:64`` (rows, columns), ``block:32:balanced=false``, ``nm``, ``nm:16`` (groups
            of 16), ``nm:2:4`` (2 of every 4), ``diagonal``, ``diagonal:band=8``,
            ``diagonal:modulus=16``, ``fan_in``, ``fan_in:8``, ``unstructured``.

    Raises:
        TypeError: ``spec`` is neither text nor a structure.
        ValueError: the name is unknown, or the sizes or options are not its own.

    Example:
        >>> parse_structure("block:16"), parse_structure("diagonal:band=8")
        (Block(size=16), Diagonal(band=8))
    """
    if isinstance(spec, Structure):
        return spec
    kinds = {kind.name: kind for kind in STRUCTURES}
    if not isinstance(spec, str):
        raise TypeError(
            f"Expected a structure or its name. Got {spec!r}. Use one of {', '.join(kinds)}."
        )
    name, *texts = spec.split(":")
    if name not in kinds:
        raise ValueError(
            f"Expected structure {', '.join(kinds)}. Got {spec!r}. {suggest(name, kinds)}"
        )
    given = _fields_in(texts, kinds[name])
    if given is None:
        known = [":".join((name, *form)) for form in _forms(kinds[name])]
        known += [f"{name}:{option}={value}" for option, value in _options(kinds[name]).items()]
        raise ValueError(
            f"Expected structure {', '.join(known)} with sizes of at least 1. Got {spec!r}. "
            "Write the sizes as whole numbers."
        )
    return kinds[name](**given)


def describe(structure: Structure) -> str:
    """Return the text that ``parse_structure`` reads back as ``structure``, every size written out.

    Args:
        structure: any structure.

    Example:
        >>> describe(parse_structure("nm:2:4")), describe(parse_structure("block"))
        ('nm:2:4', 'block:32')
    """
    held = {f.name: getattr(structure, f.name) for f in dataclasses.fields(structure)}
    given = {name: value for name, value in held.items() if value is not None}
    form = max((form for form in _forms(type(structure)) if given.keys() >= set(form)), key=len)
    words = [structure.name, *(str(given[field]) for field in form)]
    for field in _options(type(structure)):
        if field in given and given[field] != getattr(type(structure), field):
            words.append(f"{field}={str(given[field]).lower()}")
    return ":".join(words)


def _fields_in(texts: Sequence[str], kind: type[Structure]) -> dict[str, int | bool] | None:
    """Return the fields that sizes and then options name; None where they cannot be."""
    sizes = [_number(text) for text in texts if "=" not in text]
    options = [text.partition("=") for text in texts[len(sizes) :]]
    forms = [form for form in _forms(kind) if len(form) == len(sizes)]
    names = [option for option, _, _ in options]
    if not forms or min(sizes, default=1) < 1 or len(set(names)) < len(names):
        return None
    given: dict[str, int | bool] = dict(zip(forms[0], sizes, strict=True))
    for option, _, text in options:
        known = _options(kind).get(option)
        value = _SWITCH.get(text, 0) if known == "false" else _number(text)
        if known is None or (value == 0 and value is not False):
            return None
        given[option] = value
    return given


def _number(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() else 0


def _forms(kind: type[Structure]) -> list[tuple[str, ...]]:
    """Return the fields that sizes without a name may mean, in order."""
    fields = tuple(f.name for f in dataclasses.fields(kind) if f.name not in _options(kind))
    plain = tuple(fields[:count] for count in range(1, len(fields) + 1))
    return [(), *_SPELLING.get(kind.name, plain)]


def _options(kind: type[Structure]) -> dict[str, str]:
    """Return the fields that are written with their names, and a value of each."""
    return _OPTIONS.get(kind.name, {})
