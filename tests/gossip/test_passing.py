"""Students of one origin help each other, relays pass frames on; nothing of it needs trust in who passes."""

from __future__ import annotations

from typing import Any

import pytest

from p2pcodistill.checkpoint.manifest import MIN_CHUNK_BYTES, Version
from p2pcodistill.gossip.events import FrameLost, TrainingFinished
from p2pcodistill.gossip.messages import (
    Announce,
    CatchUp,
    Chunk,
    Follow,
    Gone,
    Have,
    NoPath,
    Unfollow,
)
from p2pcodistill.gossip.relay import MAX_RELAYED_ORIGINS, RELAY_GRACE_S
from p2pcodistill.telemetry import node_events

STUDENTS_OF = {"tokyo": ("berlin", "lima", "oslo")}
RELAY_AFTER_S = 10.0


def student(sites: Any, name: str, **settings: Any) -> Any:
    settings = {"window_bytes": 8 * MIN_CHUNK_BYTES, "students_of": STUDENTS_OF} | settings
    return sites.node(name, teachers=["tokyo"], **settings)


def teacher(sites: Any, students: tuple[str, ...] = STUDENTS_OF["tokyo"], **settings: Any) -> Any:
    store = type(sites.node("tokyo").store)(incarnation=1)
    settings = {"window_bytes": 8 * MIN_CHUNK_BYTES, "students_of": {"tokyo": students}} | settings
    return sites.node("tokyo", students=students, store=store, **settings)


def relayed(sites: Any, **settings: Any) -> tuple[Any, Any, Any, Any]:
    """lima cannot connect with tokyo, its teacher; oslo can connect with both. (tokyo, oslo, lima, the net.)"""
    edges = {"tokyo": ("lima",)}
    tokyo = teacher(sites, ("lima",))
    oslo = sites.node("oslo", window_bytes=8 * MIN_CHUNK_BYTES, students_of=edges, **settings)
    lima = student(sites, "lima", students_of=edges)
    net = sites.net(tokyo, oslo, lima, apart=[("tokyo", "lima")])
    net.settle()
    return tokyo, oslo, lima, net


def test_a_popular_teacher_does_not_send_everything_to_everyone(sites: Any) -> None:
    tokyo = teacher(sites)
    students = [student(sites, name) for name in STUDENTS_OF["tokyo"]]
    net = sites.net(tokyo, *students)
    net.settle()
    num_chunks = 32
    frame = sites.frame("tokyo", 1, num_chunks=num_chunks)

    tokyo.publish(frame)
    net.settle()

    assert [node.store.frames[frame.frame_id].chunks for node in students] == [frame.chunks] * 3
    assert [node.offered for node in students] == [[frame.signed]] * 3
    assert tokyo.num_chunks_served <= 2 * num_chunks, "three copies without the others' help"
    assert sum(node.num_chunks_served for node in net.nodes.values()) == 3 * num_chunks, (
        "each chunk came once"
    )
    assert not any(node.refusals() for node in net.nodes.values())


def test_a_frame_is_had_from_another_student_when_its_origin_is_gone(sites: Any) -> None:
    chain = sites.chain("tokyo", 3)
    tokyo, berlin, lima = teacher(sites), student(sites, "berlin"), student(sites, "lima")
    net = sites.net(tokyo, berlin, lima, apart=[("tokyo", "lima"), ("berlin", "lima")])
    for frame in chain:
        tokyo.publish(frame)
        net.settle()
    net.cut("tokyo", "berlin")

    net.connect("berlin", "lima")
    net.settle()

    assert lima.store.held("tokyo") == Version(1, 3)
    assert lima.offered[-1] == chain[-1].signed
    assert not lima.refusals() and not berlin.refusals()


def announcements_between_students(net: Any) -> list[tuple[str, str]]:
    return [
        link
        for link, messages in net.history.items()
        if "tokyo" not in link and any(isinstance(message, Announce) for message in messages)
    ]


def test_of_a_frame_of_one_chunk_students_tell_each_other_only_when_its_origin_is_gone(sites: Any) -> None:
    tokyo = teacher(sites)
    net = sites.net(tokyo, *(student(sites, name) for name in STUDENTS_OF["tokyo"]))
    net.settle()
    for step in range(1, 4):
        tokyo.publish(sites.frame("tokyo", step, num_chunks=1))
        net.settle()
        net.wait(1000.0)
    assert announcements_between_students(net) == []

    net.cut("tokyo", "berlin")
    net.settle()

    assert announcements_between_students(net) == [("berlin", "lima"), ("berlin", "oslo")]


