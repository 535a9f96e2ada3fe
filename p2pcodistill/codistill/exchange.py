"""What codistillation needs of the outside, as one small Protocol, and an implementation within one process.

`group.exchange.GroupExchange` implements it over the node. `MemoryBoard` lets students of one process teach each other, by
the same frames.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Protocol

from p2pcodistill.checkpoint.frames import DecodedFrame, decode_frame, encode_keyframe
from p2pcodistill.checkpoint.snapshot import Snapshot
from p2pcodistill.errors import NonFiniteError, RefusedError
from p2pcodistill.telemetry import Event, SnapshotSkipped


@dataclass(frozen=True, slots=True)
class Offer:
    """A teacher's checkpoint that is there to be read. `path` is where; every rank must be able to read it."""

    teacher: str
    incarnation: int
    step: int
    path: str

    @property
    def version(self) -> tuple[int, int]:
        """Orders the offers of one teacher: the larger one is newer."""
        return self.incarnation, self.step


@dataclass(frozen=True, slots=True)
class Inbox:
    """What has arrived: the newest offer of each teacher, and whether training is to stop early."""

    offers: Mapping[str, Offer] = field(default_factory=dict)
    stop_requested: bool = False


class Exchange(Protocol):
    """A group's way to its neighbours. Nothing here waits for the network."""

    def publish(self, snapshot: Snapshot) -> None:
        """Rank 0: hand over a snapshot for encoding and sending; never blocks."""

    def inbox(self) -> Inbox:
        """Rank 0: what has arrived so far; empty on other ranks."""

    def prepare(self, offer: Offer) -> Future[DecodedFrame]:
        """Every rank: read and decode a checkpoint beside the training thread.

        The future raises RefusedError for a frame that is not acceptable and OSError for one that cannot be read.
        """

    def report(self, event: Event) -> None:
        """Rank 0: pass an event on; other ranks drop it. Never blocks."""

    def close(self) -> None:
        """Hand over what was published and reported, then end. Safe to call twice."""


class MemoryBoard:
    """Where the students of one process (in any of its threads) publish and find each other's newest frame."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._frames: dict[str, tuple[int, bytes]] = {}

    def exchange(
        self,
        student: str,
        teachers: Collection[str],
        *,
        max_frame_bytes: int = 1 << 30,
        on_event: Callable[[Event], None] = lambda _event: None,
    ) -> Exchange:
        """The exchange of `student`, which learns from `teachers`; its events go to `on_event`."""
        return _MemoryExchange(self, student, tuple(teachers), max_frame_bytes, on_event)

    def put(self, student: str, step: int, frame: bytes) -> None:
        """Make `frame` the newest one of `student`."""
        with self._lock:
            self._frames[student] = (step, frame)

    def newest(self, student: str) -> tuple[int, bytes] | None:
        """(step, frame) of the newest checkpoint of `student`."""
        with self._lock:
            return self._frames.get(student)


class _MemoryExchange:
    """One student's view of a board. A frame is encoded and decoded where it is asked for: nothing runs beside."""

    def __init__(
        self,
        board: MemoryBoard,
        student: str,
        teachers: tuple[str, ...],
        max_frame_bytes: int,
        on_event: Callable[[Event], None],
    ) -> None:
        self._board = board
        self._student = student
        self._teachers = teachers
        self._max_frame_bytes = max_frame_bytes
        self._on_event = on_event
        # An offer holds on to its frame, as a file does.
        self._offered: dict[str, tuple[int, bytes]] = {}

    def publish(self, snapshot: Snapshot) -> None:
        try:
            self._board.put(self._student, snapshot.step, encode_keyframe(snapshot))
        except NonFiniteError as error:
            self.report(SnapshotSkipped(snapshot.step, str(error)))

    def inbox(self) -> Inbox:
        newest = {teacher: self._board.newest(teacher) for teacher in self._teachers}
        self._offered = {teacher: found for teacher, found in newest.items() if found is not None}
        return Inbox({teacher: Offer(teacher, 0, step, "") for teacher, (step, _) in self._offered.items()})

    def prepare(self, offer: Offer) -> Future[DecodedFrame]:
        future: Future[DecodedFrame] = Future()
        try:
            _, frame = self._offered[offer.teacher]
            future.set_result(decode_frame(frame, max_bytes=self._max_frame_bytes))
        except RefusedError as error:
            future.set_exception(error)
        return future

    def report(self, event: Event) -> None:
        self._on_event(event)

    def close(self) -> None:
        pass
