"""The reference: its sizes, its schema, and the checksum that tells whether two of them are the same."""

from __future__ import annotations

import struct

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from p2pcodistill.checkpoint import scan
from p2pcodistill.checkpoint.reference import Reference, checksum_tensors, num_fp16_bytes, raw_bytes
from p2pcodistill.checkpoint.snapshot import take_snapshot

MIX = 0x9E3779B97F4A7C15


def slow_checksum(*contents: bytes) -> int:
    """The docstring's formula, word by word."""
    checksum = 0
    for content in contents:
        padded = content + bytes(-len(content) % 1024)
        words = struct.unpack(f"<{len(padded) // 8}q", padded)
        mixed = [word + (word >> 32) for word in words]
        rows = [sum(mixed[start : start + 128]) for start in range(0, len(mixed), 128)]
        columns = [sum(mixed[start::128]) for start in range(128)]
        total = sum((2 * i + 1) * row for i, row in enumerate(rows))
        total += MIX * sum((2 * j + 1) * column for j, column in enumerate(columns))
        checksum = (checksum * MIX + total) % 2**64
    return checksum


@given(st.lists(st.binary(max_size=3000), max_size=4))
def test_the_checksum_is_what_its_docstring_says(contents: list[bytes]) -> None:
    tensors = [torch.tensor(list(content), dtype=torch.uint8) for content in contents]
    assert checksum_tensors(tensors) == slow_checksum(*contents)


def test_the_checksum_of_large_tensors_and_of_views_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    content = torch.randint(0, 256, (600_007,), dtype=torch.uint8, generator=generator)
    expected = slow_checksum(content.numpy().tobytes())
    assert checksum_tensors([content]) == expected
    assert checksum_tensors([torch.cat([torch.zeros(3, dtype=torch.uint8), content])[3:]]) == expected
    monkeypatch.setattr(scan, "_CHUNK_BYTES", 7 * 1024)
    assert checksum_tensors([content]) == expected


def test_the_checksum_reads_the_bytes_of_any_dtype() -> None:
    for dtype in (
        torch.bool,
        torch.float16,
        torch.bfloat16,
        torch.float8_e5m2,
        torch.complex128,
        torch.int64,
    ):
        tensor = (torch.rand(5, 3) * 2).to(dtype)
        assert checksum_tensors([tensor]) == slow_checksum(raw_bytes(tensor).numpy().tobytes())
    assert checksum_tensors([]) == checksum_tensors([torch.empty(0, 3)]) == 0


@given(st.data())
def test_the_checksum_notices_any_changed_word_and_swapped_parts(data: st.DataObject) -> None:
    tensor = torch.arange(3000, dtype=torch.int16)
    changed = tensor.clone()
    changed[data.draw(st.integers(0, 2999))] ^= data.draw(st.integers(1, 2**15 - 1))
    assert checksum_tensors([changed]) != checksum_tensors([tensor])
    assert checksum_tensors([changed, tensor]) != checksum_tensors([tensor, changed])
    shift = data.draw(st.integers(1, 2999))
    assert checksum_tensors([tensor.roll(shift)]) != checksum_tensors([tensor])


def test_a_reference_knows_its_sizes_and_the_schema_of_its_origin() -> None:
    model = nn.Sequential(nn.Embedding(50, 16), nn.BatchNorm1d(16), nn.Linear(16, 50, bias=False))
    model[2].weight = model[0].weight
    snapshot = take_snapshot(model, step=7)
    tensors = {
        name: tensor.half() if tensor.is_floating_point() else tensor
        for name, tensor in snapshot.tensors.items()
    }
    dtypes = {name: tensor.dtype for name, tensor in snapshot.tensors.items()}
    reference = Reference(7, tensors, dtypes, snapshot.aliases, checksum_tensors(tensors.values()))
    assert reference.schema_hash == snapshot.schema_hash
    assert reference.num_fp16_bytes == reference.num_bytes == snapshot.num_fp16_bytes
    assert num_fp16_bytes(torch.zeros(3, dtype=torch.complex128)) == 12
    assert num_fp16_bytes(torch.zeros(3, dtype=torch.int64)) == 24


def test_raw_bytes_are_a_view() -> None:
    tensor = torch.zeros(2, 3)
    raw_bytes(tensor)[:] = 255
    assert bool(tensor.isnan().all())
