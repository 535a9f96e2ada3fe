"""Serving chunks in virtual time under upload caps: what `uploads.Uploads` does at a real site, by the same `Shaper`.

A want only queues requests, and a chunk is read and sent when the caps let it through. Control never waits, but counts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from p2pcodistill.simulation.virtual.clock import VirtualClock
from p2pcodistill.transport.shaper import Shaper, UploadCaps
from p2pcodistill.uploads import MAX_REQUESTS

_Request: TypeAlias = tuple[str, int]


class CappedUploads:
    """What the peers of a site have asked for and not been given. `serve` is called with peer, frame and index of a chunk
    when it may be sent; whatever is sent is to be told by `spend`."""

    def __init__(self, caps: UploadCaps, clock: VirtualClock, serve: Callable[[str, str, int], None]) -> None:
        self._clock, self._serve = clock, serve
        self._shaper: Shaper[_Request] = Shaper(caps, max_requests=MAX_REQUESTS)
        self._wakes_s = float("inf")

    def ask(self, peer: str, frame_id: str, index: int) -> bool:
        """Queue a chunk for `peer`. False when too many wait."""
        is_queued = self._shaper.add(peer, (frame_id, index))
        self._serve_what_may_go()
        return is_queued

    def spend(self, peer: str, num_bytes: int) -> None:
        """So many bytes are sent to `peer`."""
        self._shaper.spend(peer, num_bytes, self._clock.now_s)

    def forget(self, peer: str) -> None:
        """The session with `peer` is over."""
        self._shaper.drop(peer)

    def _wake(self, wakes_s: float) -> None:
        if wakes_s == self._wakes_s:  # else an earlier moment has taken its place
            self._wakes_s = float("inf")
            self._serve_what_may_go()

    def _serve_what_may_go(self) -> None:
        now_s = self._clock.now_s
        while (found := self._shaper.next(now_s)) is not None:
            peer, request = found
            self._shaper.finish(peer, request)
            self._serve(peer, *request)
        wait_s = self._shaper.wait_s(now_s)
        if wait_s is not None and now_s + wait_s < self._wakes_s:
            self._wakes_s = now_s + wait_s
            self._clock.call_at(self._wakes_s, self._wake, self._wakes_s)
