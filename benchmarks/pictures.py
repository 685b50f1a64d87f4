"""Pictures of the accuracy grids, from their CSV files.

python -m benchmarks.pictures depth depth.csv docs/depth.png
python -m benchmarks.pictures strength strength.csv docs/strength.png
"""

from __future__ import annotations

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from benchmarks.accuracy import read

Row = dict[str, str]
COLOURS = {"block:16": "#c2542d", "diagonal": "#2b7a78", "nm:16": "#d9b44a"}
STYLES = {"none": ":", "random": "-", "learned": "--"}
NAMES = {"learned": "random start", "sinkhorn": "uniform start"}


def depth(rows: list[Row], axes: Any) -> None:
    """Accuracy against the number of layers, static masks left, RigL's right."""
    for axis, method in zip(axes, ("static", "rigl"), strict=True):
        for structure, colour in COLOURS.items():
            for permutation, style in STYLES.items():
                chosen = _where(rows, structure=structure, permutation=permutation, method=method)
                _line(
                    axis, chosen, layers, "accuracy", f"{structure}, {permutation}", colour, style
                )
        _line(axis, _where(rows, structure="dense"), layers, "accuracy", "dense", "#22303c", "-")
        rigl = _where(rows, structure="unstructured")
        _line(axis, rigl, layers, "accuracy", "unstructured, RigL", "#888888", "-")
        axis.set(title=f"{method} masks, 95 %", xlabel="hidden layers of 256")
        axis.set(ylabel="test accuracy, %")
    axes[1].legend(fontsize=7, ncol=2)


def strength(rows: list[Row], axes: Any) -> None:
    """What the penalty's weight does: accuracy, when it hardens, how far from the identity."""
    titles = {
        "accuracy": "test accuracy, %",
        "hardened_at": "hard after this share of training",
        "moved": "distance to the identity",
        "kept": "features left where they began",
    }
    for axis, (column, title) in zip(axes, titles.items(), strict=True):
        for permutation, name in NAMES.items():
            chosen = [r for r in _where(rows, permutation=permutation) if r[column]]
            colour = "#c2542d" if permutation == "learned" else "#2b7a78"
            _line(axis, chosen, lambda r: float(r["penalty"]), column, name, colour, "-")
        axis.set_xscale("symlog", linthresh=0.1)
        axis.set(title=title, xlabel="penalty weight")
        if column != "accuracy":
            axis.set_ylim(0.0, 1.05)
    axes[0].legend(fontsize=8)


def layers(row: Row) -> float:
    """Return the number of hidden layers of an ``mlp:LxW``."""
    return float(row["network"].removeprefix("mlp:").split("x")[0])


def _where(rows: Iterable[Row], **wanted: str) -> list[Row]:
    return [r for r in rows if all(r[name] == value for name, value in wanted.items())]


def _line(
    axis: Any,
    rows: list[Row],
    at: Callable[[Row], float],
    column: str,
    label: str,
    colour: str,
    style: str,
) -> None:
    """Draw means over seeds, with every seed as a dot."""
    groups: dict[float, list[float]] = defaultdict(list)
    for row in rows:
        groups[at(row)].append(float(row[column]))
    places = sorted(groups)
    means = [statistics.mean(groups[place]) for place in places]
    axis.plot(places, means, style, color=colour, label=label)
    dots = [(place, value) for place in places for value in groups[place]]
    if dots:
        axis.scatter(*zip(*dots, strict=True), s=8, color=colour)


def main() -> None:
    """Read the command line, draw, save."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("picture", choices=("depth", "strength"))
    parser.add_argument("csv", type=Path)
    parser.add_argument("out", type=Path)
    args = parser.parse_args()
    count = 2 if args.picture == "depth" else 4
    figure = Figure(
        (5.5 * count if count == 2 else 3.6 * count, 4.2), dpi=110, layout="constrained"
    )
    FigureCanvasAgg(figure)
    draw = depth if args.picture == "depth" else strength
    draw(read(args.csv), figure.subplots(1, count))
    figure.savefig(args.out)
    print(f"Wrote {args.out}.")


if __name__ == "__main__":
    main()
