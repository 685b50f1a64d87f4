"""Notes of a training: complete where they are read, and nobody waits for them before."""

import pytest
import torch
from torch import Tensor

from padst_compiler import notes
from padst_compiler.notes import Event, Notes, place


class Arrival:
    """Says whether numbers have come; to wait for them makes them come."""

    def __init__(self) -> None:
        self.here, self.waited = False, 0

    def query(self) -> bool:
        return self.here

    def synchronize(self) -> None:
        self.waited += not self.here
        self.here = True


@pytest.fixture
def arrivals(monkeypatch: pytest.MonkeyPatch) -> list[Arrival]:
    """Let numbers come late, as from a GPU; return what says that they have come."""
    made: list[Arrival] = []

    def sent(numbers: Tensor) -> tuple[Tensor, Arrival]:
        made.append(Arrival())
        return numbers, made[-1]

    monkeypatch.setattr(notes, "_sent", sent)
    return made


def event(step: int) -> Event:
    return Event(
        step=step, layer="fc", gap=None, penalty=None, churn=0.0, hardened=False, ablated=0
    )


def test_numbers_of_a_cpu_are_there_at_once() -> None:
    said: list[tuple[int, str]] = []
    book = Notes((), lambda verdict, where: said.append((verdict, where)))
    first, second = event(1), event(2)
    book.add(first)
    book.add(second, torch.tensor([0.5, 2.0]))
    book.settle()
    assert [first["churn"], second["churn"]] == [0.0, 0.5]
    assert said == [(2, "fc at step 2")]
    assert book.events == [first, second]


def test_numbers_that_have_not_come_are_not_waited_for(arrivals: list[Arrival]) -> None:
    said: list[int] = []
    book = Notes((), lambda verdict, where: said.append(verdict))
    made = [event(1), event(2)]
    for at, one in enumerate(made):
        book.add(one, torch.tensor([0.25, at]))
    arrivals[1].here = True  # what was sent first is read first
    book.settle()
    assert [one["churn"] for one in made] == [0.0, 0.0] and said == []
    arrivals[0].here = True
    book.settle()
    assert [one["churn"] for one in made] == [0.25, 0.25] and said == [0, 1]
    assert [arrival.waited for arrival in arrivals] == [0, 0]


def test_who_reads_events_waits_until_they_are_complete(arrivals: list[Arrival]) -> None:
    book = Notes([event(1)], lambda verdict, where: None)
    book.add(event(2), torch.tensor([0.75, 0.0]))
    assert [one["churn"] for one in book.events] == [0.0, 0.75]
    assert [arrival.waited for arrival in arrivals] == [1]
    assert len(book.events) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="numbers of a CPU are there at once")
def test_numbers_of_a_gpu_come() -> None:
    book = Notes((), lambda verdict, where: None)
    book.add(event(1), torch.tensor([0.5, 0.0], device="cuda"))
    assert book.events[0]["churn"] == 0.5


def test_a_model_that_is_one_layer_has_a_name_too() -> None:
    assert (place("fc", 3), place("", 3)) == ("fc at step 3", "the model at step 3")
