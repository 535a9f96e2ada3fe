"""Where the sites of a topology are drawn, and how far its edges bend so as not to run through other sites."""

from __future__ import annotations

import math
from typing import Literal

from p2pcodistill.topology.graph import Topology

Point = tuple[float, float]
Kind = Literal["circle", "star", "line", "torus", "tree", "hypercube"]

_KINDS: dict[str, Kind] = {"line": "line", "torus": "torus", "tree": "tree", "hypercube": "hypercube"}
_MAX_CUBE_SITES = 16
_INWARD_BEND = 0.15
_AROUND_TORUS_BEND = 0.7  # of a grid step


class Layout:
    """The places of all sites, by the kind of graph; on a circle in member order where there is no better way."""

    def __init__(self, topology: Topology) -> None:
        self._rank = {member: rank for rank, member in enumerate(topology.members)}
        count = len(self._rank)
        hub = _hub(topology)
        self.kind: Kind = "star" if hub else _KINDS.get(topology.source.partition(":")[0], "circle")
        if self.kind == "hypercube" and count > _MAX_CUBE_SITES:
            self.kind = "circle"
        self._num_columns = (
            int(topology.source.rpartition("x")[2]) if self.kind == "torus" and count > 1 else 1
        )
        self.places: dict[str, Point]
        match self.kind:
            case "star":
                around = [member for member in topology.members if member != hub]
                self.places = {member: _on_circle(i, count - 1) for i, member in enumerate(around)}
                self.places |= {hub: (0.0, 0.0)} if hub else {}
            case "line":
                self.places = {member: (0.5 * rank, 0.0) for member, rank in self._rank.items()}
            case "torus":
                columns = self._num_columns
                self.places = {
                    member: (float(rank % columns), -float(rank // columns))
                    for member, rank in self._rank.items()
                }
            case "tree":
                self.places = _tree_places(topology, self._rank)
            case "hypercube":
                self.places = {member: _at_corner(rank, count) for member, rank in self._rank.items()}
            case "circle":
                self.places = {member: _on_circle(rank, count) for member, rank in self._rank.items()}

    def bend(self, start: str, end: str) -> float:
        """How far an edge bulges to the right, as a share of its length."""
        a, b, count = self._rank[start], self._rank[end], len(self._rank)
        if self.kind == "torus":
            columns = self._num_columns
            length = max(abs(a % columns - b % columns), abs(a // columns - b // columns))
            return 0.0 if length == 1 else _AROUND_TORUS_BEND / length
        num_clockwise = (b - a) % count
        is_beside = min(num_clockwise, count - num_clockwise) == 1
        if self.kind != "circle" or count < 4 or is_beside or 2 * num_clockwise == count:
            return 0.0
        return _INWARD_BEND if 2 * num_clockwise < count else -_INWARD_BEND


def _hub(topology: Topology) -> str | None:
    """The site to which all others are joined, if they are joined to no other."""
    num_others = len(topology.members) - 1
    if num_others < 3:
        return None
    counts = {member: len(topology.neighbours_of(member)) for member in topology.members}
    hubs = [member for member, num_neighbours in counts.items() if num_neighbours == num_others]
    return hubs[0] if len(hubs) == 1 and sum(counts.values()) == 2 * num_others else None


def _on_circle(rank: int, count: int) -> Point:
    angle = math.pi / 2 - 2 * math.pi * rank / count
    return math.cos(angle), math.sin(angle)


def _at_corner(rank: int, count: int) -> Point:
    """Corners of a square, a cube seen from the side, a tesseract along its axis of symmetry."""
    dimension = count.bit_length() - 1
    axes = [(1.0, 0.0), (0.0, 1.0), (0.45, 0.35)]
    if dimension == 4:
        axes = [(math.cos(math.pi * k / 4), math.sin(math.pi * k / 4)) for k in range(4)]
    corner = [axis for place, axis in enumerate(axes) if rank >> place & 1]
    return sum(x for x, _ in corner), sum(y for _, y in corner)


def _tree_places(topology: Topology, rank: dict[str, int]) -> dict[str, Point]:
    """Leaves side by side, each other site above the middle of its branches; members are in order of their depth."""
    branches = {
        member: [other for other in topology.students_of(member) if rank[other] > rank[member]]
        for member in rank
    }
    depth = {topology.members[0]: 0}
    for member in topology.members:
        depth |= dict.fromkeys(branches[member], depth[member] + 1)
    num_leaves = sum(1 for below in branches.values() if not below)
    places: dict[str, Point] = {}
    next_leaf = num_leaves
    for member in reversed(topology.members):
        if below := branches[member]:
            x = sum(places[other][0] for other in below) / len(below)
        else:
            next_leaf -= 1
            x = float(next_leaf)
        places[member] = x, -depth[member] * max(1.0, num_leaves / 5)
    return places
