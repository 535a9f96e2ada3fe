"""Checkpoints on their way to become teachers: taken up from the offers, voted on once they are decoded, then settled."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass

from p2pcodistill.checkpoint.manifest import Version
from p2pcodistill.checkpoint.reference import Reference
from p2pcodistill.codistill.agreement import Vote
from p2pcodistill.codistill.exchange import Exchange, Offer


@dataclass(slots=True)
class Candidate:
    """A checkpoint that is being decoded, or has been; `refusal` is why it was voted down here."""

    offer: Offer
    reference: Future[Reference]
    refusal: Exception | None = None


class Candidates:
    """At most one candidate for each teacher, the same ones on every rank. `check` raises for what is not acceptable."""

    def __init__(self, check: Callable[[Reference], None]) -> None:
        self._check = check
        self._candidates: dict[str, Candidate] = {}
        # Per teacher, the newest version that was swapped in or refused: only newer ones are taken up.
        self._settled: dict[str, Version] = {}

    def version(self, teacher: str) -> Version | None:
        """The version of the candidate for `teacher`; None without one."""
        candidate = self._candidates.get(teacher)
        return candidate.offer.version if candidate else None

    def vote(self, teacher: str) -> Vote:
        """This rank's word on the candidate for `teacher`."""
        candidate = self._candidates.get(teacher)
        if candidate is None or not candidate.reference.done():
            return Vote.WAIT
        try:
            self._check(candidate.reference.result())
        except FileNotFoundError:
            return Vote.GONE
        except Exception as error:  # whatever a checkpoint from outside provokes, training goes on
            candidate.refusal = error
            return Vote.REFUSE
        return Vote.READY

    def conclude(self, votes: Mapping[str, Vote]) -> Iterator[tuple[Candidate, Vote]]:
        """The candidates on which the ranks' lowest vote has decided, one after the other."""
        for teacher, vote in votes.items():
            if vote is not Vote.WAIT:
                candidate = self._candidates.pop(teacher)
                if vote is not Vote.GONE:  # else what has taken its place may be the same version
                    self._settled[teacher] = candidate.offer.version
                yield candidate, vote

    def take_up(self, offers: Mapping[str, Offer], exchange: Exchange) -> None:
        """Begin to decode what is newer than all before, of teachers without a candidate."""
        for teacher, offer in offers.items():
            if teacher not in self._candidates and offer.version > self._settled.get(teacher, (-1, -1)):
                self._candidates[teacher] = Candidate(offer, exchange.prepare(offer))

    def wait(self) -> None:
        """Until all of them are decoded, or have failed."""
        concurrent.futures.wait([candidate.reference for candidate in self._candidates.values()])
