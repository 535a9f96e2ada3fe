"""Arrays to compressed bytes and back, losslessly: the entropy coders that frames use, each from a library.

*Raw* bytes (fp16 and other values) are Blosc2 chunks: byte shuffle, then zstd, which ends within a percent of the order-0
entropy of the byte planes and decodes at memory speed. *Symbols* (packed codes of delta frames, scales, differences) go
through Pcodec, whose tANS coder comes within a few percent of the entropy also far below one bit a weight, where the Huffman
coder inside of zstd cannot go.

Decoding trusts nothing: the caller says how many numbers are to come out and nothing more is ever written, and a Blosc2
chunk must say that it is one of the kind written here before Blosc2 sees it (a chunk's header can name other codecs and
filters, even ones that Blosc2 would look for on disk and load).
"""

from __future__ import annotations

import struct
from typing import Any

import blosc2
import numpy as np
from numpy.typing import NDArray
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

from p2pcodistill.errors import MalformedError

MAX_RAW_BYTES = 8 * 1024**2
"""Of one raw piece before it is compressed."""
MAX_SYMBOLS = 1 << 22
"""Of one piece of symbols."""
BLOCK_BYTES = 1024 * 1024
"""Of a Blosc2 block; fixed, since the default follows the cache sizes of the machine that encodes."""
MAX_OVERHEAD_BYTES = 4096
"""What a piece may be larger than its content, at worst."""

# Level 8 is the lowest at which every symbol gets a bin of its own. No search for structure: codes have none.
_SYMBOLS_CONFIG = ChunkConfig(
    compression_level=8, mode_spec=ModeSpec.classic(), delta_spec=DeltaSpec.no_op(), enable_8_bit=True
)
_CHUNK_HEADER = struct.Struct("<4B3i6s2B6s2B")
# The flags: a header of 32 bytes; content that was copied, not compressed; the delta filter; and above them the codec.
_CHUNK_EXTENDED = 0x05
_CHUNK_COPIED = 0x02
_CHUNK_DELTA = 0x08
_CHUNK_CODEC_SHIFT = 5
_CHUNK_ZSTD = 4
_CHUNK_FILTERS = bytes(5) + b"\x01"  # byte shuffle alone, sorted
# The last flags: regular, or all zeros; not lazy, no dictionary, nothing left uninitialised.
_CHUNK_KINDS = (0x00, 0x10)


def compress_raw(raw: NDArray[np.uint8], itemsize: int) -> bytes:
    """A Blosc2 chunk of the bytes of at most MAX_RAW_BYTES of values of `itemsize` bytes."""
    blosc2.set_releasegil(True)  # encoding runs beside the training thread
    chunk: bytes = blosc2.compress2(
        raw,
        typesize=itemsize,
        codec=blosc2.Codec.ZSTD,
        clevel=1,
        filters=[blosc2.Filter.SHUFFLE],
        filters_meta=[0],
        blocksize=BLOCK_BYTES,
        nthreads=1,
    )
    return chunk


def decompress_raw(piece: memoryview, into: NDArray[np.uint8], itemsize: int) -> None:
    """Fill `into`, whose length is what must come out. Raises MalformedError."""
    _check_chunk(piece, itemsize=itemsize, num_bytes=into.nbytes)
    blosc2.set_releasegil(True)
    try:
        blosc2.decompress2(piece, dst=into, nthreads=1)
    except (ValueError, RuntimeError):
        raise MalformedError("a piece of a frame does not decompress") from None


def _check_chunk(piece: memoryview, *, itemsize: int, num_bytes: int) -> None:
    """Raise MalformedError unless a Blosc2 chunk claims exactly these sizes, and nothing that `compress_raw` never makes.

    Byte for byte as in Blosc2's README_CHUNK_FORMAT.
    """
    if len(piece) < _CHUNK_HEADER.size:
        raise MalformedError("a piece of a frame is too short")
    (
        _, _, flags, typesize, num_raw_bytes, num_block_bytes, num_chunk_bytes,
        filters, _, codec_meta, filters_meta, more_flags, kind,
    ) = _CHUNK_HEADER.unpack_from(piece)  # fmt: skip
    is_ours = (
        (num_raw_bytes, num_chunk_bytes, typesize) == (num_bytes, len(piece), itemsize)
        and 0 < num_block_bytes <= BLOCK_BYTES
        and flags & (_CHUNK_EXTENDED | _CHUNK_DELTA) == _CHUNK_EXTENDED
        and (flags >> _CHUNK_CODEC_SHIFT == _CHUNK_ZSTD or flags & _CHUNK_COPIED)
        and bytes(sorted(filters)) == _CHUNK_FILTERS
        and (codec_meta, filters_meta, more_flags) == (0, bytes(6), 0)
        and kind in _CHUNK_KINDS
    )
    if not is_ours:
        raise MalformedError("a frame holds a Blosc2 chunk of another size or kind than its header says")


def compress_symbols(symbols: NDArray[Any]) -> bytes:
    """At most MAX_SYMBOLS unsigned numbers of 8, 16 or 32 bits."""
    return bytes(standalone.simple_compress(symbols, _SYMBOLS_CONFIG))


def decompress_symbols(piece: memoryview, into: NDArray[Any]) -> None:
    """Fill `into`, whose length and dtype are what must come out. Raises MalformedError."""
    try:
        progress = standalone.simple_decompress_into(bytes(piece), into)
    except (RuntimeError, TypeError, ValueError):
        raise MalformedError("a piece of a frame does not decompress") from None
    if progress.n_processed != len(into) or not progress.finished:
        raise MalformedError("a piece of a frame holds another number of codes than its tensor needs")


# Most symbols of a delta frame stand for "nothing has moved". Told apart first, they cost the entropy coder an eighth of its
# time, and it can price what is rarer than its tables resolve.


def split_zeros(symbols: NDArray[np.uint8], zero: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """(a bit for each symbol, whether it is not `zero`, lowest bit first; the symbols that are not)."""
    mask = symbols != zero
    # By index, which is several times as fast as by mask.
    return np.packbits(mask, bitorder="little"), symbols.take(np.flatnonzero(mask))


def count_others(mask: NDArray[np.uint8]) -> int:
    """How many symbols a mask says are not zero."""
    return int(np.bitwise_count(mask).sum())


def join_zeros(
    mask: NDArray[np.uint8], others: NDArray[np.uint8], zero: int, into: NDArray[np.uint8]
) -> None:
    """The inverse of `split_zeros`."""
    into.fill(zero)
    into[np.flatnonzero(np.unpackbits(mask, bitorder="little").view(np.bool_))] = others
