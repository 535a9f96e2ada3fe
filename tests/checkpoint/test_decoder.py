"""Frames to references: bases that must fit, contents that must be what the footer says, and errors that have a name."""

from __future__ import annotations

import io
import mmap
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from fuzz_frames import Parts, copy_of, join, split
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pcodistill.checkpoint.coding import MAX_RAW_BYTES, compress_raw, compress_symbols
from p2pcodistill.checkpoint.decoder import decode_frame, read_codes
from p2pcodistill.checkpoint.encoder import FrameEncoder, encode_reference_keyframe
from p2pcodistill.checkpoint.quantize import ALPHABETS, BLOCK_ELEMENTS
from p2pcodistill.checkpoint.reference import Reference, raw_bytes
from p2pcodistill.checkpoint.snapshot import Schema, Snapshot
from p2pcodistill.config import FramesConfig
from p2pcodistill.errors import (
    ChecksumError,
    MalformedError,
    NonFiniteError,
    OversizedError,
    SchemaMismatchError,
)

MAX_BYTES = 1_000_000
DELTAS = ["ternary", "3-bit", "4-bit", "8-bit", "lossless"]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def snapshot_at(step: int) -> Snapshot:
    weights = randn(60, 50) + step * 0.001 * randn(60, 50, seed=step)
    tensors = {"weights": weights, "bias": randn(30, seed=step), "mask": torch.tensor([True, False])}
    return Snapshot(step, tensors, {"tied": "weights"}, frozenset({"mask"}))


def make_chain(delta: str = "8-bit", *, num: int = 3) -> list[bytes]:
    encoder = FrameEncoder(FramesConfig(delta=delta))
    frames = []
    for index in range(num):
        sink = io.BytesIO()
        encoder.encode(snapshot_at(10 * index), sink)
        frames.append(sink.getvalue())
    return frames


def decode(frames: list[bytes]) -> Reference:
    reference = None
    for frame in frames:
        reference = decode_frame(frame, reference, max_bytes=MAX_BYTES)
    assert reference is not None
    return reference


def same_bits(left: Reference, right: Reference) -> bool:
    return list(left.tensors) == list(right.tensors) and all(
        tensor.dtype == right.tensors[name].dtype
        and tensor.shape == right.tensors[name].shape
        and torch.equal(raw_bytes(tensor), raw_bytes(right.tensors[name]))
        for name, tensor in left.tensors.items()
    )


def edit(frame: bytes, change: Callable[[Parts], object]) -> bytes:
    parts = split(frame)
    change(parts)
    return join(parts)


def put_piece(frame: bytes, tensor: int, index: int, piece: bytes) -> bytes:
    parts = split(frame)
    parts.pieces[tensor][index] = piece
    parts.say_sizes()
    return join(parts)


# --- bases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delta", DELTAS)
def test_a_delta_frame_moves_its_base_in_place(delta: str) -> None:
    frames = make_chain(delta)
    base = decode(frames[:1])
    weights = base.tensors["weights"]
    for frame in frames[1:]:
        assert decode_frame(frame, base, max_bytes=MAX_BYTES) is base
    assert base.tensors["weights"] is weights
    assert (base.step, base.aliases) == (20, {"tied": "weights"})
    target = snapshot_at(20).tensors
    assert (weights - target["weights"]).abs().max() < 0.2
    assert torch.equal(base.tensors["bias"], target["bias"])


def test_a_keyframe_leaves_the_base_alone() -> None:
    frames = make_chain()
    base = decode(frames[:2])
    kept = copy_of(base)
    assert kept is not None
    assert decode_frame(frames[0], base, max_bytes=MAX_BYTES) is not base
    assert same_bits(base, kept)


