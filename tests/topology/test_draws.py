"""Random graphs: what they promise, checked with networkx, and that they never change."""

import networkx
import pytest

from p2pcodistill.errors import TopologyError
from p2pcodistill.topology.draws import Draws, random_matchings, random_regular, small_world


def test_what_is_drawn_never_changes():
    """All nodes of a run derive the same graph, also those with another release: these values are part of the protocol."""
    draws = Draws("test")
    assert [draws.below(1000) for _ in range(8)] == [466, 787, 339, 249, 933, 250, 7, 20]
    assert Draws("test").shuffled(range(8)) == [0, 7, 6, 1, 4, 3, 5, 2]
    assert random_regular(8, 3, 1) == [
        (0, 2), (0, 3), (0, 7), (1, 3), (1, 5), (1, 6), (2, 4), (2, 5), (3, 7), (4, 5), (4, 6), (6, 7)
    ]  # fmt: skip
    assert random_regular(6, 4, 2) == [
        (0, 1), (0, 2), (0, 3), (0, 4), (1, 2), (1, 3), (1, 5), (2, 4), (2, 5), (3, 4), (3, 5), (4, 5)
    ]  # fmt: skip
    assert small_world(8, 4, 0.5, 1) == [
        (0, 1), (0, 3), (0, 7), (1, 2), (1, 3), (1, 5), (1, 6), (1, 7),
        (2, 6), (3, 4), (3, 5), (3, 6), (4, 5), (4, 6), (5, 6), (6, 7),
    ]  # fmt: skip
    assert random_matchings(7, 3, 1) == [
        [(1, 2), (0, 4), (3, 6)],
        [(0, 4), (1, 2), (5, 6)],
        [(5, 6), (0, 4), (1, 3)],
    ]


def test_draws_are_even():
    draws = Draws("even")
    counts = [0] * 6
    for _ in range(6000):
        counts[draws.below(6)] += 1
    assert min(counts) > 900 and max(counts) < 1100
    ratios = [draws.ratio() for _ in range(4000)]
    assert min(ratios) >= 0 and max(ratios) < 1 and 0.48 < sum(ratios) / 4000 < 0.52
    assert sorted(draws.shuffled(range(50))) == list(range(50))


@pytest.mark.parametrize(
    ("num_sites", "degree"), [(2, 1), (4, 2), (16, 3), (16, 12), (7, 6), (40, 2), (9, 4), (300, 5)]
)
def test_every_site_of_a_random_regular_graph_has_the_degree(num_sites, degree):
    pairs = random_regular(num_sites, degree, seed=1)
    graph = networkx.Graph(pairs)
    assert len(pairs) == num_sites * degree // 2
    assert networkx.is_connected(graph) and set(dict(graph.degree).values()) == {degree}
    assert len(graph) == num_sites


@pytest.mark.parametrize("rewiring_ratio", [0.0, 0.1, 1.0])
def test_a_small_world_keeps_its_edges_and_its_unity(rewiring_ratio):
    pairs = small_world(20, 4, rewiring_ratio, seed=1)
    graph = networkx.Graph(pairs)
    assert len(pairs) == graph.number_of_edges() == 40 and networkx.is_connected(graph)
    ring = {tuple(sorted((a, (a + hop) % 20))) for a in range(20) for hop in (1, 2)}
    num_kept = len(ring & set(pairs))
    assert {0.0: num_kept == 40, 0.1: 30 <= num_kept < 40, 1.0: num_kept < 20}[rewiring_ratio]


def test_a_small_world_of_few_sites_that_are_all_joined_already():
    assert len(small_world(5, 4, 1.0, seed=1)) == 10


def test_seeds_give_other_graphs():
    assert len({tuple(random_regular(16, 3, seed)) for seed in range(5)}) == 5
    assert len({tuple(small_world(16, 4, 0.3, seed)) for seed in range(5)}) == 5
    assert random_matchings(16, 4, 1) != random_matchings(16, 4, 2)


def test_a_graph_that_is_never_connected_is_told():
    with pytest.raises(TopologyError, match="no connected graph of 8 sites with degree 1: raise the degree"):
        random_regular(8, 1, seed=0)


@pytest.mark.parametrize("num_sites", [2, 9, 16])
def test_matchings_pair_all_sites_but_one_of_an_odd_number(num_sites):
    matchings = random_matchings(num_sites, 50, seed=3)
    for matching in matchings:
        ends = [site for pair in matching for site in pair]
        assert len(matching) == num_sites // 2 and len(set(ends)) == len(ends)
        assert all(a < b for a, b in matching)
    resting = [set(range(num_sites)) - {site for pair in m for site in pair} for m in matchings]
    assert len(set(map(frozenset, resting))) == (num_sites if num_sites % 2 else 1)  # nobody rests for ever
