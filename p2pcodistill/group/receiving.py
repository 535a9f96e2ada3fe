"""A rank's way in: the chains of frames that the node offers become references, one a teacher, on a thread of their own.

Whose a reference is, when: the decoding thread moves it in place, and hands it to the training thread as the result of
`prepare`. The training thread is done with it when it has settled that candidate (loaded or refused it, see
`codistiller`), and only then prepares the teacher's next one. So no reference moves while it is being loaded, and none is
ever copied.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from p2pcodistill.checkpoint.chain import MAX_CHAIN_FRAMES
from p2pcodistill.checkpoint.decoder import decode_frame
from p2pcodistill.checkpoint.encoder import encode_reference_keyframe
from p2pcodistill.checkpoint.reference import Reference
from p2pcodistill.checkpoint.snapshot import Schema
from p2pcodistill.codistill.exchange import Offer
from p2pcodistill.errors import MalformedError, OversizedError, SchemaMismatchError
from p2pcodistill.group.link_messages import ChainBroken, ReferenceReady
from p2pcodistill.group.sending import outbox_file

_MAX_DELTAS = MAX_CHAIN_FRAMES // 2

_logger = logging.getLogger("p2pcodistill")


class FrameReceiver:
    """The decoding thread of one rank. `send` hands one message to the node; None on ranks other than 0.

    With the `schema` of the student, a frame of another model is refused before it is decoded.
    """

    def __init__(
        self,
        outbox: Path,
        max_frame_bytes: int,
        send: Callable[[ReferenceReady | ChainBroken], None] | None,
        schema: Schema | None = None,
    ) -> None:
        self._outbox, self._max_frame_bytes, self._send = outbox, max_frame_bytes, send
        self._schema = schema
        # The decoding thread's own: the reference of each teacher with its version, and the version that was kept last.
        self._held: dict[str, tuple[tuple[int, int], Reference]] = {}
        self._kept: dict[str, tuple[int, int]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="p2pcodistill-decode")

    def prepare(self, offer: Offer) -> Future[Reference]:
        """Apply what of an offer's chain has not been applied yet.

        Obligation: the reference of the teacher's last offer is no longer used. The future raises RefusedError for a frame
        that is not acceptable, FileNotFoundError for one that newer frames have replaced, and OSError.
        """
        return self._thread.submit(self._advance, offer)

    def close(self) -> None:
        """Finish what is being decoded. Safe to call twice."""
        self._thread.shutdown(cancel_futures=True)

    def _advance(self, offer: Offer) -> Reference:
        try:
            reference = self._apply(offer)
        except FileNotFoundError:  # what was applied before it is still whole
            raise
        except SchemaMismatchError:  # so is the chain, and another copy of it would fit no better
            raise
        except Exception:
            # The reference may be spoilt, or the node's files are: neither is of use any more.
            self._held.pop(offer.teacher, None)
            if self._send is not None:
                self._send(ChainBroken(offer.teacher, offer.incarnation, offer.step))
            raise
        if self._send is not None and self._is_long(offer):
            with contextlib.suppress(RuntimeError):  # closed meanwhile
                self._thread.submit(self._keep, offer.teacher)
        return reference

    def _apply(self, offer: Offer) -> Reference:
        versions = [(file.incarnation, file.step) for file in offer.frames]
        version, reference = self._held.get(offer.teacher, (None, None))
        if version in versions:
            missing = offer.frames[versions.index(version) + 1 :]
        else:
            self._held.pop(offer.teacher, None)
            missing, reference = offer.frames, None
        for file in missing:
            data = self._map(Path(offer.folder, file.file_name))
            reference = decode_frame(data, reference, max_bytes=self._max_frame_bytes, schema=self._schema)
            if reference.step != file.step:
                raise MalformedError(
                    f"a frame that was signed as step {file.step} is of step {reference.step}"
                )
            self._held[offer.teacher] = (file.incarnation, file.step), reference
        assert reference is not None, "an offer has at least one frame"
        return reference

    def _map(self, path: Path) -> memoryview:
        """A frame's bytes, without reading them all at once: the store's files never change."""
        with path.open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            if num_bytes > self._max_frame_bytes:
                raise OversizedError(
                    f"a frame of {num_bytes} bytes is over the cap of {self._max_frame_bytes} for this model"
                )
            if num_bytes == 0:
                raise MalformedError("a frame is empty")
            return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))

    # --- in place of a long chain --------------------------------------------------------------------------------

    def _is_long(self, offer: Offer) -> bool:
        """Whether the deltas since the reference was kept last (or since the keyframe) are many, or cost more than that."""
        versions = [(file.incarnation, file.step) for file in offer.frames]
        kept = self._kept.get(offer.teacher)
        start = versions.index(kept) if kept in versions else 0
        try:
            keyframe, *frames = (Path(offer.folder, file.file_name).stat().st_size for file in offer.frames)
        except FileNotFoundError:
            return False
        deltas = frames[start:]
        return len(deltas) > _MAX_DELTAS or sum(deltas) > keyframe

    def _keep(self, teacher: str) -> None:
        """Give the node a keyframe of the teacher's reference, so that it need not keep the chain that led there."""
        assert self._send is not None
        (incarnation, step), reference = self._held[teacher]
        self._kept[teacher] = incarnation, step
        path = self._outbox / f"{teacher}-{incarnation}-{step}.reference"
        try:
            with outbox_file(path) as file:
                frame = encode_reference_keyframe(reference, file)
        except Exception as error:  # a full disk: the chain does for a while
            _logger.warning("the checkpoint of %s could not be kept: %s", teacher, error)
            return
        self._send(
            ReferenceReady(
                str(path), teacher, incarnation, step, frame.codec, frame.schema_hash, frame.num_fp16_bytes
            )
        )
