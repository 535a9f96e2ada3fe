"""The layout of a frame: what is written is read, and whatever else is claimed is refused before anything is allocated."""

from __future__ import annotations

import copy
import functools
import io
import struct
import zlib
from collections.abc import Callable
from typing import Any

import msgpack
import pytest
import torch
from fuzz_frames import Parts, join, split, wrap
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pcodistill.checkpoint.decoder import decode_frame
from p2pcodistill.checkpoint.encoder import FrameEncoder
from p2pcodistill.checkpoint.entries import EXACT, LOSSLESS, SAME
from p2pcodistill.checkpoint.frames import (
    DELTA,
    KEYFRAME,
    MAX_FOOTER_BYTES,
    FrameWriter,
    read_header,
    read_pieces,
)
from p2pcodistill.checkpoint.quantize import SEGMENT_ELEMENTS
from p2pcodistill.checkpoint.reference import Reference
from p2pcodistill.checkpoint.snapshot import Snapshot
from p2pcodistill.config import FramesConfig
from p2pcodistill.errors import MalformedError, OversizedError, RefusedError

MAX_BYTES = 1_000_000


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def snapshot_at(step: int) -> Snapshot:
    tensors = {
        "weights": randn(40, 30) + step * 0.001 * randn(40, 30, seed=step),
        "bias": randn(30, seed=step),
        "flags": torch.tensor([True, False, True]),
        "count": torch.tensor(step),
        "empty": torch.empty(0, 3),
    }
    return Snapshot(step, tensors, {"tied": "weights"}, frozenset({"flags", "count"}))


@functools.cache
def good_frames() -> tuple[bytes, bytes]:
    """A keyframe, and a delta frame for it."""
    encoder = FrameEncoder(FramesConfig(delta="8-bit"))
    sinks = io.BytesIO(), io.BytesIO()
    for step, sink in zip((50, 60), sinks, strict=True):
        encoder.encode(snapshot_at(step), sink)
    return sinks[0].getvalue(), sinks[1].getvalue()


def base() -> Reference:
    return decode_frame(good_frames()[0], None, max_bytes=MAX_BYTES)


# --- what is written is read -----------------------------------------------------------------------------------------


def test_pieces_and_everything_said_about_them_come_back() -> None:
    sink = io.BytesIO()
    writer = FrameWriter(sink)
    contents = [b"a" * 70, b"", b"bc"]
    writer.add_piece(contents[0])
    writer.end_tensor("größe", torch.float64, torch.float32, torch.Size([2, 3]), EXACT)
    writer.end_tensor("same", torch.int8, torch.int8, torch.Size([4]), SAME)
    writer.add_piece(contents[1])
    writer.add_piece(contents[2])
    long = torch.Size([SEGMENT_ELEMENTS + 1])
    writer.end_tensor("long", torch.float32, torch.bfloat16, long, LOSSLESS)
    writer.finish(2**63 - 1, (7, 2**64 - 1), 2**64 - 2, {"tied": "same"})
    frame = memoryview(sink.getvalue())
    assert writer.num_bytes == len(frame)
    header = read_header(frame, max_bytes=2**40)
    assert (header.kind, header.step, header.base, header.checksum) == (
        DELTA,
        2**63 - 1,
        (7, 2**64 - 1),
        2**64 - 2,
    )
    assert header.aliases == {"tied": "same"}
    read = [
        (bundle.whole.name, [bytes(piece) for piece in pieces])
        for bundle, pieces in read_pieces(frame, header)
    ]
    assert read == [("größe", contents[:1]), ("same", []), ("long", contents[1:])]
    entry = header.entries[0]
    assert (entry.dtype, entry.wire_dtype, entry.shape, entry.encoding) == (
        torch.float64,
        torch.float32,
        (2, 3),
        EXACT,
    )
    assert (entry.num_elements, entry.num_bytes, entry.num_wire_bytes) == (6, 24, 70)


def test_a_frame_of_nothing_is_32_bytes_or_less() -> None:
    sink = io.BytesIO()
    FrameWriter(sink).finish(0, None, 0, {})
    assert len(sink.getvalue()) <= 32
    header = read_header(memoryview(sink.getvalue()), max_bytes=0)
    assert (header.kind, header.entries, header.aliases) == (KEYFRAME, (), {})


