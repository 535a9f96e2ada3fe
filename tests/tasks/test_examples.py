"""Which examples a site trains on, and in what order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.errors import DataError
from p2pcodistill.tasks.examples import ExampleOrder, ExampleSplit, split_examples


def split(
    num_examples: int,
    *shards: int,
    num_shards: int = 1,
    cap: int | None = None,
    held_out_cap: int | None = None,
) -> ExampleSplit:
    return split_examples(
        num_examples,
        shards=shards,
        num_shards=num_shards,
        max_shard_examples=cap,
        max_held_out_examples=held_out_cap,
    )


# --- the split ---------------------------------------------------------------------------------------------------


@given(st.integers(20, 400), st.integers(1, 8))
def test_held_out_examples_and_shards_are_disjoint_equal_and_everything(
    num_examples: int, num_shards: int
) -> None:
    splits = [split(num_examples, shard, num_shards=num_shards) for shard in range(num_shards)]
    held_out = splits[0].held_out
    assert all(np.array_equal(other.held_out, held_out) for other in splits)
    parts = [held_out, *(other.train for other in splits)]
    assert np.array_equal(np.sort(np.concatenate(parts)), np.arange(num_examples))
    assert len(held_out) == num_examples // 8
    sizes = [len(other.train) for other in splits]
    assert max(sizes) - min(sizes) <= 1


def test_held_out_examples_do_not_depend_on_the_shards() -> None:
    expected = split(1000).held_out
    assert np.array_equal(split(1000, 3, num_shards=7, cap=5).held_out, expected)


def test_examples_are_mixed_and_the_same_for_ever() -> None:
    held_out = split(1000, held_out_cap=8).held_out
    assert held_out.tolist() == [196, 295, 472, 558, 963, 975, 976, 992]


def test_several_shards_are_what_their_sites_have_together() -> None:
    lone = [split(500, shard, num_shards=4, cap=30).train for shard in (1, 3)]
    both = split(500, 1, 3, num_shards=4, cap=30).train
    assert np.array_equal(both, np.sort(np.concatenate(lone)))
    assert len(both) == 60


def test_no_shard_named_is_all_of_them() -> None:
    assert len(split(80, num_shards=4).train) == 70


def test_held_out_examples_may_come_from_elsewhere() -> None:
    only_training = split_examples(
        16, shards=(), num_shards=1, max_shard_examples=None, max_held_out_examples=None, keeps_held_out=False
    )
    assert len(only_training.train) == 16
    assert len(only_training.held_out) == 0


@pytest.mark.parametrize(("num_examples", "num_shards"), [(0, 1), (7, 1), (8, 8)])
def test_too_few_examples_for_all_parts_are_refused(num_examples: int, num_shards: int) -> None:
    with pytest.raises(
        DataError, match=f"{num_examples} example.* too few for {num_shards + 1} parts: give more"
    ):
        split(num_examples, 0, num_shards=num_shards)


# --- the order ---------------------------------------------------------------------------------------------------


def order(*, seed: int = 0, rank: int = 0, num_ranks: int = 1) -> ExampleOrder:
    return ExampleOrder(50, batch_size=4, seed=seed, rank=rank, num_ranks=num_ranks)


def test_an_epoch_has_no_example_twice_and_the_next_one_has_another_order() -> None:
    source = order()
    epochs = [torch.cat([source.next_indices() for _ in range(12)]) for _ in range(3)]
    for epoch in epochs:
        assert len(epoch.unique()) == 48
    assert not torch.equal(epochs[0], epochs[1])


def test_ranks_share_an_epoch_without_overlap() -> None:
    sources = [order(rank=rank, num_ranks=3) for rank in range(3)]
    seen = torch.cat([source.next_indices() for source in sources for _ in range(4)])
    assert len(seen.unique()) == 48


def test_the_seed_decides_the_order() -> None:
    assert torch.equal(order(seed=1).next_indices(), order(seed=1).next_indices())
    assert not torch.equal(order(seed=1).next_indices(), order(seed=2).next_indices())


@pytest.mark.parametrize("num_batches", [0, 5, 12, 30])
def test_a_position_is_resumed_exactly(num_batches: int) -> None:
    source, resumed = order(seed=3), order(seed=3)
    for _ in range(num_batches):
        source.next_indices()
    resumed.load_state_dict(source.state_dict())
    for _ in range(15):
        assert torch.equal(source.next_indices(), resumed.next_indices())


def test_fewer_examples_than_a_batch_are_refused() -> None:
    ExampleOrder(8, batch_size=4, seed=0, rank=0, num_ranks=2)
    with pytest.raises(
        DataError, match=r"7 example.* batch of 8: give more data, or lower training\.batch_size"
    ):
        ExampleOrder(7, batch_size=4, seed=0, rank=0, num_ranks=2)
