"""Counts refusals, and tells of them at a bounded rate: a flood must not drown whoever reads about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from p2pcodistill.transport.base import Rejected


@dataclass(slots=True)
class _Tally:
    reported_s: float
    num_unreported: int = 0
    why: str = ""


class RefusalLog:
    """Reports the first refusal of a kind at once, and what follows as one `Rejected` per `interval_s`.

    A kind is a peer (or nobody known) and a reason, so there are few. The latest `why` stands for those counted with it.
    """

    def __init__(self, report: Callable[[Rejected], None], interval_s: float) -> None:
        self._report = report
        self._interval_s = interval_s
        self._tallies: dict[tuple[str | None, str], _Tally] = {}

    def note(self, peer: str | None, reason: str, why: str, now_s: float) -> None:
        """Something was refused."""
        tally = self._tallies.get((peer, reason))
        if tally is None or (tally.num_unreported == 0 and now_s - tally.reported_s >= self._interval_s):
            self._tallies[peer, reason] = _Tally(now_s)
            self._report(Rejected(peer, reason, why))
        else:
            tally.num_unreported += 1
            tally.why = why

    def flush(self, now_s: float) -> None:
        """Report what has been counted, where the interval is over. To be called about once an interval."""
        for (peer, reason), tally in self._tallies.items():
            if tally.num_unreported and now_s - tally.reported_s >= self._interval_s:
                self._report(Rejected(peer, reason, tally.why, tally.num_unreported))
                tally.reported_s = now_s
                tally.num_unreported = 0
