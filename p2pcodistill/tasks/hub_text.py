"""Text of Hugging Face data sets, streamed: which document is held out, and which shard another one belongs to.

That is decided by the hash of the document's text, whatever the order in which documents arrive; so copies of a document are
never on both sides of a line.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from p2pcodistill.errors import DataError
from p2pcodistill.tasks.hub import HubSource, load_hub_dataset
from p2pcodistill.tasks.text import Documents, TextSplit

_HELD_OUT_SHARE = 64
"""One in so many documents is held out, where held-out text is not given."""
_SHUFFLE_DOCUMENTS = 1024


def hub_documents(
    entries: Sequence[Path], column: str, *, shuffle_seed: int | None = None
) -> Iterator[bytes]:
    """The documents of `hf:` entries, in UTF-8 with their last line ended, one entry after another.

    With `shuffle_seed`, an entry's files are read in random order, and documents leave a buffer in random order. Raises
    DataError for what cannot be loaded or holds no text in `column`.
    """
    for entry in entries:
        source = HubSource.parse(entry)
        dataset = load_hub_dataset(source, streaming=True)
        if shuffle_seed is not None:
            dataset = dataset.shuffle(seed=shuffle_seed, buffer_size=_SHUFFLE_DOCUMENTS)
        try:
            for row in dataset:
                text = _text_of(row, column, source)
                if text.strip():
                    yield (text if text.endswith("\n") else text + "\n").encode(errors="replace")
        except OSError as error:  # the network, too
            raise DataError(f"cannot read {source}: {error}") from None


def shard_documents(
    entries: Sequence[Path],
    column: str,
    *,
    shards: Sequence[int],
    num_shards: int,
    keeps_held_out: bool,
    shuffle_seed: int,
) -> Iterator[bytes]:
    """Of these documents, those in `shards`, without the held-out ones, in random order."""
    for document in hub_documents(entries, column, shuffle_seed=shuffle_seed):
        if shard_of(document, num_shards, keeps_held_out=keeps_held_out) in shards:
            yield document


def shard_of(document: bytes, num_shards: int, *, keeps_held_out: bool) -> int | None:
    """Which of `num_shards` shards a document is in; None for one that is held out."""
    number = int.from_bytes(hashlib.blake2b(document, digest_size=8).digest(), "big")
    if keeps_held_out and number % _HELD_OUT_SHARE == 0:
        return None
    return number // _HELD_OUT_SHARE % num_shards


def take_held_out(entries: Sequence[Path], column: str, max_bytes: int) -> Documents:
    """The first held-out documents, `max_bytes` of them at most. Raises DataError where there are none."""
    taken: list[bytes] = []
    room_bytes = max_bytes
    for document in hub_documents(entries, column):
        if shard_of(document, 1, keeps_held_out=True) is None:
            taken.append(document[:room_bytes])
            room_bytes -= len(taken[-1])
        if room_bytes == 0:
            break
    if not taken:
        names = ", ".join(map(str, entries))
        raise DataError(
            f"{names}: too few documents to hold one in {_HELD_OUT_SHARE} out: give held-out text"
        )
    return tuple(taken)


def split_hub_text(
    entries: Sequence[Path],
    column: str,
    *,
    num_shards: int,
    max_shard_bytes: int | None,
    max_held_out_bytes: int,
) -> TextSplit:
    """The first documents of each part, until it has as many bytes as it may; see `text.split_text`.

    Raises DataError where a part stays empty. Without `max_shard_bytes`, all documents are held in memory.
    """
    held_out: list[bytes] = []
    shards: list[list[bytes]] = [[] for _ in range(num_shards)]
    room: dict[int | None, float] = {
        None: max_held_out_bytes,
        **dict.fromkeys(range(num_shards), float("inf") if max_shard_bytes is None else max_shard_bytes),
    }
    for document in hub_documents(entries, column):
        if not any(room.values()):
            break
        shard = shard_of(document, num_shards, keeps_held_out=max_held_out_bytes > 0)
        if room[shard] > 0:
            part = held_out if shard is None else shards[shard]
            part.append(document[: int(min(room[shard], len(document)))])
            room[shard] -= len(part[-1])
    if not all(shards) or (max_held_out_bytes and not held_out):
        names = ", ".join(map(str, entries))
        raise DataError(
            f"{names}: too few documents for {num_shards} shard(s) and held-out text: give more text"
        )
    return TextSplit(tuple(held_out), tuple(map(tuple, shards)))


def count_documents(entries: Sequence[Path]) -> int | None:
    """How many documents the data sets say that they have; None where one does not say."""
    total = 0
    for entry in entries:
        source = HubSource.parse(entry)
        splits = getattr(load_hub_dataset(source, streaming=True).info, "splits", None) or {}
        num_examples = getattr(splits.get(source.split), "num_examples", None)
        if not num_examples:
            return None
        total += num_examples
    return total


def _text_of(row: Any, column: str, source: HubSource) -> str:
    if column not in row:
        raise DataError(
            f"{source} has no column {column!r}: set task.text_column to one of {', '.join(map(str, row))}"
        )
    text = row[column]
    if not isinstance(text, str):
        raise DataError(
            f"{source}: the column {column!r} holds no text: set task.text_column to one that does"
        )
    return text
