"""Figures of graphs, against closed forms, hand counts and networkx."""

import math

import networkx
import numpy as np
import pytest

from p2pcodistill.topology import statistics
from p2pcodistill.topology.build import build_topology, default_members
from p2pcodistill.topology.graph import Topology
from p2pcodistill.topology.statistics import (
    Range,
    Spread,
    diameter,
    distances_from,
    longest_way_s,
    measure_spread,
    mixing_matrix,
    num_students,
    num_teachers,
    num_teachers_at_once,
    spectral_gap,
)


def named(spec, count=None):
    return build_topology(spec, default_members(spec) or tuple(map(str, range(count))))


@pytest.mark.parametrize(
    ("spec", "hops"),
    [
        ("pair", 1), ("ring:8", 4), ("ring:9", 4), ("full:4", 1), ("star:5", 2), ("line:4", 3), ("torus:4x4", 4),
        ("hypercube:4", 4), ("exponential:16", 4), ("exponential:17", 3), ("tree:2,3", 6), ("one-peer-exponential:16", 4),
    ],
)  # fmt: skip
def test_diameters(spec, hops):
    assert diameter(named(spec)) == hops


@pytest.mark.parametrize("spec", ["ring:9", "exponential:11", "random-regular:16,3", "small-world:20,4,0.1"])
def test_knowledge_spreads_along_distances(spec):
    topology = named(spec)
    graph = networkx.DiGraph((t, s) for s in topology.members for t in topology.teachers_of(s))
    for origin in topology.members:
        assert distances_from(topology, origin) == networkx.single_source_shortest_path_length(graph, origin)
    spread = measure_spread(topology)
    mean = networkx.average_shortest_path_length(graph)
    assert spread == Spread(diameter(topology), pytest.approx(mean), None)


def test_knowledge_that_goes_one_way():
    topology = Topology(("t", "s", "u"), [("t", "s", 1.0), ("s", "u", 1.0)], source="x")
    assert diameter(topology) is None
    assert distances_from(topology, "s") == {"s": 0, "u": 1}
    assert measure_spread(topology) == Spread(2, pytest.approx(4 / 3), ("s", "t"))


def test_a_site_alone():
    topology = Topology(("a",), [], source="x")
    assert (diameter(topology), spectral_gap(topology)) == (0, 1.0)
    assert measure_spread(topology) == Spread(0, 0.0, None)


@pytest.mark.parametrize(("count", "num_exchanges"), [(2, 1), (16, 4), (17, 5)])
def test_one_peer_at_a_time_reaches_everyone_within_a_period(count, num_exchanges):
    assert measure_spread(named("one-peer-exponential", count)).most == num_exchanges


def test_a_schedule_is_as_slow_as_its_worst_start():
    # A line of which one edge is there at a time. What d knows passes c-d, b-c, a-b: from the first exchange on these are
    # its exchanges 3, 5 and 7; from the second 2, 4, 6; from the third 1, 3, 5. The other way it waits at most two.
    edges = [[(a, b, 1.0), (b, a, 1.0)] for a, b in (("a", "b"), ("b", "c"), ("c", "d"))]
    topology = Topology(("a", "b", "c", "d"), *edges, source="x")
    assert measure_spread(topology).most == 7
    assert diameter(topology) == 3


def test_degrees_of_graphs_and_schedules():
    star = named("star:5")
    assert num_teachers(star) == num_students(star) == num_teachers_at_once(star) == Range(1, 1.6, 4)
    schedule = named("one-peer-exponential:16")
    assert (num_teachers_at_once(schedule), num_teachers(schedule)) == (Range(1, 1.0, 1), Range(4, 4.0, 4))
    assert num_teachers_at_once(named("random-matching:1,8", 5)) == Range(0, 0.8, 1)


