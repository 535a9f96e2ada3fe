"""The pictures of a run: learning curves, staleness and lag, traffic.

matplotlib through its object-oriented interface only: no global state, no window system. A site keeps its colour in every
picture (Okabe and Ito's palette, safe for colour-blind readers); the style of a line tells the arm. SVG keeps text as text.
Of several arms of one kind, the first is drawn strongest, and marked.
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import EngFormatter, MaxNLocator

from p2pcodistill.report.history import Curve, SiteHistory
from p2pcodistill.report.labels import LineEnd, label_ends
from p2pcodistill.report.summary import ArmResult, Kind, Summary, all_reduce_bytes
from p2pcodistill.report.table import byte_count

SITE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
POOLED_COLOUR = "#444444"
INK = "#222222"
FAINT_INK = "#767676"
LINE_STYLES: dict[Kind, Any] = {"codistilled": "-", "alone": (0, (4, 2)), "pooled": (0, (1, 1.2))}
OTHER_ARM_STYLES: tuple[Any, ...] = ((0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 1)))
"""Of the second, third, ... arm of a kind."""
ARM_WORDS: dict[Kind, str] = {"codistilled": "codistilled", "alone": "alone", "pooled": "all data pooled"}

EARLY_SHARE = 0.2
"""Share of the steps whose steep losses may leave the picture at the top."""

_STYLE: dict[Any, Any] = {  # matplotlib types its keys by a list of all of them that changes between versions
    "font.family": "sans-serif",
    "font.size": 10.0,
    "text.color": INK,
    "axes.edgecolor": "#B0B0B0",
    "axes.labelcolor": INK,
    "axes.titlesize": 11.0,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.titlepad": 8.0,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "xtick.color": "#555555",
    "ytick.color": "#555555",
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 9.0,
    "svg.fonttype": "none",
}


def learning_curves(arms: Sequence[ArmResult], summary: Summary) -> Figure:
    """Held-out loss against steps, for every site of every arm.

    With several seeds a line is their mean and its band their range. The lone sites' mean final loss is drawn across, with a
    mark where each site of the first codistilled arm first is at or below it.
    The steep first evaluations are cut off at the top.
    """
    with matplotlib.rc_context(_STYLE):
        figure, (axes,) = new_figure(9.0, 4.9)
        colours = site_colours(arms)
        ends: list[LineEnd] = []
        shown: list[Curve] = []
        for line in _lines(arms):
            middle, low, high = _over_seeds(line.curves)
            if not middle:
                continue
            colour = POOLED_COLOUR if line.kind == "pooled" else colours[line.site]
            steps = [step for step, _ in middle]
            axes.plot(
                steps,
                [loss for _, loss in middle],
                color=colour,
                linestyle=line.style,
                linewidth=1.8 if line.is_first else 1.2,
                zorder=3,
            )
            if len(line.curves) > 1:
                axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
            shown.append(middle)
            last_step, last_loss = middle[-1]
            if math.isfinite(last_loss):
                name = line.arm if line.kind == "pooled" else f"{line.site}, {line.arm}"
                early = "" if last_step >= summary["num_steps"] else f" at step {last_step}"
                ends.append(LineEnd(last_step, last_loss, f"{name}  {last_loss:.3f}{early}", colour))
        axes.set_xlim(0, summary["num_steps"])
        axes.set_ylim(*_loss_range(shown, summary["num_steps"]))
        axes.set_xlabel("step")
        axes.set_ylabel(f"held-out loss ({summary['loss_unit']})")
        axes.set_title("Held-out loss of every site")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        _mark_burn_in(axes, arms, summary["num_steps"])
        _mark_baseline(axes, arms, summary, colours)
        label_ends(axes, ends, height_points=0.82 * 72 * figure.get_figheight())
        return figure


def staleness_and_lag(arms: Sequence[ArmResult]) -> Figure:
    """How old the teachers in use are: a panel per student, a line (lag) and an area (staleness) per teacher.

    Needs a codistilled arm. Of several seeds, the first is drawn.
    """
    with matplotlib.rc_context(_STYLE):
        arm = _codistilled(arms)[0]
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


def traffic(arms: Sequence[ArmResult], summary: Summary) -> Figure:
    """Bytes sent by each codistilled site, against what all-reducing gradients between the sites would have moved.

    Left: cumulative, on a logarithmic scale. Right: the whole run, on a linear one. Needs a codistilled arm; of several
    seeds, the first is drawn.
    """
    with matplotlib.rc_context(_STYLE):
        arm = _codistilled(arms)[0]
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
            over_steps.plot(steps, moved, color=POOLED_COLOUR, linestyle=LINE_STYLES["pooled"])
            over_steps.annotate(
                "all-reduce of fp32 gradients",
                (num_steps, total),
                (-4, 6),
                textcoords="offset points",
                ha="right",
            )
            rows.append(("all-reduce", total, POOLED_COLOUR))
        for index, (site, history) in enumerate(arm.sites.items()):
            points = [
                (point.step, point.num_bytes_sent) for point in history.traffic if point.num_bytes_sent > 0
            ]
            if points:
                # Sites send alike: a wider line below keeps each of them in sight.
                width = 1.5 + min(1.6 * (len(arm.sites) - 1 - index), 5)
                over_steps.step(
                    *zip(*points, strict=True), where="post", color=colours[site], linewidth=width, label=site
                )
            rows.append((site, history.num_bytes_sent, colours[site]))
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
        if over_steps.get_legend_handles_labels()[0]:
            over_steps.legend(title="codistilled", title_fontsize=9)
        totals.set_title("In the whole run, per site")
        _draw_bars(totals, rows)
        return figure


def style() -> AbstractContextManager[None]:
    """How all pictures of a report look; to be drawn and saved in."""
    return matplotlib.rc_context(_STYLE)


def site_colours(arms: Iterable[ArmResult]) -> dict[str, str]:
    """A colour for each site, the same in every picture of these arms."""
    sites = dict.fromkeys(site for arm in arms if arm.kind != "pooled" for site in arm.sites)
    return {site: SITE_COLOURS[index % len(SITE_COLOURS)] for index, site in enumerate(sites)}


def to_svg(figure: Figure, name: str) -> str:
    """`figure` as an `<svg>` element to put into a page. Every id begins with `name`, so that several get along."""
    buffer = io.StringIO()
    with matplotlib.rc_context(_STYLE | {"svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    text = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", text[text.index("<svg") :])
    return re.sub(r"<metadata>.*?</metadata>\s*", "", text, count=1, flags=re.DOTALL)


def save_png(figure: Figure, path: Path) -> None:
    """Write `figure` to `path` as a PNG for screens with two pixels a point."""
    with matplotlib.rc_context(_STYLE):
        figure.savefig(path, format="png", dpi=200)


# --- parts -----------------------------------------------------------------------------------------------------------


def new_figure(
    width: float,
    height: float,
    *,
    num_rows: int = 1,
    num_columns: int = 1,
    width_ratios: Sequence[float] | None = None,
    share_axes: bool = False,
) -> tuple[Figure, list[Axes]]:
    """A figure of so many inches and its panels, row by row; to be drawn in `style`."""
    figure = Figure(figsize=(width, height), facecolor="white", layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(
        num_rows, num_columns, squeeze=False, width_ratios=width_ratios, sharex=share_axes, sharey=share_axes
    )
    return figure, list(grid.flat)


def _codistilled(arms: Iterable[ArmResult]) -> list[ArmResult]:
    return [arm for arm in arms if arm.kind == "codistilled"]


class _Line(NamedTuple):
    kind: Kind
    arm: str
    """What a reader knows it by: its name only where there is another of its kind."""
    site: str
    curves: list[Curve]
    """The evaluations, a curve per seed."""
    is_first: bool
    """Of the arms of its kind."""
    style: Any


def _lines(arms: Iterable[ArmResult]) -> list[_Line]:
    """What makes one line each; those of codistilled sites last, on top, and of these the first arm's."""
    names: dict[Kind, list[str]] = {}
    curves: dict[tuple[Kind, str, str], list[Curve]] = {}
    for arm in arms:
        of_kind = names.setdefault(arm.kind, [])
        if arm.name not in of_kind:
            of_kind.append(arm.name)
        for site, history in arm.sites.items():
            curves.setdefault((arm.kind, arm.name, site), []).append(history.evaluations)
    lines = []
    for (kind, name, site), evaluations in curves.items():
        index = names[kind].index(name)
        style = LINE_STYLES[kind] if index == 0 else OTHER_ARM_STYLES[(index - 1) % len(OTHER_ARM_STYLES)]
        word = ARM_WORDS[kind] if len(names[kind]) == 1 else name
        lines.append(_Line(kind, word, site, evaluations, index == 0, style))
    return sorted(lines, key=lambda line: (line.kind == "codistilled", line.is_first))


