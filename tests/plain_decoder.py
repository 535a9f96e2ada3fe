"""A second decoder of frames, written from FORMAT.md: numpy, the two compressors and msgpack, nothing of the package.

It is short because it trusts what it reads. That it yields the same bits shows that the page says all there is to know.
"""

from __future__ import annotations

import math
import struct
import zlib
from typing import NamedTuple

import blosc2
import msgpack
import numpy as np
from pcodec import standalone

BLOCK, SEGMENT = 1024, 1 << 22
SMALL, FULL = 1 << 18, 1 << 20
MIX = 0x9E3779B97F4A7C15
LEVELS_AND_DIGITS = {"ternary": (1, 4), "3-bit": (3, 2), "4-bit": (7, 2), "8-bit": (127, 1)}
LARGEST = {"float16": 65504.0, "bfloat16": (2 - 2**-7) * 2.0**127, "float32": (2 - 2**-23) * 2.0**127}
ITEM_BYTES = {
    "bool": 1, "uint8": 1, "int8": 1, "uint16": 2, "int16": 2, "uint32": 4, "int32": 4, "uint64": 8, "int64": 8,
    "float8_e4m3fn": 1, "float8_e4m3fnuz": 1, "float8_e5m2": 1, "float8_e5m2fnuz": 1,
    "float16": 2, "bfloat16": 2, "float32": 4, "float64": 8, "complex64": 8, "complex128": 16,
}  # fmt: skip


class Raw(NamedTuple):
    """A tensor by its bytes (little-endian), dtype on the wire, dtype at the origin, and shape."""

    data: bytes
    wire_dtype: str
    dtype: str
    shape: tuple[int, ...]


class Plain(NamedTuple):
    """A decoded frame."""

    step: int
    checksum: int
    tensors: dict[str, Raw]
    aliases: dict[str, str]


