"""A made-up run with the shape of the real one, told in events, for all that is derived from events."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import pytest

from p2pcodistill.report.history import SiteHistory
from p2pcodistill.report.summary import ArmResult, Kind
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.node_events import (
    FrameFetched,
    FramePublished,
    GroupExited,
    GroupStarted,
    NodeStarted,
    NodeStopped,
    PeerConnected,
    TrafficMeasured,
    VersionAnnounced,
)
from p2pcodistill.telemetry.records import Record, to_record
from p2pcodistill.telemetry.training_events import (
    Evaluated,
    StepMeasured,
    TeacherSwapped,
    TrainingEnded,
    TrainingStarted,
)

FINAL_LOSSES = {"codistilled": 1.485, "alone": 1.601, "pooled": 1.479}
NUM_PARAMETERS = 940_000
FRAME_BYTES = 1_610_000
BURN_IN_STEPS = 200


def loss_at(kind: Kind, step: int, num_steps: int, offset: float = 0.0) -> float:
    """A learning curve from log(256) down to the kind's final loss."""
    share = step / num_steps
    distilled = 0.25 * max(0.0, 1 - abs(share - 0.35) / 0.35) if kind == "codistilled" else 0.0
    early = math.exp(-share * 40) * (math.log(256) - 2.6) + (1.1 - distilled) * (1 - share) ** 2.2
    return FINAL_LOSSES[kind] + early + offset


def site_events(
    kind: Kind, site: str, *, peers: tuple[str, ...] = (), seed: int = 0, num_steps: int = 2000
) -> Iterator[Event]:
    """The events of one uneventful life of a site."""
    offset = 0.012 * (sum(site.encode()) % 3 - 1) + 0.004 * seed
    yield NodeStarted(site, "pair", "tcp://127.0.0.1:5600", 1, list(peers), 4711)
    for peer in peers:
        yield PeerConnected(peer)
    yield GroupStarted(0, 1, 1)
    yield TrainingStarted(0, num_steps, NUM_PARAMETERS, 1, "cpu", "float32")
    sent = received = 0
    for step in range(10, num_steps + 1, 10):
        distilling = bool(peers) and step > BURN_IN_STEPS
        speed = (15.0 if distilling else 21.0) + math.sin(step)
        loss = loss_at(kind, step, num_steps, offset) - 0.05 + 0.03 * math.sin(step * 1.7)
        yield StepMeasured(
            step, loss, 1.9 if distilling else None, 1e-3, speed, 0.0009 if peers else 0.0, 10 / speed
        )
        if step % 50 == 10 and peers and step > 50:
            for index, peer in enumerate(peers):
                teacher_step = step - 10 - 50 * (step % 350 == 60) - 20 * index
                yield TeacherSwapped(step, peer, 1, teacher_step)
        if step % 50:
            continue
        yield Evaluated(step, loss_at(kind, step, num_steps, offset), 0.2)
        if peers:
            frame_kind = "keyframe" if step == 50 else "delta"
            yield FramePublished(1, step, frame_kind, FRAME_BYTES, 2 * NUM_PARAMETERS)
            for index, peer in enumerate(peers):
                yield VersionAnnounced(peer, 1, step - 20 * index, FRAME_BYTES)
                yield FrameFetched(peer, 1, step - 20 * index, frame_kind, FRAME_BYTES, 0, 0.1)
                sent, received = sent + FRAME_BYTES + 2000, received + FRAME_BYTES + 1800
            yield TrafficMeasured(sent, received, {}, {})
    yield TrainingEnded(
        num_steps, True, 0.0009 * num_steps / 10 if peers else 0.0, num_steps / (15.5 if peers else 20.5)
    )
    yield GroupExited(0, None)
    yield NodeStopped(site, "finished")


def records_of(events: Iterator[Event], start_s: float = 1_700_000_000.0) -> list[Record]:
    """The events' records, a fixed time apart."""
    return [to_record(event, time_unix_s=start_s + 0.3 * index) for index, event in enumerate(events)]


def run_arms(
    *,
    kinds: tuple[Kind, ...] = ("codistilled", "alone", "pooled"),
    sites: tuple[str, ...] = ("berlin", "tokyo"),
    seeds: tuple[int, ...] = (0,),
    num_steps: int = 2000,
) -> list[ArmResult]:
    """The arms of a run in which everything went well."""
    arms = []
    for seed in seeds:
        for kind in kinds:
            names = ("pooled",) if kind == "pooled" else sites
            histories = {}
            for name in names:
                peers = tuple(other for other in names if other != name) if kind == "codistilled" else ()
                events = site_events(kind, name, peers=peers, seed=seed, num_steps=num_steps)
                histories[name] = SiteHistory.of(records_of(events))
            arms.append(ArmResult(kind, kind, seed, histories))
    return arms


@pytest.fixture
def make_arms() -> Callable[..., list[ArmResult]]:
    return run_arms


@pytest.fixture
def make_events() -> Callable[..., Iterator[Event]]:
    return site_events


@pytest.fixture
def make_records() -> Callable[..., list[Record]]:
    return records_of
