"""The window of one peer: credit, deadlines, and how it follows links of all kinds."""

from __future__ import annotations

import heapq
import itertools
import random
from dataclasses import dataclass

import pytest

from p2pcodistill.gossip.window import FIRST_WINDOW_BYTES, MAX_PATIENCE_FACTOR, Window

STALL_S = 10.0
MBIT = 1e6 / 8
CHUNK = 64 << 10


@dataclass
class Link:
    """A peer behind a link: it answers each want with its chunks, one after the other, over one queue."""

    rate_bytes_s: float
    round_trip_s: float
    jitter_s: float = 0.0
    idle_from_s: float = 0.0

    def arrival_s(self, num_bytes: int, wanted_s: float, rng: random.Random) -> float:
        """When a chunk arrives that was wanted then; not before the one wanted before it."""
        begins_s = max(wanted_s + self.round_trip_s / 2, self.idle_from_s)
        self.idle_from_s = begins_s + num_bytes / self.rate_bytes_s
        return self.idle_from_s + self.round_trip_s / 2 + rng.uniform(0, self.jitter_s)


class Fetch:
    """Asks for chunks without end, as `Transfers` does, and keeps count of what arrives."""

    def __init__(self, link: Link, *, chunk_bytes: int = CHUNK, window_bytes: int = 32 << 20) -> None:
        self.link, self.chunk_bytes, self.now_s = link, chunk_bytes, 0.0
        self.window = Window(window_bytes=window_bytes, stall_timeout_s=STALL_S)
        self.num_bytes = 0
        self.max_queued_s = 0.0
        self._under_way: list[tuple[float, int]] = []
        self._indices = itertools.count()
        self._rng = random.Random(1)
        self._last_s = 0.0

    def run(self, seconds: float) -> float:
        """Go on for so long; the share of the link that was used."""
        until_s, before = self.now_s + seconds, self.num_bytes
        while True:
            if self.window.is_low:
                while self.chunk_bytes <= self.window.credit_bytes:
                    self._ask()
            arrives_s, index = self._under_way[0]
            if arrives_s > until_s:
                self.now_s = until_s
                return (self.num_bytes - before) / (self.link.rate_bytes_s * seconds)
            heapq.heappop(self._under_way)
            self.now_s = arrives_s
            assert self.window.receive("frame", index, arrives_s)
            self.num_bytes += self.chunk_bytes

    def _ask(self) -> None:
        index = next(self._indices)
        self.window.ask("frame", index, self.chunk_bytes, self.now_s)
        arrives_s = self.link.arrival_s(self.chunk_bytes, self.now_s, self._rng)
        self._last_s = max(self._last_s, arrives_s)  # a connection keeps the order
        self.max_queued_s = max(self.max_queued_s, self._last_s - self.now_s - self.link.round_trip_s)
        heapq.heappush(self._under_way, (self._last_s, index))


@pytest.mark.parametrize("round_trip_s", [0.0, 0.02, 0.2, 0.6])
@pytest.mark.parametrize("rate_mbit", [2, 20, 200, 1000])
def test_a_link_is_kept_full_and_never_queued_for_long(rate_mbit: float, round_trip_s: float) -> None:
    window_bytes = 256 << 20  # so that it is the link that limits
    fetch = Fetch(Link(rate_mbit * MBIT, round_trip_s), window_bytes=window_bytes)
    fetch.run(5.0)
    fetch.max_queued_s = 0.0
    assert fetch.run(60.0) > 0.95
    two_chunks_s = 2 * CHUNK / (rate_mbit * MBIT)
    assert fetch.max_queued_s <= max(2.2 * round_trip_s, 0.06) + 2 * two_chunks_s
    assert fetch.window.link.rate_bytes_s == pytest.approx(rate_mbit * MBIT, rel=0.1)
    assert round_trip_s <= fetch.window.link.round_trip_s <= 1.1 * round_trip_s + max(two_chunks_s, 0.01)


def test_a_long_fat_link_is_filled_within_some_round_trips() -> None:
    fetch = Fetch(Link(400 * MBIT, 0.2))
    fetch.run(2.0)
    assert fetch.run(2.0) > 0.95


