"""The text of one site, as its task's configuration says: from files, or from Hugging Face data sets."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from p2pcodistill.errors import ConfigError, DataError
from p2pcodistill.task_configs import LanguageModelConfig, is_hub_source
from p2pcodistill.tasks.hub_text import split_hub_text
from p2pcodistill.tasks.text import (
    Documents,
    ShardBy,
    TextSplit,
    split_text,
    standard_library_files,
    text_files,
)
from p2pcodistill.tasks.vocabulary import read_vocabulary_file


@dataclass(frozen=True, slots=True)
class SiteText:
    """What one site trains on and what it evaluates on, in documents."""

    train_documents: Documents
    held_out_documents: Documents

    @property
    def train(self) -> bytes:
        """The documents to train on, joined."""
        return b"".join(self.train_documents)

    @property
    def held_out(self) -> bytes:
        """The documents to evaluate on, joined."""
        return b"".join(self.held_out_documents)


def split_corpus(
    paths: Sequence[Path],
    *,
    text_column: str,
    num_shards: int,
    max_shard_bytes: int | None,
    max_held_out_bytes: int,
    shard_by: ShardBy = "hash",
) -> TextSplit:
    """Split the text of `paths` into held-out text and shards: files, `hf:` data sets, or (no paths) the standard library.

    Raises DataError for text that is missing or too short, for a mixture of files and data sets, and for data sets to be
    split by path.
    """
    if comes_from_hub(paths):
        if shard_by == "path":
            raise DataError(f"{paths[0]}: data sets have no paths to split by: leave out data.shard_by")
        return split_hub_text(
            paths,
            text_column,
            num_shards=num_shards,
            max_shard_bytes=max_shard_bytes,
            max_held_out_bytes=max_held_out_bytes,
        )
    return split_text(
        text_files(paths) if paths else standard_library_files(),
        num_shards=num_shards,
        max_shard_bytes=max_shard_bytes,
        max_held_out_bytes=max_held_out_bytes,
        shard_by=shard_by,
    )


def comes_from_hub(paths: Sequence[Path]) -> bool:
    """Whether `paths` are `hf:` data sets. Raises DataError where some are and some are not."""
    are_hub = [is_hub_source(path) for path in paths]
    if any(are_hub) and not all(are_hub):
        raise DataError(f"{paths[are_hub.index(False)]}: files and hf: data sets do not mix: list one kind")
    return any(are_hub)


def load_held_out(task: LanguageModelConfig) -> Documents:
    """The held-out text that `task` gives by itself. Raises DataError."""
    return _load_whole(task.held_out, task, max_bytes=task.max_held_out_bytes)


def load_unlabelled(task: LanguageModelConfig) -> Documents:
    """All text that `task` gives without labels. Raises DataError."""
    return _load_whole(task.unlabelled, task, max_bytes=task.max_data_bytes)


def _load_whole(paths: Sequence[Path], task: LanguageModelConfig, *, max_bytes: int | None) -> Documents:
    split = split_corpus(
        paths, text_column=task.text_column, num_shards=1, max_shard_bytes=max_bytes, max_held_out_bytes=0
    )
    return split.shard_documents[0]


def load_site_text(task: LanguageModelConfig) -> SiteText:
    """The text of one site as its task's configuration says, in memory.

    Without `task.data` it is text of the standard library's sources, which sites with the same Python version split alike;
    without `task.held_out` a part of the data is kept back. Raises DataError for text that is missing or too short to split.
    """
    shards = task.shards or range(task.num_shards)
    split = split_corpus(
        task.data,
        text_column=task.text_column,
        num_shards=task.num_shards,
        max_shard_bytes=None if task.max_data_bytes is None else -(-task.max_data_bytes // len(shards)),
        max_held_out_bytes=0 if task.held_out else task.max_held_out_bytes,
    )
    train = tuple(document for shard in shards for document in split.shard_documents[shard])
    return SiteText(train, load_held_out(task) if task.held_out else split.held_out_documents)


def require_text_files(task: LanguageModelConfig, *, batch_size: int, num_ranks: int) -> None:
    """What can be said of the text of `task` from the files' sizes, before anything is started or read.

    Raises DataError for files that are missing, empty or not text, or together too small, ConfigError where unlabelled text
    is missing. `hf:` data sets are not looked at.
    """
    if task.unlabelled_batch_size is not None and not task.unlabelled:
        raise ConfigError("task.unlabelled_batch_size is for unlabelled text: list some, or remove it")
    for paths in (task.held_out, task.unlabelled):
        if paths and not comes_from_hub(paths):
            text_files(paths)
    if task.vocabulary is not None:
        read_vocabulary_file(task.vocabulary)
    if task.data and not comes_from_hub(task.data):
        num_bytes = sum(file.stat().st_size for file in text_files(task.data))
        if task.vocabulary is None:  # else nobody knows yet how many tokens they are
            require_enough_text(num_bytes, task.data, task, batch_size=batch_size, num_ranks=num_ranks)


def require_enough_text(
    num_tokens: int, source: Sequence[Path], task: LanguageModelConfig, *, batch_size: int, num_ranks: int
) -> None:
    """Raise DataError unless every document of every rank holds a window; `source` is where the tokens are from."""
    num_needed = num_ranks * batch_size * (task.window_tokens + 1)
    if num_tokens < num_needed:
        where = ", ".join(map(str, source)) or "the standard library"
        unit = "bytes" if task.vocabulary is None else "tokens"
        raise DataError(
            f"{where}: {num_tokens} {unit} of text to train on, but {batch_size * num_ranks} documents of "
            f"{task.window_tokens + 1} {unit} need {num_needed}: give more text, or lower training.batch_size"
        )


def require_held_out(num_tokens: int, task: LanguageModelConfig) -> None:
    """Raise DataError unless there is a prediction to evaluate."""
    if num_tokens < 2:
        where = ", ".join(map(str, task.held_out)) or "the data"
        raise DataError(f"{where}: too little text to evaluate on: give more held-out text")