def test_a_delta_frame_for_another_base_is_refused_and_spoils_nothing() -> None:
    frames = make_chain()
    held = decode(frames[:1])
    kept = copy_of(held)
    assert kept is not None
    with pytest.raises(ChecksumError, match="base"):
        decode_frame(frames[2], held, max_bytes=MAX_BYTES)
    with pytest.raises(ChecksumError, match="base"):
        decode_frame(frames[1], None, max_bytes=MAX_BYTES)
    other_step = edit(frames[1], lambda parts: parts.first[1].__setitem__(0, 1))
    other_checksum = edit(frames[1], lambda parts: parts.first[1].__setitem__(1, 1))
    for frame in (other_step, other_checksum):
        with pytest.raises(ChecksumError, match="base"):
            decode_frame(frame, held, max_bytes=MAX_BYTES)
    assert same_bits(held, kept) and held.checksum == kept.checksum
    decode_frame(frames[1], held, max_bytes=MAX_BYTES)  # and it is still good


def test_a_keyframe_of_the_reference_stands_for_the_frames_before_it() -> None:
    frames = make_chain(num=4)
    sink = io.BytesIO()
    encode_reference_keyframe(decode(frames[:3]), sink)
    assert same_bits(decode([sink.getvalue(), frames[3]]), decode(frames))


@pytest.mark.parametrize(
    "change",
    [
        lambda parts: parts.entries.reverse() or parts.pieces.reverse(),
        lambda parts: parts.entries[1].__setitem__(0, "other"),
        lambda parts: parts.aliases.clear() or parts.first.__setitem__(4, 0),
        lambda parts: parts.aliases[0].__setitem__(1, "bias"),
        lambda parts: parts.entries[0].__setitem__(3, [50, 60]),
        lambda parts: parts.entries[0].__setitem__(1, "float64"),
        lambda parts: parts.entries[0].__setitem__(2, "bfloat16"),
        lambda parts: parts.entries[2].__setitem__(slice(1, 3), ["uint8", "uint8"]),
    ],
    ids=[
        "order",
        "name",
        "no ties",
        "other tie",
        "shape",
        "dtype",
        "wire dtype",
        "dtype of what is the same",
    ],
)
def test_a_delta_frame_of_another_model_is_refused(change: Callable[[Parts], object]) -> None:
    frames = make_chain()
    with pytest.raises(MalformedError, match="than its base"):
        decode_frame(edit(frames[1], change), decode(frames[:1]), max_bytes=MAX_BYTES)


@pytest.mark.parametrize(
    ("name", "spec", "aliases", "match"),
    [
        (
            "weights",
            ("float32", (50, 60)),
            {"tied": "weights"},
            r"'weights' is \(60, 50\) there and \(50, 60\) here",
        ),
        ("gain", ("float32", (60,)), {"tied": "weights"}, r"'gain' is missing there and \(60,\) here"),
        ("weights", ("float64", (60, 50)), {"tied": "weights"}, "dtypes or ties"),
        ("weights", ("float32", (60, 50)), {}, "dtypes or ties"),
    ],
)
def test_a_keyframe_of_another_model_is_refused_before_its_pieces_are_looked_at(
    name: str, spec: tuple[str, tuple[int, ...]], aliases: dict[str, str], match: str
) -> None:
    keyframe = make_chain(num=1)[0]
    ours = decode([keyframe]).schema
    assert decode_frame(keyframe, None, max_bytes=MAX_BYTES, schema=ours).step == 0
    rotten = put_piece(keyframe, 0, 0, b"no piece at all")
    with pytest.raises(MalformedError):
        decode_frame(rotten, None, max_bytes=MAX_BYTES, schema=ours)
    other = Schema({**ours.tensors, name: spec}, aliases)
    with pytest.raises(SchemaMismatchError, match=match):
        decode_frame(rotten, None, max_bytes=MAX_BYTES, schema=other)


# --- contents --------------------------------------------------------------------------------------------------------


def test_another_checksum_is_refused() -> None:
    frames = make_chain()
    for frame, base in ((frames[0], None), (frames[1], decode(frames[:1]))):
        with pytest.raises(ChecksumError, match="checksum"):
            decode_frame(edit(frame, lambda parts: parts.first.__setitem__(2, 1)), base, max_bytes=MAX_BYTES)


@pytest.mark.parametrize("bits", [0x7F80, 0xFF80, 0x7FC0], ids=["inf", "-inf", "nan"])
def test_scales_that_are_not_finite_are_refused(bits: int) -> None:
    frames = make_chain()
    scales = compress_symbols(np.array([0, bits, 0], np.uint16))
    with pytest.raises(NonFiniteError, match="weights"):
        decode_frame(put_piece(frames[1], 0, 0, scales), decode(frames[:1]), max_bytes=MAX_BYTES)


