"""Arms side by side: loss against steps, time or bytes, and what else was measured of each, over seeds.

A line is the mean over sites and seeds, its band the range over seeds. An arm keeps its colour in every picture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

from p2pcodistill.report.arm_figures import ArmFigures, Point
from p2pcodistill.report.comparison import with_spread
from p2pcodistill.report.figures import INK, PANEL_SHARE, SITE_COLOURS, new_figure, style
from p2pcodistill.report.labels import LineEnd, label_ends
from p2pcodistill.report.learning_curves import EARLY_SHARE
from p2pcodistill.report.verdicts import Spread

CurveAxis: TypeAlias = Literal["steps", "seconds", "bytes"]
CURVE_AXES: tuple[CurveAxis, ...] = ("steps", "seconds", "bytes")
_LINE_POINTS = 13.5
"""Between the labels of two lines."""
_LINES = ("-", (0, (4, 2)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)))
_LINE_MARKS = ("", "– –  ", "·····  ", "– · –  ")
"""What tells the label of a line from those of others in its colour."""
_MIN_BAR_SHARE = 0.3
"""Of the longest bar, by which some other must be shorter: else bars would look alike."""
_AXES: Mapping[CurveAxis, tuple[str, Callable[[Point], float]]] = {
    "steps": ("step", lambda point: float(point.step)),
    "seconds": ("seconds of training", lambda point: point.seconds),
    "bytes": ("bytes sent by all sites", lambda point: float(point.num_bytes)),
}


class Look(NamedTuple):
    """By which an arm is known."""

    colour: str
    line: Any


def looks_of_arms(arms: Sequence[str]) -> dict[str, Look]:
    """A colour for each arm; with more arms than colours they come again, with another line."""
    return {name: _look(index, index // len(SITE_COLOURS)) for index, name in enumerate(arms)}


def looks_of_runs(arms_of_runs: Mapping[str, Mapping[str, str]]) -> dict[str, Look]:
    """How arms look, by their label: `arms_of_runs` has, for each run, the label of each of its arms by its name.

    With more arms than colours, the colour tells the arm's name, the same in all runs, and the line tells the run.
    """
    labels = [label for labels in arms_of_runs.values() for label in labels.values()]
    if len(labels) <= len(SITE_COLOURS) or len(arms_of_runs) < 2:
        return looks_of_arms(labels)
    names = list(dict.fromkeys(name for labels in arms_of_runs.values() for name in labels))
    return {
        label: _look(names.index(name), run)
        for run, labels in enumerate(arms_of_runs.values())
        for name, label in labels.items()
    }


def _look(colour: int, line: int) -> Look:
    return Look(SITE_COLOURS[colour % len(SITE_COLOURS)], _LINES[line % len(_LINES)])


def loss_curves(
    arms: Mapping[str, ArmFigures],
    axis: CurveAxis,
    *,
    loss_unit: str,
    looks: Mapping[str, Look] | None = None,
) -> Figure | None:
    """Held-out loss of each arm over `axis`; None where no arm has anything to show over it.

    `looks` are by default those of `looks_of_arms`. Arms that took none of it (a lone site sends no bytes) are drawn across,
    at their final loss. Bytes, of which one arm may send a thousand times as many as another, are on a logarithmic scale.
    """
    label, amount = _AXES[axis]
    means = {name: _mean_over_seeds(arm, amount) for name, arm in arms.items()}
    amounts_taken = [point[0] for line in means.values() for point in line if point[0] > 0]
    if not amounts_taken:
        return None
    largest = max(amounts_taken)
    totals = [line[-1][0] for line in means.values() if line and line[-1][0] > 0]
    smallest = EARLY_SHARE * min(totals) if axis == "bytes" else 0.0
    looks = looks or looks_of_arms(list(arms))
    with style():
        figure, (axes,) = new_figure(9.0, max(4.9, 0.7 + len(means) * _LINE_POINTS / 72 / PANEL_SHARE))
        ends = []
        for name, line in means.items():
            colour, shape = looks[name]
            if not line:
                continue
            if line[-1][0] <= 0:
                line = [(smallest, *line[-1][1:]), (largest, *line[-1][1:])]
            if axis == "bytes":
                line = [point for point in line if point[0] > 0]
            amounts, losses, lows, highs = zip(*line, strict=True)
            axes.plot(amounts, losses, color=colour, linestyle=shape, zorder=3)
            axes.fill_between(amounts, lows, highs, color=colour, alpha=0.15, linewidth=0)
            mark = _LINE_MARKS[_LINES.index(shape)]
            ends.append(LineEnd(amounts[-1], losses[-1], f"{mark}{name}  {losses[-1]:.3f}", colour))
        axes.set_ylim(*_loss_range([line for line in means.values() if line]))
        axes.set_xlabel(label)
        axes.set_ylabel(f"held-out loss ({loss_unit})")
        axes.set_title(f"Held-out loss over {axis}")
        if axis == "bytes":
            axes.set_xscale("log")
            axes.xaxis.set_major_formatter(EngFormatter(unit="B"))
            axes.xaxis.set_minor_formatter(NullFormatter())
        else:
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=axis == "steps"))
        axes.set_xlim(smallest, largest)
        label_ends(axes, ends, height_points=PANEL_SHARE * 72 * figure.get_figheight())
        return figure


def tell_lines(figure: Figure, lines: Mapping[str, Any]) -> None:
    """Say below the picture what each style of line stands for."""
    with style():
        samples = [Line2D([], [], color=INK, linestyle=line, label=name) for name, line in lines.items()]
        figure.legend(handles=samples, loc="outside lower left", ncols=3, handlelength=2.6)


def bars(
    figures: Mapping[str, Spread], *, title: str, unit: str, looks: Mapping[str, Look] | None = None
) -> Figure:
    """A bar for each arm, with the range over seeds as a whisker and the mean written at it.

    Bars begin at zero. Where they would be of much the same length, there are dots in their place, and the axis begins
    near the lowest.
    """
    looks = looks or looks_of_arms(list(figures))
    low = min(min(of.lowest for of in figures.values()), 0.0)
    high = max(max(of.highest for of in figures.values()), 0.0)
    means = [of.mean for of in figures.values()]
    has_bars = len(means) == 1 or max(means) - min(means) >= _MIN_BAR_SHARE * (high - low)
    digits = _num_digits(figures.values())
    with style():
        figure, (axes,) = new_figure(9.0, 1.1 + 0.42 * len(figures))
        for place, (name, of) in enumerate(figures.items()):
            colour = looks[name].colour
            if has_bars:
                axes.barh(place, of.mean, color=colour, height=0.62, zorder=2)
            axes.plot(
                [of.lowest, of.highest], [place, place], color=INK if has_bars else colour, linewidth=1.4
            )
            if not has_bars:
                axes.plot(of.mean, place, "o", color=colour, markersize=7)
            _write_at(axes, of, place, digits)
        axes.set_yticks(range(len(figures)), list(figures))
        axes.set_ylim(len(figures) - 0.4, -0.6)
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.16 if has_bars else 0.22)
        axes.set_xlabel(unit)
        axes.set_title(title)
        return figure


def _num_digits(figures: Collection[Spread]) -> int:
    """After the point, the same for all: three, or more where figures are small; fewer where spreads are wide."""
    largest = max(abs(of.mean) for of in figures)
    most = 3 if largest >= 0.5 else min(2 - math.floor(math.log10(largest)), 8) if largest > 0 else 3
    widest = max(of.half_range for of in figures)
    return min(max(1 - math.floor(math.log10(widest)), 0), most) if widest > 0 else most


def _write_at(axes: Axes, of: Spread, place: int, digits: int) -> None:
    end = max(of.mean, of.highest) if of.mean >= 0 else min(of.mean, of.lowest)
    axes.annotate(
        with_spread(of, digits),
        (end, place),
        xytext=(7 if of.mean >= 0 else -7, 0),
        textcoords="offset points",
        ha="left" if of.mean >= 0 else "right",
        va="center",
        fontsize=9,
    )


def _mean_over_seeds(
    arm: ArmFigures, amount: Callable[[Point], float]
) -> list[tuple[float, float, float, float]]:
    """(amount, mean loss, lowest, highest) at each step at which every seed was evaluated and did not diverge."""
    by_step = [{point.step: point for point in curve} for curve in arm.curves.values()]
    steps = sorted(set.intersection(*(set(of) for of in by_step))) if by_step else []
    line = []
    for step in steps:
        points = [of[step] for of in by_step]
        losses = [point.loss for point in points]
        if all(map(math.isfinite, losses)):
            mean_amount = math.fsum(map(amount, points)) / len(points)
            line.append((mean_amount, math.fsum(losses) / len(losses), min(losses), max(losses)))
    return line


def _loss_range(lines: Sequence[Sequence[tuple[float, float, float, float]]]) -> tuple[float, float]:
    """What of the losses is shown: all but each arm's steep start."""
    late = [
        loss
        for line in lines
        for amount, *losses in (line if line[-1][0] > 0 else line[-1:])
        if amount >= EARLY_SHARE * line[-1][0]
        for loss in losses
    ]
    low, high = min(late), max(late)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin
