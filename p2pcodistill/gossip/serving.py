"""What this site holds for others to fetch, and who is in the middle of fetching it.

Every frame of this site's own chain can be wanted, what the store holds of other origins, and of a frame that is still
being fetched the chunks that are there. A frame that a peer has begun to fetch must stay beyond that, however slowly it
travels: if it went under the peer's hands, nothing would ever arrive over a slow link. So a reader keeps the frame that it
wanted last until it wants another frame of the same origin, or none for long, or has been away for a while.

Credit binds the other side, too: whoever wants more in one message than a window holds would make this site read and queue
it all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from p2pcodistill.checkpoint.manifest import Manifest, SignedManifest
from p2pcodistill.errors import MalformedError
from p2pcodistill.gossip.download import Download
from p2pcodistill.gossip.messages import Want

READER_GRACE_S = 60.0
"""How long a frame is kept for a reader whose session has closed."""
READER_IDLE_S = 1800.0
"""How long it is kept for one that wants nothing, though it could: it has what it wanted, or gave it up."""


def _count_bytes(manifest: Manifest, indices: Sequence[int]) -> int:
    """Bytes of the chunks `indices`, which are ascending; the last chunk of the frame may be a short one."""
    num_short_bytes = manifest.num_chunks * manifest.chunk_bytes - manifest.num_bytes
    return len(indices) * manifest.chunk_bytes - num_short_bytes * (indices[-1] == manifest.num_chunks - 1)


@dataclass(slots=True)
class _Reader:
    frame_id: str
    wanted_s: float
    closed_s: float | None = None

    def is_reading(self, now_s: float) -> bool:
        if self.closed_s is not None and now_s - self.closed_s >= READER_GRACE_S:
            return False
        return now_s - self.wanted_s < READER_IDLE_S


class Serving:
    """The frames that can be wanted of this site: what it holds of each origin, and those still being read.

    It does not know what the store pruned; the node answers for a frame that is no longer there.
    """

    def __init__(
        self, *, window_bytes: int, download_of: Callable[[str], Download | None] = lambda frame_id: None
    ) -> None:
        """`window_bytes` is the most that a peer may want in one message; a single chunk is always served. `download_of`
        finds a frame that is still being fetched."""
        self._window_bytes = window_bytes
        self._download_of = download_of
        self._held: dict[str, Manifest] = {}
        self._offered: dict[str, dict[str, None]] = {}
        self._readers: dict[str, dict[str, _Reader]] = {}  # by origin and peer

    def hold(self, origin: str, frames: Collection[SignedManifest], now_s: float) -> None:
        """Of `origin` these complete frames can be wanted from now on, and no others but those being read."""
        before = self._offered.get(origin, {})
        readers = self._readers.get(origin, {})
        for peer in [peer for peer, reader in readers.items() if not reader.is_reading(now_s)]:
            del readers[peer]
        read = dict.fromkeys(reader.frame_id for reader in readers.values())
        offered = self._offered[origin] = {signed.frame_id: None for signed in frames}
        for frame_id in before:
            if frame_id not in offered and frame_id not in read:
                self._held.pop(frame_id, None)
        for signed in frames:
            self._held[signed.frame_id] = signed.manifest
        # What is read, though no longer offered, is looked at again the next time.
        offered.update((frame_id, None) for frame_id in read if frame_id in self._held)

    def add(self, signed: SignedManifest) -> None:
        """This complete frame can be wanted, too."""
        self._held[signed.frame_id] = signed.manifest
        self._offered.setdefault(signed.manifest.origin, {})[signed.frame_id] = None

    def lose(self, frame_id: str, origin: str, now_s: float) -> None:
        """A frame of `origin` is no longer in the store. While it is read it can be wanted all the same."""
        readers = self._readers.get(origin, {}).values()
        if any(reader.frame_id == frame_id and reader.is_reading(now_s) for reader in readers):
            return
        self._held.pop(frame_id, None)
        self._offered.get(origin, {}).pop(frame_id, None)

    def origin_of(self, frame_id: str) -> str | None:
        """Whose frame this is, if it can be wanted."""
        manifest = self._held.get(frame_id)
        return manifest.origin if manifest else None

    def want(self, peer: str, want: Want, now_s: float) -> bool:
        """Whether what `peer` wants can be served.

        Raises MalformedError for chunks that the frame does not have, and for more of them than a window holds.
        """
        manifest = self._held.get(want.frame_id)
        if manifest is None:
            download = self._download_of(want.frame_id)
            if download is None:
                return False
            manifest = download.offer.signed.manifest
            if not all(download.held >> index & 1 for index in want.indices):
                return False
        if want.indices[-1] >= manifest.num_chunks:
            raise MalformedError(
                f"{peer} wants chunk {want.indices[-1]} of a frame with {manifest.num_chunks}"
            )
        max_bytes = max(self._window_bytes, manifest.chunk_bytes)
        if _count_bytes(manifest, want.indices) > max_bytes:
            raise MalformedError(f"{peer} wants more than {max_bytes} bytes at once")
        self._readers.setdefault(manifest.origin, {})[peer] = _Reader(want.frame_id, now_s)
        return True

    def close(self, peer: str, now_s: float) -> None:
        """The session with `peer` is over."""
        for readers in self._readers.values():
            reader = readers.get(peer)
            if reader is not None and reader.closed_s is None:
                reader.closed_s = now_s

    def in_use(self, now_s: float) -> tuple[str, ...]:
        """The frames that peers are in the middle of fetching, as far as is known here."""
        return tuple(
            reader.frame_id
            for readers in self._readers.values()
            for reader in readers.values()
            if reader.is_reading(now_s)
        )
