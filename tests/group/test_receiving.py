"""A rank's way in: chains are applied frame by frame, once, and broken ones are told of."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from patience import GENEROUS_S
from torch import nn

from p2pcodistill.checkpoint.decoder import decode_frame
from p2pcodistill.checkpoint.encoder import FrameEncoder
from p2pcodistill.checkpoint.reference import Reference
from p2pcodistill.checkpoint.snapshot import Schema, schema_of, take_snapshot
from p2pcodistill.codistill.exchange import ChainFile, Offer
from p2pcodistill.config import FramesConfig
from p2pcodistill.errors import (
    ChecksumError,
    MalformedError,
    OversizedError,
    RefusedError,
    SchemaMismatchError,
)
from p2pcodistill.group import receiving
from p2pcodistill.group.link_messages import ChainBroken, ReferenceReady
from p2pcodistill.group.receiving import FrameReceiver

MAX_FRAME_BYTES = 1 << 20


class Tokyo:
    """A teacher that learns, and the node's store of its frames."""

    def __init__(self, folder: Path, config: FramesConfig | None = None) -> None:
        self.folder = folder
        folder.mkdir()
        self.files: list[ChainFile] = []
        torch.manual_seed(5)
        self._model = nn.Linear(64, 64)
        self._encoder = FrameEncoder(config or FramesConfig())

    def learn(self, step: int, *, change: float = 0.01, incarnation: int = 1) -> None:
        with torch.no_grad():
            self._model.weight += change * torch.randn_like(self._model.weight)
        self.files.append(ChainFile(incarnation, step, f"{incarnation}-{step}.frame"))
        with (self.folder / self.files[-1].file_name).open("wb") as file:
            self._encoder.encode(take_snapshot(self._model, step), file)

    def restart(self) -> None:
        self._encoder.restart()

    def make_keyframe(self) -> ChainFile:
        incarnation, step, _ = self.files[-1]
        with (self.folder / "keyframe").open("wb") as file:
            assert self._encoder.encode_keyframe_of_reference(file)
        return ChainFile(incarnation, step, "keyframe")

    def offer(self, *files: ChainFile) -> Offer:
        files = files or tuple(self.files)
        return Offer("tokyo", files[-1].incarnation, files[-1].step, str(self.folder), files)

    @property
    def reference(self) -> Reference:
        reference = self._encoder.reference
        assert reference is not None
        return reference


class Said:
    """What rank 0 says."""

    def __init__(self) -> None:
        self.messages: list[ReferenceReady | ChainBroken] = []
        self._changed = threading.Condition()

    def __call__(self, message: ReferenceReady | ChainBroken) -> None:
        with self._changed:
            self.messages.append(message)
            self._changed.notify_all()

    def wait_for(self, num_messages: int) -> list[ReferenceReady | ChainBroken]:
        with self._changed:
            assert self._changed.wait_for(lambda: len(self.messages) >= num_messages, GENEROUS_S)
        return self.messages


@pytest.fixture
def tokyo(tmp_path: Path) -> Tokyo:
    return Tokyo(tmp_path / "store")


@pytest.fixture
def said() -> Said:
    return Said()


