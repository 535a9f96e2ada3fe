"""Typed events: what a site says about itself, as JSON lines that everything else is derived from.

A node appends every event to `events.jsonl` in its run folder; the live view, the summary and the report read events and
nothing else. Ranks hand their events to the node over the link, so one file tells the whole story of a site.

An event's record is one flat JSON object: `event` (its name), `time_unix_s` (the wall clock of the machine that wrote it;
informative only, nothing is ordered by it) and the fields of its class.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any, ClassVar, TextIO, TypeAlias


@dataclass(frozen=True, slots=True)
class Event:
    """Base of all events. `name` is what the record's `event` key says."""

    name: ClassVar[str] = ""


EVENT_TYPES: dict[str, type[Event]] = {}


def _event(cls: type[Event]) -> type[Event]:
    EVENT_TYPES[cls.name] = cls
    return cls


# --- the node


@_event
@dataclass(frozen=True, slots=True)
class NodeStarted(Event):
    """The node listens. `neighbours` are the members that this site exchanges with."""

    name: ClassVar[str] = "node-started"
    site: str
    run: str
    listen: str
    incarnation: int
    neighbours: list[str]
    pid: int


@_event
@dataclass(frozen=True, slots=True)
class ConfigReloaded(Event):
    """The site's file was read again while the node ran: these of its keys took effect, and these wait for a restart."""

    name: ClassVar[str] = "config-reloaded"
    changed: list[str]
    needs_restart: list[str]


@_event
@dataclass(frozen=True, slots=True)
class NodeStopping(Event):
    """A first SIGINT or SIGTERM arrived: the ranks are asked to stop at a step boundary. A second one ends them at once."""

    name: ClassVar[str] = "node-stopping"
    signal: str


@_event
@dataclass(frozen=True, slots=True)
class NodeStopped(Event):
    """The node has shut down. `reason` is `finished`, `stopped` (a signal) or `failed`."""

    name: ClassVar[str] = "node-stopped"
    site: str
    reason: str


@_event
@dataclass(frozen=True, slots=True)
class PeerConnected(Event):
    """A neighbour's hello was accepted."""

    name: ClassVar[str] = "peer-connected"
    peer: str


@_event
@dataclass(frozen=True, slots=True)
class PeerDisconnected(Event):
    """The last connection with a neighbour is gone; the transport keeps trying."""

    name: ClassVar[str] = "peer-disconnected"
    peer: str
    why: str


@_event
@dataclass(frozen=True, slots=True)
class PeerSuspected(Event):
    """A neighbour with a session has not answered pings for `silent_s`: others are asked before it."""

    name: ClassVar[str] = "peer-suspected"
    peer: str
    silent_s: float


@_event
@dataclass(frozen=True, slots=True)
class PeerRecovered(Event):
    """A suspected neighbour has spoken again, after `silent_s`."""

    name: ClassVar[str] = "peer-recovered"
    peer: str
    silent_s: float


@_event
@dataclass(frozen=True, slots=True)
class PeerQuarantined(Event):
    """A peer kept sending what was refused, for `reason` in the end: it is not listened to for `duration_s`."""

    name: ClassVar[str] = "peer-quarantined"
    peer: str
    reason: str
    num_refusals: int
    duration_s: float


@_event
@dataclass(frozen=True, slots=True)
class MemberTrustChanged(Event):
    """This site's allow-list has changed: `member` is trusted from now on, or not any more."""

    name: ClassVar[str] = "member-trust-changed"
    member: str
    is_trusted: bool
    why: str


@_event
@dataclass(frozen=True, slots=True)
class RelayStarted(Event):
    """This site fetches frames of `origin`, who does not teach it, for `student`, who cannot connect with it."""

    name: ClassVar[str] = "relay-started"
    origin: str
    student: str


@_event
@dataclass(frozen=True, slots=True)
class RelayStopped(Event):
    """Nobody needs this site to relay `origin` any more."""

    name: ClassVar[str] = "relay-stopped"
    origin: str


@_event
@dataclass(frozen=True, slots=True)
class Refused(Event):
    """Something from outside was refused; `reason` is a class-level word of `errors.RefusedError`, `why` the sentence.

    One event may stand for `num_times` alike.
    """

    name: ClassVar[str] = "refused"
    peer: str | None
    reason: str
    why: str
    num_times: int = 1


@_event
@dataclass(frozen=True, slots=True)
class VersionAnnounced(Event):
    """A verified manifest of `origin` arrived: this is the newest version known here."""

    name: ClassVar[str] = "version-announced"
    origin: str
    incarnation: int
    step: int
    num_bytes: int