def test_the_window_is_bounded_however_much_the_link_holds() -> None:
    fetch = Fetch(Link(10_000 * MBIT, 0.5), window_bytes=1 << 20)
    fetch.run(10.0)
    assert fetch.window.window_bytes == 1 << 20
    assert fetch.num_bytes == pytest.approx(10.0 / 0.5 * (1 << 20), rel=0.5)


def test_a_thin_link_has_two_chunks_at_most_under_way() -> None:
    fetch = Fetch(Link(0.5 * MBIT, 0.1), chunk_bytes=256 << 10)
    fetch.run(20.0)
    assert fetch.run(100.0) > 0.95
    assert fetch.window.window_bytes < 3 * fetch.chunk_bytes


def test_pings_do_not_make_the_window_too_small_for_chunks() -> None:
    fetch = Fetch(Link(20 * MBIT, 0.2, jitter_s=0.02), chunk_bytes=256 << 10)
    used = []
    for _ in range(60):
        fetch.window.observe_rtt(0.2)
        used.append(fetch.run(1.0))
    assert sum(used[5:]) / 55 > 0.95
    assert fetch.window.link.round_trip_s == 0.2


def test_jitter_costs_little() -> None:
    fetch = Fetch(Link(20 * MBIT, 0.2, jitter_s=0.05))
    fetch.run(5.0)
    assert fetch.run(60.0) > 0.95


def test_the_window_follows_a_link_that_changes() -> None:
    fetch = Fetch(Link(100 * MBIT, 0.1))
    fetch.run(20.0)
    fast = fetch.window.window_bytes
    fetch.link.rate_bytes_s = 5 * MBIT
    fetch.run(30.0)
    slow = fetch.window.window_bytes
    assert slow < fast / 8
    fetch.link.rate_bytes_s, fetch.link.round_trip_s = 100 * MBIT, 0.4
    fetch.run(60.0)
    assert fetch.window.window_bytes > 2 * fast
    assert fetch.run(30.0) > 0.95
    fetch.link.round_trip_s = 0.1
    fetch.run(90.0)
    assert fetch.window.window_bytes < 1.5 * fast


def test_pings_tell_of_the_round_trip_where_chunks_take_long() -> None:
    window = Window(window_bytes=16 << 20, stall_timeout_s=STALL_S)
    assert (window.link.rate_bytes_s, window.link.round_trip_s) == (None, None)
    window.observe_rtt(0.05)
    assert window.link.round_trip_s == 0.05
    window.ask("frame", 0, FIRST_WINDOW_BYTES, 0.0)
    window.receive("frame", 0, 4.0)
    assert window.link.round_trip_s == 0.05
    assert window.link.rate_bytes_s == FIRST_WINDOW_BYTES / 4.0


def test_any_chunk_may_be_asked_for_when_nothing_is_under_way() -> None:
    window = Window(window_bytes=4 << 20, stall_timeout_s=STALL_S)
    assert window.credit_bytes == 4 << 20
    window.ask("frame", 0, 3 << 20, 0.0)
    assert window.credit_bytes == 1 << 20, "two such chunks, were it not for the bound"
    window.receive("frame", 0, 60.0)
    assert window.credit_bytes == 4 << 20


def test_patience_grows_with_every_stall_and_follows_the_link() -> None:
    window = Window(window_bytes=10, stall_timeout_s=STALL_S)
    window.ask("frame", 0, 4, 0.0)
    assert not window.is_stalled(STALL_S - 1)
    assert window.is_stalled(STALL_S)

    window.stall(STALL_S)
    assert window.void() == [("frame", 0)]
    assert not window.is_stalled(1000.0)  # nothing is under way
    window.ask("frame", 0, 4, STALL_S)
    assert not window.is_stalled(3 * STALL_S - 1)
    assert window.is_stalled(3 * STALL_S)

    assert window.receive("frame", 0, 25.0)
    assert window.patience_s == 50.0  # twice the 25 s since the chunk was first asked for
    window.rest()
    window.ask("frame", 1, 4, 60.0)
    window.receive("frame", 1, 60.1)
    assert window.patience_s == STALL_S

    for _ in range(10):
        window.stall(70.0)
    assert window.patience_s == MAX_PATIENCE_FACTOR * STALL_S
