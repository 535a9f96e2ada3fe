"""What this site tells others of frames that are not its own: those of its teachers, and of origins that it relays.

Students of one origin that are connected tell each other what they have of it, so that the origin need not send every frame
to each of them: the manifest of a frame when it is stored, and, while it is being fetched, by and by which chunks are there.
Of chunks each tells but a few of many others, so chosen that whatever one has is only a few steps from all.
Of a frame of a single chunk there is nothing to share: most others have it from the origin by then, or soon will. They are
told of the newest such frame as soon as the origin cannot be reached from here: then it may be gone. Whoever *follows* an
origin here, because it cannot connect with it, hears of a frame as soon as this site does. A peer that is behind may ask for
a path; the answer is what is held here, which only the origin can add to.
"""

from __future__ import annotations

from bisect import bisect
from collections.abc import Collection, Mapping, Sequence

from p2pcodistill.checkpoint.chain import MAX_CHAIN_FRAMES, cheapest_path, worth_keeping
from p2pcodistill.checkpoint.manifest import SignedManifest, Version
from p2pcodistill.gossip.download import Download
from p2pcodistill.gossip.events import Action, send
from p2pcodistill.gossip.messages import Announce, CatchUp, Gone, Have
from p2pcodistill.gossip.plan import MAX_PLAN_MANIFEST_BYTES

MAX_PARTS_TOLD = 16
"""Into so many parts what is told of a frame being fetched is divided, whatever its size; what is left waits for a tick."""
MAX_NEAR = 4
"""Up to so many others are all told of chunks."""
MAX_ANSWERS = 32
"""How often a peer is told a path of one origin before this site holds something new of it."""


