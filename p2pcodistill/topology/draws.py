"""Random graphs and matchings that are the same on every machine, Python and release.

All nodes of a run derive their graph by themselves, from its name. Python's `random` and networkx may draw otherwise in a
later release, and sites are not upgraded together; so the draws come from SHA-256 and the procedures are kept here. What
they yield must never change: the tests pin it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

from p2pcodistill.errors import TopologyError

Pair = tuple[int, int]
"""The ranks of two members; for an undirected edge the lower one first."""

MAX_ATTEMPTS = 1000
_WORD_BYTES = 8
_Item = TypeVar("_Item")


class Draws:
    """A stream of random numbers that `label` determines."""

    def __init__(self, label: str) -> None:
        self._words = _words(label)

    def below(self, limit: int) -> int:
        """Uniform from 0 to `limit` - 1."""
        largest = (1 << 8 * _WORD_BYTES) // limit * limit  # beyond it, small numbers would be likelier
        while (word := next(self._words)) >= largest:
            pass
        return word % limit

    def ratio(self) -> float:
        """Uniform from 0 to below 1."""
        return (next(self._words) >> 11) / (1 << 53)

    def shuffled(self, items: Sequence[_Item]) -> list[_Item]:
        """`items` in random order (Fisher and Yates)."""
        result = list(items)
        for last in range(len(result) - 1, 0, -1):
            other = self.below(last + 1)
            result[last], result[other] = result[other], result[last]
        return result


def _words(label: str) -> Iterator[int]:
    block_index = 0
    while True:
        block = hashlib.sha256(f"p2pcodistill-draws/{label}/{block_index}".encode()).digest()
        for start in range(0, len(block), _WORD_BYTES):
            yield int.from_bytes(block[start : start + _WORD_BYTES], "big")
        block_index += 1


def random_regular(num_sites: int, degree: int, seed: int) -> list[Pair]:
    """The edges of a connected random graph in which every site has `degree` neighbours.

    Stubs are paired at random and pairs that do not fit drawn again (Steger and Wormald 1999). `num_sites * degree` is even,
    `degree` below `num_sites`. Raises TopologyError when none is connected, as with one neighbour each.
    """
    for attempt in range(MAX_ATTEMPTS):
        draws = Draws(f"random-regular/{num_sites}/{degree}/{seed}/{attempt}")
        num_missing = num_sites - 1 - degree
        if num_missing < degree:  # few edges are quick to place: those that are not there
            absent = _paired(num_sites, num_missing, draws)
            everyone = [(a, b) for a in range(num_sites) for b in range(a + 1, num_sites)]
            pairs = None if absent is None else [pair for pair in everyone if pair not in absent]
        else:
            placed = _paired(num_sites, degree, draws)
            pairs = None if placed is None else sorted(placed)
        if pairs is not None and _is_connected(num_sites, pairs):
            return pairs
    raise TopologyError(
        f"found no connected graph of {num_sites} sites with degree {degree}: raise the degree"
    )


def _paired(num_sites: int, degree: int, draws: Draws) -> set[Pair] | None:
    """Edges that give every site `degree` neighbours; None from a dead end."""
    pairs: set[Pair] = set()
    stubs = [site for site in range(num_sites) for _ in range(degree)]
    while stubs:
        stubs = draws.shuffled(stubs)
        left = []
        for a, b in zip(stubs[::2], stubs[1::2], strict=True):
            pair = (min(a, b), max(a, b))
            if a == b or pair in pairs:
                left += [a, b]
            else:
                pairs.add(pair)
        sites = sorted(set(left))
        if left and all((a, b) in pairs for a in sites for b in sites if a < b):
            return None
        stubs = left
    return pairs


def small_world(num_sites: int, num_neighbours: int, rewiring_ratio: float, seed: int) -> list[Pair]:
    """The edges of a connected small world (Watts and Strogatz 1998).

    A ring in which each site is joined to its `num_neighbours` nearest ones (an even number); of each edge, one end moves to
    a random site with probability `rewiring_ratio`. Raises TopologyError when none is connected.
    """
    for attempt in range(MAX_ATTEMPTS):
        draws = Draws(f"small-world/{num_sites}/{num_neighbours}/{rewiring_ratio!r}/{seed}/{attempt}")
        joined: list[set[int]] = [set() for _ in range(num_sites)]
        ring = [
            (a, (a + hop) % num_sites) for hop in range(1, num_neighbours // 2 + 1) for a in range(num_sites)
        ]
        for a, b in ring:
            joined[a].add(b)
            joined[b].add(a)
        for a, b in ring:
            if draws.ratio() >= rewiring_ratio or len(joined[a]) >= num_sites - 1:
                continue
            while (other := draws.below(num_sites)) == a or other in joined[a]:
                pass
            joined[a].remove(b)
            joined[b].remove(a)
            joined[a].add(other)
            joined[other].add(a)
        pairs = [(a, b) for a in range(num_sites) for b in sorted(joined[a]) if a < b]
        if _is_connected(num_sites, pairs):
            return pairs
    raise TopologyError(
        f"found no connected small world of {num_sites} sites with {num_neighbours} neighbours: give more neighbours"
    )


def random_matchings(num_sites: int, num_matchings: int, seed: int) -> list[list[Pair]]:
    """`num_matchings` times, the sites in pairs at random; of an odd number, one rests each time."""
    matchings = []
    for index in range(num_matchings):
        # One hash and one sort each, for schedules of a thousand sites; equal keys (one in 2^64) leave the sites' order.
        label = f"p2pcodistill-draws/random-matching/{num_sites}/{seed}/{index}"
        raw = hashlib.shake_256(label.encode()).digest(_WORD_BYTES * num_sites)
        order = sorted(range(num_sites), key=lambda site: raw[_WORD_BYTES * site : _WORD_BYTES * (site + 1)])
        matchings.append([(min(a, b), max(a, b)) for a, b in zip(order[::2], order[1::2], strict=False)])
    return matchings


def _is_connected(num_sites: int, pairs: Sequence[Pair]) -> bool:
    joined: list[list[int]] = [[] for _ in range(num_sites)]
    for a, b in pairs:
        joined[a].append(b)
        joined[b].append(a)
    reached, frontier = {0}, [0]
    while frontier:
        new = [other for other in joined[frontier.pop()] if other not in reached]
        reached.update(new)
        frontier += new
    return len(reached) == num_sites
