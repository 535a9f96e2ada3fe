"""Keyframes and delta frames between a teacher and its student: steady state, catching up, and what comes in between."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from p2pcodistill.checkpoint.chain import MAX_CHAIN_FRAMES
from p2pcodistill.checkpoint.manifest import MIN_CHUNK_BYTES, Version
from p2pcodistill.gossip.codec import decode_message
from p2pcodistill.gossip.events import (
    ChainBroken,
    DropChain,
    PayloadReceived,
    PeerClosed,
    PeerOpened,
    RequestKeyframe,
    TrainingFinished,
)
from p2pcodistill.gossip.membership import members_digest
from p2pcodistill.gossip.messages import (
    PROTOCOL_VERSION,
    Announce,
    CatchUp,
    Gone,
    Hello,
    Lane,
    Message,
    Want,
)
from p2pcodistill.telemetry.node_events import VersionAnnounced


class Pair:
    """Tokyo teaches berlin, over queues; `num_said` counts the messages that were delivered."""

    def __init__(self, sites: Any, **settings: Any) -> None:
        self.sites = sites
        self.teacher = sites.node("tokyo", students=("berlin",), **settings)
        self.student = sites.node("berlin", teachers=("tokyo",))
        self.num_said: Counter[type[Message]] = Counter()

    def open(self, *, and_talk: bool = True) -> None:
        """Begin a session; as far as it goes without chunks, unless that is left to the test."""
        for node, peer in ((self.teacher, "berlin"), (self.student, "tokyo")):
            node.feed(PeerOpened(peer))
        if and_talk:
            self.deliver(max_chunks=0)

    def close(self) -> None:
        for node, peer in ((self.teacher, "berlin"), (self.student, "tokyo")):
            node.sent.clear()
            node.feed(PeerClosed(peer, "cut"))

    def deliver(self, *, max_chunks: int = 1_000_000) -> None:
        """Deliver what is sent, and what comes of it, until so many chunks have gone, or nothing more is sent."""
        while True:
            held_back = []
            for node, other in ((self.teacher, self.student), (self.student, self.teacher)):
                while node.sent:
                    action = node.sent.popleft()
                    if action.lane is Lane.BULK and max_chunks == 0:
                        held_back.append((node, action))
                        continue
                    max_chunks -= action.lane is Lane.BULK
                    self.num_said[type(decode_message(action.payload))] += 1
                    other.feed(PayloadReceived(node.name, action.payload))
            for node, action in held_back:
                node.sent.append(action)
            if sum(len(node.sent) for node in (self.teacher, self.student)) == len(held_back):
                return

    def publish(self, *frames: Any) -> None:
        for frame in frames:
            self.teacher.publish(frame)
            self.teacher.prune()

    def assert_level(self) -> None:
        """The student holds what the teacher published last, nothing was refused, and it is at rest."""
        newest = self.teacher.store.frames_of("tokyo")[-1].version
        assert self.student.store.held("tokyo") == newest
        assert self.student.offered[-1].version == newest
        assert self.student.refusals() == self.teacher.refusals() == []
        assert self.student.store.partials == {}


@pytest.fixture
def pair(sites: Any) -> Pair:
    return Pair(sites)


def steps(node: Any) -> list[int]:
    return [signed.version.step for signed in node.offered]


# --- going on --------------------------------------------------------------------------------------------------------


def test_delta_frames_follow_a_keyframe_and_nobody_asks_for_anything(pair: Pair, sites: Any) -> None:
    pair.open()
    for frame in sites.chain("tokyo", 5):
        pair.publish(frame)
        pair.deliver()

    pair.assert_level()
    assert steps(pair.student) == [0, 1, 2, 3, 4, 5]
    assert pair.num_said[Announce] == 6
    assert pair.num_said[CatchUp] == pair.teacher.num_keyframes_requested == 0


def test_delta_frames_announced_during_a_download_are_fetched_after_it_in_order(
    pair: Pair, sites: Any
) -> None:
    chain = sites.chain("tokyo", 4)
    pair.open()
    pair.publish(chain[0])
    pair.deliver(max_chunks=2)
    pair.publish(*chain[1:])
    pair.deliver()

    pair.assert_level()
    assert steps(pair.student) == [0, 1, 2, 3, 4]
    assert pair.num_said[CatchUp] == 0


def test_a_new_launch_overtakes_the_delta_frames_that_are_waiting(pair: Pair, sites: Any) -> None:
    chain = sites.chain("tokyo", 4)
    relaunched = [sites.frame("tokyo", 2, incarnation=2, num_chunks=9)]
    relaunched += [sites.frame("tokyo", 3, incarnation=2, base=2)]
    pair.open()
    pair.publish(chain[0])
    pair.deliver(max_chunks=2)
    pair.publish(*chain[1:], *relaunched)
    pair.deliver()

    pair.assert_level()
    assert [signed.version for signed in pair.student.offered] == [
        Version(1, 0),
        Version(2, 2),
        Version(2, 3),
    ]


def test_a_restarted_student_goes_on_from_what_it_holds(pair: Pair, sites: Any) -> None:
    chain = sites.chain("tokyo", 3)
    pair.open()
    pair.publish(*chain[:2])
    pair.deliver()
    pair.close()

    pair.student = sites.node("berlin", teachers=("tokyo",), store=pair.student.store)
    pair.publish(*chain[2:])
    pair.open()
    pair.deliver()

    pair.assert_level()
    assert steps(pair.student) == [2, 3]
    assert pair.num_said[CatchUp] == 1
    assert pair.teacher.num_keyframes_requested == 0


def test_a_restarted_teacher_serves_the_chain_that_its_store_holds(pair: Pair, sites: Any) -> None:
    pair.publish(*sites.chain("tokyo", 2))
    pair.teacher = sites.node(
        "tokyo", students=("berlin",), store=pair.teacher.store, obliging_ranks=True, incarnation=2
    )
    pair.student.store.frames = {f.frame_id: f for f in sites.chain("tokyo", 0)}
    pair.student = sites.node("berlin", teachers=("tokyo",), store=pair.student.store)
    pair.open()
    pair.deliver()

    pair.assert_level()
    assert steps(pair.student) == [1, 2]
    assert pair.teacher.num_keyframes_requested == 0


def test_with_nothing_new_nothing_is_asked_in_a_new_session(pair: Pair, sites: Any) -> None:
    pair.publish(*sites.chain("tokyo", 0))
    pair.open()
    pair.deliver()
    pair.publish(*sites.chain("tokyo", 3)[1:])
    pair.deliver()
    before = pair.num_said[Want]
    for _ in range(3):
        pair.close()
        pair.open()
        pair.deliver()

    assert pair.num_said[Want] == before
    assert pair.num_said[CatchUp] == 0


# --- newcomers -------------------------------------------------------------------------------------------------------


def test_a_newcomer_gets_a_keyframe_made_for_it_and_then_delta_frames(sites: Any) -> None:
    pair = Pair(sites, obliging_ranks=True)
    chain = sites.chain("tokyo", 4)
    pair.publish(*chain[:4])
    pair.open()
    pair.deliver()

    pair.assert_level()
    assert pair.teacher.num_keyframes_requested == 1
    assert steps(pair.student) == [3]
    assert [frame.base for frame in pair.student.store.frames.values()] == [None]

    pair.publish(chain[4])
    pair.deliver()
    pair.assert_level()
    assert steps(pair.student) == [3, 4]
    assert pair.num_said[CatchUp] == 1


def test_one_keyframe_serves_all_that_wait_for_it_and_nobody_else_is_told(sites: Any) -> None:
    teacher = sites.node("tokyo", students=("berlin", "lima"))
    for frame in sites.chain("tokyo", 3):
        teacher.publish(frame)
    hello = Hello(PROTOCOL_VERSION, "run", members_digest(sites.members), bytes(32), 1, 0)
    for peer in ("berlin", "lima"):
        teacher.feed(PeerOpened(peer))
        teacher.receive(peer, hello)
    teacher.take_messages()

    actions = [*teacher.receive("berlin", CatchUp(None)), *teacher.receive("berlin", CatchUp(None))]
    assert actions == [RequestKeyframe()]
    teacher.receive("lima", CatchUp(Version(1, 2)))
    ((peer, answer),) = teacher.take_messages()
    assert (peer, answer.num_more) == ("lima", 0)

    keyframe = teacher.keyframe_of("tokyo")
    teacher.publish(keyframe)
    assert teacher.take_messages() == [
        ("berlin", Announce(keyframe.signed.body, keyframe.signed.signature, 0))
    ]
    assert teacher.receive("lima", CatchUp(None)) != []
    assert teacher.take_messages() == [("lima", Announce(keyframe.signed.body, keyframe.signed.signature, 0))]
    assert teacher.num_keyframes_requested == 1


def test_a_newcomer_waits_for_ranks_that_do_not_oblige_only_until_something_is_published(
    pair: Pair, sites: Any
) -> None:
    chain = sites.chain("tokyo", 4)
    pair.publish(*chain[:4])
    pair.open()
    pair.deliver()
    assert pair.teacher.is_keyframe_wanted
    assert pair.student.offered == []

    pair.publish(chain[4])
    pair.deliver()

    pair.assert_level()
    assert steps(pair.student) == [0, 1, 2, 3, 4]
    assert pair.teacher.num_keyframes_requested == 1


def test_a_keyframe_that_does_not_come_is_requested_again(pair: Pair, sites: Any) -> None:
    chain = sites.chain("tokyo", 19)
    pair.publish(*chain[:18])
    assert pair.teacher.store.chain("tokyo") == [], "the keyframe was too far back to keep"
    pair.open()
    for frame in chain[18:20]:
        pair.deliver()
        assert pair.teacher.num_keyframes_requested == 1
        pair.publish(frame)
    pair.deliver()
    assert pair.teacher.num_keyframes_requested == 2

    pair.publish(pair.teacher.keyframe_of("tokyo"))
    pair.deliver()
    pair.assert_level()
    assert steps(pair.student) == [19]


def test_who_comes_after_the_end_is_given_what_there_is(pair: Pair, sites: Any) -> None:
    pair.publish(*sites.chain("tokyo", 3))
    pair.teacher.feed(TrainingFinished())
    pair.open()
    pair.deliver()

    pair.assert_level()
    assert pair.teacher.num_keyframes_requested == 0


def test_who_waits_at_the_end_is_given_what_there_is(pair: Pair, sites: Any) -> None:
    pair.publish(*sites.chain("tokyo", 3))
    pair.open()
    pair.deliver()
    assert pair.student.offered == []

    pair.teacher.feed(TrainingFinished())
    pair.deliver()

    pair.assert_level()


def test_only_students_may_ask(sites: Any) -> None:
    node = sites.node("berlin", teachers=("tokyo",))
    node.publish(sites.frame("berlin", 1))
    node.feed(PeerOpened("tokyo"))
    node.receive("tokyo", Hello(PROTOCOL_VERSION, "run", members_digest(sites.members), bytes(32), 1, 0))

    node.receive("tokyo", CatchUp(None))

    assert node.refusals() == [("tokyo", "unknown-peer")]


# --- those who fell behind -------------------------------------------------------------------------------------------


def test_who_missed_a_few_versions_gets_their_delta_frames(pair: Pair, sites: Any) -> None:
    chain = sites.chain("tokyo", 6)
    pair.open()
    pair.publish(*chain[:2])
    pair.deliver()
    pair.close()
    pair.publish(*chain[2:6])
    pair.open()
    pair.deliver()

    pair.assert_level()
    assert steps(pair.student) == [0, 1, 2, 3, 4, 5]
    assert pair.teacher.num_keyframes_requested == 0
    announced = [event.step for event in pair.student.events if isinstance(event, VersionAnnounced)]
    assert announced == [0, 1, 5]

    pair.publish(chain[6])
    pair.deliver()
    pair.assert_level()
    assert pair.num_said[CatchUp] == 1


def test_who_missed_many_gets_a_keyframe(sites: Any) -> None:
    pair = Pair(sites, obliging_ranks=True)
    chain = sites.chain("tokyo", 12)
    pair.open()
    pair.publish(*chain[:2])
    pair.deliver()
    pair.close()
    pair.publish(*chain[2:])
    pair.open()
    pair.deliver()

    pair.assert_level()
    assert steps(pair.student) == [0, 1, 12]


@pytest.mark.parametrize("num_chunks_before_the_cut", range(9))
def test_a_path_that_is_cut_goes_on_in_the_next_session(
    pair: Pair, sites: Any, num_chunks_before_the_cut: int
) -> None:
    chain = sites.chain("tokyo", 6)
    pair.open()
    pair.publish(*chain[:2])
    pair.deliver()
    pair.close()
    pair.publish(*chain[2:6])
    num_served = pair.teacher.num_chunks_served
    pair.open()
    pair.deliver(max_chunks=num_chunks_before_the_cut)
    pair.close()
    pair.publish(chain[6])
    pair.open()
    pair.deliver()

    pair.assert_level()
    assert steps(pair.student) == [0, 1, 2, 3, 4, 5, 6]
    # Five frames of two chunks, and what was on its way when the link was cut.
    assert 10 <= pair.teacher.num_chunks_served - num_served <= 12


def test_a_session_cut_in_the_middle_of_the_announcement_of_a_path_asks_anew(pair: Pair, sites: Any) -> None:
    chain = sites.chain("tokyo", 5)
    pair.open()
    pair.publish(*chain[:2])
    pair.deliver()
    pair.close()
    pair.publish(*chain[2:])
    pair.open(and_talk=False)
    parts: list[Announce] = []
    while len(parts) < 2:
        for node, other in ((pair.teacher, pair.student), (pair.student, pair.teacher)):
            if node.sent and len(parts) < 2:
                action = node.sent.popleft()
                message = decode_message(action.payload)
                if isinstance(message, Announce) and message.num_more is not None:
                    parts.append(message)
                other.feed(PayloadReceived(node.name, action.payload))
    assert [part.num_more for part in parts] == [3, 2]
    pair.close()
    pair.open()
    pair.deliver()

    pair.assert_level()
    assert pair.num_said[CatchUp] == 1  # the first one was delivered by hand


def test_a_frame_that_was_pruned_meanwhile_makes_the_student_ask_again(sites: Any) -> None:
    pair = Pair(sites, obliging_ranks=True)
    chain = sites.chain("tokyo", 14)
    pair.open()
    pair.publish(chain[0])
    pair.deliver()
    pair.publish(*chain[1:3])
    pair.deliver(max_chunks=1)  # of the first delta frame; the second is planned, but not kept for a reader
    pair.publish(*chain[3:])
    assert chain[2] not in pair.teacher.store.frames.values()
    pair.deliver()

    pair.assert_level()
    assert pair.num_said[Gone] == 1
    assert steps(pair.student) == [0, 1, 14]
    assert pair.teacher.num_keyframes_requested == 1


def test_a_frame_that_the_teacher_has_lost_without_knowing_is_bypassed_by_a_keyframe(sites: Any) -> None:
    pair = Pair(sites, obliging_ranks=True)
    chain = sites.chain("tokyo", 3)
    pair.open()
    pair.publish(chain[0])
    pair.deliver()
    for frame in chain[1:]:
        pair.teacher.publish(frame)
    del pair.teacher.store.frames[chain[1].frame_id]
    pair.deliver()

    pair.assert_level()
    assert steps(pair.student) == [0, 3]
    assert pair.num_said[Gone] == 2  # one for each chunk


def test_a_teacher_that_has_lost_everything_is_not_asked_in_a_loop(pair: Pair, sites: Any) -> None:
    chain = sites.chain("tokyo", 2)
    pair.publish(chain[0])
    pair.open()
    pair.teacher.store.frames.clear()
    pair.deliver()
    assert pair.num_said[CatchUp] <= 2
    assert pair.student.store.partials == {}

    pair.publish(chain[1])
    pair.deliver()
    assert pair.num_said[CatchUp] <= 4
    pair.publish(pair.teacher.keyframe_of("tokyo"))
    pair.deliver()
    pair.assert_level()


def test_a_slow_student_keeps_getting_somewhere_and_asks_rarely(sites: Any) -> None:
    """Deltas of two chunks are published while one chunk travels."""
    pair = Pair(sites, obliging_ranks=True)
    chain = sites.chain("tokyo", 200)
    pair.open()
    most_planned = 0
    for frame in chain:
        pair.publish(frame)
        pair.deliver(max_chunks=1)
        assert len(pair.teacher.store.frames) < 12
        most_planned = max(most_planned, len(pair.student.gossip.frames_in_use(0.0)))
    num_asked = pair.num_said[CatchUp]
    pair.deliver()

    pair.assert_level()
    assert len(pair.student.offered) > 20, "it was not starved"
    assert 5 < num_asked < 40
    assert pair.teacher.num_keyframes_requested < 40
    assert most_planned == 1


def test_a_chain_that_has_grown_too_long_is_begun_anew(sites: Any) -> None:
    pair = Pair(sites, obliging_ranks=True)
    pair.open()
    for frame in sites.chain("tokyo", 2 * MAX_CHAIN_FRAMES, num_chunks=1):
        pair.publish(frame)
        pair.deliver()
        pair.student.prune()
    pair.assert_level()
    assert pair.teacher.num_keyframes_requested == 2
    assert len(pair.student.store.frames) <= MAX_CHAIN_FRAMES + 1


def test_a_local_keyframe_shortens_the_chain_without_the_teacher(pair: Pair, sites: Any) -> None:
    pair.open()
    for frame in sites.chain("tokyo", 2 * MAX_CHAIN_FRAMES, num_chunks=1):
        pair.publish(frame)
        pair.deliver()
        if frame.version.step % 32 == 31:
            local = pair.student.keyframe_of("tokyo", num_chunks=2)
            pair.student.store.frames[local.frame_id] = local
        pair.student.prune()

    pair.assert_level()
    assert pair.teacher.num_keyframes_requested == pair.num_said[CatchUp] == 0
    assert len(pair.student.store.frames) <= 34


# --- broken chains and full disks ------------------------------------------------------------------------------------


def test_a_broken_chain_is_dropped_and_fetched_anew(sites: Any) -> None:
    pair = Pair(sites, obliging_ranks=True)
    pair.open()
    pair.publish(*sites.chain("tokyo", 2))
    pair.deliver()

    actions = pair.student.feed(ChainBroken("tokyo"))
    assert DropChain("tokyo") in actions
    assert pair.student.store.held("tokyo") is None
    pair.deliver()

    pair.assert_level()
    assert [signed.base for signed in pair.student.offered[3:]] == [None]


def test_a_chain_that_is_broken_at_its_source_is_not_fetched_in_a_loop(sites: Any) -> None:
    pair = Pair(sites, obliging_ranks=True)
    chain = sites.chain("tokyo", 3)
    pair.open()
    pair.publish(*chain[:3])
    pair.deliver()
    for _ in range(5):
        pair.student.feed(ChainBroken("tokyo"))
        pair.deliver()
    assert pair.num_said[CatchUp] == 1
    assert pair.student.store.held("tokyo") is None

    pair.publish(chain[3])
    pair.deliver()
    pair.assert_level()


def test_a_broken_chain_does_not_stop_the_keyframe_that_is_on_its_way(pair: Pair, sites: Any) -> None:
    pair.open()
    pair.publish(*sites.chain("tokyo", 1))
    pair.deliver()
    pair.publish(sites.frame("tokyo", 5, incarnation=2, num_chunks=9))
    pair.deliver(max_chunks=3)
    num_served = pair.teacher.num_chunks_served

    pair.student.feed(ChainBroken("tokyo"))
    pair.deliver()

    pair.assert_level()
    assert pair.num_said[CatchUp] == 0
    assert pair.teacher.num_chunks_served - num_served <= 6


def test_a_chain_that_breaks_while_a_path_is_announced_is_replaced_by_one_from_nothing(sites: Any) -> None:
    pair = Pair(sites, obliging_ranks=True)
    chain = sites.chain("tokyo", 4)
    pair.open()
    pair.publish(*chain[:2])
    pair.deliver()
    pair.close()
    pair.publish(*chain[2:])
    pair.open(and_talk=False)
    while pair.num_said[CatchUp] == 0:  # the path is on its way, and starts at what is about to be dropped
        for node, other in ((pair.teacher, pair.student), (pair.student, pair.teacher)):
            if node.sent and pair.num_said[CatchUp] == 0:
                action = node.sent.popleft()
                pair.num_said[type(decode_message(action.payload))] += 1
                other.feed(PayloadReceived(node.name, action.payload))
    pair.student.feed(ChainBroken("tokyo"))
    pair.deliver()

    pair.assert_level()
    assert pair.num_said[CatchUp] == 2


def test_a_full_disk_is_tried_again_with_every_announcement_and_not_more_often(
    pair: Pair, sites: Any
) -> None:
    chain = sites.chain("tokyo", 5)
    pair.open()
    pair.publish(*chain[:2])
    pair.deliver()
    pair.student.refuses = "oversized"
    for num_refused, frame in enumerate(chain[2:5], 1):
        pair.publish(frame)
        pair.deliver()
        assert pair.student.refusals() == [("tokyo", "oversized")] * num_refused
    assert pair.num_said[CatchUp] == 2  # the first refused frame needed none
    pair.student.refuses = None
    pair.student.events.clear()
    pair.publish(chain[5])
    pair.deliver()

    pair.assert_level()
    assert steps(pair.student) == [0, 1, 2, 3, 4, 5]


# --- incarnations ----------------------------------------------------------------------------------------------------


def test_a_forgotten_life_is_renewed_as_a_chain(sites: Any) -> None:
    pair = Pair(sites)
    old = [sites.frame("tokyo", step, incarnation=3, content="forgotten") for step in (50, 60)]
    pair.student.store.frames = {old[-1].frame_id: old[-1]}
    pair.student = sites.node("berlin", teachers=("tokyo",), store=pair.student.store)
    pair.teacher.store.incarnation = 1
    pair.publish(*sites.chain("tokyo", 3))
    pair.open()
    pair.deliver()

    pair.assert_level()
    assert pair.student.store.held("tokyo") == Version(4, 3)
    assert [signed.version for signed in pair.student.offered] == [Version(4, step) for step in range(4)]


def test_a_whole_run_keeps_little_and_moves_little(sites: Any) -> None:
    """What a run should be: one keyframe, then delta frames, and a bounded store on either side."""
    pair = Pair(sites, obliging_ranks=True)
    pair.open()
    for frame in sites.chain("tokyo", 60):
        pair.publish(frame)
        pair.deliver()
        assert sum(f.num_bytes for f in pair.teacher.store.frames.values()) <= 2 * 9 * MIN_CHUNK_BYTES

    pair.assert_level()
    assert pair.teacher.num_chunks_served == 9 + 60 * 2
    assert pair.num_said[CatchUp] == pair.num_said[Gone] == 0
