"""Pictures of a topology: sites as discs, a line where both teach each other, an arrow from teacher to student where not.

matplotlib through its object-oriented interface only: no global state, no window system. Where the links are known, a line
is labelled with its bandwidth and delay, and the thinner it is the less it carries; edges with a weight other than 1 show
that. Of a schedule, the first few graphs are drawn side by side.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from p2pcodistill.topology.graph import LinkAttributes, Topology
from p2pcodistill.topology.layout import Layout, Point

MAX_PANELS = 6
MAX_NAMED_SITES = 64
"""More sites than this are drawn without their names."""
SITE_COLOUR = "#56B4E9"
_INK = "#222222"
_EDGE_COLOUR = "#7A7A7A"
_STYLE: dict[Any, Any] = {"font.family": "sans-serif", "text.color": _INK, "svg.fonttype": "none"}


class _Line(NamedTuple):
    """What is drawn between two sites: an arrow from `start` to `end`, or a line for both ways."""

    start: str
    end: str
    is_directed: bool
    label: str
    width: float


def save_picture(topology: Topology, path: Path, *, title: str) -> None:
    """Draw `topology` into a PNG, SVG or PDF file, by the suffix of `path`."""
    num_panels = min(topology.period, MAX_PANELS)
    num_columns = 2 if num_panels == 4 else min(num_panels, 3)
    num_rows = math.ceil(num_panels / num_columns)
    side = 6.4 if num_panels == 1 else 4.2
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(side * num_columns, side * num_rows + 0.5), layout="constrained")
        FigureCanvasAgg(figure)
        panels = figure.subplots(num_rows, num_columns, squeeze=False).flat
        figure.suptitle(_title(topology, title), fontsize=12, parse_math=False)
        for index, axes in enumerate(panels):
            if index >= num_panels:
                axes.set_axis_off()
                continue
            draw_topology(axes, topology, exchange_index=index if topology.period > 1 else None)
            if topology.period > 1:
                axes.set_title(f"exchange {index}", fontsize=10)
        figure.savefig(
            path, dpi=130, facecolor="white", metadata=None if path.suffix == ".png" else {"Date": None}
        )


def draw_topology(
    axes: Axes,
    topology: Topology,
    *,
    exchange_index: int | None = None,
    colours: Mapping[str, str] | None = None,
) -> None:
    """Draw `topology` into `axes`, as it is at one exchange, or with all edges that ever are.

    `colours` are of the discs of some sites, say by their state; the others have `SITE_COLOUR`.
    """
    layout = Layout(topology)
    places = layout.places
    count = len(topology.members)
    radius = _radius_points(axes, places)
    for line in _lines(topology, exchange_index):
        axes.add_patch(
            FancyArrowPatch(
                places[line.start],
                places[line.end],
                arrowstyle="-|>" if line.is_directed else "-",
                mutation_scale=max(7.0, min(14.0, radius)),
                connectionstyle=f"arc3,rad={layout.bend(line.start, line.end)}",
                shrinkA=radius,
                shrinkB=radius + (1 if line.is_directed else 0),
                color=_EDGE_COLOUR,
                linewidth=line.width if count <= MAX_NAMED_SITES else 0.5,
                zorder=1,
            )
        )
        if line.label:
            _label_line(axes, line, places, layout.bend(line.start, line.end))
    axes.scatter(
        [places[member][0] for member in topology.members],
        [places[member][1] for member in topology.members],
        s=math.pi * radius**2,
        c=[(colours or {}).get(member, SITE_COLOUR) for member in topology.members],
        edgecolors=_INK,
        linewidths=0.8 if count <= MAX_NAMED_SITES else 0.3,
        zorder=2,
    )
    if count <= MAX_NAMED_SITES:
        _name_sites(axes, layout, radius)
    axes.set_aspect("equal")
    axes.set_axis_off()


def _title(topology: Topology, title: str) -> str:
    count = len(topology.members)
    about = f"{title}, {count} sites"
    if topology.period > 1:
        about += f", repeats after {topology.period:,} exchanges"
    return f"{about}\nline: both teach each other; arrow: from teacher to student"


def _radius_points(axes: Axes, places: Mapping[str, Point]) -> float:
    """Half the width of a disc, so that neighbours in the picture keep apart; also sets what the axes show."""
    xs, ys = zip(*places.values(), strict=True)
    width, height = max(xs) - min(xs), max(ys) - min(ys)
    margin = 0.16 * max(width, height, 1.0)
    axes.set_xlim(min(xs) - margin, max(xs) + margin)
    axes.set_ylim(min(ys) - margin, max(ys) + margin)
    box = axes.get_position()
    figure = axes.get_figure(root=True)
    assert figure is not None
    unit_points: float = 72 * min(
        box.width * figure.get_figwidth() / (width + 2 * margin),
        box.height * figure.get_figheight() / (height + 2 * margin),
    )
    points = list(places.values())
    nearest = min((math.dist(a, b) for index, a in enumerate(points) for b in points[:index]), default=1.0)
    return max(1.5, min(13.0, 0.3 * nearest * unit_points))


def _name_sites(axes: Axes, layout: Layout, radius: float) -> None:
    """Names in the discs where all are short, else outside of them, away from the middle of the picture."""
    size = 9.0
    longest = max(len(member) for member in layout.places)
    if longest * 0.62 * size <= 2 * radius:
        for member, place in layout.places.items():
            axes.annotate(member, place, ha="center", va="center", fontsize=size, zorder=4)
        return
    middle_x = (axes.get_xlim()[0] + axes.get_xlim()[1]) / 2
    middle_y = (axes.get_ylim()[0] + axes.get_ylim()[1]) / 2
    is_round = layout.kind in ("circle", "star", "hypercube")
    for member, (x, y) in layout.places.items():
        away = math.hypot(x - middle_x, y - middle_y)
        to_x, to_y = (
            ((x - middle_x) / away, (y - middle_y) / away) if is_round and away > 1e-6 else (0.0, -1.0)
        )
        axes.annotate(
            member,
            (x, y),
            xytext=((radius + 4) * to_x, (radius + 4) * to_y),
            textcoords="offset points",
            ha="center" if abs(to_x) < 0.3 else "left" if to_x > 0 else "right",
            va="center" if abs(to_y) < 0.3 else "bottom" if to_y > 0 else "top",
            fontsize=size if len(layout.places) <= 32 else 7.0,
            zorder=4,
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.75, "pad": 0.8},
        )


# --- edges -------------------------------------------------------------------------------------------------------------


def _lines(topology: Topology, exchange_index: int | None) -> list[_Line]:
    weights = _weights(topology, exchange_index)
    rank = {member: index for index, member in enumerate(topology.members)}
    lines = []
    for (teacher, student), weight in weights.items():
        there = _about(weight, topology.links.get((teacher, student)))
        width = _width(topology.links.get((teacher, student)))
        if (student, teacher) not in weights:
            lines.append(_Line(teacher, student, True, "\n".join(filter(None, there)), width))
        elif rank[teacher] < rank[student]:
            back = _about(weights[student, teacher], topology.links.get((student, teacher)))
            parts = []
            for one, other in zip(there, back, strict=True):
                both = [f"to {student} {one}" if one else "", f"to {teacher} {other}" if other else ""]
                parts += [one] if one == other else both
            width = min(width, _width(topology.links.get((student, teacher))))
            lines.append(_Line(teacher, student, False, "\n".join(filter(None, parts)), width))
    return lines


def _weights(topology: Topology, exchange_index: int | None) -> dict[tuple[str, str], float]:
    """The weight of each edge (teacher, student): at one exchange, or when it first is there."""
    weights: dict[tuple[str, str], float] = {}
    for student in topology.members:
        schedule = topology.schedule_of(student)
        for table in schedule if exchange_index is None else [schedule[exchange_index % topology.period]]:
            for teacher, weight in table.items():
                weights.setdefault((teacher, student), weight)
    return weights


def _about(weight: float, link: LinkAttributes | None) -> tuple[str, ...]:
    """What the label of an edge says, empty for what there is no need to say."""
    link = link or LinkAttributes()
    return (
        "" if link.bandwidth_mbit is None else _bandwidth(link.bandwidth_mbit),
        f"{link.latency_ms:g} ms" if link.latency_ms else "",
        f"{100 * link.loss_ratio:g} % lost" if link.loss_ratio else "",
        "" if weight == 1 else f"weight {weight:g}",
    )


def _width(link: LinkAttributes | None) -> float:
    if link is None or link.bandwidth_mbit is None:
        return 1.3
    return max(0.7, min(4.0, 0.3 + 0.9 * math.log10(max(1.0, link.bandwidth_mbit))))


def _bandwidth(mbit: float) -> str:
    return f"{mbit / 1000:g} Gbit/s" if mbit >= 1000 else f"{mbit:g} Mbit/s"


def _label_line(axes: Axes, line: _Line, places: Mapping[str, Point], bend: float) -> None:
    """Off the middle of long lines, where those across a circle would meet."""
    (x0, y0), (x1, y1) = places[line.start], places[line.end]
    share = 0.5 if math.dist((x0, y0), (x1, y1)) < 1.3 else 0.36
    bulge = 2 * share * (1 - share) * bend
    axes.annotate(
        line.label,
        (x0 + share * (x1 - x0) + bulge * (y1 - y0), y0 + share * (y1 - y0) - bulge * (x1 - x0)),
        ha="center",
        va="center",
        fontsize=6.5,
        zorder=3,
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.9, "pad": 0.6},
    )
