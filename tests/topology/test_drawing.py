"""Pictures: they are written, sized for what they show, and every site and label of a link is in them, apart from others."""

import itertools
import math
from pathlib import Path

import matplotlib.image
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch

from p2pcodistill.topology.build import build_topology, default_members
from p2pcodistill.topology.drawing import SITE_COLOUR, draw_topology, save_picture
from p2pcodistill.topology.graph import LinkAttributes, Topology
from p2pcodistill.topology.layout import Layout

FOLDER = Path(__file__).parents[2] / "topologies"
READY = ["ring:8", "torus:4x4", "exponential:16", "hypercube:4", "tree:2,3", "star:5", "line:4", "full:12"]
FILES = [str(path) for path in sorted(FOLDER.iterdir()) if path.suffix != ".md"]


def named(spec):
    return build_topology(spec, default_members(spec))


def drawn(topology, **keywords):
    figure = Figure(figsize=(6.4, 6.4))
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw_topology(axes, topology, **keywords)
    figure.draw_without_rendering()
    return axes


@pytest.mark.parametrize(
    ("spec", "width", "height"),
    [("ring:8", 832, 897), ("one-peer-exponential:16", 1092, 1157), ("alternating:ring:4,full:4", 1092, 611)],
)
def test_a_png_has_a_sensible_size_and_something_on_it(tmp_path, spec, width, height):
    save_picture(named(spec), tmp_path / "out.png", title=spec)
    image = matplotlib.image.imread(tmp_path / "out.png")
    assert image.shape[:2] == (height, width)
    assert 0.02 < (image[..., :3].min(axis=2) < 0.9).mean() < 0.5


@pytest.mark.parametrize("suffix", [".svg", ".pdf"])
def test_other_formats(tmp_path, suffix):
    path = tmp_path / f"out{suffix}"
    save_picture(named("pair"), path, title="a pair of $ites")
    assert path.stat().st_size > 1000
    if suffix == ".svg":
        assert "a pair of $ites, 2 sites" in path.read_text() and "both teach each other" in path.read_text()


def test_a_schedule_is_drawn_exchange_by_exchange(tmp_path):
    save_picture(named("one-peer-exponential:33"), tmp_path / "out.svg", title="x")
    text = (tmp_path / "out.svg").read_text()
    assert all(f">exchange {index}<" in text for index in range(6)) and "repeats after 6 exchanges" in text


@pytest.mark.parametrize("spec", READY + FILES)
def test_every_site_has_a_place_of_its_own_and_a_legible_name(spec):
    topology = named(spec)
    axes = drawn(topology)
    names = [text for text in axes.texts if text.get_text() in topology.members]
    assert sorted(text.get_text() for text in names) == sorted(topology.members)
    boxes = [text.get_window_extent() for text in names]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
    assert all(text.get_fontsize() >= 7 for text in names)
    places = list(Layout(topology).places.values())
    assert min(math.dist(a, b) for a, b in itertools.combinations(places, 2)) > 0.1


@pytest.mark.parametrize("spec", [spec for spec in FILES if "edgelist" not in spec and "torus" not in spec])
def test_labels_of_links_do_not_cover_each_other(spec):
    topology = named(spec)
    texts = drawn(topology).texts
    labels = [text for text in texts if "bit/s" in text.get_text()]
    assert len(labels) == sum(len(topology.neighbours_of(member)) for member in topology.members) // 2
    boxes = [text.get_window_extent() for text in texts]
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_arrows_are_for_edges_that_go_one_way():
    edges = [("a", "b", 1.0), ("b", "c", 1.0), ("c", "b", 1.0)]
    axes = drawn(Topology(("a", "b", "c"), edges, source="x"))
    styles = [
        type(patch.get_arrowstyle()).__name__ for patch in axes.patches if isinstance(patch, FancyArrowPatch)
    ]
    assert sorted(styles) == ["Curve", "CurveFilledB"]


def test_what_differs_by_direction_is_told_by_direction():
    edges = [("a", "b", 1.0), ("b", "a", 0.5)]
    links = {("a", "b"): LinkAttributes(1000, 5), ("b", "a"): LinkAttributes(2.5, 5, 0.01)}
    axes = drawn(Topology(("a", "b"), edges, source="x", links=links))
    label = next(text.get_text() for text in axes.texts if "bit/s" in text.get_text())
    assert label.splitlines() == [
        "to b 1 Gbit/s",
        "to a 2.5 Mbit/s",
        "5 ms",
        "to a 1 % lost",
        "to a weight 0.5",
    ]


def test_an_exchange_shows_its_edges_only_and_the_whole_all_of_them():
    schedule = named("one-peer-exponential:16")
    assert len(drawn(schedule, exchange_index=0).patches) == 16
    assert len(drawn(schedule, exchange_index=3).patches) == 8  # pairs that teach each other
    assert len(drawn(schedule).patches) == 56


def test_sites_can_have_colours():
    discs = drawn(named("ring:4"), colours={"2": "#ff0000"}).collections[0].get_facecolors()
    assert [tuple(round(255 * part) for part in disc[:3]) for disc in discs] == [
        (255, 0, 0) if index == 2 else tuple(bytes.fromhex(SITE_COLOUR[1:])) for index in range(4)
    ]


def test_many_sites_are_drawn_without_names(tmp_path):
    axes = drawn(named("random-regular:200,3"))
    assert len(axes.texts) == 0
    assert len(axes.patches) == 300


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (str(FOLDER / "star-of-five.graphml"), "star"),
        ("star:5", "star"),
        ("full:4", "circle"),
        ("hypercube:6", "circle"),
    ],
)
def test_the_layout_follows_the_kind_of_graph(spec, kind):
    assert Layout(named(spec)).kind == kind
