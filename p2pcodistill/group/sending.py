"""Rank 0's way out: snapshots become frames of one chain, on a thread of its own, and go to the node one by one.

Each frame builds on the one before it, so none may be lost on the way: the next one is encoded when the node has taken the
last. Meanwhile one snapshot waits; when a newer one comes, it is skipped. The training thread never waits for any of this.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from p2pcodistill.checkpoint.chain import MAX_CHAIN_FRAMES
from p2pcodistill.checkpoint.encoder import EncodedFrame, FrameEncoder
from p2pcodistill.checkpoint.snapshot import Snapshot
from p2pcodistill.config import FramesConfig
from p2pcodistill.errors import NonFiniteError
from p2pcodistill.group.link_messages import EventHappened, FrameReady, FrameTaken
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.records import to_record
from p2pcodistill.telemetry.training_events import SnapshotSkipped

_PARTIAL_SUFFIX = ".part"
_MIN_INTERVAL_S = 1.0
"""Snapshots that follow each other faster are not held against the links: of small transfers these show only the latency."""
_LINK_SHARE = 0.8
"""Of what the links carry, for delta frames: keyframes for those who fell behind, and control, travel too."""

_logger = logging.getLogger("p2pcodistill")


@contextlib.contextmanager
def outbox_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write that gets its name when it is complete, and is gone when writing fails. Raises OSError."""
    partial = path.with_name(path.name + _PARTIAL_SUFFIX)
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


