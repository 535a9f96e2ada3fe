"""Virtual links: what arrives when, computed by hand, and what does not arrive."""

from __future__ import annotations

import random

import pytest

from p2pcodistill.gossip.messages import Lane, Payload
from p2pcodistill.simulation.shaping import PACKET_BYTES, LinkShape
from p2pcodistill.simulation.virtual.clock import VirtualClock
from p2pcodistill.simulation.virtual.links import (
    REDIAL_INTERVAL_S,
    SILENCE_TIMEOUT_S,
    VirtualLink,
    count_lost,
)


class End:
    """A site that writes down what it sees."""

    def __init__(self, clock: VirtualClock) -> None:
        self.clock = clock
        self.seen: list[tuple[float, str]] = []

    def opened(self, peer: str) -> None:
        self.seen.append((self.clock.now_s, f"open {peer}"))

    def closed(self, peer: str, why: str) -> None:
        self.seen.append((self.clock.now_s, f"closed {peer}"))

    def received(self, peer: str, payload: Payload) -> None:
        self.seen.append((self.clock.now_s, payload[0].decode()))

    def rejected(self, peer: str, reason: str, why: str) -> None:
        self.seen.append((self.clock.now_s, f"rejected {peer}: {reason}: {why}"))

    def arrivals(self) -> dict[str, float]:
        """When each payload arrived."""
        return {what: time_s for time_s, what in self.seen if " " not in what}


class Pair:
    """Two ends and the link between them, whose session is open."""

    def __init__(self, shape: LinkShape, *, seed: int = 0) -> None:
        self.clock = VirtualClock()
        self.link = VirtualLink(self.clock, ("a", "b"), (shape, shape), seed=str(seed))
        self.a, self.b = End(self.clock), End(self.clock)
        self.link.attach("a", self.a)
        self.link.attach("b", self.b)
        self.clock.run(10.0, is_over=lambda: self.link.is_open)
        self.begin_s = self.clock.now_s

    def send(self, name: str, num_bytes: int, lane: Lane = Lane.BULK) -> None:
        self.link.send("a", lane, (name.encode(),), num_bytes)

    def arrivals(self) -> dict[str, float]:
        """Seconds since the session began."""
        self.clock.run(self.begin_s + 1000)
        return {name: time_s - self.begin_s for name, time_s in self.b.arrivals().items()}


def test_the_clock_runs_what_is_due_in_order() -> None:
    clock, seen = VirtualClock(), []
    for name, delay_s in (("late", 2.0), ("early", 1.0), ("second", 1.0)):
        clock.call_later(delay_s, lambda name=name: seen.append((clock.now_s, name)))
    clock.run(1.5)
    assert seen == [(1.0, "early"), (1.0, "second")] and clock.now_s == 1.5
    clock.run(5.0, is_over=lambda: True)
    assert seen[2:] == [(2.0, "late")] and clock.now_s == 2.0


def test_a_session_begins_after_three_round_trips() -> None:
    pair = Pair(LinkShape(latency_ms=100))
    assert pair.a.seen == [(pytest.approx(0.6), "open b")]
    assert pair.b.seen == [(pytest.approx(0.6), "open a")]


def test_bulk_takes_its_size_by_the_bandwidth_and_waits_for_its_turn() -> None:
    pair = Pair(LinkShape(bandwidth_mbit=8, latency_ms=50))  # a million bytes a second
    pair.send("first", 500_000)
    pair.send("second", 250_000)
    assert pair.arrivals() == {"first": pytest.approx(0.55), "second": pytest.approx(0.8)}
    wire = pair.link.wire_from("a")
    assert (wire.num_bytes_sent, wire.num_bytes_arrived) == (750_000, 750_000)
    assert (wire.num_bytes_queued, wire.max_bytes_queued) == (0, 750_000)


def test_control_goes_first_and_costs_the_bulk_its_time() -> None:
    pair = Pair(LinkShape(bandwidth_mbit=8, latency_ms=50))
    pair.send("bulk", 500_000)
    pair.send("waits", 100_000)
    pair.send("control", 10_000, Lane.CONTROL)
    assert pair.arrivals() == {
        "control": pytest.approx(0.06),
        "bulk": pytest.approx(0.56),
        "waits": pytest.approx(0.66),
    }


def test_the_two_directions_do_not_share_a_bandwidth() -> None:
    pair = Pair(LinkShape(bandwidth_mbit=8))
    pair.send("there", 1_000_000)
    pair.link.send("b", Lane.BULK, (b"back",), 1_000_000)
    assert pair.arrivals() == {"there": pytest.approx(1.0)}
    assert pair.a.arrivals()["back"] - pair.begin_s == pytest.approx(1.0)


def test_jitter_keeps_the_order_of_a_lane() -> None:
    pair = Pair(LinkShape(latency_ms=10, jitter_ms=500))
    for index in range(50):
        pair.send(f"{index:02}", 1, Lane.CONTROL)
    arrivals = pair.arrivals()
    assert sorted(arrivals, key=arrivals.__getitem__) == sorted(arrivals) and len(arrivals) == 50
    delays = sorted(arrivals.values())
    assert delays[0] >= 0.01 and delays[-1] <= 0.51 and delays[-1] - delays[0] > 0.1