class Sharing:
    """The frames of others that this site holds, and which ready peers are told of them."""

    def __init__(
        self,
        site: str,
        students_of: Mapping[str, Collection[str]],
        chains: Mapping[str, Sequence[SignedManifest]],
    ) -> None:
        """`students_of` names those who may learn from each origin; `chains` holds the frames in the store by origin, those
        that the origin signed."""
        self._site = site
        self._students_of = students_of
        self._chains = {origin: list(frames) for origin, frames in chains.items()}
        self._listeners: dict[str, dict[str, None]] = {}  # by origin
        self._followers: dict[str, dict[str, None]] = {}
        self._reached: dict[tuple[str, str], Version] = {}  # by peer and origin: what the peer holds
        self._told: dict[tuple[str, str], dict[str, None]] = {}  # frames whose manifests the peer knows
        self._told_parts_of: dict[
            str, str
        ] = {}  # frames being fetched that were told of in parts, and their origins
        self._num_untold: dict[str, int] = {}  # chunks that came since the last time, by frame
        self._num_answers: dict[tuple[str, str], int] = {}
        self._untold: dict[str, None] = {}  # origins of frames that not everyone was told of
        self._num_manifest_bytes: dict[str, int] = {}  # of what is held, by origin
        for origin in self._chains:
            self._cap_manifests(origin)

    def frames_of(self, origin: str) -> Sequence[SignedManifest]:
        """The frames of `origin` that are held here."""
        return self._chains.get(origin, ())

    def is_student(self, peer: str, origin: str) -> bool:
        """Whether `peer` may learn from `origin`."""
        return peer in self._students_of.get(origin, ())

    def share_of(self, origin: str) -> tuple[int, int]:
        """This site's place among those who are told of the frames of `origin`, itself included, and how many they are."""
        listeners = self._listeners.get(origin)
        if not listeners:
            return 0, 1
        return sum(peer < self._site for peer in listeners), 1 + len(listeners)

    # --- who listens -------------------------------------------------------------------------------------------------

    def open(self, peer: str, origins: Collection[str]) -> list[Action]:
        """`peer` became ready: what it is to know of those of `origins` that teach it, too."""
        actions: list[Action] = []
        for origin in origins:
            if peer != origin and self.is_student(peer, origin):
                self._listeners.setdefault(origin, {})[peer] = None
                frames = self._chains.get(origin)
                if frames:
                    actions += self._tell_of(peer, frames[-1], has_all=True)
        return actions

    def close(self, peer: str) -> None:
        """The session with `peer` is over."""
        for listeners in (*self._listeners.values(), *self._followers.values()):
            listeners.pop(peer, None)
        for key in [key for key in {**self._reached, **self._told, **self._num_answers} if key[0] == peer]:
            self._reached.pop(key, None)
            self._told.pop(key, None)
            self._num_answers.pop(key, None)

    def follow(self, peer: str, origin: str, newest: SignedManifest | None) -> list[Action]:
        """`peer` is told of the frames of `origin` from now on, as soon as they are announced; `newest` was."""
        self._listeners.setdefault(origin, {})[peer] = None
        self._followers.setdefault(origin, {})[peer] = None
        if newest is None:
            return []
        return self.tell(peer, newest)

    def unfollow(self, peer: str, origin: str) -> None:
        """`peer` need not be told of `origin` any more, unless as its student."""
        self._followers.get(origin, {}).pop(peer, None)

    def followers(self, origin: str) -> tuple[str, ...]:
        """Those who follow `origin` here."""
        return tuple(self._followers.get(origin, ()))

    def followed_by(self, peer: str) -> tuple[str, ...]:
        """The origins that `peer` follows here."""
        return tuple(origin for origin, followers in self._followers.items() if peer in followers)

    def drop(self, origin: str) -> None:
        """Frames of `origin` are not kept any more."""
        self._chains.pop(origin, None)
        self._listeners.pop(origin, None)
        self._followers.pop(origin, None)
        self._untold.pop(origin, None)
        self._num_manifest_bytes.pop(origin, None)

    # --- what happens to frames --------------------------------------------------------------------------------------

    def hear(self, peer: str, signed: SignedManifest, *, has_all: bool) -> None:
        """`peer` told of a frame, and need not be told of it."""
        origin = signed.manifest.origin
        if peer == origin or peer not in self._listeners.get(origin, ()):
            return
        self._note_told(peer, origin, signed.frame_id)
        if has_all:
            self._reach(peer, origin, signed.version)

    def announce(self, signed: SignedManifest) -> list[Action]:
        """A frame was announced here: those who follow its origin hear of it before it has arrived."""
        followers = self._followers.get(signed.manifest.origin)
        if not followers:
            return []
        return [action for peer in followers for action in self._tell_of(peer, signed, has_all=False)]

    def tell(self, peer: str, signed: SignedManifest) -> list[Action]:
        """`peer` is to know of this frame."""
        frames = self._chains.get(signed.manifest.origin, ())
        return self._tell_of(peer, signed, has_all=any(held.frame_id == signed.frame_id for held in frames))

    def receive(self, download: Download) -> list[Action]:
        """A chunk of this download has arrived."""
        if download.num_chunks == 1 or not self._listeners.get(download.origin):
            return []
        num_untold = self._num_untold.get(download.frame_id, 0) + 1
        self._num_untold[download.frame_id] = num_untold
        if num_untold * MAX_PARTS_TOLD < download.num_chunks or download.is_full:
            return []
        return self._tell_parts(download)

    def tick(self, downloads: Collection[Download]) -> list[Action]:
        """Time has passed: what has come of these since the last time is told."""
        if not self._num_untold:
            return []
        untold = [download for download in downloads if self._num_untold.get(download.frame_id)]
        self._num_untold = {download.frame_id: 0 for download in untold}
        return [action for download in untold for action in self._tell_parts(download)]

    def tell_all(self, origin: str) -> list[Action]:
        """Whoever is to know of the newest frame of `origin` that is here, and was not told yet, is told now."""
        frames = self._chains.get(origin)
        if origin not in self._untold or not frames:
            return []
        del self._untold[origin]
        return self._tell_each(self._listeners.get(origin, ()), frames[-1])

    def keep(self, signed: SignedManifest) -> bool:
        """A frame is complete in the store. Whether others are not offered any more, now that it is."""
        origin = signed.manifest.origin
        frames = self._chains.setdefault(origin, [])
        is_newest = not frames or frames[-1].version <= signed.version
        frames.append(signed)
        if not is_newest:
            frames.sort(key=lambda frame: frame.version)
        num_manifest_bytes = self._num_manifest_bytes.get(origin, 0) + len(signed.body)
        self._num_manifest_bytes[origin] = num_manifest_bytes
        is_long = len(frames) > MAX_CHAIN_FRAMES or num_manifest_bytes > MAX_PLAN_MANIFEST_BYTES
        if signed.base is not None and not is_long:
            return False
        self._chains[origin] = worth_keeping(frames, keyframe_bytes=signed.manifest.num_fp16_bytes)
        self._cap_manifests(origin)
        return True

    def tell_stored(self, signed: SignedManifest) -> list[Action]:
        """Whoever is to know of a frame that is kept now is told."""
        origin = signed.manifest.origin
        self._num_untold.pop(signed.frame_id, None)
        self._told_parts_of.pop(signed.frame_id, None)
        listeners = self._listeners.get(origin)
        if not listeners:
            return []
        if signed.manifest.num_chunks > 1:
            return self._tell_each(listeners, signed)
        self._untold[origin] = None
        return self._tell_each(self._followers.get(origin, ()), signed)

    def abandon(self, frame_id: str) -> list[Action]:
        """A frame is not fetched any more: those who were told of it need not wait for it."""
        self._num_untold.pop(frame_id, None)
        origin = self._told_parts_of.pop(frame_id, None)
        listeners = list(self._listeners.get(origin, ())) if origin is not None else []
        for (peer, _), told in self._told.items():
            if told.pop(frame_id, self) is None:
                listeners.append(peer)
        return [send(peer, Gone(frame_id)) for peer in dict.fromkeys(listeners)]

    def lose(self, frame_id: str, origin: str) -> None:
        """A frame is no longer in the store, or is damaged."""
        frames = self._chains.get(origin)
        if frames is not None:
            self._chains[origin] = [signed for signed in frames if signed.frame_id != frame_id]
            self._cap_manifests(origin)

    # --- catching up -------------------------------------------------------------------------------------------------

    def find_path(self, peer: str, request: CatchUp, origin: str) -> list[SignedManifest]:
        """The frames held here that lead `peer` on; [] if there are none, or if it asks again and again."""
        frames = self._chains.get(origin)
        num_answers = self._num_answers.get((peer, origin), 0)
        if not frames or num_answers >= MAX_ANSWERS:
            return []
        if request.afresh:
            frames = [signed for signed in frames if signed.base is None][-1:]
            path = frames if frames and frames[0].version == self._chains[origin][-1].version else None
        else:
            path = cheapest_path(frames, request.held)
        is_news = path and (request.held is None or path[-1].version > request.held)
        if not path or not is_news or sum(len(signed.body) for signed in path) > MAX_PLAN_MANIFEST_BYTES:
            return []
        self._num_answers[peer, origin] = num_answers + 1
        return path

    def answer(self, peer: str, path: Sequence[SignedManifest], *, has_all: bool) -> list[Action]:
        """The path as it is announced to `peer`."""
        last = len(path) - 1
        for signed in path:
            self._note_told(peer, signed.manifest.origin, signed.frame_id)
        return [
            send(peer, Announce(signed.body, signed.signature, last - index, has_all))
            for index, signed in enumerate(path)
        ]

    # --- inside ------------------------------------------------------------------------------------------------------

    def _cap_manifests(self, origin: str) -> None:
        """Forget the oldest frames of an origin whose manifests would take too much memory: no path may be as long."""
        frames = self._chains[origin]
        num_bytes = sum(len(signed.body) for signed in frames)
        while num_bytes > MAX_PLAN_MANIFEST_BYTES:
            num_bytes -= len(frames.pop(0).body)
        self._num_manifest_bytes[origin] = num_bytes

    def _tell_each(self, peers: Collection[str], signed: SignedManifest) -> list[Action]:
        """Those of `peers` that need it are told that this frame is here."""
        return [action for peer in peers for action in self._tell_of(peer, signed, has_all=True)]

    def _tell_of(self, peer: str, signed: SignedManifest, *, has_all: bool) -> list[Action]:
        origin = signed.manifest.origin
        reached = self._reached.get((peer, origin))
        if reached is not None and reached >= signed.version:
            return []
        if signed.frame_id in self._told.get((peer, origin), ()):
            whole = (1 << signed.manifest.num_chunks) - 1
            return [send(peer, Have(signed.frame_id, whole))] if has_all else []
        self._note_told(peer, origin, signed.frame_id)
        return [send(peer, Announce(signed.body, signed.signature, None, has_all))]

    def _tell_parts(self, download: Download) -> list[Action]:
        self._num_untold[download.frame_id] = 0
        self._told_parts_of[download.frame_id] = download.origin
        have = Have(download.frame_id, download.held)
        version = download.offer.version
        return [
            send(peer, have)
            for peer in self._near(download.origin)
            if (reached := self._reached.get((peer, download.origin))) is None or reached < version
        ]

    def _near(self, origin: str) -> Collection[str]:
        """Who is told of chunks: those who listen 1, 2, 4, 8 and so on places after this site, and whoever follows here."""
        listeners = self._listeners.get(origin, {})
        if len(listeners) <= MAX_NEAR:
            return listeners
        ordered = sorted(listeners)
        after = bisect(ordered, self._site) - 1
        near = [ordered[(after + (1 << step)) % len(ordered)] for step in range(len(ordered).bit_length())]
        return dict.fromkeys((*near, *self._followers.get(origin, ())))

    def _reach(self, peer: str, origin: str, version: Version) -> None:
        reached = self._reached.get((peer, origin))
        if reached is None or version > reached:
            self._reached[peer, origin] = version
            self._num_answers.pop((peer, origin), None)

    def _note_told(self, peer: str, origin: str, frame_id: str) -> None:
        told = self._told.setdefault((peer, origin), {})
        told[frame_id] = None
        while len(told) > 2 * MAX_CHAIN_FRAMES:
            del told[next(iter(told))]
