"""How far a long task is: one line of a terminal that is written over, and the log."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

__all__ = ["counted"]

log = logging.getLogger(__name__)
WIDTH = 20


@contextmanager
def counted(
    title: str, total: int, stream: TextIO | None = None
) -> Iterator[Callable[[str], None]]:
    """Yield what is called with a word on each step, before it.

    Args:
        title: of the task.
        total: how many steps there are.
        stream: a terminal, by default stderr; nothing is written to anything else.

    Example:
        >>> with counted("counting", 2) as step:
        ...     step("one")
        ...     step("two")
    """
    stream = sys.stderr if stream is None else stream
    shown, done = stream.isatty(), 0
    log.info("%s", title)

    def step(what: str) -> None:
        nonlocal done
        if shown:
            full = WIDTH * done // total
            bar = "#" * full + "." * (WIDTH - full)
            stream.write(f"\r\x1b[2Kpadst: {title} [{bar}] {done}/{total} {what}")
            stream.flush()
        log.debug("%d/%d %s", done, total, what)
        done += 1

    try:
        yield step
    finally:
        if shown:
            stream.write("\r\x1b[2K")
            stream.flush()
