"""What one member can do to others by what it claims, or by its silence: little, and not for long."""

from __future__ import annotations

from typing import Any

import pytest

from p2pcodistill.checkpoint.manifest import MIN_CHUNK_BYTES, Version
from p2pcodistill.gossip.events import MemberRevoked, PeerOpened, Ticked
from p2pcodistill.gossip.membership import MAX_CREDIBLE_INCARNATION, members_digest
from p2pcodistill.gossip.messages import (
    PROTOCOL_VERSION,
    Announce,
    CatchUp,
    Chunk,
    Follow,
    Hello,
    NoPath,
    Ping,
    Refusal,
    Want,
)
from p2pcodistill.gossip.relay import NEWS_FACTOR, PATH_PATIENCE_S
from p2pcodistill.gossip.serving import READER_IDLE_S
from p2pcodistill.telemetry import node_events

STUDENTS = ("berlin", "lima")
RELAY_AFTER_S = 10.0
STALL_S = 10.0


def make(sites: Any, name: str, teachers: tuple[str, ...] = (), **settings: Any) -> Any:
    """A node of a run in which tokyo teaches berlin and lima."""
    students = STUDENTS if name == "tokyo" else ()
    defaults = {
        "students_of": {"tokyo": STUDENTS},
        "window_bytes": 8 * MIN_CHUNK_BYTES,
        "store": type(sites.node(name).store)(incarnation=1),
    }
    return sites.node(name, teachers=teachers, students=students, **(defaults | settings))


def student(sites: Any, name: str, **settings: Any) -> Any:
    return make(sites, name, ("tokyo",), **settings)


def greet(node: Any, peer: str) -> None:
    """`peer`, of which only this node knows, becomes ready."""
    node.feed(PeerOpened(peer))
    node.receive(peer, Hello(PROTOCOL_VERSION, "run", members_digest(node.sites.members), bytes(32), 0, 0))


def announce(frame: Any, num_more: int | None = None) -> Announce:
    return Announce(frame.signed.body, frame.signed.signature, num_more)


def quarantined(node: Any) -> list[str]:
    return [event.peer for event in node.events if isinstance(event, node_events.PeerQuarantined)]


# --- what is claimed -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["tokyo", "oslo"])
def test_a_follower_cannot_use_up_a_teachers_incarnations(sites: Any, name: str) -> None:
    tokyo, oslo = make(sites, "tokyo"), make(sites, "oslo")
    net = sites.net(tokyo, oslo)
    net.settle()
    asked = {"tokyo": tokyo, "oslo": oslo}[name]  # tokyo itself, or by way of a relay
    greet(asked, "lima")

    asked.receive("lima", Follow("tokyo", None, MAX_CREDIBLE_INCARNATION + 1))
    net.settle()

    assert tokyo.gossip.incarnation == 1
    assert asked.refusals() == [("lima", "malformed")] and not quarantined(asked)


def test_a_version_that_a_follower_claims_to_hold_is_not_believed(sites: Any) -> None:
    tokyo, oslo = make(sites, "tokyo"), make(sites, "oslo")
    net = sites.net(tokyo, oslo)
    greet(oslo, "lima")
    net.settle()
    oslo.receive("lima", Follow("tokyo", Version(2**60, 1), 0))
    net.settle()

    for step in range(1, 26):
        tokyo.publish(sites.frame("tokyo", step))
        net.settle()

    assert not oslo.refusals(), "tokyo is honest"
    assert oslo.store.held("tokyo") == Version(1, 25)


def test_a_path_that_one_follower_cannot_have_does_not_keep_the_others_waiting(sites: Any) -> None:
    tokyo, oslo = make(sites, "tokyo", obliging_ranks=True), make(sites, "oslo")
    berlin = student(sites, "berlin")
    net = sites.net(tokyo, oslo, berlin, apart=[("tokyo", "berlin")])
    greet(oslo, "lima")
    net.settle()
    tokyo.publish(sites.frame("tokyo", 1, num_chunks=9))
    tokyo.publish(sites.frame("tokyo", 2, base=1))
    oslo.receive("lima", Follow("tokyo", Version(1, 2), 0))

    oslo.receive("lima", CatchUp(Version(1, 50), origin="tokyo"))  # before oslo knows what there is
    for step in range(3, 12):
        tokyo.publish(sites.frame("tokyo", step, base=step - 1, num_fp16_bytes=20 * MIN_CHUNK_BYTES))
        net.wait(RELAY_AFTER_S)

    assert berlin.store.held("tokyo") == Version(1, 11)
    assert not any(node.refusals() for node in net.nodes.values())


