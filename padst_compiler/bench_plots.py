"""Pictures of benchmarks: where sparse layers overtake dense ones, and what whole models gain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from padst_compiler.plots import INK, RUST, SAND, SEA, new_figure, save, with_open_frame

__all__ = ["layers_picture", "models_picture"]

Row = Mapping[str, str]
SHADES = ("#c9d6df", "#8fb3bd", SEA, SAND, RUST, INK)
CONTESTANTS = {"eager": SHADES[0], "Inductor": SHADES[1], "onnxruntime": SAND, "padst": SEA}


def layers_picture(rows: Sequence[Row], path: Path) -> Path:
    """Draw where each structure overtakes the best dense peer: a panel each, sparsity across.

    A line is a number of tokens (of a layer, with its threads and weights, where there are
    several); above the line at 1.0 sparse is faster.

    Args:
        rows: of ``layer_benchmark``, by their headers; at least one.
        path: the picture, ``.png`` or ``.svg``.

    Raises:
        ImportError: the ``[plot]`` extra is not installed.
    """
    kinds = list(dict.fromkeys(row["structure"] for row in rows))
    columns = min(4, len(kinds))
    lines = -(-len(kinds) // columns)
    figure, axes = new_figure(lines, columns, (4.2 * columns, 3.4 * lines))
    varying = [n for n in ("layer", "threads", "weights") if len({row[n] for row in rows}) > 1]
    for axis, kind in zip(axes.flat, kinds, strict=False):
        curves: dict[tuple[int, str], list[tuple[float, float]]] = {}
        for row in rows:
            if row["structure"] == kind:
                key = int(row["tokens"]), " ".join(row[name] for name in varying)
                curves.setdefault(key, []).append((float(row["asked"]), float(row["x best dense"])))
        counts = sorted({tokens for tokens, _ in curves})
        for (tokens, rest), points in sorted(curves.items()):
            shade = SHADES[min(counts.index(tokens), len(SHADES) - 1)]
            name = f"{tokens} tokens {rest}".strip()
            axis.plot(*zip(*sorted(points), strict=True), "o-", color=shade, ms=3, label=name)
        axis.axhline(1.0, color=INK, linewidth=0.8)
        axis.set(title=kind, xlabel="sparsity", ylabel="times the best dense peer")
        axis.set_yscale("log", base=2)
        axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
        with_open_frame(axis)
        axis.legend(frameon=False, fontsize=6)
    for axis in axes.flat[len(kinds) :]:
        axis.set_axis_off()
    return save(figure, path)


def models_picture(rows: Sequence[Row], path: Path) -> Path:
    """Draw the speed of every contestant, in multiples of the best dense one: a group a case.

    Args:
        rows: of ``model_benchmark``, by their headers; at least one.
        path: the picture, ``.png`` or ``.svg``.

    Raises:
        ImportError: the ``[plot]`` extra is not installed.
    """
    figure, axes = new_figure(1, 1, (max(6.0, 1.3 * len(rows)), 4.6))
    axis, width = axes[0][0], 0.2
    for place, (name, colour) in enumerate(CONTESTANTS.items()):
        found = [(n, row) for n, row in enumerate(rows) if row[name] != "-"]
        heights = [float(row[name]) / _best(row) for _, row in found]
        at = [n + (place - 1.5) * width for n, _ in found]
        bars = axis.bar(at, heights, width, color=colour, label=name)
        axis.bar_label(bars, [row[name] for _, row in found], fontsize=6, rotation=90, padding=2)
    names = [
        f"{row['model']}\n{row['structure']}\nbatch {row['batch']}, {row['threads']} threads"
        f"\n{row['mode']}, {row['unit']}"
        for row in rows
    ]
    axis.set_xticks(range(len(rows)), names, fontsize=7)
    axis.axhline(1.0, color=INK, linewidth=0.8)
    axis.set(ylabel="times the best dense peer")
    axis.margins(y=0.15)
    axis.legend(frameon=False, fontsize=7)
    with_open_frame(axis)
    return save(figure, path)


def _best(row: Row) -> float:
    return max(float(row[name]) for name in CONTESTANTS if name != "padst" and row[name] != "-")
