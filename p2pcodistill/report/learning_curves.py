"""Held-out loss against steps: the picture of what codistillation gains.

The style of a line tells the arm. Of several arms of one kind, the first is drawn strongest, and marked.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from p2pcodistill.report.figures import (
    FAINT_INK,
    PANEL_SHARE,
    POOLED_COLOUR,
    SITE_COLOURS,
    new_figure,
    site_colours,
    style,
)
from p2pcodistill.report.history import Curve
from p2pcodistill.report.labels import LineEnd, label_ends
from p2pcodistill.report.summary import POOLED_SITE, ArmResult, Kind, Summary

LINE_STYLES: dict[Kind, Any] = {"codistilled": "-", "alone": (0, (4, 2)), "pooled": (0, (1, 1.2))}
OTHER_ARM_STYLES: tuple[Any, ...] = ((0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)), (0, (8, 1)))
"""Of the second, third, ... arm of a kind."""
ARM_WORDS: dict[Kind, str] = {"codistilled": "codistilled", "alone": "alone", "pooled": "all data pooled"}

MANY_COLOURS: dict[Kind, str] = {"codistilled": SITE_COLOURS[0], "alone": SITE_COLOURS[1]}
"""Of an arm's lines, where there are too many for a colour each."""
MAX_LABELLED_LINES = 20
EARLY_SHARE = 0.2
"""Share of the steps whose steep losses may leave the picture at the top."""


def learning_curves(arms: Sequence[ArmResult], summary: Summary) -> Figure:
    """Held-out loss against steps, for every site of every arm.

    With several seeds a line is their mean and its band their range. The lone sites' mean final loss is drawn across, with a
    mark where each site of the first codistilled arm first is at or below it. Of more lines than could be told apart, those
    of an arm have one colour, and their mean has the label. The steep first evaluations are cut off at the top.
    """
    with style():
        figure, (axes,) = new_figure(9.0, 4.9)
        lines = [line for line in _lines(arms) if _over_seeds(line.curves)[0]]
        shown = [_over_seeds(line.curves)[0] for line in lines]
        is_crowded = len(lines) > MAX_LABELLED_LINES
        if is_crowded:
            colours = {}
            ends = _draw_many(axes, lines)
        else:
            colours = site_colours(arms)
            ends = [end for line in lines if (end := _draw_line(axes, line, colours, summary)) is not None]
        axes.set_xlim(0, summary["num_steps"])
        axes.set_ylim(*_loss_range(shown, summary["num_steps"]))
        axes.set_xlabel("step")
        axes.set_ylabel(f"held-out loss ({summary['loss_unit']})")
        axes.set_title("Held-out loss of every site")
        axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        _mark_burn_in(axes, arms, summary["num_steps"])
        _mark_baseline(axes, arms, summary, colours)
        label_ends(axes, ends, height_points=PANEL_SHARE * 72 * figure.get_figheight())
        return figure


def _draw_line(axes: Axes, line: _Line, colours: Mapping[str, str], summary: Summary) -> LineEnd | None:
    """One site's line and band; what is to be written at its end, None if it has none."""
    middle, low, high = _over_seeds(line.curves)
    colour = POOLED_COLOUR if line.site == POOLED_SITE else colours[line.site]
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
    last_step, last_loss = middle[-1]
    if not math.isfinite(last_loss):
        return None
    name = line.arm if line.site == POOLED_SITE else f"{line.site}, {line.arm}"
    early = "" if last_step >= summary["num_steps"] else f" at step {last_step}"
    return LineEnd(last_step, last_loss, f"{name}  {last_loss:.3f}{early}", colour)


def _draw_many(axes: Axes, lines: Sequence[_Line]) -> list[LineEnd]:
    """All lines faintly, the mean of each arm strongly."""
    by_arm: dict[tuple[Kind, str], list[_Line]] = {}
    for line in lines:
        by_arm.setdefault((line.kind, line.arm), []).append(line)
    ends = []
    for (kind, arm), of_arm in by_arm.items():
        colour = MANY_COLOURS.get(kind, POOLED_COLOUR)
        for line in of_arm:
            middle, _, _ = _over_seeds(line.curves)
            axes.plot(*zip(*middle, strict=True), color=colour, linewidth=0.6, alpha=0.3, zorder=2)
        mean, _, _ = _over_seeds([curve for line in of_arm for curve in line.curves])
        if mean and math.isfinite(mean[-1][1]):
            axes.plot(
                *zip(*mean, strict=True), color=colour, linestyle=of_arm[0].style, linewidth=2.2, zorder=3
            )
            of_sites = f", mean of {len(of_arm)} sites" if len(of_arm) > 1 else ""
            ends.append(LineEnd(*mean[-1], f"{arm}{of_sites}  {mean[-1][1]:.3f}", colour))
    return ends


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
        others = OTHER_ARM_STYLES[(index - 1) % len(OTHER_ARM_STYLES)]
        style = LINE_STYLES.get(kind, others) if index == 0 else others
        word = ARM_WORDS.get(kind, name) if len(names[kind]) == 1 else name
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


def _mark_baseline(
    axes: Axes, arms: Sequence[ArmResult], summary: Summary, colours: Mapping[str, str]
) -> None:
    baseline_loss = summary["final_val_loss"]["alone"]
    if baseline_loss is None:
        return
    axes.axhline(baseline_loss, color=FAINT_INK, linewidth=1.0, linestyle=(0, (6, 3)), zorder=2)
    reached: list[tuple[str, int]] = []
    for line in _lines(arms):
        mean, _, _ = _over_seeds(line.curves)
        crossing = next(((step, loss) for step, loss in mean if loss <= baseline_loss), None)
        if line.kind == "codistilled" and line.is_first and crossing is not None:
            if line.site in colours:
                axes.plot(
                    *crossing,
                    "o",
                    color=colours[line.site],
                    markersize=7.5,
                    mec="white",
                    zorder=5,
                    clip_on=False,
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
