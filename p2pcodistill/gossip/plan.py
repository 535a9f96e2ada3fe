"""What to fetch of one origin, in which order, and when to ask it for a path.

A plan is a list of frames, oldest first, that lead from what the store holds to the newest version announced. Its head is
fetched, then the next: of delta frames the oldest missing one first. Only a keyframe may overtake. It replaces what of the
plan has not begun to arrive; a download that has begun is finished first, so that even over a slow link every frame that has
begun to arrive is completed.

Where what is announced does not lead on from what is held or planned, where the plan has grown dearer than a checkpoint, or
where a frame of it cannot be had, the origin is asked for a path, which takes the plan's place; where the origin is not
there, a peer that holds frames of it is. That is done between two downloads and not during one: over a slow link the answer
would be out of date when it is needed, and a keyframe made for it in vain. Only one such request is under way at a time,
and only a few are made until something new is announced or the plan gets on: who cannot help is not asked in a loop.
"""

from __future__ import annotations

from collections.abc import Sequence

from p2pcodistill.checkpoint.chain import MAX_CHAIN_FRAMES
from p2pcodistill.checkpoint.manifest import MAX_MANIFEST_BYTES, SignedManifest, Version
from p2pcodistill.gossip.download import Download, Offer
from p2pcodistill.gossip.messages import CatchUp

MAX_REQUESTS_WITHOUT_NEWS = 8
"""How often a path is asked for without anything new being announced or a higher version being reached."""
MAX_PLAN_MANIFEST_BYTES = 4 * MAX_MANIFEST_BYTES
"""Of all manifests of a plan, or of a path: no origin can make this site hold more of them. An honest path costs about as
much as two keyframes at most, and so do its manifests."""