@pytest.mark.parametrize("delta", DELTAS[:4])
def test_symbols_outside_of_the_alphabet_are_refused(delta: str) -> None:
    frames = make_chain(delta)
    alphabet = ALPHABETS[delta]
    mask = np.zeros(3 * alphabet.block_symbols // 8, np.uint8)
    mask[0] = 1
    frame = put_piece(frames[1], 0, 1, compress_symbols(mask))
    for symbol, error in ((alphabet.num_symbols - 1, ChecksumError), (alphabet.num_symbols, MalformedError)):
        forged = put_piece(frame, 0, 2, compress_symbols(np.array([symbol], np.uint8)))
        with pytest.raises(error):
            decode_frame(forged, decode(frames[:1]), max_bytes=MAX_BYTES)


def test_more_or_fewer_symbols_than_the_mask_says_are_refused() -> None:
    frames = make_chain()
    for num in (0, 1, 5000):
        frame = put_piece(frames[1], 0, 2, compress_symbols(np.full(num, 3, np.uint8)))
        with pytest.raises(MalformedError):
            decode_frame(frame, decode(frames[:1]), max_bytes=MAX_BYTES)


def test_values_that_are_not_finite_are_refused() -> None:
    frames = make_chain("lossless")
    rotten = np.array([0x7E00, *[0] * 2999], np.uint16)
    keyframe = put_piece(frames[0], 0, 0, compress_raw(rotten.view(np.uint8), 2))
    with pytest.raises(NonFiniteError, match="weights"):
        decode_frame(keyframe, None, max_bytes=MAX_BYTES)
    bits = decode(frames[:1]).tensors["weights"].view(-1).view(torch.int16)
    steps = np.zeros(3000, np.uint16)
    steps[(bits > 0).int().argmax()] = 2 * (0x7C00 - int(bits[bits > 0][0]))  # as far as infinity
    far = compress_symbols(steps)
    with pytest.raises(NonFiniteError, match="weights"):
        decode_frame(put_piece(frames[1], 0, 0, far), decode(frames[:1]), max_bytes=MAX_BYTES)
    bits = decode(frames[:1]).tensors["bias"].view(torch.int32)
    far_steps = np.zeros(30, np.uint32)
    far_steps[(bits > 0).int().argmax()] = 2 * (0x7FC00000 - int(bits[bits > 0][0]))  # as far as NaN
    bias = compress_symbols(far_steps)
    with pytest.raises(NonFiniteError, match="bias"):
        decode_frame(put_piece(frames[1], 1, 0, bias), decode(frames[:1]), max_bytes=MAX_BYTES)


def test_booleans_other_than_zero_and_one_are_refused() -> None:
    piece = compress_raw(np.array([1, 2], np.uint8), 1)
    with pytest.raises(MalformedError, match="boolean"):
        decode_frame(put_piece(make_chain()[0], 2, 0, piece), None, max_bytes=MAX_BYTES)


def test_pieces_of_another_size_are_refused() -> None:
    frames = make_chain()
    for num_bytes in (2, 5998, 6002):
        piece = compress_raw(np.zeros(num_bytes, np.uint8), 2)
        with pytest.raises(MalformedError):
            decode_frame(put_piece(frames[0], 0, 0, piece), None, max_bytes=MAX_BYTES)


def test_large_steps_end_at_the_edge_of_the_range() -> None:
    """The largest scale times the largest code is beyond fp32; what comes of it is finite, and the checksum's business."""
    frames = make_chain()
    scales = compress_symbols(np.full(3, 0x7F7F, np.uint16))
    base = decode(frames[:1])
    with pytest.raises(ChecksumError):
        decode_frame(put_piece(frames[1], 0, 0, scales), base, max_bytes=MAX_BYTES)
    assert bool(base.tensors["weights"].isfinite().all())
    assert base.tensors["weights"].abs().max() == 65504


# --- the rest --------------------------------------------------------------------------------------------------------


def test_frames_decode_from_a_read_only_map_which_can_be_closed_after(tmp_path: Path) -> None:
    reference = None
    for frame in make_chain():
        path = tmp_path / "frame"
        path.write_bytes(frame)
        with (
            path.open("rb") as file,
            mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
            memoryview(mapped) as view,
        ):
            reference = decode_frame(view, reference, max_bytes=MAX_BYTES)
    assert reference is not None and same_bits(reference, decode(make_chain()))


@pytest.mark.parametrize("delta", DELTAS[:4])
def test_codes_can_be_looked_at(delta: str) -> None:
    frames = make_chain(delta)
    ((entry, symbols, scales),) = read_codes(frames[1], max_bytes=MAX_BYTES)
    assert (entry.name, entry.encoding, len(scales)) == ("weights", delta, 3)
    assert len(symbols) == 3 * ALPHABETS[delta].block_symbols
    assert list(read_codes(frames[0], max_bytes=MAX_BYTES)) == []
    with pytest.raises(OversizedError):
        list(read_codes(frames[1], max_bytes=100))


def test_an_empty_tensor_may_say_that_it_travels_as_codes() -> None:
    entry = ["empty", "float32", "float16", [0, BLOCK_ELEMENTS], "exact", []]
    keyframe = join(Parts([1, None, 0, 1, 0], [entry], [], [[]]))
    held = decode_frame(keyframe, None, max_bytes=0)
    delta = join(Parts([2, [1, 0], 0, 1, 0], [[*entry[:4], "ternary", []]], [], [[]]))
    assert decode_frame(delta, held, max_bytes=0).step == 2
    assert list(read_codes(delta, max_bytes=0)) == []


def test_tensors_larger_than_a_piece_are_split_and_joined() -> None:
    weights = torch.zeros(MAX_RAW_BYTES // 2 + 3, dtype=torch.int16)
    weights[-3:] = torch.tensor([1, 2, 3])
    sink = io.BytesIO()
    FrameEncoder(FramesConfig()).encode(Snapshot(0, {"ids": weights}, {}), sink)
    assert len(split(sink.getvalue()).pieces[0]) == 2
    assert torch.equal(decode_frame(sink.getvalue(), None, max_bytes=1 << 24).tensors["ids"], weights)


@pytest.mark.parametrize("delta", DELTAS)
def test_a_negative_zero_that_hardly_moves_is_the_same_on_both_sides(delta: str) -> None:
    """A code of zero adds +0 to it; -0, which is what a small step downwards rounds to, would leave the sign."""
    encoder = FrameEncoder(FramesConfig(delta=delta))
    weights = torch.zeros(2, 1024)
    weights[0, 0] = -1e-9
    held = None
    for step in range(3):
        sink = io.BytesIO()
        encoder.encode(Snapshot(step, {"weights": weights}, {}), sink)
        held = decode_frame(sink.getvalue(), held, max_bytes=MAX_BYTES)
        sent = encoder.reference.tensors["weights"]
        assert torch.equal(held.tensors["weights"].view(torch.uint8), sent.view(torch.uint8))
        weights = weights + torch.linspace(-1, 1, 2048).view(2, 1024)
        weights[0, 0] = -2e-9


@settings(max_examples=12)
@given(st.data())
def test_any_chain_of_small_tensors_leads_to_the_senders_reference(data: st.DataObject) -> None:
    shapes = data.draw(st.lists(st.lists(st.integers(0, 40), max_size=3), min_size=1, max_size=4))
    size = data.draw(st.sampled_from([1e-6, 0.05, 3e4, 1e5]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    encoder = FrameEncoder(
        FramesConfig(keyframe=data.draw(st.sampled_from(["fp16", "bf16", "fp32", "int8"])))
    )
    held = None
    for step in range(3):
        tensors = {
            str(index): (randn(*shape, seed=step + index) * size).to(dtype)
            for index, shape in enumerate(shapes)
        }
        sink = io.BytesIO()
        encoder.encode(Snapshot(step, tensors, {}), sink)
        held = decode_frame(sink.getvalue(), held, max_bytes=MAX_BYTES * 4)
        assert encoder.reference is not None and same_bits(held, encoder.reference)
        assert held.checksum == encoder.reference.checksum
