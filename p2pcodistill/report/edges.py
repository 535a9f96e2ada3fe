"""What happened on each edge of the teacher graph: bytes, versions, and how far the student was behind its teacher."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from p2pcodistill.report.history import read_event
from p2pcodistill.report.staleness import StalenessTracker
from p2pcodistill.report.table import ABSENT, byte_count, number
from p2pcodistill.telemetry.node_events import NodeStarted, TrafficMeasured
from p2pcodistill.telemetry.records import Record

MAX_ROWS = 200
"""Edges in the table of a report; of a larger run, those with the stalest teachers."""


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
        """What a table shows of them."""
        return table_rows(self.edges)


def table_rows(edges: Sequence[EdgeResult]) -> tuple[EdgeResult, ...]:
    """What a table shows: all edges, or of many those with the stalest teachers."""
    if len(edges) <= MAX_ROWS:
        return tuple(edges)
    return tuple(sorted(edges, key=lambda edge: -edge.mean_staleness_steps)[:MAX_ROWS])


def edge_rows(edges: Sequence[EdgeResult]) -> list[list[str]]:
    """The cells of a table: teacher, student, bytes sent to the student, versions learnt from, mean and most staleness."""
    return [
        [
            edge.teacher,
            edge.student,
            byte_count(edge.num_bytes),
            str(edge.num_versions or ABSENT),
            number(edge.mean_staleness_steps, 1) if edge.num_versions else ABSENT,
            str(edge.max_staleness_steps) if edge.num_versions else ABSENT,
        ]
        for edge in edges
    ]


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


def sample_staleness(
    tracker: StalenessTracker, start_s: float, end_s: float, num_times: int
) -> list[tuple[float, float, float]]:
    """(seconds, mean steps, most steps) of all edges in use by then, at moments evenly apart from `start_s` to `end_s`.

    Seconds count from `start_s`; there are none before the first edge is in use.
    """
    times_s = [start_s + (end_s - start_s) * index / num_times for index in range(num_times + 1)]
    sums, counts, tops = [0] * len(times_s), [0] * len(times_s), [0] * len(times_s)
    for edge in tracker.edges.values():
        position, behind = 0, None
        for index, time_s in enumerate(times_s):
            while position < len(edge.curve) and edge.curve[position][0] <= time_s:
                behind = edge.curve[position][1]
                position += 1
            if behind is not None:
                sums[index] += behind
                counts[index] += 1
                tops[index] = max(tops[index], behind)
    return [
        (time_s - start_s, total / count, float(top))
        for time_s, total, count, top in zip(times_s, sums, counts, tops, strict=True)
        if count
    ]


def start_of(tracker: StalenessTracker) -> float:
    """When, in seconds, something was published or learnt from first."""
    used = (time_s for edge in tracker.edges.values() for time_s, _ in edge.curve)
    published = (time_s for versions in tracker.published.values() for time_s, _ in versions)
    return min(itertools.chain(used, published), default=0.0)
