"""What all pictures of a report share: their style, the colours of sites, and how they are saved.

matplotlib through its object-oriented interface only: no global state, no window system. A site keeps its colour in every
picture (Okabe and Ito's palette and two of Tol's, for colour-blind readers); the style of a line tells the arm. SVG keeps
text as text.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from p2pcodistill.report.summary import POOLED_SITE, ArmResult

SITE_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#882255", "#999933")
POOLED_COLOUR = "#444444"
INK = "#222222"
FAINT_INK = "#767676"
PANEL_SHARE = 0.82
"""How much of a figure's height is left to a single panel, about."""

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


def style() -> AbstractContextManager[None]:
    """How all pictures of a report look; to be drawn and saved in."""
    return matplotlib.rc_context(_STYLE)


def site_colours(arms: Iterable[ArmResult]) -> dict[str, str]:
    """A colour for each site, the same in every picture of these arms."""
    sites = dict.fromkeys(site for arm in arms for site in arm.sites if site != POOLED_SITE)
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


def codistilled_arms(arms: Iterable[ArmResult]) -> list[ArmResult]:
    """Those of `arms` in which sites learn from each other."""
    return [arm for arm in arms if arm.kind == "codistilled"]