@_event
@dataclass(frozen=True, slots=True)
class FrameFetched(Event):
    """A frame (`kind`: keyframe or delta) is complete, verified and stored. `num_resent_bytes` arrived more than once."""

    name: ClassVar[str] = "frame-fetched"
    origin: str
    incarnation: int
    step: int
    kind: str
    num_bytes: int
    num_resent_bytes: int
    duration_s: float


@_event
@dataclass(frozen=True, slots=True)
class FramePublished(Event):
    """This site's frame was encoded, signed, stored and told to gossip. `num_fp16_bytes`: the same tensors as raw fp16.

    `kind` is keyframe or delta. A keyframe may have the step of the delta before it: made because a student needed one.
    """

    name: ClassVar[str] = "frame-published"
    incarnation: int
    step: int
    kind: str
    num_bytes: int
    num_fp16_bytes: int


@_event
@dataclass(frozen=True, slots=True)
class TrafficMeasured(Event):
    """Bytes handed to and received from the transport since the node started, envelopes included."""

    name: ClassVar[str] = "traffic-measured"
    num_bytes_sent: int
    num_bytes_received: int
    num_bytes_sent_by_peer: dict[str, int]
    num_bytes_received_by_peer: dict[str, int]


@_event
@dataclass(frozen=True, slots=True)
class LinkMeasured(Event):
    """What the link with a neighbour carried lately, at best, in each direction, and its round trip; None: not measured yet.

    `num_connection_losses` counts sessions that ended since the node started. `queued_bytes` of chunks have been asked of
    this site and have not reached the peer.
    """

    name: ClassVar[str] = "link-measured"
    peer: str
    upload_mbit: float | None
    download_mbit: float | None
    round_trip_ms: float | None
    num_connection_losses: int
    queued_bytes: int


@_event
@dataclass(frozen=True, slots=True)
class GroupStarted(Event):
    """The site's workers were launched; `attempt` counts from 0 within one life of the node."""

    name: ClassVar[str] = "group-started"
    attempt: int
    num_ranks: int
    pid: int


@_event
@dataclass(frozen=True, slots=True)
class GroupExited(Event):
    """The workers ended. `restart_in_s` is None when the node will not start them again."""

    name: ClassVar[str] = "group-exited"
    exit_status: int
    restart_in_s: float | None


# --- the ranks


@_event
@dataclass(frozen=True, slots=True)
class TrainingStarted(Event):
    """Rank 0 is about to take its first step. `num_parameters` counts elements; `start_step` is above 0 after a resume."""

    name: ClassVar[str] = "training-started"
    start_step: int
    num_steps: int
    num_parameters: int
    num_ranks: int
    device: str
    precision: str


@_event
@dataclass(frozen=True, slots=True)
class StepMeasured(Event):
    """Means over the steps since the previous such event, at `step` (1-based count of completed updates)."""

    name: ClassVar[str] = "step-measured"
    step: int
    loss: float
    distillation_loss: float | None
    learning_rate: float
    steps_per_s: float
    exchange_s: float
    duration_s: float


@_event
@dataclass(frozen=True, slots=True)
class Evaluated(Event):
    """Held-out loss (mean nats per prediction for the language model) after `step` updates."""

    name: ClassVar[str] = "evaluated"
    step: int
    val_loss: float
    duration_s: float


@_event
@dataclass(frozen=True, slots=True)
class TeacherSwapped(Event):
    """After `step` updates this version of `teacher` took the last one's place, the same on every rank.

    The group learns from it from then on, unless it is gated or over a limit.
    """

    name: ClassVar[str] = "teacher-swapped"
    step: int
    teacher: str
    incarnation: int
    teacher_step: int


@_event
@dataclass(frozen=True, slots=True)
class TeacherRefused(Event):
    """A fetched checkpoint did not become a teacher: it does not decode, does not fit or is not finite."""

    name: ClassVar[str] = "teacher-refused"
    step: int
    teacher: str
    incarnation: int
    teacher_step: int
    reason: str
    why: str


@_event
@dataclass(frozen=True, slots=True)
class TeacherGated(Event):
    """All ranks agree that this version of `teacher` does not teach until it recovers: it is worse than the student.

    Losses are means over the ranks' batches of the last round of agreement; None where they could not be measured.
    """

    name: ClassVar[str] = "teacher-gated"
    step: int
    teacher: str
    incarnation: int
    teacher_step: int
    loss: float | None
    student_loss: float | None
    why: str


@_event
@dataclass(frozen=True, slots=True)
class TeacherReadmitted(Event):
    """A gated teacher has recovered, and teaches again. Losses as in `TeacherGated`."""

    name: ClassVar[str] = "teacher-readmitted"
    step: int
    teacher: str
    incarnation: int
    teacher_step: int
    loss: float | None
    student_loss: float | None


