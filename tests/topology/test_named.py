"""Names and lists of names: each graph is what it is called, each index of a schedule too, and what does not fit is told."""

import subprocess
import sys

import networkx
import pytest

from p2pcodistill.errors import TopologyError
from p2pcodistill.topology.build import build_topology, default_members, files_of, map_files
from p2pcodistill.topology.named import NUM_MATCHINGS

FOUR = ("a", "b", "c", "d")


def numbered(count):
    return tuple(map(str, range(count)))


def directed(topology):
    graph = networkx.DiGraph()
    graph.add_nodes_from(topology.members)
    graph.add_edges_from((t, s) for s in topology.members for t in topology.teachers_at(s, 0))
    return graph


# Specs and what networkx calls the same graph.
SAME_IN_NETWORKX = {
    "pair": networkx.path_graph(2),
    "ring:8": networkx.cycle_graph(8),
    "full:4": networkx.complete_graph(4),
    "star:5": networkx.star_graph(4),
    "line:4": networkx.path_graph(4),
    "torus:4x4": networkx.grid_2d_graph(4, 4, periodic=True),
    "torus:3x5": networkx.grid_2d_graph(3, 5, periodic=True),
    "torus:2x3": networkx.circular_ladder_graph(3),
    "hypercube:1": networkx.path_graph(2),
    "hypercube:4": networkx.hypercube_graph(4),
    "tree:2,3": networkx.balanced_tree(2, 3),
    "tree:1,3": networkx.path_graph(4),
}


@pytest.mark.parametrize("spec", SAME_IN_NETWORKX)
def test_graphs_are_what_they_are_called(spec):
    topology = build_topology(spec, default_members(spec))
    graph = directed(topology)
    assert topology.period == 1 and graph.to_undirected().number_of_edges() * 2 == graph.number_of_edges()
    assert networkx.is_isomorphic(graph.to_undirected(), SAME_IN_NETWORKX[spec])
    assert all(weight == 1.0 for m in topology.members for weight in topology.teachers_at(m, 0).values())


def test_sites_are_placed_in_member_order():
    ring = build_topology("ring", FOUR)
    assert (ring.neighbours_of("a"), ring.students_of("c")) == (("b", "d"), ("b", "d"))
    assert build_topology("star", FOUR).neighbours_of("a") == ("b", "c", "d")
    assert build_topology("line", FOUR).neighbours_of("a") == ("b",)
    assert build_topology("torus:3x3", numbered(9)).neighbours_of("0") == ("1", "2", "3", "6")
    assert build_topology("hypercube", numbered(16)).neighbours_of("5") == ("1", "4", "7", "13")
    assert build_topology("tree:2,2", numbered(7)).neighbours_of("1") == ("0", "3", "4")


@pytest.mark.parametrize("count", [2, 3, 5, 15, 16, 17, 100])
def test_the_exponential_graph_goes_one_way_in_powers_of_two(count):
    topology = build_topology("exponential", numbered(count))
    hops = [hop for hop in (1, 2, 4, 8, 16, 32, 64) if hop < count]
    for site in range(count):
        assert set(topology.students_of(str(site))) == {str((site + hop) % count) for hop in hops}
        assert len(topology.teachers_of(str(site))) == len({hop % count for hop in hops})


def test_a_ring_of_two_is_a_pair_and_a_site_alone_needs_no_graph():
    assert build_topology("ring", ("a", "b")).digest == build_topology("pair", ("a", "b")).digest
    for spec in ("pair", "ring:8", "one-peer-exponential", "torus:4x4"):
        assert build_topology(spec, ("a",)).neighbours_of("a") == ()


@pytest.mark.parametrize("spec", ["random-regular:16,3", "small-world:16,4,0.3", "random-matching:7"])
def test_random_ones_are_the_same_wherever_they_are_built(spec):
    members = numbered(16)
    here = build_topology(spec, members)
    code = f"""
from p2pcodistill.topology.build import build_topology
print(build_topology({spec!r}, {members!r}).digest.hex())
"""
    there = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONHASHSEED": "5"}, check=True
    )
    assert there.stdout.strip() == here.digest.hex()


