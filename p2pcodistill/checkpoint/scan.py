"""What is to be known of every tensor that travels, in one pass: its checksum, and its largest magnitude.

It is memory that limits the speed of frames, not arithmetic. So a tensor is gone through in chunks that stay in the
processor's second-level cache, all that is to be done to a chunk at once; sums go into buffers that are there already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from p2pcodistill.errors import NonFiniteError

MIX = 0x9E3779B97F4A7C15
_ROW_WORDS = 128
_WORD_BYTES = 8
_ROW_BYTES = _WORD_BYTES * _ROW_WORDS
_CHUNK_BYTES = 1 << 19  # beside it, in the cache: what it was cast from, and the words of a checksum
_DEVICE_CHUNK_BYTES = 1 << 25  # on an accelerator it is the number of calls that counts
_HUGE_BYTES = 1 << 22
_ODD_WORDS = np.arange(1, 2 * _ROW_WORDS, 2)
_INTS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Scan:
    """Of one tensor. `largest` is 0 for integers and empty tensors; NaN or infinite where any value is."""

    largest: float
    checksum: int


def scan_tensor(tensor: Tensor, source: Tensor | None = None) -> Scan:
    """Scan a contiguous tensor, after `source`, if any, was copied into it (and cast to its dtype).

    A tensor that is copied into must be in memory of its own.
    """
    if not tensor.numel():
        return Scan(0.0, 0)
    assert source is None or tensor.data_ptr() % _WORD_BYTES == 0, "what is summed up must be what is filled"
    if _is_tiny(tensor):
        if source is not None:
            tensor.copy_(source)
        return Scan(find_largest(tensor), _checksum_row(tensor))
    copied = None if source is None else source.view(-1)
    flat, magnitude, checksum = tensor.view(-1), _Magnitude(tensor), _Checksum(tensor)
    for index, chunk in enumerate(_chunks(tensor)):
        if copied is not None:
            flat[chunk].copy_(copied[chunk])
        magnitude.add(chunk)
        checksum.add(index)
    return Scan(magnitude.largest, checksum.value)


def find_largest(tensor: Tensor) -> float:
    """`Scan.largest` alone."""
    magnitude = _Magnitude(tensor)
    for chunk in _chunks(tensor):
        magnitude.add(chunk)
    return magnitude.largest


def largest_magnitude(name: str, tensor: Tensor) -> float:
    """The largest absolute value (0 for integers and empty tensors). Raises NonFiniteError if it is not finite."""
    return check_finite(name, find_largest(tensor))


def check_finite(name: str, largest: float) -> float:
    """A tensor's largest magnitude itself. Raises NonFiniteError if it is not finite."""
    if not math.isfinite(largest):
        raise NonFiniteError(f"the tensor {name!r} holds NaN or infinite values")
    return largest


def checksum_tensor(tensor: Tensor) -> int:
    """`Scan.checksum` alone."""
    if not tensor.numel():
        return 0
    if _is_tiny(tensor):
        return _checksum_row(tensor)
    checksum = _Checksum(tensor)
    for index, _ in enumerate(_chunks(tensor)):
        checksum.add(index)
    return checksum.value


def empty_tensor(
    shape: torch.Size | tuple[int, ...], dtype: torch.dtype, device: torch.device | None = None
) -> Tensor:
    """`torch.empty`; on the CPU, a large one's memory is NumPy's, which asks for huge pages: their faults cost less."""
    num_bytes = torch.Size(shape).numel() * dtype.itemsize
    if num_bytes < _HUGE_BYTES or (device is not None and device.type != "cpu"):
        return torch.empty(shape, dtype=dtype, device=device)
    return torch.from_numpy(np.empty(num_bytes, np.uint8)).view(dtype).view(shape)


def _chunk_bytes(tensor: Tensor) -> int:
    return _CHUNK_BYTES if tensor.device.type == "cpu" else _DEVICE_CHUNK_BYTES


def _chunks(tensor: Tensor) -> Iterator[slice]:
    size = _chunk_bytes(tensor) // tensor.element_size()
    return (slice(start, start + size) for start in range(0, tensor.numel(), size))


