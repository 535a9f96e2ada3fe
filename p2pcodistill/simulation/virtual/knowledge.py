"""Who knows of whom: what a synthetic checkpoint carries in place of weights.

A site's knowledge is one number for each member: the newest of that member's versions that went into it, counted from 1,
and over how many sites it came. Of two ways the newer version wins, then the shorter way; so knowledge merges by taking the
larger number. It travels as bytes, and is checked and hashed like any checkpoint.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Knowledge: TypeAlias = npt.NDArray[np.uint32]
"""A number for each member, in member order: 0 for nothing, else version * 256 + 255 - hops."""

MAX_HOPS = 255
MAX_VERSION = (1 << 24) - 1
BYTES_PER_MEMBER = 4
_WIRE_DTYPE = np.dtype("<u4")
_MAX_REMEMBERED = 2048


def nothing(num_members: int) -> Knowledge:
    """That of a site that has yet to begin."""
    return np.zeros(num_members, np.uint32)


def learn_own(knowledge: Knowledge, member: int, version: int) -> None:
    """Note that `member` itself is at `version`."""
    assert 0 < version <= MAX_VERSION
    knowledge[member] = version << 8 | MAX_HOPS


def learn(knowledge: Knowledge, other: Knowledge) -> None:
    """Add what `other` has of newer versions, or by shorter ways."""
    np.maximum(knowledge, other, out=knowledge)


def pass_on(knowledge: Knowledge) -> Knowledge:
    """What a student makes of its teacher's: everything has come one site further."""
    passed: Knowledge = np.subtract(knowledge, (knowledge & MAX_HOPS).astype(np.bool_))
    return passed


def versions_of(knowledge: Knowledge) -> Knowledge:
    """The version of each member, 0 for none."""
    versions: Knowledge = np.right_shift(knowledge, np.uint32(8))
    return versions


def hops_of(knowledge: Knowledge) -> Knowledge:
    """Over how many sites each came, where there is any."""
    hops: Knowledge = np.subtract(np.uint32(MAX_HOPS), knowledge & MAX_HOPS)
    return hops


def encode_knowledge(knowledge: Knowledge, num_bytes: int) -> bytes:
    """A frame of `num_bytes`, at least BYTES_PER_MEMBER for each member, the rest zeros."""
    data = knowledge.astype(_WIRE_DTYPE).tobytes()
    assert len(data) <= num_bytes
    return data.ljust(num_bytes, b"\0")


def decode_knowledge(data: bytes, num_members: int) -> Knowledge:
    """The inverse of `encode_knowledge`."""
    return np.frombuffer(data, _WIRE_DTYPE, num_members).astype(np.uint32, copy=False)


@lru_cache(maxsize=_MAX_REMEMBERED)
def take_over(data: bytes, num_members: int) -> Knowledge:
    """What a student makes of its teacher's frame: decoded and passed on. It is remembered, and not to be written to, for
    all students of one teacher make the same of it."""
    taken = pass_on(decode_knowledge(data, num_members))
    taken.setflags(write=False)
    return taken
