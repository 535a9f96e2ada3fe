"""Who teaches whom: a directed, weighted graph over the members of a run.

An edge (teacher, student) says that the student fetches the teacher's checkpoints and learns from them with the edge's
weight. Named graphs and undirected files mean both directions. All nodes of a run list the same members in the same order,
so all build the same graph; `digest` is what they compare when they meet.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack

from p2pcodistill.errors import TopologyError

if TYPE_CHECKING:
    import networkx

NAMED_TOPOLOGIES = ("pair", "ring", "full")
FILE_SUFFIXES = (".edgelist", ".graphml", ".gml", ".json")
MAX_TOPOLOGY_FILE_BYTES = 4 << 20


class Topology:
    """The teacher graph of a run.

    `members` are the sites in the order that all nodes agree on; `teachers_of` maps each student to {teacher: weight} in
    member order, weights positive and as written (the student normalises over the teachers that it has).
    """

    def __init__(
        self, members: Sequence[str], edges: Iterable[tuple[str, str, float]], *, source: str
    ) -> None:
        self.members = tuple(members)
        self.source = source
        if len(set(self.members)) != len(self.members):
            twice = next(m for m in self.members if self.members.count(m) > 1)
            raise TopologyError(f"the member {twice!r} is listed twice")
        weights: dict[str, dict[str, float]] = {member: {} for member in self.members}
        for teacher, student, weight in edges:
            for end in (teacher, student):
                if end not in weights:
                    raise TopologyError(
                        f"{source}: {end!r} is not a member of the run; members are {', '.join(self.members)}"
                    )
            if teacher == student:
                raise TopologyError(f"{source}: {teacher!r} teaches itself; remove the self-loop")
            if not (math.isfinite(weight) and weight > 0):
                raise TopologyError(
                    f"{source}: the weight of {teacher} -> {student} must be above 0, not {weight}"
                )
            weights[student][teacher] = weight
        rank = {member: index for index, member in enumerate(self.members)}
        self.teachers_of = {
            student: dict(sorted(teachers.items(), key=lambda item: rank[item[0]]))
            for student, teachers in weights.items()
        }
        self._require_connected()

    def students_of(self, teacher: str) -> tuple[str, ...]:
        """The members that learn from `teacher`, in member order."""
        return tuple(student for student in self.members if teacher in self.teachers_of[student])

    def neighbours_of(self, member: str) -> tuple[str, ...]:
        """The members that share an edge with `member`, in either direction, in member order."""
        students = self.students_of(member)
        return tuple(
            other for other in self.members if other in self.teachers_of[member] or other in students
        )

    @property
    def digest(self) -> bytes:
        """SHA-256 of members and weighted edges: equal on two nodes exactly when they mean the same graph."""
        edges = [[s, t, float(w)] for s in self.members for t, w in self.teachers_of[s].items()]
        return hashlib.sha256(msgpack.packb(["p2pcodistill-topology-1", list(self.members), edges])).digest()

    def _require_connected(self) -> None:
        if len(self.members) < 2:
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
                f"{self.source}: {', '.join(missing)} cannot be reached from {self.members[0]}: "
                "a run's graph must be connected; add an edge or remove the member"
            )


def build_topology(spec: str, members: Sequence[str], *, base_folder: Path = Path()) -> Topology:
    """The topology that `spec` names, over `members`.

    `spec` is `pair`, `ring`, `full`, or the path of a graph file (edge list, GraphML, GML, or networkx node-link JSON; by
    suffix), looked up below `base_folder` when relative. Raises TopologyError with what to do.
    """
    count = len(members)
    if count == 1:  # a site alone needs no graph
        return Topology(members, [], source=spec)
    if spec == "pair" and count != 2:
        raise TopologyError(
            f"the topology 'pair' joins two members, this run has {count}: use 'ring' or 'full'"
        )
    if spec in ("pair", "full"):
        pairs = [(a, b, 1.0) for a in members for b in members if a != b]
        return Topology(members, pairs, source=spec)
    if spec == "ring":
        hops = [(members[i], members[(i + 1) % count], 1.0) for i in range(count)]
        return Topology(members, hops + [(b, a, w) for a, b, w in hops], source=spec)
    if spec.endswith(FILE_SUFFIXES):
        path = base_folder / spec
        return Topology(members, _edges_of_file(path), source=str(path))
    raise TopologyError(
        f"unknown topology {spec!r}: use one of {', '.join(NAMED_TOPOLOGIES)}, "
        f"or a graph file ending in {', '.join(FILE_SUFFIXES)}"
    )


def _edges_of_file(path: Path) -> list[tuple[str, str, float]]:
    graph = _read_graph(path)
    edges = []
    for a, b, attributes in graph.edges(data=True):
        try:
            weight = float(attributes.get("weight", 1.0))
        except (TypeError, ValueError):
            raise TopologyError(f"{path}: the weight of {a} -> {b} is not a number") from None
        edges.append((str(a), str(b), weight))
        if not graph.is_directed() and a != b:
            edges.append((str(b), str(a), weight))
    return edges


def _read_graph(path: Path) -> networkx.Graph[Any]:
    # Imported late: a node whose topology has a name starts without paying for networkx.
    import json

    import networkx

    try:
        if path.stat().st_size > MAX_TOPOLOGY_FILE_BYTES:
            raise TopologyError(
                f"{path} is larger than {MAX_TOPOLOGY_FILE_BYTES >> 20} MiB: not a topology file"
            )
        if path.suffix == ".edgelist":
            # Direction is the point of an edge list here: 'a b' says that a teaches b.
            return networkx.read_edgelist(path, create_using=networkx.DiGraph)
        if path.suffix == ".graphml":
            return networkx.read_graphml(path)
        if path.suffix == ".gml":
            return networkx.read_gml(path)
        return networkx.node_link_graph(json.loads(path.read_text()), edges="edges")
    except FileNotFoundError:
        raise TopologyError(f"no topology file {path}") from None
    except OSError as error:
        raise TopologyError(f"cannot read the topology file {path}: {error.strerror}") from None
    except TopologyError:
        raise
    except Exception as error:  # networkx's readers raise whatever their parsers do
        raise TopologyError(f"{path} does not parse as {path.suffix[1:]}: {error}") from None
