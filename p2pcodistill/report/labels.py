"""Labels at the right ends of lines, moved apart where they would overlap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from matplotlib.axes import Axes


class LineEnd(NamedTuple):
    """Where a line ends, and what is to be written beside it."""

    step: int
    loss: float
    label: str
    colour: str


def label_ends(axes: Axes, ends: Sequence[LineEnd], height_points: float) -> None:
    """Write each line's label to the right of the picture, moved apart where they would overlap."""
    low, high = axes.get_ylim()
    shown = sorted((end for end in ends if low <= end.loss <= high), key=lambda end: end.loss)
    gap = 13.5 / height_points * (high - low)
    positions = spread_apart([end.loss for end in shown], gap=gap, low=low, high=high)
    for end, position in zip(shown, positions, strict=True):
        axes.annotate(
            end.label,
            (end.step, end.loss),
            (1.035, position),
            xycoords="data",
            textcoords=("axes fraction", "data"),
            va="center",
            fontsize=9.5,
            color=end.colour,
            annotation_clip=False,
            arrowprops={
                "arrowstyle": "-",
                "color": end.colour,
                "linewidth": 0.7 if end.step >= axes.get_xlim()[1] else 0,  # no line across the picture
                "shrinkA": 2,
                "shrinkB": 1,
                "relpos": (0, 0.5),
            },
        )


def spread_apart(positions: Sequence[float], *, gap: float, low: float, high: float) -> list[float]:
    """Ascending `positions` moved as little as need be so that neighbours are at least `gap` apart.

    Positions that are too close form a block that stays centred on their mean, within `low` and `high` where there is room.
    """
    blocks: list[tuple[float, int]] = []  # (mean of what it holds, number of members)
    for position in positions:
        blocks.append((position, 1))
        while len(blocks) > 1:
            (below, num_below), (above, num_above) = blocks[-2:]
            spacing = gap * (num_below + num_above) / 2
            if (
                _within(above, num_above, gap, low, high) - _within(below, num_below, gap, low, high)
                >= spacing
            ):
                break
            count = num_below + num_above
            blocks[-2:] = [((below * num_below + above * num_above) / count, count)]
    return [
        _within(mean, count, gap, low, high) + gap * (index - (count - 1) / 2)
        for mean, count in blocks
        for index in range(count)
    ]


def _within(mean: float, count: int, gap: float, low: float, high: float) -> float:
    half = gap * count / 2
    return max(min(mean, high - half), low + half)
