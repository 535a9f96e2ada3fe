"""Frames to references: the inverse of the encoder, for bytes from anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from p2pcodistill.checkpoint.coding import (
    MAX_RAW_BYTES,
    count_others,
    decompress_raw,
    decompress_symbols,
    join_zeros,
)
from p2pcodistill.checkpoint.encoder import largest_magnitude
from p2pcodistill.checkpoint.frames import (
    CODE_PIECES,
    EXACT,
    INT8,
    LOSSLESS,
    SAME,
    FrameHeader,
    TensorEntry,
    read_header,
    read_pieces,
)
from p2pcodistill.checkpoint.quantize import (
    ALPHABETS,
    SEGMENT_ELEMENTS,
    Alphabet,
    Quantizer,
    decode_int8,
    decode_lossless,
    num_blocks,
)
from p2pcodistill.checkpoint.reference import Reference, checksum_tensors, raw_bytes
from p2pcodistill.errors import ChecksumError, MalformedError, NonFiniteError


def decode_frame(frame: bytes | memoryview, base: Reference | None, *, max_bytes: int) -> Reference:
    """The reference that `frame` leads to: a new one for a keyframe; `base` itself, moved in place, for a delta frame.

    `max_bytes` caps the decoded tensors together. Raises MalformedError, OversizedError, ChecksumError or NonFiniteError,
    and nothing else on account of `frame`; `base` is spoilt then, unless the error is a ChecksumError for a frame that has
    another base.
    """
    view = memoryview(frame).cast("B")
    header = read_header(view, max_bytes=max_bytes)
    if header.base is None:
        reference = _decode_keyframe(view, header)
    else:
        reference = _check_base(header, base)
        _apply_delta(view, header, reference)
    if checksum_tensors(reference.tensors.values()) != header.checksum:
        raise ChecksumError("a frame's tensors do not match its checksum")
    reference.step, reference.checksum = header.step, header.checksum
    return reference


def read_codes(frame: bytes | memoryview, *, max_bytes: int) -> Iterator[tuple[TensorEntry, Tensor, Tensor]]:
    """(entry, symbols, bf16 scales) of each tensor that is not empty and that `frame` has as few-bit codes."""
    view = memoryview(frame).cast("B")
    header = read_header(view, max_bytes=max_bytes)
    for entry, pieces in read_pieces(view, header):
        if entry.encoding in ALPHABETS and pieces:
            parts = list(_read_segments(entry, pieces, ALPHABETS[entry.encoding]))
            yield (
                entry,
                torch.cat([symbols for _, symbols in parts]),
                torch.cat([scales for scales, _ in parts]),
            )


def _decode_keyframe(view: memoryview, header: FrameHeader) -> Reference:
    tensors: dict[str, Tensor] = {}
    for entry, pieces in read_pieces(view, header):
        tensors[entry.name] = tensor = torch.empty(entry.shape, dtype=entry.wire_dtype)
        if entry.encoding == INT8:
            _read_int8(entry, pieces, tensor.view(-1))
        else:
            _read_exact(entry, pieces, tensor)
        largest_magnitude(entry.name, tensor)
    dtypes = {entry.name: entry.dtype for entry in header.entries}
    return Reference(header.step, tensors, dtypes, header.aliases, header.checksum)


def _check_base(header: FrameHeader, base: Reference | None) -> Reference:
    if base is None or header.base != (base.step, base.checksum):
        raise ChecksumError("a delta frame's base is not what its receiver holds")
    if list(base.tensors) != [entry.name for entry in header.entries] or base.aliases != header.aliases:
        raise MalformedError("a delta frame holds other tensors than its base")
    for entry in header.entries:
        held = base.tensors[entry.name]
        is_replaced = entry.encoding == EXACT
        if (
            tuple(held.shape) != entry.shape
            or base.dtypes[entry.name] != entry.dtype
            or not (is_replaced or held.dtype == entry.wire_dtype)
        ):
            raise MalformedError(f"a delta frame has another shape or dtype for {entry.name!r} than its base")
    return base


def _apply_delta(view: memoryview, header: FrameHeader, reference: Reference) -> None:
    quantizer = Quantizer(torch.device("cpu"))
    for entry, pieces in read_pieces(view, header):
        if entry.encoding == SAME:
            continue
        if entry.encoding == EXACT:
            tensor = torch.empty(entry.shape, dtype=entry.wire_dtype)
            _read_exact(entry, pieces, tensor)
            reference.tensors[entry.name] = tensor
            largest_magnitude(entry.name, tensor)
            continue
        tensor = reference.tensors[entry.name]
        held = tensor.view(-1)
        if entry.encoding == LOSSLESS:
            _read_lossless(pieces, held)
            largest_magnitude(entry.name, tensor)
            continue
        alphabet = ALPHABETS[entry.encoding]
        for index, (scales, symbols) in enumerate(_read_segments(entry, pieces, alphabet)):
            segment = slice(index * SEGMENT_ELEMENTS, (index + 1) * SEGMENT_ELEMENTS)
            quantizer.decode(symbols, scales, held[segment], alphabet)


def _read_exact(entry: TensorEntry, pieces: Sequence[memoryview], tensor: Tensor) -> None:
    raw = raw_bytes(tensor).numpy()
    for index, piece in enumerate(pieces):
        part = raw[index * MAX_RAW_BYTES : (index + 1) * MAX_RAW_BYTES]
        decompress_raw(piece, part, entry.wire_dtype.itemsize)
    if entry.wire_dtype == torch.bool and entry.num_bytes and raw.max() > 1:
        raise MalformedError(f"a frame's boolean tensor {entry.name!r} holds other values")


def _read_int8(entry: TensorEntry, pieces: Sequence[memoryview], into: Tensor) -> None:
    for index in range(len(pieces) // 2):
        segment = into[index * SEGMENT_ELEMENTS : (index + 1) * SEGMENT_ELEMENTS]
        scales = _read_scales(entry, pieces[2 * index], num_blocks(len(segment)))
        codes = np.empty(len(segment), np.uint8)
        decompress_raw(pieces[2 * index + 1], codes, 1)
        decode_int8(torch.from_numpy(codes.view(np.int8)), scales, segment)


def _read_lossless(pieces: Sequence[memoryview], held: Tensor) -> None:
    is_short = held.element_size() == 2
    for index, piece in enumerate(pieces):
        segment = held[index * SEGMENT_ELEMENTS : (index + 1) * SEGMENT_ELEMENTS]
        zigzag = np.empty(len(segment), np.uint16 if is_short else np.uint32)
        decompress_symbols(piece, zigzag)
        decode_lossless(torch.from_numpy(zigzag.view(np.int16 if is_short else np.int32)), segment)


def _read_segments(
    entry: TensorEntry, pieces: Sequence[memoryview], alphabet: Alphabet
) -> Iterator[tuple[Tensor, Tensor]]:
    """(bf16 scales, symbols) of each segment."""
    for index in range(len(pieces) // CODE_PIECES):
        num_elements = min(SEGMENT_ELEMENTS, entry.num_elements - index * SEGMENT_ELEMENTS)
        scales_piece, mask_piece, others_piece = pieces[CODE_PIECES * index : CODE_PIECES * (index + 1)]
        scales = _read_scales(entry, scales_piece, num_blocks(num_elements))
        symbols = np.empty(len(scales) * alphabet.block_symbols, np.uint8)
        mask = np.empty(len(symbols) // 8, np.uint8)
        decompress_symbols(mask_piece, mask)
        others = np.empty(count_others(mask), np.uint8)
        decompress_symbols(others_piece, others)
        join_zeros(mask, others, alphabet.zero_symbol, symbols)
        yield scales, torch.from_numpy(symbols)


def _read_scales(entry: TensorEntry, piece: memoryview, num_scales: int) -> Tensor:
    bits = np.empty(num_scales, np.uint16)
    decompress_symbols(piece, bits)
    scales = torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)
    if not bool(torch.isfinite(scales).all()):
        raise NonFiniteError(f"a frame's tensor {entry.name!r} has scales that are NaN or infinite")
    return scales
