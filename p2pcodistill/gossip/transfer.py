"""Fetching frames: what is known of them, what is under way, and what follows from every change.

One frame per origin is fetched at a time, the head of its plan (see `plan`, `advancing`), pulled chunk by chunk from the
peers that are known to hold it (see `asking`).

What follows from an event is worked out only for what the event has changed: most change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence

from p2pcodistill.checkpoint.manifest import SignedManifest, Version
from p2pcodistill.errors import ChecksumError, MalformedError
from p2pcodistill.gossip.advancing import Advancing
from p2pcodistill.gossip.asking import Asking
from p2pcodistill.gossip.download import Download, Offer
from p2pcodistill.gossip.events import (
    AbandonFrame,
    Action,
    Report,
    StoreChunk,
)
from p2pcodistill.gossip.messages import CatchUp, Chunk, Have
from p2pcodistill.gossip.plan import Plan
from p2pcodistill.gossip.window import LinkEstimate, Window
from p2pcodistill.telemetry import node_events


class Transfers:
    """All downloads of one site, and its credit with every ready peer.

    After every change, `next_actions` says what follows from it.
    """

    def __init__(
        self,
        held: Mapping[str, Version],
        *,
        window_bytes: int,
        stall_timeout_s: float,
        share_of: Callable[[str], tuple[int, int]] = lambda origin: (0, 1),
    ) -> None:
        """`held` maps origins to the version that the store's chain of each leads to. `share_of` tells of those who fetch an
        origin's frames and help each other this site's place among them, and how many they are."""
        self._window_bytes = window_bytes
        self._stall_timeout_s = stall_timeout_s
        self._windows: dict[str, Window] = {}
        self._links: dict[str, LinkEstimate] = {}
        self._plans = {origin: Plan(version) for origin, version in held.items()}
        self._downloads: dict[str, Download] = {}  # by frame
        self._suspects: dict[str, None] = {}
        self._asking = Asking(self._windows, self._suspects, share_of)
        # What has changed since the last `next_actions`: plans, downloads that may be asked for, and credit.
        self._moved: dict[str, None] = {}
        self._hungry: dict[str, None] = {}
        self._eager: dict[str, None] = {}
        self._advancing = Advancing(self._windows, self._downloads, share_of, self._note_credit)

    @property
    def fetching(self) -> tuple[str, ...]:
        """The frames being fetched."""
        return tuple(self._downloads)

    @property
    def links(self) -> dict[str, LinkEstimate]:
        """What downloads have shown of the links with peers."""
        return self._links

    @property
    def downloads(self) -> Collection[Download]:
        """The downloads under way."""
        return self._downloads.values()

    def download_of(self, frame_id: str) -> Download | None:
        """The download of this frame, if it is being fetched."""
        return self._downloads.get(frame_id)

    # --- sessions ----------------------------------------------------------------------------------------------------

    def open(self, peer: str) -> None:
        """`peer` became ready."""
        link = self._links.setdefault(peer, LinkEstimate())
        self._windows[peer] = Window(
            window_bytes=self._window_bytes, stall_timeout_s=self._stall_timeout_s, link=link
        )
        self._eager[peer] = None
        if peer in self._plans:
            self._plans[peer].stop_waiting()  # who was asked instead may itself have to ask the origin
            self._moved[peer] = None

    def close(self, peer: str) -> None:
        """`peer` is not ready any more: what was under way from it is void."""
        window = self._windows.pop(peer, None)
        if window is None:
            return
        self._want_again(peer, window.void())
        self._suspects.pop(peer, None)
        for origin, plan in self._plans.items():
            if peer == origin or peer in plan.holders:
                for offer in plan.offers:
                    source = offer.sources.get(peer)
                    if source is not None and source.held is not None:  # what it may have lost since
                        source.held, source.is_stale = 0, True
                plan.close(peer, is_origin=peer == origin)
                self._moved[origin] = None

    def suspect(self, peer: str, *, is_suspect: bool) -> None:
        """`peer` has fallen silent, or speaks again: suspects are asked last."""
        if is_suspect:
            self._suspects[peer] = None
        else:
            self._suspects.pop(peer, None)

    def observe_rtt(self, peer: str, rtt_s: float) -> None:
        """A ping of a ready peer was answered after so long."""
        self._windows[peer].observe_rtt(rtt_s)

    # --- plans -------------------------------------------------------------------------------------------------------

    def announce(self, peer: str, signed: SignedManifest, *, has_all: bool = True) -> None:
        """`peer` holds the newest frame of its origin, or a part of it."""
        origin = signed.manifest.origin
        plan = self.plan(origin)
        is_changed = plan.announce(peer, signed, has_all=has_all)
        if peer != origin and peer not in plan.holders:
            plan.holders[peer] = None
            is_changed = True
        if is_changed or plan.is_path_due:
            self._moved[origin] = None

    def have(self, peer: str, have: Have) -> SignedManifest | None:
        """`peer` holds these chunks of a frame; the frame's manifest if it holds all of them, else None.

        Raises MalformedError for chunks that the frame does not have.
        """
        download = self._downloads.get(have.frame_id)
        found = (plan.find(have.frame_id) for plan in self._plans.values())
        offer = download.offer if download else next((offer for offer in found if offer is not None), None)
        if offer is None:
            return None
        manifest = offer.signed.manifest
        if have.chunks >> manifest.num_chunks:
            raise MalformedError(f"{peer} claims to hold chunks that a frame does not have")
        has_all = have.chunks + 1 == 1 << manifest.num_chunks
        offer.add(peer, has_all=has_all)
        source = offer.sources[peer]
        if source.held is not None:
            source.held |= have.chunks
        self.plan(manifest.origin).holders[peer] = None
        self._hungry[have.frame_id] = None
        return offer.signed if has_all else None

    def asked(self, peer: str, origin: str | None = None) -> CatchUp | None:
        """The request of a path (of frames of `origin`, or of its own) that `peer` has not answered yet."""
        plan = self._plans.get(origin or peer)
        if plan is None:
            return None
        return plan.asked if plan.asked and plan.asked_of == peer else plan.late.get(peer)

    def follow(self, peer: str, path: Sequence[SignedManifest], *, has_all: bool = True) -> None:
        """`peer` answered the request with a path, which was verified."""
        origin = path[0].manifest.origin
        self.plan(origin).follow(peer, path, has_all=has_all)
        self._moved[origin] = None

    def forgo(self, peer: str, origin: str | None = None, *, is_needed: bool = False) -> None:
        """The answer of `peer` to the request, if there was one, was refused; or `is_needed` from another: it has none."""
        plan = self._plans.get(origin or peer)
        if plan is None:
            return
        plan.late.pop(peer, None)
        if plan.asked_of == peer:
            plan.forgo(is_needed=is_needed)
        if is_needed:
            plan.holders.pop(peer, None)
        self._moved[origin or peer] = None

    def stop_waiting(self, origin: str) -> None:
        """Who was asked for a path of `origin` has not answered for too long. An answer is welcome still."""
        self.plan(origin).stop_waiting()
        self._moved[origin] = None

    def break_chain(self, origin: str) -> None:
        """The ranks could not apply what the store holds of `origin`."""
        self.plan(origin).break_chain()
        self._moved[origin] = None

    def relay(self, origin: str, held: Version | None) -> None:
        """Fetch the frames of `origin` that somebody needs who claims to hold `held`."""
        before = self._plans.get(origin)  # it was relayed once, and has not answered what it was asked then
        self._plans[origin] = Plan(held, is_for_others=True)
        if before is not None:
            self._plans[origin].late.update(before.late)

    def relay_path(self, origin: str, request: CatchUp) -> None:
        """Ask `origin` for a path that somebody else needs, and fetch what it tells."""
        self.plan(origin).need_path_for(request)
        self._moved[origin] = None

    def drop(self, origin: str) -> list[Action]:
        """Frames of `origin` are of no interest any more, or for now: give up what is being fetched."""
        plan = self._plans.pop(origin, None)
        self._moved.pop(origin, None)
        if plan is None:
            return []
        plan.stop_waiting()  # but who was asked will answer
        self._plans[origin] = Plan(plan.held)
        self._plans[origin].late.update(plan.late)
        if plan.download is None:
            return []
        self._advancing.end(plan.download)
        return [AbandonFrame(plan.download.frame_id)]

    def forget(self, origin: str) -> list[Action]:
        """This site has nothing to do with `origin` any more."""
        actions = self.drop(origin)
        if origin in self._plans and not self._plans[origin].late:
            del self._plans[origin]
        return actions

    def plan(self, origin: str) -> Plan:
        """The plan for one origin."""
        plan = self._plans.get(origin)
        if plan is None:
            plan = self._plans[origin] = Plan(None)
        return plan

    # --- downloads ---------------------------------------------------------------------------------------------------

    def begin(self, frame_id: str, present: Collection[int]) -> None:
        """The store is ready for a frame and holds the chunks `present` of it."""
        download = self._downloads.get(frame_id)
        if download is not None and not download.is_begun:
            download.begin(present)
            self._moved[download.origin] = None

    def receive(self, peer: str, chunk: Chunk, now_s: float) -> list[Action]:
        """A ready peer sent a chunk."""
        was_asked = self._windows[peer].receive(chunk.frame_id, chunk.index, now_s)
        self._eager[peer] = None
        download = self._downloads.get(chunk.frame_id)
        if download is None or not download.is_begun:
            return []  # the late answer to a request that is void
        try:
            is_new = download.accept(chunk)
        except (MalformedError, ChecksumError) as error:
            if was_asked:
                download.want_again(chunk.index, peer)
            self._count_bad_chunk(peer, download.offer)
            self._moved[download.origin] = None
            return [Report(node_events.Refused(peer, error.reason, f"{peer} sent a wrong chunk: {error}"))]
        if is_new and peer == download.origin:
            download.num_of_origin += 1
        if download.is_full:
            self._moved[download.origin] = None
        return [StoreChunk(chunk.frame_id, chunk.index, chunk.data)] if is_new else []

    def lose_source(self, peer: str, frame_id: str) -> None:
        """`peer` does not hold this frame any more."""
        for origin, plan in self._plans.items():
            offer = plan.find(frame_id)
            if offer is not None:
                offer.lose(peer)
                self._moved[origin] = None
        self._want_again(peer, self._windows[peer].void(frame_id))

    def store(self, frame_id: str, held: Version | None) -> Download | None:
        """A frame is complete in the store, whose chain of that origin leads to `held` now.

        Returns its download, which is over, or None if it was given up before.
        """
        download = self._downloads.get(frame_id)
        if download is None or not download.is_completing:
            return None
        plan = self._plans[download.origin]
        plan.download = None
        del self._downloads[frame_id]
        download.leads_further = plan.store(frame_id, download.offer.version, held)
        self._moved[download.origin] = None
        return download

    def give_up(self, frame_id: str) -> Download | None:
        """The store does not take a frame: its download, which is over."""
        download = self._downloads.get(frame_id)
        if download is not None:
            plan = self._plans[download.origin]
            if download.offer is plan.head:
                plan.refuse_head()
            plan.download = None
            self._advancing.end(download)
            self._moved[download.origin] = None
        return download

    def tick(self, now_s: float) -> None:
        """Time has passed: requests of silent peers are void."""
        for peer, window in self._windows.items() if self._downloads else ():
            if window.is_stalled(now_s):
                voided = window.void()
                stalled = [self._downloads.get(frame_id) for frame_id in dict.fromkeys(f for f, _ in voided)]
                is_needed = any(d is not None and not self._has_other(d, peer, now_s) for d in stalled)
                window.stall(now_s, is_only_source=is_needed)
                self._want_again(peer, voided)
        for origin, plan in self._plans.items():
            is_late = plan.asked is not None and now_s - plan.asked_s >= self._stall_timeout_s
            if is_late and self._advancing.path_peer(origin, plan) is not None:
                plan.stop_waiting()
                self._moved[origin] = None
        for download in self._downloads.values():
            self._note_hunger(download, now_s)

    def _has_other(self, download: Download, peer: str, now_s: float) -> bool:
        """Whether somebody else than `peer` can be asked for the frame, who is not slow."""
        return any(
            other != peer
            and other in self._windows
            and source.is_usable
            and not source.is_stale
            and not self._windows[other].is_slow(now_s)
            for other, source in download.offer.sources.items()
        )

    def _note_hunger(self, download: Download, now_s: float) -> None:
        """Those who have nothing for a download that has been waiting for long are not waited for."""
        if download.asked_of or not download.wanted:
            download.hungry_s = None
        elif download.hungry_s is None:
            download.hungry_s = now_s
        elif now_s - download.hungry_s >= self._stall_timeout_s:
            for source in download.offer.sources.values():
                if source.held is not None and not source.held & download.wanted and not source.is_stale:
                    source.is_stale = True
                    self._moved[download.origin] = None

    # --- what follows ------------------------------------------------------------------------------------------------

    def next_actions(self, now_s: float) -> list[Action]:
        """What to give up, begin, complete and ask for now."""
        if not (self._moved or self._hungry or self._eager):
            return []
        actions: list[Action] = []
        hungry, self._hungry = self._hungry, {}
        moved, self._moved = self._moved, {}
        for origin in moved:
            plan = self._plans.get(origin)
            if plan is not None:
                self._advancing.advance(plan, actions, now_s)
                self._advancing.ask_path(origin, plan, actions, now_s)
                if plan.download is not None and plan.download.wanted:
                    hungry[plan.download.frame_id] = None
        eager, self._eager = self._eager, {}
        if eager:
            for frame_id, download in self._downloads.items():
                if download.wanted and not eager.keys().isdisjoint(download.offer.sources):
                    hungry[frame_id] = None
        is_low: dict[str, bool] = {}
        for frame_id in hungry:
            hungry_download = self._downloads.get(frame_id)
            if hungry_download is not None and hungry_download.wanted:
                actions += self._asking.feed(hungry_download, is_low, now_s)
        for peer in (*eager, *is_low):
            if peer in self._windows:
                self._windows[peer].rest()
        return actions

    def _note_credit(self, peer: str) -> None:
        self._eager[peer] = None

    def _count_bad_chunk(self, peer: str, offer: Offer) -> None:
        source = offer.sources.get(peer)
        if source is None:
            return  # nobody asked it
        source.num_bad_chunks += 1
        if not source.is_usable:
            self._want_again(peer, self._windows[peer].void(offer.frame_id))

    def _want_again(self, peer: str, voided: list[tuple[str, int]]) -> None:
        if voided:
            self._eager[peer] = None
        for frame_id, index in voided:
            download = self._downloads.get(frame_id)
            if download is not None:
                download.want_again(index, peer)
                self._moved[download.origin] = None
