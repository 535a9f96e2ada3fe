"""Figures of a topology: degrees, diameter, spectral gap, how fast knowledge spreads.

Knowledge is taken to move one edge per exchange: what a teacher knows at one exchange, its students know at the next. That
is how far it can have come, not how much of it distillation lets through.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from p2pcodistill.topology.graph import Topology

Matrix = NDArray[np.float64]

MAX_STARTS = 64
"""In a longer schedule, spreading is counted from this many of its exchanges only."""
MAX_GAP_SITES = 2000
MAX_GAP_OPERATIONS = 2e11
_VANISHED = 1e-12


@dataclass(frozen=True, slots=True)
class Range:
    """The least, mean and largest of a figure over the sites."""

    least: int
    mean: float
    most: int


@dataclass(frozen=True, slots=True)
class Spread:
    """How many exchanges knowledge takes from each site to each other."""

    most: int
    """Until nothing reaches anyone new any more, whichever site it comes from and wherever in the schedule it starts."""
    mean: float
    """Over the pairs of sites of which the one is reached, and over starts."""
    cut_off: tuple[str, str] | None
    """A site, and one that its knowledge never reaches; None if everyone's reaches everyone."""


def num_teachers_at_once(topology: Topology) -> Range:
    """The number of teachers of a site in an exchange; of a schedule, `mean` is over its exchanges too."""
    return _range([len(table) for member in topology.members for table in topology.schedule_of(member)])


def num_teachers(topology: Topology) -> Range:
    """The number of teachers of a site, of a schedule over all its exchanges together."""
    return _range([len(topology.teachers_of(member)) for member in topology.members])


def num_students(topology: Topology) -> Range:
    """The number of students of a site, of a schedule over all its exchanges together."""
    return _range([len(topology.students_of(member)) for member in topology.members])


def _range(counts: list[int]) -> Range:
    return Range(min(counts), sum(counts) / len(counts), max(counts))


def distances_from(topology: Topology, origin: str) -> dict[str, int]:
    """Hops from `origin` to each member that its knowledge can reach, teacher to student, over all edges that ever are."""
    hops, frontier = {origin: 0}, [origin]
    num_members = len(topology.members)
    while frontier:
        following = []
        for teacher in frontier:
            if len(hops) == num_members:  # what is left of a dense graph is by far the most of it
                return hops
            for student in topology.students_of(teacher):
                if student not in hops:
                    hops[student] = hops[teacher] + 1
                    following.append(student)
        frontier = following
    return hops


def diameter(topology: Topology) -> int | None:
    """The longest of all shortest ways from teacher to student, over all edges that ever are; None if there is a pair
    without a way."""
    longest = 0
    for origin in topology.members:
        hops = distances_from(topology, origin)
        if len(hops) < len(topology.members):
            return None
        longest = max(longest, *hops.values())
    return longest


def measure_spread(topology: Topology) -> Spread:
    """Let knowledge spread along the schedule, with all sites at the same exchange; of a graph that stays, its distances."""
    count = len(topology.members)
    rank = {member: index for index, member in enumerate(topology.members)}
    phases = [
        [[rank[teacher] for teacher in topology.teachers_at(member, index)] for member in topology.members]
        for index in range(topology.period)
    ]
    num_starts = min(topology.period, MAX_STARTS)
    most, total, num_reached = 0, 0, 0
    cut_off: tuple[str, str] | None = None
    for start in range(num_starts):
        known = [1 << site for site in range(count)]  # bit k: what site k knew at the start has arrived here
        num_exchanges, last_news, num_pairs = 0, 0, 0
        while num_pairs < count * (count - 1) and num_exchanges - last_news < topology.period:
            phase = phases[(start + num_exchanges) % topology.period]
            num_exchanges += 1
            news = list(known)
            for site, teachers in enumerate(phase):
                for teacher in teachers:
                    news[site] |= known[teacher]
            num_new = sum(bits.bit_count() for bits in news) - count - num_pairs
            known = news
            if num_new:
                last_news = num_exchanges
                num_pairs += num_new
                total += num_exchanges * num_new
        most, num_reached = max(most, last_news), num_reached + num_pairs
        for site, bits in enumerate(known):
            if cut_off is None and bits.bit_count() < count:
                origin = next(other for other in range(count) if not bits >> other & 1)
                cut_off = topology.members[origin], topology.members[site]
    return Spread(most, total / num_reached if num_reached else 0.0, cut_off)


def longest_way_s(topology: Topology, hop_s: Callable[[str, str], float]) -> float:
    """The longest of all quickest ways from one member to another that there are, if an edge, teacher to student, takes
    `hop_s`."""
    longest_s = 0.0
    for origin in topology.members:
        arrived_s: dict[str, float] = {}
        queue = [(0.0, origin)]
        while queue:
            now_s, member = heapq.heappop(queue)
            if member in arrived_s:
                continue
            arrived_s[member] = now_s
            for student in topology.students_of(member):
                if student not in arrived_s:
                    heapq.heappush(queue, (now_s + hop_s(member, student), student))
        longest_s = max(longest_s, *arrived_s.values())
    return longest_s


def mixing_matrix(topology: Topology, exchange_index: int) -> Matrix:
    """W: what each site (row) would be a mean of after this exchange, if models were averaged; rows sum to 1.

    Where all edges go both ways, Metropolis weights, 1 / (1 + the larger of both degrees), and the rest for the site itself;
    else each site takes itself and its teachers equally. The weights of the edges do not count.
    """
    count = len(topology.members)
    rank = {member: index for index, member in enumerate(topology.members)}
    joined = np.zeros((count, count), dtype=bool)
    for site, member in enumerate(topology.members):
        for teacher in topology.teachers_at(member, exchange_index):
            joined[site, rank[teacher]] = True
    degrees = joined.sum(axis=1)
    if (joined == joined.T).all():
        weights: Matrix = joined / (1.0 + np.maximum.outer(degrees, degrees))
        weights[np.diag_indices(count)] = 1.0 - weights.sum(axis=1)
        return weights
    equal: Matrix = joined + np.eye(count)
    equal /= equal.sum(axis=1, keepdims=True)
    return equal


def spectral_gap(topology: Topology) -> float | None:
    """1 - |lambda_2| of `mixing_matrix`: by what share averaging brings sites closer with each exchange; 0 never, 1 at once.

    Of a schedule, lambda_2 is that of the product over a period, and its geometric mean per exchange is taken; the period is
    cut short where it would take too long. None for more than `MAX_GAP_SITES` sites.
    """
    count = len(topology.members)
    if count > MAX_GAP_SITES:
        return None
    if count == 1:
        return 1.0
    num_exchanges = max(1, min(topology.period, int(MAX_GAP_OPERATIONS / (2 * count**3))))
    # W keeps vectors of ones as they are. With the mean taken off every column, that eigenvalue is 0, and all others stay.
    product, log_scale = _without_means(mixing_matrix(topology, 0)), 0.0
    for index in range(num_exchanges):
        if index:
            product = _without_means(mixing_matrix(topology, index) @ product)
        scale = float(np.abs(product).max())
        if scale < _VANISHED:  # all differences are gone, but for rounding
            return 1.0
        product /= scale  # a long product would underflow
        log_scale += np.log(scale)
    radius = float(np.abs(np.linalg.eigvals(product)).max())
    if radius < _VANISHED:
        return 1.0
    return max(0.0, 1.0 - float(np.exp((np.log(radius) + log_scale) / num_exchanges)))


def _without_means(columns: Matrix) -> Matrix:
    centred: Matrix = columns - columns.mean(axis=0)
    return centred
