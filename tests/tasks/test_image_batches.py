"""Batches of images: resumed exactly, and augmented as asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from p2pcodistill.errors import DataError
from p2pcodistill.tasks.image_batches import ImageBatches, crop_at_random, flip_at_random
from p2pcodistill.tasks.image_data import ImagesInMemory, LabelledImages

IMAGES = torch.randint(256, (21, 3, 5, 4), generator=torch.Generator().manual_seed(0)).to(torch.uint8)


def batches(*, seed: int = 0, rank: int = 0, num_ranks: int = 1, **augmentations: Any) -> ImageBatches:
    images = LabelledImages(ImagesInMemory(IMAGES), torch.arange(21))
    return ImageBatches(images, batch_size=4, seed=seed, rank=rank, num_ranks=num_ranks, **augmentations)


def test_images_come_with_their_labels() -> None:
    source = batches()
    for _ in range(12):
        images_BCHW, labels_B = source.next_batch()
        assert images_BCHW.dtype == torch.uint8 and labels_B.dtype == torch.int64
        assert torch.equal(images_BCHW, IMAGES[labels_B])


def test_an_epoch_shows_no_image_twice_on_all_ranks_together() -> None:
    ranks = [batches(rank=rank, num_ranks=2) for rank in range(2)]
    epochs = [torch.cat([rank.next_batch()[1] for rank in ranks for _ in range(2)]) for _ in range(3)]
    for labels in epochs:
        assert len(labels) == len(labels.unique()) == 16
    assert not torch.equal(epochs[0], epochs[1])


@pytest.mark.parametrize("num_batches", [0, 1, 5, 13])
def test_a_position_is_resumed_to_the_bit(num_batches: int) -> None:
    source, resumed = (batches(seed=3, crop_padding=2, flip=True) for _ in range(2))
    for _ in range(num_batches):
        source.next_batch()
    resumed.load_state_dict(source.state_dict())
    for _ in range(11):
        for one, other in zip(source.next_batch(), resumed.next_batch(), strict=True):
            assert torch.equal(one, other)


def test_what_is_drawn_differs_by_seed_and_rank_and_ignores_torchs_own_state() -> None:
    def first(seed: int, rank: int) -> Tensor:
        source = batches(seed=seed, rank=rank, num_ranks=2, crop_padding=2)
        return torch.stack([source.next_batch()[0] for _ in range(2)])

    def moves(seed: int, rank: int) -> Tensor:
        state = batches(seed=seed, rank=rank, num_ranks=2).state_dict()
        return torch.rand(8, generator=torch.Generator().set_state(state["generator"]))

    before = torch.get_rng_state()
    assert torch.equal(first(0, 0), first(0, 0))
    assert torch.equal(torch.get_rng_state(), before)
    drawn = [tuple(moves(seed, rank).tolist()) for seed in range(3) for rank in range(2)]
    assert len(set(drawn)) == 6


def test_too_few_images_for_a_batch_are_refused() -> None:
    with pytest.raises(DataError, match=r"lower training\.batch_size"):
        batches(num_ranks=6)


def test_crops_are_parts_of_the_image_in_a_black_margin() -> None:
    image = IMAGES[:1]
    framed = torch.zeros(1, 3, 5 + 4, 4 + 4, dtype=torch.uint8)
    framed[:, :, 2:7, 2:6] = image
    possible = {
        (top, left): framed[:, :, top : top + 5, left : left + 4] for top in range(5) for left in range(5)
    }
    crops = crop_at_random(image.expand(600, -1, -1, -1), 2, torch.Generator().manual_seed(0))
    assert crops.shape == (600, 3, 5, 4) and crops.dtype == torch.uint8
    counts = {place: int((crops == crop).flatten(1).all(1).sum()) for place, crop in possible.items()}
    assert sum(counts.values()) == 600, "every crop is one of these"
    assert min(counts.values()) >= 8, "and all of these come"


def test_half_of_the_images_are_mirrored() -> None:
    images = IMAGES[:1].expand(400, -1, -1, -1)
    flipped = flip_at_random(images, torch.Generator().manual_seed(0))
    is_same = (flipped == images).flatten(1).all(1)
    is_mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert bool((is_same ^ is_mirrored).all())
    assert 160 < int(is_mirrored.sum()) < 240