@pytest.mark.parametrize(
    ("name", "dtype", "shape", "step", "aliases", "error"),
    [
        ("a", torch.float8_e8m0fnu, (3,), 1, {}, MalformedError),
        ("a", torch.float32, (3,), -1, {}, MalformedError),
        ("a", torch.float32, (3,), 2**63, {}, MalformedError),
        ("a", torch.float32, (3,), 1, {"b": "c"}, MalformedError),
        ("a", torch.float32, (3,), 1, {"a": "a"}, MalformedError),
        ("", torch.float32, (3,), 1, {}, MalformedError),
        ("x" * 513, torch.float32, (3,), 1, {}, MalformedError),
        ("a", torch.float32, (1,) * 40, 1, {}, OversizedError),
    ],
)
def test_what_no_reader_would_take_is_not_written(
    name: str,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    step: int,
    aliases: dict[str, str],
    error: type[RefusedError],
) -> None:
    writer = FrameWriter(io.BytesIO())
    writer.add_piece(b"piece")
    writer.end_tensor(name, dtype, dtype, torch.Size(shape), EXACT)
    with pytest.raises(error):
        writer.finish(step, None, 0, aliases)


# --- refusals --------------------------------------------------------------------------------------------------------


def edit(change: Callable[[Parts], object], *, frame: bytes | None = None) -> bytes:
    """The good keyframe, or another frame, with a change to its footer."""
    parts = split(good_frames()[0] if frame is None else frame)
    change(parts)
    return join(parts)


def set_first(index: int, value: Any) -> bytes:
    return edit(lambda parts: parts.first.__setitem__(index, value))


def set_entry(index: int, value: Any, *, frame: bytes | None = None) -> bytes:
    return edit(lambda parts: parts.entries[0].__setitem__(index, value), frame=frame)


def set_alias(index: int, value: Any) -> bytes:
    return edit(lambda parts: parts.aliases[0].__setitem__(index, value))


def replace_footer(footer: bytes) -> bytes:
    return wrap(b"", footer)


def recompress(change: Callable[[bytes], bytes]) -> bytes:
    """The good keyframe, with a change to its compressed footer."""
    footer = change(zlib.compress(PLAIN, 9))
    body = b"".join(piece for own in split(KEY).pieces for piece in own)
    return KEY[:8] + body + footer + struct.pack("<I4s", len(footer), b"P2PF")


def nest(depth: int) -> list[Any]:
    return functools.reduce(lambda inner, _: [inner], range(depth), [])


def claim(shape: list[int], num_pieces: int, *, num: int = 1, encoding: str = "exact") -> bytes:
    """A frame of `num` tensors, each of which claims that shape, in pieces of 32 bytes."""
    entries = [[str(i), "float32", "float16", shape, encoding, [32] * num_pieces] for i in range(num)]
    return join(Parts([1, None, 0, num, 0], entries, [], [[bytes(32)] * num_pieces] * num))


def test_the_tools_of_this_section_rebuild_the_good_frames() -> None:
    for frame in good_frames():
        assert edit(lambda parts: None, frame=frame) == frame
    assert decode_frame(good_frames()[1], base(), max_bytes=MAX_BYTES).step == 60


