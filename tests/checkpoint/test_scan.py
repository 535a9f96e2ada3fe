"""One pass over a tensor: the checksum, and the largest magnitude by its bits."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from p2pcodistill.checkpoint import scan as module
from p2pcodistill.checkpoint.reference import raw_bytes
from p2pcodistill.checkpoint.scan import checksum_tensor, empty_tensor, find_largest, scan_tensor
from tests.plain_decoder import checksum_of

FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_CHUNK_BYTES", 2048)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("length", [1, 5, 512, 1024, 1025, 5003])
def test_the_largest_magnitude_is_found_wherever_and_of_whichever_sign(
    dtype: torch.dtype, length: int
) -> None:
    generator = torch.Generator().manual_seed(length)
    for sign in (-1.0, 1.0):
        for index in {0, length // 2, length - 1}:
            values = torch.rand(length, generator=generator) - 0.5
            for numbers in (values, values.abs() * sign):
                numbers[index] = 3.0 * sign
                tensor = numbers.to(dtype)
                assert find_largest(tensor) == scan_tensor(tensor).largest == 3.0


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("bad", [math.nan, -math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_not_overlooked(dtype: torch.dtype, bad: float) -> None:
    for index in (0, 700, 5002):
        tensor = torch.randn(5003).to(dtype)
        tensor[index] = bad
        if dtype != torch.float8_e4m3fn or math.isnan(bad):  # which has no infinity
            assert not math.isfinite(find_largest(tensor))
            assert not math.isfinite(scan_tensor(tensor).largest)


def test_negative_nan_by_its_bits() -> None:
    (bits,) = struct.unpack("<h", struct.pack("<H", 0xFFFF))
    tensor = torch.full((5,), bits, dtype=torch.int16).view(torch.float16)
    assert math.isnan(find_largest(tensor))
    assert math.isnan(find_largest(torch.tensor([1.0, -math.nan, math.inf])))


def test_other_dtypes_and_nothing_at_all() -> None:
    assert find_largest(torch.arange(5)) == find_largest(torch.tensor([True])) == 0.0
    assert find_largest(torch.empty(0, 3)) == find_largest(-torch.zeros(3)) == 0.0
    assert find_largest(torch.tensor([1 + 2j, -7j])) == 7.0
    assert math.isnan(find_largest(torch.tensor([1.0, complex(0, math.nan)])))
    assert (
        find_largest(torch.finfo(torch.float64).min * torch.ones(2, dtype=torch.float64))
        == torch.finfo(torch.float64).max
    )


@pytest.mark.parametrize("source_dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(0,), (0, 7), (), (1,), (512,), (513,), (511, 3), (16, 1024), (129, 1021)])
def test_a_scan_casts_and_sums_what_it_cast(source_dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    source = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(source_dtype)
    tensor = torch.empty(shape, dtype=torch.float16)
    scan = scan_tensor(tensor, source)
    assert torch.equal(tensor, source.half())
    assert scan.checksum == checksum_tensor(tensor) == checksum_of([raw_bytes(tensor).numpy().tobytes()])
    assert scan.largest == (float(tensor.abs().max()) if tensor.numel() else 0.0)


def test_large_new_tensors_are_like_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_HUGE_BYTES", 1000)
    for dtype in (torch.float16, torch.bfloat16, torch.complex128, torch.bool, torch.uint8):
        for shape in ((0, 5), (3,), (1000, 3)):
            tensor = empty_tensor(shape, dtype, torch.device("cpu"))
            assert (tensor.shape, tensor.dtype, tensor.is_contiguous()) == (shape, dtype, True)
            tensor.fill_(1)
    assert empty_tensor((1000, 3), torch.float16, torch.device("meta")).device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.bool, torch.uint8, torch.int64, torch.bfloat16, torch.complex128])
def test_tiny_tensors_have_their_checksum_without_the_buffers_of_large_ones(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A frame may hold tens of thousands of them."""
    lengths = [0, 1, 7, 1024 // dtype.itemsize - 1, 1024 // dtype.itemsize]
    tensors = [(1000 * torch.randn(length)).to(dtype) for length in lengths]
    expected = [checksum_of([raw_bytes(tensor).numpy().tobytes()]) for tensor in tensors]
    monkeypatch.setattr(module, "_Checksum", None)
    assert [checksum_tensor(tensor) for tensor in tensors] == expected
    assert [scan_tensor(tensor).checksum for tensor in tensors] == expected


def test_a_view_of_odd_bytes_is_summed_up_but_not_filled() -> None:
    """Its words would be those of a copy that was made before it was filled."""
    memory = torch.empty(2 * 3001, dtype=torch.uint8)
    view = memory[2:].view(torch.float16)
    view.copy_(torch.arange(3000))
    assert scan_tensor(view).checksum == checksum_tensor(torch.arange(3000).half())
    with pytest.raises(AssertionError, match="what is filled"):
        scan_tensor(view, torch.ones(3000))
