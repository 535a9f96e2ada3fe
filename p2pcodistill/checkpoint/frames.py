"""The layout of a frame: FORMAT.md in code. What is in the pieces is the encoder's and the decoder's business.

Reading trusts nothing: sizes are capped and must add up before anything of that size is allocated.
"""

from __future__ import annotations

import math
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import BinaryIO

import msgpack
import torch

from p2pcodistill.checkpoint.coding import MAX_OVERHEAD_BYTES, MAX_RAW_BYTES, MAX_SYMBOLS
from p2pcodistill.checkpoint.entries import (
    CODABLE_DTYPES,
    DELTA_ENCODINGS,
    EXACT,
    KEYFRAME_ENCODINGS,
    SAME,
    Bundle,
    TensorEntry,
    join_entries,
)
from p2pcodistill.checkpoint.snapshot import dtype_name
from p2pcodistill.errors import MalformedError, OversizedError

MAGIC = b"P2PF"
FORMAT_VERSION = 3
OLDEST_VERSION = 2
"""What is still read: its footers are not compressed, and no tensors joined."""
KEYFRAME = "keyframe"
DELTA = "delta"

MAX_FOOTER_BYTES = 8 * 1024**2
MAX_TENSORS = 65_536
MAX_NAME_CHARS = 512
MAX_DIMS = 32
MAX_STEP = 2**63 - 1
_MAX_PIECES = 32_768  # of one tensor or bundle
_MAX_PIECE_BYTES = max(MAX_RAW_BYTES, 4 * MAX_SYMBOLS) + MAX_OVERHEAD_BYTES
_MAX_ELEMENTS = 2**48  # with empty dimensions counted as 1: strides must fit an int64

_HEAD = struct.Struct("<4sI")
_TAIL = struct.Struct("<I4s")
_DTYPES = {
    dtype_name(dtype): dtype
    for dtype in (
        torch.float64, torch.float32, torch.float16, torch.bfloat16,
        torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
        torch.complex64, torch.complex128,
        torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
    )
}  # fmt: skip
_NARROWINGS = {
    (torch.float32, torch.float16),
    (torch.float32, torch.bfloat16),
    (torch.float64, torch.float16),
    (torch.float64, torch.bfloat16),
    (torch.float64, torch.float32),
}


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """What a frame says of itself; checked. A delta frame names the step and the checksum of the reference it moves."""

    step: int
    base: tuple[int, int] | None
    checksum: int
    entries: tuple[TensorEntry, ...]
    aliases: dict[str, str]
    version: int
    bundles: tuple[Bundle, ...]
    """The entries by the pieces that they share, in the body's order."""

    @property
    def kind(self) -> str:
        """`keyframe` or `delta`."""
        return KEYFRAME if self.base is None else DELTA


class FrameWriter:
    """Writes a frame piece by piece, so that it is never in memory as a whole."""

    def __init__(self, sink: BinaryIO) -> None:
        self._sink = sink
        self._entries: list[tuple[object, ...]] = []
        self._pieces: list[int] = []
        self.num_bytes = sink.write(_HEAD.pack(MAGIC, FORMAT_VERSION))
        """Written so far."""

    def add_piece(self, piece: bytes) -> None:
        """Append a piece of the tensor that `end_tensor` will name."""
        self._sink.write(piece)
        self.num_bytes += len(piece)
        self._pieces.append(len(piece))

    def end_tensor(
        self, name: str, dtype: torch.dtype, wire_dtype: torch.dtype, shape: Sequence[int], encoding: str
    ) -> None:
        """The pieces since the last call are this tensor's, or those of the bundle whose last member it is."""
        self._entries.append(
            (name, dtype_name(dtype), dtype_name(wire_dtype), tuple(shape), encoding, tuple(self._pieces))
        )
        self._pieces = []

    def finish(self, step: int, base: tuple[int, int] | None, checksum: int, aliases: dict[str, str]) -> None:
        """Write the footer. Raises MalformedError or OversizedError for what a reader would not take."""
        first = (step, base, checksum, len(self._entries), len(aliases))
        footer = b"".join(msgpack.packb(part) for part in (first, *self._entries, *aliases.items()))
        _parse_footer(footer, FORMAT_VERSION, max_bytes=2**63)  # the reader's caps bind the writer, too
        footer = zlib.compress(footer, 9)
        self.num_bytes += self._sink.write(footer + _TAIL.pack(len(footer), MAGIC))


