"""What this site holds for others to fetch, and who is in the middle of fetching it.

Every frame of this site's own chain can be wanted, and the newest that was fetched of every teacher. A frame that a
peer has begun to fetch must stay beyond that, however slowly it travels: if it went under the peer's hands, nothing
would ever arrive over a slow link. So a reader keeps the frame that it wanted last until it wants another frame of the
same origin, or has been away for a while.

Credit binds the other side, too: whoever wants more in one message than a window holds would make this site read and queue
it all at once.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from p2pcodistill.checkpoint.manifest import Manifest, SignedManifest
from p2pcodistill.errors import MalformedError
from p2pcodistill.gossip.messages import Want

READER_GRACE_S = 60.0
"""How long a frame is kept for a reader whose session has closed."""


@dataclass(frozen=True, slots=True)
class _Held:
    origin: str
    num_bytes: int
    chunk_bytes: int
    num_chunks: int

    @classmethod
    def of(cls, manifest: Manifest) -> _Held:
        return cls(manifest.origin, manifest.num_bytes, manifest.chunk_bytes, manifest.num_chunks)

    def count_bytes(self, indices: Sequence[int]) -> int:
        """Bytes of the chunks `indices`, which are ascending; the last chunk of the frame may be a short one."""
        num_short_bytes = self.num_chunks * self.chunk_bytes - self.num_bytes
        return len(indices) * self.chunk_bytes - num_short_bytes * (indices[-1] == self.num_chunks - 1)


@dataclass(slots=True)
class _Reader:
    frame_id: str
    closed_s: float | None = None

    def is_reading(self, now_s: float) -> bool:
        return self.closed_s is None or now_s - self.closed_s < READER_GRACE_S


class Serving:
    """The frames that can be wanted of this site: what it holds of each origin, and those still being read.

    It does not know what the store pruned; the node answers for a frame that is no longer there.
    """

    def __init__(self, *, window_bytes: int) -> None:
        """`window_bytes` is the most that a peer may want in one message; a single chunk is always served."""
        self._window_bytes = window_bytes
        self._held: dict[str, _Held] = {}
        self._offered: dict[str, tuple[str, ...]] = {}
        self._readers: dict[tuple[str, str], _Reader] = {}

    def hold(self, origin: str, frames: Collection[SignedManifest], now_s: float) -> None:
        """Of `origin` these complete frames can be wanted from now on, and no others but those being read."""
        self._offered[origin] = tuple(signed.frame_id for signed in frames)
        self._held |= {signed.frame_id: _Held.of(signed.manifest) for signed in frames}
        self._readers = {key: reader for key, reader in self._readers.items() if reader.is_reading(now_s)}
        kept = {frame_id for offered in self._offered.values() for frame_id in offered}.union(
            self.in_use(now_s)
        )
        self._held = {frame_id: held for frame_id, held in self._held.items() if frame_id in kept}

    def want(self, peer: str, want: Want) -> bool:
        """Whether what `peer` wants can be served.

        Raises MalformedError for chunks that the frame does not have, and for more of them than a window holds.
        """
        held = self._held.get(want.frame_id)
        if held is None:
            return False
        if want.indices[-1] >= held.num_chunks:
            raise MalformedError(f"{peer} wants chunk {want.indices[-1]} of a frame with {held.num_chunks}")
        max_bytes = max(self._window_bytes, held.chunk_bytes)
        if held.count_bytes(want.indices) > max_bytes:
            raise MalformedError(f"{peer} wants more than {max_bytes} bytes at once")
        self._readers[peer, held.origin] = _Reader(want.frame_id)
        return True

    def close(self, peer: str, now_s: float) -> None:
        """The session with `peer` is over."""
        for (reader_peer, _), reader in self._readers.items():
            if reader_peer == peer and reader.closed_s is None:
                reader.closed_s = now_s

    def in_use(self, now_s: float) -> tuple[str, ...]:
        """The frames that peers are in the middle of fetching, as far as is known here."""
        return tuple(reader.frame_id for reader in self._readers.values() if reader.is_reading(now_s))
