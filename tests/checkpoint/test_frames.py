"""Keyframes: what travels exactly and what as fp16, and a decoder that refuses everything else."""

from __future__ import annotations

import functools
import mmap
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import blosc2
import msgpack
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from p2pcodistill.checkpoint import frames
from p2pcodistill.checkpoint.frames import (
    BLOCK_BYTES,
    MAX_HEADER_BYTES,
    SMALL_ELEMENTS,
    DecodedFrame,
    checksum_tensors,
    decode_frame,
    encode_keyframe,
)
from p2pcodistill.checkpoint.snapshot import Snapshot, take_snapshot
from p2pcodistill.errors import ChecksumError, MalformedError, NonFiniteError, OversizedError, RefusedError

MAX_BYTES = 1_000_000
PREFIX_BYTES = 12
EXACT_DTYPES = [
    torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128,
    torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8,
    torch.bool,
]  # fmt: skip


def make_snapshot(*, buffers: dict[str, Tensor] | None = None, **parameters: Tensor) -> Snapshot:
    buffers = buffers or {}
    return Snapshot(50, parameters | buffers, {}, frozenset(buffers))


def send(snapshot: Snapshot) -> DecodedFrame:
    return decode_frame(encode_keyframe(snapshot), max_bytes=MAX_BYTES)


def same_bits(left: Tensor, right: Tensor) -> bool:
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))
    )


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=dtype)


# --- what travels how ------------------------------------------------------------------------------------------------


