"""Where every site stood in the end: the topology with each site in the colour of its state, and a line about each."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, TypeAlias

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from p2pcodistill.report import figures
from p2pcodistill.report.history import SiteHistory
from p2pcodistill.report.table import ABSENT
from p2pcodistill.topology.drawing import MAX_NAMED_SITES, draw_topology
from p2pcodistill.topology.graph import Topology

State: TypeAlias = Literal[
    "finished", "finished after faults", "killed", "left", "not finished", "never started"
]
COLOURS: dict[State, str] = {
    "finished": "#009E73",
    "finished after faults": "#E69F00",
    "killed": "#D55E00",
    "left": "#999999",
    "not finished": "#CC79A7",
    "never started": "#F0F0F0",
}
MIN_SITES = 3
"""Of a pair, a drawing says nothing."""
MAX_DRAWN_SITES = 256
MAX_DRAWN_EDGES = 1024
MAX_ROWS = 200
"""Sites in the table of a report; of a larger run, those first that did not simply finish."""


def state_of(history: SiteHistory) -> State:
    """How it ended for a site: by what its own events say of its training, then by what a simulation last did to it."""
    if history.finished:
        return "finished after faults" if history.faults else "finished"
    if not history.num_node_starts:
        return "never started"
    ends: dict[str, State] = {"kill": "killed", "leave": "left"}
    lives = [kind for kind, _ in history.faults if kind in (*ends, "restart", "join")]
    return ends.get(lives[-1], "not finished") if lives else "not finished"


def states_picture(topology: Topology, sites: Mapping[str, SiteHistory]) -> Figure | None:
    """`topology`, with all edges that it ever has, and its sites as their histories left them.

    None where that would say nothing, or could not be made out: for fewer than MIN_SITES, more than MAX_DRAWN_SITES or more
    than MAX_DRAWN_EDGES.
    """
    num_edges = sum(len(topology.teachers_of(member)) for member in topology.members)
    if not MIN_SITES <= len(topology.members) <= MAX_DRAWN_SITES or num_edges > MAX_DRAWN_EDGES:
        return None
    states = {site: state_of(sites[site]) for site in topology.members}
    with figures.style():
        size = 5.2 if len(topology.members) <= MAX_NAMED_SITES // 4 else 7.0
        figure, (axes,) = figures.new_figure(size + 1.6, size)
        draw_topology(axes, topology, colours={site: COLOURS[state] for site, state in states.items()})
        counted = {state: list(states.values()).count(state) for state in COLOURS}
        handles = [
            Line2D(
                [],
                [],
                linestyle="",
                marker="o",
                markersize=9,
                color=COLOURS[state],
                markeredgecolor=figures.INK,
                markeredgewidth=0.6,
                label=f"{state} ({count})",
            )
            for state, count in counted.items()
            if count
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=3)
        return figure


def state_rows(histories: Mapping[str, SiteHistory]) -> list[list[str]]:
    """A row for each site, at most MAX_ROWS: its name, state, steps, stalest teacher in the end, and faults."""
    sites = sorted(histories.items(), key=lambda item: state_of(item[1]) == "finished")
    shown = histories.items() if len(sites) <= MAX_ROWS else sites[:MAX_ROWS]
    return [
        [site, state_of(history), str(history.num_steps), _stalest(history), _faults(history)]
        for site, history in shown
    ]


def _stalest(history: SiteHistory) -> str:
    staleness: Mapping[str, int] = history.staleness[-1][1] if history.staleness else {}
    if not staleness:
        return ABSENT
    teacher = max(staleness, key=lambda name: staleness[name])
    return f"{staleness[teacher]} ({teacher})" if staleness[teacher] else "0"


def _faults(history: SiteHistory) -> str:
    return ", ".join(f"{kind} at step {step}" for kind, step in history.faults) or ABSENT
