"""Writes in place, views that are written to, graph breaks, odd inputs and outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .net import D, Each, Net


class InPlacePointwise(Net):
    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).mul_(0.5).add_(1.0).relu_())  # what relu_ saves stays as it is


class FeaturesWrittenThroughAView(Net):
    gathers, why = 1, "the slice that is written is in the old order"

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        y[:, :4].mul_(3.0)
        return self.r(y)


class TokensWrittenThroughAView(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        y[2:5].mul_(3.0)
        y[0] = 1.0
        return self.r(y)


class TransposeWrittenInPlace(Net):
    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        y.t().exp_()
        return self.r(y)


class CopiedIntoABuffer(Net):
    def forward(self, x: Tensor) -> Any:
        room = x.new_zeros(12, D)
        room[1:10] = self.a(x)
        return self.r(room)


class FeaturesSetByIndex(Net):
    gathers, why = 1, "the features that are written are in the old order"

    def forward(self, x: Tensor) -> Any:
        y = self.a(x)
        y[:, torch.tensor([1, 5, 6])] = 0.5
        return self.r(y)


class AliasReturned(Net):
    gathers, why = 1, "a view of it leaves the graph"

    def forward(self, x: Tensor) -> Any:
        h = self.a(x).relu()
        return self.r(h), h.view(3, 3, D)


class InputWritten(Net):
    def forward(self, x: Tensor) -> Any:
        if not x.requires_grad:
            x.mul_(2.0)
        return self.r(self.a(x))


class CallsCounted(Net):
    calls: Tensor

    def build(self) -> None:
        super().build()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        return self.r(self.a(x) * self.calls)


class RunningMean(Net):
    gathers, why = 1, "the buffer that is written is in the old order"
    mean: Tensor

    def build(self) -> None:
        super().build()
        self.register_buffer("mean", torch.zeros(D))

    def forward(self, x: Tensor) -> Any:
        h = self.a(x)
        self.mean.mul_(0.9).add_(h.detach().mean(0), alpha=0.1)
        return self.r(h - self.mean)


class DataDependentBranch(Net):
    """Behind a graph break the hidden features are a graph input."""

    gathers, why = 1, "behind a graph break its input comes in its own order"
    whole = False

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.a(x))
        return self.r(h) if float(h.detach().sum()) > 1e6 else self.r(-h)


class BranchBeforeTheWriter(Net):
    """The break comes first: writer and reader are in one graph."""

    whole = False

    def forward(self, x: Tensor) -> Any:
        if bool(x.detach().sum() > 0):
            x = -x
        return self.r(F.relu(self.a(x)))


class BrokenInTheMiddle(Net):
    gathers, why = 1, "behind a graph break its input comes in its own order"
    whole = False

    def forward(self, x: Tensor) -> Any:
        h = self.a(x).relu()
        torch._dynamo.graph_break()
        return self.r(h)


class ChoiceOfTheShape(Net):
    """Python control flow on sizes is no break."""

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).relu() if x.shape[0] > 4 else self.a(x))


class TokenByToken(Net):
    def forward(self, x: Tensor) -> Any:
        rows, h = [], torch.zeros(D, dtype=x.dtype)
        for row in self.a(x)[:4]:
            h = 0.5 * h + row
            rows.append(h)
        return self.r(torch.stack(rows))


class Recurrent(Net):
    """Its state begins at zero, in any order, and is read in the map's order at every step."""

    gathers = Each(block=2, nm=1)  # few tokens run dense elsewhere
    why = "one writer serves all steps, and the last one leaves the graph in its own order"

    def forward(self, x: Tensor) -> Any:
        h = torch.zeros(3, D, dtype=x.dtype)
        for step in self.a(x).view(3, 3, D):
            h = torch.tanh(step + self.r(h))
        return h


class OutputsInADict(Net):
    def forward(self, x: Tensor) -> Any:
        h = self.a(x).relu()
        return {"logits": self.r(h), "extra": [h.mean(), None, 3], "nested": {"x": x}}


class SeveralOutputs(Net):
    def build(self) -> None:
        super().build()
        self.s = self.shuffled(D, D)
        self.b = self.free(D, D)

    def forward(self, x: Tensor) -> Any:
        y = self.r(self.a(x))
        return y, self.s(self.b(x)), y


class NoTokens(Net):
    shape = (0, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(F.relu(self.a(x)))


class OneVector(Net):
    shape = (D,)

    def forward(self, x: Tensor) -> Any:
        return self.r(F.relu(self.a(x)))


class ManyAxes(Net):
    shape = (1, 2, 1, 3, D)

    def forward(self, x: Tensor) -> Any:
        return self.r(F.relu(self.a(x)))


class NotContiguous(Net):
    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.randn(2 * D, 9, dtype=dtype).t()[:, ::2],)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).t().contiguous().t().relu())


class Expanded(Net):
    """The input has strides of 0."""

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (torch.randn(1, D, dtype=dtype).expand(9, D),)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).relu())


class InfinitiesAndNans(Net):
    """A row of NaNs comes in, infinities arise behind the writer.

    No single infinite feature comes in: a dense kernel multiplies it by the zeros of a structure,
    which gives NaN, and a sparse one does not see it.
    """

    def inputs(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        x = torch.randn(9, D, dtype=dtype)
        x[1] = float("nan")
        return (x,)

    def forward(self, x: Tensor) -> Any:
        return self.r(self.a(x).relu().log().nan_to_num(neginf=-3.0))


class _Cube(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        context.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(context: Any, grad: Tensor) -> Tensor:
        (x,) = context.saved_tensors
        result: Tensor = 3 * x**2 * grad
        return result


class GradientByHand(Net):
    def forward(self, x: Tensor) -> Any:
        return self.r(_Cube.apply(self.a(x)))  # type: ignore[no-untyped-call]


class OverBatchesByVmap(Net):
    shape = (2, 5, D)

    def forward(self, x: Tensor) -> Any:
        y = torch.vmap(lambda one: one - one.mean(0))(self.a(x))
        return self.r(y)


class ConditionInTheGraph(Net):
    """``torch.cond`` keeps both branches in one graph."""

    gathers, why = 1, "an operator with graphs inside stops"

    def forward(self, x: Tensor) -> Any:
        h = torch.cond(x.sum() > 0, torch.sin, torch.cos, (self.a(x),))
        return self.r(h)


class KeywordInputs(Net):
    def forward(self, x: Tensor, scale: float = 2.0, flag: bool = True) -> Any:
        h = self.a(x) * scale
        return self.r(h.relu() if flag else h)


class LookedUpInAModuleDict(Net):
    def build(self) -> None:
        super().build()
        self.parts = nn.ModuleDict({"in": self.free(D, D), "out": self.shuffled(D, D)})

    def forward(self, x: Tensor) -> Any:
        for name in ("in", "out"):
            x = self.parts[name](x).relu()
        return x
