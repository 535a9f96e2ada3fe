"""What a frame says of each of its tensors, and which tensors share pieces; a part of FORMAT.md in code.

Small tensors of a delta frame are *joined*: an entropy coder's tables and a chunk's header cost as much for a few hundred
numbers as for a million, so those of one encoding and wire dtype travel as if they were one tensor. Which these are follows
from the entries alone, by the same function on both sides.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from p2pcodistill.checkpoint.coding import MAX_RAW_BYTES
from p2pcodistill.checkpoint.quantize import ALPHABETS, BLOCK_ELEMENTS, SEGMENT_ELEMENTS, num_blocks

EXACT = "exact"
"""All of a tensor's bytes in its wire dtype."""
INT8 = "int8"
"""Of a keyframe: 8-bit codes and block scales."""
LOSSLESS = "lossless"
"""Of a delta frame: how many representable numbers each element has moved."""
SAME = "same"
"""Of a delta frame: nothing; the tensor is as it was."""
KEYFRAME_ENCODINGS = frozenset({EXACT, INT8})
DELTA_ENCODINGS = frozenset({EXACT, LOSSLESS, SAME, *ALPHABETS})
CODABLE_DTYPES = frozenset({torch.float16, torch.bfloat16, torch.float32})
"""Wire dtypes of tensors that may travel as codes or losslessly as a difference."""
CODE_PIECES = 3
"""Of a segment of few-bit codes: the scales, where symbols are not zero, and those symbols."""
_PIECES_OF_SEGMENT = {LOSSLESS: 1, INT8: 2}

# Found by trial: larger tensors lose more by what their statistics differ than they win by sharing tables.
_SMALL_SIZE = 1 << 18
_FULL_SIZE = 1 << 20


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """How one tensor travels: its dtype at the origin and on the wire, and the bytes of each of its pieces in the body."""

    name: str
    dtype: torch.dtype
    wire_dtype: torch.dtype
    shape: tuple[int, ...]
    encoding: str
    pieces: tuple[int, ...]

    @property
    def num_elements(self) -> int:
        """Of the tensor."""
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        """Of the decoded tensor."""
        return self.num_elements * self.wire_dtype.itemsize

    @property
    def num_wire_bytes(self) -> int:
        """In the frame's body."""
        return sum(self.pieces)

    @property
    def num_pieces(self) -> int:
        """How many pieces a tensor of this encoding and size needs."""
        if self.encoding == SAME:
            return 0
        if self.encoding == EXACT:
            return -(-self.num_bytes // MAX_RAW_BYTES)
        num_segments = -(-self.num_elements // SEGMENT_ELEMENTS)
        return _PIECES_OF_SEGMENT.get(self.encoding, CODE_PIECES) * num_segments


@dataclass(frozen=True, slots=True)
class Bundle:
    """Tensors that share pieces, in the footer's order: several small ones, or just one."""

    members: tuple[TensorEntry, ...]

    @property
    def encoding(self) -> str:
        """Of all of them."""
        return self.members[0].encoding

    @property
    def whole(self) -> TensorEntry:
        """The flat tensor that they make together; in few-bit codes, each is filled up to whole blocks."""
        if len(self.members) == 1:
            return self.members[0]
        first, last = self.members[0], self.members[-1]
        num_elements = sum(map(padded_elements, self.members))
        name = f"{first.name} to {last.name}"
        return TensorEntry(name, last.dtype, last.wire_dtype, (num_elements,), last.encoding, last.pieces)


@dataclass(slots=True)
class _Open:
    members: list[TensorEntry] = field(default_factory=list)
    size: int = 0
    last: int = 0


def join_entries(entries: Sequence[TensorEntry], *, is_joining: bool) -> tuple[Bundle, ...]:
    """The bundles of a frame's entries, in the order of their last members, at which their pieces are.

    A small tensor joins the open bundle of its encoding and wire dtype, and the one that fills it closes it; all others are
    alone, as all are unless `is_joining`. A bundle is never more than a segment, or a raw piece.
    """
    bundles: dict[int, list[TensorEntry]] = {}
    open_bundles: dict[tuple[str, torch.dtype], _Open] = {}
    for index, entry in enumerate(entries):
        if not (is_joining and is_small(entry)):
            bundles[index] = [entry]
            continue
        key = entry.encoding, entry.wire_dtype
        bundle = open_bundles.setdefault(key, _Open())
        bundle.members.append(entry)
        bundle.size += _size(entry)
        bundle.last = index
        if bundle.size >= _FULL_SIZE:
            bundles[index] = open_bundles.pop(key).members
    bundles |= {bundle.last: bundle.members for bundle in open_bundles.values()}
    return tuple(Bundle(tuple(members)) for _, members in sorted(bundles.items()))


def is_small(entry: TensorEntry) -> bool:
    """Whether a tensor of a delta frame is joined with others of its kind."""
    return entry.encoding != SAME and 0 < _size(entry) < _SMALL_SIZE


def padded_elements(entry: TensorEntry) -> int:
    """The elements of a tensor where it is a part of a bundle."""
    is_coded = entry.encoding in ALPHABETS
    return num_blocks(entry.num_elements) * BLOCK_ELEMENTS if is_coded else entry.num_elements


def _size(entry: TensorEntry) -> int:
    """What a bundle is measured by: bytes of raw tensors, else elements."""
    return entry.num_bytes if entry.encoding == EXACT else padded_elements(entry)
