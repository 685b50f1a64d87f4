"""What the compiler did to a model: every pass, permutation and kernel, with the reason."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from padst_compiler.backend import fold_dynamo, prepare
from padst_compiler.compat import many_graphs
from padst_compiler.fold import Folded
from padst_compiler.inputs import bind
from padst_compiler.text import table

__all__ = ["Explanation", "explain"]


@dataclass(frozen=True)
class Explanation:
    """The report of ``explain``; prints as two tables.

    Attributes:
        passes: rows ``(pass, site, "fired" or "left", what or why)``.
        kernels: rows ``(site, kernel, why)``.
        verdicts: one per graph: how the folded graph compares with the captured one.
        gathers: permutations that remain as a gather in the compiled graphs.
    """

    passes: tuple[tuple[str, str, str, str], ...]
    kernels: tuple[tuple[str, str, str], ...]
    verdicts: tuple[str, ...]

    @property
    def gathers(self) -> int:
        """Permutations that remain as a gather."""
        return sum(
            1 for name, _, state, _ in self.passes if (name, state) == ("lower_maps", "left")
        )

    def __str__(self) -> str:
        """Both tables and the verdicts."""
        lines = [table(("pass", "site", "state", "why"), self.passes)]
        lines += ["", table(("site", "kernel", "why"), self.kernels), ""]
        lines += [f"graph {i}: {verdict}" for i, verdict in enumerate(self.verdicts)]
        lines.append(f"gathers that remain: {self.gathers}")
        return "\n".join(lines)

    __repr__ = __str__

    def print(self) -> None:
        """Print the report."""
        print(self)


def explain(
    model: nn.Module,
    example_inputs: Any,
    *,
    options: Mapping[str, Any] | None = None,
) -> Explanation:
    """Report what ``torch.compile(model, backend="padst", options=options)`` does for inference.

    The model runs once on the inputs, without gradients, in the mode that it is in.

    Args:
        model: any model; sparse layers with soft permutations are reported as they are.
        example_inputs: a tensor, a tuple of positional or a dict of keyword arguments.
        options: as for ``torch.compile``.

    Raises:
        MismatchError: folding would change the results (a bug of ours).

    Example:
        >>> import padst_compiler as padst
        >>> model = padst.sparsify(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)))
        >>> explain(padst.harden(model).eval(), torch.randn(4, 64)).gathers
        0
    """
    args, kwargs = bind(model, example_inputs)
    settings, _ = prepare(options, None, [*args, *kwargs.values()])
    graphs: list[Folded] = []

    def record(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graphs.append(fold_dynamo(graph_module, inputs, settings))
        return graph_module.forward

    with torch.no_grad(), torch.random.fork_rng(devices=[]), many_graphs():
        torch.compile(model, backend=record)(*args, **kwargs)
    return summarise(graphs)


def summarise(graphs: Sequence[Folded]) -> Explanation:
    """Turn the reports of folded graphs into one explanation."""
    rows: list[tuple[str, str, str, str]] = []
    kernels: list[tuple[str, str, str]] = []
    for folded in graphs:
        for report in folded.reports:
            for rule in report.fired:
                if report.name == "choose_formulation":
                    kernel, _, why = rule.what.partition(": ")
                    kernels.append((rule.where, kernel, why))
                else:
                    rows.append((report.name, rule.where, "fired", rule.what))
            rows += [(report.name, r.where, "left", r.why) for r in report.left]
    return Explanation(tuple(rows), tuple(kernels), tuple(folded.verdict for folded in graphs))
