"""Whose turn it is to be served, and when: caps on what is uploaded, and fairness between those who ask.

Pure: time is handed in. A cap is a token bucket that may be overdrawn by what is sent at once (a chunk, or control, which
never waits), and lets nothing of bulk through until that is paid back; so the rate is met on average, whatever the sizes.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass, field
from typing import Generic, TypeVar

from p2pcodistill.config import NodeConfig

BYTES_PER_MBIT = 125_000.0
BURST_S = 0.25
"""What a bucket saves up at most while nobody sends, as seconds of its rate: late timers must not cost throughput."""
_NO_TIME_S = 1e-6

Request = TypeVar("Request", bound=Hashable)


@dataclass(frozen=True, slots=True)
class UploadCaps:
    """Bytes a second that may be sent: by the site to all peers together (None: any), and to some peers."""

    site_bytes_s: float | None = None
    link_bytes_s: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, config: NodeConfig) -> UploadCaps:
        """What a site's file says."""
        site_mbit, links = config.max_upload_mbit, {p.name: p.max_upload_mbit for p in config.peers}
        return cls(
            None if site_mbit is None else BYTES_PER_MBIT * site_mbit,
            {name: BYTES_PER_MBIT * mbit for name, mbit in links.items() if mbit is not None},
        )


class TokenBucket:
    """Lets bytes through at `rate_bytes_s`."""

    def __init__(self, rate_bytes_s: float) -> None:
        self._rate_bytes_s = rate_bytes_s
        self._tokens_bytes = 0.0
        self._filled_s: float | None = None

    def spend(self, num_bytes: int, now_s: float) -> None:
        """So many bytes were sent."""
        self._fill(now_s)
        self._tokens_bytes -= num_bytes

    def wait_s(self, now_s: float) -> float:
        """How long until something may be sent; 0: now."""
        self._fill(now_s)
        wait_s = -self._tokens_bytes / self._rate_bytes_s
        return wait_s if wait_s > _NO_TIME_S else 0.0

    def _fill(self, now_s: float) -> None:
        gained_bytes = 0.0 if self._filled_s is None else self._rate_bytes_s * (now_s - self._filled_s)
        self._tokens_bytes = min(self._tokens_bytes + gained_bytes, BURST_S * self._rate_bytes_s)
        self._filled_s = now_s


class Shaper(Generic[Request]):
    """The requests of several peers, each peer's in order. Of those that may be served, the one that got least is next.

    At most `max_requests` of a peer wait.
    """

    def __init__(self, caps: UploadCaps, *, max_requests: int) -> None:
        self._site = None if caps.site_bytes_s is None else TokenBucket(caps.site_bytes_s)
        self._links = {peer: TokenBucket(rate) for peer, rate in caps.link_bytes_s.items()}
        self._max_requests = max_requests
        self._waiting: dict[str, dict[Request, None]] = {}  # in order, and without duplicates
        # What each peer was given. One that has just begun to ask again counts like the one whose turn it was: it gets its
        # share from now on, and nothing for the time in which it did not ask, however many ask just now.
        self._served_bytes: dict[str, int] = {}
        self._turn_bytes = 0

    @property
    def is_capped(self) -> bool:
        """Whether there is any cap."""
        return self._site is not None or bool(self._links)

    def add(self, peer: str, request: Request) -> bool:
        """Queue a request of `peer`, unless just this one waits already. False when too many do."""
        if peer not in self._waiting:
            self._served_bytes[peer] = max(self._served_bytes.get(peer, 0), self._turn_bytes)
        waiting = self._waiting.setdefault(peer, {})
        if request not in waiting and len(waiting) >= self._max_requests:
            return False
        waiting.setdefault(request)
        return True

    def drop(self, peer: str) -> None:
        """Forget what `peer` has asked for."""
        self._waiting.pop(peer, None)

    def num_waiting(self, peer: str) -> int:
        """How many requests of `peer` wait."""
        return len(self._waiting.get(peer, ()))

    def next(self, now_s: float, *, blocked: Collection[str] = ()) -> tuple[str, Request] | None:
        """The request to serve now, of a peer that is not `blocked`; None when all have to wait, or nobody asks."""
        if self._site is not None and self._site.wait_s(now_s):
            return None
        peers = [peer for peer in self._waiting if peer not in blocked and not self._link_wait_s(peer, now_s)]
        if not peers:
            return None
        peer = min(peers, key=self._served_bytes.__getitem__)
        return peer, next(iter(self._waiting[peer]))

    def finish(self, peer: str, request: Request) -> None:
        """A request was served, or cannot be."""
        self._turn_bytes = max(self._turn_bytes, self._served_bytes.get(peer, 0))
        waiting = self._waiting.get(peer, {})
        waiting.pop(request, None)
        if not waiting:
            self.drop(peer)

    def spend(self, peer: str, num_bytes: int, now_s: float) -> None:
        """So many bytes were sent to `peer`, on request or not."""
        self._served_bytes[peer] = self._served_bytes.get(peer, 0) + num_bytes
        for bucket in (self._site, self._links.get(peer)):
            if bucket is not None:
                bucket.spend(num_bytes, now_s)

    def wait_s(self, now_s: float, *, blocked: Collection[str] = ()) -> float | None:
        """How long until there may be a `next`; None: not before somebody asks, or is no longer `blocked`."""
        waits_s = [self._link_wait_s(peer, now_s) for peer in self._waiting if peer not in blocked]
        if not waits_s:
            return None
        return max(min(waits_s), self._site.wait_s(now_s) if self._site else 0.0)

    def _link_wait_s(self, peer: str, now_s: float) -> float:
        bucket = self._links.get(peer)
        return bucket.wait_s(now_s) if bucket else 0.0
