"""What follows for the frames of one origin: which to begin, to complete and to give up, and whether to ask for a path.

Decided by its plan, by who is here, and by what its download has come to.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from p2pcodistill.gossip.download import Download, Offer
from p2pcodistill.gossip.events import AbandonFrame, Action, BeginFetch, CompleteFrame, send
from p2pcodistill.gossip.plan import Plan
from p2pcodistill.gossip.window import Window


class Advancing:
    """Gets plans on. `downloads` (by frame) are begun and ended here."""

    def __init__(
        self,
        windows: Mapping[str, Window],
        downloads: dict[str, Download],
        share_of: Callable[[str], tuple[int, int]],
        free: Callable[[str], None],
    ) -> None:
        """`windows` are those of the ready peers and change outside. `free` is called with a peer whose credit has
        returned. `share_of` is that of `Transfers`."""
        self._windows, self._downloads = windows, downloads
        self._share_of, self._free = share_of, free

    def advance(self, plan: Plan, actions: list[Action], now_s: float) -> None:
        """Add to `actions` what to give up, begin and complete now."""
        download = plan.download
        if download is not None and self._is_vain(plan, download):
            actions.append(AbandonFrame(download.frame_id))
            self.end(download)
            download = plan.download = None
        if download is not None:
            if download.is_full and not download.is_completing:
                download.is_completing = True
                actions.append(CompleteFrame(download.frame_id))
            return
        while (head := plan.head) is not None:
            if not self._is_lost(head):
                plan.download = self._start(head, now_s)
                actions.append(BeginFetch(head.signed))
                return
            plan.lose_head()

    def ask_path(self, origin: str, plan: Plan, actions: list[Action], now_s: float) -> None:
        """Add the request of a path, if one is due and there is somebody to ask."""
        head = plan.head
        is_stranded = head is not None and not head.has_source_among(self._windows)
        if not (is_stranded or plan.is_path_due):
            return  # as nearly always
        peer = self.path_peer(origin, plan)
        if peer is None:
            return
        is_here = peer == origin
        is_full = plan.download is not None and plan.download.is_full
        if is_stranded and not is_here and not is_full:
            plan.need_path()  # whoever has it is not here; those who are may hold it, too, or know another way
        elif plan.download is not None and plan.download.is_arriving:
            return
        request = plan.ask(peer, now_s, origin=None if is_here else origin)
        if request is not None:
            actions.append(send(peer, request))

    def path_peer(self, origin: str, plan: Plan) -> str | None:
        """Whom to ask for a path: the origin if possible; nobody who was asked and has not answered yet."""
        peers = (origin,) if plan.is_for_others else (origin, *plan.holders)
        waited_for = plan.asked_of if plan.asked is not None else None
        return next((p for p in peers if p in self._windows and p not in plan.late and p != waited_for), None)

    def end(self, download: Download) -> None:
        """A download is over: nothing of it is under way any more."""
        self._downloads.pop(download.frame_id, None)
        for peer in dict.fromkeys((*download.offer.sources, *download.asked_of.values())):
            if peer in self._windows and self._windows[peer].void(download.frame_id):
                self._free(peer)

    def _start(self, offer: Offer, now_s: float) -> Download:
        download = Download(offer, now_s)
        if download.num_chunks > 1:
            # Every student begins elsewhere, so that they soon have something for each other.
            place, num_sharing = self._share_of(download.origin)
            download.first_index = place * download.num_chunks // num_sharing
        self._downloads[offer.frame_id] = download
        return download

    def _is_vain(self, plan: Plan, download: Download) -> bool:
        """Whether a download is to be given up; the plan is then rid of it."""
        if not download.is_begun or download.is_completing:
            return False
        if download.offer is not plan.head:
            return True
        if download.is_full:
            return False
        if self._is_lost(download.offer):
            plan.lose_head()
            return True
        if plan.is_head_skippable and (not download.is_arriving or self._is_stranded(plan, download.offer)):
            plan.skip_head()
            return True
        return False

    def _is_lost(self, offer: Offer) -> bool:
        """Whether a frame cannot be had: nobody has it, or its origin does not and can tell another way."""
        if not offer.has_source:
            return True
        origin = offer.signed.manifest.origin
        at_origin = offer.sources.get(origin)
        is_dropped = origin in offer.lost or (at_origin is not None and not at_origin.is_usable)
        is_here = origin in self._windows
        return is_here and is_dropped and not offer.has_source_among(self._windows)

    def _is_stranded(self, plan: Plan, head: Offer) -> bool:
        """Whether nobody who holds the head is here, but somebody who holds what comes next."""
        return not head.has_source_among(self._windows) and any(
            offer.has_source_among(self._windows) for offer in plan.offers[1:2]
        )