KEY, DEL = good_frames()
PLAIN = zlib.decompress(KEY[-8 - struct.unpack_from("<I", KEY, len(KEY) - 8)[0] : -8])
REFUSED = {
    "nothing": (b"", MalformedError),
    "too short": (KEY[:15], MalformedError),
    "other magic": (b"P2PG" + KEY[4:], MalformedError),
    "older version": (KEY[:4] + b"\1" + KEY[5:], MalformedError),
    "newer version": (KEY[:4] + b"\4" + KEY[5:], MalformedError),
    "version of plain footers": (KEY[:4] + b"\2" + KEY[5:], MalformedError),
    "footer is not compressed": (KEY[:8] + wrap(b"", b"\x95", 2)[8:], MalformedError),
    "footer is cut off": (recompress(lambda footer: footer[:-1]), MalformedError),
    "something behind the footer": (recompress(lambda footer: footer + b"\0"), MalformedError),
    "footer that decompresses to too much": (wrap(b"", bytes(MAX_FOOTER_BYTES + 1)), OversizedError),
    "cut off": (KEY[:-1], MalformedError),
    "cut in the middle": (KEY[: len(KEY) // 2], MalformedError),
    "more after the end": (KEY + b"\0", MalformedError),
    "huge footer": (KEY[:-8] + struct.pack("<I4s", MAX_FOOTER_BYTES + 1, b"P2PF"), OversizedError),
    "no footer": (KEY[:-8] + struct.pack("<I4s", 0, b"P2PF"), MalformedError),
    "footer longer than the frame": (KEY[:-8] + struct.pack("<I4s", len(KEY), b"P2PF"), MalformedError),
    "short body": (KEY[:8] + KEY[9:], MalformedError),
    "long body": (KEY[:8] + b"\0" + KEY[8:], MalformedError),
    "more footer": (edit(lambda parts: parts.aliases.append(["x", "bias"])), MalformedError),
    "footer is a map": (replace_footer(b"\x80"), MalformedError),
    "footer claims a huge array": (replace_footer(b"\xdd\xff\xff\xff\xff"), MalformedError),
    "footer claims a huge text": (replace_footer(b"\x95\xdb\xff\xff\xff\xff"), MalformedError),
    "footer holds an extension": (replace_footer(b"\x95\xd6\xff\0\0\0\0"), MalformedError),
    "deep footer": (replace_footer(b"\x91" * 5000), MalformedError),
    "first is short": (edit(lambda parts: parts.first.pop()), MalformedError),
    "negative step": (set_first(0, -1), MalformedError),
    "step beyond its range": (set_first(0, 2**63), MalformedError),
    "step is a flag": (set_first(0, True), MalformedError),
    "base is a number": (set_first(1, 3), MalformedError),
    "base is short": (set_first(1, [3]), MalformedError),
    "base's step is negative": (set_first(1, [-3, 0]), MalformedError),
    "base's checksum is text": (set_first(1, [3, "0"]), MalformedError),
    "nested base": (set_first(1, nest(400)), MalformedError),
    "checksum is text": (set_first(2, "0"), MalformedError),
    "checksum is negative": (set_first(2, -1), MalformedError),
    "too many tensors": (set_first(3, 2**32), MalformedError),
    "more tensors than there are": (set_first(3, 7), MalformedError),
    "fewer tensors than there are": (set_first(3, 4), MalformedError),
    "too many tied names": (set_first(4, 2), MalformedError),
    "name is bytes": (set_entry(0, b"weights"), MalformedError),
    "name is empty": (set_entry(0, ""), MalformedError),
    "name is long": (set_entry(0, "x" * 513), MalformedError),
    "name is not UTF-8": (replace_footer(PLAIN.replace(b"weights", b"weight\xff", 1)), MalformedError),
    "name twice": (set_entry(0, "bias"), MalformedError),
    "nested name": (set_entry(0, nest(400)), MalformedError),
    "dtype unknown": (set_entry(1, "float128"), MalformedError),
    "dtype is a number": (set_entry(1, 1), MalformedError),
    "dtype nested": (set_entry(1, nest(400)), MalformedError),
    "wire dtype not allowed": (set_entry(2, "int16"), MalformedError),
    "wire dtype widened": (set_entry(1, "bfloat16"), MalformedError),
    "shape is a number": (set_entry(3, 1200), MalformedError),
    "shape is negative": (set_entry(3, [-40, -30]), MalformedError),
    "shape is fractional": (set_entry(3, [40.0, 30.0]), MalformedError),
    "shape of too many dimensions": (set_entry(3, [40, 30] + [1] * 40), OversizedError),
    "shape that overflows": (set_entry(3, [2**40, 2**40, 0]), OversizedError),
    "shape of more pieces": (set_entry(3, [40, 2**18]), OversizedError),
    "encoding unknown": (set_entry(4, "2-bit"), MalformedError),
    "encoding is a number": (set_entry(4, 1), MalformedError),
    "encoding nested": (set_entry(4, nest(400)), MalformedError),
    **{
        f"{encoding} in a keyframe": (set_entry(4, encoding), MalformedError)
        for encoding in ("same", "lossless", "ternary", "3-bit", "4-bit", "8-bit")
    },
    "int8 in a delta frame": (set_entry(4, "int8", frame=DEL), MalformedError),
    "codes of double precision": (
        edit(lambda parts: parts.entries[0].__setitem__(slice(1, 3), ["float64"] * 2), frame=DEL),
        MalformedError,
    ),
    "codes of whole numbers": (
        edit(lambda parts: parts.entries[0].__setitem__(slice(1, 3), ["int16"] * 2), frame=DEL),
        MalformedError,
    ),
    "no pieces": (set_entry(5, []), MalformedError),
    "more pieces": (edit(lambda parts: parts.entries[0][5].append(32)), MalformedError),
    "pieces of what is the same": (set_entry(4, "same", frame=DEL), MalformedError),
    "huge piece": (set_entry(5, [2**62]), MalformedError),
    "negative piece": (set_entry(5, [-1]), MalformedError),
    "nested piece": (set_entry(5, nest(400)), MalformedError),
    "too many pieces": (set_entry(5, [0] * 40_000), MalformedError),
    "entry is short": (edit(lambda parts: parts.entries[0].pop()), MalformedError),
    "tied to nothing": (set_alias(1, "x"), MalformedError),
    "tied to a tied name": (set_alias(1, "tied"), MalformedError),
    "tied name hides a tensor": (set_alias(0, "bias"), MalformedError),
    "tied name is empty": (set_alias(0, ""), MalformedError),
    "tied name is short": (edit(lambda parts: parts.aliases[0].pop()), MalformedError),
    "bomb": (claim([2**32], 1024), OversizedError),
    "bomb of many": (claim([300_000], 1, num=2), OversizedError),
    "bomb of the largest number of elements": (claim([2**48], 1), OversizedError),
    "bomb of codes": (claim([2**22], 2, encoding="int8"), OversizedError),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_frame_that_is_wrong_is_refused_before_anything_is_allocated_for_it(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, error = REFUSED[case]
    held = base()
    monkeypatch.setattr(torch, "empty", lambda *_, **__: pytest.fail("it was allocated"))
    with pytest.raises(error) as refused:
        decode_frame(data, held, max_bytes=MAX_BYTES)
    assert type(refused.value) is error


def test_the_cap_counts_what_is_decoded() -> None:
    num_bytes = 40 * 30 * 2 + 30 * 4 + 3 + 8
    assert decode_frame(good_frames()[0], None, max_bytes=num_bytes).num_bytes == num_bytes
    for frame in good_frames():
        with pytest.raises(OversizedError):
            decode_frame(frame, base(), max_bytes=num_bytes - 1)


def decode_or_refuse(data: bytes, held: Reference | None) -> Reference | None:
    """None when refused. Anything else that the decoder raises fails the test."""
    try:
        return decode_frame(data, held, max_bytes=MAX_BYTES)
    except RefusedError:
        return None


plain_values = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5) | st.floats()
)
values = st.recursive(plain_values, lambda inner: st.lists(inner, max_size=4), max_leaves=8)


@settings(max_examples=300)
@given(st.data())
def test_a_footer_with_any_other_values_is_refused_or_leads_to_what_it_says(data: st.DataObject) -> None:
    """Long runs with more kinds of mutations: `make fuzz`."""
    parts = copy.deepcopy(split(data.draw(st.sampled_from(good_frames()))))
    places = [parts.first, *parts.entries, *parts.aliases, parts.entries[0][3], parts.entries[0][5]]
    part: list[Any] = data.draw(st.sampled_from(places))
    part[data.draw(st.integers(0, len(part) - 1))] = data.draw(values)
    decoded = decode_or_refuse(join(parts), base())
    if decoded is not None:
        assert decoded.checksum == parts.first[2] and decoded.step == parts.first[0]


@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda raw: wrap(b"", raw)))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    assert decode_or_refuse(data, base()) is None


def test_a_footer_is_read_value_by_value() -> None:
    """msgpack allocates what an array claims before it sees it: no value of a footer may be a large array of arrays."""
    rows = [[str(i), "bool", "bool", [0], "exact", []] for i in range(1000)]
    frame = wrap(b"", msgpack.packb([1, None, 0, 1000, 0]) + b"".join(map(msgpack.packb, rows)))
    assert len(decode_frame(frame, None, max_bytes=0).tensors) == 1000
    packed_at_once = wrap(b"", msgpack.packb([[1, None, 0, 1000, 0], *rows]))
    assert decode_or_refuse(packed_at_once, None) is None
