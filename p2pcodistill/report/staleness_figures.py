"""Pictures of how far students were behind their teachers: over time, and for which share of it."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from p2pcodistill.report import figures
from p2pcodistill.report.edges import EdgeResults, sample_staleness, start_of

MAX_LINES = 16
"""Edges that are drawn one by one; of more, the mean and the stalest."""
_NUM_TIMES = 400
_MAX_BARS = 30


def staleness_picture(
    results: EdgeResults, sites: Mapping[str, str], *, with_timeline: bool
) -> Figure | None:
    """For which share of the time students were how far behind, and, `with_timeline`, how far over time.

    `sites` maps each site to its colour. None where nobody learnt from anybody.
    """
    tracker = results.staleness
    curves = {key: edge for key, edge in tracker.edges.items() if edge.curve}
    if not curves or not tracker.seconds_at:
        return None
    with figures.style():
        if not with_timeline:
            figure, (histogram,) = figures.new_figure(5.4, 2.9)
            draw_histogram(histogram, tracker.seconds_at)
            histogram.set_title("Share of the time, by how far behind teachers were")
            return figure
        height = 3.4 + 0.2 * math.ceil(len(curves) / 4) * (len(curves) <= MAX_LINES)
        figure, (over_time, histogram) = figures.new_figure(9.0, height, num_columns=2, width_ratios=(1.7, 1))
        if len(curves) <= MAX_LINES:
            start_s = start_of(tracker)
            for (teacher, student), edge in curves.items():
                over_time.step(
                    [time_s - start_s for time_s, _ in edge.curve],
                    [steps for _, steps in edge.curve],
                    where="post",
                    color=sites.get(teacher, figures.INK),
                    linewidth=1.1,
                    alpha=0.8,
                    label=f"{teacher} → {student}",
                )
            figure.legend(loc="outside lower center", ncols=4, fontsize=8)
            name_timeline(over_time)
        else:
            end_s = max(edge.curve[-1][0] for edge in curves.values())
            draw_timeline(over_time, sample_staleness(tracker, start_of(tracker), end_s, _NUM_TIMES))
        draw_histogram(histogram, tracker.seconds_at)
        return figure


def draw_timeline(axes: Axes, rows: Sequence[tuple[float, float, float]]) -> None:
    """The staleness of many edges over time; `rows` as `sample_staleness` gives them."""
    times_s, means, tops = zip(*rows, strict=True)
    axes.plot(
        times_s, tops, color=figures.FAINT_INK, linewidth=1.0, drawstyle="steps-post", label="stalest edge"
    )
    axes.plot(times_s, means, color=figures.INK, drawstyle="steps-post", label="mean of all edges")
    name_timeline(axes)
    axes.set_ylim(top=1.2 * max(max(tops), 1))  # room for the legend
    axes.legend(loc="upper right", ncols=2)


def name_timeline(axes: Axes) -> None:
    """Title, units and scales of staleness over time."""
    axes.set_title("Steps behind the newest checkpoint")
    axes.set_xlabel("seconds")
    axes.set_ylabel("steps")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))


def draw_histogram(axes: Axes, seconds_at: Mapping[int, float]) -> None:
    """For which share of the time edges were how many steps behind: bars as wide as the steps that they stand for."""
    steps = sorted(seconds_at)
    total_s = sum(seconds_at.values())
    width = min((b - a for a, b in itertools.pairwise([0, *steps]) if b > a), default=1)
    width *= max(1, math.ceil((steps[-1] // width + 1) / _MAX_BARS))
    shares: dict[int, float] = {}
    for behind in steps:
        begin = behind // width * width
        shares[begin] = shares.get(begin, 0.0) + seconds_at[behind] / total_s
    axes.bar(
        list(shares),
        list(shares.values()),
        width=width,
        align="edge",
        color=figures.SITE_COLOURS[0],
        edgecolor="white",
    )
    axes.set_xlim(0, max(shares) + width)
    axes.set_title("Share of the time")
    axes.set_xlabel(f"steps behind, {width} a bar" if width > 1 else "steps behind")
    axes.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
