"""Snapshots to frames of bytes and back: keyframes, which stand on their own.

What travels how: parameters of floating point go as fp16; buffers, integers, booleans, complex numbers, what is
16 bits or less anyway, and tensors of at most one dimension and SMALL_ELEMENTS elements (biases, norms) go exactly as
they are. A parameter that fp16 cannot hold (beyond 65504) goes as fp32, and one that fp32 cannot hold as it is. The
decoded tensors, as they travelled, are the *reference*: what every receiver has of this step, bit for bit.

Format (all integers little-endian; everything else in the header is msgpack):

    "P2PF"  u32 format version  u32 header length  header  body

The header is a sequence of arrays, without gaps:

    [kind, step, num_tensors, num_aliases, checksum]
    [name, dtype, wire dtype, shape, raw bytes, [compressed bytes of each piece]]     num_tensors times
    [tied name, name that travels]                                                    num_aliases times

The body is the compressed pieces, in that order, without gaps: each tensor's bytes in the wire dtype, cut every
PIECE_BYTES, each piece a Blosc2 chunk (byte shuffle, zstd). `checksum` is `checksum_tensors` of the reference.

Decoding trusts nothing: sizes are capped and must add up before anything of that size is allocated, and a Blosc2 chunk
must say that it is one of the kind written here before Blosc2 sees it (a chunk's header can name other codecs and
filters, even ones that Blosc2 would look for on disk and load).
"""

from __future__ import annotations

import itertools
import math
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import blosc2
import msgpack
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pcodistill.checkpoint.snapshot import Snapshot, dtype_name, hash_schema
from p2pcodistill.errors import ChecksumError, MalformedError, NonFiniteError, OversizedError

MAGIC = b"P2PF"
FORMAT_VERSION = 1
KEYFRAME = "keyframe"
CODEC = "fp16+blosc2"
"""What a manifest says of such a frame."""

SMALL_ELEMENTS = 4096
PIECE_BYTES = 64 * 1024**2
BLOCK_BYTES = 256 * 1024
"""Of a Blosc2 block; fixed, since the default follows the cache sizes of the machine that encodes."""

MAX_HEADER_BYTES = 8 * 1024**2
MAX_TENSORS = 65_536
MAX_NAME_CHARS = 512
MAX_DIMS = 32
MAX_STEP = 2**63 - 1
_MAX_PIECES = 1024  # of one tensor: 64 GiB
_MAX_CHUNK_BYTES = PIECE_BYTES + blosc2.MAX_OVERHEAD
_MAX_ELEMENTS = 2**48  # with empty dimensions counted as 1: strides must fit an int64

