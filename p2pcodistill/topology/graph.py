"""Who teaches whom: a directed, weighted graph over the members of a run, which may change from exchange to exchange.

An edge (teacher, student) says that the student learns from the teacher's checkpoints, with the edge's weight. A schedule
is a sequence of such graphs, used in turn; its index is the student's own exchange count. All nodes of a run list the same
members in the same order, so all build the same; `digest` is what they compare when they meet.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import msgpack

from p2pcodistill.errors import TopologyError

Edge = tuple[str, str, float]
"""(teacher, student, weight)."""

_Phase = tuple[Mapping[str, float], ...]


@dataclass(frozen=True, slots=True)
class LinkAttributes:
    """What is known of the connection along an edge, in the direction from teacher to student; a simulator shapes by it."""

    bandwidth_mbit: float | None = None
    """Megabits per second, above 0; None: unlimited."""
    latency_ms: float = 0.0
    """One-way delay, not negative."""
    loss_ratio: float = 0.0
    """Share of packets that are lost, from 0 to below 1."""


class Topology:
    """The teacher graph of a run, or the schedule of graphs: `period` is 1 for a graph that stays.

    `members` are the sites in the order that all nodes agree on; `phases` hold the edges of one exchange each. Weights are
    positive and as written (the student normalises over the teachers that it has). `source` names it in messages. `links`
    has attributes of connections by (teacher, student), as far as a file tells them; they are no part of the digest. Raises
    TopologyError, also where edges of all phases together leave a member out.
    """

    def __init__(
        self,
        members: Sequence[str],
        *phases: Iterable[Edge],
        source: str,
        links: Mapping[tuple[str, str], LinkAttributes] | None = None,
    ) -> None:
        self.members = tuple(members)
        self.source = source
        self.links = dict(links or {})
        self._rank = {member: rank for rank, member in enumerate(self.members)}
        if len(self._rank) != len(self.members):
            twice = next(m for m in self.members if self.members.count(m) > 1)
            raise TopologyError(f"the member {twice!r} is listed twice")
        # A long schedule repeats the same few tables again and again: each is kept once.
        shared: dict[tuple[tuple[str, float], ...], Mapping[str, float]] = {}
        self._phases = _shortest([self._phase(edges, shared) for edges in phases])
        teachers: list[set[str]] = [set() for _ in self.members]
        students: list[set[str]] = [set() for _ in self.members]
        for phase in self._phases:
            for student, table in enumerate(phase):
                teachers[student].update(table)
        for student, names in enumerate(teachers):
            for teacher in names:
                students[self._rank[teacher]].add(self.members[student])
        self._teachers = [self._in_order(names) for names in teachers]
        self._students = [self._in_order(names) for names in students]
        self._neighbours = [self._in_order(a | b) for a, b in zip(teachers, students, strict=True)]
        self._require_connected()

    @property
    def period(self) -> int:
        """After how many exchanges the schedule begins again."""
        return len(self._phases)

    def teachers_at(self, member: str, exchange_index: int) -> Mapping[str, float]:
        """{teacher: weight} in member order: who teaches `member` at its exchange `exchange_index`, counted from 0."""
        return self._phases[exchange_index % self.period][self._rank[member]]

    def schedule_of(self, member: str) -> tuple[Mapping[str, float], ...]:
        """`teachers_at` for each exchange of one period."""
        rank = self._rank[member]
        return tuple(phase[rank] for phase in self._phases)

    def teachers_of(self, member: str) -> tuple[str, ...]:
        """The members that teach `member` at any time, in member order."""
        return self._teachers[self._rank[member]]

    def students_of(self, member: str) -> tuple[str, ...]:
        """The members that learn from `member` at any time, in member order."""
        return self._students[self._rank[member]]

    def neighbours_of(self, member: str) -> tuple[str, ...]:
        """The members that ever share an edge with `member`, in either direction, in member order."""
        return self._neighbours[self._rank[member]]

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of members and the whole schedule with its weights: equal on two nodes exactly when they mean the same."""
        digest = hashlib.sha256(msgpack.packb(["p2pcodistill-topology-2", list(self.members), self.period]))
        for phase in self._phases:
            tables = [[[self._rank[t], float(w)] for t, w in table.items()] for table in phase]
            digest.update(msgpack.packb(tables))
        return digest.digest()

    def _phase(
        self, edges: Iterable[Edge], shared: dict[tuple[tuple[str, float], ...], Mapping[str, float]]
    ) -> _Phase:
        tables: list[dict[str, float]] = [{} for _ in self.members]
        for teacher, student, weight in edges:
            for end in (teacher, student):
                if end not in self._rank:
                    raise TopologyError(
                        f"{self.source}: {end!r} is not a member of the run; members are {_listed(self.members)}"
                    )
            if teacher == student:
                raise TopologyError(f"{self.source}: {teacher!r} teaches itself; remove the self-loop")
            if not (math.isfinite(weight) and weight > 0):
                raise TopologyError(
                    f"{self.source}: the weight of {teacher} -> {student} must be above 0, not {weight}"
                )
            table = tables[self._rank[student]]
            if table.setdefault(teacher, weight) != weight:
                raise TopologyError(f"{self.source}: {teacher} -> {student} is there twice, with two weights")
        phase = []
        for table in tables:
            items = tuple(sorted(table.items(), key=lambda item: self._rank[item[0]]))
            phase.append(shared.setdefault(items, dict(items)))
        return tuple(phase)

    def _in_order(self, names: set[str]) -> tuple[str, ...]:
        return tuple(sorted(names, key=self._rank.__getitem__))

    def _require_connected(self) -> None:
        if not self.members:
            return
        reached, frontier = {self.members[0]}, [self.members[0]]
        while frontier:
            for other in self.neighbours_of(frontier.pop()):
                if other not in reached:
                    reached.add(other)
                    frontier.append(other)
        missing = [member for member in self.members if member not in reached]
        if missing:
            raise TopologyError(
                f"{self.source}: {_listed(missing)} cannot be reached from {self.members[0]}: "
                "a run's graph must be connected; add an edge or remove the member"
            )


def _shortest(phases: list[_Phase]) -> list[_Phase]:
    """The shortest schedule that repeats as `phases` do."""
    count = len(phases)
    for period in range(1, count):
        if count % period == 0 and phases[period:] == phases[:-period]:
            return phases[:period]
    return phases


def _listed(names: Sequence[str], max_shown: int = 12) -> str:
    shown = ", ".join(names[:max_shown])
    return shown if len(names) <= max_shown else f"{shown} and {len(names) - max_shown} more"
