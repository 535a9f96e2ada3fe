"""Relaying: where a student and its teacher cannot connect, a peer of both passes frames on.

A student that has had no session with a teacher for a while asks one ready peer after the other to *follow* it there. A peer
that has a session with the teacher takes that up: it follows the teacher itself, which tells it of its frames as if it were
a student, fetches them, and passes on what comes. It may say at any time that it cannot, or not any more (`Unfollow`); the
student does so as soon as it reaches the teacher. A relay that nobody follows any more stops after a while.

Only along edges: a member may follow those who teach it, and nobody else. Loops cannot arise: a relay follows the origin and
nobody else, and only while it has a session with it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass

from p2pcodistill.checkpoint.manifest import Version
from p2pcodistill.gossip.messages import CatchUp

RELAY_GRACE_S = 60.0
"""How long a relay that nobody follows keeps what it has: a follower may only have lost its session."""
PATH_PATIENCE_S = 120.0
"""How long a follower waits for a path that the relay has asked of the origin: a keyframe may have to be made for it."""
MAX_RELAYED_ORIGINS = 16
MAX_FOLLOWERS = 256
"""Of one origin, at the origin itself or at a relay."""


NEWS_FACTOR = 6
"""A relay that told nothing new for so many times what a student waits before it asks one is given up for another, and the
next one after twice as long, until there is news: a teacher may simply publish rarely."""


class Orphans:
    """The teachers that this site cannot reach, and whom it asks to relay them."""

    def __init__(self, teachers: Collection[str], *, relay_after_s: float) -> None:
        self._after_s = relay_after_s
        self._parted_s: dict[str, float | None] = dict.fromkeys(teachers)  # None: before the first tick
        self._relays: dict[str, str] = {}
        self._tried: dict[str, dict[str, None]] = {}
        self._has_news: dict[str, bool] = {}  # of those that are relayed
        self._news_s: dict[str, float] = {}
        self._news_factors: dict[str, int] = {}
        self._next_s = float("-inf")

    def relay_of(self, teacher: str) -> str | None:
        """Who was asked to relay `teacher`, and has not declined."""
        return self._relays.get(teacher)

    def open(self, peer: str) -> str | None:
        """`peer` became ready. If it is a teacher that was relayed, the relay, which is followed no more."""
        self._parted_s.pop(peer, None)
        self._tried.pop(peer, None)
        self._news_factors.pop(peer, None)
        self._next_s = float("-inf")
        return self._relays.pop(peer, None)

    def close(self, peer: str, now_s: float, *, is_teacher: bool) -> None:
        """The session with `peer` is over."""
        if is_teacher:
            self._parted_s[peer] = now_s
            self._next_s = float("-inf")
        for teacher in [teacher for teacher, relay in self._relays.items() if relay == peer]:
            self.decline(peer, teacher)

    def decline(self, peer: str, teacher: str) -> bool:
        """`peer` does not relay `teacher` (any more). Whether it was asked to."""
        if self._relays.get(teacher) != peer:
            return False
        del self._relays[teacher]
        self._next_s = float("-inf")
        return True

    def hear(self, peer: str, teacher: str) -> None:
        """`peer` told of a new version of `teacher`."""
        if self._relays.get(teacher) == peer:
            self._has_news[teacher] = True

    def take_silent(self, ready: Collection[str], now_s: float) -> list[tuple[str, str]]:
        """The relays that are given up because they tell nothing while others could be asked, as (relay, teacher)."""
        silent: list[tuple[str, str]] = []
        for teacher, relay in self._relays.items():
            if self._has_news.pop(teacher, False):
                self._news_s[teacher] = now_s
                self._news_factors.pop(teacher, None)
            factor = self._news_factors.get(teacher, NEWS_FACTOR)
            if now_s - self._news_s[teacher] >= factor * self._after_s and len(ready) > 1:
                self._news_factors[teacher] = 2 * factor
                silent.append((relay, teacher))
        for relay, teacher in silent:
            self.decline(relay, teacher)
        return silent

    def tick(self, ready: Collection[str], now_s: float) -> list[tuple[str, str]]:
        """Time has passed: whom to ask for which teacher, as (peer, teacher)."""
        if now_s < self._next_s or not self._parted_s:
            return []
        asked: list[tuple[str, str]] = []
        self._next_s = float("inf")
        for teacher, parted_s in self._parted_s.items():
            if teacher in self._relays:
                continue
            since_s = parted_s
            if since_s is None:
                since_s = self._parted_s[teacher] = now_s
            if now_s - since_s >= self._after_s:
                tried = self._tried.setdefault(teacher, {})
                peer = next((peer for peer in ready if peer not in tried), None)
                if peer is not None:
                    tried[peer] = None
                    self._relays[teacher], self._news_s[teacher] = peer, now_s
                    asked.append((peer, teacher))
                    continue
                tried.clear()  # once more, after as long a while
                since_s = self._parted_s[teacher] = now_s
            self._next_s = min(self._next_s, since_s + self._after_s)
        return asked


@dataclass(slots=True)
class _Relayed:
    is_followed: bool = False
    """Whether the origin was told so in its current session."""
    idle_s: float | None = None
    known_incarnation: int = 0


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: CatchUp
    since_s: float


class Relay:
    """The origins whose frames this site fetches for others alone, and what those wait for."""

    def __init__(self) -> None:
        self._relayed: dict[str, _Relayed] = {}
        self._waiting: dict[str, dict[str, _Waiting]] = {}  # by origin and peer

    @property
    def origins(self) -> tuple[str, ...]:
        """The origins that are relayed."""
        return tuple(self._relayed)

    def relays(self, origin: str) -> bool:
        """Whether `origin` is relayed."""
        return origin in self._relayed

    @property
    def has_room(self) -> bool:
        """Whether one more origin may be relayed."""
        return len(self._relayed) < MAX_RELAYED_ORIGINS

    def follow(self, origin: str, known_incarnation: int) -> bool:
        """Somebody follows `origin` here. Whether the origin is to be told so."""
        relayed = self._relayed.setdefault(origin, _Relayed())
        relayed.idle_s = None
        is_due = not relayed.is_followed or known_incarnation > relayed.known_incarnation
        relayed.is_followed = True
        relayed.known_incarnation = max(relayed.known_incarnation, known_incarnation)
        return is_due

    def known_incarnation(self, origin: str) -> int:
        """The highest incarnation of `origin` that those who follow it know."""
        return self._relayed[origin].known_incarnation

    def close(self, origin: str, now_s: float) -> None:
        """There is no session with `origin` any more, or nobody to follow it: unless that changes it is dropped."""
        relayed = self._relayed.get(origin)
        if relayed is not None:
            relayed.is_followed = False
            relayed.idle_s = now_s

    def idle(self, origin: str, now_s: float) -> None:
        """Nobody follows `origin` any more."""
        relayed = self._relayed.get(origin)
        if relayed is not None and relayed.idle_s is None:
            relayed.idle_s = now_s

    def take_idle(self, now_s: float) -> list[str]:
        """The origins that are relayed no more."""
        over = [
            origin
            for origin, relayed in self._relayed.items()
            if relayed.idle_s is not None and now_s - relayed.idle_s >= RELAY_GRACE_S
        ]
        for origin in over:
            self.drop(origin)
        return over

    def drop(self, origin: str) -> None:
        """`origin` is relayed no more."""
        self._relayed.pop(origin, None)
        self._waiting.pop(origin, None)

    # --- paths -------------------------------------------------------------------------------------------------------

    def wait(self, peer: str, origin: str, request: CatchUp, now_s: float) -> None:
        """`peer` waits for a path that only the origin can tell."""
        self._waiting.setdefault(origin, {})[peer] = _Waiting(request, now_s)

    def leave(self, peer: str, origin: str | None = None) -> None:
        """`peer` waits no more, for `origin` or at all."""
        for name, waiting in self._waiting.items():
            if origin in (None, name):
                waiting.pop(peer, None)

    def next_waiting(self, origin: str) -> CatchUp | None:
        """What to ask of the origin for one of those who wait."""
        first = next(iter(self._waiting.get(origin, {}).values()), None)
        return None if first is None else first.request

    def take_asking(self, origin: str, asked: CatchUp) -> list[str]:
        """Those who wait for what was `asked` of the origin, and do so no more."""
        return self._take(origin, lambda waiting: waiting.request.held == asked.held)

    def take_waiting(self, origin: str, start: Version | None) -> list[str]:
        """Those whom a path helps that begins at `start` (None: at nothing), and who wait no more."""
        return self._take(origin, lambda waiting: start is None or waiting.request.held == start)

    def take_overdue(self, now_s: float) -> list[tuple[str, list[str]]]:
        """The origins that have not answered for too long, and those who have waited for it."""
        overdue = [
            (origin, self._take(origin, lambda waiting: now_s - waiting.since_s >= PATH_PATIENCE_S))
            for origin, waiting in self._waiting.items()
            if waiting
        ]
        return [(origin, peers) for origin, peers in overdue if peers]

    def _take(self, origin: str, is_meant: Callable[[_Waiting], bool]) -> list[str]:
        waiting = self._waiting.get(origin, {})
        taken = [peer for peer, one in waiting.items() if is_meant(one)]
        for peer in taken:
            del waiting[peer]
        return taken
