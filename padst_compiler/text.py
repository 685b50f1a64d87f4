"""Plain text for people: tables, and what they probably meant."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence

__all__ = ["suggest", "table"]


def table(headers: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a text table; columns of numbers, save the first, are aligned to the right.

    Args:
        headers: one title per column.
        rows: one cell per column; a line break within a cell becomes a space.

    Raises:
        ValueError: a row has more or fewer cells than there are headers.

    Example:
        >>> print(table(["site", "weights"], [["fc1", 512], ["head", 40]]))
        site | weights
        -----+--------
        fc1  |     512
        head |      40
    """
    titles = [_cell(title) for title in headers]
    body = [[_cell(value) for value in row] for row in rows]
    for row in body:
        if len(row) != len(titles):
            raise ValueError(
                f"Expected {len(titles)} cells, one for each of {titles}. Got {row}. "
                "Fill the row with empty strings."
            )
    columns = list(zip(titles, *body, strict=True))
    widths = [max(map(len, column)) for column in columns]
    # The first column holds names, even where those are numbers.
    numeric = [n > 0 and all(map(_is_number, column[1:])) for n, column in enumerate(columns)]

    def line(cells: Sequence[str]) -> str:
        padded = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, numeric, strict=True)
        ]
        return " | ".join(padded).rstrip()

    rule = "-+-".join("-" * width for width in widths)
    return "\n".join([line(titles), rule, *map(line, body)])


def suggest(given: str, known: Iterable[str]) -> str:
    """Return a sentence that names what ``given`` was probably meant to be.

    Args:
        given: the name that is not known.
        known: all names that are.

    Example:
        >>> suggest("blok", ["block", "nm"])
        "Did you mean 'block'?"
        >>> suggest("x", ["block", "nm"])
        "Use 'block' or 'nm'."
    """
    names = list(known)
    close = difflib.get_close_matches(given, names, n=3)
    if close:
        return f"Did you mean {_either(close)}?"
    if len(names) > 8:
        return f"Use {', '.join(map(repr, names[:8]))} or one of {len(names) - 8} more."
    return f"Use {_either(names)}." if names else "There is none to choose."


def _either(names: Sequence[str]) -> str:
    quoted = [repr(name) for name in names]
    return quoted[0] if len(quoted) == 1 else f"{', '.join(quoted[:-1])} or {quoted[-1]}"


def _cell(value: object) -> str:
    return " ".join(str(value).split("\n"))


def _is_number(cell: str) -> bool:
    return cell == "" or cell[0].isdigit() or (cell[0] in "+-" and cell[1:2].isdigit())
