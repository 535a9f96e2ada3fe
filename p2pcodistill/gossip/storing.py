"""What follows when frames come into the store, do not, or are lost: of this site and of others."""

from __future__ import annotations

from p2pcodistill.checkpoint.manifest import SignedManifest, Version
from p2pcodistill.gossip.events import AbandonFrame, Action, OfferFrame, Report
from p2pcodistill.gossip.passing import Passing
from p2pcodistill.gossip.publishing import Publishing
from p2pcodistill.gossip.serving import Serving
from p2pcodistill.gossip.sharing import Sharing
from p2pcodistill.gossip.teaching import Teaching
from p2pcodistill.gossip.transfer import Transfers
from p2pcodistill.telemetry import node_events


class Storing:
    """The frames that the store holds, as far as others may want them."""

    def __init__(
        self,
        site: str,
        *,
        publishing: Publishing,
        teaching: Teaching,
        transfers: Transfers,
        sharing: Sharing,
        passing: Passing,
        serving: Serving,
    ) -> None:
        self._site = site
        self._publishing, self._teaching, self._transfers = publishing, teaching, transfers
        self._sharing, self._passing, self._serving = sharing, passing, serving

    def in_use(self, now_s: float) -> frozenset[str]:
        """This site's own chain, what it relays, and what is being fetched, here or by a peer."""
        own = (signed.frame_id for signed in self._publishing.kept)
        relayed = (
            signed.frame_id
            for origin in self._passing.relayed_origins
            for signed in self._sharing.frames_of(origin)
        )
        return frozenset((*own, *relayed, *self._transfers.fetching, *self._serving.in_use(now_s)))

    def publish(self, signed: SignedManifest, now_s: float) -> list[Action]:
        """A frame of this site is in the store."""
        actions = self._teaching.publish(signed)
        self._serving.hold(self._site, self._publishing.kept, now_s)
        return actions

    def store(self, frame_id: str, held: Version | None, now_s: float) -> list[Action]:
        """A frame that was fetched is in the store, whose chain of its origin leads to `held` now."""
        download = self._transfers.download_of(frame_id)
        if download is None or not download.is_completing:
            return []
        signed = download.offer.signed
        manifest = signed.manifest
        is_relayed = self._passing.is_relayed(manifest.origin)
        # What is relayed need be no chain here: what comes next builds on what came before.
        self._transfers.store(frame_id, signed.version if is_relayed else held)
        if self._sharing.keep(signed):
            self._serving.hold(manifest.origin, self._sharing.frames_of(manifest.origin), now_s)
        else:
            self._serving.add(signed)
        kind = node_events.FrameRelayed if is_relayed else node_events.FrameFetched
        fetched = kind(
            origin=manifest.origin,
            incarnation=manifest.version.incarnation,
            step=manifest.version.step,
            kind=manifest.kind,
            num_bytes=manifest.num_bytes,
            num_resent_bytes=download.num_resent_bytes,
            duration_s=now_s - download.started_s,
        )
        is_offered = download.leads_further and not is_relayed
        offer = [OfferFrame(signed)] if is_offered else []
        return [Report(fetched), *offer, *self._sharing.tell_stored(signed)]

    def lose(self, frame_id: str, now_s: float) -> None:
        """A complete frame is in the store no more."""
        origin = self._serving.origin_of(frame_id)
        if origin == self._site:
            self._publishing.lose(frame_id)
        elif origin is not None:
            self._sharing.lose(frame_id, origin)
        if origin is not None:
            self._serving.lose(frame_id, origin, now_s)

    def give_up(self, frame_id: str, reason: str, why: str) -> list[Action]:
        """The store does not take a frame that was to be fetched."""
        download = self._transfers.give_up(frame_id)
        if download is None:
            return []
        origin = download.offer.signed.manifest.origin
        abandoned = self._sharing.abandon(frame_id)
        return [AbandonFrame(frame_id), *abandoned, Report(node_events.Refused(origin, reason, why))]
