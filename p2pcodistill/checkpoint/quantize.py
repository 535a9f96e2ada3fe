"""Numbers to few-bit codes and back, block by block; the arithmetic on which sender and receivers must agree to the bit.

A delta frame holds, for each tensor, codes q and block scales s such that reference <- round(reference + q * s). Scales are
bf16 and made by the encoder alone; codes have at most 8 bits: so q * s is exact in fp32, the sum is rounded once, and CPU or
GPU, fused or not, give the same bits. Nothing here is ever compiled.

*Dead zone*: a difference below the threshold is sent as zero and stays for the next frames; the closed loop sees to it that
it is not lost. The threshold is the same for a whole tensor, so that bits go where the change is; ternary codes have a scale
for each block.

Work is done in chunks that stay in the processor's cache: it is memory that limits the speed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pcodistill.errors import MalformedError

BLOCK_ELEMENTS = 1024
"""Elements that share a scale."""
SEGMENT_ELEMENTS = 1 << 22
"""Elements of a tensor that are encoded into one piece of scales and one of codes: what bounds the memory used."""
CHUNK_ELEMENTS = 1 << 17
DEAD_ZONE = 0.6
"""Of codes with several levels, in steps: below half a step more is lost in bits than is won in precision."""
INT8_LEVELS = 127
_MAX_REACHES = 4


@dataclass(frozen=True, slots=True)
class Alphabet:
    """Codes from -num_levels to num_levels, of which `num_digits` travel as one symbol of a byte."""

    name: str
    num_levels: int
    num_digits: int

    @property
    def base(self) -> int:
        """How many codes there are."""
        return 2 * self.num_levels + 1

    @property
    def num_symbols(self) -> int:
        """How many symbols there are."""
        return int(self.base**self.num_digits)

    @property
    def zero_symbol(self) -> int:
        """The symbol whose digits are all zero."""
        return self.num_symbols // 2

    @property
    def block_symbols(self) -> int:
        """Symbols of a block."""
        return BLOCK_ELEMENTS // self.num_digits


ALPHABETS = {
    alphabet.name: alphabet
    for alphabet in (
        Alphabet("ternary", 1, 4),
        Alphabet("3-bit", 3, 2),
        Alphabet("4-bit", 7, 2),
        Alphabet("8-bit", INT8_LEVELS, 1),
    )
}
_MAX_OF = {dtype: torch.finfo(dtype).max for dtype in (torch.float16, torch.bfloat16, torch.float32)}


def num_blocks(num_elements: int) -> int:
    """Blocks of so many elements; the last one may be a short one."""
    return -(-num_elements // BLOCK_ELEMENTS)


class Quantizer:
    """Codes segments of tensors. It owns the buffers that a chunk needs, so that nothing is allocated on the way."""

    def __init__(self, device: torch.device) -> None:
        def buffer(dtype: torch.dtype = torch.float32) -> Tensor:
            return torch.zeros(CHUNK_ELEMENTS, dtype=dtype, device=device)

        # Few, so that all of them stay in the cache: what is worked out takes the place of what it was made of.
        self._base, self._delta, self._codes = buffer(), buffer(), buffer()
        self._int8 = buffer(torch.int8)
        self._narrow: dict[torch.dtype, Tensor] = {}

    def encode(
        self, weights: Tensor, reference: Tensor, alphabet: Alphabet, step: float
    ) -> tuple[Tensor, Tensor]:
        """Codes of `weights` - `reference` (flat, of one segment), by which `reference` is moved in place.

        `step` is the dead zone's threshold for ternary codes, else the distance of two levels. Returns the bf16 scales, one
        a block, and the uint8 symbols; the last block is filled up with zeros.
        """
        num_elements = weights.numel()
        num_scales = num_blocks(num_elements)
        scales = torch.empty(num_scales, dtype=torch.bfloat16, device=weights.device)
        symbols = torch.empty((num_scales, alphabet.block_symbols), dtype=torch.uint8, device=weights.device)
        quantize = self._ternary if alphabet.num_levels == 1 else self._uniform
        for start in range(0, num_elements, CHUNK_ELEMENTS):
            size = min(CHUNK_ELEMENTS, num_elements - start)
            held = reference[start : start + size]
            blocks = slice(start // BLOCK_ELEMENTS, (start + CHUNK_ELEMENTS) // BLOCK_ELEMENTS)
            num_padded = self._load(held)
            delta = self._delta[:num_padded]
            delta[size:] = 0
            delta[:size].copy_(self._round(weights[start : start + size], reference.dtype))
            delta.sub_(self._base[:num_padded])
            quantize(delta, alphabet, step, scales[blocks])
            self._move(held, scales[blocks])
            _pack(self._int8[:num_padded], alphabet, symbols[blocks].view(-1))
        return scales, symbols.view(-1)

    def decode(self, symbols: Tensor, scales: Tensor, reference: Tensor, alphabet: Alphabet) -> None:
        """The inverse of `encode`: moves `reference` (flat, of one segment) in place. Raises MalformedError."""
        if len(symbols) and int(symbols.max()) >= alphabet.num_symbols:
            raise MalformedError("a frame holds a code that its alphabet does not have")
        rows = symbols.view(len(scales), alphabet.block_symbols)
        for start in range(0, reference.numel(), CHUNK_ELEMENTS):
            held = reference[start : start + CHUNK_ELEMENTS]
            blocks = slice(start // BLOCK_ELEMENTS, (start + CHUNK_ELEMENTS) // BLOCK_ELEMENTS)
            num_padded = self._load(held)
            _unpack(rows[blocks].view(-1), alphabet, self._codes[:num_padded])
            self._move(held, scales[blocks])

    def _round(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """A chunk of the weights as the reference could hold it: what differs by less has not moved."""
        if weights.dtype == dtype:
            return weights
        if dtype not in self._narrow:
            self._narrow[dtype] = torch.empty(CHUNK_ELEMENTS, dtype=dtype, device=weights.device)
        return self._narrow[dtype][: len(weights)].copy_(weights)

    def _load(self, reference: Tensor) -> int:
        """Put a chunk of the reference into the buffer as fp32; its length, filled up with zeros to whole blocks."""
        size = reference.numel()
        num_padded = num_blocks(size) * BLOCK_ELEMENTS
        self._base[:size].copy_(reference)
        self._base[size:num_padded] = 0
        return num_padded

    def _ternary(self, delta: Tensor, alphabet: Alphabet, threshold: float, scales: Tensor) -> None:
        """Sign codes of what is above the threshold; a block's scale is the mean of what it keeps."""
        size = delta.numel()
        codes, int8 = self._codes[:size], self._int8[:size]
        torch.ops.aten.hardshrink.out(delta, threshold, out=codes)
        int8.copy_(codes.sign_())
        blocks = codes.view(-1, BLOCK_ELEMENTS)
        sums = torch.linalg.vecdot(delta.view(-1, BLOCK_ELEMENTS), blocks)
        scales.copy_(sums.div_(torch.linalg.vecdot(blocks, blocks).clamp_(min=1)))

    def _uniform(self, delta: Tensor, alphabet: Alphabet, step: float, scales: Tensor) -> None:
        """Codes of several levels; what is beyond the last level waits for the next frames, as what is too small does.

        So that it does not wait for long, levels are further apart in a block whose largest difference is far beyond.
        """
        codes = self._codes[: len(delta)]
        blocks = delta.view(-1, BLOCK_ELEMENTS)
        scales.copy_((blocks.abs().amax(1) / (_MAX_REACHES * alphabet.num_levels)).clamp_(min=step))
        steps = scales.float().clamp_(min=torch.finfo(torch.float32).tiny)[:, None]
        blocks.div_(steps)
        torch.sign(delta, out=codes)
        codes.mul_(delta.abs_().add_(1 - DEAD_ZONE).floor_().clamp_(max=alphabet.num_levels))
        codes.add_(0.0)  # no code is -0.0, which would not add to a reference of -0.0 what receivers add
        scales.mul_(codes.view(-1, BLOCK_ELEMENTS).any(1))
        self._int8[: len(delta)].copy_(codes)

    def _move(self, reference: Tensor, scales: Tensor) -> None:
        """reference <- round(reference + codes * scales); what is beyond the dtype's range stays at its edge."""
        num_padded = scales.numel() * BLOCK_ELEMENTS
        moved = self._base[:num_padded]
        codes = self._codes[:num_padded].view(-1, BLOCK_ELEMENTS)
        moved.view(-1, BLOCK_ELEMENTS).addcmul_(codes, scales.float()[:, None])
        largest = _MAX_OF[reference.dtype]
        reference.copy_(moved.clamp_(-largest, largest)[: reference.numel()])