class Plan:
    """The plan for one origin. `held` is what its delta frames may build on; None: only a keyframe helps. `is_for_others`:
    it is relayed, and `held` but a claim of those who need it; nobody but the origin is asked for a path then."""

    def __init__(self, held: Version | None, *, is_for_others: bool = False) -> None:
        self.held = held
        self.is_for_others = is_for_others
        self.offers: list[Offer] = []
        self.download: Download | None = None
        self.holders: dict[str, None] = {}
        """The peers other than the origin that have told of frames in their current session."""
        self.asked: CatchUp | None = None
        self.asked_of: str | None = None
        self.asked_s = 0.0
        self.late: dict[str, CatchUp] = {}
        """Requests to peers that have not answered for long, so that another was asked. An answer is welcome still."""
        self._reached = held  # the highest version that the store's chain has led to
        self._announced = held  # the highest version that was
        self._needs_path = False
        self._num_requests = 0  # without news
        self._unavailable: dict[str, tuple[str, ...]] = {}  # frames that these peers could not send
        self._is_broken = False  # what led to what was held cannot be applied
        self._is_mending = False  # a broken chain is being replaced, and nothing new was announced meanwhile

    @property
    def head(self) -> Offer | None:
        """What is to be fetched now."""
        return self.offers[0] if self.offers else None

    @property
    def is_head_skippable(self) -> bool:
        """Whether the next frame of the plan does without the head."""
        return len(self.offers) > 1 and self.offers[1].base in (None, self.held)

    def find(self, frame_id: str) -> Offer | None:
        """What is planned under this name."""
        return next((offer for offer in self.offers if offer.frame_id == frame_id), None)

    # --- what peers say ----------------------------------------------------------------------------------------------

    def announce(self, peer: str, signed: SignedManifest, *, has_all: bool = True) -> bool:
        """`peer` holds this frame, the newest of its origin, or a part of it. Whether that changes anything."""
        frame_id = signed.frame_id
        if peer == signed.manifest.origin:
            for offer in self.offers:  # it has published them all; what it does not hold any more it will say
                if peer not in offer.lost:
                    offer.add(peer)
            if self.is_for_others and self.held is not None and signed.version < self.held:
                self.held = signed.base  # nobody can hold what is still to come: the claim was false
        planned = self.find(frame_id)
        if planned is not None:
            planned.add(peer, has_all=has_all)
            return True
        last = self.offers[-1].version if self.offers else self.held
        if peer in self._unavailable.get(frame_id, ()) or (last is not None and signed.version <= last):
            return bool(self.offers)
        self._unavailable.pop(frame_id, None)
        self._announced = max(self._announced or signed.version, signed.version)
        self._is_mending = False
        self._num_requests = 0
        offer = Offer(signed, {})
        offer.add(peer, has_all=has_all)
        if signed.base is None:
            self._needs_path = False
            self.offers = [*self._fetched_head(), offer]
        elif signed.base == last:
            self.offers.append(offer)
            self._shorten(max_bytes=signed.manifest.num_fp16_bytes)
        else:
            self._needs_path = True
        return True

    def follow(self, peer: str, path: Sequence[SignedManifest], *, has_all: bool = True) -> None:
        """`peer` answered what was asked with these frames, oldest first."""
        if self.late.pop(peer, None) is not None:
            if self.offers:
                return  # there is another way by now
            asked = None
        else:
            asked, self.asked = self.asked, None
        offers = [self.find(signed.frame_id) or Offer(signed, {}) for signed in path]
        for offer in offers:
            offer.add(peer, has_all=has_all)
            if peer != offer.signed.manifest.origin and peer in self._unavailable.get(offer.frame_id, ()):
                del self._unavailable[offer.frame_id]  # it may have fetched since what it did not hold then
        if any(peer in self._unavailable.get(offer.frame_id, ()) for offer in offers):
            # There is no way without them. If this was the way from nothing, only what comes next can help.
            self._needs_path = asked is not None and asked.held is not None
            return
        for fetched in (self._fetched_head(), []):
            start = fetched[0].version if fetched else self.held
            onward = [offer for offer in offers if start is None or offer.version > start]
            if not onward or onward[0].base in (None, start):
                self.offers = [*fetched, *onward]
                # Who answered may be behind. What it does not know of is asked for when its path is at its end.
                self._needs_path = not self.offers and self._is_behind
                return
        self._needs_path = True  # it leads on from what has been lost since

    def forgo(self, *, is_needed: bool = False) -> None:
        """What was asked will not be answered; `is_needed`: somebody else may be asked for it."""
        if self.asked is not None:
            self.asked = None
            self._needs_path |= is_needed

    def stop_waiting(self) -> None:
        """Who was asked has not answered for long, or there is somebody better to ask."""
        if self.asked is not None and self.asked_of is not None:
            self.late[self.asked_of], self.asked = self.asked, None
            self._needs_path = True

    def close(self, peer: str, *, is_origin: bool) -> None:
        """A session is over. A new one with the origin begins with an announcement, from which all else follows."""
        self.holders.pop(peer, None)
        self.late.pop(peer, None)
        if self.asked_of == peer:
            self.forgo(is_needed=True)
        if is_origin:
            self._needs_path = self._needs_path and bool(self.holders)
            self._num_requests = 0
            self._unavailable.clear()

    @property
    def is_path_due(self) -> bool:
        """Whether somebody is to be asked for a path."""
        return self._needs_path and self.asked is None and self._num_requests < MAX_REQUESTS_WITHOUT_NEWS

    def need_path(self) -> None:
        """Another way has to be found."""
        self._needs_path = True

    def need_path_for(self, request: CatchUp) -> None:
        """A peer that this site relays for needs a path. What it asks for takes the place of what was planned."""
        self._needs_path = True
        self._num_requests = 0
        self.held, self._is_broken = request.held, request.afresh
        self.offers = self._fetched_head()

    def ask(self, peer: str, now_s: float = 0.0, *, origin: str | None = None) -> CatchUp | None:
        """What to ask of `peer`, if a path is due; it counts as asked. `origin` is None if the peer is the origin."""
        if not self.is_path_due:
            return None
        self._needs_path = False
        self._num_requests += 1
        self.asked_of, self.asked_s = peer, now_s
        self.asked = CatchUp(None if self._unavailable else self.held, self._is_broken, origin)
        return self.asked

    # --- what becomes of its head ------------------------------------------------------------------------------------

    def store(self, frame_id: str, version: Version, held: Version | None) -> bool:
        """A frame is in the store, whose chain leads to `held` now. Whether that is further than before."""
        # If it does not reach so far, it has become too long, or has lost a frame: from there nothing leads on.
        self.held = held if held is not None and held >= version else None
        self._unavailable.clear()
        self._is_broken = False
        self.offers = [
            offer
            for offer in self.offers
            if offer.frame_id != frame_id and (self.held is None or offer.version > self.held)
        ]
        num_left = len(self.offers)
        self._drop_dangling()
        if not self.offers and (self.held is None or num_left or self._is_behind):
            self._needs_path = True
        if held is None or (self._reached is not None and held <= self._reached):
            return False
        self._reached = held
        self._num_requests = 0
        return True

    def skip_head(self) -> None:
        """The head has been overtaken."""
        self.offers.pop(0)

    def refuse_head(self) -> None:
        """The store does not take the head. It is tried again when something new is announced."""
        self.offers.pop(0)
        self._drop_dangling()

    def lose_head(self) -> None:
        """Nobody can send the head."""
        head = self.offers.pop(0)
        self._unavailable[head.frame_id] = (*head.lost, *head.sources)
        self._drop_dangling()
        if not self.offers:
            self._needs_path = True

    def break_chain(self) -> None:
        """What is held turned out to be worthless."""
        self.held = self._reached = None
        self._is_broken = True
        self._drop_dangling()
        if not self.offers and not self._is_mending:
            self._needs_path = True
        self._is_mending = True

    # --- inside ------------------------------------------------------------------------------------------------------

    def _shorten(self, *, max_bytes: int) -> None:
        """Leave the delta frames that wait to a later path if they are more than `max_bytes`, or too many: the origin will
        not have kept them all, and a keyframe costs less. The same where their manifests would take too much memory."""
        if len(self.offers) == 1:
            return
        num_kept = 1 + max(
            (index for index, offer in enumerate(self.offers) if offer.base is None), default=0
        )
        waiting = self.offers[num_kept:]
        is_dear = sum(offer.signed.num_bytes for offer in waiting) > max_bytes
        is_large = sum(len(offer.signed.body) for offer in self.offers) > MAX_PLAN_MANIFEST_BYTES
        if len(waiting) >= MAX_CHAIN_FRAMES or is_dear or is_large:
            self.offers = self.offers[:num_kept]
            self._needs_path = True

    @property
    def _is_behind(self) -> bool:
        """Whether what is held is not all that was announced."""
        return self._announced is not None and (self.held is None or self.held < self._announced)

    def _fetched_head(self) -> list[Offer]:
        """The head, if it is being fetched; else nothing."""
        is_fetched = self.download is not None and self.download.offer is self.head
        return self.offers[:1] if is_fetched else []

    def _drop_dangling(self) -> None:
        """Drop what no longer follows from what is held."""
        while self.offers and self.offers[0].base not in (None, self.held):
            self.offers.pop(0)
