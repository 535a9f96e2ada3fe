"""Frames that were sent once decode for ever, and FORMAT.md is enough to write a decoder that does."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import plain_decoder
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from p2pcodistill.checkpoint.decoder import decode_frame
from p2pcodistill.checkpoint.frames import read_header
from p2pcodistill.checkpoint.quantize import ALPHABETS
from p2pcodistill.checkpoint.reference import Reference, raw_bytes
from p2pcodistill.checkpoint.snapshot import dtype_name

GOLDEN = Path(__file__).parent / "golden"
CHAINS = {
    (folder.name, prefix): sorted(folder.glob(f"{prefix}-*.frame"))
    for folder in sorted(GOLDEN.glob("v*"))
    for prefix in ("chain", "large", "full")
    if any(folder.glob(f"{prefix}-*.frame"))
} | {(path.parent.name, path.stem): [path] for path in sorted(GOLDEN.glob("v*/keyframe-*.frame"))}
MAX_BYTES = 1 << 25


def expected_of(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    with safe_open(path.with_suffix(".safetensors"), "pt") as file:
        return json.loads(file.metadata()["reference"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def assert_is(raw: dict[str, tuple[str, str, list[int], bytes]], path: Path) -> None:
    facts, tensors = expected_of(path)
    assert list(raw) == list(facts["tensors"])
    for name, (wire_dtype, dtype, shape, data) in raw.items():
        spec = facts["tensors"][name]
        assert [wire_dtype, dtype, shape] == spec[:3], name
        if name in tensors:
            assert data == raw_bytes(tensors[name]).numpy().tobytes(), name
        else:
            assert [sha256(data)] == spec[3:], name


def raw_of(reference: Reference) -> dict[str, tuple[str, str, list[int], bytes]]:
    return {
        name: (
            dtype_name(tensor.dtype),
            dtype_name(reference.dtypes[name]),
            list(tensor.shape),
            raw_bytes(tensor).numpy().tobytes(),
        )
        for name, tensor in reference.tensors.items()
    }


@pytest.mark.parametrize("chain", CHAINS, ids="/".join)
def test_golden_frames_decode_to_the_same_bits_for_ever(chain: tuple[str, str]) -> None:
    reference = None
    for path in CHAINS[chain]:
        reference = decode_frame(path.read_bytes(), reference, max_bytes=MAX_BYTES)
        facts, _ = expected_of(path)
        assert (reference.step, reference.checksum) == (facts["step"], facts["checksum"])
        assert reference.aliases == facts["aliases"]
        assert_is(raw_of(reference), path)


@pytest.mark.parametrize("chain", CHAINS, ids="/".join)
def test_a_decoder_written_from_the_specification_alone_yields_the_same_bits(chain: tuple[str, str]) -> None:
    decoded = None
    for path in CHAINS[chain]:
        decoded = plain_decoder.decode(path.read_bytes(), decoded)
        facts, _ = expected_of(path)
        assert (decoded.step, decoded.checksum, decoded.aliases) == (
            facts["step"],
            facts["checksum"],
            facts["aliases"],
        )
        raw = {
            name: (tensor.wire_dtype, tensor.dtype, list(tensor.shape), tensor.data)
            for name, tensor in decoded.tensors.items()
        }
        assert_is(raw, path)


@pytest.mark.parametrize("version", ["v2", "v3"])
def test_the_golden_frames_cover_the_format(version: str) -> None:
    """Every encoding, every dtype, clamping at the edge, a replacement by a wider dtype, more than one segment."""
    entries = [
        entry
        for path in GOLDEN.glob(f"{version}/*.frame")
        for entry in read_header(memoryview(path.read_bytes()), max_bytes=MAX_BYTES).entries
    ]
    assert {entry.encoding for entry in entries} == {"exact", "int8", "lossless", "same", *ALPHABETS}
    assert len({entry.wire_dtype for entry in entries if entry.encoding == "exact"}) == 19
    assert {entry.wire_dtype for entry in entries if entry.encoding == "lossless"} == {
        torch.float16,
        torch.bfloat16,
        torch.float32,
    }
    assert any(len(entry.pieces) == 6 and entry.encoding in ALPHABETS for entry in entries)
    assert any(len(entry.pieces) == 2 and entry.encoding == "exact" for entry in entries)
    wire_dtypes = [
        next(
            entry.wire_dtype
            for entry in read_header(memoryview(path.read_bytes()), max_bytes=MAX_BYTES).entries
            if entry.name == "grows"
        )
        for path in CHAINS[version, "chain"]
    ]
    assert wire_dtypes[0] == torch.float16 and wire_dtypes[-1] == torch.float32
    edges = [expected_of(path)[1]["edge"] for path in CHAINS[version, "chain"]]
    assert any(bool((edge == 65504).any()) for edge in edges)


def test_the_golden_frames_of_version_3_join_tensors_in_every_encoding_and_fill_bundles() -> None:
    bundles = [
        read_header(memoryview(path.read_bytes()), max_bytes=MAX_BYTES).bundles
        for path in sorted(GOLDEN.glob("v3/*.frame"))
    ]
    joined = {bundle.encoding for frame in bundles for bundle in frame if len(bundle.members) > 1}
    assert joined == {"exact", "lossless", *ALPHABETS}
    kinds = [
        [(bundle.encoding, bundle.whole.wire_dtype) for bundle in frame if len(bundle.members) > 1]
        for frame in bundles
    ]
    assert any(len(frame) > len(set(frame)) for frame in kinds)