class FrameSender:
    """What rank 0 publishes and reports, in that order. Any thread may call; `send` hands one message to the node."""

    def __init__(
        self, outbox: Path, config: FramesConfig, send: Callable[[FrameReady | EventHappened], None]
    ) -> None:
        self._outbox, self._send = outbox, send
        self._lock = threading.Lock()
        self._waiting: Snapshot | None = None
        self._published_s: float | None = None
        self._interval_s: float | None = None
        self._link_rate_bytes_s: float | None = None
        self._tasks: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        # From here on, the sending thread's own.
        self._encoder = FrameEncoder(config)
        self._untaken: FrameReady | None = None
        self._num_deltas = 0  # since the last keyframe
        self._keyframe_wanted = False
        self._patience_s: float | None = None  # while it is not being closed, without end
        # A daemon, and no executor's thread: it still works when a user's script just ends, until `close` is called at exit.
        self._thread = threading.Thread(target=self._run, name="p2pcodistill-send", daemon=True)

    def start(self) -> None:
        """Begin to work on what was, and what will be, handed over."""
        self._thread.start()

    def publish(self, snapshot: Snapshot) -> None:
        """Make a frame of `snapshot` as soon as the node has the one before it, unless a newer one comes first."""
        if not self._thread.is_alive():
            return
        now_s = time.monotonic()
        with self._lock:
            skipped, self._waiting = self._waiting, snapshot
            if self._published_s is not None:
                self._interval_s = now_s - self._published_s
            self._published_s = now_s
        if skipped is not None:
            why = f"the encoder or the node was busy until step {snapshot.step}"
            self.report(SnapshotSkipped(skipped.step, why))
        self._tasks.put(self._encode_next)

    def report(self, event: Event) -> None:
        """Send an event after what was handed over before it; it does not wait for the node to take a frame."""
        message = EventHappened(to_record(event))
        self._tasks.put(functools.partial(self._send, message))

    def want_keyframe(self) -> None:
        """Send a keyframe of the present reference: a student has nothing that leads to it."""
        self._tasks.put(self._encode_keyframe_soon)

    def set_link_rate(self, rate_bytes_s: float) -> None:
        """What the links to the students carry: a frame gets what fits between two snapshots, where it wants more."""
        self._link_rate_bytes_s = rate_bytes_s

    def mark_taken(self, taken: FrameTaken) -> None:
        """The node's answer to a `FrameReady`."""
        self._tasks.put(functools.partial(self._go_on, taken))

    def close(self, timeout_s: float) -> None:
        """Hand over what waits, and a last keyframe if the chain wants one; wait at most `timeout_s` for a word of the node.

        Safe to call twice. What the node did not let through by then is skipped.
        """
        if self._thread.is_alive():
            self._tasks.put(functools.partial(self._finish, timeout_s))
            self._thread.join()

    # --- on the sending thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._is_finished():
            try:
                task = self._tasks.get(timeout=self._patience_s)
            except queue.Empty:  # the node is gone, or too slow
                break
            task()
        self._say_farewell()

    def _is_finished(self) -> bool:
        return self._patience_s is not None and self._untaken is None and self._waiting is None

    def _finish(self, patience_s: float) -> None:
        self._patience_s = patience_s

    def _encode_next(self) -> None:
        """Hand over what is due, unless the node has yet to take what it was given."""
        if self._untaken is None and self._keyframe_wanted:
            self._encode_keyframe()
        if self._untaken is not None:
            return
        with self._lock:
            snapshot, self._waiting = self._waiting, None
        if snapshot is not None:  # else a newer one was taken already
            self._encode(snapshot)

    def _encode(self, snapshot: Snapshot) -> None:
        if self._link_rate_bytes_s is not None and self._interval_s is not None:
            interval_s = max(self._interval_s, _MIN_INTERVAL_S)
            self._encoder.limit(int(_LINK_SHARE * self._link_rate_bytes_s * interval_s))
        path = self._outbox / f"step-{snapshot.step:08d}.frame"
        try:
            with outbox_file(path) as file:
                frame = self._encoder.encode(snapshot, file)
        except NonFiniteError as error:  # nothing has been written: the chain goes on from where it was
            self._skip(snapshot.step, str(error))
            return
        except Exception as error:  # a full disk, above all: training goes on
            _logger.warning("step %d could not be encoded", snapshot.step, exc_info=error)
            self._start_over()  # the reference may have moved on without its receivers
            self._skip(snapshot.step, str(error))
            return
        self._hand_over(path, frame)

    def _encode_keyframe_soon(self) -> None:
        self._keyframe_wanted = True
        self._encode_next()

    def _encode_keyframe(self) -> None:
        """Hand over a keyframe of the reference; where there is no chain of deltas, the next or last frame is one anyway."""
        self._keyframe_wanted = False
        if not self._num_deltas or self._encoder.reference is None:
            return
        path = self._outbox / f"step-{self._encoder.reference.step:08d}.keyframe"
        try:
            with outbox_file(path) as file:
                frame = self._encoder.encode_keyframe_of_reference(file)
        except Exception as error:  # a full disk: tried again with the next snapshot
            self._keyframe_wanted = True
            _logger.warning("no keyframe could be written: %s", error)
            return
        assert frame is not None, "there is a reference"
        self._hand_over(path, frame)

    def _hand_over(self, path: Path, frame: EncodedFrame) -> None:
        self._num_deltas = 0 if frame.base_step is None else self._num_deltas + 1
        self._untaken = FrameReady(
            str(path), frame.step, frame.base_step, frame.codec, frame.schema_hash, frame.num_fp16_bytes
        )
        self._send(self._untaken)

    def _go_on(self, taken: FrameTaken) -> None:
        untaken = self._untaken
        if untaken is None or (taken.step, taken.base_step) != (untaken.step, untaken.base_step):
            return
        self._untaken = None
        if not taken.accepted:
            self._start_over()
        self._encode_next()

    def _start_over(self) -> None:
        self._encoder.restart()
        self._num_deltas = 0

    def _skip(self, step: int, why: str) -> None:
        self._send(EventHappened(to_record(SnapshotSkipped(step, why))))

    def _say_farewell(self) -> None:
        if self._untaken is not None:
            with self._lock:
                skipped, self._waiting = self._waiting, None
            if skipped is not None:
                self._skip(skipped.step, f"the node did not take step {self._untaken.step} in time")
        elif self._encoder.wants_final_keyframe or self._num_deltas >= MAX_CHAIN_FRAMES:
            self._encode_keyframe()  # nobody will be here to make one when a student asks