def decode(frame: bytes, base: Plain | None) -> Plain:
    magic, version = struct.unpack_from("<4sI", frame)
    assert magic == b"P2PF" and version in (2, 3)
    num_footer_bytes, magic = struct.unpack_from("<I4s", frame, len(frame) - 8)
    assert magic == b"P2PF"
    unpacker = msgpack.Unpacker()
    footer = frame[-8 - num_footer_bytes : -8]
    unpacker.feed(footer if version == 2 else zlib.decompress(footer))
    (step, named_base, checksum, num_tensors, num_aliases), *rest = unpacker
    entries, aliases = rest[:num_tensors], dict(rest[num_tensors:])
    assert len(aliases) == num_aliases
    if named_base is not None:
        assert base is not None and named_base == [base.step, base.checksum]
        assert (list(base.tensors), base.aliases) == ([entry[0] for entry in entries], aliases)
    contents: dict[str, bytes] = {}
    offset = 8
    is_joining = version > 2 and named_base is not None
    for members in join(entries) if is_joining else [[entry] for entry in entries]:
        pieces = []
        for size in members[-1][5]:
            pieces.append(frame[offset : offset + size])
            offset += size
        encoding, wire_dtype = members[0][4], members[0][2]
        lengths = [math.prod(entry[3]) * ITEM_BYTES[wire_dtype] for entry in members]
        held = [base.tensors[entry[0]].data for entry in members] if named_base is not None else []
        if len(members) > 1 and encoding in LEVELS_AND_DIGITS:
            row = BLOCK * ITEM_BYTES[wire_dtype]
            held = [data + bytes(-len(data) % row) for data in held]
            whole_length = sum(map(len, held))
        else:
            row, whole_length = 1, sum(lengths)
        data = decode_tensor(
            encoding, wire_dtype, whole_length // ITEM_BYTES[wire_dtype], pieces, b"".join(held)
        )
        assert len(data) == whole_length
        start = 0
        for entry, length in zip(members, lengths, strict=True):
            contents[entry[0]] = data[start : start + length]
            start += -(-length // row) * row
    tensors = {entry[0]: Raw(contents[entry[0]], entry[2], entry[1], tuple(entry[3])) for entry in entries}
    assert checksum == checksum_of([tensor.data for tensor in tensors.values()])
    return Plain(step, checksum, tensors, aliases)


def join(entries: list[list]) -> list[list[list]]:
    """The entries of a delta frame by the pieces that they share, in the order of the last of each."""
    bundles: list[list[int]] = []
    joining: dict[tuple[str, str], list[int]] = {}
    sizes: dict[tuple[str, str], int] = {}
    for index, (_, _, wire_dtype, shape, encoding, _) in enumerate(entries):
        size = math.prod(shape) * (ITEM_BYTES[wire_dtype] if encoding == "exact" else 1)
        if encoding in LEVELS_AND_DIGITS:
            size += -size % BLOCK
        if encoding == "same" or not 0 < size < SMALL:
            bundles.append([index])
            continue
        kind = encoding, wire_dtype
        joining.setdefault(kind, []).append(index)
        sizes[kind] = sizes.get(kind, 0) + size
        if sizes[kind] >= FULL:
            bundles.append(joining.pop(kind))
            del sizes[kind]
    bundles = sorted([*bundles, *joining.values()], key=lambda bundle: bundle[-1])
    return [[entries[index] for index in bundle] for bundle in bundles]


def decode_tensor(
    encoding: str, wire_dtype: str, num_elements: int, pieces: list[bytes], held: bytes
) -> bytes:
    if encoding == "same":
        return held
    if encoding == "exact":
        return b"".join(blosc2.decompress2(piece) for piece in pieces)
    segments = [(start, min(SEGMENT, num_elements - start)) for start in range(0, num_elements, SEGMENT)]
    per_segment = {"int8": 2, "lossless": 1}.get(encoding, 3)
    parts = []
    for index, (start, length) in enumerate(segments):
        own = pieces[per_segment * index : per_segment * (index + 1)]
        item = ITEM_BYTES[wire_dtype]
        before = held[start * item : (start + length) * item]
        if encoding == "lossless":
            parts.append(move_by_ordinals(own[0], before, wire_dtype))
            continue
        scales = np.repeat(from_bf16(symbols_of(own[0])), BLOCK)[:length]
        if encoding == "int8":
            codes = np.frombuffer(blosc2.decompress2(own[1]), np.int8).astype(np.float32)
            parts.append(narrow(codes * scales, wire_dtype))
        else:
            codes = codes_of(own[1], own[2], encoding)[:length]
            parts.append(narrow(widen(before, wire_dtype) + codes * scales, wire_dtype))
    return b"".join(parts)


def symbols_of(piece: bytes) -> np.ndarray:
    symbols = standalone.simple_decompress(piece)
    return np.zeros(0, np.uint8) if symbols is None else symbols


def codes_of(mask_piece: bytes, others_piece: bytes, encoding: str) -> np.ndarray:
    num_levels, num_digits = LEVELS_AND_DIGITS[encoding]
    num_codes = 2 * num_levels + 1
    is_other = np.unpackbits(symbols_of(mask_piece), bitorder="little").astype(bool)
    symbols = np.full(len(is_other), (num_codes**num_digits - 1) // 2, np.uint8)
    symbols[is_other] = symbols_of(others_piece)
    digits = [np.arange(num_codes**num_digits) // num_codes**place % num_codes for place in range(num_digits)]
    codes_of_symbol = (np.stack(digits, axis=1) - num_levels).astype(np.float32)
    return codes_of_symbol[symbols].reshape(-1)


def move_by_ordinals(piece: bytes, before: bytes, wire_dtype: str) -> bytes:
    num_bits = 8 * ITEM_BYTES[wire_dtype]
    sign, modulus = 1 << (num_bits - 1), 1 << num_bits
    unsigned = np.uint16 if num_bits == 16 else np.uint32
    bits = np.frombuffer(before, unsigned).astype(np.int64)
    # A number's ordinal: its bits, if it is positive; of a negative one, -1 less the bits below the sign.
    ordinals = np.where(bits & sign, -1 - (bits & (sign - 1)), bits)
    zigzag = symbols_of(piece).astype(np.int64)
    moved = ordinals + np.where(zigzag & 1, -(zigzag >> 1) - 1, zigzag >> 1)
    moved = (moved + sign) % modulus - sign
    return np.where(moved < 0, sign | (-1 - moved), moved).astype(unsigned).tobytes()


def widen(data: bytes, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":
        return from_bf16(np.frombuffer(data, np.uint16))
    return np.frombuffer(data, dtype).astype(np.float32)


def narrow(numbers: np.ndarray, dtype: str) -> bytes:
    assert numbers.dtype == np.float32
    clamped = np.clip(numbers, np.float32(-LARGEST[dtype]), np.float32(LARGEST[dtype]))
    if dtype == "bfloat16":
        bits = clamped.view(np.uint32)
        return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16).tobytes()
    return clamped.astype(dtype).tobytes()


def from_bf16(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32)


def checksum_of(contents: list[bytes]) -> int:
    checksum = 0
    for content in contents:
        words = np.frombuffer(content + bytes(-len(content) % BLOCK), np.int64).reshape(-1, 128)
        mixed = (words + (words >> 32)).view(np.uint64)  # what overflows is gone, here and below: modulo 2^64
        total = weighted(mixed.sum(axis=1)) + MIX * weighted(mixed.sum(axis=0))
        checksum = (checksum * MIX + total) % 2**64
    return checksum


def weighted(sums: np.ndarray) -> int:
    return int((sums * np.arange(1, 2 * len(sums), 2, dtype=np.uint64)).sum())