def test_lost_packets_cost_a_round_trip_and_their_bandwidth() -> None:
    shape = LinkShape(bandwidth_mbit=8, latency_ms=100, loss_ratio=0.5)
    pair = Pair(shape)
    pair.send("all", 100 * PACKET_BYTES)
    pair.send("next", PACKET_BYTES)
    arrivals = pair.arrivals()
    num_lost = pair.link.faults.num_packets_lost
    perfect_s = 101 * PACKET_BYTES / 1e6 + 0.1
    assert 50 < num_lost < 200
    assert arrivals["next"] >= perfect_s + num_lost * PACKET_BYTES / 1e6
    assert arrivals["all"] >= 0.1 + 0.2 * 5  # a hundred packets at a half are not through in five rounds


def test_packets_are_lost_at_the_given_ratio() -> None:
    rng = random.Random(1)
    num_lost = sum(count_lost(1000, 0.02, rng) for _ in range(500))
    assert 9_300 < num_lost < 10_700
    assert all(0 <= count_lost(3, 0.9, rng) <= 3 for _ in range(100))


def test_a_cut_loses_what_is_on_its_way_and_a_new_session_begins() -> None:
    pair = Pair(LinkShape(bandwidth_mbit=8, latency_ms=50))
    pair.send("lost", 500_000)
    pair.send("lost too", 500_000)
    pair.clock.run(pair.begin_s + 0.1)
    pair.link.cut()
    assert not pair.link.is_open
    pair.clock.run(pair.begin_s + 5)
    assert pair.link.is_open and pair.b.arrivals() == {}
    assert [what for _, what in pair.a.seen] == ["open b", "closed b", "open b"]
    faults = pair.link.faults
    assert (faults.num_cuts, faults.num_payloads_cut_off) == (1, 2)
    pair.send("new", 1_000)
    assert "new" in pair.arrivals()


def test_resets_come_at_their_interval() -> None:
    pair = Pair(LinkShape(reset_interval_s=10))
    pair.clock.run(45.0)
    assert pair.link.faults.num_cuts == 4


def test_a_blocked_link_stays_closed_until_it_is_unblocked_as_often() -> None:
    pair = Pair(LinkShape())
    pair.link.block()
    pair.link.block()
    pair.link.unblock()
    pair.clock.run(100.0)
    assert not pair.link.is_open
    pair.send("nobody hears it", 1)
    pair.link.unblock()
    pair.clock.run(110.0)
    assert pair.link.is_open and pair.b.arrivals() == {}


def test_a_black_hole_swallows_all_and_is_noticed_by_the_silence() -> None:
    pair = Pair(LinkShape(latency_ms=100))
    pair.link.darken(True)
    pair.send("swallowed", 1)
    pair.clock.run(pair.begin_s + SILENCE_TIMEOUT_S - 0.1)
    assert pair.link.is_open
    pair.clock.run(pair.begin_s + SILENCE_TIMEOUT_S + 30)
    assert not pair.link.is_open
    pair.link.darken(False)
    pair.clock.run(pair.begin_s + 60)
    assert pair.link.is_open and pair.b.arrivals() == {}
    assert pair.link.faults.num_payloads_swallowed == 1


def test_a_short_black_hole_breaks_the_session_when_it_ends() -> None:
    pair = Pair(LinkShape(latency_ms=100))
    pair.send("on its way", 1)
    pair.link.darken(True)
    pair.clock.run(pair.begin_s + 2)
    pair.link.darken(False)
    assert not pair.link.is_open  # something is missing in it
    pair.clock.run(pair.begin_s + SILENCE_TIMEOUT_S + 20)
    assert pair.link.is_open and pair.b.arrivals() == {}
    assert [what for _, what in pair.b.seen] == ["open a", "closed a", "open a"]


def test_a_newer_machine_with_the_key_of_a_site_takes_its_place_and_the_old_one_is_refused() -> None:
    pair = Pair(LinkShape())
    newer = End(pair.clock)
    pair.link.attach("a", newer)
    pair.clock.run(pair.begin_s + 2 * REDIAL_INTERVAL_S + 1)
    assert [what for _, what in pair.a.seen] == ["open b", "closed b"]
    assert [what for _, what in newer.seen] == ["open b"]
    *session, first, second = [what for _, what in pair.b.seen]
    assert session == ["open a", "closed a", "open a"]
    assert first == second and first.startswith("rejected a: replayed: a was replaced by a newer process")
    assert pair.link.faults.num_claims_refused == 2
    pair.link.block()
    pair.clock.run(pair.begin_s + 4 * REDIAL_INTERVAL_S)
    assert pair.link.faults.num_claims_refused == 2, "nobody can dial"


def test_a_site_that_goes_down_ends_the_session_at_the_other() -> None:
    pair = Pair(LinkShape())
    pair.link.detach("a", "killed")
    pair.clock.run(20.0)
    assert [what for _, what in pair.b.seen] == ["open a", "closed a"]
    pair.link.attach("a", pair.a)
    pair.clock.run(40.0)
    assert pair.link.is_open
