"""A second decoder of frames, written from FORMAT.md: numpy, the two compressors and msgpack, nothing of the package.

It is short because it trusts what it reads. That it yields the same bits shows that the page says all there is to know.
"""

from __future__ import annotations

import math
import struct
from typing import NamedTuple

import blosc2
import msgpack
import numpy as np
from pcodec import standalone

BLOCK, SEGMENT, RAW_PIECE = 1024, 1 << 22, 8 << 20
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
    assert struct.unpack_from("<4sI", frame) == (b"P2PF", 2)
    num_footer_bytes, magic = struct.unpack_from("<I4s", frame, len(frame) - 8)
    assert magic == b"P2PF"
    unpacker = msgpack.Unpacker()
    unpacker.feed(frame[-8 - num_footer_bytes : -8])
    (step, named_base, checksum, num_tensors, num_aliases), *rest = unpacker
    entries, aliases = rest[:num_tensors], dict(rest[num_tensors:])
    assert len(aliases) == num_aliases
    if named_base is not None:
        assert base is not None and named_base == [base.step, base.checksum]
        assert (list(base.tensors), base.aliases) == ([entry[0] for entry in entries], aliases)
    tensors = {}
    offset = 8
    for name, dtype, wire_dtype, shape, encoding, sizes in entries:
        pieces = []
        for size in sizes:
            pieces.append(frame[offset : offset + size])
            offset += size
        held = base.tensors[name].data if named_base is not None else b""
        data = decode_tensor(encoding, wire_dtype, math.prod(shape), pieces, held)
        assert len(data) == math.prod(shape) * ITEM_BYTES[wire_dtype]
        tensors[name] = Raw(data, wire_dtype, dtype, tuple(shape))
    assert checksum == checksum_of([tensor.data for tensor in tensors.values()])
    return Plain(step, checksum, tensors, aliases)


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