def test_what_students_have_is_told_at_once_when_the_origin_cannot_be_reached(sites: Any) -> None:
    tokyo, berlin, lima = teacher(sites), student(sites, "berlin"), student(sites, "lima")
    net = sites.net(tokyo, berlin, lima, apart=[("tokyo", "lima")])
    net.settle()
    tokyo.publish(sites.frame("tokyo", 1, num_chunks=1))
    net.settle()
    assert lima.store.held("tokyo") is None

    net.cut("tokyo", "berlin")
    net.settle()

    assert lima.store.held("tokyo") == Version(1, 1)


def test_who_cannot_reach_the_origin_follows_a_student_even_one_that_relays_nobody(sites: Any) -> None:
    for relay in (True, False):
        tokyo, lima = teacher(sites), student(sites, "lima")
        net = sites.net(tokyo, student(sites, "berlin", relay=relay), lima, apart=[("tokyo", "lima")])
        net.settle()
        net.wait(0.0)
        tokyo.publish(sites.frame("tokyo", 1, num_chunks=1))
        net.settle()
        net.wait(RELAY_AFTER_S - 1.0)
        assert lima.store.held("tokyo") is None

        net.wait(1.0)

        assert lima.store.held("tokyo") == Version(1, 1)
        tokyo.publish(sites.frame("tokyo", 2, num_chunks=1))
        net.settle()
        assert lima.store.held("tokyo") == Version(1, 2), "a follower is told at once"


def test_what_a_holder_cannot_answer_it_says(sites: Any) -> None:
    berlin = student(sites, "berlin")
    net = sites.net(berlin, student(sites, "lima"))
    net.settle()
    frame = sites.frame("tokyo", 5, base=4)
    berlin.store.frames[frame.frame_id] = frame

    berlin.receive("lima", CatchUp(Version(1, 3), origin="tokyo"))
    assert berlin.take_messages() == [("lima", NoPath("tokyo"))]
    berlin.receive("lima", CatchUp(None, origin="oslo"))
    assert berlin.refusals() == [("lima", "unknown-peer")]
    assert "lima asked for a path of 'oslo', who does not teach it" in str(berlin.events[-1])


def test_what_the_store_holds_after_a_restart_is_told_and_served(sites: Any) -> None:
    berlin = student(sites, "berlin")
    for frame in sites.chain("tokyo", 2):
        berlin.store.frames[frame.frame_id] = frame
    lima = student(sites, "lima")
    net = sites.net(student(sites, "berlin", store=berlin.store), lima)

    net.settle()

    assert lima.store.held("tokyo") == Version(1, 2)


def test_a_frame_that_the_store_lost_is_not_promised(sites: Any) -> None:
    store = student(sites, "berlin").store
    frame = sites.frame("tokyo", 1)
    store.frames[frame.frame_id] = frame
    berlin = student(sites, "berlin", store=store)
    del store.frames[frame.frame_id]
    berlin.feed(FrameLost(frame.frame_id))
    net = sites.net(berlin, lima := student(sites, "lima"))

    net.settle()

    assert not lima.versions_announced()


def test_a_wrong_chunk_is_laid_at_the_door_of_who_sent_it(sites: Any) -> None:
    frame = sites.frame("tokyo", 1, num_chunks=6)
    lima = student(sites, "lima")
    net = sites.net(teacher(sites), student(sites, "berlin"), lima)
    net.settle()
    announce = Announce(frame.signed.body, frame.signed.signature)
    lima.receive("berlin", announce)
    lima.receive("tokyo", announce)

    for index in range(3):
        lima.receive("berlin", Chunk(frame.frame_id, index, bytes(MIN_CHUNK_BYTES)))

    assert lima.refusals() == [("berlin", "bad-checksum")] * 3
    wants = [peer for peer, message in lima.take_messages() if type(message).__name__ == "Want"]
    assert wants[-1] == "tokyo", "berlin is not asked any more"