def _over_seeds(curves: Sequence[Curve]) -> tuple[Curve, list[float], list[float]]:
    """Mean, lowest and highest value at the steps that all of `curves` have."""
    by_step = [dict(curve) for curve in curves]
    steps = [step for step, _ in curves[0] if all(step in values for values in by_step)]
    values_at = [[values[step] for values in by_step] for step in steps]
    mean = [(step, sum(values) / len(values)) for step, values in zip(steps, values_at, strict=True)]
    return mean, [min(values) for values in values_at], [max(values) for values in values_at]


def _loss_range(curves: Iterable[Curve], num_steps: int) -> tuple[float, float]:
    points = [(step, loss) for curve in curves for step, loss in curve if math.isfinite(loss)]
    if not points:
        return 0.0, 1.0
    low = min(loss for _, loss in points)
    high = max(
        (loss for step, loss in points if step >= EARLY_SHARE * num_steps),
        default=max(loss for _, loss in points),
    )
    margin = 0.06 * (high - low) or 0.05
    return low - margin, high + margin


def _mark_burn_in(axes: Axes, arms: Sequence[ArmResult], num_steps: int) -> None:
    starts = [
        h.first_distilled_step
        for arm in arms
        for h in arm.sites.values()
        if h.first_distilled_step is not None
    ]
    if not starts:
        return
    has_room = min(starts) > 0.04 * num_steps
    axes.axvspan(0, min(starts), color="#F0F0F0", linewidth=0, zorder=0)
    axes.annotate(
        "burn-in: no distillation yet",
        (min(starts), 1),
        (-4 if has_room else 4, -6),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        rotation=90,
        ha="right" if has_room else "left",
        va="top",
        fontsize=9,
        color=FAINT_INK,
    )


