"""Pings, suspicion, quarantine, floods, and keys that are revoked."""

from __future__ import annotations

from typing import Any

import pytest

from p2pcodistill.checkpoint.manifest import Version
from p2pcodistill.errors import FloodedError, MalformedError, QuarantinedError
from p2pcodistill.gossip.events import MemberRestored, MemberRevoked, PayloadReceived, Ticked
from p2pcodistill.gossip.health import NUM_PINGS_UNTIL_SUSPECT, Health
from p2pcodistill.gossip.messages import Announce, Chunk, Ping, Pong, Refusal, Want
from p2pcodistill.gossip.trust import (
    FIRST_QUARANTINE_S,
    MAX_BURST_MESSAGES,
    MAX_MESSAGES_PER_S,
    MAX_QUARANTINE_S,
    MAX_REFUSALS,
    REFUSAL_MEMORY_S,
    Trust,
)
from p2pcodistill.telemetry import node_events

INTERVAL_S = 5.0


def pair(sites: Any, **settings: Any) -> tuple[Any, Any, Any]:
    """tokyo, its student lima, and the net."""
    tokyo = sites.node("tokyo", students=["lima"], **settings)
    lima = sites.node("lima", teachers=["tokyo"], **settings)
    net = sites.net(tokyo, lima)
    net.settle()
    return tokyo, lima, net


# --- health ----------------------------------------------------------------------------------------------------


def test_a_silent_peer_is_pinged_then_suspected_and_recovers() -> None:
    health = Health(ping_interval_s=INTERVAL_S)
    assert health.open("lima", 0.0) == Ping(1)
    assert health.answer("lima", Pong(1), 0.25) == 0.25

    pinged, suspected = [], []
    for second in range(1, 30):
        pings, suspects = health.tick(float(second))
        pinged += [second for _ in pings]
        suspected += [(second, event.peer) for event in suspects]

    assert pinged == [6, 12, 18, 24], "looked at every half interval"
    assert suspected == [(18, "lima")]
    assert health.suspects == ("lima",)
    assert health.hear("lima", 30.0) == node_events.PeerRecovered("lima", 30.0)
    assert health.suspects == () and health.hear("lima", 31.0) is None


def test_traffic_stands_in_for_pings_but_for_the_round_trip() -> None:
    health = Health(ping_interval_s=INTERVAL_S)
    health.open("lima", 0.0)
    pinged = []
    for second in range(1, 121):
        health.hear("lima", float(second))
        pinged += [second for _ in health.tick(float(second))[0]]
    assert pinged == [60, 120]


def test_pongs_belong_to_pings() -> None:
    health = Health(ping_interval_s=INTERVAL_S)
    health.open("lima", 0.0)
    with pytest.raises(MalformedError, match="a ping that was never sent"):
        health.answer("lima", Pong(2), 1.0)
    for second in range(1, 60):
        health.tick(float(second))
    assert health.answer("lima", Pong(1), 60.0) is None, "given up, but no offence"


def test_without_an_interval_nobody_is_pinged() -> None:
    health = Health(ping_interval_s=float("inf"))
    assert health.open("lima", 0.0) is None
    assert health.tick(1e9) == ([], [])


def test_nodes_ping_each_other_and_learn_the_round_trip(sites: Any) -> None:
    tokyo, _, net = pair(sites, ping_interval_s=INTERVAL_S)
    assert tokyo.gossip.links["lima"].round_trip_s is not None

    net.nodes.pop("lima")  # the session stays, but nobody answers
    for _ in range(NUM_PINGS_UNTIL_SUSPECT + 1):
        tokyo.now_s += INTERVAL_S + 1.0
        tokyo.feed(Ticked())
    assert tokyo.gossip.suspects == ("lima",)
    assert any(isinstance(event, node_events.PeerSuspected) for event in tokyo.events)
    tokyo.receive("lima", Ping(7))
    assert tokyo.gossip.suspects == ()
    assert isinstance(tokyo.events[-1], node_events.PeerRecovered)


# --- trust -----------------------------------------------------------------------------------------------------


def test_quarantine_takes_many_refusals_in_a_short_time_and_grows() -> None:
    trust = Trust()
    now_s, durations = 0.0, []
    for _ in range(8):
        for _ in range(MAX_REFUSALS - 1):
            assert trust.count_refusal("lima", "malformed", now_s) is None
        durations.append(trust.count_refusal("lima", "malformed", now_s))
        with pytest.raises(QuarantinedError, match=r"lima sent what was refused \(malformed\) 20 times"):
            trust.check("lima", now_s)
        trust.check("tokyo", now_s)
        assert trust.take_released(now_s) == []
        now_s += durations[-1] or 0.0
        assert trust.take_released(now_s) == ["lima"]
        trust.check("lima", now_s)
    assert durations == [min(MAX_QUARANTINE_S, FIRST_QUARANTINE_S * 2**n) for n in range(8)]
    for _ in range(100):
        now_s += REFUSAL_MEMORY_S / (MAX_REFUSALS - 2)
        assert trust.count_refusal("tokyo", "replayed", now_s) is None, "now and then is nothing"


