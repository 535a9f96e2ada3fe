"""The exchange of a group that trains in virtual time: real frames, encoded and decoded on the spot.

It stands where `group.exchange`, `group.sending` and `group.receiving` stand, and owes the student the same. Encoding and
decoding take no time.
"""

from __future__ import annotations

import dataclasses
import io
from concurrent.futures import Future

import torch

from p2pcodistill.checkpoint.chain import MAX_CHAIN_FRAMES
from p2pcodistill.checkpoint.decoder import decode_frame
from p2pcodistill.checkpoint.encoder import EncodedFrame, FrameEncoder, encode_reference_keyframe
from p2pcodistill.checkpoint.manifest import Version
from p2pcodistill.checkpoint.reference import Reference
from p2pcodistill.checkpoint.snapshot import Snapshot
from p2pcodistill.codistill.exchange import Inbox, Offer
from p2pcodistill.config import FramesConfig
from p2pcodistill.errors import MalformedError, NonFiniteError, RefusedError
from p2pcodistill.simulation.virtual.ranks import EncodedBytes
from p2pcodistill.simulation.virtual.site import VirtualSite
from p2pcodistill.simulation.virtual.store import MemoryFrame
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.training_events import Evaluated, SnapshotSkipped, StepMeasured, TrainingEnded

MAX_DECODED_BYTES = 1 << 30
_MAX_DELTAS = MAX_CHAIN_FRAMES // 2


class VirtualExchange:
    """The `Exchange` of one launch of a site's group."""

    def __init__(self, site: VirtualSite, frames: FramesConfig) -> None:
        self._site = site
        self._encoder = FrameEncoder(frames)
        self._num_deltas = 0  # since the last keyframe
        self._stop_requested = False
        # What is on offer of each teacher, and what was told of it: the chain must still be there when it is prepared.
        self._on_offer: dict[str, tuple[MemoryFrame, ...]] = {}
        self._told: dict[tuple[str, tuple[int, int]], tuple[MemoryFrame, ...]] = {}
        self._held: dict[str, tuple[Version, Reference]] = {}
        self._kept: dict[str, Version] = {}
        self.ruin: torch.Generator | None = None
        """If it is set, what is published are random numbers of the right size, drawn from it."""
        for teacher in site.teachers:
            self.take_offer(teacher)

    # --- for the student -----------------------------------------------------------------------------------------------

    def publish(self, snapshot: Snapshot) -> None:
        """See `codistill.exchange.Exchange`."""
        if self.ruin is not None:
            snapshot = _ruined(snapshot, self.ruin)
        sink = io.BytesIO()
        try:
            frame = self._encoder.encode(snapshot, sink)
        except NonFiniteError as error:
            self.report(SnapshotSkipped(snapshot.step, str(error)))
            return
        self._num_deltas = 0 if frame.base_step is None else self._num_deltas + 1
        self._site.publish(_encoded(frame, sink))

    def inbox(self) -> Inbox:
        """See `codistill.exchange.Exchange`."""
        offers = {}
        for teacher, chain in self._on_offer.items():
            version = chain[-1].version
            offers[teacher] = offer = Offer(teacher, version.incarnation, version.step, "", ())
            self._told[teacher, offer.version] = chain
        return Inbox(offers, self._stop_requested, dict(self._site.announced))

    def prepare(self, offer: Offer) -> Future[Reference]:
        """See `codistill.exchange.Exchange`."""
        future: Future[Reference] = Future()
        chain = self._told.pop((offer.teacher, offer.version))
        self._told = {told: chain for told, chain in self._told.items() if told[0] != offer.teacher}
        try:
            future.set_result(self._apply(offer.teacher, chain))
        except RefusedError as error:
            self._on_offer.pop(offer.teacher, None)
            self._site.break_chain(offer.teacher)
            future.set_exception(error)
        else:
            if self._is_long(offer.teacher, chain):
                self._keep(offer.teacher)
        return future

    def report(self, event: Event) -> None:
        """See `codistill.exchange.Exchange`. What the exchange really costs the training thread is no virtual time."""
        if isinstance(event, StepMeasured | TrainingEnded):
            event = dataclasses.replace(event, exchange_s=0.0)
        if isinstance(event, Evaluated):
            self._site.report_traffic()  # losses are compared over bytes, too
        self._site.report(event)

    def close(self) -> None:
        """Leave a keyframe behind where the chain wants one."""
        if self._encoder.wants_final_keyframe or self._num_deltas >= MAX_CHAIN_FRAMES:
            self.make_keyframe()

    # --- for the node --------------------------------------------------------------------------------------------------

    def take_offer(self, teacher: str) -> None:
        """The chain that the store has of a teacher may lead further than before."""
        if chain := self._site.store.chain(teacher):
            self._on_offer[teacher] = chain

    def make_keyframe(self) -> None:
        """Publish a keyframe of what was published last, unless that, or what comes next, is one."""
        if not self._num_deltas:
            return
        sink = io.BytesIO()
        frame = self._encoder.encode_keyframe_of_reference(sink)
        assert frame is not None, "there were deltas"
        self._num_deltas = 0
        self._site.publish(_encoded(frame, sink))

    def request_stop(self) -> None:
        """The student is to stop after its next step."""
        self._stop_requested = True

    # --- inside ----------------------------------------------------------------------------------------------------

    def _apply(self, teacher: str, chain: tuple[MemoryFrame, ...]) -> Reference:
        """Apply what of a chain has not been applied yet."""
        versions = [frame.version for frame in chain]
        version, reference = self._held.pop(teacher, (None, None))
        if version in versions:
            missing = chain[versions.index(version) + 1 :]
        else:
            missing, reference = chain, None
        for frame in missing:
            reference = decode_frame(b"".join(frame.chunks), reference, max_bytes=MAX_DECODED_BYTES)
            if reference.step != frame.version.step:
                raise MalformedError(
                    f"a frame that was signed as step {frame.version.step} is of step {reference.step}"
                )
        assert reference is not None, "a chain has at least one frame"
        self._held[teacher] = versions[-1], reference
        return reference

    def _is_long(self, teacher: str, chain: tuple[MemoryFrame, ...]) -> bool:
        """Whether the deltas since the reference was kept last (or since the keyframe) are many, or cost more than that."""
        versions = [frame.version for frame in chain]
        kept = self._kept.get(teacher)
        deltas = chain[versions.index(kept) + 1 if kept in versions else 1 :]
        return len(deltas) > _MAX_DELTAS or sum(frame.num_bytes for frame in deltas) > chain[0].num_bytes

    def _keep(self, teacher: str) -> None:
        version, reference = self._held[teacher]
        self._kept[teacher] = version
        sink = io.BytesIO()
        frame = encode_reference_keyframe(reference, sink)
        self._site.keep_keyframe(teacher, version, _encoded(frame, sink))


def _encoded(frame: EncodedFrame, sink: io.BytesIO) -> EncodedBytes:
    return EncodedBytes(
        frame.step,
        frame.base_step is None,
        frame.codec,
        frame.schema_hash,
        frame.num_fp16_bytes,
        sink.getvalue(),
    )


def _ruined(snapshot: Snapshot, generator: torch.Generator) -> Snapshot:
    """The same names, shapes and dtypes, valid numbers, and no sense in them."""
    tensors = {
        name: torch.randn(tensor.shape, generator=generator).to(tensor.dtype)
        if tensor.is_floating_point() and name not in snapshot.buffers
        else tensor
        for name, tensor in snapshot.tensors.items()
    }
    return dataclasses.replace(snapshot, tensors=tensors)
