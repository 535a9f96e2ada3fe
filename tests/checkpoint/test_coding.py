"""The entropy coders: what comes out is what went in, in as many bytes as it should take, and nothing strange goes in."""

from __future__ import annotations

import math
from typing import Any

import blosc2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pcodec import ChunkConfig, DeltaSpec, standalone

from p2pcodistill.checkpoint.coding import (
    BLOCK_BYTES,
    MAX_OVERHEAD_BYTES,
    MAX_RAW_BYTES,
    MAX_SYMBOLS,
    compress_raw,
    compress_symbols,
    count_others,
    decompress_raw,
    decompress_symbols,
    join_zeros,
    split_zeros,
)
from p2pcodistill.errors import MalformedError

RNG = np.random.default_rng(0)


def random_bytes(length: int) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(length).integers(0, 256, length, dtype=np.uint8)


# --- raw bytes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("itemsize", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("length", [16, 48, 1024, 3 * BLOCK_BYTES + 16])
@pytest.mark.parametrize("kind", ["noise", "zeros", "ones", "slope"])
def test_raw_bytes_come_back(kind: str, length: int, itemsize: int) -> None:
    raw = {
        "noise": random_bytes(length),
        "zeros": np.zeros(length, np.uint8),
        "ones": np.ones(length, np.uint8),
        "slope": np.arange(length // 4, dtype=np.uint32).view(np.uint8),
    }[kind]
    piece = compress_raw(raw, itemsize)
    assert piece == compress_raw(raw, itemsize), "the same bytes every time"
    assert len(piece) <= length + MAX_OVERHEAD_BYTES
    if kind == "zeros" and length >= 1024:
        assert len(piece) == 32
    into = np.full(length, 7, np.uint8)
    decompress_raw(memoryview(piece), into, itemsize)
    assert np.array_equal(into, raw)


def test_noise_of_the_largest_size_fits_the_cap_of_a_piece() -> None:
    assert len(compress_raw(random_bytes(MAX_RAW_BYTES), 2)) <= MAX_RAW_BYTES + MAX_OVERHEAD_BYTES
    noise = random_bytes(4 * MAX_SYMBOLS).view(np.uint32)
    assert len(compress_symbols(noise)) <= noise.nbytes + MAX_OVERHEAD_BYTES


# Byte offsets within a Blosc2 chunk, and values that this package never writes there.
CHUNK_EDITS = {
    "flags: delta filter": (2, 0x8D),
    "flags: short header": (2, 0x80),
    "flags: bit shuffle, short header": (2, 0x84),
    "flags: other codec": (2, 0x25),
    "flags: codec of its own": (2, 0xC5),
    "typesize": (3, 1),
    "typesize of zero": (3, 0),
    "raw size": (4, 0xFF),
    "raw size, negative": (7, 0xFF),
    "raw size, huge": (7, 0x7F),
    "block size": (11, 0x7F),
    "block size, negative": (11, 0x80),
    "compressed size": (12, 0xFF),
    "filter: bit shuffle": (16, 2),
    "filter: delta": (17, 3),
    "filter: loaded from disk": (18, 160),
    "codec meta": (23, 1),
    "filter meta": (24, 1),
    "more flags: blocks of variable length": (30, 1),
    "kind: dictionary": (31, 0x01),
    "kind: lazy": (31, 0x08),
    "kind: NaN": (31, 0x20),
    "kind: repeated value": (31, 0x30),
    "kind: uninitialised": (31, 0x40),
    "kind: instrumented": (31, 0x80),
}


@pytest.mark.parametrize("case", CHUNK_EDITS)
def test_blosc2_never_sees_a_chunk_that_was_not_made_here(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    offset, value = CHUNK_EDITS[case]
    raw = np.arange(4000, dtype=np.uint16).view(np.uint8)
    piece = bytearray(compress_raw(raw, 2))
    assert piece[offset] != value
    piece[offset] = value
    monkeypatch.setattr(blosc2, "decompress2", lambda *_, **__: pytest.fail("it was called"))
    with pytest.raises(MalformedError, match="Blosc2 chunk"):
        decompress_raw(memoryview(piece), raw.copy(), 2)


def test_chunks_that_are_too_short_or_do_not_decompress_are_refused() -> None:
    raw = np.arange(4000, dtype=np.uint16).view(np.uint8)
    piece = compress_raw(raw, 2)
    with pytest.raises(MalformedError, match="too short"):
        decompress_raw(memoryview(piece)[:31], raw.copy(), 2)
    with pytest.raises(MalformedError, match="does not decompress"):
        decompress_raw(memoryview(piece[:32] + b"\xff" * (len(piece) - 32)), raw.copy(), 2)


# --- symbols ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
@pytest.mark.parametrize("length", [0, 1, 255, 256, 257, 300_000])
def test_symbols_come_back(length: int, dtype: type[np.unsignedinteger[Any]]) -> None:
    for symbols in (
        RNG.integers(0, np.iinfo(dtype).max, length, dtype, endpoint=True),
        np.ones(length, dtype),
    ):
        into = np.full(length, 7, dtype)
        decompress_symbols(memoryview(compress_symbols(symbols)), into)
        assert np.array_equal(into, symbols)


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
def test_symbols_take_about_their_entropy(share: float) -> None:
    """Also far below a bit each."""
    num = 1 << 20
    symbols = np.where(RNG.random(num) < share, RNG.integers(0, 80, num), 40).astype(np.uint8)
    counts = np.bincount(symbols)
    shares = counts[counts > 0] / num
    entropy_bytes = -num * float((shares * np.log2(shares)).sum()) / 8
    mask, others = split_zeros(symbols, 40)
    assert len(compress_symbols(mask)) + len(compress_symbols(others)) < 1.05 * entropy_bytes + 300


def test_other_numbers_of_symbols_are_refused() -> None:
    piece = memoryview(compress_symbols(RNG.integers(0, 9, 1000, np.uint8)))
    for length in (0, 1, 256, 999, 1001, 2000):
        with pytest.raises(MalformedError):
            decompress_symbols(piece, np.empty(length, np.uint8))


def test_symbols_of_another_type_and_torn_ones_are_refused() -> None:
    symbols = RNG.integers(0, 200, 1000, np.uint16)
    piece = compress_symbols(symbols)
    for other in (np.uint8, np.uint32, np.int16, np.float16):
        with pytest.raises(MalformedError):
            decompress_symbols(memoryview(piece), np.empty(1000, other))
    for length in (0, 1, 4, 12, 40, len(piece) - 1):
        with pytest.raises(MalformedError):
            decompress_symbols(memoryview(piece[:length]), np.empty(1000, np.uint16))
    with pytest.raises(MalformedError):
        decompress_symbols(memoryview(b"not" + piece), np.empty(1000, np.uint16))


def test_a_bomb_is_not_unpacked_beyond_what_is_asked_for() -> None:
    bomb = compress_symbols(np.zeros(MAX_SYMBOLS, np.uint32))
    assert len(bomb) < 1000
    guarded = np.full(1 << 16, 7, np.uint32)
    with pytest.raises(MalformedError):
        decompress_symbols(memoryview(bomb), guarded[: 1 << 15])
    assert (guarded[1 << 15 :] == 7).all()


def test_a_window_that_claims_gigabytes_is_refused() -> None:
    """Pcodec's lookback names its window by a logarithm of five bits."""
    config = ChunkConfig(delta_spec=DeltaSpec.try_lookback())
    numbers = np.tile(RNG.integers(0, 60_000, 500, np.uint16), 20)
    piece = bytearray(standalone.simple_compress(numbers, config))
    offset = piece.index(b"\x07\x0f\x27\x00\x20") + 5  # uint16, 10,000 numbers, classic mode with lookback
    piece[offset] |= 0x1F
    with pytest.raises(MalformedError):
        decompress_symbols(memoryview(piece), np.empty(10_000, np.uint16))


# --- zeros apart -----------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 80), max_size=40), st.integers(0, 80))
def test_zeros_are_told_apart_and_joined(numbers: list[int], zero: int) -> None:
    symbols = np.array(numbers + [zero] * (-len(numbers) % 8), np.uint8)
    mask, others = split_zeros(symbols, zero)
    assert len(mask) == math.ceil(len(symbols) / 8)
    assert count_others(mask) == len(others) == int((symbols != zero).sum())
    into = np.full_like(symbols, 255)
    join_zeros(mask, others, zero, into)
    assert np.array_equal(into, symbols)
