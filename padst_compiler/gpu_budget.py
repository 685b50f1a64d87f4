"""How long each part of the GPU benchmark may take."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

__all__ = ["SHARES", "Budget"]

SHARES = {
    "correctness": 0.12,
    "layers": 0.40,
    "mlp": 0.07,
    "maps": 0.06,
    "training": 0.09,
    "models": 0.26,
}
"""Of the time, by part, in order; what one leaves is for those after it."""

Item = TypeVar("Item")


class Budget:
    """How much time is left for the case that comes next.

    Args:
        seconds: of all parts.
        parts: that run, in order.
        clock: in seconds.

    Example:
        >>> list(Budget(100.0, ["layers"], clock=lambda: 0.0).within("layers", [1, 2], print))
        [1, 2]
    """

    def __init__(
        self,
        seconds: float,
        parts: Sequence[str] = tuple(SHARES),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock, start = clock, clock()
        whole = sum(SHARES[part] for part in parts)
        ends = itertools.accumulate(seconds * SHARES[part] / whole for part in parts)
        self._ends = {part: start + end for part, end in zip(parts, ends, strict=True)}
        self._end = start + seconds

    def within(
        self, part: str, items: Iterable[Item], say: Callable[[str], None]
    ) -> Iterator[Item]:
        """Yield items until the next may not end in time; say how many are left out.

        One as long as the longest before it must fit. A part's first must but begin in time.
        """
        waiting, longest = list(items), 0.0
        for at, item in enumerate(waiting):
            start = self._clock()
            end = self._ends[part] if at else self._end
            if start + longest > end or start >= end:
                rest = ", ".join(str(one) for one in waiting[at : at + 3])
                more = f" and {len(waiting) - at - 3} more" if len(waiting) - at > 3 else ""
                say(
                    f"{part}: {len(waiting) - at} of {len(waiting)} left out for time: {rest}{more}"
                )
                return
            yield item
            longest = max(longest, self._clock() - start)
