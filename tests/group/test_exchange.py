"""A rank's exchange with its node, over the real link."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
from torch import nn

import p2pcodistill
from p2pcodistill.checkpoint.frames import DecodedFrame, decode_frame, encode_keyframe
from p2pcodistill.checkpoint.snapshot import Snapshot, take_snapshot
from p2pcodistill.codistill.exchange import Offer
from p2pcodistill.config import GROUP_SPEC_VARIABLE, GroupSpec
from p2pcodistill.errors import ConfigError, GroupError, MalformedError, OversizedError
from p2pcodistill.group import exchange as exchange_module
from p2pcodistill.group.exchange import GroupExchange, join, read_group_spec
from p2pcodistill.group.link import FrameOffer, FrameOffered, StopRequested
from p2pcodistill.telemetry import Evaluated, SnapshotSkipped, TeacherSwapped

MAX_FRAME_BYTES = 1 << 20


def snapshot(step: int) -> Snapshot:
    return take_snapshot(nn.Linear(3, 4), step)


def write_frame(folder: Path, model: nn.Module, step: int, *, origin: str = "tokyo") -> FrameOffer:
    path = folder / f"{origin}-{step}.frame"
    path.write_bytes(encode_keyframe(take_snapshot(model, step)))
    return FrameOffer(origin, 0, step, str(path), path.stat().st_size)


@pytest.fixture
def exchange(spec: GroupSpec, stub_node) -> Iterator[GroupExchange]:
    exchange = GroupExchange(spec, is_lead=True, max_frame_bytes=MAX_FRAME_BYTES)
    yield exchange
    exchange.close()


# --- publishing ----------------------------------------------------------------------------------------------


def test_a_published_snapshot_reaches_the_node_as_a_complete_file(
    exchange: GroupExchange, stub_node, spec: GroupSpec
) -> None:
    published = snapshot(50)
    exchange.publish(published)
    stub_node.wait_for(lambda: bool(stub_node.frames))
    [ready] = stub_node.frames
    assert Path(ready.path).parent == spec.outbox_folder
    frame = decode_frame(Path(ready.path).read_bytes(), max_bytes=MAX_FRAME_BYTES)
    assert (ready.step, ready.kind) == (50, frame.kind) and frame.step == 50
    assert ready.schema_hash == published.schema_hash == frame.schema_hash
    assert ready.num_fp16_bytes == published.num_fp16_bytes
    assert [path.name for path in spec.outbox_folder.iterdir()] == [Path(ready.path).name]


class HeldEncoder:
    """Encodes when it is told to."""

    def __init__(self) -> None:
        self.begun = threading.Semaphore(0)
        self.go_on = threading.Semaphore(0)
        self.steps: list[int] = []

    def __call__(self, snapshot: Snapshot) -> bytes:
        self.begun.release()
        assert self.go_on.acquire(timeout=30)
        self.steps.append(snapshot.step)
        return encode_keyframe(snapshot)


def test_a_busy_encoder_skips_all_but_the_newest_snapshot(
    exchange: GroupExchange, stub_node, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = HeldEncoder()
    monkeypatch.setattr(exchange_module, "encode_keyframe", encoder)
    exchange.publish(snapshot(1))
    assert encoder.begun.acquire(timeout=30)
    for step in (2, 3, 4):
        exchange.publish(snapshot(step))
    encoder.go_on.release()
    encoder.go_on.release()
    exchange.close()
    stub_node.wait_for(lambda: len(stub_node.frames) + len(stub_node.events) == 4)
    assert encoder.steps == [1, 4]
    assert [frame.step for frame in stub_node.frames] == [1, 4]
    assert [event.step for event in stub_node.events] == [2, 3]
    assert all(isinstance(event, SnapshotSkipped) for event in stub_node.events)


def test_what_is_said_after_a_snapshot_arrives_after_it(exchange: GroupExchange, stub_node) -> None:
    exchange.publish(snapshot(1))
    exchange.report(Evaluated(1, 2.5, 0.1))
    exchange.close()
    stub_node.wait_for(lambda: len(stub_node.messages) == 4)
    assert [type(message).__name__ for message in stub_node.messages] == [
        "Joined",
        "FrameReady",
        "EventHappened",
        "Left",
    ]


def test_weights_that_are_not_finite_are_skipped(exchange: GroupExchange, stub_node) -> None:
    model = nn.Linear(3, 4)
    nn.init.constant_(model.weight, float("nan"))
    exchange.publish(take_snapshot(model, 7))
    stub_node.wait_for(lambda: bool(stub_node.events))
    [event] = stub_node.events
    assert isinstance(event, SnapshotSkipped) and event.step == 7 and "weight" in event.why
    assert stub_node.frames == []


def test_a_full_disk_skips_the_snapshot(
    exchange: GroupExchange, stub_node, spec: GroupSpec, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_faults = 0

    def write_bytes(self: Path, data: bytes) -> int:
        nonlocal num_faults
        num_faults += 1
        with self.open("wb") as file:
            file.write(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    exchange.publish(snapshot(7))
    stub_node.wait_for(lambda: bool(stub_node.events))
    [event] = stub_node.events
    assert isinstance(event, SnapshotSkipped) and "No space left" in event.why
    assert num_faults == 1
    assert list(spec.outbox_folder.iterdir()) == [], "what was written takes no space"


def test_what_a_killed_rank_was_writing_is_removed(spec: GroupSpec, stub_node) -> None:
    spec.outbox_folder.mkdir()
    (spec.outbox_folder / "step-00000001.part").write_bytes(b"torn")
    (spec.outbox_folder / "step-00000002.frame").write_bytes(b"the node's")
    GroupExchange(spec, is_lead=True, max_frame_bytes=MAX_FRAME_BYTES).close()
    assert [path.name for path in spec.outbox_folder.iterdir()] == ["step-00000002.frame"]


def test_after_closing_nothing_is_sent_and_nothing_fails(exchange: GroupExchange, stub_node) -> None:
    exchange.close()
    exchange.close()
    exchange.publish(snapshot(1))
    exchange.report(Evaluated(1, 2.5, 0.1))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("p2pcodistill")]


# --- receiving -----------------------------------------------------------------------------------------------


def inbox_of(exchange: GroupExchange, stub_node) -> dict[str, Offer]:
    """The offers after everything that the node sent so far has arrived."""
    stub_node.send(StopRequested())
    while not exchange.inbox().stop_requested:  # messages keep their order
        pass
    return dict(exchange.inbox().offers)


def test_the_inbox_holds_the_newest_offer_of_each_teacher(spec: GroupSpec, stub_node) -> None:
    stub_node.offers = (FrameOffer("tokyo", 1, 50, "/a", 10), FrameOffer("oslo", 0, 20, "/b", 10))
    exchange = GroupExchange(spec, is_lead=True, max_frame_bytes=MAX_FRAME_BYTES)
    assert exchange.inbox().offers.keys() == {"tokyo", "oslo"}, "the stored ones are there at once"
    assert not exchange.inbox().stop_requested
    for offer in [
        FrameOffer("tokyo", 1, 40, "/older", 10),
        FrameOffer("oslo", 0, 30, "/c", 10),
        FrameOffer("oslo", 1, 10, "/d", 10),
    ]:
        stub_node.send(FrameOffered(offer))
    offers = inbox_of(exchange, stub_node)
    assert offers == {"tokyo": Offer("tokyo", 1, 50, "/a"), "oslo": Offer("oslo", 1, 10, "/d")}
    exchange.close()


def read(exchange: GroupExchange, path: Path) -> DecodedFrame:
    future: Future[DecodedFrame] = exchange.prepare(Offer("tokyo", 0, 1, str(path)))
    return future.result(timeout=30)


def test_frames_are_decoded_and_bad_ones_refused(exchange: GroupExchange, tmp_path: Path) -> None:
    model = nn.Linear(3, 4)
    good = Path(write_frame(tmp_path, model, 9).path)
    assert torch.equal(read(exchange, good).tensors["bias"], model.bias)
    (tmp_path / "torn").write_bytes(good.read_bytes()[:-1])
    with pytest.raises(MalformedError):
        read(exchange, tmp_path / "torn")
    with (tmp_path / "huge").open("wb") as huge:
        huge.truncate(MAX_FRAME_BYTES + 1)
    with pytest.raises(OversizedError, match="for this model"):
        read(exchange, tmp_path / "huge")
    with pytest.raises(FileNotFoundError):
        read(exchange, tmp_path / "gone")


def test_other_ranks_only_decode(spec: GroupSpec, stub_node, tmp_path: Path) -> None:
    exchange = GroupExchange(spec, is_lead=False, max_frame_bytes=MAX_FRAME_BYTES)
    exchange.publish(snapshot(1))
    exchange.report(Evaluated(1, 2.5, 0.1))
    assert exchange.inbox().offers == {}
    assert read(exchange, Path(write_frame(tmp_path, nn.Linear(3, 4), 9).path)).step == 9
    exchange.close()
    assert stub_node.messages == []


# --- join ----------------------------------------------------------------------------------------------------


def test_a_script_without_a_node_runs_alone(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv(GROUP_SPEC_VARIABLE, raising=False)
    model = nn.Linear(3, 4)
    with caplog.at_level(logging.WARNING):
        codistiller = p2pcodistill.join(model)
    assert ["trains alone" in record.getMessage() for record in caplog.records] == [True]
    assert codistiller.loss(model(torch.ones(1, 3)), torch.ones(1, 3)).item() == 0
    codistiller.step()
    codistiller.close()


def test_a_joined_script_learns_from_what_the_node_offers(
    spec: GroupSpec, stub_node, launch: Callable[[GroupSpec], Path], tmp_path: Path
) -> None:
    launch(spec.model_copy(update={"teachers": {"tokyo": 1.0}}))
    stub_node.offers = (write_frame(tmp_path, nn.Linear(3, 4), 9),)
    model = nn.Linear(3, 4)
    codistiller = join(model)
    while not codistiller.teacher_versions:
        codistiller.step()
    assert codistiller.loss(model(torch.ones(1, 3)), torch.ones(1, 3)).item() > 0
    codistiller.close()
    stub_node.wait_for(lambda: any(isinstance(event, TeacherSwapped) for event in stub_node.events))


USER_SCRIPT = """
import torch, p2pcodistill
model = torch.nn.Linear(3, 4)
codistiller = p2pcodistill.join(model)
for _ in range(10):
    inputs = torch.ones(2, 3)
    logits = model(inputs)
    loss = logits.square().mean() + codistiller.loss(logits, inputs)
    loss.backward()
    codistiller.step()
