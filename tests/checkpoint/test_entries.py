"""Which tensors share pieces: the same on both sides, in order, and never more than a piece can hold."""

from __future__ import annotations

import io
import math

import pytest
import torch
from fuzz_frames import join, split
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from p2pcodistill.checkpoint.coding import MAX_RAW_BYTES
from p2pcodistill.checkpoint.decoder import decode_frame, read_codes
from p2pcodistill.checkpoint.encoder import FrameEncoder
from p2pcodistill.checkpoint.entries import EXACT, LOSSLESS, SAME, Bundle, TensorEntry, join_entries
from p2pcodistill.checkpoint.frames import read_header
from p2pcodistill.checkpoint.quantize import ALPHABETS, SEGMENT_ELEMENTS
from p2pcodistill.checkpoint.reference import raw_bytes
from p2pcodistill.checkpoint.snapshot import Snapshot
from p2pcodistill.config import FramesConfig
from p2pcodistill.errors import MalformedError

MAX_BYTES = 1 << 26
CODE_NAMES = [*ALPHABETS]


def entry(
    name: str, num_elements: int, encoding: str, wire_dtype: torch.dtype = torch.float16
) -> TensorEntry:
    return TensorEntry(name, wire_dtype, wire_dtype, (num_elements,), encoding, ())


def names_of(bundles: tuple[Bundle, ...]) -> list[str]:
    return ["".join(member.name for member in bundle.members) for bundle in bundles]


# --- which ones --------------------------------------------------------------------------------------------------------


def test_small_tensors_of_one_kind_are_joined_where_the_last_of_them_stands() -> None:
    entries = [
        entry("a", 10, "ternary"),
        entry("b", 10, LOSSLESS, torch.float32),
        entry("c", 10, "ternary", torch.bfloat16),
        entry("d", 1 << 18, "ternary"),
        entry("e", 10, SAME),
        entry("f", 10, "ternary"),
        entry("g", 10, EXACT, torch.int64),
        entry("h", 0, "ternary"),
        entry("i", 10, LOSSLESS, torch.float32),
    ]
    assert names_of(join_entries(entries, is_joining=True)) == ["c", "d", "e", "af", "g", "h", "bi"]
    assert names_of(join_entries(entries, is_joining=False)) == list("abcdefghi")


@pytest.mark.parametrize(
    ("encoding", "dtype", "largest"),
    [
        ("ternary", torch.float16, 255 * 1024),
        (LOSSLESS, torch.float32, (1 << 18) - 1),
        (EXACT, torch.int64, (1 << 15) - 1),
        (EXACT, torch.bool, (1 << 18) - 1),
    ],
)
def test_the_one_that_fills_a_bundle_closes_it(encoding: str, dtype: torch.dtype, largest: int) -> None:
    entries = [entry(str(index), largest, encoding, dtype) for index in range(7)]
    assert names_of(join_entries(entries, is_joining=True)) == ["01234", "56"]
    larger = entry("x", largest + 1, encoding, dtype)
    assert names_of(join_entries([entries[0], larger, entries[1]], is_joining=True)) == ["x", "01"]


sizes = st.integers(0, 3) | st.integers(0, 1 << 19) | st.sampled_from([(1 << 18) - 1, 1 << 18])
kinds = st.tuples(
    st.sampled_from([*CODE_NAMES[:2], LOSSLESS]), st.sampled_from([torch.float16, torch.float32])
)
kinds |= st.tuples(st.just(EXACT), st.sampled_from([torch.bool, torch.int64, torch.complex128]))


@given(st.lists(st.tuples(sizes, kinds), max_size=40))
def test_any_bundles_hold_every_tensor_once_and_fit_into_a_piece(
    specs: list[tuple[int, tuple[str, torch.dtype]]],
) -> None:
    entries = [entry(str(index), size, *kind) for index, (size, kind) in enumerate(specs)]
    bundles = join_entries(entries, is_joining=True)
    indices = [[int(member.name) for member in bundle.members] for bundle in bundles]
    assert sorted(index for members in indices for index in members) == list(range(len(entries)))
    assert all(members == sorted(members) for members in indices)
    assert [members[-1] for members in indices] == sorted(members[-1] for members in indices)
    for bundle in bundles:
        if len(bundle.members) > 1:
            whole = bundle.whole
            assert len({(member.encoding, member.wire_dtype) for member in bundle.members}) == 1
            assert whole.num_elements <= SEGMENT_ELEMENTS
            assert whole.encoding != EXACT or whole.num_bytes <= MAX_RAW_BYTES


def test_the_work_of_joining_grows_with_the_number_of_tensors_and_no_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_measured = 0
    num_bytes = TensorEntry.num_bytes.fget
    assert num_bytes is not None

    def measure(self: TensorEntry) -> int:
        nonlocal num_measured
        num_measured += 1
        return num_bytes(self)

    monkeypatch.setattr(TensorEntry, "num_bytes", property(measure))
    num_tensors = 4096
    entries = [entry(str(index), 1, EXACT, torch.bool) for index in range(num_tensors)]
    assert len(join_entries(entries, is_joining=True)) == 1
    assert 0 < num_measured <= 2 * num_tensors, "is it small, and how much does it add to its bundle"


