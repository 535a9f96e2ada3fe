"""Whom to ask for which chunks of a frame.

Each chunk is asked of one of those who hold it. Others are asked before the origin, which would else have to send every frame
to every student: of a frame that peers are fetching, too, the origin is asked for a share, and for what nobody else holds; it
lends a hand where the others are busy. Who let a request stall, or is suspect, is asked last.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from p2pcodistill.gossip.download import Download, Offer, Source
from p2pcodistill.gossip.events import Action, SendPayload, send
from p2pcodistill.gossip.messages import MAX_WANT_INDICES, Want
from p2pcodistill.gossip.window import Window


class Asking:
    """What is asked of the ready peers, as far as their windows allow."""

    def __init__(
        self,
        windows: Mapping[str, Window],
        suspects: Collection[str],
        share_of: Callable[[str], tuple[int, int]],
    ) -> None:
        """`windows` are those of the ready peers, of which `suspects` may be gone; both change outside. `share_of` is that of
        `Transfers`."""
        self._windows, self._suspects, self._share_of = windows, suspects, share_of

    def feed(self, download: Download, is_low: dict[str, bool], now_s: float) -> list[Action]:
        """Ask for what a download wants, as far as credit goes. `is_low` notes of which windows more is asked now."""
        actions: list[Action] = []
        origin = download.origin
        claimed = 0  # what others than the origin hold and send
        late: list[tuple[str, Source]] = []
        for peer, source in self._by_liveliness(download.offer):
            if source.is_slow or peer in self._suspects:
                late.append((peer, source))
            elif peer != origin:
                claimed |= download.all_chunks if source.held is None else source.held
                actions += self._ask(peer, source, download, is_low, now_s)
        at_origin = download.offer.sources.get(origin)
        if download.wanted and at_origin is not None and not any(peer == origin for peer, _ in late):
            actions += self._ask_origin(at_origin, download, claimed, is_low, now_s)
        for peer, source in late:
            actions += self._ask(peer, source, download, is_low, now_s)
        return actions

    def _by_liveliness(self, offer: Offer) -> list[tuple[str, Source]]:
        here = [(p, s) for p, s in offer.sources.items() if p in self._windows and s.is_usable]
        # What one of them let stall is asked of another where there is one.
        return here if len(here) < 2 else sorted(here, key=lambda item: self._windows[item[0]].patience_s)

    def _ask_origin(
        self, source: Source, download: Download, claimed: int, is_low: dict[str, bool], now_s: float
    ) -> list[Action]:
        origin = download.origin
        if origin not in self._windows or not source.is_usable:
            return []
        num_sharing = self._share_of(origin)[1]
        exclusive = download.wanted & ~claimed
        if num_sharing == 1 and not claimed:
            return self._ask(origin, source, download, is_low, now_s)
        num_asked = sum(peer == origin for peer in download.asked_of.values())
        if exclusive:
            # A share at first, then as much as the others give; and a little in any case, for they may be slow.
            num_share = -(-download.num_chunks // num_sharing)
            num_of_others = download.held.bit_count() - download.num_of_origin
            num_due = num_share + num_of_others - download.num_of_origin - num_asked
            max_chunks = max(num_due, max(1, num_share // 4) - num_asked)
            return self._ask(origin, source, download, is_low, now_s, of=exclusive, max_chunks=max_chunks)
        if num_asked:
            return []
        last = 1 << download.last_of(download.wanted)
        return self._ask(origin, source, download, is_low, now_s, of=last)

    def _ask(
        self,
        peer: str,
        source: Source,
        download: Download,
        is_low: dict[str, bool],
        now_s: float,
        *,
        of: int | None = None,
        max_chunks: int | None = None,
    ) -> list[Action]:
        chunks = download.wanted if of is None else of
        if source.held is not None:
            chunks &= source.held
        if not chunks:
            return []
        window = self._windows[peer]
        if peer not in is_low:
            is_low[peer] = window.is_low
        if not is_low[peer]:
            return []
        indices: list[int] = []
        manifest = download.offer.signed.manifest
        while chunks and (max_chunks is None or len(indices) < max_chunks):
            index = download.next_of(chunks)
            num_bytes = manifest.chunk_range(index)[1]
            if num_bytes > window.credit_bytes:
                break
            window.ask(download.frame_id, index, num_bytes, now_s)
            download.ask(index, peer)
            indices.append(index)
            chunks &= ~(1 << index)
        return [*_want_actions(peer, download.frame_id, indices)]


def _want_actions(peer: str, frame_id: str, indices: list[int]) -> list[SendPayload]:
    if len(indices) == 1:
        return [send(peer, Want(frame_id, (indices[0],)))]
    indices.sort()
    wants = [
        Want(frame_id, tuple(indices[start : start + MAX_WANT_INDICES]))
        for start in range(0, len(indices), MAX_WANT_INDICES)
    ]
    return [send(peer, want) for want in wants]