_PREFIX = struct.Struct("<4sII")
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
    (torch.float64, torch.float16),
    (torch.float64, torch.float32),
}
_MAX_FP16 = torch.finfo(torch.float16).max
_MAX_FP32 = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class DecodedFrame:
    """A checkpoint as it arrived.

    `tensors` are CPU tensors as they travelled (fp16, fp32, ...: cast them to the model's), `aliases` maps the name of a
    tied tensor to the one in `tensors` that holds its values, `schema_hash` is that of the origin's snapshot.
    """

    step: int
    kind: str
    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    schema_hash: bytes


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of a header; checked."""

    name: str
    dtype: torch.dtype
    wire_dtype: torch.dtype
    shape: tuple[int, ...]
    num_bytes: int
    pieces: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Header:
    kind: str
    step: int
    checksum: int
    entries: tuple[_Entry, ...]
    aliases: dict[str, str]


# --- encoding --------------------------------------------------------------------------------------------------------


def encode_keyframe(snapshot: Snapshot) -> bytes:
    """The frame of `snapshot`.

    Raises NonFiniteError, naming the tensor, when a value is NaN or infinite; MalformedError or OversizedError when the
    snapshot is outside of what a frame can hold (dtypes, number and names of tensors).
    """
    body: list[bytes] = []
    entries = []
    checksum = 0
    for name, tensor in snapshot.tensors.items():
        wire = tensor.to(_choose_wire_dtype(name, tensor, is_buffer=name in snapshot.buffers))
        checksum = _extend_checksum(checksum, wire)
        raw = _raw_bytes(wire).numpy()
        pieces = [_compress(raw[start:stop], wire.dtype.itemsize) for start, stop in _cut(raw.nbytes)]
        body += pieces
        entries.append(
            (
                name,
                dtype_name(tensor.dtype),
                dtype_name(wire.dtype),
                tuple(tensor.shape),
                raw.nbytes,
                [len(piece) for piece in pieces],
            )
        )
    first = (KEYFRAME, snapshot.step, len(entries), len(snapshot.aliases), checksum)
    header = b"".join(msgpack.packb(part) for part in (first, *entries, *snapshot.aliases.items()))
    _parse_header(
        header, max_bytes=sum(entry[4] for entry in entries)
    )  # the decoder's caps bind the encoder, too
    return b"".join((_PREFIX.pack(MAGIC, FORMAT_VERSION, len(header)), header, *body))


def _choose_wire_dtype(name: str, tensor: Tensor, *, is_buffer: bool) -> torch.dtype:
    dtype = tensor.dtype
    largest = _largest_magnitude(name, tensor)
    is_small = tensor.ndim <= 1 and tensor.numel() <= SMALL_ELEMENTS
    if is_buffer or is_small or not dtype.is_floating_point or dtype.itemsize <= 2:
        return dtype
    if largest <= _MAX_FP16:
        return torch.float16
    return torch.float32 if largest <= _MAX_FP32 else dtype


def _compress(raw: NDArray[np.uint8], itemsize: int) -> bytes:
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


# --- decoding --------------------------------------------------------------------------------------------------------


def decode_frame(data: bytes | memoryview, *, max_bytes: int) -> DecodedFrame:
    """The inverse of `encode_keyframe`, for bytes from anywhere.

    `max_bytes` caps the decoded tensors together. Raises MalformedError, OversizedError, ChecksumError or NonFiniteError,
    and nothing else on account of `data`.
    """
    view = memoryview(data).cast("B")
    if len(view) < _PREFIX.size:
        raise MalformedError(f"a frame of {len(view)} bytes is too short")
    magic, version, num_header_bytes = _PREFIX.unpack_from(view)
    if magic != MAGIC:
        raise MalformedError("these bytes are not a frame")
    if version != FORMAT_VERSION:
        raise MalformedError(f"a frame has format version {version}; this version reads {FORMAT_VERSION}")
    if num_header_bytes > MAX_HEADER_BYTES:
        raise OversizedError(
            f"a frame's header of {num_header_bytes} bytes is over the cap of {MAX_HEADER_BYTES}"
        )
    body = view[_PREFIX.size + num_header_bytes :]
    header = _parse_header(bytes(view[_PREFIX.size : _PREFIX.size + num_header_bytes]), max_bytes=max_bytes)
    if len(body) != sum(itertools.chain.from_iterable(entry.pieces for entry in header.entries)):
        raise MalformedError("a frame's body is not as long as its header says")
    offset = 0
    tensors: dict[str, Tensor] = {}
    for entry in header.entries:
        num_entry_bytes = sum(entry.pieces)
        tensors[entry.name] = _decode_tensor(entry, body[offset : offset + num_entry_bytes])
        offset += num_entry_bytes
    if checksum_tensors(tensors.values()) != header.checksum:
        raise ChecksumError("a frame's tensors do not match its checksum")
    for name, tensor in tensors.items():
        _largest_magnitude(name, tensor)
    specs = ((entry.name, dtype_name(entry.dtype), entry.shape) for entry in header.entries)
    return DecodedFrame(header.step, header.kind, tensors, header.aliases, hash_schema(specs, header.aliases))


def _decode_tensor(entry: _Entry, compressed: memoryview) -> Tensor:
    tensor = torch.empty(entry.shape, dtype=entry.wire_dtype)
    raw = _raw_bytes(tensor).numpy()
    offset = 0
    for (start, stop), num_piece_bytes in zip(_cut(entry.num_bytes), entry.pieces, strict=True):
        piece = compressed[offset : offset + num_piece_bytes]
        offset += num_piece_bytes
        _check_chunk(piece, itemsize=entry.wire_dtype.itemsize, num_bytes=stop - start)
        blosc2.set_releasegil(True)
        try:
            blosc2.decompress2(piece, dst=raw[start:stop], nthreads=1)
        except (ValueError, RuntimeError):
            raise MalformedError(f"a frame's tensor {entry.name!r} does not decompress") from None
    if entry.wire_dtype == torch.bool and entry.num_bytes and raw.max() > 1:
        raise MalformedError(f"a frame's boolean tensor {entry.name!r} holds other values")
    return tensor


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


def _check_chunk(piece: memoryview, *, itemsize: int, num_bytes: int) -> None:
    """Raise MalformedError unless a Blosc2 chunk claims exactly these sizes, and nothing that `_compress` never makes.

    Byte for byte as in Blosc2's README_CHUNK_FORMAT.
    """
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


# --- the header ------------------------------------------------------------------------------------------------------


def _parse_header(raw: bytes, *, max_bytes: int) -> _Header:
    # One small array at a time: msgpack allocates what an array claims to hold before it has seen it.
    unpacker = msgpack.Unpacker(
        use_list=False,
        max_buffer_size=MAX_HEADER_BYTES,
        max_str_len=4 * MAX_NAME_CHARS,
        max_bin_len=0,
        max_array_len=_MAX_PIECES,
        max_map_len=0,
        max_ext_len=0,
    )
    try:
        unpacker.feed(raw)
        return _read_header(unpacker, len(raw), max_bytes)
    except (ValueError, msgpack.UnpackException) as error:
        raise MalformedError(
            f"a frame's header does not parse: {str(error) or type(error).__name__}"
        ) from None


def _read_header(unpacker: msgpack.Unpacker, num_header_bytes: int, max_bytes: int) -> _Header:
    kind, step, num_tensors, num_aliases, checksum = _check_tuple(unpacker.unpack(), 5)
    if kind != KEYFRAME:
        raise MalformedError("a frame is of a kind that this version does not know")
    step = _check_int(step, "step", MAX_STEP)
    checksum = _check_int(checksum, "checksum", 2**64 - 1)
    entries: dict[str, _Entry] = {}
    num_left_bytes = max_bytes
    for _ in range(_check_int(num_tensors, "number of tensors", MAX_TENSORS)):
        entry = _check_entry(unpacker.unpack())
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
    if unpacker.tell() != num_header_bytes:
        raise MalformedError("a frame's header is longer than it says")
    return _Header(KEYFRAME, step, checksum, tuple(entries.values()), aliases)


def _check_entry(fields: object) -> _Entry:
    raw_name, dtype_text, wire_text, raw_shape, raw_num_bytes, raw_pieces = _check_tuple(fields, 6)
    name = _check_name(raw_name)
    dtype, wire_dtype = _check_dtype(dtype_text), _check_dtype(wire_text)
    is_narrowed = (dtype, wire_dtype) in _NARROWINGS
    if wire_dtype != dtype and not is_narrowed:
        raise MalformedError(f"a frame has {name!r} as {wire_dtype}, which is not how {dtype} travels")
    shape = tuple(_check_int(size, "size of a dimension", _MAX_ELEMENTS) for size in _check_tuple(raw_shape))
    if len(shape) > MAX_DIMS or math.prod(max(size, 1) for size in shape) > _MAX_ELEMENTS:
        raise OversizedError(f"a frame's tensor {name!r} has too many dimensions or elements")
    num_bytes = math.prod(shape) * wire_dtype.itemsize
    if raw_num_bytes != num_bytes:
        raise MalformedError(f"a frame has another number of bytes for {name!r} than its shape gives")
    pieces = tuple(_check_int(size, "size of a piece", _MAX_CHUNK_BYTES) for size in _check_tuple(raw_pieces))
    if len(pieces) != -(-num_bytes // PIECE_BYTES) or any(size < _CHUNK_HEADER.size for size in pieces):
        raise MalformedError(f"a frame has {name!r} in pieces that do not fit its size")
    return _Entry(name, dtype, wire_dtype, shape, num_bytes, pieces)


# What a refused value is like is not repeated: it can be nested deeper than `repr` goes.


def _check_tuple(value: object, length: int | None = None) -> tuple[object, ...]:
    if type(value) is not tuple or (length is not None and len(value) != length):
        raise MalformedError("a frame's header holds something else where an array belongs")
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


# --- both ------------------------------------------------------------------------------------------------------------

_CHECKSUM_MIX = 0x9E3779B97F4A7C15
_CHECKSUM_BLOCK = 1 << 17  # words whose products stay in the cache


def checksum_tensors(tensors: Iterable[Tensor]) -> int:
    """A 64-bit checksum of the tensors' bytes, in order; against mishap, not malice (that is what signatures are for).

    With w_i the little-endian 64-bit words of a tensor, the last one filled up with zeros, and m_i = w_i ^ (w_i >> 32), so
    that the high bits count everywhere, too: s = sum (2i + 1) m_i, and over the tensors c = c * 0x9E3779B97F4A7C15 + s, all
    unsigned, modulo 2^64. Integers only, so it is the same on every device.
    """
    checksum = 0
    for tensor in tensors:
        checksum = _extend_checksum(checksum, tensor)
    return checksum


def _extend_checksum(checksum: int, tensor: Tensor) -> int:
    raw = _raw_bytes(tensor)
    if raw.storage_offset() % 8:  # a view into something larger
        raw = raw.clone()
    num_tail_bytes = raw.numel() % 8
    words = raw[: raw.numel() - num_tail_bytes].view(torch.int64)
    tail = int.from_bytes(raw[raw.numel() - num_tail_bytes :].tolist(), "little")
    total = (tail ^ tail >> 32) * (2 * words.numel() + 1)
    odd = torch.arange(1, 2 * min(words.numel(), _CHECKSUM_BLOCK) + 1, 2, device=raw.device)
    for start in range(0, words.numel(), _CHECKSUM_BLOCK):
        block = words[start : start + _CHECKSUM_BLOCK]
        mixed = block ^ (block >> 32 & 0xFFFFFFFF)
        total += int((mixed * odd[: mixed.numel()]).sum()) + 2 * start * int(mixed.sum())
    return (checksum * _CHECKSUM_MIX + total) % 2**64


def _raw_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, as a flat uint8 view."""
    return tensor.reshape(-1).view(torch.uint8)


def _cut(num_bytes: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of a tensor's pieces; none for an empty tensor."""
    return ((start, min(start + PIECE_BYTES, num_bytes)) for start in range(0, num_bytes, PIECE_BYTES))


def _largest_magnitude(name: str, tensor: Tensor) -> float:
    """The largest absolute value (0 for integers and empty tensors). Raises NonFiniteError if it is not finite."""
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    lowest, highest = (values.float() if values.dtype.itemsize == 1 else values).aminmax()
    largest = max(-float(lowest), float(highest))
    if not math.isfinite(largest) or math.isnan(float(lowest)):
        raise NonFiniteError(f"the tensor {name!r} holds NaN or infinite values")
    return largest
