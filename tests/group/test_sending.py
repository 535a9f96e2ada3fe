"""Rank 0's way out: one chain, one frame at a time, each taken by the node before the next is encoded."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import pytest
import torch
from patience import GENEROUS_S
from torch import nn

from p2pcodistill.checkpoint.decoder import decode_frame
from p2pcodistill.checkpoint.encoder import EncodedFrame, FrameEncoder
from p2pcodistill.checkpoint.reference import Reference
from p2pcodistill.checkpoint.snapshot import Snapshot, take_snapshot
from p2pcodistill.config import FramesConfig
from p2pcodistill.group.link_messages import EventHappened, FrameReady, FrameTaken
from p2pcodistill.group.sending import FrameSender
from p2pcodistill.telemetry.records import from_record
from p2pcodistill.telemetry.training_events import Evaluated, SnapshotSkipped

MAX_FRAME_BYTES = 1 << 24


class Outgoing:
    """A sender, and what it says. Answers each frame at once, with `accepts`, unless that is None."""

    def __init__(self, outbox: Path, config: FramesConfig) -> None:
        outbox.mkdir()
        self.outbox = outbox
        self.accepts: bool | None = True
        self.messages: list[FrameReady | EventHappened] = []
        self._changed = threading.Condition()
        self.sender = FrameSender(outbox, config, self.say)
        self.sender.start()

    def say(self, message: FrameReady | EventHappened) -> None:
        with self._changed:
            self.messages.append(message)
            self._changed.notify_all()
        if isinstance(message, FrameReady) and self.accepts is not None:
            self.answer(message, self.accepts)

    def answer(self, ready: FrameReady, accepted: bool) -> None:
        self.sender.mark_taken(FrameTaken(ready.step, ready.base_step, accepted))

    def wait_for(self, condition: Callable[[], bool]) -> None:
        with self._changed:
            assert self._changed.wait_for(condition, GENEROUS_S), self.messages

    def publish(self, *snapshots: Snapshot) -> None:
        """Publish one after the other, each when what the one before led to is said."""
        for snapshot in snapshots:
            num_messages = len(self.messages)
            self.sender.publish(snapshot)
            self.wait_for(lambda before=num_messages: len(self.messages) > before)

    @property
    def frames(self) -> list[FrameReady]:
        return [message for message in self.messages if isinstance(message, FrameReady)]

    @property
    def steps(self) -> list[tuple[int, int | None]]:
        return [(ready.step, ready.base_step) for ready in self.frames]

    @property
    def skipped(self) -> list[SnapshotSkipped]:
        events = [from_record(m.record) for m in self.messages if isinstance(m, EventHappened)]
        return [event for event in events if isinstance(event, SnapshotSkipped)]


@pytest.fixture
def outgoing(tmp_path: Path) -> Iterator[Outgoing]:
    made = Outgoing(tmp_path / "outbox", FramesConfig())
    yield made
    made.sender.close(GENEROUS_S)


def model() -> nn.Linear:
    torch.manual_seed(3)
    return nn.Linear(64, 64)


def snapshots(*steps: int, change: float = 0.01) -> list[Snapshot]:
    """A model on its way: each snapshot a little further."""
    student = model()
    taken = []
    for step in steps:
        with torch.no_grad():
            student.weight += change * torch.randn_like(student.weight)
        taken.append(take_snapshot(student, step))
    return taken


def read(ready: FrameReady, base: Reference | None) -> Reference:
    return decode_frame(Path(ready.path).read_bytes(), base, max_bytes=MAX_FRAME_BYTES)


def test_a_keyframe_and_then_delta_frames_reach_the_node_as_complete_files(outgoing: Outgoing) -> None:
    published = snapshots(50, 100, 150)
    outgoing.publish(*published)
    assert outgoing.steps == [(50, None), (100, 50), (150, 100)]
    reference = None
    for ready, snapshot in zip(outgoing.frames, published, strict=True):
        reference = read(ready, reference)
        assert reference.step == ready.step == snapshot.step
        assert ready.schema_hash == snapshot.schema_hash == reference.schema_hash
        assert ready.num_fp16_bytes == snapshot.num_fp16_bytes
    assert reference is not None
    assert torch.allclose(reference.tensors["weight"].float(), published[-1].tensors["weight"], atol=0.1)
    names = sorted(path.name for path in outgoing.outbox.iterdir())
    assert names == sorted(Path(ready.path).name for ready in outgoing.frames)


def test_a_delta_frame_takes_no_more_than_the_links_carry(outgoing: Outgoing) -> None:
    first, second, third = snapshots(1, 2, 3, change=0.5)
    outgoing.publish(first, second)
    num_wanted_bytes = Path(outgoing.frames[-1].path).stat().st_size
    outgoing.sender.set_link_rate(
        num_wanted_bytes / 1.6
    )  # for snapshots in quick succession: of one a second
    outgoing.publish(third)
    assert outgoing.steps == [(1, None), (2, 1), (3, 2)]
    assert Path(outgoing.frames[-1].path).stat().st_size < 0.75 * num_wanted_bytes


def test_the_next_frame_waits_until_the_node_has_the_last_and_only_the_newest_waits(
    outgoing: Outgoing,
) -> None:
    outgoing.accepts = None
    first, *others = snapshots(1, 2, 3, 4)
    outgoing.publish(first)
    for snapshot in others:
        outgoing.sender.publish(snapshot)
    outgoing.sender.report(Evaluated(4, 2.5, 0.1))  # which waits for nobody
    outgoing.wait_for(lambda: len(outgoing.messages) == 4)
    assert outgoing.steps == [(1, None)]
    assert [event.step for event in outgoing.skipped] == [2, 3]
    outgoing.accepts = True
    outgoing.answer(outgoing.frames[0], True)
    outgoing.wait_for(lambda: len(outgoing.frames) == 2)
    assert outgoing.steps == [(1, None), (4, 1)]


def test_an_answer_to_another_frame_changes_nothing(outgoing: Outgoing) -> None:
    outgoing.accepts = None
    first, second = snapshots(1, 2)
    outgoing.publish(first)
    outgoing.sender.publish(second)
    outgoing.sender.mark_taken(FrameTaken(1, 0, accepted=False))
    outgoing.sender.report(Evaluated(1, 2.5, 0.1))
    outgoing.wait_for(lambda: len(outgoing.messages) == 2)
    assert outgoing.steps == [(1, None)]
    outgoing.accepts = True
    outgoing.answer(outgoing.frames[0], True)
    outgoing.wait_for(lambda: len(outgoing.frames) == 2)
    assert outgoing.steps[1] == (2, 1)


def test_after_a_refused_frame_a_new_chain_begins(outgoing: Outgoing) -> None:
    first, second, third = snapshots(1, 2, 3)
    outgoing.publish(first)
    outgoing.accepts = False
    outgoing.publish(second)
    outgoing.accepts = True
    outgoing.publish(third)
    assert outgoing.steps == [(1, None), (2, 1), (3, None)]


def test_weights_that_are_not_finite_are_skipped(outgoing: Outgoing) -> None:
    student = model()
    nn.init.constant_(student.weight, float("nan"))
    outgoing.publish(take_snapshot(student, 7))
    [event] = outgoing.skipped
    assert event.step == 7 and "weight" in event.why
    assert outgoing.frames == [] and list(outgoing.outbox.iterdir()) == []


class TornFile:
    """A disk that is full after so many bytes."""

    num_faults = 0

    def __init__(self, file: BinaryIO, room_bytes: int) -> None:
        self._file, self._room_bytes = file, room_bytes

    def __enter__(self) -> TornFile:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def write(self, data: bytes) -> int:
        self._room_bytes -= self._file.write(memoryview(data).cast("B")[: self._room_bytes])
        if self._room_bytes <= 0:
            TornFile.num_faults += 1
            raise OSError(28, "No space left on device")
        return len(data)


def test_a_full_disk_skips_the_snapshot_and_begins_a_new_chain(
    outgoing: Outgoing, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second, third = snapshots(1, 2, 3)
    outgoing.publish(first)
    open_file = Path.open
    TornFile.num_faults = 0
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda self, mode: TornFile(open_file(self, mode), 20))
        outgoing.publish(second)
    [event] = outgoing.skipped
    assert event.step == 2 and "No space left" in event.why
    assert TornFile.num_faults == 1
    assert len(list(outgoing.outbox.iterdir())) == 1, "what was written takes no space"
    outgoing.publish(third)
    assert outgoing.steps == [(1, None), (3, None)], "nobody has what a delta could build on"


# --- keyframes that somebody needs -----------------------------------------------------------------------------


def test_a_wanted_keyframe_is_the_reference_bit_for_bit_and_the_chain_goes_on(outgoing: Outgoing) -> None:
    first, second, third = snapshots(50, 100, 150)
    outgoing.publish(first, second)
    outgoing.sender.want_keyframe()
    outgoing.wait_for(lambda: len(outgoing.frames) == 3)
    outgoing.publish(third)
    assert outgoing.steps == [(50, None), (100, 50), (100, None), (150, 100)]
    keyframe, delta, again, last = outgoing.frames
    by_deltas = read(delta, read(keyframe, None))
    by_keyframe = read(again, None)
    for reference in (by_deltas, by_keyframe):
        read(last, reference)
    assert by_deltas.step == by_keyframe.step == 150
    for name, tensor in by_deltas.tensors.items():
        assert torch.equal(tensor, by_keyframe.tensors[name])


def test_a_wanted_keyframe_goes_before_the_snapshot_that_waits(outgoing: Outgoing) -> None:
    first, second, third = snapshots(1, 2, 3)
    outgoing.publish(first)
    outgoing.accepts = None
    outgoing.publish(second)
    outgoing.sender.publish(third)
    outgoing.sender.want_keyframe()
    outgoing.sender.want_keyframe()
    outgoing.accepts = True
    outgoing.answer(outgoing.frames[-1], True)
    outgoing.wait_for(lambda: len(outgoing.frames) == 4)
    assert outgoing.steps == [(1, None), (2, 1), (2, None), (3, 2)]


def test_a_keyframe_is_not_made_twice(outgoing: Outgoing) -> None:
    outgoing.sender.want_keyframe()  # the first frame will be one
    first, second = snapshots(1, 2)
    outgoing.publish(first)
    outgoing.sender.want_keyframe()  # the last one was
    outgoing.publish(second)
    assert outgoing.steps == [(1, None), (2, 1)]


def test_a_keyframe_that_a_full_disk_did_not_take_is_made_later(
    outgoing: Outgoing, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first, second, third = snapshots(1, 2, 3)
    outgoing.publish(first, second)
    num_faults = 0

    def encode(self: FrameEncoder, sink: BinaryIO) -> EncodedFrame:
        nonlocal num_faults
        num_faults += 1
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(FrameEncoder, "encode_keyframe_of_reference", encode)
        outgoing.sender.want_keyframe()
        outgoing.sender.report(Evaluated(2, 2.5, 0.1))
        outgoing.wait_for(lambda: len(outgoing.messages) == 3)
    assert num_faults == 1 and "No space left" in caplog.text
    outgoing.sender.publish(third)
    outgoing.wait_for(lambda: len(outgoing.frames) == 4)
    assert outgoing.steps == [(1, None), (2, 1), (2, None), (3, 2)]


# --- the end ---------------------------------------------------------------------------------------------------


def test_closing_hands_over_the_last_snapshot_when_the_node_has_the_one_before(outgoing: Outgoing) -> None:
    outgoing.accepts = None
    first, second = snapshots(1, 2)
    outgoing.publish(first)
    outgoing.sender.publish(second)
    closing = threading.Thread(target=outgoing.sender.close, args=(GENEROUS_S,))
    closing.start()
    outgoing.accepts = True
    outgoing.answer(outgoing.frames[0], True)
    closing.join(GENEROUS_S)
    assert not closing.is_alive() and outgoing.steps == [(1, None), (2, 1)]


def test_closing_does_not_wait_for_a_node_that_is_gone(outgoing: Outgoing) -> None:
    outgoing.accepts = None
    first, second = snapshots(1, 2)
    outgoing.publish(first)
    outgoing.sender.publish(second)
    outgoing.sender.close(0.01)
    assert outgoing.steps == [(1, None)]
    [event] = outgoing.skipped
    assert event.step == 2 and "did not take step 1" in event.why


def test_a_chain_that_costs_more_than_a_keyframe_ends_with_one(tmp_path: Path) -> None:
    outgoing = Outgoing(tmp_path / "outbox", FramesConfig(delta="lossless"))
    outgoing.publish(*snapshots(1, 2, 3, 4, change=1.0))
    num_bytes = [Path(ready.path).stat().st_size for ready in outgoing.frames]
    assert sum(num_bytes[1:]) > num_bytes[0]
    outgoing.sender.close(GENEROUS_S)
    assert outgoing.steps[4:] == [(4, None)]


def test_a_cheap_chain_ends_as_it_is(outgoing: Outgoing) -> None:
    outgoing.publish(*snapshots(1, 2))
    outgoing.sender.close(GENEROUS_S)
    assert outgoing.steps == [(1, None), (2, 1)]
