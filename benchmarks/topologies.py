"""What sixteen sites pay and get under some topologies, on even lines and with one thin one; README, "Choosing a topology".

Virtual time, no training: each site publishes checkpoints of the size of a real model's, and passes on what it has learnt.
A site's upload is shared evenly by its students, its download by its teachers.
`python -m benchmarks.topologies docs/topologies.png` prints and draws it (some minutes).
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from p2pcodistill.report import figures
from p2pcodistill.simulation.links import neighbour_pairs
from p2pcodistill.simulation.shaping import LinkShape
from p2pcodistill.simulation.virtual.synthetic import SyntheticModel, SyntheticSchedule
from p2pcodistill.simulation.virtual.synthetic_run import SyntheticRun
from p2pcodistill.topology.build import build_topology
from p2pcodistill.topology.graph import Topology

SPECS = (
    "ring:16",
    "random-regular:16,3",
    "torus:4x4",
    "hypercube:4",
    "exponential:16",
    "one-peer-exponential:16",
    "star:16",
)
MEMBERS = tuple(f"{index:02d}" for index in range(16))
THIN_SITE = MEMBERS[5]
"""Not the hub of the star."""
LINE_MBIT, THIN_LINE_MBIT, LATENCY_MS = 100.0, 5.0, 20.0
MODEL = SyntheticModel.of(100_000_000)
SCHEDULE = SyntheticSchedule(num_versions=100, interval_steps=100, step_time_s=0.5, first_step=100)
EXCHANGE_S = SCHEDULE.interval_steps * SCHEDULE.step_time_s
LINE_CLASSES = {
    f"every site has a line of {LINE_MBIT:g} Mbit/s": dict.fromkeys(MEMBERS, LINE_MBIT),
    f"one of them has a line of {THIN_LINE_MBIT:g} Mbit/s": dict.fromkeys(MEMBERS, LINE_MBIT)
    | {THIN_SITE: THIN_LINE_MBIT},
}
Figures = dict[str, float | None]
_PANELS = {
    "upload_mb": ("Upload of the busiest site", "MB an exchange", 1.0),
    "everyone_knows_s": ("Everyone learnt of everyone", "minutes until then", 60.0),
    "staleness_exchanges": ("Stalest teacher", "exchanges behind, mean over time", 1.0),
}
"""Title, unit, and how many of what was measured make one."""
_OFFSET = 0.19


def main() -> None:
    """Print the figures of each topology and kind of lines, one JSON object a line, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("picture", nargs="?", type=Path, help="a PNG file to draw them into")
    options = parser.parse_args()
    results: dict[str, list[Figures]] = {}
    for spec in SPECS:
        topology = build_topology(spec, MEMBERS)
        for lines, mbit_of in LINE_CLASSES.items():
            measured = measure(topology, mbit_of)
            print(json.dumps({"topology": spec, "lines": lines} | measured), flush=True)
            results.setdefault(spec, []).append(measured)
    if options.picture is not None:
        draw(results, options.picture)


def shapes(
    topology: Topology, mbit_of: Mapping[str, float]
) -> dict[tuple[str, str], tuple[LinkShape, LinkShape]]:
    """The links of sites whose lines carry so much each way: shared evenly by a site's students, and by its teachers."""

    def shape(sender: str, receiver: str) -> LinkShape:
        up_mbit = mbit_of[sender] / len(topology.students_of(sender))
        down_mbit = mbit_of[receiver] / len(topology.teachers_of(receiver))
        return LinkShape(min(up_mbit, down_mbit), latency_ms=LATENCY_MS)

    return {(a, b): (shape(a, b), shape(b, a)) for a, b in neighbour_pairs(topology)}


def measure(topology: Topology, mbit_of: Mapping[str, float]) -> Figures:
    """One run. Staleness counts from its second half on, when all first keyframes should have arrived."""
    run = SyntheticRun(topology, MODEL, SCHEDULE, shapes=shapes(topology, mbit_of), keep_curves=True)
    until_s = SCHEDULE.num_versions * EXCHANGE_S + EXCHANGE_S
    run.run(until_s)
    sent = dict.fromkeys(topology.members, 0)
    for (sender, _), link in run.bytes_by_link().items():
        sent[sender] += link.num_bytes
    behind = [mean_from(edge.curve, until_s / 2) for edge in run.staleness.edges.values()]
    per_exchange_mb = 1 / (SCHEDULE.num_versions * 1e6)
    return {
        "upload_mb": round(max(sent.values()) * per_exchange_mb, 1),
        "mean_upload_mb": round(sum(sent.values()) / len(sent) * per_exchange_mb, 1),
        "everyone_knows_s": None if run.spread.complete_s is None else round(run.spread.complete_s, 1),
        "num_edges_in_use": len(behind),
        "staleness_exchanges": round(max(behind) / SCHEDULE.interval_steps, 2),
        "mean_staleness_exchanges": round(sum(behind) / len(behind) / SCHEDULE.interval_steps, 2),
    }


def mean_from(curve: Sequence[tuple[float, int]], start_s: float) -> float:
    """The mean over time of what changes at the times of `curve`, from `start_s` to its end."""
    total = duration_s = 0.0
    for (from_s, value), (to_s, _) in itertools.pairwise(curve):
        elapsed_s = to_s - max(from_s, start_s)
        if elapsed_s > 0:
            total, duration_s = total + value * elapsed_s, duration_s + elapsed_s
    return total / duration_s if duration_s else float(curve[-1][1])


def draw(results: Mapping[str, Sequence[Figures]], path: Path) -> None:
    """A row for each topology, a panel for each figure, a colour for each kind of lines."""
    with figures.style():
        figure, panels = figures.new_figure(9.6, 4.3, num_columns=len(_PANELS), width_ratios=(1, 1, 1))
        rows = range(len(results) - 1, -1, -1)
        for axes, (key, (title, unit, per_unit)) in zip(panels, _PANELS.items(), strict=True):
            for index, (colour, lines) in enumerate(zip(figures.SITE_COLOURS, LINE_CLASSES, strict=False)):
                values = [(measured[index][key] or 0.0) / per_unit for measured in results.values()]
                heights = [row + _OFFSET * (1 - 2 * index) for row in rows]
                axes.barh(heights, values, height=2 * _OFFSET, color=colour, label=lines)
                for value, height in zip(values, heights, strict=True):
                    axes.annotate(
                        f"{value:.2g}" if value < 10 else f"{value:.0f}",
                        (value, height),
                        (3, 0),
                        textcoords="offset points",
                        va="center",
                        fontsize=8,
                    )
            axes.set_title(title)
            axes.set_xlabel(unit)
            axes.margins(x=0.16)
            axes.grid(False, axis="y")
            axes.set_yticks(rows, list(results) if axes is panels[0] else [""] * len(results))
            axes.tick_params(axis="y", length=0)
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=2)
        figures.save_png(figure, path)


if __name__ == "__main__":
    main()