def read_header(frame: memoryview, *, max_bytes: int) -> FrameHeader:
    """What `frame` says of itself. `max_bytes` caps the decoded tensors together.

    Raises MalformedError or OversizedError, and nothing else on account of the bytes.
    """
    if len(frame) < _HEAD.size + _TAIL.size:
        raise MalformedError(f"a frame of {len(frame)} bytes is too short")
    magic, version = _HEAD.unpack_from(frame)
    if magic != MAGIC:
        raise MalformedError("these bytes are not a frame")
    if not OLDEST_VERSION <= version <= FORMAT_VERSION:
        raise MalformedError(
            f"a frame has format version {version}; this version reads {OLDEST_VERSION} to {FORMAT_VERSION}"
        )
    num_footer_bytes, magic = _TAIL.unpack_from(frame, len(frame) - _TAIL.size)
    if magic != MAGIC:
        raise MalformedError("a frame is cut off")
    if num_footer_bytes > MAX_FOOTER_BYTES:
        raise OversizedError(
            f"a frame's footer of {num_footer_bytes} bytes is over the cap of {MAX_FOOTER_BYTES}"
        )
    num_body_bytes = len(frame) - _HEAD.size - _TAIL.size - num_footer_bytes
    if num_body_bytes < 0:
        raise MalformedError("a frame's footer is longer than the frame")
    footer = bytes(frame[len(frame) - _TAIL.size - num_footer_bytes : len(frame) - _TAIL.size])
    if version > 2:
        footer = _decompress_footer(footer)
    header = _parse_footer(footer, version, max_bytes=max_bytes)
    if num_body_bytes != sum(entry.num_wire_bytes for entry in header.entries):
        raise MalformedError("a frame's body is not as long as its footer says")
    return header


def read_pieces(frame: memoryview, header: FrameHeader) -> Iterator[tuple[Bundle, list[memoryview]]]:
    """The tensors of `frame`, whose header was read, by bundle, with their pieces."""
    offset = _HEAD.size
    for bundle in header.bundles:
        pieces = []
        for num_piece_bytes in bundle.whole.pieces:
            pieces.append(frame[offset : offset + num_piece_bytes])
            offset += num_piece_bytes
        yield bundle, pieces


def _decompress_footer(raw: bytes) -> bytes:
    inflater = zlib.decompressobj()
    try:
        footer = inflater.decompress(raw, MAX_FOOTER_BYTES + 1)
    except zlib.error:
        raise MalformedError("a frame's footer does not decompress") from None
    if len(footer) > MAX_FOOTER_BYTES:
        raise OversizedError(f"a frame's footer is over the cap of {MAX_FOOTER_BYTES} bytes")
    if not inflater.eof or inflater.unused_data:
        raise MalformedError("a frame's footer is cut off, or followed by something else")
    return footer


def _parse_footer(raw: bytes, version: int, *, max_bytes: int) -> FrameHeader:
    # One small array at a time: msgpack allocates what an array claims to hold before it has seen it.
    unpacker = msgpack.Unpacker(
        use_list=False,
        max_buffer_size=MAX_FOOTER_BYTES,
        max_str_len=4 * MAX_NAME_CHARS,
        max_bin_len=0,
        max_array_len=_MAX_PIECES,
        max_map_len=0,
        max_ext_len=0,
    )
    try:
        unpacker.feed(raw)
        return _read_footer(unpacker, len(raw), version, max_bytes)
    except (ValueError, msgpack.UnpackException) as error:
        raise MalformedError(
            f"a frame's footer does not parse: {str(error) or type(error).__name__}"
        ) from None