def test_who_waits_for_a_path_of_an_origin_that_says_nothing_does_not_wait_for_ever(sites: Any) -> None:
    oslo = make(sites, "oslo")
    for peer in ("tokyo", "lima"):
        greet(oslo, peer)
    oslo.receive("lima", Follow("tokyo", None, 0))
    oslo.receive("lima", CatchUp(None, origin="tokyo"))
    assert ("tokyo", CatchUp(None)) in oslo.take_messages()

    oslo.now_s += PATH_PATIENCE_S - 1.0
    oslo.feed(Ticked())
    assert oslo.take_messages() == []
    oslo.now_s += 1.0
    oslo.feed(Ticked())

    assert oslo.take_messages() == [("lima", NoPath("tokyo"))]
    frame = sites.frame("tokyo", 1)
    oslo.receive("lima", CatchUp(None, origin="tokyo"))
    assert oslo.take_messages() == [], "it was asked"
    oslo.receive("tokyo", Announce(frame.signed.body, frame.signed.signature, 0))
    told = [
        (peer, message.num_more) for peer, message in oslo.take_messages() if isinstance(message, Announce)
    ]
    assert ("lima", 0) in told
    assert oslo.refusals() == [], "late is better than never"


def test_who_is_not_behind_is_told_so(sites: Any) -> None:
    tokyo = make(sites, "tokyo")
    greet(tokyo, "lima")
    tokyo.publish(sites.frame("tokyo", 1))
    tokyo.take_messages()

    tokyo.receive("lima", CatchUp(Version(1, 1)))

    assert tokyo.take_messages() == [("lima", NoPath("tokyo"))]


def test_a_made_up_origin_leaves_nothing_behind(sites: Any) -> None:
    berlin = student(sites, "berlin")
    greet(berlin, "lima")

    berlin.receive("lima", announce(sites.frame("oslo", 1), 0))

    assert berlin.refusals() == [("lima", "unknown-peer")]
    assert "oslo" not in berlin.gossip._transfers._plans


# --- what is honest --------------------------------------------------------------------------------------------


def test_nobody_is_blamed_for_frames_of_a_teacher_that_is_revoked_here_only(sites: Any) -> None:
    tokyo, berlin, lima = make(sites, "tokyo"), student(sites, "berlin"), student(sites, "lima")
    net = sites.net(tokyo, berlin, lima)
    net.settle()
    berlin.feed(MemberRevoked("tokyo", "stolen"))

    for step in range(1, 30):
        tokyo.publish(sites.frame("tokyo", step))
        net.wait(1.0)

    assert lima.store.held("tokyo") == Version(1, 29)
    assert not quarantined(berlin) and "lima" in berlin.gossip.peers_ready
    assert not berlin.store.frames


def test_a_relay_is_let_go_when_its_origin_is_revoked(sites: Any) -> None:
    tokyo, oslo, lima = make(sites, "tokyo"), make(sites, "oslo"), student(sites, "lima")
    net = sites.net(tokyo, oslo, lima, apart=[("tokyo", "lima")])
    tokyo.publish(sites.frame("tokyo", 1))
    for _ in range(2):
        net.wait(RELAY_AFTER_S)
    assert lima.store.held("tokyo") == Version(1, 1)

    lima.feed(MemberRevoked("tokyo", "stolen"))
    net.settle()

    assert oslo.gossip._sharing.followers("tokyo") == ()


def test_frames_over_the_own_cap_are_refused_without_blame(sites: Any) -> None:
    tokyo, berlin = make(sites, "tokyo"), student(sites, "berlin", max_frame_bytes=MIN_CHUNK_BYTES)
    net = sites.net(tokyo, berlin)
    net.settle()

    for step in range(1, 30):
        tokyo.publish(sites.frame("tokyo", step))
        net.wait(1.0)

    assert set(berlin.refusals()) == {("tokyo", "oversized")}
    assert not quarantined(berlin)


# --- what is asked for in vain ---------------------------------------------------------------------------------


