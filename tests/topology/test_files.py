"""Graph files: every format, link attributes, what is refused, and the files that users copy."""

import json
from pathlib import Path

import networkx
import pytest

from p2pcodistill.errors import TopologyError
from p2pcodistill.topology.build import build_topology, default_members
from p2pcodistill.topology.files import MAX_TOPOLOGY_FILE_BYTES, read_graph_file
from p2pcodistill.topology.graph import LinkAttributes

ABC = ("a", "b", "c")
FOLDER = Path(__file__).parents[2] / "topologies"
READY = sorted(path for path in FOLDER.iterdir() if path.suffix != ".md")


def write_graph(path, graph):
    writers = {".graphml": networkx.write_graphml, ".gml": networkx.write_gml}
    if path.suffix == ".json":
        path.write_text(json.dumps(networkx.node_link_data(graph, edges="edges")))
    elif path.suffix == ".edgelist":
        networkx.write_edgelist(graph, path)
    else:
        writers[path.suffix](graph, path)


@pytest.mark.parametrize("suffix", [".graphml", ".gml", ".json", ".edgelist"])
def test_directed_weighted_graphs_and_their_links_come_back_from_every_format(tmp_path, suffix):
    graph = networkx.DiGraph()
    graph.add_edge("a", "b", weight=2.5, colour="red")
    graph.add_edge("b", "c", weight=1.0, bandwidth_mbit=20, latency_ms=75.5, loss_ratio=0.01)
    graph.add_edge("c", "b", latency_ms=75)
    write_graph(tmp_path / f"graph{suffix}", graph)
    topology = build_topology(f"graph{suffix}", ABC, base_folder=tmp_path)
    assert [dict(topology.teachers_at(member, 0)) for member in ABC] == [{}, {"a": 2.5, "c": 1.0}, {"b": 1.0}]
    assert topology.neighbours_of("b") == ("a", "c")
    assert topology.links == {
        ("b", "c"): LinkAttributes(bandwidth_mbit=20.0, latency_ms=75.5, loss_ratio=0.01),
        ("c", "b"): LinkAttributes(latency_ms=75.0),
    }
    assert default_members(f"graph{suffix}", base_folder=tmp_path) == ABC


@pytest.mark.parametrize("suffix", [".graphml", ".gml", ".json"])
def test_undirected_files_mean_both_directions(tmp_path, suffix):
    graph = networkx.path_graph(["a", "b", "c"], networkx.Graph)
    graph.edges["a", "b"]["bandwidth_mbit"] = 5
    write_graph(tmp_path / f"graph{suffix}", graph)
    topology = build_topology(f"graph{suffix}", ABC, base_folder=tmp_path)
    assert topology.teachers_at("b", 0) == {"a": 1.0, "c": 1.0}
    assert topology.links == dict.fromkeys([("a", "b"), ("b", "a")], LinkAttributes(bandwidth_mbit=5.0))


@pytest.mark.parametrize(
    ("attributes", "message"),
    [
        ("'weight': 'heavy'", "weight of a -> b is not a number"),
        ("'bandwidth_mbit': 0", "bandwidth_mbit of a -> b must be above 0, not 0.0; leave it out"),
        ("'bandwidth_mbit': 1e999", "bandwidth_mbit of a -> b must be above 0, not inf"),
        ("'bandwidth_mbit': 'fast'", "bandwidth_mbit of a -> b is not a number"),
        ("'latency_ms': -1", "latency_ms of a -> b must be 0 or more, not -1.0"),
        ("'latency_ms': None", "latency_ms of a -> b is not a number"),
        ("'loss_ratio': 1", "loss_ratio of a -> b must be from 0 to below 1, not 1.0"),
    ],
)
def test_attributes_that_make_no_sense_are_named(tmp_path, attributes, message):
    (tmp_path / "g.edgelist").write_text(f"a b {{{attributes}}}\n")
    with pytest.raises(TopologyError, match=f"g.edgelist: the {message}"):
        build_topology("g.edgelist", ("a", "b"), base_folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("g.gml", "graph ["),
        ("g.json", "{"),
        ("g.json", "[]"),
        ("g.graphml", "<"),
        ("g.edgelist", "a b {oops"),
        ("g.edgelist", "a b {'weight'\n: 1}"),
    ],
)
def test_files_that_do_not_parse_are_named_in_one_line(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    with pytest.raises(TopologyError, match=f"{name} does not parse as {name[2:]}") as refusal:
        read_graph_file(tmp_path / name)
    assert "\n" not in str(refusal.value)


def test_files_that_are_no_topology(tmp_path):
    with pytest.raises(TopologyError, match=r"no topology file .*gone\.gml"):
        read_graph_file(tmp_path / "gone.gml")
    (tmp_path / "folder.gml").mkdir()
    with pytest.raises(TopologyError, match=r"cannot read the topology file .*folder\.gml"):
        read_graph_file(tmp_path / "folder.gml")
    with (tmp_path / "huge.json").open("wb") as file:
        file.truncate(MAX_TOPOLOGY_FILE_BYTES + 1)
    with pytest.raises(TopologyError, match=r"huge\.json is larger than 4 MiB"):
        read_graph_file(tmp_path / "huge.json")


@pytest.mark.parametrize("path", READY, ids=lambda path: path.name)
def test_the_files_that_users_copy_are_ready(path):
    members = default_members(str(path))
    topology = build_topology(str(path), members)
    assert topology.members == members and topology.source == str(path)
    assert path.name in (FOLDER / "README.md").read_text()


def test_the_wide_area_files_say_what_their_links_carry():
    with_links = {}
    for path in READY:
        topology = build_topology(str(path), default_members(str(path)))
        if topology.links:
            edges = {(t, s) for s in topology.members for t in topology.teachers_of(s)}
            assert set(topology.links) == edges  # every edge of such a file
            with_links[path.name] = min(link.bandwidth_mbit for link in topology.links.values())
    assert with_links == {
        "star-of-five.graphml": 20,
        "three-continents.json": 10,
        "two-data-centres.json": 50,
    }


def test_the_torus_file_is_a_torus():
    topology = build_topology(
        str(FOLDER / "torus-of-nine.json"), default_members(str(FOLDER / "torus-of-nine.json"))
    )
    assert topology.digest == build_topology("torus:3x3", topology.members).digest