def _read_footer(
    unpacker: msgpack.Unpacker, num_footer_bytes: int, version: int, max_bytes: int
) -> FrameHeader:
    raw_step, raw_base, raw_checksum, num_tensors, num_aliases = _check_tuple(unpacker.unpack(), 5)
    step = _check_int(raw_step, "step", MAX_STEP)
    checksum = _check_int(raw_checksum, "checksum", 2**64 - 1)
    base = None
    if raw_base is not None:
        base_step, base_checksum = _check_tuple(raw_base, 2)
        base = (
            _check_int(base_step, "base step", MAX_STEP),
            _check_int(base_checksum, "base checksum", 2**64 - 1),
        )
    entries: dict[str, TensorEntry] = {}
    num_left_bytes = max_bytes
    for _ in range(_check_int(num_tensors, "number of tensors", MAX_TENSORS)):
        entry = _check_entry(unpacker.unpack(), is_keyframe=base is None)
        num_left_bytes -= entry.num_bytes
        if num_left_bytes < 0:
            raise OversizedError(f"a frame's tensors are over the cap of {max_bytes} bytes")
        if entry.name in entries:
            raise MalformedError(f"a frame holds {entry.name!r} twice")
        entries[entry.name] = entry
    aliases: dict[str, str] = {}
    for _ in range(_check_int(num_aliases, "number of tied names", MAX_TENSORS)):
        name, target = (_check_name(part) for part in _check_tuple(unpacker.unpack(), 2))
        if name in entries or name in aliases:
            raise MalformedError(f"a frame holds {name!r} twice")
        if target not in entries:
            raise MalformedError(f"a frame ties {name!r} to {target!r}, which it does not hold")
        aliases[name] = target
    if unpacker.tell() != num_footer_bytes:
        raise MalformedError("a frame's footer is longer than it says")
    listed = tuple(entries.values())
    bundles = join_entries(listed, is_joining=version > 2 and base is not None)
    _check_pieces(bundles)
    return FrameHeader(step, base, checksum, listed, aliases, version, bundles)


def _check_entry(fields: object, *, is_keyframe: bool) -> TensorEntry:
    raw_name, dtype_text, wire_text, raw_shape, encoding, raw_pieces = _check_tuple(fields, 6)
    name = _check_name(raw_name)
    dtype, wire_dtype = _check_dtype(dtype_text), _check_dtype(wire_text)
    if wire_dtype != dtype and (dtype, wire_dtype) not in _NARROWINGS:
        raise MalformedError(f"a frame has {name!r} as {wire_dtype}, which is not how {dtype} travels")
    shape = tuple(_check_int(size, "size of a dimension", _MAX_ELEMENTS) for size in _check_tuple(raw_shape))
    if len(shape) > MAX_DIMS or math.prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:
        raise OversizedError(f"a frame's tensor {name!r} has too many dimensions or elements")
    if type(encoding) is not str or encoding not in (KEYFRAME_ENCODINGS if is_keyframe else DELTA_ENCODINGS):
        raise MalformedError(f"a frame has {name!r} in an encoding that this version does not know there")
    if encoding not in (EXACT, SAME) and wire_dtype not in CODABLE_DTYPES:
        raise MalformedError(f"a frame has {name!r} as codes, which {wire_dtype} cannot be")
    pieces = tuple(_check_int(size, "size of a piece", _MAX_PIECE_BYTES) for size in _check_tuple(raw_pieces))
    return TensorEntry(name, dtype, wire_dtype, shape, encoding, pieces)


def _check_pieces(bundles: Sequence[Bundle]) -> None:
    for bundle in bundles:
        whole = bundle.whole
        if len(whole.pieces) != whole.num_pieces or any(entry.pieces for entry in bundle.members[:-1]):
            raise MalformedError(
                f"a frame has {whole.name!r} in a number of pieces that does not fit its size"
            )


# What a refused value is like is not repeated: it can be nested deeper than `repr` goes.


def _check_tuple(value: object, length: int | None = None) -> tuple[object, ...]:
    if type(value) is not tuple or (length is not None and len(value) != length):
        raise MalformedError("a frame's footer holds something else where an array belongs")
    return value


def _check_int(value: object, what: str, highest: int) -> int:
    if type(value) is not int or not 0 <= value <= highest:
        raise MalformedError(f"a frame's {what} must be a whole number from 0 to {highest}")
    return value


def _check_name(value: object) -> str:
    if type(value) is not str or not 0 < len(value) <= MAX_NAME_CHARS:
        raise MalformedError(f"a frame's tensors need names of 1 to {MAX_NAME_CHARS} characters")
    return value


def _check_dtype(value: object) -> torch.dtype:
    dtype = _DTYPES.get(value) if type(value) is str else None
    if dtype is None:
        raise MalformedError("a frame names a dtype that cannot travel")
    return dtype