"""


def test_a_script_that_just_ends_has_handed_over_what_it_published(
    spec: GroupSpec, stub_node, launch: Callable[[GroupSpec], Path]
) -> None:
    environment = os.environ | {GROUP_SPEC_VARIABLE: str(launch(spec)), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-c", USER_SCRIPT],
        env=environment,
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    stub_node.wait_for(lambda: bool(stub_node.frames) and stub_node.frames[-1].step == 10)


def test_a_node_that_does_not_answer_is_named(
    spec: GroupSpec, launch: Callable[[GroupSpec], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange_module, "CONNECT_TIMEOUT_S", 0.01)
    launch(spec.model_copy(update={"link_token": "of an earlier launch"}))
    with pytest.raises(GroupError, match="did not answer"):
        join(nn.Linear(3, 4))


def test_more_ranks_need_a_process_group(
    spec: GroupSpec, launch: Callable[[GroupSpec], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    launch(spec)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(GroupError, match="init_process_group before join"):
        join(nn.Linear(3, 4))


def test_instructions_that_cannot_be_read_are_named(
    spec: GroupSpec, launch: Callable[[GroupSpec], Path]
) -> None:
    path = launch(spec)
    path.write_text('{"sight": "berlin"}')
    with pytest.raises(ConfigError, match="did you mean 'site'"):
        read_group_spec()
    path.write_text("{")
    with pytest.raises(ConfigError, match=str(path)):
        read_group_spec()


def test_importing_the_package_costs_nothing() -> None:
    code = (
        "import sys, p2pcodistill; assert not {'torch', 'pydantic', 'zmq'} & sys.modules.keys(); "
        "assert dir(p2pcodistill) == p2pcodistill.__all__; print(p2pcodistill.__version__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.strip() == p2pcodistill.__version__


def test_the_package_hands_over_its_public_names() -> None:
    for name in p2pcodistill.__all__:
        assert getattr(p2pcodistill, name)
    with pytest.raises(AttributeError, match="no attribute 'jion'"):
        p2pcodistill.jion  # noqa: B018
