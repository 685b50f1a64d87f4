"""What a training did, note by note: what a GPU still computes is filled in when it comes.

A topology update that reads its own outcome would wait for all that the GPU has yet to do.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple, TypedDict

import torch
from torch import Tensor

__all__ = ["Event", "Notes", "place"]


class Event(TypedDict):
    """One layer at one update or check.

    ``gap`` is the worst row's or column's, ``penalty`` is P(M) / (2 N) without lambda, None where
    nothing is soft; ``churn`` is the share of units that changed; ``ablated`` counts neurons.
    """

    step: int
    layer: str
    gap: float | None
    penalty: float | None
    churn: float
    hardened: bool
    ablated: int


class _Awaited(NamedTuple):
    event: Event
    numbers: Tensor  # on the CPU
    arrival: torch.cuda.Event | None  # None where they are there


class Notes:
    """Events in their order, of which the last may not be complete yet.

    Args:
        events: what was noted before.
        say: called with a verdict and the place of its event, once it is known.

    Example:
        >>> event = Event(
        ...     step=1, layer="fc", gap=None, penalty=None, churn=0.0, hardened=False, ablated=0
        ... )
        >>> notes = Notes((), lambda verdict, where: print(verdict, "in", where))
        >>> notes.add(event, torch.tensor([0.25, 1.0]))
        >>> notes.settle()
        1 in fc at step 1
        >>> notes.events[0]["churn"]
        0.25
    """

    def __init__(self, events: Iterable[Event], say: Callable[[int, str], object]) -> None:
        """Start with what was noted before."""
        self._events, self._say = list(events), say
        self._awaited: deque[_Awaited] = deque()

    @property
    def events(self) -> list[Event]:
        """All events, complete: this waits for the GPU."""
        self.settle(wait=True)
        return self._events

    def add(self, event: Event, numbers: Tensor | None = None) -> None:
        """Note an event.

        Args:
            event: complete but for what ``numbers`` say.
            numbers: ``(2,)``, its churn and a verdict; None where nothing is missing.
        """
        self._events.append(event)
        if numbers is not None:
            self._awaited.append(_Awaited(event, *_sent(numbers)))

    def settle(self, wait: bool = False) -> None:
        """Complete the events whose numbers have come.

        Args:
            wait: complete all.
        """
        while self._awaited:
            event, numbers, arrival = self._awaited[0]
            if arrival is not None and not wait and not arrival.query():
                return
            if arrival is not None:
                arrival.synchronize()
            self._awaited.popleft()
            event["churn"], verdict = numbers.tolist()
            self._say(int(verdict), place(event["layer"], event["step"]))


def place(layer: str, step: int) -> str:
    """Return what a warning calls a layer at a step."""
    return f"{layer or 'the model'} at step {step}"


def _sent(numbers: Tensor) -> tuple[Tensor, torch.cuda.Event | None]:
    """Send numbers to the CPU, and return what says that they have come."""
    if not numbers.is_cuda:
        return numbers.cpu(), None
    with torch.cuda.device(numbers.device):
        arrival = torch.cuda.Event()
        there = numbers.to("cpu", non_blocking=True)  # torch pins what it copies so
        arrival.record()
    return there, arrival