# --- mixing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "gap"),
    [
        ("full:4", 1.0),
        ("pair", 1.0),
        ("ring:8", 2 / 3 * (1 - math.cos(2 * math.pi / 8))),
        ("ring:40", 2 / 3 * (1 - math.cos(2 * math.pi / 40))),
        ("hypercube:4", 2 / 5),
        ("torus:4x4", 2 / 5),
        ("exponential:16", 2 / 5),  # 2 / (1 + log2 n), Ying et al. 2021, theorem 1
        ("exponential:64", 2 / 7),
        ("star:5", 1 / 5),
        ("one-peer-exponential:16", 1.0),  # exact averaging within a period, theorem 2
    ],
)
def test_spectral_gaps_in_closed_form(spec, gap):
    assert spectral_gap(named(spec)) == pytest.approx(gap, abs=1e-9)


def test_the_gap_of_a_schedule_is_the_mean_per_exchange():
    topology = named("alternating:ring:8,line:8")
    ring, line = (mixing_matrix(topology, index) for index in range(2))
    sizes = sorted(abs(np.linalg.eigvals(line @ ring)))
    assert spectral_gap(topology) == pytest.approx(1 - math.sqrt(sizes[-2]))
    assert spectral_gap(named("alternating:ring:8,full:8")) == 1.0


def test_the_gap_takes_no_more_operations_than_it_may(monkeypatch):
    num_operations = 0

    class Counted(np.ndarray):
        def __matmul__(self, other):
            nonlocal num_operations
            num_operations += 2 * self.shape[0] * self.shape[1] * other.shape[1]
            return (np.asarray(self) @ np.asarray(other)).view(Counted)

        def __rmatmul__(self, other):
            nonlocal num_operations
            num_operations += 2 * other.shape[0] * other.shape[1] * self.shape[1]
            return (np.asarray(other) @ np.asarray(self)).view(Counted)

        __array_priority__ = 1000

    monkeypatch.setattr(statistics, "mixing_matrix", lambda *where: mixing_matrix(*where).view(Counted))
    monkeypatch.setattr(statistics, "MAX_GAP_OPERATIONS", 20 * 2 * 16**3)
    spectral_gap(named("random-matching:3,40", 16))
    assert 0.8 * 20 * 2 * 16**3 < num_operations <= 20 * 2 * 16**3


def test_a_long_schedule_does_not_underflow():
    gap = spectral_gap(named("random-matching", 9))
    assert 0.2 < gap < 0.5


def test_two_sources_never_agree():
    topology = Topology(("a", "b", "c"), [("a", "c", 1.0), ("b", "c", 1.0)], source="x")
    assert spectral_gap(topology) == pytest.approx(0.0, abs=1e-12)


@pytest.mark.parametrize("spec", ["star:5", "exponential:7", "line:4"])
def test_mixing_matrices_average(spec):
    topology = named(spec)
    mixing = mixing_matrix(topology, 0)
    assert (mixing >= 0).all() and mixing.sum(axis=1) == pytest.approx(1.0)
    for row, member in enumerate(topology.members):
        assert {topology.members[c] for c in np.flatnonzero(mixing[row])} == {
            member,
            *topology.teachers_of(member),
        }
    if spec != "exponential:7":
        assert mixing == pytest.approx(mixing.T)


def test_the_quickest_way_may_have_more_hops():
    edges = [("a", "b", 1.0), ("b", "c", 1.0), ("a", "c", 1.0), ("c", "a", 1.0)]
    topology = Topology(("a", "b", "c"), edges, source="x")
    hop_s = {("a", "b"): 1.0, ("b", "c"): 2.0, ("a", "c"): 10.0, ("c", "a"): 4.0}
    assert longest_way_s(topology, lambda t, s: hop_s[t, s]) == 6.0  # b to a, by c


def test_distances_are_found_without_looking_at_what_is_reached_already(monkeypatch):
    looked_at = []
    students_of = Topology.students_of
    monkeypatch.setattr(
        Topology, "students_of", lambda self, member: looked_at.append(member) or students_of(self, member)
    )
    topology = named("full:30")
    looked_at.clear()
    assert set(distances_from(topology, "7").values()) == {0, 1}
    assert looked_at == ["7"]
