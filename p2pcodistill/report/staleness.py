"""Who had which version when: how far every student was behind each of its teachers, over time.

The events of all sites of a run, in the order of their time, say when each version was published and when each student began
to learn from it. On an edge of the teacher graph, from the first swap on, the *staleness* is the number of steps from the
version in use to the newest one that its origin had published by then (not: that the student had heard of). It ends with the
student's training or its node, and begins anew when that is launched again.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from p2pcodistill.report.history import read_event
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.node_events import FramePublished, NodeStopped
from p2pcodistill.telemetry.records import Record
from p2pcodistill.telemetry.simulation_events import FaultInjected
from p2pcodistill.telemetry.training_events import TeacherSwapped, TrainingEnded

Edge: TypeAlias = tuple[str, str]
"""(teacher, student)."""
Version: TypeAlias = tuple[int, int]
"""(incarnation, step)."""
_ENDS = (TrainingEnded, NodeStopped, FaultInjected)
_EVENTS = frozenset(kind.name for kind in (FramePublished, TeacherSwapped, *_ENDS))


@dataclass(slots=True)
class EdgeStaleness:
    """One edge. `curve` has the changes, as (seconds, steps); it stays empty where curves are not kept."""

    in_use: Version
    steps: int
    since_s: float
    num_versions: int = 1
    """Versions that the student learnt from."""
    num_step_seconds: float = 0.0
    duration_s: float = 0.0
    curve: list[tuple[float, int]] = field(default_factory=list)
    is_over: bool = False
    """The student learns no more."""

    @property
    def mean_steps(self) -> float:
        """Mean over time."""
        return self.num_step_seconds / self.duration_s if self.duration_s else float(self.steps)


class StalenessTracker:
    """Takes the events of all sites, in the order of time; `close` it before the result is read."""

    def __init__(self, *, keep_curves: bool = True) -> None:
        self.edges: dict[Edge, EdgeStaleness] = {}
        """In the order in which the students first learnt from their teachers."""
        self.seconds_at: dict[int, float] = {}
        """How long edges were so many steps behind, all edges together."""
        self.published: dict[str, list[tuple[float, Version]]] = {}
        """Per origin, what it published when; it stays empty where curves are not kept."""
        self._keep_curves = keep_curves
        self._newest: dict[str, Version] = {}
        self._edges_from: dict[str, list[EdgeStaleness]] = {}
        self._edges_to: dict[str, dict[str, EdgeStaleness]] = {}

    @classmethod
    def of(cls, records_of: Mapping[str, Iterable[Record]]) -> StalenessTracker:
        """What the records of each site tell, to the end of the last of them."""
        tracker = cls()
        time_s = 0.0
        for time_s, site, event in _in_order_of_time(records_of):
            tracker.update(time_s, site, event)
        tracker.close(time_s)
        return tracker

    def update(self, time_s: float, site: str, event: Event) -> None:
        """`site` reported `event`, or a simulation of it; only publications, swaps and ends change anything."""
        if isinstance(event, FramePublished):
            version = event.incarnation, event.step
            if version > self._newest.get(site, (0, -1)):
                self._newest[site] = version
                if self._keep_curves:
                    self.published.setdefault(site, []).append((time_s, version))
                for edge in self._edges_from.get(site, ()):
                    self._move(edge, site, time_s)
        elif isinstance(event, TeacherSwapped):
            version = event.incarnation, event.teacher_step
            self._newest.setdefault(event.teacher, version)
            key = event.teacher, site
            known = self.edges.get(key)
            if known is None:
                known = self.edges[key] = EdgeStaleness(version, 0, time_s)
                self._edges_from.setdefault(event.teacher, []).append(known)
            else:
                if known.is_over:  # it was launched again
                    known.is_over, known.since_s = False, time_s
                known.in_use = version
                known.num_versions += 1
            self._edges_to.setdefault(site, {})[event.teacher] = known
            self._move(known, event.teacher, time_s)
        elif isinstance(event, _ENDS) and (not isinstance(event, FaultInjected) or event.ends_node):
            for edge in self._edges_to.get(site, {}).values():
                self._end(edge, time_s)

    def close(self, time_s: float) -> None:
        """The run is over."""
        for edge in self.edges.values():
            self._end(edge, time_s)

    @property
    def mean_steps(self) -> float | None:
        """Mean over time and edges; None without edges."""
        total_s = sum(self.seconds_at.values())
        return sum(steps * s for steps, s in self.seconds_at.items()) / total_s if total_s else None

    def share_at_or_below(self, steps: int) -> float | None:
        """The share of time, over all edges, that they were at most so many steps behind."""
        total_s = sum(self.seconds_at.values())
        return (
            sum(s for behind, s in self.seconds_at.items() if behind <= steps) / total_s if total_s else None
        )

    def _end(self, edge: EdgeStaleness, time_s: float) -> None:
        if not edge.is_over:
            self._count(edge, time_s)
            edge.is_over = True
            if self._keep_curves:
                edge.curve.append((time_s, edge.steps))

    def _move(self, edge: EdgeStaleness, teacher: str, time_s: float) -> None:
        if edge.is_over:
            return
        self._count(edge, time_s)
        edge.steps = max(0, self._newest[teacher][1] - edge.in_use[1])
        if self._keep_curves:
            edge.curve.append((time_s, edge.steps))

    def _count(self, edge: EdgeStaleness, time_s: float) -> None:
        elapsed_s = time_s - edge.since_s
        if elapsed_s > 0:
            self.seconds_at[edge.steps] = self.seconds_at.get(edge.steps, 0.0) + elapsed_s
            edge.num_step_seconds += edge.steps * elapsed_s
            edge.duration_s += elapsed_s
            edge.since_s = time_s


def _in_order_of_time(records_of: Mapping[str, Iterable[Record]]) -> Iterator[tuple[float, str, Event]]:
    """All events of interest. Clocks of one machine are taken to agree; what has no time is left out. Those of one site may
    come from several logs, one after the other."""

    def of_site(site: str, records: Iterable[Record]) -> Iterator[tuple[float, str, Event]]:
        for record in records:
            time_s = record.get("time_unix_s")
            if record.get("event") in _EVENTS and isinstance(time_s, int | float):
                try:
                    yield float(time_s), site, read_event(record)
                except ValueError:
                    continue

    streams = [
        sorted(of_site(site, records), key=lambda item: item[0]) for site, records in records_of.items()
    ]
    return heapq.merge(*streams, key=lambda item: item[0])