def test_the_seed_is_the_last_number():
    digests = {
        build_topology(spec, numbered(16)).digest
        for spec in ("random-regular:16,3", "random-regular:16,3,2", "random-regular:16,3,3")
    }
    assert len(digests) == 3
    assert build_topology("random-regular:16,3,1", numbered(16)).digest in digests


# --- schedules ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "period"), [(2, 1), (5, 3), (8, 3), (16, 4), (17, 5)])
def test_one_peer_exponential_has_one_teacher_at_a_time(count, period):
    schedule = build_topology("one-peer-exponential", numbered(count))
    assert schedule.period == period
    for index in range(2 * period):
        for site in range(count):
            assert schedule.teachers_at(str(site), index) == {
                str((site - 2 ** (index % period)) % count): 1.0
            }
    always = build_topology("exponential", numbered(count))
    assert [schedule.teachers_of(m) for m in numbered(count)] == [
        always.teachers_of(m) for m in numbered(count)
    ]


@pytest.mark.parametrize("count", [8, 9])
def test_random_matching_pairs_sites_that_teach_each_other(count):
    members = numbered(count)
    schedule = build_topology("random-matching:7", members)
    assert schedule.period == NUM_MATCHINGS
    for index in range(0, NUM_MATCHINGS, 50):
        tables = {member: schedule.teachers_at(member, index) for member in members}
        assert sum(not table for table in tables.values()) == count % 2
        assert all(tables[t] == {s: 1.0} for s, table in tables.items() for t in table)
    assert all(schedule.neighbours_of(m) == tuple(x for x in members if x != m) for m in members)


def test_random_matching_can_repeat_few_matchings_so_that_there_are_few_neighbours():
    schedule = build_topology("random-matching:1,4", numbered(16))
    assert schedule.period == 4
    assert max(len(schedule.neighbours_of(member)) for member in schedule.members) <= 4
    assert build_topology("random-matching", ("a", "b")).period == 1


def test_alternating_takes_its_graphs_in_turn():
    schedule = build_topology("alternating:ring,random-regular:16,3,exponential:16", numbered(16))
    parts = [build_topology(spec, numbered(16)) for spec in ("ring", "random-regular:16,3", "exponential")]
    assert schedule.period == 3
    for index in range(6):
        for member in schedule.members:
            assert schedule.teachers_at(member, index) == parts[index % 3].teachers_at(member, 0)
    assert default_members("alternating:ring,random-regular:16,3") == numbered(16)
    assert default_members("alternating:ring,full") is None


def test_files_are_taken_in_turn(tmp_path):
    (tmp_path / "day.edgelist").write_text("a b {'bandwidth_mbit': 5}\nb a\n")
    (tmp_path / "night.edgelist").write_text("b a {'latency_ms': 9}\nb c\nc b\n")
    schedule = build_topology("files:day.edgelist,night.edgelist", ("a", "b", "c"), base_folder=tmp_path)
    assert schedule.schedule_of("b") == ({"a": 1.0}, {"c": 1.0})
    assert {ends: (link.bandwidth_mbit, link.latency_ms) for ends, link in schedule.links.items()} == {
        ("a", "b"): (5, 0),
        ("b", "a"): (None, 9),
    }
    assert default_members("files:day.edgelist,night.edgelist", base_folder=tmp_path) == ("a", "b", "c")
    mixed = build_topology("alternating:day.edgelist,full", ("a", "b"), base_folder=tmp_path)
    assert mixed.period == 1  # both are the same two edges
    (tmp_path / "night.edgelist").write_text("a b {'bandwidth_mbit': 6}\n")
    with pytest.raises(TopologyError, match=r"night\.edgelist: the link a -> b has other attributes"):
        build_topology("files:day.edgelist,night.edgelist", ("a", "b"), base_folder=tmp_path)


def test_the_files_of_a_spec_can_be_moved():
    assert map_files("ours.json", lambda path: f"/x/{path}") == "/x/ours.json"
    assert map_files("files:a.gml,b.json", lambda path: f"/x/{path}") == "files:/x/a.gml,/x/b.json"
    spec = "alternating:small-world:20,4,0.1,3,b.json"
    assert files_of(spec) == ("b.json",)
    assert map_files(spec, lambda path: f"../{path}") == "alternating:small-world:20,4,0.1,3,../b.json"
    for spec in ("ring", "torus:4x4", "alternating:ring,full", "nonsense", ""):
        assert (files_of(spec), map_files(spec, str.upper)) == ((), spec)


