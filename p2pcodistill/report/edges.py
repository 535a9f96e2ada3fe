"""What happened on each edge of the teacher graph: bytes, versions, and how far the student was behind its teacher."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from p2pcodistill.report import figures
from p2pcodistill.report.history import read_event
from p2pcodistill.report.staleness import Edge, EdgeStaleness, StalenessTracker
from p2pcodistill.telemetry import NodeStarted, Record, TrafficMeasured

MAX_ROWS = 200
"""Edges in the table of a report; of a larger run, those with the stalest teachers."""
MAX_LINES = 16
"""Edges that are drawn one by one; of more, the mean and the range."""
_NUM_TIMES = 400


@dataclass(frozen=True, slots=True)
class EdgeResult:
    """One edge of a run. `num_bytes` the teacher's site sent to the student's, envelopes and control messages included."""

    teacher: str
    student: str
    num_bytes: int
    num_versions: int
    mean_staleness_steps: float
    max_staleness_steps: int


@dataclass(frozen=True, slots=True)
class EdgeResults:
    """All edges of a run, in member order of their students, and what they came to."""

    edges: tuple[EdgeResult, ...]
    staleness: StalenessTracker

    @classmethod
    def of(cls, records_of: Mapping[str, Sequence[Record]]) -> EdgeResults:
        """What the event logs of all sites tell, by site."""
        tracker = StalenessTracker.of(records_of)
        sent = {site: bytes_sent_by_peer(records) for site, records in records_of.items()}
        rank = {site: index for index, site in enumerate(records_of)}
        edges = [
            EdgeResult(
                teacher,
                student,
                sent.get(teacher, {}).get(student, 0),
                edge.num_versions,
                edge.mean_steps,
                max((steps for _, steps in edge.curve), default=0),
            )
            for (teacher, student), edge in tracker.edges.items()
        ]
        order = sorted(edges, key=lambda edge: (rank.get(edge.student, 0), rank.get(edge.teacher, len(rank))))
        return cls(tuple(order), tracker)

    @property
    def rows(self) -> tuple[EdgeResult, ...]:
        """What a table shows: all edges, or of many those with the stalest teachers."""
        if len(self.edges) <= MAX_ROWS:
            return self.edges
        return tuple(sorted(self.edges, key=lambda edge: -edge.mean_staleness_steps)[:MAX_ROWS])


def bytes_sent_by_peer(records: Iterable[Record]) -> dict[str, int]:
    """Bytes that a site sent to each peer, over all lives of its node."""
    earlier: dict[str, int] = {}
    current: dict[str, int] = {}
    for record in records:
        if record.get("event") not in (NodeStarted.name, TrafficMeasured.name):
            continue
        try:
            event = read_event(record)
        except ValueError:
            continue
        if isinstance(event, TrafficMeasured):
            measured = event.num_bytes_sent_by_peer
            if any(measured.get(peer, 0) < num_bytes for peer, num_bytes in current.items()):
                earlier, current = _added(earlier, current), {}  # the record of the start was torn
            current = dict(measured)
        else:
            earlier, current = _added(earlier, current), {}
    return _added(earlier, current)


def _added(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    return {peer: first.get(peer, 0) + second.get(peer, 0) for peer in [*first, *second]}


def staleness_over_time(results: EdgeResults, sites: Mapping[str, str]) -> Figure | None:
    """How far students were behind, over time, and for which share of it. `sites` maps each site to its colour.

    None where nobody learnt from anybody.
    """
    tracker = results.staleness
    curves = {key: edge for key, edge in tracker.edges.items() if edge.curve}
    if not curves or not tracker.seconds_at:
        return None
    with figures.style():
        height = 3.4 + 0.2 * math.ceil(len(curves) / 4) * (len(curves) <= MAX_LINES)
        figure, (over_time, histogram) = figures.new_figure(9.0, height, num_columns=2, width_ratios=(1.7, 1))
        start_s = min(
            time_s
            for points in ([e.curve for e in curves.values()], tracker.published.values())
            for time_s, _ in itertools.chain.from_iterable(points)
        )
        if len(curves) <= MAX_LINES:
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
        else:
            times_s, means, tops = _sampled(curves, start_s)
            over_time.plot(times_s, means, color=figures.INK, label="mean of all edges")
            over_time.plot(times_s, tops, color=figures.FAINT_INK, linewidth=1.0, label="stalest edge")
            over_time.legend()
        over_time.set_title("Steps behind the newest checkpoint")
        over_time.set_xlabel("seconds")
        over_time.set_ylabel("steps")
        over_time.set_ylim(bottom=0)
        over_time.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
        steps = sorted(tracker.seconds_at)
        total_s = sum(tracker.seconds_at.values())
        gap = min((b - a for a, b in itertools.pairwise(steps)), default=1)
        histogram.bar(
            steps,
            [tracker.seconds_at[behind] / total_s for behind in steps],
            width=0.8 * gap,
            color=figures.SITE_COLOURS[0],
        )
        histogram.set_title("Share of the time")
        histogram.set_xlabel("steps behind")
        histogram.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        histogram.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
        return figure


def _sampled(
    curves: Mapping[Edge, EdgeStaleness], start_s: float
) -> tuple[list[float], list[float], list[int]]:
    """(seconds, mean steps, most steps) of all edges that were there by then, at moments evenly apart."""
    end_s = max(edge.curve[-1][0] for edge in curves.values())
    times_s = [start_s + (end_s - start_s) * index / _NUM_TIMES for index in range(_NUM_TIMES + 1)]
    sums, counts, tops = [0] * len(times_s), [0] * len(times_s), [0] * len(times_s)
    for edge in curves.values():
        position, behind = 0, None
        for index, time_s in enumerate(times_s):
            while position < len(edge.curve) and edge.curve[position][0] <= time_s:
                behind = edge.curve[position][1]
                position += 1
            if behind is not None:
                sums[index] += behind
                counts[index] += 1
                tops[index] = max(tops[index], behind)
    means = [total / count if count else 0.0 for total, count in zip(sums, counts, strict=True)]
    return [time_s - start_s for time_s in times_s], means, tops
