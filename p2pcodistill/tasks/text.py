"""Files of text for the language model: which ones, and how they become held-out text and one shard a site.

Everything is deterministic and needs no randomness: files are ordered by the SHA-256 of their path relative
to their common folder, which mixes them well and does not depend on the machine. Files are split as a whole,
so that no file is both learnt from and evaluated on, nor seen by two sites; with fewer files than shards, or a
single one, byte ranges that end at line ends take their place. What is held out does not depend on the shards.

Text is UTF-8 without NUL bytes; in folders, other files are passed over.
"""

from __future__ import annotations

import codecs
import hashlib
import itertools
import os
import sysconfig
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeAlias

from p2pcodistill.errors import DataError

_NEAR_COPIES = frozenset(
    {"encodings", "lib2to3"}
)  # generated character tables; one boilerplate for many fixers
_SAMPLE_BYTES = 8192
_LINE_SEARCH_BYTES = 4096
# A part that is limited in size draws on this many files where there are enough: one huge file is not a mix.
_MIN_PIECES = 16
# The held-out part takes at most one in this many files (or bytes).
_HELD_OUT_SHARE = 8


ShardBy: TypeAlias = Literal["hash", "path"]
Documents: TypeAlias = tuple[bytes, ...]
"""Texts in UTF-8 that stand for themselves: files, or pieces of them."""


@dataclass(frozen=True, slots=True)
class TextSplit:
    """`held_out_documents` are evaluated on by everyone; `shard_documents` are disjoint, one tuple a site."""

    held_out_documents: Documents
    shard_documents: tuple[Documents, ...]

    @property
    def held_out(self) -> bytes:
        """The held-out documents, joined."""
        return b"".join(self.held_out_documents)

    @property
    def shards(self) -> tuple[bytes, ...]:
        """The documents of each shard, joined."""
        return tuple(map(b"".join, self.shard_documents))


def standard_library_files() -> list[Path]:
    """The Python sources of this interpreter's standard library (tests too, where installed), sorted.

    Without folders of near copies, which would be learnt from in one part and evaluated on in another. Raises DataError
    where there are none.
    """
    root = Path(sysconfig.get_path("stdlib"))
    files = [
        path
        for path in _walk(root)
        if path.suffix == ".py" and path.relative_to(root).parts[0] not in _NEAR_COPIES and _is_text(path)
    ]
    if not files:
        raise DataError(f"no standard library sources in {root}: give files or folders of text with --data")
    return files


