"""Whom this site refuses: peers in quarantine, and members whose key is revoked here.

A peer that keeps sending what is refused is not listened to for a while, which doubles each time. It takes many refusals
within a short time: two sites that disagree, or a machine that has lost its memory, cause one now and then. A revoked member
stays out until it is restored. Both keep the run's list of members as it is, on which all sites agree.

A flood is refused as well: of messages that nobody asked for (all but chunks) a peer may send so many a second, and a burst
far beyond what an honest site has to say at once.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection
from dataclasses import dataclass, field

from p2pcodistill.errors import FloodedError, QuarantinedError, RevokedError

MAX_REFUSALS = 20
REFUSAL_MEMORY_S = 60.0
FIRST_QUARANTINE_S = 60.0
MAX_QUARANTINE_S = 3600.0
MAX_MESSAGES_PER_S = 500.0
MAX_BURST_MESSAGES = 10_000.0
FOLLOW_COST = 20.0
"""A `Follow` counts as so many messages: small as it is, it may be answered with a manifest."""


@dataclass(slots=True)
class _Record:
    refused_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_REFUSALS))
    num_quarantines: int = 0
    until_s: float | None = None
    reason: str = ""
    num_left: float = MAX_BURST_MESSAGES
    counted_s: float = 0.0


class Trust:
    """What this site holds against its peers."""

    def __init__(self, revoked: Collection[str] = ()) -> None:
        self._records: dict[str, _Record] = {}
        self._revoked = dict.fromkeys(revoked, "")

    def is_revoked(self, peer: str) -> bool:
        """Whether `peer` is no longer trusted here."""
        return peer in self._revoked

    def revoke(self, peer: str, why: str) -> None:
        """`peer` is no longer trusted."""
        self._revoked[peer] = why

    def restore(self, peer: str) -> None:
        """`peer` is trusted again, and what was held against it forgotten."""
        self._revoked.pop(peer, None)
        self._records.pop(peer, None)

    def check(self, peer: str, now_s: float) -> None:
        """Raise RevokedError or QuarantinedError for a peer that is refused now."""
        if peer in self._revoked:
            raise RevokedError(f"the key of {peer} is revoked here: {self._revoked[peer]}")
        record = self._records.get(peer)
        if record is not None and record.until_s is not None:
            raise QuarantinedError(
                f"{peer} sent what was refused ({record.reason}) {MAX_REFUSALS} times: it is not listened to for "
                f"{max(0.0, record.until_s - now_s):.0f} s"
            )

    def count_message(self, peer: str, now_s: float, *, cost: float = 1.0) -> None:
        """`peer` has sent a message of its own accord, which counts as `cost` of them. Raises FloodedError when it sends too
        many."""
        record = self._records.get(peer)
        if record is None:
            record = self._records[peer] = _Record(counted_s=now_s)
        num_left = record.num_left + (now_s - record.counted_s) * MAX_MESSAGES_PER_S
        record.num_left = (num_left if num_left < MAX_BURST_MESSAGES else MAX_BURST_MESSAGES) - cost
        record.counted_s = now_s
        if record.num_left < 0.0:
            record.num_left = 0.0
            raise FloodedError(f"{peer} sends more than {MAX_MESSAGES_PER_S:.0f} messages a second")

    def count_refusal(self, peer: str, reason: str, now_s: float) -> float | None:
        """Something of `peer` was refused; for how many seconds it is quarantined because of that, if it is."""
        record = self._records.setdefault(peer, _Record(counted_s=now_s))
        record.refused_s.append(now_s)
        is_often = len(record.refused_s) == MAX_REFUSALS and now_s - record.refused_s[0] <= REFUSAL_MEMORY_S
        if not is_often or record.until_s is not None:
            return None
        duration_s = min(MAX_QUARANTINE_S, FIRST_QUARANTINE_S * 2.0**record.num_quarantines)
        record.num_quarantines = min(record.num_quarantines + 1, 30)
        record.refused_s.clear()
        record.until_s, record.reason = now_s + duration_s, reason
        return duration_s

    def take_released(self, now_s: float) -> list[str]:
        """The peers whose quarantine is over now."""
        released = []
        for peer, record in self._records.items():
            if record.until_s is not None and now_s >= record.until_s:
                record.until_s = None
                released.append(peer)
        return released
