"""What codistillation needs of the outside, as one small Protocol, and an implementation within one process.

`group.exchange.GroupExchange` implements it over the node. `MemoryBoard` lets students of one process teach each other, by
the same frames.
"""

from __future__ import annotations

import io
import threading
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from p2pcodistill.checkpoint.chain import cheapest_path, worth_keeping
from p2pcodistill.checkpoint.decoder import decode_frame
from p2pcodistill.checkpoint.encoder import EncodedFrame, FrameEncoder
from p2pcodistill.checkpoint.manifest import Version
from p2pcodistill.checkpoint.reference import Reference
from p2pcodistill.checkpoint.snapshot import Snapshot
from p2pcodistill.config import FramesConfig
from p2pcodistill.errors import NonFiniteError, RefusedError
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.node_events import FramePublished
from p2pcodistill.telemetry.training_events import SnapshotSkipped


class ChainFile(NamedTuple):
    """One frame of a chain: the version that it leads to, and the name of its file."""

    incarnation: int
    step: int
    file_name: str


@dataclass(frozen=True, slots=True)
class Offer:
    """A teacher's checkpoint that is there to be read: a chain of frames, keyframe first, of which the last leads to it.

    The files lie in `folder`, which every rank must be able to read.
    """

    teacher: str
    incarnation: int
    step: int
    folder: str
    frames: tuple[ChainFile, ...]

    @property
    def version(self) -> Version:
        """Orders the offers of one teacher: the larger one is newer."""
        return Version(self.incarnation, self.step)


@dataclass(frozen=True, slots=True)
class Inbox:
    """What has arrived: the newest offer of each teacher, and whether training is to stop early.

    `announced` is the newest version that each teacher is known to have, where that is not the one on offer: it may still be
    on its way. `known_ages_s` tells how many seconds ago versions were announced, as far as that was before this launch.
    `revoked` are the teachers that are no longer trusted.
    """

    offers: Mapping[str, Offer] = field(default_factory=dict)
    stop_requested: bool = False
    announced: Mapping[str, Version] = field(default_factory=dict)
    revoked: frozenset[str] = frozenset()
    known_ages_s: Mapping[str, Mapping[Version, float]] = field(default_factory=dict)

    @property
    def newest(self) -> dict[str, Version]:
        """The newest version known of each teacher."""
        offered = {teacher: offer.version for teacher, offer in self.offers.items()}
        return offered | {
            teacher: max(version, offered.get(teacher, version))
            for teacher, version in self.announced.items()
        }


class Exchange(Protocol):
    """A group's way to its neighbours. Nothing here waits for the network."""

    def publish(self, snapshot: Snapshot) -> None:
        """Rank 0: hand over a snapshot for encoding and sending; never blocks."""

    def inbox(self) -> Inbox:
        """Rank 0: what has arrived so far; empty on other ranks."""

    def prepare(self, offer: Offer) -> Future[Reference]:
        """Every rank: read and decode a checkpoint beside the training thread.

        The reference stays as it is until the same teacher's next offer is prepared. The future raises RefusedError for a
        frame that is not acceptable and OSError for one that cannot be read.
        """

    def report(self, event: Event) -> None:
        """Rank 0: pass an event on; other ranks drop it. Never blocks."""

    def close(self) -> None:
        """Hand over what was published and reported, then end. Safe to call twice."""


@dataclass(frozen=True, slots=True)
class _BoardFrame:
    """A frame on the board; a `chain.ChainFrame`."""

    version: Version
    base: Version | None
    data: bytes

    @property
    def num_bytes(self) -> int:
        return len(self.data)


class MemoryBoard:
    """Where the students of one process (in any of its threads) publish and find each other's chains of frames."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._frames: dict[str, list[_BoardFrame]] = {}

    def exchange(
        self,
        student: str,
        teachers: Collection[str],
        *,
        frames: FramesConfig | None = None,
        max_frame_bytes: int = 1 << 30,
        on_event: Callable[[Event], None] = lambda _event: None,
    ) -> Exchange:
        """The exchange of `student`, which learns from `teachers`; its events go to `on_event`."""
        encoder = FrameEncoder(frames or FramesConfig())
        return _MemoryExchange(self, student, tuple(teachers), encoder, max_frame_bytes, on_event)

    def put(self, student: str, frame: EncodedFrame, data: bytes) -> None:
        """Add a frame of `student`, and drop those that nobody will want any more."""
        base = None if frame.base_step is None else Version(0, frame.base_step)
        with self._lock:
            frames = self._frames.setdefault(student, [])
            frames.append(_BoardFrame(Version(0, frame.step), base, data))
            frames[:] = worth_keeping(frames)

    def newest(self, student: str) -> int | None:
        """The step of the newest checkpoint of `student`."""
        with self._lock:
            frames = self._frames.get(student)
            return frames[-1].version.step if frames else None

    def frames(self, student: str) -> tuple[_BoardFrame, ...]:
        """The frames of `student` that are worth keeping now, oldest first."""
        with self._lock:
            return tuple(self._frames.get(student, ()))


class _MemoryExchange:
    """One student's view of a board. A frame is encoded and decoded where it is asked for: nothing runs beside."""

    def __init__(
        self,
        board: MemoryBoard,
        student: str,
        teachers: tuple[str, ...],
        encoder: FrameEncoder,
        max_frame_bytes: int,
        on_event: Callable[[Event], None],
    ) -> None:
        self._board = board
        self._student = student
        self._teachers = teachers
        self._encoder = encoder
        self._max_frame_bytes = max_frame_bytes
        self._on_event = on_event
        self._references: dict[str, Reference] = {}
        # An offer holds on to its frames, as files do: others may have come before it is prepared.
        self._offered: dict[str, tuple[_BoardFrame, ...]] = {}

    def publish(self, snapshot: Snapshot) -> None:
        sink = io.BytesIO()
        try:
            frame = self._encoder.encode(snapshot, sink)
        except NonFiniteError as error:
            self.report(SnapshotSkipped(snapshot.step, str(error)))
            return
        self._board.put(self._student, frame, sink.getvalue())
        kind = "keyframe" if frame.base_step is None else "delta"
        self.report(FramePublished(0, frame.step, kind, frame.num_bytes, frame.num_fp16_bytes))
        if self._encoder.wants_final_keyframe:  # whoever comes late cannot ask for one here
            sink = io.BytesIO()
            keyframe = self._encoder.encode_keyframe_of_reference(sink)
            assert keyframe is not None
            self._board.put(self._student, keyframe, sink.getvalue())

    def inbox(self) -> Inbox:
        self._offered = {
            teacher: frames for teacher in self._teachers if (frames := self._board.frames(teacher))
        }
        return Inbox(
            {
                teacher: Offer(teacher, 0, frames[-1].version.step, "", ())
                for teacher, frames in self._offered.items()
            }
        )

    def prepare(self, offer: Offer) -> Future[Reference]:
        future: Future[Reference] = Future()
        reference = self._references.pop(offer.teacher, None)
        try:
            held = Version(0, reference.step) if reference else None
            path = cheapest_path(self._offered[offer.teacher], held, Version(0, offer.step))
            if path is None:  # too far behind
                raise FileNotFoundError(f"the frames that lead {offer.teacher} to step {offer.step} are gone")
            for frame in path:
                reference = decode_frame(frame.data, reference, max_bytes=self._max_frame_bytes)
            assert reference is not None
            self._references[offer.teacher] = reference
            future.set_result(reference)
        except (RefusedError, FileNotFoundError) as error:
            future.set_exception(error)
        return future

    def report(self, event: Event) -> None:
        self._on_event(event)

    def close(self) -> None:
        pass
