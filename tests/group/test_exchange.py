"""A rank's exchange with its node, over the real link."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from patience import GENEROUS_S
from torch import nn

import p2pcodistill
from p2pcodistill.checkpoint.encoder import FrameEncoder
from p2pcodistill.checkpoint.manifest import Version
from p2pcodistill.checkpoint.snapshot import take_snapshot
from p2pcodistill.codistill.exchange import ChainFile, Offer
from p2pcodistill.codistill.gate import MIN_PREDICTIONS
from p2pcodistill.config import GROUP_SPEC_VARIABLE, FramesConfig, GroupSpec
from p2pcodistill.errors import ConfigError, GroupError
from p2pcodistill.group import exchange as exchange_module
from p2pcodistill.group.exchange import GroupExchange, join, read_group_spec
from p2pcodistill.group.link_messages import (
    FrameOffer,
    FrameOffered,
    FrameTaken,
    KeyframeWanted,
    Left,
    StopRequested,
    VersionKnown,
)
from p2pcodistill.telemetry.training_events import Evaluated, TeacherGated, TeacherRefused, TeacherSwapped

MAX_FRAME_BYTES = 1 << 20


def write_frame(folder: Path, model: nn.Module, step: int) -> FrameOffer:
    """A keyframe of tokyo's, offered."""
    name = f"tokyo-{step}.frame"
    with (folder / name).open("wb") as file:
        FrameEncoder(FramesConfig()).encode(take_snapshot(model, step), file)
    return FrameOffer("tokyo", 0, step, str(folder), ((0, step, name),))


@pytest.fixture
def exchange(spec: GroupSpec, stub_node) -> Iterator[GroupExchange]:
    exchange = GroupExchange(spec, is_lead=True, max_frame_bytes=MAX_FRAME_BYTES)
    yield exchange
    exchange.close()


def test_what_is_said_after_a_snapshot_arrives_after_it(exchange: GroupExchange, stub_node) -> None:
    exchange.publish(take_snapshot(nn.Linear(3, 4), 1))
    exchange.report(Evaluated(1, 2.5, 0.1))
    exchange.close()
    stub_node.wait_for(lambda: len(stub_node.messages) == 4)
    assert [type(message).__name__ for message in stub_node.messages] == [
        "Joined",
        "FrameReady",
        "EventHappened",
        "Left",
    ]


def test_the_nodes_answers_and_wishes_reach_the_sender(exchange: GroupExchange, stub_node) -> None:
    model = nn.Linear(3, 4)
    stub_node.accepts = None
    exchange.publish(take_snapshot(model, 1))
    stub_node.wait_for(lambda: len(stub_node.frames) == 1)
    exchange.publish(take_snapshot(model, 2))
    stub_node.send(FrameTaken(1, None, accepted=True))
    stub_node.wait_for(lambda: len(stub_node.frames) == 2)
    stub_node.accepts = True
    stub_node.send(FrameTaken(2, 1, accepted=True))
    stub_node.send(KeyframeWanted())
    stub_node.wait_for(lambda: len(stub_node.frames) == 3)
    assert [(ready.step, ready.base_step) for ready in stub_node.frames] == [(1, None), (2, 1), (2, None)]


def test_a_node_that_never_answers_does_not_keep_a_group_from_ending(
    exchange: GroupExchange, stub_node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(exchange_module, "CLOSE_TIMEOUT_S", 0.05)
    stub_node.accepts = None
    model = nn.Linear(3, 4)
    exchange.publish(take_snapshot(model, 1))
    stub_node.wait_for(lambda: len(stub_node.frames) == 1)
    exchange.publish(take_snapshot(model, 2))
    exchange.close()
    stub_node.wait_for(lambda: bool(stub_node.all(Left)))
    [event] = stub_node.events
    assert (event.step, len(stub_node.frames)) == (2, 1) and "did not take step 1" in event.why


def test_after_closing_nothing_is_sent_and_nothing_fails(exchange: GroupExchange, stub_node) -> None:
    exchange.close()
    exchange.close()
    exchange.publish(take_snapshot(nn.Linear(3, 4), 1))
    exchange.report(Evaluated(1, 2.5, 0.1))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("p2pcodistill")]


def inbox_of(exchange: GroupExchange, stub_node) -> dict[str, Offer]:
    """The offers after everything that the node sent so far has arrived."""
    stub_node.send(StopRequested())
    while not exchange.inbox().stop_requested:  # messages keep their order
        pass
    return dict(exchange.inbox().offers)


def offer(origin: str, incarnation: int, step: int, folder: str) -> FrameOffer:
    return FrameOffer(origin, incarnation, step, folder, ((incarnation, step, "x.frame"),))


def test_the_inbox_holds_the_newest_offer_of_each_teacher(spec: GroupSpec, stub_node) -> None:
    stub_node.offers = (offer("tokyo", 1, 50, "/a"), offer("oslo", 0, 20, "/b"))
    exchange = GroupExchange(spec, is_lead=True, max_frame_bytes=MAX_FRAME_BYTES)
    assert exchange.inbox().offers.keys() == {"tokyo", "oslo"}, "the stored ones are there at once"
    assert not exchange.inbox().stop_requested
    for newer in [
        offer("tokyo", 1, 40, "/older"),
        offer("oslo", 0, 30, "/c"),
        offer("oslo", 1, 10, "/d"),
    ]:
        stub_node.send(FrameOffered(newer))
    offers = inbox_of(exchange, stub_node)
    assert offers == {
        "tokyo": Offer("tokyo", 1, 50, "/a", (ChainFile(1, 50, "x.frame"),)),
        "oslo": Offer("oslo", 1, 10, "/d", (ChainFile(1, 10, "x.frame"),)),
    }
    exchange.close()