def test_chunks_that_nobody_asked_for_keep_no_download_alive(sites: Any) -> None:
    tokyo, berlin = make(sites, "tokyo"), student(sites, "berlin")
    net = sites.net(tokyo, berlin)
    greet(berlin, "lima")
    net.settle()
    frame = sites.frame("tokyo", 1, num_chunks=32)
    berlin.receive("lima", announce(frame))
    tokyo.publish(frame)
    net.settle()

    for _ in range(10):
        net.wait(STALL_S / 2)
        berlin.receive("lima", Chunk("ab" * 32, 0, b"x"))
    net.settle()

    assert berlin.store.held("tokyo") == Version(1, 1)


def test_a_holder_that_sends_nothing_is_waited_for_once(sites: Any) -> None:
    tokyo, berlin = make(sites, "tokyo"), student(sites, "berlin")
    net = sites.net(tokyo, berlin)
    greet(berlin, "lima")
    net.settle()
    waited_s = []

    for step in range(1, 6):
        frame = sites.frame("tokyo", step, num_chunks=32)
        berlin.receive("lima", announce(frame))
        started_s = berlin.now_s
        tokyo.publish(frame)
        net.settle()
        for _ in range(100):
            if frame.frame_id not in berlin.store.frames:
                net.wait(1.0)
        waited_s.append(berlin.now_s - started_s)

    assert waited_s == [STALL_S, 0.0, 0.0, 0.0, 0.0]


def test_a_slow_peer_is_asked_all_the_same_when_nobody_else_has_it(sites: Any) -> None:
    berlin = student(sites, "berlin")
    greet(berlin, "lima")
    frame = sites.frame("tokyo", 1, num_chunks=2)
    berlin.receive("lima", announce(frame))
    berlin.take_messages()

    berlin.now_s = STALL_S
    berlin.receive("lima", Ping(1))
    berlin.feed(Ticked())

    assert ("lima", Want(frame.frame_id, (0, 1))) in berlin.take_messages()


def test_a_path_is_asked_of_the_teacher_once_it_is_there(sites: Any) -> None:
    tokyo, berlin = make(sites, "tokyo", obliging_ranks=True), student(sites, "berlin")
    net = sites.net(tokyo, berlin, apart=[("tokyo", "berlin")])
    greet(tokyo, "lima")
    chain = sites.chain("tokyo", 3)
    for frame in chain:
        tokyo.publish(frame)
    greet(berlin, "lima")
    berlin.receive("lima", announce(chain[-1]))
    assert ("lima", CatchUp(None, origin="tokyo")) in berlin.take_messages()

    net.connect("tokyo", "berlin")
    net.settle()

    assert berlin.store.held("tokyo") == Version(1, 3)
    berlin.receive("lima", announce(chain[0], 3))  # late, but it was asked for
    assert not berlin.refusals()


def test_a_path_is_asked_of_another_when_a_holder_does_not_answer(sites: Any) -> None:
    students_of = {"tokyo": ("berlin", "lima", "oslo")}
    chain = sites.chain("tokyo", 3)
    store = type(sites.node("oslo").store)(frames={frame.frame_id: frame for frame in chain})
    oslo = student(sites, "oslo", store=store, students_of=students_of)
    berlin = student(sites, "berlin", students_of=students_of)
    net = sites.net(berlin, oslo, apart=[("berlin", "oslo")])
    greet(berlin, "lima")
    berlin.receive("lima", announce(chain[-1]))
    net.connect("berlin", "oslo")
    net.settle()
    assert berlin.store.held("tokyo") is None

    net.wait(STALL_S)
    net.wait(STALL_S)

    assert berlin.store.held("tokyo") == Version(1, 3)


def test_who_follows_a_student_with_a_local_keyframe_gets_one_from_the_teacher(sites: Any) -> None:
    tokyo, berlin = make(sites, "tokyo", obliging_ranks=True), student(sites, "berlin")
    lima = student(sites, "lima")
    net = sites.net(tokyo, berlin, lima, apart=[("tokyo", "lima"), ("berlin", "lima")])
    for frame in sites.chain("tokyo", 3):
        tokyo.publish(frame)
        net.settle()
    local = sites.frame("tokyo", 3, num_chunks=9, signer="berlin", content="local")
    berlin.store.frames[local.frame_id] = local
    berlin.prune()
    assert [frame.frame_id for frame in berlin.store.frames_of("tokyo")] == [local.frame_id]
    num_offered = len(berlin.offered)

    net.connect("berlin", "lima")
    for step in range(4, 8):
        tokyo.publish(sites.frame("tokyo", step, base=step - 1, num_chunks=1))
        net.wait(RELAY_AFTER_S)
        berlin.prune()

    assert lima.store.held("tokyo") == berlin.store.held("tokyo") == Version(1, 7)
    assert tokyo.num_keyframes_requested <= 1
    assert len(berlin.offered) == num_offered + 4, "each version once"
    assert not any(node.refusals() for node in net.nodes.values())


