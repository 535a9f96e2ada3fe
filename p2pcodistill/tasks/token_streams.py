"""Endless windows of parallel documents, as the paper's language model reads them (Anil et al. 2018, section 3.1).

A batch is one window from each of B documents; the next batch goes on where this one ended.

Axes of tensors: B documents (streams), T tokens of a window.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from p2pcodistill.errors import DataError
from p2pcodistill.tasks.vocabulary import Vocabulary

_DTYPES = {"B": torch.uint8, "i": torch.int32}


class Streams(Protocol):
    """Where batches come from; its state dict is the position in the data."""

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """(inputs_BT, targets_BT), int64 on the CPU: the targets are the inputs' next tokens."""

    def progress(self) -> dict[str, float]:
        """How much of the data all ranks have visited, by name."""

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""


def as_tensor(tokens: array[int]) -> Tensor:
    """Tokens of a vocabulary as a tensor that shares their memory."""
    return torch.frombuffer(tokens, dtype=_DTYPES[tokens.typecode])


class TokenStreams:
    """Windows of B contiguous streams, which are rank `rank`'s share of `num_ranks` x B streams over a text.

    In each epoch the text, seen as a ring, is cut into equal parts from a random origin, and the parts are dealt to the
    streams in random order; both depend on the seed alone. What is left of a part behind its last whole window is
    left out of that epoch.
    """

    def __init__(
        self,
        tokens: Tensor,
        *,
        batch_size: int,
        window_tokens: int,
        seed: int,
        rank: int,
        num_ranks: int,
    ) -> None:
        """`tokens` are one-dimensional, at least `window_tokens` + 1 for each stream."""
        self._tokens = tokens
        self._num_streams = batch_size * num_ranks
        self._own_streams = slice(rank * batch_size, (rank + 1) * batch_size)
        self._part_tokens = len(tokens) // self._num_streams
        self._num_windows = (self._part_tokens - 1) // window_tokens
        self._offsets = torch.arange(window_tokens + 1)
        self._seed = seed
        self._epoch, self._window = 0, 0
        self._starts_B = self._deal(0)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """See `Streams`."""
        if self._window == self._num_windows:
            self._epoch, self._window = self._epoch + 1, 0
            self._starts_B = self._deal(self._epoch)
        position = self._window * (len(self._offsets) - 1)
        self._window += 1
        windows = self._tokens[
            (self._starts_B[:, None] + position + self._offsets) % len(self._tokens)
        ].long()
        return windows[:, :-1], windows[:, 1:]

    def progress(self) -> dict[str, float]:
        """`data_passes`: how often the data was visited, 0.023 being 2.3 % of it."""
        return {"data_passes": self._epoch + self._window / self._num_windows}

    def state_dict(self) -> dict[str, Any]:
        """See `Streams`."""
        return {"epoch": self._epoch, "window": self._window}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Streams`."""
        self._epoch, self._window = state["epoch"], state["window"]
        self._starts_B = self._deal(self._epoch)

    def _deal(self, epoch: int) -> Tensor:
        """Where each of this rank's streams starts in the text."""
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
        origin = torch.randint(len(self._tokens), (1,), generator=generator)
        parts = torch.randperm(self._num_streams, generator=generator)[self._own_streams]
        return (origin + parts * self._part_tokens) % len(self._tokens)


class DocumentStreams:
    """Windows of B streams, each of which reads document after document: for data that is not held in memory.

    Of the documents of an epoch, one in `num_ranks` is this rank's.
    """

    def __init__(
        self,
        documents_of: Callable[[int], Iterator[bytes]],
        vocabulary: Vocabulary,
        *,
        batch_size: int,
        window_tokens: int,
        rank: int,
        num_ranks: int,
        num_documents: int | None = None,
    ) -> None:
        """`documents_of(epoch)` begins an epoch, always in the same order; `num_documents` is how many it has, if known."""
        self._documents_of = documents_of
        self._vocabulary = vocabulary
        self._window_tokens = window_tokens
        self._rank, self._num_ranks = rank, num_ranks
        self._num_documents = num_documents
        self._epoch, self._num_read, self._num_visited = 0, 0, 0
        self._documents = documents_of(0)
        self._waiting = [torch.empty(0, dtype=torch.int32) for _ in range(batch_size)]

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """See `Streams`. Raises DataError where there are no documents."""
        for stream in range(len(self._waiting)):
            while len(self._waiting[stream]) <= self._window_tokens:
                self._waiting[stream] = torch.cat([self._waiting[stream], self._encode_next()])
        windows = torch.stack([waiting[: self._window_tokens + 1] for waiting in self._waiting]).long()
        self._waiting = [waiting[self._window_tokens :] for waiting in self._waiting]
        return windows[:, :-1], windows[:, 1:]

    def progress(self) -> dict[str, float]:
        """`num_documents_visited`, and `data_passes` where it is known how many there are."""
        progress = {"num_documents_visited": float(self._num_visited)}
        if self._num_documents:
            progress["data_passes"] = self._num_visited / self._num_documents
        return progress

    def state_dict(self) -> dict[str, Any]:
        """See `Streams`."""
        return {
            "epoch": self._epoch,
            "num_read": self._num_read,
            "num_visited": self._num_visited,
            "waiting": [waiting.clone() for waiting in self._waiting],
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """See `Streams`. What was read of the epoch is read again, and passed over."""
        self._epoch, self._num_visited = state["epoch"], state["num_visited"]
        self._waiting = list(state["waiting"])
        self._documents, self._num_read = self._documents_of(self._epoch), 0
        while self._num_read < state["num_read"]:
            next(self._documents)
            self._num_read += 1

    def _encode_next(self) -> Tensor:
        while True:
            document = next(self._documents, None)
            if document is None:
                if self._num_read <= self._rank:
                    raise DataError("there are fewer documents than ranks: give more text")
                self._epoch, self._num_read = self._epoch + 1, 0
                self._documents = self._documents_of(self._epoch)
                continue
            self._num_read += 1
            self._num_visited += 1
            if (self._num_read - 1) % self._num_ranks == self._rank:
                return as_tensor(self._vocabulary.encode_documents([document])).int()