class _Magnitude:
    """The largest magnitude of a tensor, chunk by chunk.

    Told by the bits: as integers they are in the order of the numbers, for either sign, with infinity and NaN beyond. The
    maximum of integers is several times as fast as that of floats, which looks after NaN.
    """

    def __init__(self, tensor: Tensor) -> None:
        flat = tensor.view(-1)
        self._values = torch.view_as_real(flat) if flat.is_complex() else flat
        self._is_float = self._values.is_floating_point()
        self._largest: Tensor | None = None
        self._signed: NDArray[Any] | None = None
        if self._is_float and flat.device.type == "cpu" and self._values.element_size() in _INTS:
            self._signed = self._values.view(_INTS[self._values.element_size()]).numpy()
            self._unsigned = self._signed.view(f"u{self._values.element_size()}")
            self._magnitude_mask = (1 << (8 * self._values.element_size() - 1)) - 1
        self._largest_bits = 0

    def add(self, chunk: slice) -> None:
        """Look at a chunk of the tensor's elements."""
        if self._signed is not None:
            # One maximum is that of the positive numbers, the other, where there are any, that of the negative ones.
            positive, negative = int(self._signed[chunk].max()), int(self._unsigned[chunk].max())
            self._largest_bits = max(self._largest_bits, positive, negative & self._magnitude_mask)
        elif self._is_float:
            part = self._values[chunk]
            largest = (part.float() if part.element_size() == 1 else part).abs().max()
            # Of NaN and anything, NaN.
            self._largest = largest if self._largest is None else torch.maximum(self._largest, largest)

    @property
    def largest(self) -> float:
        """Of all chunks so far."""
        if self._signed is None:
            return 0.0 if self._largest is None else float(self._largest)
        bits = torch.tensor(self._largest_bits, dtype=_INTS[self._values.element_size()])
        return float(bits.view(self._values.dtype))


class _Checksum:
    """The checksum of a tensor's bytes, chunk by chunk; what it is: `reference.checksum_tensors`."""

    def __init__(self, tensor: Tensor) -> None:
        raw = tensor.view(-1).view(torch.uint8)
        num_whole = len(raw) // _ROW_BYTES
        chunk_rows = _chunk_bytes(tensor) // _ROW_BYTES
        whole, self._rest = raw[: num_whole * _ROW_BYTES], raw[num_whole * _ROW_BYTES :]
        if whole.data_ptr() % _WORD_BYTES:  # a view into something larger
            whole = whole.clone()
        self._words = torch.split(whole.view(torch.int64).view(-1, _ROW_WORDS), chunk_rows)
        self._mixed = torch.empty_like(self._words[0])
        self._rows = torch.zeros(num_whole + 1, dtype=torch.int64, device=raw.device)
        self._rows_of_chunk = torch.split(self._rows[:num_whole], chunk_rows)
        self._columns = torch.zeros(_ROW_WORDS, dtype=torch.int64, device=raw.device)

    def add(self, index: int) -> None:
        """Take up the chunk with that index; what is left of a last row is added in the end."""
        if index < len(self._words):
            words = self._words[index]
            self._add(words, self._mixed[: len(words)], self._rows_of_chunk[index])

    @property
    def value(self) -> int:
        """The checksum, once every chunk has been added."""
        if len(self._rest):
            row = functional.pad(self._rest, (0, _ROW_BYTES - len(self._rest))).view(torch.int64)[None]
            self._add(row, torch.empty_like(row), self._rows[-1:])
            self._rest = self._rest[:0]
        by_row = (self._rows * _odd_numbers(self._rows)).sum()
        by_column = (self._columns * _odd_numbers(self._columns)).sum()
        return (int(by_row) + MIX * int(by_column)) % 2**64

    def _add(self, words: Tensor, mixed: Tensor, rows: Tensor) -> None:
        if words.device.type == "cpu":  # torch adds int64 at a third of NumPy's speed
            numpy_words, numpy_mixed = words.numpy(), mixed.numpy()
            np.right_shift(numpy_words, 32, out=numpy_mixed)
            np.add(numpy_mixed, numpy_words, out=numpy_mixed)
        else:
            torch.bitwise_right_shift(words, 32, out=mixed).add_(words)
        torch.sum(mixed, 1, out=rows)
        self._columns += mixed.sum(0)


def _is_tiny(tensor: Tensor) -> bool:
    """Whether a tensor is at most a row of its checksum: a frame may hold tens of thousands of those."""
    return tensor.nbytes <= _ROW_BYTES and tensor.device.type == "cpu"


def _checksum_row(tensor: Tensor) -> int:
    """The checksum of a tiny tensor, without the buffers that chunks need."""
    words = np.zeros(_ROW_WORDS, np.int64)
    words.view(np.uint8)[: tensor.nbytes] = tensor.view(-1).view(torch.uint8).numpy()
    words += words >> 32
    return (int(words.sum()) + MIX * int((words * _ODD_WORDS).sum())) % 2**64


def _odd_numbers(like: Tensor) -> Tensor:
    """1, 3, 5, ..., as many as `like` has elements."""
    return torch.arange(1, 2 * len(like), 2, dtype=torch.int64, device=like.device)