def test_a_relay_that_tells_nothing_is_given_up(sites: Any) -> None:
    tokyo, oslo, lima = make(sites, "tokyo"), make(sites, "oslo"), student(sites, "lima")
    greet(lima, "berlin")
    net = sites.net(tokyo, oslo, lima, apart=[("tokyo", "lima")])
    net.settle()
    tokyo.publish(sites.frame("tokyo", 1))

    for _ in range(NEWS_FACTOR + 3):
        net.wait(RELAY_AFTER_S)
        lima.receive("berlin", Ping(1))

    assert lima.store.held("tokyo") == Version(1, 1)


def test_a_fast_teacher_does_not_wait_for_a_slow_student(sites: Any) -> None:
    berlin = student(sites, "berlin")
    greet(berlin, "tokyo")
    greet(berlin, "lima")
    for peer, num_bytes in (("tokyo", 10_000_000), ("lima", 100_000)):
        berlin.gossip.links[peer].observe(0.1, num_bytes, 1.0, 0.0)
    frame = sites.frame("tokyo", 1, num_chunks=32)
    berlin.receive("lima", announce(frame))
    berlin.take_messages()

    berlin.receive("tokyo", announce(frame))

    ((peer, want),) = berlin.take_messages()
    assert peer == "tokyo" and len(want.indices) > 1, "not one chunk at a time"


def test_a_small_frame_does_not_wait_for_a_thin_link(sites: Any) -> None:
    """Of 4 chunks a student behind a link of 1 % would send one in the time in which the teacher sends 25 times as many."""
    berlin = student(sites, "berlin")
    for peer, num_bytes in (("tokyo", 10_000_000), ("lima", 100_000)):
        greet(berlin, peer)
        berlin.gossip.links[peer].observe(0.1, num_bytes, 1.0, 0.0)
    frame = sites.frame("tokyo", 1, num_chunks=4)
    berlin.take_messages()
    berlin.receive("tokyo", announce(frame))
    ((first, want),) = berlin.take_messages()
    assert first == "tokyo" and len(want.indices) == 2, "half of them, and the other students the rest"

    berlin.receive("lima", announce(frame))
    for index in want.indices:
        berlin.receive("tokyo", Chunk(frame.frame_id, index, frame.chunks[index]))

    asked = [(peer, message.indices) for peer, message in berlin.take_messages() if isinstance(message, Want)]
    assert {peer for peer, _ in asked} == {"tokyo"}
    assert sorted((*want.indices, *(index for _, indices in asked for index in indices))) == [0, 1, 2, 3]


# --- what is asked for again and again -------------------------------------------------------------------------


def test_a_follower_is_told_once(sites: Any) -> None:
    tokyo = make(sites, "tokyo")
    greet(tokyo, "oslo")
    tokyo.publish(sites.frame("tokyo", 1))
    tokyo.take_messages()

    for _ in range(5):
        tokyo.receive("oslo", Follow("tokyo", None, 0))

    assert len(tokyo.take_messages()) == 1


def test_who_begins_its_session_anew_all_the_time_is_quarantined(sites: Any) -> None:
    tokyo = make(sites, "tokyo")
    greet(tokyo, "lima")
    hello = Hello(PROTOCOL_VERSION, "run", members_digest(sites.members), bytes(32), 0, 0)

    for _ in range(20):
        tokyo.receive("lima", Refusal("no", "no"))
        tokyo.receive("lima", hello)

    assert quarantined(tokyo) == ["lima"] and tokyo.gossip.peers_ready == ()


def test_a_reader_that_wants_nothing_more_keeps_its_frame_no_longer_than_that(sites: Any) -> None:
    old, new = sites.frame("tokyo", 1), sites.frame("tokyo", 2)
    tokyo = make(sites, "tokyo")
    greet(tokyo, "lima")
    tokyo.publish(old)
    tokyo.receive("lima", Want(old.frame_id, (0,)))
    tokyo.publish(new)

    assert old.frame_id in tokyo.gossip.frames_in_use(READER_IDLE_S - 1.0)
    assert old.frame_id not in tokyo.gossip.frames_in_use(READER_IDLE_S)
