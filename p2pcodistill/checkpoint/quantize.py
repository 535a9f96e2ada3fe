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

import math
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
CHUNK_ELEMENTS = 1 << 16
_DEVICE_CHUNK_ELEMENTS = 1 << 17  # on an accelerator it is the number of calls that counts
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


class _Buffers:
    """What a chunk needs, cut to its size and seen in every way in which it is used: to make a view costs as much as
    working on some thousand numbers does. There are few, so that all stay in the cache: what is worked out takes the place
    of what it was made of."""

    def __init__(self, num_elements: int, device: torch.device) -> None:
        num_padded = num_blocks(num_elements) * BLOCK_ELEMENTS
        # What the last block is filled up with is zero, and stays it.
        self.base, self.delta, self.codes = (torch.zeros(num_padded, device=device) for _ in range(3))
        self.base_blocks, self.delta_blocks, self.code_blocks = (
            buffer.view(-1, BLOCK_ELEMENTS) for buffer in (self.base, self.delta, self.codes)
        )
        self.int8 = torch.zeros(num_padded, dtype=torch.int8, device=device)
        self.scales = torch.zeros(len(self.base_blocks), device=device)
        self.scale_column = self.scales[:, None]
        self.held, self.moved = self.base[:num_elements], self.delta[:num_elements]
        self.narrow: dict[torch.dtype, Tensor] = {}

    def round(self, weights: Tensor, dtype: torch.dtype) -> Tensor:
        """The chunk's weights in `dtype`."""
        if dtype not in self.narrow:
            self.narrow[dtype] = torch.empty(len(weights), dtype=dtype, device=weights.device)
        return self.narrow[dtype].copy_(weights)


class Quantizer:
    """Codes segments of tensors. It owns the buffers that a chunk needs, so that nothing is allocated on the way."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._chunk_elements = CHUNK_ELEMENTS if device.type == "cpu" else _DEVICE_CHUNK_ELEMENTS
        self._chunk_blocks = self._chunk_elements // BLOCK_ELEMENTS
        self._whole: _Buffers | None = None

    def encode(
        self,
        weights: Tensor,
        reference: Tensor,
        alphabet: Alphabet,
        step: float,
        *,
        largest: float = math.inf,
    ) -> tuple[Tensor, Tensor]:
        """Codes of `weights` - `reference` (flat, of one segment), by which `reference` is moved in place.

        `step` is the dead zone's threshold for ternary codes, else the distance of two levels. What only rounding to the
        reference's dtype takes away has not moved: where the dead zone does not see to that, given that no weight is beyond
        `largest`, weights are rounded first. Returns the bf16 scales, one a block, and the uint8 symbols; the last block is
        filled up with zeros.
        """
        num_scales = num_blocks(weights.numel())
        scales = torch.empty(num_scales, dtype=torch.bfloat16, device=weights.device)
        symbols = torch.empty((num_scales, alphabet.block_symbols), dtype=torch.uint8, device=weights.device)
        threshold = step if alphabet.num_levels == 1 else step / 2
        is_hidden = threshold >= _rounding_error(reference.dtype, largest)
        is_rounding = weights.dtype != reference.dtype and not is_hidden
        quantize = _quantize_ternary if alphabet.num_levels == 1 else _quantize_uniform
        for target, held, chunk_scales, chunk_symbols in zip(
            torch.split(weights, self._chunk_elements),
            torch.split(reference, self._chunk_elements),
            torch.split(scales, self._chunk_blocks),
            torch.split(symbols, self._chunk_blocks),
            strict=True,
        ):
            buffers = self._buffers(len(held))
            if is_rounding:
                target = buffers.round(target, held.dtype)
            buffers.held.copy_(held)
            if target.dtype == torch.float32:
                torch.sub(target, buffers.held, out=buffers.moved)
            else:
                buffers.moved.copy_(target).sub_(buffers.held)
            quantize(buffers, alphabet, step, chunk_scales)
            _move(buffers, chunk_scales, held)
            _pack(buffers.int8, alphabet, chunk_symbols.view(-1))
        return scales, symbols.view(-1)

    def decode(self, symbols: Tensor, scales: Tensor, reference: Tensor, alphabet: Alphabet) -> None:
        """The inverse of `encode`: moves `reference` (flat, of one segment) in place. Raises MalformedError."""
        if len(symbols) and int(symbols.max()) >= alphabet.num_symbols:
            raise MalformedError("a frame holds a code that its alphabet does not have")
        for held, chunk_scales, chunk_symbols in zip(
            torch.split(reference, self._chunk_elements),
            torch.split(scales, self._chunk_blocks),
            torch.split(symbols, self._chunk_blocks * alphabet.block_symbols),
            strict=True,
        ):
            buffers = self._buffers(len(held))
            buffers.held.copy_(held)
            _unpack(chunk_symbols, alphabet, buffers.codes)
            _move(buffers, chunk_scales, held)

    def _buffers(self, num_elements: int) -> _Buffers:
        """Those of whole chunks are kept."""
        if num_elements < self._chunk_elements:
            return _Buffers(num_elements, self._device)
        if self._whole is None:
            self._whole = _Buffers(num_elements, self._device)
        return self._whole


def _rounding_error(dtype: torch.dtype, largest: float) -> float:
    """What a number of at most that magnitude loses at most when it is rounded to `dtype`."""
    limits = torch.finfo(dtype)
    return max(largest, limits.smallest_normal) * limits.eps / 2


def _quantize_ternary(buffers: _Buffers, alphabet: Alphabet, threshold: float, scales: Tensor) -> None:
    """Sign codes of what is above the threshold; a block's scale is the mean of what it keeps."""
    torch.ops.aten.hardshrink.out(buffers.delta, threshold, out=buffers.codes)
    buffers.int8.copy_(buffers.codes.sign_())
    buffers.delta.mul_(buffers.codes)
    sums = buffers.delta_blocks.sum(1)
    torch.mul(buffers.codes, buffers.codes, out=buffers.delta)
    counts = buffers.delta_blocks.sum(1)
    scales.copy_(sums.div_(counts.clamp_(min=1)))


def _quantize_uniform(buffers: _Buffers, alphabet: Alphabet, step: float, scales: Tensor) -> None:
    """Codes of several levels; what is beyond the last level waits for the next frames, as what is too small does.

    So that it does not wait for long, levels are further apart in a block whose largest difference is far beyond.
    """
    delta, codes, blocks = buffers.delta, buffers.codes, buffers.delta_blocks
    scales.copy_((blocks.abs().amax(1) / (_MAX_REACHES * alphabet.num_levels)).clamp_(min=step))
    steps = scales.float().clamp_(min=torch.finfo(torch.float32).tiny)[:, None]
    blocks.div_(steps)
    torch.sign(delta, out=codes)
    codes.mul_(delta.abs_().add_(1 - DEAD_ZONE).floor_().clamp_(max=alphabet.num_levels))
    codes.add_(0.0)  # no code is -0.0, which would not add to a reference of -0.0 what receivers add
    scales.mul_(buffers.code_blocks.any(1))
    buffers.int8.copy_(codes)


def _move(buffers: _Buffers, scales: Tensor, reference: Tensor) -> None:
    """reference <- round(reference + codes * scales); what is beyond the dtype's range stays at its edge."""
    buffers.scales.copy_(scales)
    buffers.base_blocks.addcmul_(buffers.code_blocks, buffers.scale_column)
    largest = _MAX_OF[reference.dtype]
    buffers.base.clamp_(-largest, largest)
    reference.copy_(buffers.held)


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
        np.take(table, symbols.numpy(), out=rows, mode="clip")
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