# --- symbols -----------------------------------------------------------------------------------------------

# Four ternary digits in the bytes of one word, times this: the highest byte is the digits' number in base 3. No carry
# comes from below, since the sums there stay under 256.
_TERNARY_WORD = 1 << 24 | 3 << 16 | 9 << 8 | 27


def _pack(codes: Tensor, alphabet: Alphabet, symbols: Tensor) -> None:
    """Symbols of int8 codes, which are spoilt: the digits of a symbol, each plus `num_levels`, lowest first."""
    digits = codes.add_(alphabet.num_levels).view(torch.uint8)
    if alphabet.num_digits == 1:
        symbols.copy_(digits)
    elif alphabet.num_digits == 2:
        pairs = digits.view(-1, 2)
        torch.add(pairs[:, 0], pairs[:, 1], alpha=alphabet.base, out=symbols)
    else:
        words = codes.view(torch.int32)
        symbols.copy_(words.mul_(_TERNARY_WORD).bitwise_right_shift_(24))


def _unpack(symbols: Tensor, alphabet: Alphabet, codes: Tensor) -> None:
    """The inverse of `_pack`, as fp32."""
    if symbols.device.type == "cpu":
        # A row of the table is one number to numpy, which looks it up at memory speed.
        table = _TABLES[alphabet.name]
        rows = codes.numpy().view(table.dtype)
        np.take(table, symbols.numpy().astype(np.intp), out=rows, mode="clip")
    else:
        digits = torch.from_numpy(_TABLES[alphabet.name].view(np.float32)).view(-1, alphabet.num_digits)
        codes.copy_(digits.to(symbols.device)[symbols.long()].view(-1))


