"""How the ranks of a group come to the same decision at the same step, without ever waiting for the network.

At some step boundaries every rank proposes: rank 0's bulletin (the newest offer of each teacher, how old the versions in use
are, the wish to stop) is broadcast, each rank's votes on the candidates that it decodes are reduced to the lowest, and its
tally of how the teachers did is added up. All of it runs in the background and is concluded at the next step boundary, where
every rank sees the same result. All calls are made from the training thread, at the same steps on every rank; the
collectives have a gloo group of their own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import NamedTuple

import msgpack
import torch
import torch.distributed as dist
from torch import Tensor

from p2pcodistill.checkpoint.chain import MAX_CHAIN_FRAMES
from p2pcodistill.checkpoint.manifest import Version
from p2pcodistill.codistill.exchange import ChainFile, Inbox, Offer

# An offer's folder may be as long as Linux allows; a frame's file name and version need less than this.
_MAX_FOLDER_BYTES = 4096
_MAX_FRAME_BYTES = 128
_MAX_OFFER_BYTES = 128 + _MAX_FOLDER_BYTES + _MAX_FRAME_BYTES * MAX_CHAIN_FRAMES


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


class Ages(NamedTuple):
    """Seconds since two versions of a teacher were announced: the one in use, and the candidate."""

    in_use_s: float = 0.0
    candidate_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What every rank knows after a round: rank 0's inbox (but for `known_ages_s`) and the teachers' ages when it began, the
    lowest vote for each teacher, and the sum of the tallies (int64, a row for each teacher)."""

    inbox: Inbox
    ages: Mapping[str, Ages]
    votes: Mapping[str, Vote]
    tally: Tensor


class Agreement:
    """Rounds of agreement over `teachers`, the same on every rank. `process_group` is gloo; None for a single rank.

    A tally has `num_columns` numbers for each teacher.
    """

    def __init__(
        self, teachers: Sequence[str], process_group: dist.ProcessGroup | None, *, num_columns: int
    ) -> None:
        self._teachers = tuple(teachers)
        self._group = process_group
        self._max_bulletin_bytes = 64 + _MAX_OFFER_BYTES * len(self._teachers)
        self._works: list[dist.Work] = []
        self._is_open = False
        # Kept for good: whoever lets go of a tensor last needs the interpreter, and gloo's thread must never be that one,
        # or a process that is about to exit aborts.
        self._bulletin = torch.zeros(self._max_bulletin_bytes, dtype=torch.uint8)
        self._votes = torch.zeros(len(self._teachers), dtype=torch.int32)
        self._tally = torch.zeros((len(self._teachers), num_columns), dtype=torch.int64)

    def propose(
        self, inbox: Inbox, ages: Mapping[str, Ages], votes: Mapping[str, Vote], tally: Tensor
    ) -> None:
        """Begin a round. `inbox` and `ages` count on rank 0 only. Ends before the next `propose` by `conclude`."""
        assert not self._is_open, "a round is concluded before the next one begins"
        self._is_open = True
        self._bulletin.copy_(self._encode(inbox, ages))
        self._tally.copy_(tally)
        self._votes.copy_(torch.tensor([votes[teacher] for teacher in self._teachers], dtype=torch.int32))
        if self._group is not None:
            group = self._group
            self._works = [dist.broadcast(self._bulletin, group=group, group_src=0, async_op=True)]
            if self._teachers:
                self._works.append(dist.all_reduce(self._votes, dist.ReduceOp.MIN, group, async_op=True))
                self._works.append(dist.all_reduce(self._tally, dist.ReduceOp.SUM, group, async_op=True))

    def conclude(self) -> Decision | None:
        """Wait for the ranks that have yet to propose, then the decision; None when no round is on."""
        if not self._is_open:
            return None
        for work in self._works:
            work.wait()
        inbox, ages = self._decode(self._bulletin)
        votes = dict(zip(self._teachers, map(Vote, self._votes.tolist()), strict=True))
        self._is_open = False
        self._works = []
        return Decision(inbox, ages, votes, self._tally.clone())

    def _encode(self, inbox: Inbox, ages: Mapping[str, Ages]) -> Tensor:
        offers = [
            (offer.incarnation, offer.step, offer.folder, offer.frames)
            if (offer := inbox.offers.get(teacher))
            else None
            for teacher in self._teachers
        ]
        announced = [inbox.announced.get(teacher) for teacher in self._teachers]
        known_ages = [ages.get(teacher, Ages()) for teacher in self._teachers]
        revoked = [teacher in inbox.revoked for teacher in self._teachers]
        body: bytes = msgpack.packb((inbox.stop_requested, offers, announced, revoked, known_ages))
        bulletin = bytearray(self._max_bulletin_bytes)
        bulletin[: len(body) + 4] = len(body).to_bytes(4, "little") + body
        assert len(bulletin) == self._max_bulletin_bytes, "folder, names and number of frames have their caps"
        return torch.frombuffer(bulletin, dtype=torch.uint8)

    def _decode(self, bulletin: Tensor) -> tuple[Inbox, dict[str, Ages]]:
        data = bulletin.numpy().tobytes()
        body = msgpack.unpackb(data[4 : 4 + int.from_bytes(data[:4], "little")])
        stop_requested, offers, announced, revoked, ages = body
        inbox = Inbox(
            {
                teacher: _read_offer(teacher, *offer)
                for teacher, offer in zip(self._teachers, offers, strict=True)
                if offer is not None
            },
            stop_requested,
            {
                teacher: Version(*version)
                for teacher, version in zip(self._teachers, announced, strict=True)
                if version is not None
            },
            frozenset(
                teacher for teacher, is_revoked in zip(self._teachers, revoked, strict=True) if is_revoked
            ),
        )
        return inbox, {teacher: Ages(*age) for teacher, age in zip(self._teachers, ages, strict=True)}


def _read_offer(
    teacher: str, incarnation: int, step: int, folder: str, frames: list[tuple[int, int, str]]
) -> Offer:
    return Offer(teacher, incarnation, step, folder, tuple(ChainFile(*frame) for frame in frames))
