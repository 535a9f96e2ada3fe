"""This site's own frames: what to announce to whom, how a student catches up, and which frames are kept for that.

A new version is announced to every student when it is published, and the newest one again at the beginning of a session. A
student that cannot go on from what it holds asks to catch up, and is told the cheapest path there is. Where a keyframe of
the newest version would be cheaper, or nothing else leads there, one is asked of the ranks; the student is answered with the
next frame that is published, whichever it is, or with what there is when the ranks cannot oblige.
"""

from __future__ import annotations

from collections.abc import Sequence

from p2pcodistill.checkpoint.chain import cheapest_path, worth_keeping
from p2pcodistill.checkpoint.manifest import SignedManifest, Version
from p2pcodistill.errors import MalformedError
from p2pcodistill.gossip.messages import Announce, CatchUp

MAX_ANSWERS = 32
"""How often a student may ask to catch up between two frames of this site; honest ones stop far earlier."""
MAX_FRAMES_PER_REQUEST = 2
"""A keyframe that has not come after so many other frames is asked for again, if somebody still waits for it."""


class Publishing:
    """The frames of this site that others may want, and the students that wait for one.

    `known_incarnation` is always what the student knows of this site. Frames of an earlier incarnation would be
    refused by it: the incarnation has to be raised first, and until then nothing is announced.
    """

    def __init__(self, frames: Sequence[SignedManifest]) -> None:
        """`frames` are all of this site's that its store holds."""
        self._kept: list[SignedManifest] = []
        self._newest: SignedManifest | None = (
            None  # of two of one version the delta frame: always the same is announced
        )
        self._keyframe_bytes: int | None = None
        self._keep(frames)
        self._remembered_incarnation = self._newest.version.incarnation if self._newest else 0
        self._told_incarnation = 0  # the highest that anybody was told of: peers tell each other
        self._announcement: Announce | None = None  # of the newest frame: it is the same for everyone
        self._waiting: dict[str, CatchUp] = {}
        self._num_answers: dict[str, int] = {}  # since the last frame was published
        self._num_published_since_request: int | None = None
        self._is_request_due = False

    @property
    def kept(self) -> tuple[SignedManifest, ...]:
        """The frames that are announced and served, by version."""
        return tuple(self._kept)

    @property
    def newest_version(self) -> Version | None:
        """The newest version that is announced."""
        newest = self._newest
        return None if newest is None else newest.version

    def publish(self, signed: SignedManifest) -> bool:
        """Take note of a frame. False when it is not to be announced to everyone: it is old, or known by another frame."""
        newest = self._newest
        is_new = newest is None or signed.version > newest.version
        is_keyframe_of_newest = (
            newest is not None and signed.version == newest.version and signed.base is None
        )
        if not is_new and not is_keyframe_of_newest:
            return False
        self._keep([*self._kept, signed])
        self._num_answers.clear()
        if signed.base is None:
            self._num_published_since_request = None
        elif self._num_published_since_request is not None:
            self._num_published_since_request += 1
            if self._num_published_since_request == MAX_FRAMES_PER_REQUEST:
                self._num_published_since_request = None
        return is_new

    def lose(self, frame_id: str) -> None:
        """A frame is no longer in the store, or is damaged: no path leads over it any more."""
        self._set_kept([signed for signed in self._kept if signed.frame_id != frame_id])

    def announce_to(self, student: str, *, known_incarnation: int) -> Announce | None:
        """What to tell a student of the newest version, if there is one that it would accept; it counts as told."""
        newest = self._newest
        if newest is None or newest.version.incarnation < known_incarnation:
            return None
        self._told_incarnation = max(self._told_incarnation, newest.version.incarnation)
        if self._announcement is None or self._announcement.signature is not newest.signature:
            self._announcement = Announce(newest.body, newest.signature)
        return self._announcement

    # --- catching up -----------------------------------------------------------------------------------------------

    @property
    def waiting(self) -> dict[str, CatchUp]:
        """The students that wait for an answer, and what they asked."""
        return dict(self._waiting)

    def answer(
        self, student: str, request: CatchUp, *, known_incarnation: int, at_any_price: bool
    ) -> list[Announce]:
        """The path for a student that asks to catch up. Where there is none yet, the student waits.

        So it does, unless the path goes `at_any_price`, where a keyframe of the newest version would be cheaper, or is what
        it asks for. Raises MalformedError for a student that asks again and again.
        """
        self._waiting.pop(student, None)
        newest = self._newest
        if newest is not None and request.held is not None and request.held >= newest.version:
            return []  # it is not behind
        self._num_answers[student] = self._num_answers.get(student, 0) + 1
        if self._num_answers[student] > MAX_ANSWERS:
            raise MalformedError(f"{student} asks to catch up again and again")
        path = self._find_path(request, known_incarnation, at_any_price)
        if path is None:
            self._waiting[student] = request
            if newest is not None and self._num_published_since_request is None:
                self._num_published_since_request = 0
                self._is_request_due = True
            return []
        self._told_incarnation = max(self._told_incarnation, path[-1].version.incarnation)
        last = len(path) - 1
        return [Announce(signed.body, signed.signature, last - index) for index, signed in enumerate(path)]

    def take_request(self) -> bool:
        """Whether the ranks are to be asked for a keyframe now; they count as asked."""
        is_due, self._is_request_due = self._is_request_due, False
        return is_due

    def close(self, student: str) -> None:
        """The session with a student is over: it will ask again."""
        self._waiting.pop(student, None)

    # --- incarnations ----------------------------------------------------------------------------------------------

    def is_from_past_life(self, known_incarnation: int) -> bool:
        """Whether somebody knows of an incarnation of this site that this site told nobody, as far as is remembered.

        What this site published in a life that its store has no memory of must not be mistaken for what it will.
        """
        return known_incarnation > max(self._remembered_incarnation, self._told_incarnation)

    # --- inside ----------------------------------------------------------------------------------------------------

    def _keep(self, frames: Sequence[SignedManifest]) -> None:
        keyframe = max((s for s in frames if s.base is None), key=lambda s: s.version, default=None)
        if keyframe is not None:
            self._keyframe_bytes = keyframe.num_bytes
        self._set_kept(worth_keeping(frames, keyframe_bytes=self._keyframe_bytes))

    def _set_kept(self, frames: list[SignedManifest]) -> None:
        self._kept = frames
        of_newest = [signed for signed in frames[-2:] if signed.version == frames[-1].version]
        self._newest = of_newest[0] if of_newest else None

    def _find_path(
        self, request: CatchUp, known_incarnation: int, at_any_price: bool
    ) -> list[SignedManifest] | None:
        newest = self._newest
        if newest is None or newest.version.incarnation < known_incarnation:
            return None
        path = cheapest_path(self._kept, request.held)
        if path is None or at_any_price:
            return path
        if request.afresh:
            keyframes = (s for s in self._kept if s.version == newest.version and s.base is None)
            return [keyframe] if (keyframe := next(keyframes, None)) else None
        # A new keyframe would be one of the reference, lossless, whatever this chain began with.
        num_fresh_bytes = max(newest.manifest.num_fp16_bytes, self._keyframe_bytes or 0)
        is_cheap = len(path) == 1 or sum(signed.num_bytes for signed in path) <= num_fresh_bytes
        return path if is_cheap else None