def _mark_baseline(axes: Axes, arms: Sequence[ArmResult], summary: Summary, colours: dict[str, str]) -> None:
    baseline_loss = summary["final_val_loss"]["alone"]
    if baseline_loss is None:
        return
    axes.axhline(baseline_loss, color=FAINT_INK, linewidth=1.0, linestyle=(0, (6, 3)), zorder=2)
    reached: list[tuple[str, int]] = []
    for line in _lines(arms):
        mean, _, _ = _over_seeds(line.curves)
        crossing = next(((step, loss) for step, loss in mean if loss <= baseline_loss), None)
        if line.kind == "codistilled" and line.is_first and crossing is not None:
            axes.plot(
                *crossing, "o", color=colours[line.site], markersize=7.5, mec="white", zorder=5, clip_on=False
            )
            reached.append((line.site, crossing[0]))
    # Short lines: the curves come down to this level somewhere in the middle.
    text = f"lone sites' mean\nfinal loss, {baseline_loss:.3f}"
    if len(reached) > 2:
        text += f"\nreached between steps\n{min(reached, key=_last)[1]} and {max(reached, key=_last)[1]}"
    elif reached:
        text += "\nreached at step\n" + "\n".join(f"{step} ({site})" for site, step in reached)
    low, high = axes.get_ylim()
    below = baseline_loss - low > 0.2 * (high - low)
    # Early in the run every curve is far above this line, so the room around its left end is free.
    axes.annotate(
        text,
        (0, baseline_loss),
        (6, -5 if below else 5),
        xycoords=("axes fraction", "data"),
        textcoords="offset points",
        va="top" if below else "bottom",
        fontsize=9,
    )


def _last(item: tuple[str, int]) -> int:
    return item[1]


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