def test_floods_are_refused_and_bursts_are_not() -> None:
    trust = Trust()
    for _ in range(int(MAX_BURST_MESSAGES)):
        trust.count_message("lima", 0.0)
    with pytest.raises(FloodedError):
        trust.count_message("lima", 0.0)
    for _ in range(int(MAX_MESSAGES_PER_S)):
        trust.count_message("lima", 1.0)
    with pytest.raises(FloodedError):
        trust.count_message("lima", 1.0)


def test_who_keeps_sending_garbage_is_shut_out_for_a_while_by_name(sites: Any) -> None:
    tokyo, lima, net = pair(sites)
    for _ in range(MAX_REFUSALS):
        lima.feed(PayloadReceived("tokyo", (b"\xc1",)))

    assert node_events.PeerQuarantined("tokyo", "malformed", MAX_REFUSALS, FIRST_QUARANTINE_S) in lima.events
    assert lima.gossip.peers_ready == ()
    ((peer, refusal),) = lima.take_messages()
    assert peer == "tokyo" and isinstance(refusal, Refusal) and refusal.reason == "quarantined"
    num_events = len(lima.events)
    lima.feed(PayloadReceived("tokyo", (b"\xc1",)))
    assert len(lima.events) == num_events, "not even worth decoding"
    tokyo.receive("lima", refusal)
    assert tokyo.gossip.peers_ready == ()

    net.cut("lima", "tokyo")
    net.connect("lima", "tokyo")
    net.settle()
    assert lima.gossip.peers_ready == tokyo.gossip.peers_ready == ()
    assert lima.refusals()[-1] == ("tokyo", "quarantined")

    net.wait(FIRST_QUARANTINE_S)
    assert lima.gossip.peers_ready == ("tokyo",) and tokyo.gossip.peers_ready == ("lima",)
    frame = sites.frame("tokyo", 1)
    tokyo.publish(frame)
    net.settle()
    assert lima.store.held("tokyo") == Version(1, 1)


def test_wrong_chunks_count_and_late_ones_do_not(sites: Any) -> None:
    _, lima, _ = pair(sites)
    for index in range(3 * MAX_REFUSALS):
        lima.receive("tokyo", Chunk("00" * 32, index, b"late"))
    assert not lima.refusals() and lima.gossip.peers_ready == ("tokyo",)


def test_a_revoked_member_is_shut_out_until_it_is_restored(sites: Any) -> None:
    tokyo, lima, net = pair(sites)
    first, second = sites.frame("tokyo", 1), sites.frame("tokyo", 2)
    tokyo.publish(first)
    net.settle()

    lima.feed(MemberRevoked("tokyo", "its key was stolen"))
    net.settle()
    assert node_events.MemberTrustChanged("tokyo", False, "its key was stolen") in lima.events
    assert lima.gossip.peers_ready == tokyo.gossip.peers_ready == ()
    assert any("its key was stolen" in str(event) for event in tokyo.events)
    net.cut("lima", "tokyo")
    net.connect("lima", "tokyo")
    tokyo.publish(second)
    net.settle()
    assert lima.store.held("tokyo") == Version(1, 1), "what is held stays, and nothing more is taken"

    lima.feed(MemberRestored("tokyo"))
    net.settle()
    assert lima.store.held("tokyo") == Version(1, 2)


def test_nobody_passes_on_what_a_revoked_member_signed(sites: Any) -> None:
    edges = {"tokyo": ("lima", "berlin")}
    lima, berlin = (sites.node(name, teachers=["tokyo"], students_of=edges) for name in edges["tokyo"])
    sites.net(lima, berlin).settle()
    lima.feed(MemberRevoked("tokyo", "stolen"))

    frame = sites.frame("tokyo", 1)
    lima.receive("berlin", Announce(frame.signed.body, frame.signed.signature))

    assert not lima.versions_announced() and not lima.refusals(), "berlin need not know"


def test_a_revoked_member_is_served_nothing_and_not_waited_for(sites: Any) -> None:
    tokyo, _, net = pair(sites)
    frame = sites.frame("tokyo", 1)
    tokyo.feed(MemberRevoked("lima", "gone"))
    net.settle()

    tokyo.publish(frame)
    tokyo.receive("lima", Want(frame.frame_id, (0,)))

    assert tokyo.num_chunks_served == 0 and tokyo.take_messages() == []
    assert tokyo.gossip.students_finished
