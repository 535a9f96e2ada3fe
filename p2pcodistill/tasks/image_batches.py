"""Endless batches of a site's images: every epoch in a new order, each rank its own part, augmented where asked.

Axes of tensors: B images of a batch, C channels, H and W pixels.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from p2pcodistill.tasks.examples import ExampleOrder
from p2pcodistill.tasks.image_data import LabelledImages


class ImageBatches:
    """Endless batches of one of `num_ranks` ranks, in an `ExampleOrder`; augmentations draw by rank and seed."""

    def __init__(
        self,
        images: LabelledImages,
        *,
        batch_size: int,
        crop_padding: int = 0,
        flip: bool = False,
        seed: int,
        rank: int,
        num_ranks: int,
    ) -> None:
        """`crop_padding` is the width in pixels of the black margin out of which images are cropped again.

        Raises DataError when there are too few images.
        """
        self._images = images
        self._order = ExampleOrder(
            len(images.labels_N), batch_size=batch_size, seed=seed, rank=rank, num_ranks=num_ranks
        )
        self._crop_padding, self._flip = crop_padding, flip
        # Hashed, because ranks count up from each other, and so may seeds.
        text = f"p2pcodistill-augmentation/{seed}/{rank}"
        own_seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
        self._generator = torch.Generator().manual_seed(own_seed)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """(uint8 images of axes BCHW, labels_B)."""
        indices_B = self._order.next_indices()
        images_BCHW = self._images.images.read(indices_B)
        if self._crop_padding:
            images_BCHW = crop_at_random(images_BCHW, self._crop_padding, self._generator)
        if self._flip:
            images_BCHW = flip_at_random(images_BCHW, self._generator)
        return images_BCHW, self._images.labels_N[indices_B]

    def state_dict(self) -> dict[str, Any]:
        """The position in the data, and the state of what augmentations draw from."""
        return {"order": self._order.state_dict(), "generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._order.load_state_dict(state["order"])
        self._generator.set_state(state["generator"])


def crop_at_random(images_BCHW: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """Each image moved by up to `padding` pixels in either direction; black comes in from outside."""
    num_images, _, height, width = images_BCHW.shape
    padded = functional.pad(images_BCHW, (padding, padding, padding, padding))
    top, left = torch.randint(2 * padding + 1, (2, num_images, 1), generator=generator)
    rows_BH, columns_BW = top + torch.arange(height), left + torch.arange(width)
    images_B = torch.arange(num_images)[:, None, None]
    # Indices around a slice put the sliced axis last.
    return padded[images_B, :, rows_BH[:, :, None], columns_BW[:, None, :]].permute(0, 3, 1, 2)


def flip_at_random(images_BCHW: Tensor, generator: torch.Generator) -> Tensor:
    """Each image mirrored left to right or left as it is, with equal chances."""
    is_flipped_B = torch.randint(2, (len(images_BCHW),), generator=generator).bool()
    return torch.where(is_flipped_B[:, None, None, None], images_BCHW.flip(3), images_BCHW)
