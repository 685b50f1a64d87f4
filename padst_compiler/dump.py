"""Write what every pass did to a graph: one text file a pass, and two drawings.

    path/graph_000/01_drop_watch.txt       # report, graph before, graph after
    path/graph_000/02_cancel_inverse.txt
    path/graph_000/before.png, after.png   # with the [plot] extra

Every compiled graph gets the next free folder; nothing is written over.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, fx

from padst_compiler.drawing import draw
from padst_compiler.rewrite import Facts, Pass, Report

__all__ = ["dumped", "listing"]


def dumped(passes: Sequence[Pass], path: str | Path | None) -> tuple[Pass, ...]:
    """Return the same passes, each of which also writes what it did into a new folder.

    Args:
        passes: of one pipeline, in order; for one graph.
        path: made where it does not exist; None leaves the passes as they are.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    return tuple(passes) if path is None else _Folder(passes, Path(path)).steps()


def listing(graph: fx.Graph) -> str:
    """Return a graph as text, a line a node with its dtype and shape.

    Example:
        >>> print(listing(fx.symbolic_trace(lambda x: x.relu()).graph))
        x = placeholder
        relu = relu(x)
        return relu
    """
    return "\n".join(_line(node) for node in graph.nodes)


def _line(node: fx.Node) -> str:
    if node.op == "output":
        return f"return {node.args[0]}"
    name, value = node.name, node.meta.get("val")
    if isinstance(value, Tensor):
        sizes = ", ".join(str(size) for size in value.shape)
        name += f": {str(value.dtype).removeprefix('torch.')}[{sizes}]"
    if node.op == "placeholder":
        return f"{name} = placeholder"
    if node.op == "get_attr":
        return f"{name} = constant {node.target}"
    given = [str(a) for a in node.args] + [f"{key}={a}" for key, a in node.kwargs.items()]
    target = node.target
    known = isinstance(target, str | torch._ops.OpOverload)
    return f"{name} = {target if known else _called(target)}({', '.join(given)})"


def _called(target: str | Callable[..., object]) -> str:
    return getattr(target, "__name__", type(target).__name__)


class _Folder:
    """The files of one graph."""

    def __init__(self, passes: Sequence[Pass], path: Path) -> None:
        self.passes, self.path = passes, path
        self.home: Path | None = None

    def steps(self) -> tuple[Pass, ...]:
        return tuple(_Step(step, number, self) for number, step in enumerate(self.passes, 1))

    def write(self, number: int, name: str, text: str) -> None:
        if self.home is None or number == 1:
            self.home = _next(self.path)
        (self.home / f"{number:02}_{name}.txt").write_text(text + "\n", "utf-8")

    def draw(self, graph: fx.Graph, name: str) -> None:
        assert self.home is not None
        try:
            draw(graph, self.home / f"{name}.png")
        except ImportError as error:
            if name == "before":
                warnings.warn(f"padst writes no drawing of this graph: {error}", stacklevel=2)


@dataclass(frozen=True)
class _Step:
    """One pass and its place in the pipeline."""

    step: Pass
    number: int
    folder: _Folder

    @property
    def name(self) -> str:
        return self.step.name

    def __call__(self, graph: fx.Graph, facts: Facts) -> Report:
        before, copied = listing(graph), fx.Graph()
        if self.number == 1:
            copied.output(copied.graph_copy(graph, {}))
        try:
            report = self.step(graph, facts)
        except Exception as error:
            self._write(f"failed: {type(error).__name__}: {error}", before, graph)
            raise
        fired = [f"fired at {rule.where}: {rule.what}" for rule in report.fired]
        left = [f"left at {refusal.where}: {refusal.why}" for refusal in report.left]
        self._write("\n".join([*fired, *left]) or "nothing to do", before, graph)
        if self.number == 1:
            self.folder.draw(copied, "before")
        if self.number == len(self.folder.passes):
            self.folder.draw(graph, "after")
        return report

    def _write(self, said: str, before: str, graph: fx.Graph) -> None:
        text = f"{said}\n\n-- before\n{before}\n\n-- after\n{listing(graph)}"
        self.folder.write(self.number, self.name, text)


def _next(path: Path) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    number = sum(1 for _ in path.glob("graph_*"))
    while True:
        home = path / f"graph_{number:03}"
        try:
            home.mkdir()
        except FileExistsError:
            number += 1
        else:
            return home