def test_the_inbox_holds_the_newest_version_that_each_teacher_announced(spec: GroupSpec, stub_node) -> None:
    stub_node.known = (VersionKnown("tokyo", 1, 50), VersionKnown("oslo", 0, 20))
    stub_node.offers = (offer("tokyo", 1, 40, "/a"), offer("lima", 0, 5, "/a"))
    exchange = GroupExchange(spec, is_lead=True, max_frame_bytes=MAX_FRAME_BYTES)
    assert exchange.inbox().announced == {"tokyo": (1, 50), "oslo": (0, 20)}
    for newer in [VersionKnown("tokyo", 0, 90), VersionKnown("oslo", 1, 10)]:
        stub_node.send(newer)
    stub_node.send(FrameOffered(offer("tokyo", 1, 60, "/a")))
    inbox_of(exchange, stub_node)
    assert exchange.inbox().announced == {"tokyo": (1, 50), "oslo": (1, 10)}
    assert exchange.inbox().newest == {"tokyo": (1, 60), "oslo": (1, 10), "lima": (0, 5)}
    exchange.close()


def test_a_new_launch_is_told_when_the_node_has_heard_of_versions(spec: GroupSpec, stub_node) -> None:
    stub_node.known = (VersionKnown("tokyo", 1, 50, 3600.0), VersionKnown("tokyo", 1, 60, 20.0))
    exchange = GroupExchange(spec, is_lead=True, max_frame_bytes=MAX_FRAME_BYTES)
    ages_s = exchange.inbox().known_ages_s["tokyo"]
    assert list(ages_s) == [(1, 50), (1, 60)]
    assert ages_s[Version(1, 50)] - ages_s[Version(1, 60)] == pytest.approx(3580, abs=60)
    assert ages_s[Version(1, 60)] >= 20
    exchange.close()


def test_other_ranks_only_decode(spec: GroupSpec, stub_node, tmp_path: Path) -> None:
    exchange = GroupExchange(spec, is_lead=False, max_frame_bytes=MAX_FRAME_BYTES)
    exchange.publish(take_snapshot(nn.Linear(3, 4), 1))
    exchange.report(Evaluated(1, 2.5, 0.1))
    assert exchange.inbox().offers == {}
    found = write_frame(tmp_path, nn.Linear(3, 4), 9)
    frames = tuple(ChainFile(*frame) for frame in found.frames)
    assert exchange.prepare(Offer("tokyo", 0, 9, found.folder, frames)).result(timeout=GENEROUS_S).step == 9
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
    launch(spec.model_copy(update={"teachers": ({"tokyo": 1.0},)}))
    stub_node.offers = (write_frame(tmp_path, nn.Linear(3, 4), 9),)
    model = nn.Linear(3, 4)
    codistiller = join(model)
    while not codistiller.teacher_versions:
        codistiller.step()
    assert codistiller.loss(model(torch.ones(1, 3)), torch.ones(1, 3)).item() > 0
    codistiller.close()
    stub_node.wait_for(lambda: any(isinstance(event, TeacherSwapped) for event in stub_node.events))


def test_a_joined_script_refuses_another_model_by_its_header(
    spec: GroupSpec, stub_node, launch: Callable[[GroupSpec], Path], tmp_path: Path
) -> None:
    launch(spec.model_copy(update={"teachers": ({"tokyo": 1.0},)}))
    offer = write_frame(tmp_path, nn.Linear(3, 5), 9)
    path = tmp_path / offer.frames[0][2]
    data = bytearray(path.read_bytes())
    data[20] ^= 1  # of the first tensor's piece, which nobody is to look at
    path.write_bytes(data)
    stub_node.offers = (offer,)
    codistiller = join(nn.Linear(3, 4))
    while not any(isinstance(event, TeacherRefused) for event in list(stub_node.events)):
        codistiller.step()
    codistiller.close()
    [refused] = [event for event in stub_node.events if isinstance(event, TeacherRefused)]
    assert (refused.teacher, refused.reason) == ("tokyo", "wrong-schema")


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


def test_a_joined_script_may_follow_a_schedule_and_bring_a_criterion(
    spec: GroupSpec, stub_node, launch: Callable[[GroupSpec], Path], tmp_path: Path
) -> None:
    codistillation = spec.codistillation.model_copy(
        update={"burn_in_steps": 0, "gate_margin": 0.5, "exchange_interval_steps": 1_000_000}
    )
    teachers = ({"tokyo": 1.0}, {"oslo": 1.0})
    launch(spec.model_copy(update={"teachers": teachers, "codistillation": codistillation}))
    stub_node.offers = (write_frame(tmp_path, nn.Linear(3, 4), 9),)
    model = nn.Linear(3, 4)

    def criterion(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return 100 * (logits - targets).square().mean()

    codistiller = join(model, criterion=criterion)
    inputs = torch.ones(MIN_PREDICTIONS, 3)
    while not codistiller.teacher_versions or codistiller.teacher_weights:
        logits = model(inputs)
        codistiller.loss(logits, inputs, logits.detach())  # by which nobody is as good as the student
        codistiller.step()
    codistiller.close()
    stub_node.wait_for_event(TeacherGated)


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
        timeout=GENEROUS_S,
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
