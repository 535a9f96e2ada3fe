"""The ranks' side of the exchange with the node, and `join`, which brings a training script into its group.

The training thread only hands over: one thread encodes (rank 0), one decodes (every rank), and the link has its own. Frames
are files that are complete before they get their name.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import torch.distributed as dist
from torch import nn

from p2pcodistill.checkpoint.frames import CODEC, KEYFRAME, DecodedFrame, decode_frame, encode_keyframe
from p2pcodistill.checkpoint.snapshot import Snapshot
from p2pcodistill.codistill.codistiller import Codistiller
from p2pcodistill.codistill.exchange import Inbox, Offer
from p2pcodistill.codistill.teachers import Forward
from p2pcodistill.config import GROUP_SPEC_VARIABLE, CodistillationConfig, GroupSpec, parse_model
from p2pcodistill.errors import ConfigError, GroupError, OversizedError
from p2pcodistill.group.lifeline import die_with_parent
from p2pcodistill.group.link import EventHappened, FrameOffered, FrameReady, RankLink, StopRequested
from p2pcodistill.telemetry import Event, SnapshotSkipped, to_record

CONNECT_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 10.0
_FRAME_SLACK_BYTES = 16 << 20
_PARTIAL_SUFFIX = ".part"

_logger = logging.getLogger("p2pcodistill")


def join(model: nn.Module, *, forward: Forward | None = None) -> Codistiller:
    """The `Codistiller` of this rank, for the model that it trains. Call it once, on every rank, at the same point.

    Call it after `torch.distributed.init_process_group` where there is more than one rank, with the model on its device,
    before or after wrapping it. `forward(model, inputs, state) -> (logits, state)` runs the model for its teachers; the
    default is `model(inputs)`, or `model(*inputs)` for a tuple.

    A script that no node started runs alone: the same loop, without teachers. Raises GroupError when the node does not
    answer, and ConfigError when its instructions cannot be read.
    """
    spec = read_group_spec()
    if spec is None:
        _logger.warning("no p2pcodistill node started this script: it trains alone, without teachers")
        return Codistiller(model, CodistillationConfig(), exchange=None, teachers={}, forward=forward)
    die_with_parent()
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks > 1 and not dist.is_initialized():
        raise GroupError(
            f"call torch.distributed.init_process_group before join: there are {num_ranks} ranks"
        )
    is_lead = not dist.is_initialized() or dist.get_rank() == 0
    exchange = GroupExchange(spec, is_lead=is_lead, max_frame_bytes=_max_frame_bytes(model))
    return Codistiller(
        model,
        spec.codistillation,
        exchange=exchange,
        teachers=spec.teachers,
        num_students=spec.num_students,
        forward=forward,
    )


def read_group_spec() -> GroupSpec | None:
    """What the node tells its ranks; None when no node started this process. Raises ConfigError."""
    path = os.environ.get(GROUP_SPEC_VARIABLE)
    if path is None:
        return None
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{GROUP_SPEC_VARIABLE} names {path}, which cannot be read: {error}") from None
    return parse_model(GroupSpec, table, source=path)


def _max_frame_bytes(model: nn.Module) -> int:
    # Generous: a frame of another model is better refused by its schema than by its size.
    tensors = [*model.parameters(), *model.buffers()]
    return 4 * sum(tensor.numel() * 4 for tensor in tensors) + _FRAME_SLACK_BYTES


class GroupExchange:
    """The `Exchange` of one rank. Rank 0 (`is_lead`) talks to the node; the others only read and decode frames.

    What rank 0 publishes and reports leaves in that order. A snapshot that finds the encoder busy waits; when a newer one
    comes, the waiting one is skipped. Raises GroupError when the node does not answer.
    """

    def __init__(self, spec: GroupSpec, *, is_lead: bool, max_frame_bytes: int) -> None:
        self._outbox = spec.outbox_folder
        self._max_frame_bytes = max_frame_bytes
        self._lock = threading.Lock()
        self._waiting: Snapshot | None = None
        self._offers: dict[str, Offer] = {}
        self._stop_requested = False
        self._link: RankLink | None = None
        if is_lead:
            self._clear_outbox()
            self._link = RankLink(spec.link_address, spec.link_token, self._take)
            for offer in self._link.connect(CONNECT_TIMEOUT_S):
                self._take(FrameOffered(offer))
        self._encoder = ThreadPoolExecutor(1, thread_name_prefix="p2pcodistill-encode")
        self._decoder = ThreadPoolExecutor(1, thread_name_prefix="p2pcodistill-decode")
        atexit.register(self.close)  # a script of a user's may just end

    def publish(self, snapshot: Snapshot) -> None:
        """Encode `snapshot` on the encoding thread and hand the frame to the node."""
        with self._lock:
            skipped, self._waiting = self._waiting, snapshot
        if skipped is not None:
            self.report(SnapshotSkipped(skipped.step, f"the encoder was busy until step {snapshot.step}"))
        self._enqueue(self._encode_waiting)

    def inbox(self) -> Inbox:
        """The newest offers of the node, and its wish to stop."""
        with self._lock:
            return Inbox(dict(self._offers), self._stop_requested)

    def prepare(self, offer: Offer) -> Future[DecodedFrame]:
        """Read and decode a frame on the decoding thread."""
        return self._decoder.submit(_read_frame, Path(offer.path), self._max_frame_bytes)

    def report(self, event: Event) -> None:
        """Send an event to the node; ranks other than 0 drop it."""
        if self._link is not None:
            message = EventHappened(to_record(event))
            self._enqueue(functools.partial(self._link.send, message))

    def close(self) -> None:
        """Encode and send what was handed over, then end the threads. Safe to call twice."""
        atexit.unregister(self.close)
        self._decoder.shutdown(cancel_futures=True)
        self._encoder.shutdown()
        if self._link is not None:
            self._link.close(CLOSE_TIMEOUT_S)

    def _take(self, message: FrameOffered | StopRequested) -> None:
        with self._lock:
            if isinstance(message, StopRequested):
                self._stop_requested = True
                return
            found = message.offer
            offer = Offer(found.origin, found.incarnation, found.step, found.path)
            known = self._offers.get(offer.teacher)
            if known is None or offer.version >= known.version:
                self._offers[offer.teacher] = offer

    def _enqueue(self, task: Callable[[], None]) -> None:
        if self._link is not None:
            with contextlib.suppress(RuntimeError):  # closed, or the interpreter is shutting down
                self._encoder.submit(task)

    def _encode_waiting(self) -> None:
        with self._lock:
            snapshot, self._waiting = self._waiting, None
        if snapshot is None or self._link is None:  # a newer one was taken already
            return
        path = self._outbox / f"step-{snapshot.step:08d}.frame"
        partial = path.with_suffix(_PARTIAL_SUFFIX)
        try:
            partial.write_bytes(encode_keyframe(snapshot))
            partial.replace(path)
        except Exception as error:  # weights that are not finite, a full disk: training goes on
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
            self._link.send(EventHappened(to_record(SnapshotSkipped(snapshot.step, str(error)))))
            return
        self._link.send(
            FrameReady(
                str(path), snapshot.step, KEYFRAME, CODEC, snapshot.schema_hash, snapshot.num_fp16_bytes
            )
        )

    def _clear_outbox(self) -> None:
        """Remove what a rank that was killed while writing has left."""
        self._outbox.mkdir(parents=True, exist_ok=True)
        for partial in self._outbox.glob(f"*{_PARTIAL_SUFFIX}"):
            partial.unlink()


def _read_frame(path: Path, max_frame_bytes: int) -> DecodedFrame:
    num_bytes = path.stat().st_size
    if num_bytes > max_frame_bytes:
        raise OversizedError(
            f"a frame of {num_bytes} bytes is over the cap of {max_frame_bytes} for this model"
        )
    return decode_frame(path.read_bytes(), max_bytes=max_frame_bytes)
