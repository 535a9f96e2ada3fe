"""The ranks' side of the exchange with the node, and `join`, which brings a training script into its group.

The training thread only hands over: one thread encodes (rank 0, `sending`), one decodes (every rank, `receiving`), and the
link has its own. Frames are files that are complete before they get their name.
"""

from __future__ import annotations

import atexit
import json
import logging
import os
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import torch.distributed as dist
from torch import nn

from p2pcodistill.checkpoint.manifest import Version
from p2pcodistill.checkpoint.reference import Reference
from p2pcodistill.checkpoint.snapshot import Schema, Snapshot, schema_of
from p2pcodistill.codistill.codistiller import Codistiller
from p2pcodistill.codistill.exchange import ChainFile, Inbox, Offer
from p2pcodistill.codistill.gate import Criterion
from p2pcodistill.codistill.teachers import Forward
from p2pcodistill.config import GROUP_SPEC_VARIABLE, CodistillationConfig, GroupSpec
from p2pcodistill.errors import ConfigError, GroupError
from p2pcodistill.group.lifeline import die_with_parent
from p2pcodistill.group.link import RankLink
from p2pcodistill.group.link_messages import (
    FrameOffer,
    FrameOffered,
    FrameTaken,
    KeyframeWanted,
    LinksMeasured,
    NodeOrder,
    StopRequested,
    TrustChanged,
    VersionKnown,
)
from p2pcodistill.group.receiving import FrameReceiver
from p2pcodistill.group.sending import FrameSender
from p2pcodistill.strict import parse_model
from p2pcodistill.telemetry.event import Event

CONNECT_TIMEOUT_S = 30.0
CLOSE_TIMEOUT_S = 10.0
_FRAME_SLACK_BYTES = 16 << 20

_logger = logging.getLogger("p2pcodistill")


def join(
    model: nn.Module, *, forward: Forward | None = None, criterion: Criterion | None = None
) -> Codistiller:
    """The `Codistiller` of this rank, for the model that it trains. Call it once, on every rank, at the same point.

    Call it after `torch.distributed.init_process_group` where there is more than one rank, with the model on its device,
    before or after wrapping it. `forward(model, inputs, state) -> (logits, state)` runs the model for its teachers; the
    default is `model(inputs)`, or `model(*inputs)` for a tuple. `criterion(logits, targets)`, a scalar, is the loss by which
    the gate compares teachers with the student where `Codistiller.loss` is given targets; the default is the cross-entropy
    of integer classes.

    A script that no node started runs alone: the same loop, without teachers. Raises GroupError when the node does not
    answer, and ConfigError when its instructions cannot be read.
    """
    spec = read_group_spec()
    if spec is None:
        _logger.warning("no p2pcodistill node started this script: it trains alone, without teachers")
        return Codistiller(model, CodistillationConfig(), exchange=None, teachers=[], forward=forward)
    die_with_parent()
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if num_ranks > 1 and not dist.is_initialized():
        raise GroupError(
            f"call torch.distributed.init_process_group before join: there are {num_ranks} ranks"
        )
    is_lead = not dist.is_initialized() or dist.get_rank() == 0
    exchange = GroupExchange(
        spec, is_lead=is_lead, max_frame_bytes=_max_frame_bytes(model), schema=schema_of(model)
    )
    return Codistiller(
        model,
        spec.codistillation,
        exchange=exchange,
        teachers=spec.teachers,
        num_students=spec.num_students,
        forward=forward,
        criterion=criterion,
        snapshots_on_device=spec.frames.device == "model",
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

    With the `schema` of the student, frames of other models are refused before they are decoded. Raises GroupError when the
    node does not answer.
    """

    def __init__(
        self, spec: GroupSpec, *, is_lead: bool, max_frame_bytes: int, schema: Schema | None = None
    ) -> None:
        self._lock = threading.Lock()
        self._offers: dict[str, Offer] = {}
        self._announced: dict[str, Version] = {}
        # When versions were announced that the node has told of at the welcome.
        self._known_since_s: dict[str, dict[Version, float]] = {}
        self._revoked: set[str] = set()
        self._stop_requested = False
        self._link: RankLink | None = None
        self._sender: FrameSender | None = None
        if is_lead:
            self._link = RankLink(spec.link_address, spec.link_token, self._obey)
            self._sender = FrameSender(spec.outbox_folder, spec.frames, self._link.send)
            welcome = self._link.connect(CONNECT_TIMEOUT_S)
            for offer in welcome.offers:
                self._take(offer)
            for known in welcome.known:
                self._note(known)
                since_s = self._known_since_s.setdefault(known.origin, {})
                since_s[Version(known.incarnation, known.step)] = time.monotonic() - known.age_s
            with self._lock:
                self._revoked.update(welcome.revoked)
            self._sender.start()
        self._receiver = FrameReceiver(
            spec.outbox_folder, max_frame_bytes, self._link.send if self._link else None, schema
        )
        atexit.register(self.close)  # a script of a user's may just end

    def publish(self, snapshot: Snapshot) -> None:
        """Encode `snapshot` on the sending thread and hand the frame to the node."""
        if self._sender is not None:
            self._sender.publish(snapshot)

    def inbox(self) -> Inbox:
        """The newest offers of the node, what the teachers have announced, who is revoked, and the node's wish to stop."""
        now_s = time.monotonic()
        known_ages_s = {
            teacher: {version: now_s - time_s for version, time_s in since_s.items()}
            for teacher, since_s in self._known_since_s.items()
        }
        with self._lock:
            return Inbox(
                dict(self._offers),
                self._stop_requested,
                dict(self._announced),
                frozenset(self._revoked),
                known_ages_s,
            )

    def prepare(self, offer: Offer) -> Future[Reference]:
        """Read and decode a teacher's frames on the decoding thread; see `FrameReceiver.prepare` for the obligation."""
        return self._receiver.prepare(offer)

    def report(self, event: Event) -> None:
        """Send an event to the node; ranks other than 0 drop it."""
        if self._sender is not None:
            self._sender.report(event)

    def close(self) -> None:
        """Encode and send what was handed over, then end the threads. Safe to call twice."""
        atexit.unregister(self.close)
        self._receiver.close()
        if self._sender is not None and self._link is not None:
            self._sender.close(CLOSE_TIMEOUT_S)
            self._link.close(CLOSE_TIMEOUT_S)

    # --- on the link's thread --------------------------------------------------------------------------------------

    def _obey(self, order: NodeOrder) -> None:
        assert self._sender is not None
        match order:
            case FrameOffered(offer):
                self._take(offer)
            case VersionKnown():
                self._note(order)
            case TrustChanged(teacher, is_trusted):
                with self._lock:
                    (self._revoked.discard if is_trusted else self._revoked.add)(teacher)
            case FrameTaken():
                self._sender.mark_taken(order)
            case LinksMeasured(rate_bytes_s):
                self._sender.set_link_rate(rate_bytes_s)
            case KeyframeWanted():
                self._sender.want_keyframe()
            case StopRequested():
                with self._lock:
                    self._stop_requested = True

    def _note(self, known: VersionKnown) -> None:
        with self._lock:
            version = Version(known.incarnation, known.step)
            self._announced[known.origin] = max(version, self._announced.get(known.origin, version))

    def _take(self, found: FrameOffer) -> None:
        frames = tuple(ChainFile(*frame) for frame in found.frames)
        offer = Offer(found.origin, found.incarnation, found.step, found.folder, frames)
        with self._lock:
            known = self._offers.get(offer.teacher)
            if known is None or offer.version >= known.version:
                self._offers[offer.teacher] = offer