# --- what does not fit -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("spec", "count", "message"),
    [
        ("rign", 4, r"unknown topology 'rign' \(did you mean 'ring'\?\): use one of pair, ring, .*alternating.*\.gml"),
        ("", 4, "unknown topology ''"),
        ("pair", 4, "joins two members, this run has 4: use 'ring' or 'full'"),
        ("pair:2", 2, "'pair:2' does not parse: write pair, without a number"),
        ("ring:8", 4, "is for 8 sites, this run has 4: write numbers that give 4, or 'ring' alone"),
        ("torus:4x4", 4, "is for 16 sites, this run has 4: write numbers that give 4$"),
        ("torus", 4, "does not parse: write torus:ROWSxCOLUMNS, like torus:4x4"),
        ("torus:1x4", 4, "at least two rows and two columns: for one row, use 'ring'"),
        ("ring:x", 4, "does not parse: write ring or ring:SITES, like ring:8"),
        ("ring:", 4, "does not parse"),
        ("ring:4.0", 4, "does not parse"),
        ("ring:-4", 4, "does not parse"),
        ("ring:4,4", 4, "does not parse"),
        ("ring:1", 4, "a run has 2 to 10,000 sites, these numbers make 1: write others"),
        ("hypercube:99", 4, "these numbers make more than 10,000"),
        ("tree:9,99999999", 4, "these numbers make more than 10,000"),
        ("tree:0,3", 4, "these numbers make 1:"),
        ("hypercube", 6, "2, 4, 8, ... sites, this run has 6: use 'exponential'"),
        ("random-regular:5,3", 5, "one of both numbers must be even"),
        ("random-regular:6,6", 6, "a degree from 2 to 5, not 6"),
        ("random-regular:6,1", 6, "a degree from 2 to 5, not 1"),
        ("random-regular:6", 6, "write random-regular:SITES,DEGREE.*, like random-regular:16,3"),
        ("small-world:20,3,0.1", 20, "an even number of neighbours, 2 or more and below 20, not 3"),
        ("small-world:4,4,0.1", 4, "below 4, not 4"),
        ("small-world:20,4,1.5", 20, "a share from 0 to 1 of the edges, not 1.5"),
        ("full:2000", 2000, "3,998,000 edges, more than 2,000,000: use a sparser graph"),
        ("random-matching:1,2000", 4, "repeats 1 to 1024 matchings, not 2000"),
        ("random-matching:1,1", 4, "cannot be reached from 0: a run's graph must be connected"),
        ("alternating:ring", 4, "lists fewer than two graphs: write it like alternating:ring,full"),
        ("alternating:", 4, "lists fewer than two graphs"),
        ("alternating", 4, "unknown topology 'alternating'"),
        ("alternating:ring,one-peer-exponential", 4, "is a schedule itself: list graphs that stay"),
        ("alternating:ring:4,ring:8", 4, "'ring:8' is for 8 sites"),
        ("files:a,b", 4, r"'a' does not end in \.edgelist"),
        ("files:a.gml,b.gml", 4, "no topology file a.gml"),
    ],
)  # fmt: skip
def test_what_does_not_fit_says_what_to_do_in_one_line(tmp_path, monkeypatch, spec, count, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(TopologyError, match=message) as refusal:
        build_topology(spec, numbered(count))
    assert "\n" not in str(refusal.value)


def test_a_node_with_a_plain_topology_starts_without_networkx():
    specs = [
        "pair",
        "ring:2",
        "full",
        "star",
        "line",
        "exponential",
        "one-peer-exponential",
        "random-matching",
    ]
    code = f"""
import sys
from p2pcodistill.topology.build import build_topology
for spec in {specs}:
    build_topology(spec, ("a", "b"))
print("networkx" in sys.modules, "numpy" in sys.modules)
build_topology("torus:2x2", ("a", "b", "c", "d"))
print("networkx" in sys.modules)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["False", "False", "True"]
