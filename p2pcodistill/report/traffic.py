"""Bytes that sites sent, against what all-reducing gradients between them would have moved."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from p2pcodistill.report.figures import (
    INK,
    POOLED_COLOUR,
    SITE_COLOURS,
    codistilled_arms,
    new_figure,
    site_colours,
    style,
)
from p2pcodistill.report.summary import ArmResult, Summary, all_reduce_bytes
from p2pcodistill.report.table import byte_count

MAX_NAMED_LINES = 4
"""Sites whose lines have a legend; of more, the colours of the bars tell."""
MAX_SITES = 16
"""Sites that get a line and a bar each; of more, the bars are of those that sent most, least, and in the middle."""


def traffic(arms: Sequence[ArmResult], summary: Summary) -> Figure:
    """Bytes sent by each codistilled site, against what all-reducing gradients between the sites would have moved.

    Left: cumulative, on a logarithmic scale. Right: the whole run, on a linear one. Needs a codistilled arm; of several
    seeds, the first is drawn.
    """
    with style():
        arm = codistilled_arms(arms)[0]
        figure, (over_steps, totals) = new_figure(9.0, 3.9, num_columns=2, width_ratios=(1.35, 1))
        colours = site_colours(arms)
        num_steps = summary["num_steps"]
        rows: list[tuple[str, int, str]] = []
        num_parameters = next((h.num_parameters for h in arm.sites.values() if h.num_parameters), None)
        total = 0
        if num_parameters is not None and len(arm.sites) > 1:
            total = all_reduce_bytes(len(arm.sites), num_parameters, num_steps)
            steps = [max(1, round(num_steps * share / 200)) for share in range(201)]
            moved = [all_reduce_bytes(len(arm.sites), num_parameters, step) for step in steps]
            over_steps.plot(steps, moved, color=POOLED_COLOUR, linestyle=(0, (1, 1.2)))
            over_steps.annotate(
                "all-reduce of fp32 gradients",
                (num_steps, total),
                (-4, 6),
                textcoords="offset points",
                ha="right",
            )
            rows.append(("all-reduce", total, POOLED_COLOUR))
        is_crowded = len(arm.sites) > MAX_SITES
        for index, (site, history) in enumerate(arm.sites.items()):
            points = [
                (point.step, point.num_bytes_sent) for point in history.traffic if point.num_bytes_sent > 0
            ]
            if points:
                # Sites send alike: a wider line below keeps each of them in sight.
                width = 0.8 if is_crowded else 1.5 + min(1.6 * (len(arm.sites) - 1 - index), 5)
                over_steps.step(
                    *zip(*points, strict=True),
                    where="post",
                    color=SITE_COLOURS[0] if is_crowded else colours[site],
                    linewidth=width,
                    alpha=0.4 if is_crowded else 1.0,
                    label="" if is_crowded else site,
                )
        if is_crowded:
            sites = sorted(arm.sites.items(), key=lambda item: -item[1].num_bytes_sent)
            chosen = {"most": sites[0], "median": sites[len(sites) // 2], "least": sites[-1]}
            rows += [
                (f"{which} ({site})", history.num_bytes_sent, SITE_COLOURS[0])
                for which, (site, history) in chosen.items()
            ]
        else:
            rows += [(site, history.num_bytes_sent, colours[site]) for site, history in arm.sites.items()]
        over_steps.set_title("Bytes sent so far, per site")
        over_steps.set_yscale("log")
        over_steps.minorticks_off()
        if sent := max(history.num_bytes_sent for history in arm.sites.values()):
            # The first hellos are not what this is about.
            over_steps.set_ylim(sent / 300, 5 * max(total, sent))
        over_steps.set_xlim(0, num_steps)
        over_steps.set_xlabel("step")
        over_steps.yaxis.set_major_formatter(EngFormatter("B"))
        over_steps.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        if len(arm.sites) <= MAX_NAMED_LINES and over_steps.get_legend_handles_labels()[0]:
            over_steps.legend(loc="lower right", title="codistilled", title_fontsize=9)
        totals.set_title("In the whole run, per site")
        _draw_bars(totals, rows)
        return figure


def _draw_bars(axes: Axes, rows: Sequence[tuple[str, int, str]]) -> None:
    names = [name for name, _, _ in rows]
    values = [value for _, value, _ in rows]
    largest = max([*values, 1])
    axes.barh(range(len(rows)), values, color=[colour for _, _, colour in rows], height=0.6)
    for index, value in enumerate(values):
        ratio = f"  ({largest / value:.0f}x less)" if 0 < value < largest / 1.5 else ""
        inside = value > 0.6 * largest
        axes.annotate(
            byte_count(value) + ratio,
            (value, index),
            (-6 if inside else 6, 0),
            textcoords="offset points",
            ha="right" if inside else "left",
            va="center",
            fontsize=9,
            color="white" if inside else INK,
        )
    axes.set_xlim(0, 1.05 * largest)
    axes.set_yticks(range(len(rows)), names)
    axes.invert_yaxis()
    axes.grid(False)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    axes.xaxis.set_major_formatter(EngFormatter("B"))