def test_an_origin_is_asked_for_its_share_and_a_hand(sites: Any) -> None:
    frame = sites.frame("tokyo", 1, num_chunks=8)
    lima = student(sites, "lima")
    net = sites.net(teacher(sites), student(sites, "berlin"), lima)
    net.settle()

    lima.receive("tokyo", Announce(frame.signed.body, frame.signed.signature))
    wanted = [(peer, m.indices) for peer, m in lima.take_messages() if type(m).__name__ == "Want"]
    ((peer, indices),) = wanted
    assert peer == "tokyo" and len(indices) == 4, "half, because there are two students"
    missing = next(index for index in range(8) if index not in indices)
    lima.receive("berlin", Have(frame.frame_id, 1 << missing))
    assert [(peer, m.indices) for peer, m in lima.take_messages()] == [("berlin", (missing,))]


@pytest.mark.parametrize("chunks", [1 << 8, 1 << 70])
def test_chunks_that_a_frame_does_not_have_cannot_be_held(sites: Any, chunks: int) -> None:
    frame = sites.frame("tokyo", 1, num_chunks=8)
    lima = student(sites, "lima")
    sites.net(teacher(sites), student(sites, "berlin"), lima).settle()
    lima.receive("tokyo", Announce(frame.signed.body, frame.signed.signature))

    lima.receive("berlin", Have(frame.frame_id, chunks))

    assert lima.refusals() == [("berlin", "malformed")]


def test_what_is_behind_is_no_offence_but_a_forgery_is(sites: Any) -> None:
    lima = student(sites, "lima")
    sites.net(teacher(sites), student(sites, "berlin"), lima).settle()
    new, old = (sites.frame("tokyo", step) for step in (5, 4))
    lima.receive("tokyo", Announce(new.signed.body, new.signed.signature))

    lima.receive("berlin", Announce(old.signed.body, old.signed.signature))
    assert not lima.refusals()
    forged = sites.frame("tokyo", 6, signer="berlin")
    lima.receive("berlin", Announce(forged.signed.body, forged.signed.signature))
    assert lima.refusals() == [("berlin", "bad-signature")]
    assert lima.versions_announced() == [("tokyo", Version(1, 5))]


def test_two_checkpoints_of_one_version_are_told_apart_across_peers(sites: Any) -> None:
    lima = student(sites, "lima")
    sites.net(teacher(sites), student(sites, "berlin"), lima).settle()
    one, other = (sites.frame("tokyo", 5, content=content) for content in ("one", "other"))
    lima.receive("tokyo", Announce(one.signed.body, one.signed.signature))

    lima.receive("berlin", Announce(other.signed.body, other.signed.signature))

    assert lima.refusals() == [("berlin", "replayed")]
    assert "two different checkpoints of tokyo" in str(lima.events[-1])


def test_an_origin_that_lost_its_memory_is_shown_what_it_signed(sites: Any) -> None:
    lima, berlin = student(sites, "lima"), student(sites, "berlin")
    tokyo = teacher(sites)
    net = sites.net(tokyo, lima, berlin, apart=[("berlin", "tokyo")])
    net.settle()
    past, now = sites.frame("tokyo", 9), sites.frame("tokyo", 1, content="now")
    tokyo.store.incarnation = 1
    berlin.store.frames[past.frame_id] = past
    lima.receive("berlin", Announce(past.signed.body, past.signed.signature))

    tokyo.publish(now)
    net.settle()

    assert tokyo.store.incarnation == 2
    assert any("another node runs with its identity" in str(event) for event in tokyo.events)
    assert lima.store.held("tokyo") == Version(2, 1)


# --- relaying --------------------------------------------------------------------------------------------------


def test_a_relay_fetches_and_passes_on_for_a_student_that_cannot_connect(sites: Any) -> None:
    tokyo, oslo, lima, net = relayed(sites)
    chain = sites.chain("tokyo", 4)
    tokyo.publish(chain[0])
    tokyo.publish(chain[1])
    net.settle()
    assert not lima.versions_announced()

    net.wait(0.0)
    net.wait(RELAY_AFTER_S)
    assert lima.store.held("tokyo") == Version(1, 1)
    assert oslo.gossip.relayed_origins == ("tokyo",)
    assert node_events.RelayStarted("tokyo", "lima") in oslo.events
    for frame in chain[2:]:
        tokyo.publish(frame)
        net.settle()
        oslo.prune()

    assert lima.store.held("tokyo") == Version(1, 4)
    assert not oslo.offered and not oslo.store.pins, "a relay learns nothing"
    assert not any(node.refusals() for node in net.nodes.values())
    assert tokyo.num_chunks_served == oslo.num_chunks_served, "every chunk travels each hop once"


