"""Tensors to the pieces of a frame, encoding by encoding; what is sent as a difference moves the reference along."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from p2pcodistill.checkpoint.coding import MAX_RAW_BYTES, compress_raw, compress_symbols, split_zeros
from p2pcodistill.checkpoint.frames import FrameWriter
from p2pcodistill.checkpoint.quantize import (
    SEGMENT_ELEMENTS,
    Alphabet,
    Quantizer,
    decode_int8,
    encode_int8,
    encode_lossless,
)
from p2pcodistill.checkpoint.reference import raw_bytes


def write_exact(writer: FrameWriter, wire: Tensor) -> None:
    """The bytes of a tensor as they are."""
    raw = raw_bytes(wire)
    for start in range(0, len(raw), MAX_RAW_BYTES):
        piece = raw[start : start + MAX_RAW_BYTES].cpu().numpy()
        writer.add_piece(compress_raw(piece, wire.dtype.itemsize))


def write_int8(writer: FrameWriter, tensor: Tensor, wire: Tensor) -> None:
    """Codes of `tensor`; `wire` (fp16, of the same shape) is filled with what receivers make of them."""
    weights, decoded = tensor.view(-1), wire.view(-1)
    for start in range(0, len(weights), SEGMENT_ELEMENTS):
        segment = slice(start, start + SEGMENT_ELEMENTS)
        codes, scales = encode_int8(weights[segment])
        decode_int8(codes, scales, decoded[segment])
        writer.add_piece(compress_symbols(_unsigned(scales)))
        writer.add_piece(compress_raw(codes.cpu().numpy().view(np.uint8), 1))


def write_lossless(writer: FrameWriter, tensor: Tensor, reference: Tensor) -> None:
    """How far each element has moved; `reference` becomes `tensor`, rounded to its dtype."""
    weights, held = tensor.view(-1), reference.view(-1)
    for start in range(0, len(weights), SEGMENT_ELEMENTS):
        segment = slice(start, start + SEGMENT_ELEMENTS)
        target = weights[segment].to(held.dtype)
        writer.add_piece(compress_symbols(_unsigned(encode_lossless(target, held[segment]))))
        held[segment] = target


class CodeWriter:
    """Writes differences as few-bit codes, each where its tensor is. It keeps a quantizer for each device it has met."""

    def __init__(self) -> None:
        self._quantizers: dict[torch.device, Quantizer] = {}

    def write(
        self, writer: FrameWriter, tensors: Sequence[tuple[Tensor, Tensor, float, float]], alphabet: Alphabet
    ) -> None:
        """Of (weights, reference, step, the weights' largest magnitude), all flat: one tensor's segments, or joined ones as
        one segment."""
        segments = [tensors]
        if len(tensors) == 1:
            ((weights, held, step, largest),) = tensors
            slices = [
                slice(start, start + SEGMENT_ELEMENTS) for start in range(0, len(weights), SEGMENT_ELEMENTS)
            ]
            segments = [[(weights[part], held[part], step, largest)] for part in slices]
        for parts in segments:
            coded = [
                self._quantizer(weights.device).encode(weights, held, alphabet, step, largest=largest)
                for weights, held, step, largest in parts
            ]
            scales, symbols = (join_flat(arrays) for arrays in zip(*coded, strict=True))
            mask, others = split_zeros(symbols.cpu().numpy(), alphabet.zero_symbol)
            for array in (_unsigned(scales), mask, others):
                writer.add_piece(compress_symbols(array))

    def _quantizer(self, device: torch.device) -> Quantizer:
        if device not in self._quantizers:
            self._quantizers[device] = Quantizer(device)
        return self._quantizers[device]


def join_flat(tensors: Sequence[Tensor]) -> Tensor:
    """The tensors as one flat tensor, where the first one is; a single one is not copied."""
    flat = [tensor.view(-1).to(tensors[0].device) for tensor in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _unsigned(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.unsignedinteger[np._NBit]]]:
    """The bits of a tensor of 2- or 4-byte elements, as unsigned integers."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    return tensor.cpu().numpy().view(np.uint16 if tensor.element_size() == 2 else np.uint32)
