"""The fields of messages, as anyone may have written them: each function checks one, and returns what it stands for.

They raise MalformedError for what is no such field, OversizedError for what is over a cap, and nothing else.
"""

from __future__ import annotations

import itertools
from typing import TypeVar

from p2pcodistill.checkpoint.chain import MAX_CHAIN_FRAMES
from p2pcodistill.checkpoint.manifest import DIGEST_BYTES, MAX_COUNTER, MAX_NAME_CHARS, Version
from p2pcodistill.errors import MalformedError, OversizedError

_T = TypeVar("_T")


def exactly(value: object, kind: type[_T], what: str) -> _T:
    """A value of this very type: a bool is no int here."""
    if type(value) is not kind:
        raise MalformedError(f"a {what} must be of type {kind.__name__}")
    return value


def number(value: object, what: str) -> int:
    """A whole number that is not negative."""
    checked = exactly(value, int, what)
    if not 0 <= checked <= MAX_COUNTER:
        raise MalformedError(f"a {what} must be between 0 and {MAX_COUNTER}")
    return checked


def raw(value: object, num_bytes: int, what: str) -> bytes:
    """So many bytes."""
    checked = exactly(value, bytes, what)
    if len(checked) != num_bytes:
        raise MalformedError(f"a {what} has {num_bytes} bytes, not {len(checked)}")
    return checked


def text(value: object, max_chars: int, what: str) -> str:
    """A text that can be shown on somebody's terminal."""
    checked = exactly(value, str, what)
    if len(checked) > max_chars:
        raise OversizedError(f"a {what} of {len(checked)} characters is over the cap of {max_chars}")
    if not checked.isprintable():
        raise MalformedError(f"a {what} must be printable")
    return checked


def frame_id(value: object) -> str:
    """A frame's name, in hexadecimal digits."""
    return raw(value, DIGEST_BYTES, "frame id").hex()


def origin(value: object) -> str:
    """The name of a member."""
    return text(value, MAX_NAME_CHARS, "origin's name")


def held(incarnation: object, step: object) -> Version | None:
    """The version that somebody holds; None, in both fields, for none."""
    if incarnation is None and step is None:
        return None
    return Version(number(incarnation, "held incarnation"), number(step, "held step"))


def num_more(value: object) -> int | None:
    """How many announcements of a path follow; None: it is not part of one."""
    if value is None:
        return None
    checked = number(value, "number of frames that follow")
    if checked >= MAX_CHAIN_FRAMES:
        raise MalformedError(f"a path has at most {MAX_CHAIN_FRAMES} frames")
    return checked


def indices(value: object) -> tuple[int, ...]:
    """The indices of chunks, ascending, at least one."""
    checked = tuple(number(index, "chunk index") for index in exactly(value, list, "list of chunk indices"))
    if not checked or any(a >= b for a, b in itertools.pairwise(checked)):
        raise MalformedError("wanted chunk indices must be ascending, and at least one")
    return checked


def bitmap(value: object, max_bytes: int) -> int:
    """A set of chunks, bit i for chunk i."""
    checked = exactly(value, bytes, "bitmap of chunks")
    if len(checked) > max_bytes:
        raise OversizedError(f"a bitmap of {len(checked)} bytes is over the cap of {max_bytes}")
    return int.from_bytes(checked, "little")
