"""What delta frames' speed is compared with: the ternary codec that one would write first, in blocked torch and NumPy.

The same arithmetic as the package's (dead zone, a scale for each block, closed loop), but one operation after the other with
new memory for each, five codes a byte, and zstd at level 1. Its speed is a yardstick that is the same on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import blosc2
import numpy as np
import torch
from torch import Tensor

from p2pcodistill.checkpoint.snapshot import Snapshot

BLOCK_ELEMENTS = 1024
SEGMENT_ELEMENTS = 1000 * BLOCK_ELEMENTS  # whole blocks, and whole bytes of codes
DEAD_ZONE_RMS = 1.6
_CODES_IN_BYTE = 5
_PLACES = np.array([1, 3, 9, 27, 81], np.uint8)
_DIGITS = (np.arange(3**_CODES_IN_BYTE)[:, None] // _PLACES % 3 - 1).astype(np.float32)


@dataclass(frozen=True, slots=True)
class Segment:
    """A scale for each block, and the compressed codes."""

    scales: Tensor
    codes: bytes


def flatten(snapshot: Snapshot) -> Tensor:
    """All weights as one vector, but for the last few, which would not fill a segment."""
    flat = torch.cat([tensor.view(-1) for tensor in snapshot.tensors.values()])
    return flat[: len(flat) // SEGMENT_ELEMENTS * SEGMENT_ELEMENTS]


def encode(weights: Tensor, reference: Tensor) -> list[Segment]:
    """Ternary codes of `weights` - `reference` (fp16), by which `reference` is moved in place."""
    frame = []
    for target, held in zip(weights.split(SEGMENT_ELEMENTS), reference.split(SEGMENT_ELEMENTS), strict=True):
        delta = (target - held.float()).view(-1, BLOCK_ELEMENTS)
        is_kept = delta.abs() > DEAD_ZONE_RMS * delta.square().mean(1, keepdim=True).sqrt()
        kept = delta * is_kept
        scales = (kept.abs().sum(1) / is_kept.sum(1).clamp(min=1)).bfloat16()
        codes = kept.sign()
        held.copy_((held.float().view_as(codes) + codes * scales.float()[:, None]).view(-1))
        digits = (codes + 1).to(torch.uint8).view(-1).numpy().reshape(-1, _CODES_IN_BYTE)
        frame.append(Segment(scales, _compress((digits * _PLACES).sum(1, dtype=np.uint8))))
    return frame


def decode(frame: list[Segment], reference: Tensor) -> None:
    """The inverse of `encode`: moves `reference` in place."""
    for segment, held in zip(frame, reference.split(SEGMENT_ELEMENTS), strict=True):
        packed = np.frombuffer(blosc2.decompress2(segment.codes, nthreads=1), np.uint8)
        codes = torch.from_numpy(_DIGITS[packed]).view(-1, BLOCK_ELEMENTS)
        held.copy_((held.float().view_as(codes) + codes * segment.scales.float()[:, None]).view(-1))


def _compress(packed: np.ndarray) -> bytes:
    return blosc2.compress2(
        packed, typesize=1, codec=blosc2.Codec.ZSTD, clevel=1, filters=[blosc2.Filter.NOFILTER],
        filters_meta=[0], nthreads=1,
    )  # fmt: skip