def _make_table(alphabet: Alphabet) -> NDArray[Any]:
    """The fp32 codes of every symbol, a row seen as one number of that many bytes."""
    symbols = np.arange(256)
    digits = [symbols // alphabet.base**index % alphabet.base for index in range(alphabet.num_digits)]
    codes = (np.stack(digits, axis=1) - alphabet.num_levels).astype(np.float32)
    row_dtype = {1: np.float32, 2: np.float64, 4: np.complex128}[alphabet.num_digits]
    return np.ascontiguousarray(codes).view(row_dtype).reshape(-1)


_TABLES = {name: _make_table(alphabet) for name, alphabet in ALPHABETS.items()}


# --- keyframes of 8 bits -------------------------------------------------------------------------------------


def encode_int8(weights: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, bf16 scales) of a flat segment of a keyframe: 255 levels up to each block's largest magnitude."""
    padded = torch.nn.functional.pad(weights.float(), (0, -len(weights) % BLOCK_ELEMENTS))
    blocks = padded.view(-1, BLOCK_ELEMENTS)
    scales = (blocks.abs().amax(1) / INT8_LEVELS).bfloat16()
    steps = scales.float().clamp_(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = blocks.div_(steps).round_().clamp_(-INT8_LEVELS, INT8_LEVELS).to(torch.int8)
    return codes.view(-1)[: len(weights)], scales


def decode_int8(codes: Tensor, scales: Tensor, into: Tensor) -> None:
    """The inverse of `encode_int8`, rounded to the dtype of `into` (flat, of one segment)."""
    padded = torch.nn.functional.pad(codes.float(), (0, -len(codes) % BLOCK_ELEMENTS))
    padded.view(-1, BLOCK_ELEMENTS).mul_(scales.float()[:, None])
    largest = _MAX_OF[into.dtype]
    into.copy_(padded.clamp_(-largest, largest)[: len(into)])


# --- lossless --------------------------------------------------------------------------------------------------


def encode_lossless(target: Tensor, reference: Tensor) -> Tensor:
    """How many representable numbers lie from `reference` to `target` (flat, same float dtype), zigzag, as integers."""
    steps = _ordinal(target) - _ordinal(reference)
    return (steps << 1) ^ (steps >> (8 * steps.element_size() - 1))


def decode_lossless(zigzag: Tensor, reference: Tensor) -> None:
    """The inverse of `encode_lossless`: moves `reference` in place."""
    num_bits = 8 * zigzag.element_size()
    steps = ((zigzag >> 1) & (2 ** (num_bits - 1) - 1)) ^ -(zigzag & 1)
    ordinals = _ordinal(reference) + steps
    # The ordinal of a negative number counts down from -1: its own inverse, up to the sign bit.
    reference.view(ordinals.dtype).copy_(
        torch.where(ordinals < 0, ordinals ^ (2 ** (num_bits - 1) - 1), ordinals)
    )


def _ordinal(numbers: Tensor) -> Tensor:
    """Integers in the order of the numbers, one apart for neighbours; modulo the width."""
    bits = numbers.view(torch.int16 if numbers.element_size() == 2 else torch.int32)
    return torch.where(bits < 0, bits ^ (2 ** (8 * bits.element_size() - 1) - 1), bits)
