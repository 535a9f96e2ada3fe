"""Chains of frames: which ones lead from what a receiver holds to the newest version, and which are worth keeping.

A keyframe stands alone; a delta frame names its *base*, the version that it is applied to. Frames of one origin and the same
version yield the same reference, however one gets there. So the frames of an origin are the edges of a graph whose nodes are
versions (and "nothing", where keyframes start), and catching up is a cheapest path in it.

Everything here is pure, and about the frames of a single origin.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from p2pcodistill.checkpoint.manifest import Version

MAX_CHAIN_FRAMES = 64
"""No path is longer: it bounds what one answer announces, what one offer to the ranks lists, and what a store keeps."""


class ChainFrame(Protocol):
    """What a chain needs to know of a frame; a `Manifest` is one."""

    @property
    def version(self) -> Version:
        """The version that the frame leads to."""

    @property
    def base(self) -> Version | None:
        """The version that a delta frame is applied to, lower than its own; None: a keyframe."""

    @property
    def num_bytes(self) -> int:
        """What it costs to fetch."""


T = TypeVar("T", bound=ChainFrame)


def cheapest_path(frames: Iterable[T], held: Version | None, target: Version | None = None) -> list[T] | None:
    """The frames that lead to `target` for the fewest bytes (then the fewest frames), oldest first.

    The path starts at `held`, or at nothing by a keyframe. `target` is the highest version among the frames if it is not
    given. [] when `held` is the target, None when no path of at most MAX_CHAIN_FRAMES frames leads there.
    """
    ordered = sorted(frames, key=lambda frame: frame.version)
    if target is None:
        if not ordered:
            return None
        target = ordered[-1].version
    if held == target:
        return []
    ways = _ways(ordered, held).get(target)
    return min(ways, key=_Way.rank).unroll() if ways else None


def shortest_chain(frames: Iterable[T]) -> list[T]:
    """The fewest frames (then the fewest bytes) that lead from nothing to the highest version that can be reached."""
    ways = _ways(sorted(frames, key=lambda frame: frame.version), None)
    if not ways:
        return []
    return min(ways[max(ways)], key=lambda way: (way.num_frames, way.num_bytes)).unroll()


def reachable(frames: Iterable[T]) -> Version | None:
    """The highest version that a path from nothing leads to; None when there is no keyframe."""
    return max(_ways(sorted(frames, key=lambda frame: frame.version), None), default=None)


def worth_keeping(frames: Sequence[T], *, keyframe_bytes: int | None = None) -> list[T]:
    """Those of an origin's own frames that it should go on serving, by version.

    The newest frame stays. So do the delta frames that lead to it, newest backwards, as long as all of them together cost at
    most a keyframe and are fewer than MAX_CHAIN_FRAMES: whoever is further behind is better served by a keyframe. The newest
    keyframe stays if the delta frames after it do. A keyframe costs `keyframe_bytes`, by default what the newest one among
    `frames` does; where neither is known the number of frames is the only limit.
    """
    if not frames:
        return []
    keyframes: dict[Version, T] = {}
    deltas: dict[Version, T] = {}
    for frame in frames:
        known = keyframes if frame.base is None else deltas
        if frame.version not in known or frame.num_bytes < known[frame.version].num_bytes:
            known[frame.version] = frame
    if keyframe_bytes is None and keyframes:
        keyframe_bytes = keyframes[max(keyframes)].num_bytes
    version = max(frame.version for frame in frames)
    kept_deltas: list[T] = []
    kept_keyframe: T | None = None
    num_bytes = 0
    while True:
        if kept_keyframe is None:
            kept_keyframe = keyframes.get(version)
        delta = deltas.get(version)
        if delta is None or delta.base is None or len(kept_deltas) == MAX_CHAIN_FRAMES - 1:
            break
        num_bytes += delta.num_bytes
        if kept_deltas and keyframe_bytes is not None and num_bytes > keyframe_bytes:
            break
        kept_deltas.append(delta)
        version = delta.base
    kept = [*kept_deltas, *([kept_keyframe] if kept_keyframe is not None else [])]
    return sorted(kept, key=lambda frame: frame.version)


@dataclass(frozen=True, slots=True)
class _Way(Generic[T]):
    """One way to a version: its last frame, and the way to that frame's base. Without a frame: where paths start."""

    num_bytes: int = 0
    num_frames: int = 0
    frame: T | None = None
    before: _Way[T] | None = None

    def rank(self) -> tuple[int, int]:
        return self.num_bytes, self.num_frames

    def then(self, frame: T) -> _Way[T]:
        return _Way(self.num_bytes + frame.num_bytes, self.num_frames + 1, frame, self)

    def unroll(self) -> list[T]:
        frames: list[T] = []
        way: _Way[T] | None = self
        while way is not None and way.frame is not None:
            frames.append(way.frame)
            way = way.before
        return frames[::-1]


def _ways(ordered: Iterable[T], held: Version | None) -> dict[Version, list[_Way[T]]]:
    """For every version that can be reached: the ways there that no other beats in bytes as well as in frames."""
    nothing: _Way[T] = _Way()
    ways: dict[Version, list[_Way[T]]] = {} if held is None else {held: [nothing]}
    for frame in ordered:  # by version, so that all ways to a base are known before what builds on it
        for way in [nothing] if frame.base is None else ways.get(frame.base, []):
            longer = way.then(frame)
            rivals = ways.get(frame.version, [])
            is_beaten = any(
                rival.num_bytes <= longer.num_bytes and rival.num_frames <= longer.num_frames
                for rival in rivals
            )
            if longer.num_frames <= MAX_CHAIN_FRAMES and not is_beaten:
                ways[frame.version] = [
                    longer,
                    *(
                        rival
                        for rival in rivals
                        if rival.num_bytes < longer.num_bytes or rival.num_frames < longer.num_frames
                    ),
                ]
    return ways
