"""Whom to ask for which chunks of a frame.

Each chunk is asked of one of those who hold it. Others are asked before the origin, which would else have to send every
frame to every student: of a frame that peers are fetching, too, the origin is asked for a share, and for what nobody else
holds; it lends a hand where the others are busy. Nobody is asked for a chunk that would take far longer than all the rest
would from the origin. Who let a request stall, or is suspect, is asked for what nobody else has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping

from p2pcodistill.gossip.download import Download, Offer, Source
from p2pcodistill.gossip.events import Action, send
from p2pcodistill.gossip.messages import MAX_WANT_INDICES, Want
from p2pcodistill.gossip.window import Window

FASTER_FACTOR = 4.0
"""An origin whose link delivers so many times as much as those of all others does not wait for what they could send."""
OUTRUN_FACTOR = 2.0
"""What a peer is asked for may come so many times later than all else, for the sake of the origin's line."""


class Asking:
    """What is asked of the ready peers, as far as their windows allow."""

    def __init__(
        self,
        windows: Mapping[str, Window],
        suspects: Collection[str],
        share_of: Callable[[str], tuple[int, int]],
    ) -> None:
        """`windows` are those of the ready peers, of which `suspects` may be gone; both change outside. `share_of` is that
        of `Transfers`."""
        self._windows, self._suspects, self._share_of = windows, suspects, share_of

    def feed(self, download: Download, is_low: dict[str, bool], now_s: float) -> list[Action]:
        """Ask for what a download wants, as far as credit goes. `is_low` notes of which windows more is asked now."""
        origin = download.origin
        sources = self._by_liveliness(download.offer)
        if len(sources) == 1 and (download.num_chunks == 1 or sources[0][0] != origin):  # there is no choice
            return self._ask(*sources[0], download, is_low, now_s)
        actions: list[Action] = []
        late = [
            (peer, source)
            for peer, source in sources
            if self._windows[peer].is_slow(now_s) or peer in self._suspects
        ]
        lively = [item for item in sources if item not in late]
        is_outrunning = False
        if len(lively) > 1 and any(peer == origin for peer, _ in lively):
            lively = [item for item in lively if item[0] == origin or not self._is_outrun(item[0], download)]
            is_outrunning = len(lively) == 1
        of_lively = claimed = 0  # what they hold, and what of that others than the origin hold
        for peer, source in lively:
            held = download.all_chunks if source.held is None else source.held
            of_lively |= held
            claimed |= 0 if peer == origin else held
        if of_lively == download.all_chunks:
            for peer, _ in late:
                if self._windows[peer].is_slow(now_s):  # nobody waits for it any more
                    for _, index in self._windows[peer].void(download.frame_id):
                        download.want_again(index, peer)
        for peer, source in lively:
            if peer != origin:
                actions += self._ask(peer, source, download, is_low, now_s)
        at_origin = next((source for peer, source in lively if peer == origin), None)
        if download.wanted and at_origin is not None:
            if is_outrunning:
                actions += self._ask(origin, at_origin, download, is_low, now_s)
            else:
                actions += self._ask_origin(at_origin, download, claimed, is_low, now_s)
        for peer, source in late:
            actions += self._ask(peer, source, download, is_low, now_s, of=download.wanted & ~of_lively)
        return actions

    def _by_liveliness(self, offer: Offer) -> list[tuple[str, Source]]:
        windows = self._windows
        here = [(p, s) for p, s in offer.sources.items() if p in windows and s.is_usable]
        # What one of them let stall is asked of another where there is one.
        return here if len(here) < 2 else sorted(here, key=lambda item: windows[item[0]].patience_s)

    def _ask_origin(
        self, source: Source, download: Download, claimed: int, is_low: dict[str, bool], now_s: float
    ) -> list[Action]:
        origin = download.origin
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
        num_chunks = self._faster_share(download)
        if num_chunks:
            return self._ask(
                origin, source, download, is_low, now_s, of=download.wanted, max_chunks=num_chunks
            )
        if num_asked:
            return []
        last = 1 << download.last_of(download.wanted)
        return self._ask(origin, source, download, is_low, now_s, of=last)

    def _is_outrun(self, peer: str, download: Download) -> bool:
        """Whether `peer`, as far as links are known, holds everything up: all that is wanted would have come from the origin
        long before one more chunk from it."""
        window = self._windows[peer]
        of_peer, of_origin = window.link.rate_bytes_s, self._windows[download.origin].link.rate_bytes_s
        if not of_peer or not of_origin:
            return False
        chunk_bytes = download.offer.signed.manifest.chunk_bytes
        peer_s = (window.num_asked_bytes + chunk_bytes) / of_peer
        return peer_s > OUTRUN_FACTOR * download.wanted.bit_count() * chunk_bytes / of_origin

    def _faster_share(self, download: Download) -> int:
        """How many of the chunks that are wanted of all the origin should send, because it is far faster than the others."""
        rates = {
            peer: self._windows[peer].link.rate_bytes_s or 0.0
            for peer, _ in self._by_liveliness(download.offer)
        }
        of_origin = rates.pop(download.origin)
        of_others = sum(rates.values())
        if not rates or of_origin <= FASTER_FACTOR * of_others:
            return 0
        return int(download.wanted.bit_count() * of_origin / (of_origin + of_others))

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
        indices.sort()
        return [
            send(peer, Want(download.frame_id, tuple(indices[start : start + MAX_WANT_INDICES])))
            for start in range(0, len(indices), MAX_WANT_INDICES)
        ]