def test_a_model_arrives_with_its_schema_ties_and_step() -> None:
    model = nn.Sequential(nn.Embedding(50, 16), nn.BatchNorm1d(16), nn.Linear(16, 50, bias=False))
    model[2].weight = model[0].weight
    snapshot = take_snapshot(model, step=123)
    frame = send(snapshot)
    assert (frame.step, frame.kind) == (123, "keyframe")
    assert frame.aliases == snapshot.aliases == {"2.weight": "0.weight"}
    assert frame.schema_hash == snapshot.schema_hash
    assert list(frame.tensors) == list(snapshot.tensors)
    assert same_bits(frame.tensors.pop("0.weight"), snapshot.tensors["0.weight"].half())
    assert all(same_bits(tensor, snapshot.tensors[name]) for name, tensor in frame.tensors.items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_travel_as_fp16_unless_small(dtype: torch.dtype) -> None:
    snapshot = make_snapshot(
        matrix=randn(2, 3, dtype=dtype),
        long=randn(SMALL_ELEMENTS + 1, dtype=dtype),
        small=randn(SMALL_ELEMENTS, dtype=dtype),
        scalar=torch.tensor(0.1, dtype=dtype),
    )
    tensors = send(snapshot).tensors
    for name in ("matrix", "long"):
        assert same_bits(tensors[name], snapshot.tensors[name].half())
    for name in ("small", "scalar"):
        assert same_bits(tensors[name], snapshot.tensors[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_buffers_travel_exactly(dtype: torch.dtype) -> None:
    buffers = {"matrix": randn(20, 30, dtype=dtype), "long": randn(SMALL_ELEMENTS + 1, dtype=dtype)}
    tensors = send(make_snapshot(buffers=buffers)).tensors
    assert all(same_bits(tensors[name], buffer) for name, buffer in buffers.items())


@pytest.mark.parametrize("dtype", EXACT_DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (3,), (7, 5), (0,), (3, 0, 2), (5000,)], ids=str)
def test_other_dtypes_of_any_shape_travel_exactly(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = (torch.rand(shape) * 2).to(dtype)
    frame = send(make_snapshot(tensor=tensor))
    assert same_bits(frame.tensors["tensor"], tensor)
    assert frame.schema_hash == make_snapshot(tensor=tensor).schema_hash


@pytest.mark.parametrize(
    ("value", "dtype", "wire_dtype"),
    [
        (65504.0, torch.float32, torch.float16),
        (-65504.1, torch.float32, torch.float32),
        (1e5, torch.float32, torch.float32),
        (1e5, torch.float64, torch.float32),
        (-1e300, torch.float64, torch.float64),
    ],
)
def test_what_fp16_cannot_hold_travels_wider(
    value: float, dtype: torch.dtype, wire_dtype: torch.dtype
) -> None:
    tensor = torch.full((3, 4), 0.5, dtype=dtype)
    tensor[1, 2] = value
    frame = send(make_snapshot(large=tensor, other=torch.ones(2, 2)))
    assert same_bits(frame.tensors["large"], tensor.to(wire_dtype))
    assert frame.tensors["other"].dtype == torch.float16


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize(
    "dtype",
    [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e5m2, torch.complex64],
    ids=str,
)
def test_values_that_are_not_finite_are_refused_by_name(value: float, dtype: torch.dtype) -> None:
    tensor = torch.ones(70)
    tensor[37] = value
    for snapshot in (
        make_snapshot(rotten=tensor.to(dtype)),
        make_snapshot(buffers={"rotten": tensor.to(dtype)}),
    ):
        with pytest.raises(NonFiniteError, match="rotten"):
            encode_keyframe(snapshot)


def test_values_that_are_not_finite_are_refused_on_arrival(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as careless:
        careless.setattr(frames, "_largest_magnitude", lambda name, tensor: 0.0)
        data = encode_keyframe(make_snapshot(fine=torch.ones(3), rotten=torch.tensor([[1.0, float("nan")]])))
    with pytest.raises(NonFiniteError, match="rotten"):
        decode_frame(data, max_bytes=MAX_BYTES)


def test_tensors_larger_than_a_piece_are_split_and_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "PIECE_BYTES", 1000)
    tensors = {"exact": torch.arange(1000, dtype=torch.int16), "rest": torch.arange(1001, dtype=torch.int8)}
    data = encode_keyframe(make_snapshot(**tensors))
    assert [len(entry[5]) for entry in read_header(data)[1]] == [2, 2]
    frame = decode_frame(data, max_bytes=MAX_BYTES)
    assert all(same_bits(frame.tensors[name], tensor) for name, tensor in tensors.items())


def test_a_snapshot_of_nothing_and_one_that_is_not_contiguous_travel() -> None:
    assert send(make_snapshot()).tensors == {}
    turned = randn(6, 4).t()
    assert same_bits(send(make_snapshot(turned=turned)).tensors["turned"], turned.half())


def test_encoding_is_deterministic_and_smaller_than_fp16() -> None:
    snapshot = make_snapshot(weights=randn(300, 300) * 0.05, zeros=torch.zeros(300, 300))
    data = encode_keyframe(snapshot)
    assert data == encode_keyframe(snapshot)
    assert len(data) < 0.95 * 300 * 300 * 2, "zeros cost nothing, weights less than fp16"
    assert snapshot.num_fp16_bytes == 2 * 300 * 300 * 2


def test_a_frame_decodes_from_a_read_only_map_which_can_be_closed_after(tmp_path: Path) -> None:
    snapshot = make_snapshot(weights=randn(300, 300))
    path = tmp_path / "frame"
    path.write_bytes(encode_keyframe(snapshot))
    with (
        path.open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
        memoryview(mapped) as view,
    ):
        tensors = decode_frame(view, max_bytes=MAX_BYTES).tensors
    assert same_bits(tensors["weights"], snapshot.tensors["weights"].half())


@pytest.mark.parametrize(
    ("snapshot", "error"),
    [
        (make_snapshot(exotic=torch.ones(3).to(torch.float8_e8m0fnu)), MalformedError),
        (Snapshot(-1, {}, {}), MalformedError),
        (Snapshot(1, {"a": torch.ones(1)}, {"b": "c"}), MalformedError),
        (Snapshot(1, {"": torch.ones(1)}, {}), MalformedError),
        (Snapshot(1, {"a": torch.ones((1,) * 40)}, {}), OversizedError),
    ],
)
def test_what_no_receiver_would_take_is_not_sent(snapshot: Snapshot, error: type[RefusedError]) -> None:
    with pytest.raises(error):
        encode_keyframe(snapshot)


# --- the checksum ----------------------------------------------------------------------------------------------------


def slow_checksum(*contents: bytes) -> int:
    checksum = 0
    for content in contents:
        padded = content + bytes(-len(content) % 8)
        words = struct.unpack(f"<{len(padded) // 8}Q", padded)
        checksum = checksum * 0x9E3779B97F4A7C15 + sum(
            (2 * i + 1) * (w ^ w >> 32) for i, w in enumerate(words)
        )
    return checksum % 2**64


@given(st.lists(st.binary(max_size=70), max_size=4))
def test_the_checksum_is_what_its_docstring_says(contents: list[bytes]) -> None:
    tensors = [torch.tensor(list(content), dtype=torch.uint8) for content in contents]
    assert checksum_tensors(tensors) == slow_checksum(*contents)


def test_the_checksum_of_large_tensors_and_of_views_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    content = torch.randint(0, 256, (10_007,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = slow_checksum(content.numpy().tobytes())
    assert checksum_tensors([content]) == expected
    assert checksum_tensors([torch.cat([torch.zeros(3, dtype=torch.uint8), content])[3:]]) == expected
    monkeypatch.setattr(frames, "_CHECKSUM_BLOCK", 7)
    assert checksum_tensors([content]) == expected


@given(st.data())
def test_the_checksum_notices_any_changed_word_and_swapped_tensors(data: st.DataObject) -> None:
    tensor = torch.arange(200, dtype=torch.int16)
    changed = tensor.clone()
    changed[data.draw(st.integers(0, 199))] ^= data.draw(st.integers(1, 2**15 - 1))
    assert checksum_tensors([changed]) != checksum_tensors([tensor])
    assert checksum_tensors([changed, tensor]) != checksum_tensors([tensor, changed])


# --- refusals --------------------------------------------------------------------------------------------------------


@functools.cache
def good_frame() -> bytes:
    snapshot = Snapshot(
        step=50,
        tensors={
            "weights": randn(40, 30),
            "bias": randn(30),
            "zeros": torch.zeros(8, 40),
            "flags": torch.tensor([True, False, True]),
            "count": torch.tensor(7),
            "empty": torch.empty(0, 3),
        },
        aliases={"tied": "weights"},
        buffers=frozenset({"flags", "count"}),
    )
    return encode_keyframe(snapshot)


def read_header(data: bytes) -> tuple[list[Any], list[list[Any]], list[list[Any]]]:
    (num_header_bytes,) = struct.unpack_from("<I", data, 8)
    unpacker = msgpack.Unpacker()
    unpacker.feed(data[PREFIX_BYTES : PREFIX_BYTES + num_header_bytes])
    first, *rest = unpacker
    return first, rest[: first[2]], rest[first[2] :]


def read_body(data: bytes) -> bytes:
    (num_header_bytes,) = struct.unpack_from("<I", data, 8)
    return data[PREFIX_BYTES + num_header_bytes :]


def join(first: Any, entries: list[Any], aliases: list[Any], body: bytes) -> bytes:
    header = b"".join(msgpack.packb(part) for part in (first, *entries, *aliases))
    return struct.pack("<4sII", b"P2PF", 1, len(header)) + header + body


Header = tuple[list[Any], list[list[Any]], list[list[Any]]]


def edit(change: Callable[..., None]) -> bytes:
    """The good frame with a change to its header."""
    header = read_header(good_frame())
    change(*header)
    return join(*header, read_body(good_frame()))


def set_first(index: int, value: Any) -> bytes:
    return edit(lambda first, entries, aliases: first.__setitem__(index, value))


def set_entry(index: int, value: Any) -> bytes:
    return edit(lambda first, entries, aliases: entries[0].__setitem__(index, value))


def nest(depth: int) -> list[Any]:
    return functools.reduce(lambda inner, _: [inner], range(depth), [])


def test_the_tools_of_this_section_rebuild_the_good_frame() -> None:
    assert edit(lambda *_: None) == good_frame()
    assert decode_frame(good_frame(), max_bytes=MAX_BYTES).step == 50


REFUSED = {
    "nothing": (b"", MalformedError),
    "too short": (b"P2PF\1\0\0\0\0\0\0", MalformedError),
    "other magic": (b"P2PG" + good_frame()[4:], MalformedError),
    "other version": (good_frame()[:4] + b"\2" + good_frame()[5:], MalformedError),
    "huge header": (struct.pack("<4sII", b"P2PF", 1, MAX_HEADER_BYTES + 1), OversizedError),
    "no header": (struct.pack("<4sII", b"P2PF", 1, 0), MalformedError),
    "header beyond the end": (good_frame()[:40], MalformedError),
    "short body": (good_frame()[:-1], MalformedError),
    "long body": (good_frame() + b"\0", MalformedError),
    "more header": (edit(lambda first, entries, aliases: aliases.append(["x", "bias"])), MalformedError),
    "header is a map": (struct.pack("<4sII", b"P2PF", 1, 1) + b"\x80", MalformedError),
    "header claims a huge array": (struct.pack("<4sII", b"P2PF", 1, 5) + b"\xdd\xff\xff\xff\xff", MalformedError),
    "deep header": (struct.pack("<4sII", b"P2PF", 1, 5000) + b"\x91" * 5000, MalformedError),
    "first is short": (edit(lambda first, entries, aliases: first.pop()), MalformedError),
    "kind": (set_first(0, "delta"), MalformedError),
    "nested kind": (set_first(0, nest(400)), MalformedError),
    "negative step": (set_first(1, -1), MalformedError),
    "step beyond its range": (set_first(1, 2**63), MalformedError),
    "step is a flag": (set_first(1, True), MalformedError),
    "too many tensors": (set_first(2, 2**32), MalformedError),
    "fewer tensors than it says": (set_first(2, 7), MalformedError),
    "too many aliases": (set_first(3, 2), MalformedError),
    "checksum is text": (set_first(4, "0"), MalformedError),
    "checksum is negative": (set_first(4, -1), MalformedError),
    "other checksum": (set_first(4, 1), ChecksumError),
    "name is bytes": (set_entry(0, b"weights"), MalformedError),
    "name is empty": (set_entry(0, ""), MalformedError),
    "name is long": (set_entry(0, "x" * 513), MalformedError),
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
    "shape of another size": (set_entry(3, [40, 31]), MalformedError),
    "other number of bytes": (set_entry(4, 2402), MalformedError),
    "nested number of bytes": (set_entry(4, nest(400)), MalformedError),
    "no pieces": (set_entry(5, []), MalformedError),
    "more pieces": (edit(lambda first, entries, aliases: entries[0][5].append(32)), MalformedError),
    "tiny piece": (set_entry(5, [31]), MalformedError),
    "huge piece": (set_entry(5, [2**62]), MalformedError),
    "other piece": (
        edit(lambda _, entries, __: (entries[0][5].__setitem__(0, 1000), entries[1][5].__setitem__(0, 1000))),
        MalformedError,
    ),
    "entry is short": (edit(lambda first, entries, aliases: entries[0].pop()), MalformedError),
    "alias of nothing": (edit(lambda first, entries, aliases: aliases[0].__setitem__(1, "x")), MalformedError),
    "alias of an alias": (edit(lambda first, entries, aliases: aliases[0].__setitem__(1, "tied")), MalformedError),
    "alias hides a tensor": (edit(lambda first, entries, aliases: aliases[0].__setitem__(0, "bias")), MalformedError),
    "alias is short": (edit(lambda first, entries, aliases: aliases[0].pop()), MalformedError),
    "bomb": (
        join(
            [b"keyframe".decode(), 1, 1, 0, 0],
            [["bomb", "uint8", "uint8", [2**35], 2**35, [32] * 512]],
            [],
            bytes(32 * 512),
        ),
        OversizedError,
    ),
    "bomb of many": (
        join(
            ["keyframe", 1, 2, 0, 0],
            [[name, "uint8", "uint8", [600_000], 600_000, [32]] for name in "ab"],
            [],
            bytes(64),
        ),
        OversizedError,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_frame_that_is_wrong_is_refused_before_anything_is_allocated_for_it(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, error = REFUSED[case]
    num_allocated_bytes = 0
    empty = torch.empty

    def count(shape: tuple[int, ...], *, dtype: torch.dtype) -> Tensor:
        nonlocal num_allocated_bytes
        tensor = empty(shape, dtype=dtype)
        num_allocated_bytes += tensor.nbytes
        return tensor

    monkeypatch.setattr(torch, "empty", count)
    with pytest.raises(error) as refused:
        decode_frame(data, max_bytes=MAX_BYTES)
    assert type(refused.value) is error
    assert num_allocated_bytes <= (MAX_BYTES if case in ("other checksum", "other piece") else 0)


def test_the_cap_counts_what_is_decoded() -> None:
    num_bytes = 40 * 30 * 2 + 30 * 4 + 8 * 40 * 2 + 3 + 8
    assert decode_frame(good_frame(), max_bytes=num_bytes).step == 50
    with pytest.raises(OversizedError):
        decode_frame(good_frame(), max_bytes=num_bytes - 1)


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
    body = bytearray(read_body(good_frame()))
    assert body[offset] != value
    body[offset] = value
    num_calls = 0

    def count(*args: Any, **kwargs: Any) -> None:
        nonlocal num_calls
        num_calls += 1

    monkeypatch.setattr(blosc2, "decompress2", count)
    with pytest.raises(MalformedError, match="Blosc2 chunk"):
        decode_frame(join(*read_header(good_frame()), bytes(body)), max_bytes=MAX_BYTES)
    assert num_calls == 0


def test_every_kind_of_chunk_that_the_encoder_makes_is_accepted() -> None:
    noise = torch.randint(
        0, 256, (3 * BLOCK_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    snapshot = make_snapshot(
        compressible=randn(300, 300),
        noise=noise,
        zeros=torch.zeros(BLOCK_BYTES, dtype=torch.int32),
        ones=torch.ones(1000, 3, dtype=torch.int16),
        tiny=torch.tensor([7], dtype=torch.uint8),
    )
    frame = decode_frame(encode_keyframe(snapshot), max_bytes=10_000_000)
    assert all(
        same_bits(frame.tensors[name], snapshot.tensors[name]) for name in ("noise", "zeros", "ones", "tiny")
    )


def test_booleans_other_than_zero_and_one_are_refused() -> None:
    raw = torch.tensor([1, 2], dtype=torch.uint8)
    chunk = frames._compress(raw.numpy(), 1)
    data = join(
        ["keyframe", 1, 1, 0, checksum_tensors([raw])],
        [["flags", "bool", "bool", [2], 2, [len(chunk)]]],
        [],
        chunk,
    )
    with pytest.raises(MalformedError, match="boolean"):
        decode_frame(data, max_bytes=MAX_BYTES)


def decode_or_refuse(data: bytes) -> DecodedFrame | None:
    """None when refused. Anything else that the decoder raises fails the test."""
    try:
        return decode_frame(data, max_bytes=MAX_BYTES)
    except RefusedError:
        return None


def assert_correct(frame: DecodedFrame, data: bytes) -> None:
    """What was accepted is what it says: within the cap, finite, and with the checksum in its header."""
    assert sum(tensor.nbytes for tensor in frame.tensors.values()) <= MAX_BYTES
    assert checksum_tensors(frame.tensors.values()) == read_header(data)[0][4]
    assert frame.aliases.keys().isdisjoint(frame.tensors)
    for tensor in frame.tensors.values():
        assert not tensor.is_floating_point() or bool(tensor.float().isfinite().all())


@settings(max_examples=300)
@given(st.data())
def test_a_mutated_frame_is_refused_or_decodes_to_what_it_says(data: st.DataObject) -> None:
    mutated = bytearray(good_frame())
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(
            st.integers(0, len(mutated)) | st.integers(0, 400).map(lambda n: min(n, len(mutated)))
        )
        match data.draw(st.sampled_from(["flip", "cut", "splice", "repeat", "length"])):
            case "flip" if start < len(mutated):
                mutated[start] ^= 1 << data.draw(st.integers(0, 7))
            case "cut":
                del mutated[start : start + data.draw(st.integers(0, 100))]
            case "splice":
                mutated[start:start] = data.draw(st.binary(max_size=20))
            case "repeat":
                mutated[start:start] = mutated[: data.draw(st.integers(0, 500))]
            case "length":
                mutated[start : start + 5] = data.draw(
                    st.sampled_from(
                        [b"\xdd\xff\xff\xff\xff", b"\xce\x7f\xff\xff\xff", b"\xc6\xff\xff\xff\xff", bytes(5)]
                    )
                )
    frame = decode_or_refuse(bytes(mutated))
    if frame is not None:
        assert_correct(frame, bytes(mutated))


plain_values = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.text(max_size=5) | st.floats()
)
values = st.recursive(plain_values, lambda inner: st.lists(inner, max_size=4), max_leaves=8)


@settings(max_examples=200)
@given(st.data())
def test_a_header_with_any_other_values_is_refused_or_decodes_to_what_it_says(data: st.DataObject) -> None:
    first, entries, aliases = read_header(good_frame())
    part: list[Any] = data.draw(st.sampled_from([first, *entries, *aliases, entries[0][3], entries[0][5]]))
    part[data.draw(st.integers(0, len(part) - 1))] = data.draw(values)
    forged = join(first, entries, aliases, read_body(good_frame()))
    frame = decode_or_refuse(forged)
    if frame is not None:
        assert_correct(frame, forged)


@settings(max_examples=200)
@given(st.data())
def test_a_chunk_with_a_damaged_inside_is_refused_or_harmless(data: st.DataObject) -> None:
    """Behind a header that passes, whatever Blosc2 makes of the rest must be caught by the checksum."""
    body = bytearray(read_body(good_frame()))
    for _ in range(data.draw(st.integers(1, 8))):
        body[data.draw(st.integers(32, len(body) - 1))] = data.draw(st.integers(0, 255))
    damaged = join(*read_header(good_frame()), bytes(body))
    frame = decode_or_refuse(damaged)
    if frame is not None:
        assert_correct(frame, damaged)


@given(st.binary(max_size=200) | st.binary(max_size=200).map(lambda tail: good_frame()[:PREFIX_BYTES] + tail))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    assert decode_or_refuse(data) is None


@st.composite
def snapshots(draw: st.DrawFn) -> Snapshot:
    tensors = {}
    for name in draw(
        st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), max_size=5, unique=True)
    ):
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        dtype = draw(st.sampled_from([torch.float32, torch.float64, *EXACT_DTYPES]))
        tensors[name] = (torch.rand(shape) * draw(st.sampled_from([2.0, 1e5]))).nan_to_num().to(dtype)
    finite = {
        name: tensor for name, tensor in tensors.items() if tensor.to(torch.complex128).isfinite().all()
    }
    kept = sorted(finite)
    return Snapshot(
        step=draw(st.integers(0, 2**63 - 1)),
        tensors=finite,
        aliases={f"tied to {kept[0]}": kept[0]} if kept and f"tied to {kept[0]}" not in finite else {},
        buffers=frozenset(draw(st.sets(st.sampled_from(kept))) if kept else ()),
    )


@settings(deadline=None)
@given(snapshots())
def test_any_finite_snapshot_round_trips(snapshot: Snapshot) -> None:
    frame = send(snapshot)
    assert (frame.step, frame.aliases) == (snapshot.step, snapshot.aliases)
    assert frame.schema_hash == snapshot.schema_hash
    for name, tensor in snapshot.tensors.items():
        assert same_bits(frame.tensors[name], tensor.to(frame.tensors[name].dtype))
        if name in snapshot.buffers:
            assert frame.tensors[name].dtype == tensor.dtype