@pytest.fixture
def receiver(tmp_path: Path, said: Said) -> Iterator[FrameReceiver]:
    (tmp_path / "outbox").mkdir()
    receiver = FrameReceiver(tmp_path / "outbox", MAX_FRAME_BYTES, said)
    yield receiver
    receiver.close()


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The steps of the frames that were decoded."""
    steps: list[int] = []

    def decode(data: bytes, base: Reference | None, *, max_bytes: int, schema: Schema | None) -> Reference:
        reference = decode_frame(data, base, max_bytes=max_bytes, schema=schema)
        steps.append(reference.step)
        return reference

    monkeypatch.setattr(receiving, "decode_frame", decode)
    return steps


def prepare(receiver: FrameReceiver, offer: Offer) -> Reference:
    return receiver.prepare(offer).result(timeout=GENEROUS_S)


def assert_same(reference: Reference, expected: Reference) -> None:
    assert reference.step == expected.step
    for name, tensor in expected.tensors.items():
        assert torch.equal(reference.tensors[name], tensor), name


def test_each_frame_is_applied_once(
    receiver: FrameReceiver, tokyo: Tokyo, decoded: list[int], said: Said
) -> None:
    tokyo.learn(50)
    tokyo.learn(100)
    reference = prepare(receiver, tokyo.offer())
    assert decoded == [50, 100]
    assert_same(reference, tokyo.reference)
    for step in (150, 200, 250):
        tokyo.learn(step)
    assert prepare(receiver, tokyo.offer()) is reference, "moved in place"
    assert decoded == [50, 100, 150, 200, 250]
    assert_same(reference, tokyo.reference)
    assert_same(prepare(receiver, tokyo.offer()), tokyo.reference)
    assert decoded == [50, 100, 150, 200, 250]
    assert said.messages == []


def test_what_is_not_on_the_chain_starts_from_its_keyframe(
    receiver: FrameReceiver, tokyo: Tokyo, decoded: list[int]
) -> None:
    tokyo.learn(50)
    tokyo.learn(100)
    prepare(receiver, tokyo.offer())
    tokyo.restart()
    tokyo.learn(80, incarnation=2)
    tokyo.learn(120, incarnation=2)
    assert_same(prepare(receiver, tokyo.offer(*tokyo.files[2:])), tokyo.reference)
    assert decoded == [50, 100, 80, 120]


def test_a_later_keyframe_of_the_same_version_takes_a_chains_place(
    receiver: FrameReceiver, tokyo: Tokyo, decoded: list[int]
) -> None:
    tokyo.learn(50)
    tokyo.learn(100)
    prepare(receiver, tokyo.offer())
    keyframe = tokyo.make_keyframe()
    tokyo.learn(150)
    assert_same(prepare(receiver, tokyo.offer(keyframe, tokyo.files[-1])), tokyo.reference)
    assert decoded == [50, 100, 150]


def test_teachers_do_not_share_a_reference(receiver: FrameReceiver, tokyo: Tokyo, tmp_path: Path) -> None:
    oslo = Tokyo(tmp_path / "oslo")
    for teacher in (tokyo, oslo):
        teacher.learn(50)
    oslo.learn(100)
    theirs = oslo.offer()
    first = prepare(receiver, tokyo.offer())
    second = prepare(receiver, Offer("oslo", theirs.incarnation, theirs.step, theirs.folder, theirs.frames))
    assert_same(first, tokyo.reference)
    assert_same(second, oslo.reference)


def test_a_file_that_is_gone_breaks_nothing(
    receiver: FrameReceiver, tokyo: Tokyo, decoded: list[int], said: Said
) -> None:
    for step in (50, 100, 150):
        tokyo.learn(step)
    last = tokyo.folder / tokyo.files[-1].file_name
    data = last.read_bytes()
    last.unlink()
    with pytest.raises(FileNotFoundError):
        prepare(receiver, tokyo.offer())
    last.write_bytes(data)
    assert_same(prepare(receiver, tokyo.offer()), tokyo.reference)
    assert decoded == [50, 100, 150], "what was applied is still whole"
    assert said.messages == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_damaged_frame_is_told_of_and_the_next_chain_starts_from_its_keyframe(
    receiver: FrameReceiver, tokyo: Tokyo, decoded: list[int], said: Said
) -> None:
    for step in (50, 100, 150):
        tokyo.learn(step)
    whole = (tokyo.folder / tokyo.files[1].file_name).read_bytes()
    flip(tokyo.folder / tokyo.files[1].file_name)
    with pytest.raises(RefusedError):
        prepare(receiver, tokyo.offer())
    assert said.messages == [ChainBroken("tokyo", 1, 150)]
    (tokyo.folder / tokyo.files[1].file_name).write_bytes(whole)
    assert_same(prepare(receiver, tokyo.offer()), tokyo.reference)
    assert decoded == [50, 50, 100, 150]


def test_a_delta_of_another_chain_is_refused(receiver: FrameReceiver, tokyo: Tokyo, said: Said) -> None:
    for step in (50, 100, 150):
        tokyo.learn(step)
    with pytest.raises(ChecksumError):
        prepare(receiver, tokyo.offer(tokyo.files[0], tokyo.files[2]))
    assert said.messages == [ChainBroken("tokyo", 1, 150)]


def test_a_frame_of_another_step_than_it_is_offered_as_is_refused(
    receiver: FrameReceiver, tokyo: Tokyo, said: Said
) -> None:
    tokyo.learn(50)
    with pytest.raises(MalformedError, match="signed as step 60 is of step 50"):
        prepare(receiver, tokyo.offer(tokyo.files[0]._replace(step=60)))
    assert said.messages == [ChainBroken("tokyo", 1, 60)]


def test_a_frame_over_the_cap_and_a_torn_one_are_refused(
    receiver: FrameReceiver, tokyo: Tokyo, said: Said
) -> None:
    tokyo.learn(50)
    path = tokyo.folder / tokyo.files[0].file_name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(MalformedError):
        prepare(receiver, tokyo.offer())
    with path.open("wb") as huge:
        huge.truncate(MAX_FRAME_BYTES + 1)
    with pytest.raises(OversizedError, match="for this model"):
        prepare(receiver, tokyo.offer())
    assert len(said.messages) == 2


def test_a_frame_of_another_model_is_refused_before_it_is_decoded_and_nobody_is_asked_for_another_copy(
    tmp_path: Path, tokyo: Tokyo, said: Said
) -> None:
    tokyo.learn(50)
    fitting = FrameReceiver(tmp_path / "outbox", MAX_FRAME_BYTES, said, schema_of(nn.Linear(64, 64)))
    assert_same(prepare(fitting, tokyo.offer()), tokyo.reference)
    fitting.close()
    flip(tokyo.folder / tokyo.files[0].file_name)
    other = FrameReceiver(tmp_path / "outbox", MAX_FRAME_BYTES, said, schema_of(nn.Linear(64, 32)))
    with pytest.raises(SchemaMismatchError, match=r"'bias' is \(64,\) there and \(32,\) here"):
        prepare(other, tokyo.offer())
    other.close()
    assert said.messages == []


def test_only_rank_zero_says_anything(tmp_path: Path, tokyo: Tokyo) -> None:
    receiver = FrameReceiver(tmp_path / "outbox", MAX_FRAME_BYTES, None)
    tokyo.learn(50)
    flip(tokyo.folder / tokyo.files[0].file_name)
    with pytest.raises(RefusedError):
        prepare(receiver, tokyo.offer())
    receiver.close()


# --- in place of a long chain ----------------------------------------------------------------------------------


@pytest.fixture
def costly(tmp_path: Path) -> Tokyo:
    """A teacher whose delta frames cost about as much as keyframes."""
    return Tokyo(tmp_path / "costly", FramesConfig(delta="lossless"))


def test_deltas_that_cost_more_than_the_keyframe_are_replaced_by_one(
    receiver: FrameReceiver, costly: Tokyo, said: Said, tmp_path: Path
) -> None:
    for step in (10, 20, 30, 40):
        costly.learn(step, change=1.0)
    prepare(receiver, costly.offer())
    [ready] = said.wait_for(1)
    assert isinstance(ready, ReferenceReady)
    assert (ready.origin, ready.incarnation, ready.step) == ("tokyo", 1, 40)
    path = Path(ready.path)
    assert [p.name for p in (tmp_path / "outbox").iterdir()] == [path.name]
    assert_same(decode_frame(path.read_bytes(), None, max_bytes=MAX_FRAME_BYTES), costly.reference)
    assert ready.schema_hash == costly.reference.schema_hash

    # The node's store goes on from it; until it does, nothing is made twice.
    costly.learn(50, change=1.0)
    prepare(receiver, costly.offer())
    kept = ChainFile(1, 40, path.name)
    path.rename(costly.folder / path.name)
    prepare(receiver, costly.offer(kept, costly.files[4]))
    receiver.close()
    assert len(said.messages) == 1


def test_many_cheap_deltas_are_replaced_too(receiver: FrameReceiver, tokyo: Tokyo, said: Said) -> None:
    for step in range(34):
        tokyo.learn(step, change=0.0)
    prepare(receiver, tokyo.offer())
    [ready] = said.wait_for(1)
    assert isinstance(ready, ReferenceReady) and ready.step == 33


def test_a_reference_that_a_full_disk_does_not_take_is_tried_again_later(
    receiver: FrameReceiver,
    costly: Tokyo,
    said: Said,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    num_faults = 0

    def encode(reference: Reference, sink: object) -> None:
        nonlocal num_faults
        num_faults += 1
        raise OSError(28, "No space left on device")

    for step in (10, 20, 30, 40):
        costly.learn(step, change=1.0)
    with monkeypatch.context() as patch:
        patch.setattr(receiving, "encode_reference_keyframe", encode)
        prepare(receiver, costly.offer())
        prepare(receiver, costly.offer())  # after it on the same thread
    assert num_faults == 1 and "No space left" in caplog.text
    for step in (50, 60, 70):
        costly.learn(step, change=1.0)
    prepare(receiver, costly.offer())
    [ready] = said.wait_for(1)
    assert isinstance(ready, ReferenceReady) and ready.step == 70