# --- frames of them ----------------------------------------------------------------------------------------------------


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def small_model(step: int) -> Snapshot:
    """Layers of 4 x 300 in two dtypes, norms, buffers and counters."""
    tensors: dict[str, Tensor] = {}
    for layer in range(3):
        tensors[f"{layer}.weight"] = randn(4, 300 + layer, seed=layer) + 0.01 * randn(
            4, 300 + layer, seed=step
        )
        tensors[f"{layer}.double"] = 0.1 * randn(5, 7, seed=step).double()
        tensors[f"{layer}.norm"] = 1 + 0.01 * randn(30, seed=step + layer)
        tensors[f"{layer}.half"] = randn(9, seed=step + layer).half()
        tensors[f"{layer}.mean"] = randn(30, seed=step)
        tensors[f"{layer}.count"] = torch.tensor(step)
        tensors[f"{layer}.flags"] = torch.tensor([step % 2 == 0, True])
    buffers = frozenset(name for name in tensors if name.endswith(("mean", "count", "flags")))
    return Snapshot(step, tensors, {}, buffers)


def encode(encoder: FrameEncoder, snapshot: Snapshot) -> bytes:
    sink = io.BytesIO()
    encoder.encode(snapshot, sink)
    return sink.getvalue()


@pytest.mark.parametrize("delta", [*CODE_NAMES, "lossless"])
@pytest.mark.parametrize("keyframe", ["fp16", "fp32"])
def test_both_sides_hold_the_same_and_what_is_exact_stays_so(delta: str, keyframe: str) -> None:
    encoder = FrameEncoder(FramesConfig(delta=delta, keyframe=keyframe))
    held = decode_frame(encode(encoder, small_model(0)), None, max_bytes=MAX_BYTES)
    for step in range(1, 5):
        data = encode(encoder, small_model(step))
        bundles = read_header(memoryview(data), max_bytes=MAX_BYTES).bundles
        assert len([bundle for bundle in bundles if bundle.encoding != SAME]) <= 5
        held = decode_frame(data, held, max_bytes=MAX_BYTES)
        assert encoder.reference is not None
        for name, tensor in small_model(step).tensors.items():
            mine, theirs = encoder.reference.tensors[name], held.tensors[name]
            assert torch.equal(raw_bytes(mine), raw_bytes(theirs)) and mine.dtype == theirs.dtype
            assert theirs.shape == tensor.shape and theirs.is_contiguous()
            if not name.endswith(("weight", "double")):
                assert torch.equal(theirs, tensor), name


def test_codes_of_joined_tensors_are_told_apart() -> None:
    encoder = FrameEncoder(FramesConfig(delta="3-bit"))
    encode(encoder, small_model(0))
    data = encode(encoder, small_model(1))
    read = {entry.name: (symbols, scales) for entry, symbols, scales in read_codes(data, max_bytes=MAX_BYTES)}
    assert sorted(read) == sorted(f"{layer}.{name}" for layer in range(3) for name in ("weight", "double"))
    for name, (symbols, scales) in read.items():
        assert len(scales) == (2 if name.endswith("weight") else 1)
        assert len(symbols) == len(scales) * ALPHABETS["3-bit"].block_symbols


def test_pieces_belong_to_the_last_of_those_that_are_joined() -> None:
    encoder = FrameEncoder(FramesConfig(delta="ternary"))
    held = decode_frame(encode(encoder, small_model(0)), None, max_bytes=MAX_BYTES)
    parts = split(encode(encoder, small_model(1)))
    last = max(index for index, entry in enumerate(parts.entries) if entry[4] == "ternary" and entry[5])
    first = next(index for index, entry in enumerate(parts.entries) if entry[4] == "ternary")
    assert first < last and parts.entries[first][5] == []
    for source, target in ((last, first), (last, None)):
        forged = split(join(parts))
        if target is not None:
            forged.pieces[target] = list(forged.pieces[source])
        else:
            forged.pieces[source] = []
        forged.say_sizes()
        with pytest.raises(MalformedError, match="number of pieces"):
            decode_frame(join(forged), held, max_bytes=MAX_BYTES)


def test_version_2_joins_nothing() -> None:
    encoder = FrameEncoder(FramesConfig(delta="ternary"))
    held = decode_frame(encode(encoder, small_model(0)), None, max_bytes=MAX_BYTES)
    parts = split(encode(encoder, small_model(1)))
    parts.version = 2
    with pytest.raises(MalformedError, match="number of pieces"):
        decode_frame(join(parts), held, max_bytes=MAX_BYTES)


def test_a_segment_that_cannot_be_compressed_fits_into_a_piece() -> None:
    encoder = FrameEncoder(FramesConfig(keyframe="fp32", delta="lossless"))
    bits = torch.randint(-(2**30), 2**30, (2, SEGMENT_ELEMENTS), dtype=torch.int32)
    shape = (1024, SEGMENT_ELEMENTS // 1024)
    held = None
    for step, numbers in enumerate(bits.view(torch.float32).nan_to_num(0.0).clamp(-1e30, 1e30)):
        data = encode(encoder, Snapshot(step, {"weights": numbers.view(shape)}, {}))
        held = decode_frame(data, held, max_bytes=MAX_BYTES)
    assert len(data) > 3.5 * math.prod(shape)
