"""How old the teachers in use were: staleness and lag of each student, against its steps."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from p2pcodistill.report.figures import (
    FAINT_INK,
    POOLED_COLOUR,
    codistilled_arms,
    new_figure,
    site_colours,
    style,
)
from p2pcodistill.report.history import SiteHistory
from p2pcodistill.report.summary import ArmResult

MAX_PANELS = 8


def staleness_and_lag(arms: Sequence[ArmResult]) -> Figure | None:
    """How old the teachers in use are: a panel per student, a line (lag) and an area (staleness) per teacher.

    Needs a codistilled arm. Of several seeds, the first is drawn. None for more than MAX_PANELS students.
    """
    arm = codistilled_arms(arms)[0]
    if len(arm.sites) > MAX_PANELS:
        return None
    with style():
        num_rows = len(arm.sites)
        figure, panels = new_figure(9.0, 1.0 + 1.55 * num_rows, num_rows=num_rows, share_axes=True)
        colours = site_colours(arms)
        for axes, (student, history) in zip(panels, arm.sites.items(), strict=True):
            teachers = _draw_ages(axes, history, colours)
            axes.set_title(
                f"{student} learns from {', '.join(teachers)}" if teachers else f"{student} had no teacher"
            )
            axes.axhline(0, color="#B0B0B0", linewidth=0.8)
            axes.set_ylabel("steps")
            axes.yaxis.set_major_locator(MaxNLocator(nbins=4, integer=True))
            axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        panels[-1].set_xlim(0, max([history.num_steps for history in arm.sites.values()] + [1]))
        panels[-1].set_xlabel("step of the student")
        if all(
            lag >= 0 for history in arm.sites.values() for _, lags in history.lag for lag in lags.values()
        ):
            panels[-1].set_ylim(bottom=0)
        handles = [
            Line2D([], [], color=FAINT_INK, linewidth=1.3, label="lag: student's step minus teacher's"),
            Patch(color=FAINT_INK, alpha=0.45, linewidth=0, label="staleness: newest announced minus in use"),
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=2)
        return figure


def _draw_ages(axes: Axes, history: SiteHistory, colours: dict[str, str]) -> list[str]:
    """Draw lag and staleness of every teacher that was in use; return the teachers."""
    teachers = list(dict.fromkeys(teacher for _, by_teacher in history.lag for teacher in by_teacher))
    alpha = 0.45 if len(teachers) == 1 else 0.2
    for teacher in teachers:
        colour = colours.get(teacher, POOLED_COLOUR)
        lag = [(step, by_teacher[teacher]) for step, by_teacher in history.lag if teacher in by_teacher]
        stale = [
            (step, by_teacher[teacher]) for step, by_teacher in history.staleness if teacher in by_teacher
        ]
        axes.plot(*zip(*lag, strict=True), color=colour, linewidth=1.2)
        steps, heights = zip(*stale, strict=True)
        axes.fill_between(steps, heights, step="post", color=colour, alpha=alpha, linewidth=0)
    return teachers
