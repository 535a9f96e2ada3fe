"""The protocol of one site, event by event, and of two that are joined by nothing but their payloads."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.checkpoint.manifest import Version
from p2pcodistill.gossip.codec import encode_message
from p2pcodistill.gossip.events import (
    AbandonFrame,
    BeginFetch,
    FetchRefused,
    FrameStored,
    IncarnationRaised,
    MemberRevoked,
    OfferFrame,
    PayloadReceived,
    PeerClosed,
    PeerOpened,
    PinSchema,
    RaiseIncarnation,
    Report,
    ServeChunk,
    Ticked,
    TrainingFinished,
)
from p2pcodistill.gossip.membership import MAX_CREDIBLE_INCARNATION, members_digest
from p2pcodistill.gossip.messages import (
    PROTOCOL_VERSION,
    Announce,
    Chunk,
    Finished,
    Gone,
    Hello,
    Lane,
    Message,
    Refusal,
    Want,
)
from p2pcodistill.telemetry.node_events import (
    FrameFetched,
    PeerConnected,
    PeerDisconnected,
    Refused,
    VersionAnnounced,
)


def hello_of(node: Any, **changes: Any) -> Hello:
    """A hello that `node` accepts."""
    hello = Hello(PROTOCOL_VERSION, "run", members_digest(node.sites.members), bytes(32), 1, 0)
    return replace(hello, **changes)


def connect(node: Any, peer: str, **changes: Any) -> list[Any]:
    """Open a session with a peer that this test plays; the actions that followed its hello."""
    node.feed(PeerOpened(peer))
    node.take_messages()
    return node.receive(peer, hello_of(node, **changes))


def announce(frame: Any) -> Announce:
    return Announce(frame.signed.body, frame.signed.signature)


def settle(*nodes: Any, max_deliveries: int = 10_000) -> int:
    """Deliver everything between the nodes, in order, until nothing more is sent; returns how much was delivered."""
    by_name = {node.name: node for node in nodes}
    for num_delivered in range(max_deliveries):
        sender = next((node for node in nodes if node.sent), None)
        if sender is None:
            return num_delivered
        action = sender.sent.popleft()
        by_name[action.peer].feed(PayloadReceived(sender.name, action.payload))
    raise AssertionError("the nodes do not come to rest")


def open_between(a: Any, b: Any) -> None:
    a.feed(PeerOpened(b.name))
    b.feed(PeerOpened(a.name))


def close_between(a: Any, b: Any) -> None:
    for node, other in ((a, b), (b, a)):
        node.sent.clear()
        node.feed(PeerClosed(other.name, "cut"))


@pytest.fixture
def student(sites: Any) -> Any:
    """Berlin, which learns from tokyo."""
    return sites.node("berlin", teachers=("tokyo",))


@pytest.fixture
def teacher(sites: Any) -> Any:
    """Tokyo, which teaches berlin."""
    return sites.node("tokyo", students=("berlin",))


# --- sessions ------------------------------------------------------------------------------------------------


def test_a_session_begins_with_what_is_known(sites: Any) -> None:
    node = sites.node(
        "berlin",
        teachers=("tokyo",),
        incarnation=4,
        held={"tokyo": Version(7, 9)},
        topology_digest=b"t" * 32,
    )

    node.feed(PeerOpened("tokyo"))

    digest = members_digest(sites.members)
    assert node.take_messages() == [("tokyo", Hello(PROTOCOL_VERSION, "run", digest, b"t" * 32, 4, 7))]
    assert node.gossip.peers_ready == ()


def test_peers_come_and_go(student: Any) -> None:
    connect(student, "tokyo")
    assert student.gossip.peers_ready == ("tokyo",)
    student.feed(PeerClosed("tokyo", "unplugged"))
    student.feed(PeerClosed("tokyo", "unplugged"))

    assert student.gossip.peers_ready == ()
    assert student.events == [PeerConnected("tokyo"), PeerDisconnected("tokyo", "unplugged")]


def test_a_session_that_replaces_another_starts_anew(student: Any) -> None:
    connect(student, "tokyo")
    connect(student, "tokyo")

    assert student.gossip.peers_ready == ("tokyo",)
    assert [type(event) for event in student.events] == [PeerConnected, PeerDisconnected, PeerConnected]


@pytest.mark.parametrize(
    "message", [Finished("tokyo", 1, bytes(64)), Gone("00" * 32), Refusal("malformed", "why")]
)
def test_nothing_counts_before_the_hello(student: Any, message: Message) -> None:
    student.feed(PeerOpened("tokyo"))

    student.receive("tokyo", message)
    student.feed(PayloadReceived("tokyo", (b"\xc1",)))
    assert student.refusals() == [("tokyo", "malformed")] * 2
    assert student.gossip.peers_ready == ()

    student.receive("tokyo", hello_of(student))
    assert student.gossip.peers_ready == ("tokyo",)


def test_a_mismatch_is_answered_with_its_reason_and_then_with_silence(sites: Any) -> None:
    node = sites.node("berlin", teachers=("tokyo",), students=("tokyo",))
    node.publish(sites.frame("berlin", 1))

    connect(node, "tokyo", run="another run")

    ((peer, refusal),) = node.take_messages()
    assert peer == "tokyo"
    assert isinstance(refusal, Refusal)
    assert refusal.reason == "hello-mismatch"
    assert "'another run'" in refusal.why
    assert node.events == [Refused("tokyo", "hello-mismatch", refusal.why)]

    assert node.receive("tokyo", hello_of(node)) == []
    assert node.receive("tokyo", announce(sites.frame("tokyo", 1))) == []
    assert node.publish(sites.frame("berlin", 2)) == []
    assert node.feed(TrainingFinished()) == []
    assert node.feed(PeerClosed("tokyo", "gone")) == []

    connect(node, "tokyo")
    assert [type(message) for _, message in node.take_messages()] == [Announce, Finished]


def test_being_refused_is_reported_and_ends_the_session(student: Any) -> None:
    connect(student, "tokyo")

    student.receive("tokyo", Refusal("hello-mismatch", "berlin has another topology"))
    student.receive("tokyo", Gone("00" * 32))

    why = "tokyo refuses us: berlin has another topology"
    assert student.events[1:] == [
        PeerDisconnected("tokyo", why),
        Refused("tokyo", "hello-mismatch", why),
    ]
    assert student.gossip.peers_ready == ()
    connect(student, "tokyo")
    assert student.gossip.peers_ready == ("tokyo",)


def test_two_sites_that_differ_refuse_each_other(sites: Any) -> None:
    a = sites.node("berlin", teachers=("tokyo",))
    b = sites.node("tokyo", students=("berlin",), topology_digest=b"x" * 32)
    open_between(a, b)
    settle(a, b)

    assert a.refusals() == [("tokyo", "hello-mismatch")]
    assert b.refusals() == [("berlin", "hello-mismatch")]


def test_payloads_outside_a_session_are_ignored(student: Any, sites: Any) -> None:
    assert student.receive("tokyo", hello_of(student)) == []
    connect(student, "tokyo")
    student.feed(PeerClosed("tokyo", "gone"))

    assert student.receive("tokyo", announce(sites.frame("tokyo", 1))) == []


def test_a_second_hello_is_malformed(student: Any) -> None:
    connect(student, "tokyo")

    student.receive("tokyo", hello_of(student))

    assert student.refusals() == [("tokyo", "malformed")]
    assert student.gossip.peers_ready == ("tokyo",)


# --- incarnations --------------------------------------------------------------------------------------------


def kinds(actions: list[Any]) -> list[str]:
    return [type(action).__name__ for action in actions]


def test_a_forgotten_life_raises_the_incarnation_before_anything_is_announced(sites: Any) -> None:
    node = sites.node("tokyo", students=("berlin",))
    node.feed(IncarnationRaised(1))
    node.store.incarnation = 1
    node.publish(sites.frame("tokyo", 5, content="after the disk was lost"))

    actions = connect(node, "berlin", known_incarnation_of_you=3)

    assert kinds(actions) == ["Report", "RaiseIncarnation", "SendPayload"]
    assert actions[1] == RaiseIncarnation(4)
    assert node.gossip.incarnation == 4
    ((_, announced),) = node.take_messages()
    assert isinstance(announced, Announce)
    assert announced.body == node.store.frames_of("tokyo")[-1].signed.body
    assert node.store.held("tokyo") == Version(4, 5)


def test_an_equal_incarnation_is_a_forgotten_life_if_nothing_was_published_under_it(sites: Any) -> None:
    node = sites.node("tokyo", students=("berlin",), incarnation=2)

    assert RaiseIncarnation(3) in connect(node, "berlin", known_incarnation_of_you=2)


def test_an_incarnation_that_anybody_was_told_may_be_known_to_others(sites: Any) -> None:
    node = sites.node("tokyo", students=("berlin", "lima"), incarnation=1)
    connect(node, "lima")
    node.publish(sites.frame("tokyo", 3))

    assert RaiseIncarnation(2) not in connect(node, "lima", known_incarnation_of_you=1)
    assert RaiseIncarnation(2) not in connect(node, "berlin", known_incarnation_of_you=1), "lima told it"
    past = sites.frame("tokyo", 9, content="of a past life")
    shown = node.receive("berlin", Announce(past.signed.body, past.signed.signature))
    assert RaiseIncarnation(2) in shown, "but what tokyo signed and has no memory of is a proof"


def test_what_is_remembered_raises_nothing(sites: Any) -> None:
    own = [sites.frame("tokyo", 3, incarnation=2).signed]
    node = sites.node("tokyo", students=("berlin",), incarnation=2, own_frames=own)

    actions = connect(node, "berlin", known_incarnation_of_you=2)

    assert kinds(actions) == ["Report", "SendPayload"]
    assert node.gossip.incarnation == 2


def test_nobody_makes_a_site_use_up_its_incarnations(sites: Any) -> None:
    node = sites.node("tokyo", students=("berlin",), incarnation=1)

    connect(node, "berlin", known_incarnation_of_you=MAX_CREDIBLE_INCARNATION + 1)

    assert node.refusals() == [("berlin", "hello-mismatch")]
    assert node.gossip.incarnation == 1


def test_an_incarnation_that_the_node_raised_is_said(student: Any) -> None:
    student.feed(IncarnationRaised(6))
    student.feed(PeerOpened("tokyo"))

    ((_, hello),) = student.take_messages()
    assert isinstance(hello, Hello)
    assert hello.incarnation == 6


# --- announcements -------------------------------------------------------------------------------------------


def test_the_newest_own_frame_is_announced_to_ready_students_only(sites: Any) -> None:
    node = sites.node("berlin", teachers=("lima",), students=("tokyo",))
    first, second, third = (sites.frame("berlin", step) for step in (10, 20, 30))
    assert node.publish(first) == []
    connect(node, "lima")
    assert node.take_messages() == []

    connect(node, "tokyo")
    assert node.take_messages() == [("tokyo", announce(first))]
    node.publish(third)
    assert node.take_messages() == [("tokyo", announce(third))]
    node.publish(second)
    assert node.take_messages() == []


def test_an_announcement_is_reported_pinned_and_fetched(student: Any, sites: Any) -> None:
    connect(student, "tokyo")
    first, second = sites.frame("tokyo", 10), sites.frame("tokyo", 20, incarnation=2)

    actions = student.receive("tokyo", announce(first))
    manifest = first.signed.manifest
    assert actions[:3] == [
        PinSchema("tokyo", manifest.schema_hash),
        Report(VersionAnnounced("tokyo", 1, 10, manifest.num_bytes)),
        BeginFetch(first.signed),
    ]
    assert student.take_messages() == [("tokyo", Want(first.frame_id, (0, 1, 2)))]
    assert student.receive("tokyo", announce(second)) == [
        Report(VersionAnnounced("tokyo", 2, 20, manifest.num_bytes))
    ]
    assert student.gossip.frames_in_use(0.0) == {first.frame_id}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"signer": "lima"}, "bad-signature"),
        ({"run": "other"}, "replayed"),
        ({"step": 9}, "replayed"),
        ({"step": 10, "content": "other"}, "replayed"),
        ({"schema": "other"}, "wrong-schema"),
        ({"chunk_bytes": 1 << 20}, "oversized"),
        ({"num_chunks": 65}, "oversized"),
    ],
)
def test_a_refused_announcement_is_counted_and_changes_nothing(
    student: Any, sites: Any, change: dict[str, Any], reason: str
) -> None:
    connect(student, "tokyo")
    student.receive("tokyo", announce(sites.frame("tokyo", 10)))
    in_use = student.gossip.frames_in_use(0.0)

    student.receive("tokyo", announce(sites.frame(**({"origin": "tokyo", "step": 11} | change))))

    assert student.refusals() == [("tokyo", reason)]
    assert student.versions_announced() == [("tokyo", Version(1, 10))]
    assert student.gossip.frames_in_use(0.0) == in_use


def test_a_teacher_that_comes_back_with_another_schema_is_pinned_again_and_fetched(
    teacher: Any, student: Any, sites: Any
) -> None:
    first, mended = sites.frame("tokyo", 10), sites.frame("tokyo", 1, incarnation=2, schema="wider")
    teacher.publish(first)
    open_between(teacher, student)
    settle(teacher, student)
    restarted = sites.node("berlin", teachers=("tokyo",), store=student.store)
    open_between(teacher, restarted)

    teacher.publish(mended)
    settle(teacher, restarted)

    assert restarted.offered == [mended.signed]
    assert restarted.refusals() == []
    assert restarted.store.pins == {"tokyo": mended.signed.manifest.schema_hash}


def test_who_teaches_nothing_here_has_nothing_to_announce(student: Any, sites: Any) -> None:
    connect(student, "lima")

    student.receive("lima", announce(sites.frame("lima", 10)))

    assert student.refusals() == [("lima", "unknown-peer")]
    assert student.versions_announced() == []


# --- frames on their way ---------------------------------------------------------------------------------------


def test_a_checkpoint_travels(teacher: Any, student: Any, sites: Any) -> None:
    frame = sites.frame("tokyo", 50, num_chunks=9)
    teacher.publish(frame)
    student.now_s = 3.0
    open_between(teacher, student)
    settle(teacher, student)

    manifest = frame.signed.manifest
    assert student.offered == [frame.signed]
    assert student.store.frames[frame.frame_id] == frame
    assert student.events == [
        PeerConnected("tokyo"),
        VersionAnnounced("tokyo", 1, 50, manifest.num_bytes),
        FrameFetched("tokyo", 1, 50, "keyframe", manifest.num_bytes, num_resent_bytes=0, duration_s=0.0),
    ]
    assert teacher.refusals() == student.refusals() == []
    assert teacher.num_chunks_served == 9
    assert student.gossip.frames_in_use(3.0) == set()

    teacher.publish(sites.frame("tokyo", 60, num_chunks=2))
    settle(teacher, student)
    assert [signed.manifest.version.step for signed in student.offered] == [50, 60]


def test_a_fetch_takes_as_long_as_it_takes(student: Any, sites: Any) -> None:
    frame = sites.frame("tokyo", 50, num_chunks=1)
    connect(student, "tokyo")
    student.receive("tokyo", announce(frame))
    student.now_s = 2.5

    actions = student.receive("tokyo", Chunk(frame.frame_id, 0, frame.chunks[0]))

    assert (
        Report(FrameFetched("tokyo", 1, 50, "keyframe", 1000, num_resent_bytes=0, duration_s=2.5)) in actions
    )
    assert actions[-1] == OfferFrame(frame.signed)


def test_after_a_cut_only_missing_chunks_travel_again(teacher: Any, student: Any, sites: Any) -> None:
    frame = sites.frame("tokyo", 50, num_chunks=9)
    teacher.publish(frame)
    open_between(teacher, student)
    while len(student.store.partials.get(frame.frame_id, (None, ()))[1]) < 6:
        settle_one(teacher, student)
    num_served_before = teacher.num_chunks_served
    close_between(teacher, student)

    open_between(teacher, student)
    settle(teacher, student)

    assert student.offered == [frame.signed]
    assert teacher.num_chunks_served - num_served_before == 3
    assert student.versions_announced() == [("tokyo", Version(1, 50))]
    assert student.refusals() == []


def settle_one(*nodes: Any) -> None:
    by_name = {node.name: node for node in nodes}
    sender = next(node for node in nodes if node.sent)
    action = sender.sent.popleft()
    by_name[action.peer].feed(PayloadReceived(sender.name, action.payload))


def test_a_restarted_student_wants_only_what_it_lacks(teacher: Any, student: Any, sites: Any) -> None:
    frame = sites.frame("tokyo", 50, num_chunks=4)
    teacher.publish(frame)
    connect(student, "tokyo")
    student.receive("tokyo", announce(frame))
    for index in (0, 2):
        student.receive("tokyo", Chunk(frame.frame_id, index, frame.chunks[index]))

    restarted = sites.node("berlin", teachers=("tokyo",), store=student.store)
    open_between(teacher, restarted)
    settle(teacher, restarted)

    assert restarted.offered == [frame.signed]
    assert teacher.num_chunks_served == 2
    assert not any(isinstance(event, Refused) for event in restarted.events)


def test_what_the_store_holds_is_not_fetched_again(teacher: Any, student: Any, sites: Any) -> None:
    frame = sites.frame("tokyo", 50)
    teacher.publish(frame)
    open_between(teacher, student)
    settle(teacher, student)

    restarted = sites.node("berlin", teachers=("tokyo",), store=student.store)
    open_between(teacher, restarted)
    settle(teacher, restarted)

    assert restarted.offered == []
    assert restarted.versions_announced() == []
    assert teacher.num_chunks_served == 3


def test_bad_chunks_are_counted_not_stored_and_fetched_again(student: Any, sites: Any) -> None:
    frame = sites.frame("tokyo", 50, num_chunks=2)
    connect(student, "tokyo")
    student.receive("tokyo", announce(frame))
    student.receive("tokyo", Chunk(frame.frame_id, 0, bytes(len(frame.chunks[0]))))

    assert student.refusals() == [("tokyo", "bad-checksum")]
    for index in (0, 1):
        student.receive("tokyo", Chunk(frame.frame_id, index, frame.chunks[index]))
    assert student.offered == [frame.signed]


def test_lost_chunks_are_wanted_again_after_the_stall_timeout(student: Any, sites: Any) -> None:
    frame = sites.frame("tokyo", 50, num_chunks=2)
    connect(student, "tokyo")
    student.receive("tokyo", announce(frame))
    student.receive("tokyo", Chunk(frame.frame_id, 1, frame.chunks[1]))
    student.take_messages()

    student.now_s = 9.9
    student.feed(Ticked())
    assert student.take_messages() == []
    student.now_s = 10.0
    student.feed(Ticked())

    assert student.take_messages() == [("tokyo", Want(frame.frame_id, (0,)))]


def test_a_frame_that_the_store_refuses_is_reported_and_the_next_is_fetched(sites: Any) -> None:
    gossip = sites.node("berlin", teachers=("tokyo",)).gossip
    first, second = sites.frame("tokyo", 1), sites.frame("tokyo", 2)
    hello = hello_of(sites.node("berlin"))
    for event in (PeerOpened("tokyo"), PayloadReceived("tokyo", encode_message(hello))):
        gossip.handle(event, 0.0)
    gossip.handle(PayloadReceived("tokyo", encode_message(announce(first))), 0.0)

    refused = FetchRefused(first.frame_id, "oversized", "a frame of 5 GB is over the cap")
    assert gossip.handle(refused, 0.0) == [
        AbandonFrame(first.frame_id),
        Report(Refused("tokyo", "oversized", "a frame of 5 GB is over the cap")),
    ]
    assert gossip.handle(refused, 0.0) == []
    actions = gossip.handle(PayloadReceived("tokyo", encode_message(announce(second))), 0.0)
    assert actions[-1] == BeginFetch(second.signed)


# --- serving -------------------------------------------------------------------------------------------------


def test_wants_are_served_one_chunk_an_action(teacher: Any, sites: Any) -> None:
    frame = sites.frame("tokyo", 50)
    teacher.publish(frame)
    connect(teacher, "berlin")

    assert teacher.receive("berlin", Want(frame.frame_id, (0, 2))) == [
        ServeChunk("berlin", frame.frame_id, 0),
        ServeChunk("berlin", frame.frame_id, 2),
    ]
    assert [action.lane for action in teacher.sent] == [Lane.CONTROL, Lane.BULK, Lane.BULK]
    assert teacher.gossip.frames_in_use(0.0) == {frame.frame_id}


def test_unknown_frames_are_gone_and_unknown_chunks_malformed(teacher: Any, sites: Any) -> None:
    frame = sites.frame("tokyo", 50)
    teacher.publish(frame)
    connect(teacher, "berlin")
    teacher.take_messages()

    teacher.receive("berlin", Want("00" * 32, (0,)))
    assert teacher.take_messages() == [("berlin", Gone("00" * 32))]
    assert kinds(teacher.receive("berlin", Want(frame.frame_id, (3,)))) == ["Report"]
    assert teacher.refusals() == [("berlin", "malformed")]


def test_a_want_beyond_the_window_is_refused_and_nothing_is_served(teacher: Any, sites: Any) -> None:
    frame = sites.frame("tokyo", 50, num_chunks=9)
    teacher.publish(frame)
    connect(teacher, "berlin")

    teacher.receive("berlin", Want(frame.frame_id, tuple(range(8))))

    assert teacher.refusals() == [("berlin", "malformed")]
    assert teacher.num_chunks_served == 0
    newer = sites.frame("tokyo", 60)
    teacher.publish(newer)
    assert teacher.gossip.frames_in_use(0.0) == {newer.frame_id}


def test_a_frame_is_kept_for_its_reader_and_gone_for_others(teacher: Any, student: Any, sites: Any) -> None:
    old, new = sites.frame("tokyo", 50, num_chunks=9), sites.frame("tokyo", 60)
    teacher.publish(old)
    open_between(teacher, student)
    while not teacher.num_chunks_served:
        settle_one(teacher, student)

    teacher.publish(new)
    teacher.prune()
    assert old.frame_id in teacher.store.frames
    settle(teacher, student)
    assert student.offered == [old.signed, new.signed]

    teacher.prune()
    assert list(teacher.store.frames) == [new.frame_id]


def test_a_reader_that_went_away_keeps_its_frame_for_a_minute(teacher: Any, sites: Any) -> None:
    old, new = sites.frame("tokyo", 50), sites.frame("tokyo", 60)
    teacher.publish(old)
    connect(teacher, "berlin")
    teacher.receive("berlin", Want(old.frame_id, (0,)))
    teacher.publish(new)
    teacher.now_s = 1000.0
    assert teacher.gossip.frames_in_use(1000.0) == {old.frame_id, new.frame_id}

    teacher.feed(PeerClosed("berlin", "unplugged"))

    assert teacher.gossip.frames_in_use(1059.0) == {old.frame_id, new.frame_id}
    assert teacher.gossip.frames_in_use(1060.0) == {new.frame_id}


def test_fetched_frames_are_served_like_own_ones(teacher: Any, student: Any, sites: Any) -> None:
    frame = sites.frame("tokyo", 50)
    teacher.publish(frame)
    open_between(teacher, student)
    settle(teacher, student)
    connect(student, "lima")

    assert student.receive("lima", Want(frame.frame_id, (1,))) == [ServeChunk("lima", frame.frame_id, 1)]


def test_a_frame_that_the_store_has_lost_is_gone_for_the_student(
    teacher: Any, student: Any, sites: Any
) -> None:
    old, new = sites.frame("tokyo", 50), sites.frame("tokyo", 60)
    teacher.publish(old)
    open_between(teacher, student)
    teacher.store.frames.clear()
    settle(teacher, student)
    assert student.offered == []
    assert student.store.partials == {}

    teacher.publish(new)
    settle(teacher, student)

    assert student.offered == [new.signed]


# --- the end -------------------------------------------------------------------------------------------------


def test_finished_is_said_to_all_and_to_those_who_come_later(sites: Any) -> None:
    node = sites.node("berlin", teachers=("tokyo",), students=("tokyo", "lima"))
    connect(node, "tokyo")

    node.feed(TrainingFinished())
    assert node.take_messages() == [("tokyo", sites.finished("berlin"))]
    connect(node, "lima")
    assert node.take_messages() == [("lima", sites.finished("berlin"))]


def test_the_students_have_finished_when_each_has_said_so(sites: Any) -> None:
    node = sites.node("berlin", teachers=("tokyo",), students=("tokyo", "lima"))
    connect(node, "tokyo")
    node.receive("tokyo", sites.finished("tokyo", incarnation=1))
    node.feed(PeerClosed("tokyo", "it is done"))
    assert not node.gossip.students_finished

    connect(node, "lima")
    assert not node.gossip.students_finished
    node.receive("lima", sites.finished("lima", incarnation=1))

    assert node.gossip.students_finished


def test_the_teachers_are_told_when_each_has_a_session_or_has_finished_itself(sites: Any) -> None:
    node = sites.node("berlin", teachers=("tokyo", "lima", "oslo"))
    connect(node, "tokyo")
    connect(node, "lima")
    node.receive("lima", sites.finished("lima", incarnation=1))
    node.feed(TrainingFinished())
    assert not node.gossip.teachers_told, "oslo is not there"

    node.feed(PeerOpened("oslo"))
    assert not node.gossip.teachers_told, "it has not said hello"
    connect(node, "oslo")
    assert ("oslo", sites.finished("berlin")) in node.take_messages()
    node.feed(PeerClosed("lima", "it is done"))
    assert node.gossip.teachers_told

    node.feed(PeerClosed("tokyo", "the line broke"))
    assert not node.gossip.teachers_told, "it may not have heard"
    node.feed(MemberRevoked("tokyo", "gone"))
    assert node.gossip.teachers_told


def test_a_site_without_students_waits_for_nobody(student: Any) -> None:
    assert student.gossip.students_finished


# --- whatever arrives ------------------------------------------------------------------------------------------


@given(st.sampled_from(["no session", "opened", "ready"]), st.lists(st.binary(max_size=100), max_size=3))
def test_no_payload_raises(sites: Any, state: str, parts: list[bytes]) -> None:
    node = sites.node("berlin", teachers=("tokyo",), students=("tokyo",))
    if state != "no session":
        node.feed(PeerOpened("tokyo"))
    if state == "ready":
        node.receive("tokyo", hello_of(node))
    num_before = len(node.events)

    node.feed(PayloadReceived("tokyo", tuple(parts)))

    assert len(node.events) - num_before <= 1
    assert node.gossip.peers_ready == (("tokyo",) if state == "ready" else ())


def test_events_about_unknown_frames_change_nothing(student: Any) -> None:
    assert student.feed(FrameStored("00" * 32, None)) == []


def test_the_same_events_give_the_same_actions(sites: Any) -> None:
    def run() -> list[Any]:
        nodes = [sites.node("berlin", teachers=("tokyo",)), sites.node("tokyo", students=("berlin",))]
        student, teacher = nodes
        teacher.publish(sites.frame("tokyo", 1, num_chunks=7))
        open_between(teacher, student)
        settle(*nodes)
        return [*student.events, *student.offered, *teacher.events]

    assert run() == run()
    assert len(run()) == 5


@pytest.mark.parametrize(
    "change",
    [{"site": "rome"}, {"teachers": ("rome",)}, {"students": ("berlin",)}, {"teachers": ("berlin",)}],
)
def test_a_site_and_its_neighbours_must_be_members(sites: Any, change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="members of the run"):
        sites.node("berlin", **change)