def test_chunks_are_passed_on_before_the_frame_is_complete(sites: Any) -> None:
    tokyo, oslo, lima, net = relayed(sites)
    net.wait(0.0)
    net.wait(RELAY_AFTER_S)
    frame = sites.frame("tokyo", 1, num_chunks=16)
    tokyo.publish(frame)

    while not lima.store.partials or not any(held for _, held in lima.store.partials.values()):
        assert net.turn()

    assert frame.frame_id not in oslo.store.frames
    net.settle()
    assert frame.frame_id in lima.store.frames


def test_the_relay_is_let_go_once_the_teacher_is_there_and_keeps_nothing(sites: Any) -> None:
    tokyo, oslo, lima, net = relayed(sites)
    net.wait(0.0)
    net.wait(RELAY_AFTER_S)
    tokyo.publish(sites.frame("tokyo", 1))
    net.settle()
    assert oslo.store.frames

    net.connect("tokyo", "lima")
    net.settle()
    net.wait(RELAY_GRACE_S)
    net.wait(1.0)

    assert oslo.gossip.relayed_origins == ()
    assert not oslo.store.frames
    assert node_events.RelayStopped("tokyo") in oslo.events
    late = sites.frame("tokyo", 2)
    oslo.receive("tokyo", Announce(late.signed.body, late.signed.signature))
    assert not oslo.refusals(), "what was on its way is no offence"
    tokyo.publish(late)
    net.settle()
    assert lima.store.held("tokyo") == Version(1, 2)


def test_a_student_that_lost_a_frame_gets_its_path_through_the_relay(sites: Any) -> None:
    tokyo, _, lima, net = relayed(sites)
    net.wait(0.0)
    net.wait(RELAY_AFTER_S)
    chain = sites.chain("tokyo", 6)
    tokyo.publish(chain[0])
    net.settle()
    net.cut("oslo", "lima")
    net.cut("oslo", "tokyo")
    for frame in chain[1:6]:
        tokyo.publish(frame)

    net.connect("oslo", "tokyo")
    net.connect("oslo", "lima")
    net.settle()
    for _ in range(4):
        net.wait(RELAY_AFTER_S)
    tokyo.publish(chain[6])
    net.settle()

    assert lima.store.held("tokyo") == Version(1, 6)
    assert not any(node.refusals() for node in net.nodes.values())


@pytest.mark.parametrize("settings", [{"relay": False}, {}])
def test_who_cannot_or_will_not_relay_says_so(sites: Any, settings: dict[str, Any]) -> None:
    oslo = sites.node("oslo", students_of={"tokyo": ("lima",)}, **settings)
    sites.net(oslo, student(sites, "lima")).settle()  # without tokyo

    oslo.receive("lima", Follow("tokyo", None, 0))

    assert oslo.take_messages() == [("lima", Unfollow("tokyo"))]
    assert oslo.gossip.relayed_origins == ()


def test_nobody_follows_who_does_not_teach_it(sites: Any) -> None:
    _, oslo, _, net = relayed(sites)

    for origin in ("berlin", "stranger"):
        oslo.receive("lima", Follow(origin, None, 0))
    oslo.receive("tokyo", Follow("lima", None, 0))

    assert oslo.refusals() == [("lima", "unknown-peer")] * 2 + [("tokyo", "unknown-peer")]
    assert "tokyo asked to follow 'lima', who does not teach it" in str(oslo.events[-1])
    assert MAX_RELAYED_ORIGINS > 0 and net.turn() is False


def test_one_after_the_other_is_asked_until_one_relays(sites: Any) -> None:
    edges = {"tokyo": ("lima",)}
    tokyo, lima = teacher(sites, ("lima",)), student(sites, "lima", students_of=edges)
    nodes = [sites.node(name, students_of=edges, relay=name == "oslo") for name in ("berlin", "oslo")]
    net = sites.net(tokyo, *nodes, lima, apart=[("tokyo", "lima")])
    tokyo.publish(sites.frame("tokyo", 1))
    net.settle()

    for _ in range(4):
        net.wait(RELAY_AFTER_S)

    assert lima.store.held("tokyo") == Version(1, 1)
    assert nodes[0].gossip.relayed_origins == ()


def test_a_relay_that_gives_a_frame_up_says_so(sites: Any) -> None:
    tokyo, oslo, lima, net = relayed(sites)
    net.wait(0.0)
    net.wait(RELAY_AFTER_S)
    oslo.refuses = "oversized"
    frame = sites.frame("tokyo", 1)
    tokyo.publish(frame)
    net.settle()

    assert lima.refusals() == [] and ("tokyo", "oversized") in oslo.refusals()
    assert Gone(frame.frame_id) in net.history["oslo", "lima"]


