"""Fetching frames: what to ask of whom.

One frame per origin is fetched at a time, the head of its plan (see `plan`), pulled chunk by chunk from the peers that are
known to hold it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from p2pcodistill import telemetry
from p2pcodistill.checkpoint.manifest import SignedManifest, Version
from p2pcodistill.errors import ChecksumError, MalformedError
from p2pcodistill.gossip.download import Download, Offer, Window
from p2pcodistill.gossip.events import (
    AbandonFrame,
    Action,
    BeginFetch,
    CompleteFrame,
    Report,
    SendPayload,
    StoreChunk,
    send,
)
from p2pcodistill.gossip.messages import MAX_WANT_INDICES, CatchUp, Chunk, Want
from p2pcodistill.gossip.plan import Plan


class Transfers:
    """All downloads of one site, and its credit with every ready peer.

    After every change, `next_actions` says what follows from it.
    """

    def __init__(self, held: Mapping[str, Version], *, window_bytes: int, stall_timeout_s: float) -> None:
        """`held` maps origins to the version that the store's chain of each leads to."""
        self._window_bytes = window_bytes
        self._stall_timeout_s = stall_timeout_s
        self._windows: dict[str, Window] = {}
        self._plans = {origin: Plan(version) for origin, version in held.items()}

    @property
    def fetching(self) -> tuple[str, ...]:
        """The frames being fetched."""
        return tuple(download.frame_id for download in self._downloads())

    def open(self, peer: str) -> None:
        """`peer` became ready."""
        self._windows[peer] = Window(window_bytes=self._window_bytes, stall_timeout_s=self._stall_timeout_s)

    def close(self, peer: str) -> None:
        """`peer` is not ready any more: what was under way from it is void."""
        window = self._windows.pop(peer, None)
        if window is not None:
            self._want_again(window.void())
            self._plan(peer).close()

    def announce(self, peer: str, signed: SignedManifest) -> None:
        """`peer` holds the newest frame of its origin."""
        self._plan(signed.manifest.origin).announce(peer, signed)

    def asked(self, peer: str) -> CatchUp | None:
        """The request of a path that `peer` has not answered yet."""
        return self._plan(peer).asked

    def follow(self, peer: str, path: Sequence[SignedManifest]) -> None:
        """`peer` answered the request with a path, which was verified."""
        self._plan(peer).follow(peer, path)

    def forgo(self, peer: str) -> None:
        """The answer of `peer` to the request, if there was one, was refused."""
        self._plan(peer).asked = None

    def break_chain(self, origin: str) -> None:
        """The ranks could not apply what the store holds of `origin`."""
        self._plan(origin).break_chain()

    def begin(self, frame_id: str, present: Collection[int]) -> None:
        """The store is ready for a frame and holds the chunks `present` of it."""
        download = self._find(frame_id)
        if download is not None and not download.is_begun:
            download.begin(present)

    def receive(self, peer: str, chunk: Chunk, now_s: float) -> list[Action]:
        """A ready peer sent a chunk."""
        was_asked = self._windows[peer].receive(chunk.frame_id, chunk.index, now_s)
        download = self._find(chunk.frame_id)
        if download is None or not download.is_begun:
            return []  # the late answer to a request that is void
        try:
            is_new = download.accept(chunk)
        except (MalformedError, ChecksumError) as error:
            if was_asked:
                download.want_again(chunk.index)
            self._count_bad_chunk(peer, download.offer)
            return [Report(telemetry.Refused(peer, error.reason, f"{peer} sent a wrong chunk: {error}"))]
        return [StoreChunk(chunk.frame_id, chunk.index, chunk.data)] if is_new else []

    def lose_source(self, peer: str, frame_id: str) -> None:
        """`peer` does not hold this frame any more."""
        for plan in self._plans.values():
            for offer in plan.offers:
                if offer.frame_id == frame_id:
                    offer.num_bad_chunks_of.pop(peer, None)
        self._want_again(self._windows[peer].void(frame_id))

    def store(self, frame_id: str, held: Version | None) -> Download | None:
        """A frame is complete in the store, whose chain of that origin leads to `held` now.

        Returns its download, which is over, or None if it was given up before.
        """
        download = self._find(frame_id)
        if download is None or not download.is_completing:
            return None
        plan = self._plan(download.offer.signed.manifest.origin)
        plan.download = None
        download.leads_further = plan.store(frame_id, download.offer.version, held)
        return download

    def give_up(self, frame_id: str) -> Download | None:
        """The store does not take a frame: its download, which is over."""
        download = self._find(frame_id)
        if download is not None:
            plan = self._plan(download.offer.signed.manifest.origin)
            if download.offer is plan.head:
                plan.refuse_head()
            plan.download = None
            self._void(frame_id)
        return download

    def tick(self, now_s: float) -> None:
        """Time has passed: requests of silent peers are void."""
        for window in self._windows.values():
            if window.is_stalled(now_s):
                window.stall(now_s)
                self._want_again(window.void())

    def next_actions(self, now_s: float) -> list[Action]:
        """What to give up, begin, complete and ask for now."""
        actions: list[Action] = []
        for origin, plan in self._plans.items():
            actions += self._advance(plan, now_s)
            if origin in self._windows and not self._is_arriving(plan.download):
                request = plan.ask()
                actions += [send(origin, request)] if request else []
        return actions + self._wants(now_s)

    def _advance(self, plan: Plan, now_s: float) -> list[Action]:
        actions: list[Action] = []
        download = plan.download
        if download is not None and self._is_vain(plan, download):
            actions.append(AbandonFrame(download.frame_id))
            self._void(download.frame_id)
            plan.download = None
        if plan.download is not None:
            if plan.download.is_full and not plan.download.is_completing:
                plan.download.is_completing = True
                actions.append(CompleteFrame(plan.download.frame_id))
            return actions
        while plan.head is not None and not plan.head.has_source:
            plan.lose_head()
        if plan.head is not None:
            plan.download = Download(plan.head, now_s)
            actions.append(BeginFetch(plan.head.signed))
        return actions

    def _is_vain(self, plan: Plan, download: Download) -> bool:
        """Whether a download is to be given up; the plan is then rid of it."""
        if not download.is_begun or download.is_completing:
            return False
        if download.offer is not plan.head:
            return True
        if download.is_full:
            return False
        if not download.offer.has_source:
            plan.lose_head()
            return True
        if plan.is_head_skippable and not self._is_arriving(download):
            plan.skip_head()
            return True
        return False

    def _is_arriving(self, download: Download | None) -> bool:
        """Whether any of it has arrived or is under way."""
        if download is None:
            return False
        is_under_way = any(window.has_asked(download.frame_id) for window in self._windows.values())
        return download.num_held > 0 or is_under_way

    def _wants(self, now_s: float) -> list[Action]:
        actions: list[Action] = []
        # The liveliest peers first, so that what one of them let stall is asked of another where there is one.
        for peer, window in sorted(self._windows.items(), key=lambda item: item[1].patience_s):
            if window.is_low:
                for download in self._downloads():
                    if download.is_begun and download.offer.is_usable(peer):
                        indices = _ask(window, download, now_s)
                        actions += _want_actions(peer, download.frame_id, indices)
            window.rest()
        return actions

    def _plan(self, origin: str) -> Plan:
        return self._plans.setdefault(origin, Plan(None))

    def _downloads(self) -> list[Download]:
        return [plan.download for plan in self._plans.values() if plan.download is not None]

    def _find(self, frame_id: str) -> Download | None:
        return next((d for d in self._downloads() if d.frame_id == frame_id), None)

    def _void(self, frame_id: str) -> None:
        for window in self._windows.values():
            window.void(frame_id)

    def _count_bad_chunk(self, peer: str, offer: Offer) -> None:
        if peer not in offer.num_bad_chunks_of:
            return  # nobody asked it
        offer.num_bad_chunks_of[peer] += 1
        if not offer.is_usable(peer):
            self._want_again(self._windows[peer].void(offer.frame_id))

    def _want_again(self, voided: list[tuple[str, int]]) -> None:
        for frame_id, index in voided:
            download = self._find(frame_id)
            if download is not None:
                download.want_again(index)


def _ask(window: Window, download: Download, now_s: float) -> list[int]:
    indices = []
    while (wanted := download.next_wanted()) is not None and wanted[1] <= window.credit_bytes:
        download.take_wanted()
        window.ask(download.frame_id, *wanted, now_s)
        indices.append(wanted[0])
    return indices


def _want_actions(peer: str, frame_id: str, indices: list[int]) -> list[SendPayload]:
    wants = [
        Want(frame_id, tuple(indices[start : start + MAX_WANT_INDICES]))
        for start in range(0, len(indices), MAX_WANT_INDICES)
    ]
    return [send(peer, want) for want in wants]