def text_files(paths: Sequence[Path]) -> list[Path]:
    """The text files that `paths` name: files, and folders searched without hidden entries. No file twice.

    Raises DataError for a path that is missing, unreadable or empty, and for a file that is not text.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise DataError(f"no such file or folder: {path}")
        if path.is_dir():
            inside = [file for file in _walk(path) if _is_text(file)]
            if not inside:
                raise DataError(f"{path} holds no text files (UTF-8, not empty)")
        else:
            if not _is_text(path):
                raise DataError(f"{path} is empty, unreadable or not UTF-8 text")
            inside = [path]
        for file in inside:
            found.setdefault(file.resolve(), file)
    if not found:
        raise DataError("no data: name at least one file or folder of text")
    return list(found.values())


def split_text(
    files: Sequence[Path],
    *,
    num_shards: int,
    max_shard_bytes: int | None,
    max_held_out_bytes: int,
    shard_by: ShardBy = "hash",
) -> TextSplit:
    """Split the text of `files` into held-out text and `num_shards` disjoint shards.

    The held-out text is a mix: a piece from the middle of each of many files, of which nothing else is used.
    It is at most `max_held_out_bytes` and an eighth of the files (0: no held-out text). The other files are
    dealt round the shards or, by `path`, each shard gets neighbours of each other: folders of its own.

    Raises DataError when there is not enough text for every part.
    """
    ordered = _in_hash_order(files)
    held_out: Documents = ()
    if max_held_out_bytes and len(ordered) > 1:
        max_files = max(1, len(ordered) // _HELD_OUT_SHARE)
        max_piece_bytes = -(-max_held_out_bytes // min(_MIN_PIECES, max_files))
        held_out = _take_pieces(ordered[:max_files], max_held_out_bytes, max_piece_bytes)
        ordered = ordered[len(held_out) :]
    if len(ordered) >= num_shards and (held_out or not max_held_out_bytes):
        dealt = _deal(ordered, num_shards, shard_by)
        split = TextSplit(held_out, tuple(_take_shard(shard, max_shard_bytes) for shard in dealt))
    else:
        text = b"".join(map(_read, ordered))
        split = _split_by_range(text, num_shards, max_shard_bytes, 0 if held_out else max_held_out_bytes)
        split = TextSplit(held_out or split.held_out_documents, split.shard_documents)
    if not all(split.shards) or (max_held_out_bytes and not split.held_out):
        num_parts = num_shards + (1 if max_held_out_bytes else 0)
        raise DataError(f"text of {len(files)} file(s) is too short for {num_parts} parts: give more text")
    return split


# --- files --------------------------------------------------------------------------------------------------


def _walk(root: Path) -> list[Path]:
    """The regular files under `root`, sorted, without hidden entries, installed packages and byte code."""
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [
            name
            for name in subfolders
            if not name.startswith(".") and name not in ("site-packages", "dist-packages", "__pycache__")
        ]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(file for file in files if file.is_file())


def _is_text(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            sample = file.read(_SAMPLE_BYTES)
        # Not final: the sample may end inside a character.
        codecs.getincrementaldecoder("utf-8")().decode(sample, final=False)
    except (OSError, UnicodeDecodeError):
        return False
    return bool(sample.strip()) and b"\0" not in sample


def _read(path: Path) -> bytes:
    try:
        text = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None
    return text if text.endswith(b"\n") else text + b"\n"


def _in_hash_order(files: Sequence[Path]) -> list[Path]:
    if not files:
        raise DataError("no data: name at least one file or folder of text")
    absolute = [file.absolute() for file in files]
    root = os.path.commonpath([file.parent for file in absolute])

    def digest(file: Path) -> bytes:
        return hashlib.sha256(file.relative_to(root).as_posix().encode(errors="surrogateescape")).digest()

    return sorted(absolute, key=digest)


def _deal(in_hash_order: Sequence[Path], num_shards: int, shard_by: ShardBy) -> list[list[Path]]:
    if shard_by == "hash":
        return [list(in_hash_order[index::num_shards]) for index in range(num_shards)]
    position = {file: index for index, file in enumerate(in_hash_order)}
    by_path = sorted(in_hash_order)
    bounds = [len(by_path) * index // num_shards for index in range(num_shards + 1)]
    # Mixed within a shard: one that is limited in size takes the first.
    return [sorted(by_path[start:end], key=position.__getitem__) for start, end in itertools.pairwise(bounds)]


# --- splitting ----------------------------------------------------------------------------------------------


def _take_shard(files: Sequence[Path], max_bytes: int | None) -> Documents:
    if max_bytes is None:
        return tuple(map(_read, files))
    mix = _take_pieces(files, max_bytes, -(-max_bytes // _MIN_PIECES))
    # Too few files for a mix of small pieces: take all of each.
    return mix if sum(map(len, mix)) == max_bytes else _take_pieces(files, max_bytes, max_bytes)


def _take_pieces(files: Iterable[Path], max_bytes: int, max_piece_bytes: int) -> Documents:
    """A piece of each of `files`, in order, until there are `max_bytes`."""
    pieces: list[bytes] = []
    room_bytes = max_bytes
    for file in files:
        if room_bytes == 0:
            break
        text = _read(file)
        start, end = _middle(text, max_piece_bytes)
        pieces.append(text[start : min(end, start + room_bytes)])
        room_bytes -= len(pieces[-1])
    return tuple(pieces)


def _middle(text: bytes, max_bytes: int) -> tuple[int, int]:
    """A range of at most `max_bytes` in whole lines around the middle: a file often begins with a licence."""
    if len(text) <= max_bytes:
        return 0, len(text)
    start = _line_end(text, (len(text) - max_bytes) // 2)
    return start, _line_end(text, start + max_bytes, after=start)


def _line_end(text: bytes, position: int, *, after: int = 0) -> int:
    """The last line end in (after, position]; `position` itself where lines are very long."""
    end = text.rfind(b"\n", max(after, position - _LINE_SEARCH_BYTES), position) + 1
    return end if end > after else position


def _split_by_range(
    text: bytes, num_shards: int, max_shard_bytes: int | None, max_held_out_bytes: int
) -> TextSplit:
    max_piece_bytes = -(-min(max_held_out_bytes, len(text) // _HELD_OUT_SHARE) // _MIN_PIECES)
    pieces: list[bytes] = []
    rest: list[bytes] = []
    room_bytes = max_held_out_bytes
    for section in _cut(text, _MIN_PIECES):
        start, end = _middle(section, max_piece_bytes)
        pieces.append(section[start:end][:room_bytes])
        room_bytes -= len(pieces[-1])
        rest += [section[:start], section[end:]]
    shards = [
        shard[: _line_end(shard, max_shard_bytes)]
        if max_shard_bytes and len(shard) > max_shard_bytes
        else shard
        for shard in _cut(b"".join(rest), num_shards)
    ]
    return TextSplit(tuple(filter(None, pieces)), tuple((shard,) for shard in shards))


def _cut(text: bytes, num_parts: int) -> list[bytes]:
    """`text` in `num_parts` ranges of nearly equal size that end at line ends."""
    bounds = [0]
    for index in range(1, num_parts):
        bounds.append(_line_end(text, len(text) * index // num_parts, after=bounds[-1]))
    bounds.append(len(text))
    return [text[start:end] for start, end in itertools.pairwise(bounds)]
