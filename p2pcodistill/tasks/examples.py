"""Examples that are independent of each other: which of them a site trains on, which it is evaluated on, and in what order.

Tasks that have files of text split these by other rules (`text`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from p2pcodistill.errors import DataError

Indices: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True)
class ExampleSplit:
    """Indices of examples, ascending; none is in both."""

    train: Indices
    held_out: Indices


def split_examples(
    num_examples: int,
    *,
    shards: Sequence[int],
    num_shards: int,
    max_shard_examples: int | None,
    max_held_out_examples: int | None,
    keeps_held_out: bool = True,
    held_out_share: int = 8,
    labels: Indices | None = None,
) -> ExampleSplit:
    """What the site trains on that has these of `num_shards` shards (none named: all), and what everyone is evaluated on.

    Examples are taken in the order of a hash of their index, which is the same on every machine: the first of them, one in
    `held_out_share` and at most `max_held_out_examples` (none if not `keeps_held_out`), are held out, whatever the shards
    are, and the others are dealt round the shards. With `labels`, one of each example, shards are unlike: cut out of the
    others in the order of their labels. Each shard has at most `max_shard_examples`, so that a site with the shards of
    several others has what these have together.

    Raises DataError when there are too few examples for every part.
    """
    order = np.argsort(_hash_of(np.arange(num_examples)), kind="stable")
    num_held_out = 0
    if keeps_held_out:
        num_held_out = min(num_examples // held_out_share, max_held_out_examples or num_examples)
    if num_examples - num_held_out < num_shards or (keeps_held_out and num_held_out == 0):
        num_parts = num_shards + 1 if keeps_held_out else num_shards
        raise DataError(f"{num_examples} example(s) are too few for {num_parts} parts: give more data")
    rest = order[num_held_out:]
    if labels is None:
        parts = [rest[shard::num_shards] for shard in range(num_shards)]
    else:
        by_label = np.array_split(np.argsort(labels[rest], kind="stable"), num_shards)
        parts = [rest[np.sort(places)] for places in by_label]
    chosen = [parts[shard][:max_shard_examples] for shard in shards or range(num_shards)]
    return ExampleSplit(np.sort(np.concatenate(chosen)), np.sort(order[:num_held_out]))


def _hash_of(numbers: Indices) -> NDArray[np.uint64]:
    """SplitMix64 (Steele et al. 2014): spreads numbers well, and never takes two of them to one."""
    mixed = numbers.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def spread_evenly(num_chosen: int, num_examples: int) -> Tensor:
    """Indices of at most `num_chosen` of `num_examples` examples, ascending: files may be sorted by class or by day."""
    num_chosen = min(num_chosen, num_examples)
    return torch.arange(num_chosen) * num_examples // max(1, num_chosen)


class ExampleOrder:
    """The order in which one of `num_ranks` ranks trains on `num_examples`: endless batches of their indices.

    Each epoch goes through them in another random order, in which ranks take turns; it depends on the seed alone. What is
    left behind the last whole batch of all ranks is left out of that epoch.
    """

    def __init__(self, num_examples: int, *, batch_size: int, seed: int, rank: int, num_ranks: int) -> None:
        """Raises DataError when there are too few examples for a batch on every rank."""
        if num_examples < batch_size * num_ranks:
            raise DataError(
                f"{num_examples} example(s) to train on are too few for a batch of {batch_size * num_ranks}: give more "
                "data, or lower training.batch_size"
            )
        self._num_examples, self._batch_size, self._seed = num_examples, batch_size, seed
        self._rank, self._num_ranks = rank, num_ranks
        self._num_batches = num_examples // (batch_size * num_ranks)
        self._epoch, self._batch = 0, 0
        self._order = self._shuffle(0)

    def next_indices(self) -> Tensor:
        """Of this rank's next batch, int64."""
        if self._batch == self._num_batches:
            self._epoch, self._batch = self._epoch + 1, 0
            self._order = self._shuffle(self._epoch)
        start = (self._batch * self._num_ranks + self._rank) * self._batch_size
        self._batch += 1
        return self._order[start : start + self._batch_size]

    def state_dict(self) -> dict[str, int]:
        """The position in the data."""
        return {"epoch": self._epoch, "batch": self._batch}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self._epoch, self._batch = state["epoch"], state["batch"]
        self._order = self._shuffle(self._epoch)

    def _shuffle(self, epoch: int) -> Tensor:
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
        return torch.randperm(self._num_examples, generator=generator)
