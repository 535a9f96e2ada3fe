"""A frame on its way into the store: one file with chunks at their offsets, and holes between them."""

from __future__ import annotations

import os
from pathlib import Path

from p2pcodistill.checkpoint.manifest import SignedManifest, digest_chunk

_WRITE_BYTES = 64 << 10
"""What is written at a time. The kernel keeps the file in pieces as large as what it is given, and large ones it may have to
look for: writes of 512 KiB took five times as long on some machines."""


class PartialFrame:
    """The chunks of one frame that are there. They are written without fsync: what the file really holds after a crash is
    found out by hashing it."""

    def __init__(self, path: Path, signed: SignedManifest) -> None:
        """Open the file, made if it is missing; nothing of it counts as there. Raises OSError."""
        self.signed = signed
        self.present: set[int] = set()
        """The indices of the chunks that are there."""
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(self._descriptor, signed.num_bytes)
        except BaseException:
            os.close(self._descriptor)
            raise

    def find_chunks(self) -> None:
        """Find what an earlier life left, by hash. Raises OSError."""
        for index, digest in enumerate(self.signed.manifest.chunk_digests):
            if digest_chunk(self._read(index)) == digest:
                self.present.add(index)

    @property
    def num_missing(self) -> int:
        """How many chunks are not there."""
        return self.signed.manifest.num_chunks - len(self.present)

    def put_chunk(self, index: int, data: bytes) -> None:
        """Write a chunk whose hash was verified.

        Raises IndexError or ValueError when the manifest has no such chunk or another length for it, OSError.
        """
        offset, length = self.signed.manifest.chunk_range(index)
        if len(data) != length:
            raise ValueError(
                f"chunk {index} of frame {self.signed.frame_id} has {length} bytes, got {len(data)}"
            )
        view = memoryview(data)
        while view:  # a disk that fills up takes a part, and fails on the next call
            num_written = os.pwrite(self._descriptor, view[:_WRITE_BYTES], offset)
            view = view[num_written:]
            offset += num_written
        self.present.add(index)

    def read_chunk(self, index: int) -> bytes | None:
        """A chunk, verified by hash; None when it is not there. Raises OSError."""
        if index not in self.present:
            return None
        data = self._read(index)
        return data if digest_chunk(data) == self.signed.manifest.chunk_digests[index] else None

    def sync(self) -> None:
        """Make durable what was written. Raises OSError."""
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Close the file; what it holds stays."""
        os.close(self._descriptor)

    def _read(self, index: int) -> bytes:
        offset, length = self.signed.manifest.chunk_range(index)
        return os.pread(self._descriptor, length, offset)
