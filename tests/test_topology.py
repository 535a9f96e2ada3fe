"""Topologies: neighbours, files, digests, and every graph that is refused."""

import json

import networkx
import pytest

from p2pcodistill.errors import TopologyError
from p2pcodistill.topology import Topology, build_topology

FOUR = ("a", "b", "c", "d")


def test_a_pair_teaches_each_other():
    pair = build_topology("pair", ("berlin", "tokyo"))
    assert pair.teachers_of == {"berlin": {"tokyo": 1.0}, "tokyo": {"berlin": 1.0}}
    assert pair.neighbours_of("berlin") == ("tokyo",)


def test_a_ring_follows_the_order_of_members():
    ring = build_topology("ring", FOUR)
    assert ring.neighbours_of("a") == ("b", "d")
    assert ring.students_of("c") == ("b", "d")


def test_a_ring_of_two_is_a_pair_and_of_one_is_alone():
    assert build_topology("ring", ("a", "b")).digest == build_topology("pair", ("a", "b")).digest
    assert build_topology("pair", ("a",)).neighbours_of("a") == ()


def test_full_joins_everyone():
    full = build_topology("full", FOUR)
    assert all(len(full.teachers_of[member]) == 3 for member in FOUR)


def test_the_digest_tells_members_order_edges_and_weights_apart():
    digests = {
        build_topology("ring", FOUR).digest,
        build_topology("ring", ("a", "c", "b", "d")).digest,
        build_topology("full", FOUR).digest,
        Topology(("a", "b"), [("a", "b", 1.0)], source="x").digest,
        Topology(("a", "b"), [("a", "b", 2.0)], source="x").digest,
        Topology(("a", "b"), [("b", "a", 1.0)], source="x").digest,
    }
    assert len(digests) == 6


def write_graph(path, graph):
    writers = {".graphml": networkx.write_graphml, ".gml": networkx.write_gml}
    if path.suffix == ".json":
        path.write_text(json.dumps(networkx.node_link_data(graph, edges="edges")))
    elif path.suffix == ".edgelist":
        networkx.write_edgelist(graph, path)
    else:
        writers[path.suffix](graph, path)


@pytest.mark.parametrize("suffix", [".graphml", ".gml", ".json", ".edgelist"])
def test_directed_weighted_graphs_come_back_from_every_format(tmp_path, suffix):
    graph = networkx.DiGraph()
    graph.add_edge("a", "b", weight=2.5)
    graph.add_edge("b", "c", weight=1.0)
    write_graph(tmp_path / f"graph{suffix}", graph)
    topology = build_topology(f"graph{suffix}", ("a", "b", "c"), base_folder=tmp_path)
    assert topology.teachers_of == {"a": {}, "b": {"a": 2.5}, "c": {"b": 1.0}}
    assert topology.neighbours_of("b") == ("a", "c")


@pytest.mark.parametrize("suffix", [".graphml", ".gml", ".json"])
def test_undirected_files_mean_both_directions(tmp_path, suffix):
    write_graph(tmp_path / f"graph{suffix}", networkx.path_graph(["a", "b", "c"], networkx.Graph))
    topology = build_topology(f"graph{suffix}", ("a", "b", "c"), base_folder=tmp_path)
    assert topology.teachers_of["b"] == {"a": 1.0, "c": 1.0}


@pytest.mark.parametrize(
    ("edges", "message"),
    [
        ([("a", "a", 1.0)], "self-loop"),
        ([("a", "b", 1.0)], "c cannot be reached from a"),
        ([("a", "z", 1.0)], "'z' is not a member"),
        ([("a", "b", 0.0)], "must be above 0"),
        ([("a", "b", float("nan"))], "must be above 0"),
    ],
)
def test_graphs_that_are_refused(edges, message):
    with pytest.raises(TopologyError, match=message):
        Topology(("a", "b", "c"), edges, source="graph")


@pytest.mark.parametrize(
    ("spec", "members", "message"),
    [
        ("pair", FOUR, "joins two members, this run has 4"),
        ("rign", FOUR, "unknown topology 'rign'"),
        ("missing.gml", FOUR, "no topology file"),
        ("ring", ("a", "b", "a"), "listed twice"),
    ],
)
def test_names_that_are_refused(tmp_path, spec, members, message):
    with pytest.raises(TopologyError, match=message):
        build_topology(spec, members, base_folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "text"), [("g.gml", "graph ["), ("g.json", "{"), ("g.graphml", "<"), ("g.edgelist", "a b {oops")]
)
def test_files_that_do_not_parse_are_named(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(TopologyError, match=rf"{name}"):
        build_topology(name, ("a", "b"), base_folder=tmp_path)


def test_a_weight_that_is_no_number_is_named(tmp_path):
    (tmp_path / "g.edgelist").write_text("a b {'weight': 'heavy'}\n")
    with pytest.raises(TopologyError, match="weight of a -> b is not a number"):
        build_topology("g.edgelist", ("a", "b"), base_folder=tmp_path)
