"""How the ranks of a group come to the same decision at the same step, without ever waiting for the network.

At some step boundaries every rank proposes: rank 0's bulletin (the newest offer of each teacher, the wish to stop) is
broadcast, and each rank's votes on the candidates that it decodes are reduced to the lowest. Both run in the background and
are concluded at the next step boundary, where every rank sees the same result. All calls are made from the training thread,
at the same steps on every rank; the collectives have a gloo group of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum

import msgpack
import torch
import torch.distributed as dist
from torch import Tensor

from p2pcodistill.checkpoint.chain import MAX_CHAIN_FRAMES
from p2pcodistill.codistill.exchange import ChainFile, Inbox, Offer

# An offer's folder may be as long as Linux allows; a frame's file name and version need less than this.
_MAX_FOLDER_BYTES = 4096
_MAX_FRAME_BYTES = 128
_MAX_OFFER_BYTES = 64 + _MAX_FOLDER_BYTES + _MAX_FRAME_BYTES * MAX_CHAIN_FRAMES


class Vote(IntEnum):
    """A rank's word on the candidate for one teacher. The lowest of all ranks' votes decides."""

    REFUSE = -2
    """It is not acceptable here."""
    GONE = -1
    """Its file is gone: a newer one has taken its place."""
    WAIT = 0
    """No candidate, or still being decoded."""
    READY = 1
    """Decoded: may be swapped in."""


@dataclass(frozen=True, slots=True)
class Decision:
    """What every rank knows after a round: rank 0's inbox when it began, and the lowest vote for each teacher."""

    inbox: Inbox
    votes: Mapping[str, Vote]


class Agreement:
    """Rounds of agreement over `teachers`, the same on every rank. `process_group` is gloo; None for a single rank."""

    def __init__(self, teachers: Sequence[str], process_group: dist.ProcessGroup | None) -> None:
        self._teachers = tuple(teachers)
        self._group = process_group
        self._max_bulletin_bytes = 64 + _MAX_OFFER_BYTES * len(self._teachers)
        self._works: list[dist.Work] = []
        self._is_open = False
        # Kept for good: whoever lets go of a tensor last needs the interpreter, and gloo's thread must never be that one,
        # or a process that is about to exit aborts.
        self._bulletin = torch.zeros(self._max_bulletin_bytes, dtype=torch.uint8)
        self._votes = torch.zeros(len(self._teachers), dtype=torch.int32)

    def propose(self, inbox: Inbox, votes: Mapping[str, Vote]) -> None:
        """Begin a round. `inbox` counts on rank 0 only. Ends before the next `propose` by `conclude`."""
        assert not self._is_open, "a round is concluded before the next one begins"
        self._is_open = True
        self._bulletin.copy_(self._encode(inbox))
        self._votes.copy_(torch.tensor([votes[teacher] for teacher in self._teachers], dtype=torch.int32))
        if self._group is not None:
            group = self._group
            self._works = [dist.broadcast(self._bulletin, group=group, group_src=0, async_op=True)]
            if self._teachers:
                self._works.append(dist.all_reduce(self._votes, dist.ReduceOp.MIN, group, async_op=True))

    def conclude(self) -> Decision | None:
        """Wait for the ranks that have yet to propose, then the decision; None when no round is on."""
        if not self._is_open:
            return None
        for work in self._works:
            work.wait()
        inbox, votes = self._decode(self._bulletin), self._votes.tolist()
        self._is_open = False
        self._works = []
        return Decision(inbox, dict(zip(self._teachers, map(Vote, votes), strict=True)))

    def _encode(self, inbox: Inbox) -> Tensor:
        offers = [
            (offer.incarnation, offer.step, offer.folder, offer.frames)
            if (offer := inbox.offers.get(teacher))
            else None
            for teacher in self._teachers
        ]
        body: bytes = msgpack.packb((inbox.stop_requested, offers))
        bulletin = bytearray(self._max_bulletin_bytes)
        bulletin[: len(body) + 4] = len(body).to_bytes(4, "little") + body
        assert len(bulletin) == self._max_bulletin_bytes, "folder, names and number of frames have their caps"
        return torch.frombuffer(bulletin, dtype=torch.uint8)

    def _decode(self, bulletin: Tensor) -> Inbox:
        data = bulletin.numpy().tobytes()
        stop_requested, offers = msgpack.unpackb(data[4 : 4 + int.from_bytes(data[:4], "little")])
        return Inbox(
            {
                teacher: _read_offer(teacher, *offer)
                for teacher, offer in zip(self._teachers, offers, strict=True)
                if offer is not None
            },
            stop_requested,
        )


def _read_offer(
    teacher: str, incarnation: int, step: int, folder: str, frames: list[tuple[int, int, str]]
) -> Offer:
    return Offer(teacher, incarnation, step, folder, tuple(ChainFile(*frame) for frame in frames))