@_event
@dataclass(frozen=True, slots=True)
class TeacherExpired(Event):
    """This version of `teacher` is over a limit on staleness or age, and does not teach until a newer one comes."""

    name: ClassVar[str] = "teacher-expired"
    step: int
    teacher: str
    incarnation: int
    teacher_step: int
    staleness_steps: int
    age_s: float
    why: str


@_event
@dataclass(frozen=True, slots=True)
class SnapshotSkipped(Event):
    """An exchange was due and nothing was published. `why`: encoder or node were busy, or weights are not finite."""

    name: ClassVar[str] = "snapshot-skipped"
    step: int
    why: str


@_event
@dataclass(frozen=True, slots=True)
class TrainingCheckpointed(Event):
    """A complete training checkpoint is on disk."""

    name: ClassVar[str] = "training-checkpointed"
    step: int
    duration_s: float


@_event
@dataclass(frozen=True, slots=True)
class TrainingEnded(Event):
    """The loop is over: `finished` is False when the ranks agreed to stop early."""

    name: ClassVar[str] = "training-ended"
    step: int
    finished: bool
    exchange_s: float
    duration_s: float


# --- simulations


@_event
@dataclass(frozen=True, slots=True)
class FaultInjected(Event):
    """A simulation did this to `site`, which had completed `step` steps as far as its events told.

    `kind` is that of the scenario's fault, `factor` how many times slower a slowed site is.
    """

    name: ClassVar[str] = "fault-injected"
    site: str
    kind: str
    step: int
    factor: float | None = None


@_event
@dataclass(frozen=True, slots=True)
class LinkCarried(Event):
    """What a simulated link between two `sites` carried in all, both directions, and how often it broke a connection."""

    name: ClassVar[str] = "link-carried"
    sites: list[str]
    num_bytes: int
    num_cuts: int


# --- records

Record: TypeAlias = dict[str, Any]


def _finite(value: Any) -> Any:
    # JSON has no NaN; a diverged loss must still be readable by strict parsers.
    return None if isinstance(value, float) and not math.isfinite(value) else value


def to_record(event: Event, *, time_unix_s: float | None = None) -> Record:
    """The flat record of `event`, stamped with `time_unix_s` (now by default)."""
    stamp = time.time() if time_unix_s is None else time_unix_s
    return {"event": event.name, "time_unix_s": stamp} | {k: _finite(v) for k, v in asdict(event).items()}


def from_record(record: Record) -> Event:
    """The event of a record; `time_unix_s` is left to the caller.

    Raises ValueError when the record names no event of this version or lacks a field.
    """
    cls = EVENT_TYPES.get(str(record.get("event")))
    if cls is None:
        raise ValueError(f"unknown event {record.get('event')!r}")
    try:
        return cls(
            **{f.name: record[f.name] for f in fields(cls) if f.name in record or f.default is MISSING}
        )
    except KeyError as error:
        raise ValueError(f"event {cls.name!r} lacks the field {error}") from error


class EventLog:
    """Appends events to a JSONL file and hands each to subscribers, in order.

    Lines are flushed one by one, so that a reader (the live view of `simulate`, `tail -f`) is never far behind and a killed
    node loses at most the line being written.
    """

    def __init__(self, path: Path, *subscribers: Callable[[Record], None]) -> None:
        self._file: TextIO = path.open("a+", encoding="utf-8")
        self._subscribers = list(subscribers)
        if _ends_within_a_line(path):  # a killed writer tore its last line
            self._file.write("\n")

    def write(self, event: Event) -> None:
        """Append one event."""
        self.write_record(to_record(event))

    def write_record(self, record: Record) -> None:
        """Append a record that was stamped elsewhere (a rank's)."""
        self._file.write(json.dumps(record, separators=(",", ":"), allow_nan=False) + "\n")
        self._file.flush()
        for subscriber in list(self._subscribers):
            try:
                subscriber(record)
            except OSError:  # it prints into a pipe that nobody reads any more: the site goes on without it
                self._subscribers.remove(subscriber)

    def close(self) -> None:
        """Close the file; further writes raise ValueError. What a full disk did not take was reported by `write`."""
        with contextlib.suppress(OSError):
            self._file.close()


def _ends_within_a_line(path: Path) -> bool:
    with path.open("rb") as file:
        return file.seek(0, os.SEEK_END) > 0 and file.seek(-1, os.SEEK_END) >= 0 and file.read(1) != b"\n"


class EventTail:
    """Reads a growing JSONL file of events from where it left off. A torn last line waits for its end."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset_bytes = 0

    def read(self) -> Iterator[Record]:
        """Yield the records that are complete since the last call; nothing while the file does not exist."""
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset_bytes)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset_bytes += len(line)
                try:
                    record = json.loads(line)
                except ValueError:  # the line a killed writer tore, healed by the next writer's newline
                    continue
                if isinstance(record, dict):
                    yield record
