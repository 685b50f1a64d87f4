"""Pictures: what the demo learned, what the compiler does with it, and what a report says."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from padst_compiler.layers import SparseLayer, sparse_layers

if TYPE_CHECKING:
    from collections.abc import Sequence

    from padst_compiler.reporting import Report
    from padst_compiler.training import Event
    from padst_compiler.trial import Run

__all__ = [
    "demo_picture",
    "new_figure",
    "readme_picture",
    "report_picture",
    "save",
    "with_open_frame",
]

INK, RUST, SEA, SAND = "#22303c", "#c2542d", "#2b7a78", "#d9b44a"
COLOURS = {"dense": INK, "block": SAND, "block + permutation": SEA}


def demo_picture(runs: Sequence[Run], path: Path) -> Path:
    """Draw learning curves, penalties and gaps, one permutation soft and hard, and the masks.

    Raises:
        ImportError: the ``[plot]`` extra is not installed.
    """
    figure, axes = new_figure(2, 4, (16, 7.6))
    learned = next(r for r in runs if "permutation" in r.variant)
    _curves(axes[0][0], runs)
    _history(axes[0][1], learned.history, "penalty", "P(M) / 2N", None)
    _history(axes[0][2], learned.history, "gap", "worst gap", 0.2929)
    name, soft = next(iter(learned.soft.items()))
    layer = sparse_layers(learned.model)[name]
    _matrix(axes[0][3], soft, f"{name}: soft, a third of the way")
    assert layer.permutation is not None
    _matrix(axes[1][3], layer.permutation.matrix().detach(), f"{name}: hard")
    shown = list(sparse_layers(learned.model).items())[:3]
    for axis, (other, sparse) in zip(axes[1], shown, strict=False):
        _mask(axis, sparse, f"{other}: {sparse.sparsity:.0%} sparse")
    return save(figure, path)


def readme_picture(
    layer: SparseLayer, before: Sequence[str], after: Sequence[str], path: Path
) -> Path:
    """Draw a sparse layer with its permutation, and its graph before and after folding.

    Args:
        layer: hardened, with a permutation.
        before: the captured graph's operations, in order.
        after: the folded graph's.
        path: the picture, ``.png`` or ``.svg``.
    """
    figure, axes = new_figure(1, 4, (15, 3.6))
    assert layer.permutation is not None
    _mask(axes[0][0], layer, "S: structured sparse")
    _matrix(axes[0][1], layer.permutation.matrix().detach(), "Π: learned, then hard")
    _listing(axes[0][2], "captured", before)
    _listing(axes[0][3], "folded", after)
    return save(figure, path)


def report_picture(report: Report, path: Path) -> Path:
    """Draw shares and distances by layer, and the history of gaps and churn.

    Args:
        report: its history may be empty.
        path: the picture, ``.png`` or ``.svg``.

    Raises:
        ImportError: the ``[plot]`` extra is not installed.
    """
    figure, axes = new_figure(2, 2, (13, 7))
    shares = {"sparsity": INK, "explored": SEA, "soft_share": SAND}
    _bars(axes[0][0], report, shares, "shares: zeros, units ever active, steps spent soft")
    distances = {"distance": INK, "distance_modulo": RUST}
    _bars(axes[0][1], report, distances, "features moved: in all, beyond what is absorbed")
    _history(axes[1][0], report.history, "gap", "worst gap", 0.2929)
    _history(axes[1][1], report.history, "churn", "units changed", None)
    return save(figure, path)


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Any, Any]:
    """Return a figure and its axes, an array of two dimensions.

    Raises:
        ImportError: the ``[plot]`` extra is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(f"Expected matplotlib. Got: {error}") from error
    figure = Figure(figsize=size, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def save(figure: Any, path: Path) -> Path:
    """Write a figure, and return where."""
    figure.savefig(path, dpi=120)
    return path


def _curves(axis: Any, runs: Sequence[Run]) -> None:
    for variant, colour in COLOURS.items():
        curves = [r.curve for r in runs if r.variant == variant]
        if not curves:
            continue
        steps = [step for step, _ in curves[0]]
        scores = torch.tensor([[score for _, score in curve] for curve in curves])
        axis.plot(steps, scores.mean(dim=0), color=colour, label=variant)
        low, high = scores.min(dim=0).values, scores.max(dim=0).values
        axis.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
    axis.set(title="test accuracy, %", xlabel="step", ylim=(60, 100))
    axis.legend(frameon=False, loc="lower right")
    with_open_frame(axis)


def _bars(axis: Any, report: Report, colours: dict[str, str], title: str) -> None:
    """Draw one group of bars per layer; what is not known has no bar."""
    names, width = list(report.layers), 0.8 / len(colours)
    for place, (field, colour) in enumerate(colours.items()):
        known = [(float(n), getattr(report.layers[name], field)) for n, name in enumerate(names)]
        known = [(n + place * width - 0.4 + width / 2, v) for n, v in known if v is not None]
        axis.bar([n for n, _ in known], [v for _, v in known], width, color=colour, label=field)
    axis.set(title=title, ylim=(0, 1))
    axis.set_xticks(range(len(names)), names, rotation=90 if len(names) > 6 else 0, fontsize=8)
    axis.legend(frameon=False, fontsize=7)
    with_open_frame(axis)


def _history(axis: Any, history: Sequence[Event], key: str, title: str, line: float | None) -> None:
    layers = sorted({event["layer"] for event in history})
    shades = (RUST, SEA, SAND, INK)
    for position, layer in enumerate(layers):
        colour = shades[position % len(shades)]
        found = [(e["step"], e.get(key), e["hardened"]) for e in history if e["layer"] == layer]
        events = [(step, value, hard) for step, value, hard in found if value is not None]
        axis.plot([e[0] for e in events], [e[1] for e in events], color=colour, label=layer)
        hard = [e for e in events if e[2]]
        axis.plot([e[0] for e in hard], [e[1] for e in hard], "o", color=colour)
    if line is not None:
        axis.axhline(line, color=INK, linewidth=0.8, linestyle=":")
        axis.annotate("argmax is a permutation below", (0, line), va="bottom", fontsize=8)
    axis.set(title=f"{title}, by layer", xlabel="step", ylim=(0, 1))
    if layers:
        axis.legend(frameon=False, fontsize=7)
    with_open_frame(axis)


def _matrix(axis: Any, matrix: Tensor, title: str) -> None:
    axis.imshow(matrix.cpu() ** 0.5, cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
    axis.set(title=title, xticks=[], yticks=[])
    axis.title.set_fontsize(9)


def _mask(axis: Any, layer: SparseLayer, title: str) -> None:
    with torch.no_grad():
        weight = layer.matrix().detach().cpu()
    bound = float(weight.abs().max()) or 1.0
    if weight.shape[0] > weight.shape[1]:
        weight, title = weight.t(), f"{title} (transposed)"
    axis.imshow(
        weight, cmap="PuOr", vmin=-bound, vmax=bound, aspect="auto", interpolation="nearest"
    )
    axis.set(title=title, xticks=[], yticks=[])
    axis.title.set_fontsize(9)


def _listing(axis: Any, title: str, lines: Sequence[str]) -> None:
    axis.set_axis_off()
    axis.set_title(title)
    for position, line in enumerate(lines):
        moves = "permute" in line or "index_select" in line
        axis.text(
            0.02,
            0.9 - position * 0.13,
            line,
            family="monospace",
            fontsize=12,
            color=RUST if moves else INK,
            transform=axis.transAxes,
            va="top",
        )


def with_open_frame(axis: Any) -> None:
    """Take the upper and the right line away."""
    axis.spines[["top", "right"]].set_visible(False)
