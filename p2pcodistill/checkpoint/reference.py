"""The reference: the tensors that the sender and all receivers of a chain of frames agree on, bit for bit.

A float parameter is fp16 here (or bf16 or fp32, as its keyframe had it), everything else is exact. A delta frame moves the
reference in place; its checksum tells that both sides have moved alike.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pcodistill.checkpoint.scan import MIX, checksum_tensor
from p2pcodistill.checkpoint.snapshot import Schema, dtype_name, hash_schema, num_fp16_bytes


@dataclass(slots=True)
class Reference:
    """A checkpoint as its receivers have it.

    `tensors` are contiguous tensors as they travelled (fp16, fp32, ...: cast them to the model's), `dtypes` those of the
    origin's own; `aliases` maps the name of a tied tensor to the one in `tensors` that holds its values.
    """

    step: int
    tensors: dict[str, Tensor]
    dtypes: dict[str, torch.dtype]
    aliases: dict[str, str]
    checksum: int

    @property
    def schema(self) -> Schema:
        """That of the origin's snapshot."""
        specs = specs_of(self.tensors, self.dtypes)
        return Schema({name: (dtype, shape) for name, dtype, shape in specs}, self.aliases)

    @property
    def schema_hash(self) -> bytes:
        """That of the origin's snapshot."""
        return hash_schema(specs_of(self.tensors, self.dtypes), self.aliases)

    @property
    def num_bytes(self) -> int:
        """Memory of the tensors."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    @property
    def num_fp16_bytes(self) -> int:
        """Bytes of the same tensors with every floating number as raw fp16."""
        return sum(num_fp16_bytes(tensor) for tensor in self.tensors.values())


def specs_of(
    tensors: Mapping[str, Tensor], dtypes: Mapping[str, torch.dtype]
) -> Iterable[tuple[str, str, tuple[int, ...]]]:
    """Name, origin's dtype and shape of each tensor: what a schema hash is made of."""
    return ((name, dtype_name(dtypes[name]), tuple(tensor.shape)) for name, tensor in tensors.items())


def checksum_tensors(tensors: Iterable[Tensor]) -> int:
    """A 64-bit checksum of the tensors' bytes, in order; against mishap, not malice (that is what signatures are for).

    A tensor's bytes, filled up with zeros, are rows of 128 little-endian 64-bit words; with m = w + (w >> 32) (the shift is
    arithmetic), so that the high bits count everywhere, too, r_i the sum of row i's m and c_j that of column j:
    s = sum (2i + 1) r_i + 0x9E3779B97F4A7C15 * sum (2j + 1) c_j, and over the tensors c = c * 0x9E3779B97F4A7C15 + s, all
    modulo 2^64. Integers only, so it is the same on every device.
    """
    return combine_checksums(map(checksum_tensor, tensors))


def combine_checksums(checksums: Iterable[int]) -> int:
    """`checksum_tensors` from those of each tensor, in order."""
    combined = 0
    for checksum in checksums:
        combined = (combined * MIX + checksum) % 2**64
    return combined


def raw_bytes(tensor: Tensor) -> Tensor:
    """The bytes of a contiguous tensor, as a flat uint8 view."""
    return tensor.reshape(-1).view(torch.uint8)
