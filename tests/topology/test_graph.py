"""The graph itself: who neighbours whom, schedules, digests, and every graph that is refused."""

import pytest

from p2pcodistill.errors import TopologyError
from p2pcodistill.topology.graph import LinkAttributes, Topology

ABC = ("a", "b", "c")
CYCLE = [("a", "b", 1.0), ("b", "c", 2.0), ("c", "a", 1.0)]
BACK = [("b", "a", 1.0), ("c", "b", 1.0), ("a", "c", 1.0)]


def test_a_graph_that_stays():
    graph = Topology(ABC, CYCLE, source="x")
    assert graph.period == 1
    assert graph.teachers_at("c", 0) == graph.teachers_at("c", 17) == {"b": 2.0}
    assert graph.schedule_of("c") == ({"b": 2.0},)
    assert (graph.teachers_of("a"), graph.students_of("a")) == (("c",), ("b",))
    assert graph.neighbours_of("a") == ("b", "c")


def test_tables_are_in_member_order_whatever_the_order_of_edges():
    edges = [("c", "b", 1.0), ("a", "b", 3.0)]
    assert list(Topology(ABC, edges, source="x").teachers_at("b", 0)) == ["a", "c"]
    assert list(Topology(("c", "a", "b"), edges, source="x").teachers_at("b", 0)) == ["c", "a"]


def test_a_schedule_takes_its_graphs_in_turn():
    schedule = Topology(ABC, CYCLE, BACK, source="x")
    assert schedule.period == 2
    assert [dict(schedule.teachers_at("a", index)) for index in range(4)] == [{"c": 1.0}, {"b": 1.0}] * 2
    assert schedule.schedule_of("b") == ({"a": 1.0}, {"c": 1.0})
    assert schedule.teachers_of("a") == schedule.students_of("a") == schedule.neighbours_of("a") == ("b", "c")


def test_who_teaches_at_any_time_is_a_neighbour_and_only_the_whole_must_be_connected():
    schedule = Topology(ABC, [("a", "b", 1.0)], [("b", "c", 1.0)], source="x")
    assert schedule.neighbours_of("b") == ("a", "c")
    assert schedule.schedule_of("a") == ({}, {})
    assert schedule.schedule_of("c") == ({}, {"b": 1.0})


def test_a_schedule_that_repeats_itself_is_the_short_one():
    short = Topology(ABC, CYCLE, BACK, source="x")
    long = Topology(ABC, CYCLE, BACK, CYCLE, BACK, source="y")
    assert (long.period, long.digest) == (2, short.digest)
    assert Topology(ABC, CYCLE, CYCLE, source="x").digest == Topology(ABC, CYCLE, source="x").digest
    assert Topology(ABC, CYCLE, BACK, CYCLE, source="x").period == 3


def test_the_digest_tells_members_edges_weights_and_schedules_apart():
    different = [
        Topology(ABC, CYCLE, source="x"),
        Topology(("a", "c", "b"), CYCLE, source="x"),
        Topology(ABC, BACK, source="x"),
        Topology(ABC, [*CYCLE[:2], ("c", "a", 2.0)], source="x"),
        Topology(ABC, CYCLE, BACK, source="x"),
        Topology(ABC, BACK, CYCLE, source="x"),
        Topology(ABC, CYCLE, BACK, BACK, source="x"),
    ]
    assert len({topology.digest for topology in different}) == len(different)


def test_the_digest_is_of_what_is_meant_not_of_how_it_was_written():
    links = {("a", "b"): LinkAttributes(bandwidth_mbit=20)}
    again = Topology(list(ABC), reversed(CYCLE), source="a file", links=links)
    assert again.digest == Topology(ABC, CYCLE, source="x").digest
    assert again.links == links


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([("a", "a", 1.0)], "graph: 'a' teaches itself; remove the self-loop"),
        ([("a", "b", 1.0)], "graph: c cannot be reached from a"),
        ([("a", "z", 1.0)], "graph: 'z' is not a member of the run; members are a, b, c"),
        ([("a", "b", 0.0)], "a -> b must be above 0, not 0.0"),
        ([("a", "b", float("nan"))], "must be above 0"),
        ([("a", "b", float("inf"))], "must be above 0"),
        ([("a", "b", 1.0), ("a", "b", 2.0)], "a -> b is there twice, with two weights"),
    ],
)
def test_graphs_that_are_refused(edges, message):
    with pytest.raises(TopologyError, match=message):
        Topology(ABC, edges, source="graph")
    with pytest.raises(TopologyError, match=message):
        Topology(ABC, edges, edges, source="graph")


def test_a_long_list_of_members_does_not_fill_the_message():
    members = [f"site-{index}" for index in range(500)]
    with pytest.raises(TopologyError) as refusal:
        Topology(members, [("site-0", "nobody", 1.0)], source="graph")
    assert len(str(refusal.value)) < 300 and "and 488 more" in str(refusal.value)


def test_a_member_that_is_listed_twice():
    with pytest.raises(TopologyError, match="'a' is listed twice"):
        Topology(("a", "b", "a"), CYCLE, source="x")