def test_a_follower_is_no_student_whose_end_is_waited_for(sites: Any) -> None:
    tokyo, _, lima, net = relayed(sites)
    net.wait(0.0)
    net.wait(RELAY_AFTER_S)
    assert not tokyo.gossip.students_finished
    net.connect("tokyo", "lima")
    lima.feed(TrainingFinished())
    net.settle()
    assert tokyo.gossip.students_finished


def test_a_relay_tells_teacher_and_student_that_the_other_has_finished(sites: Any) -> None:
    for is_late in (False, True):
        tokyo, _, lima, net = relayed(sites)
        net.wait(0.0)
        if not is_late:
            net.wait(RELAY_AFTER_S)
        lima.feed(TrainingFinished())
        tokyo.feed(TrainingFinished())
        net.settle()
        if is_late:
            assert not tokyo.gossip.students_finished and not lima.gossip.teachers_told
            net.wait(RELAY_AFTER_S)

        assert tokyo.gossip.students_finished and lima.gossip.teachers_told
        net.cut("oslo", "lima")
        assert lima.gossip.teachers_told, "its teacher needs nothing more"
        assert not any(node.refusals() for node in net.nodes.values())


def test_others_are_told_once_that_a_peer_has_finished_however_often_it_says_so(sites: Any) -> None:
    _, oslo, _, net = relayed(sites)
    net.wait(0.0)
    net.wait(RELAY_AFTER_S)
    oslo.take_messages()

    for _ in range(2):
        oslo.receive("lima", sites.finished("lima"))
    oslo.receive("lima", Follow("tokyo", None, 0))

    assert oslo.take_messages() == [("tokyo", sites.finished("lima"))]


def test_a_student_is_told_its_end_by_way_of_its_relay_only_while_that_is_there(sites: Any) -> None:
    _, _, lima, net = relayed(sites)
    net.wait(0.0)
    net.wait(RELAY_AFTER_S)
    lima.feed(TrainingFinished())
    net.settle()
    assert lima.gossip.teachers_told

    net.cut("oslo", "lima")

    assert not lima.gossip.teachers_told


def test_a_teacher_learns_of_the_end_of_a_student_that_it_has_met_and_lost(sites: Any) -> None:
    tokyo, berlin, lima = teacher(sites, ("berlin", "lima")), student(sites, "berlin"), student(sites, "lima")
    net = sites.net(tokyo, berlin, lima)
    net.settle()
    net.cut("tokyo", "lima")
    net.wait(0.0)
    net.wait(RELAY_AFTER_S)
    berlin.feed(TrainingFinished())
    lima.feed(TrainingFinished())
    net.settle()

    assert net.history["berlin", "tokyo"][-1] == sites.finished("lima"), "as lima signed it"
    assert tokyo.gossip.students_finished and lima.gossip.teachers_told
    assert not any(node.refusals() for node in net.nodes.values())


def test_the_manifests_of_an_origin_take_no_more_memory_than_a_path_may(
    sites: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    chain = sites.chain("tokyo", 6)
    cap_bytes = sum(len(frame.signed.body) for frame in chain[-3:])
    monkeypatch.setattr("p2pcodistill.gossip.sharing.MAX_PLAN_MANIFEST_BYTES", cap_bytes)
    tokyo, berlin, lima = teacher(sites), student(sites, "berlin"), student(sites, "lima")
    net = sites.net(tokyo, berlin, lima, apart=[("tokyo", "lima"), ("berlin", "lima")])
    for frame in chain:
        tokyo.publish(frame)
        net.settle()
    assert berlin.store.held("tokyo") == chain[-1].version

    net.connect("berlin", "lima")
    net.settle()
    for step, path in ((3, [2, 1, 0]), (2, [])):
        berlin.receive("lima", CatchUp(Version(1, step), origin="tokyo"))
        told = [message for _, message in berlin.take_messages()]
        assert [message.num_more for message in told if isinstance(message, Announce)] == path
        assert (NoPath("tokyo") in told) == (not path)
    restarted = student(sites, "berlin", store=berlin.store)
    sites.net(restarted, student(sites, "lima")).settle()
    restarted.receive("lima", CatchUp(Version(1, 2), origin="tokyo"))
    assert restarted.take_messages() == [("lima", NoPath("tokyo"))]
