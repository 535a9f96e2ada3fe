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
from p2pcodistill.checkpoint.entries import (
    CODE_PIECES,
    EXACT,
    INT8,
    LOSSLESS,
    SAME,
    Bundle,
    TensorEntry,
)
from p2pcodistill.checkpoint.frames import FrameHeader, read_header, read_pieces
from p2pcodistill.checkpoint.quantize import (
    ALPHABETS,
    SEGMENT_ELEMENTS,
    Alphabet,
    Quantizer,
    decode_int8,
    decode_lossless,
    num_blocks,
)
from p2pcodistill.checkpoint.reference import Reference, checksum_tensors, combine_checksums, raw_bytes
from p2pcodistill.checkpoint.scan import check_finite, empty_tensor, largest_magnitude, scan_tensor
from p2pcodistill.checkpoint.snapshot import Schema, dtype_name
from p2pcodistill.errors import ChecksumError, MalformedError, NonFiniteError


def decode_frame(
    frame: bytes | memoryview, base: Reference | None, *, max_bytes: int, schema: Schema | None = None
) -> Reference:
    """The reference that `frame` leads to: a new one for a keyframe; `base` itself, moved in place, for a delta frame.

    `max_bytes` caps the decoded tensors together. With a `schema`, a keyframe of another model is refused by its header:
    tens of thousands of tiny tensors take seconds to decode. Raises MalformedError, OversizedError, SchemaMismatchError,
    ChecksumError or NonFiniteError, and nothing else on account of `frame`; `base` is spoilt then, unless the error is a
    SchemaMismatchError, or a ChecksumError for a frame that has another base.
    """
    view = memoryview(frame).cast("B")
    header = read_header(view, max_bytes=max_bytes)
    if header.base is None:
        if schema is not None:
            schema.check(_schema_of(header))
        reference = _decode_keyframe(view, header)
    else:
        reference = _check_base(header, base)
        _apply_delta(view, header, reference)
        reference.step, reference.checksum = header.step, checksum_tensors(reference.tensors.values())
    if reference.checksum != header.checksum:
        raise ChecksumError("a frame's tensors do not match its checksum")
    return reference


def read_codes(frame: bytes | memoryview, *, max_bytes: int) -> Iterator[tuple[TensorEntry, Tensor, Tensor]]:
    """(entry, symbols, bf16 scales) of each tensor that is not empty and that `frame` has as few-bit codes."""
    view = memoryview(frame).cast("B")
    header = read_header(view, max_bytes=max_bytes)
    for bundle, pieces in read_pieces(view, header):
        if bundle.encoding in ALPHABETS and pieces:
            alphabet = ALPHABETS[bundle.encoding]
            parts = list(_read_segments(bundle.whole, pieces, alphabet))
            scales = torch.cat([scales for scales, _ in parts])
            symbols = torch.cat([symbols for _, symbols in parts])
            for entry, blocks in _split_blocks(bundle):
                rows = symbols.view(-1, alphabet.block_symbols)[blocks]
                yield entry, rows.view(-1), scales[blocks]


def _decode_keyframe(view: memoryview, header: FrameHeader) -> Reference:
    tensors: dict[str, Tensor] = {}
    checksums: list[int] = []
    for bundle, pieces in read_pieces(view, header):
        (entry,) = bundle.members
        tensors[entry.name] = tensor = empty_tensor(entry.shape, entry.wire_dtype)
        if entry.encoding == INT8:
            _read_int8(entry, pieces, tensor.view(-1))
        else:
            _read_exact(entry, pieces, tensor)
        scan = scan_tensor(tensor)
        check_finite(entry.name, scan.largest)
        checksums.append(scan.checksum)
    dtypes = {entry.name: entry.dtype for entry in header.entries}
    return Reference(header.step, tensors, dtypes, header.aliases, combine_checksums(checksums))


def _schema_of(header: FrameHeader) -> Schema:
    specs = {entry.name: (dtype_name(entry.dtype), entry.shape) for entry in header.entries}
    return Schema(specs, header.aliases)


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
    for bundle, pieces in read_pieces(view, header):
        if bundle.encoding == SAME:
            continue
        if bundle.encoding == EXACT:
            _replace_exact(bundle, pieces, reference)
        elif bundle.encoding == LOSSLESS:
            _move_lossless(bundle, pieces, reference)
        else:
            _move_by_codes(bundle, pieces, reference, quantizer)


def _replace_exact(bundle: Bundle, pieces: Sequence[memoryview], reference: Reference) -> None:
    whole = torch.empty(bundle.whole.shape, dtype=bundle.whole.wire_dtype)
    _read_exact(bundle.whole, pieces, whole)
    if len(bundle.members) == 1:
        parts = [whole]
    else:
        sizes = [entry.num_elements for entry in bundle.members]
        parts = [part.clone() for part in whole.split_with_sizes(sizes)]
    for entry, part in zip(bundle.members, parts, strict=True):
        reference.tensors[entry.name] = part.view(entry.shape)
        largest_magnitude(entry.name, part)


def _move_lossless(bundle: Bundle, pieces: Sequence[memoryview], reference: Reference) -> None:
    held = [reference.tensors[entry.name].view(-1) for entry in bundle.members]
    whole = held[0] if len(held) == 1 else torch.cat(held)
    _read_lossless(pieces, whole)
    for entry, tensor, part in zip(
        bundle.members, held, whole.split_with_sizes([*map(len, held)]), strict=True
    ):
        if len(held) > 1:
            tensor.copy_(part)
        largest_magnitude(entry.name, tensor)


def _move_by_codes(
    bundle: Bundle, pieces: Sequence[memoryview], reference: Reference, quantizer: Quantizer
) -> None:
    alphabet = ALPHABETS[bundle.encoding]
    segments = _read_segments(bundle.whole, pieces, alphabet)
    if len(bundle.members) == 1:
        held = reference.tensors[bundle.members[0].name].view(-1)
        for index, (scales, symbols) in enumerate(segments):
            segment = slice(index * SEGMENT_ELEMENTS, (index + 1) * SEGMENT_ELEMENTS)
            quantizer.decode(symbols, scales, held[segment], alphabet)
        return
    ((scales, symbols),) = segments
    for entry, blocks in _split_blocks(bundle):
        held = reference.tensors[entry.name].view(-1)
        own = symbols.view(-1, alphabet.block_symbols)[blocks].view(-1)
        quantizer.decode(own, scales[blocks], held, alphabet)


def _split_blocks(bundle: Bundle) -> Iterator[tuple[TensorEntry, slice]]:
    """Each tensor of a bundle of codes, and which blocks of the whole are its own."""
    start = 0
    for entry in bundle.members:
        blocks = slice(start, start + num_blocks(entry.num_elements))
        yield entry, blocks
        start = blocks.stop


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
