"""The images of one site: what it trains on, and what everyone is evaluated on.

Axes of tensors: N images of a set, B of a batch, C channels, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from p2pcodistill.errors import DataError
from p2pcodistill.task_configs import ImagesConfig, is_hub_source
from p2pcodistill.tasks.entries import distinct_entries
from p2pcodistill.tasks.examples import split_examples
from p2pcodistill.tasks.hub import HubSource, load_hub_dataset
from p2pcodistill.tasks.pictures import (
    MAX_EDGE_PIXELS,
    MAX_PICTURE_FILE_BYTES,
    MIN_EDGE_PIXELS,
    PictureFormat,
    PictureSource,
    decode_picture,
    digits,
    folder_source,
    idx_source,
    open_encoded,
    picture_size,
)

MAX_HELD_BYTES = 2 << 30
"""A set that takes more, decoded, is read and decoded batch by batch."""
# Without held-out files, one image in so many is evaluated on.
_HELD_OUT_SHARE = 4
_Example: TypeAlias = tuple[PictureSource, int, int]
"""(source, its picture's index, label)"""


class Images(Protocol):
    """Images that are read by their indices."""

    def read(self, indices_B: Tensor) -> Tensor:
        """uint8 images of axes BCHW. Raises DataError for one that cannot be read."""


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """A set of images and their classes."""

    images: Images
    labels_N: Tensor


@dataclass(frozen=True, slots=True)
class SiteImages:
    """What one site trains on and what it evaluates on, in one format."""

    train: LabelledImages
    held_out: LabelledImages
    class_names: tuple[str, ...]
    format: PictureFormat


@dataclass(frozen=True, slots=True)
class ImagesInMemory:
    """Decoded once."""

    images_NCHW: Tensor

    def read(self, indices_B: Tensor) -> Tensor:
        """See `Images`."""
        return self.images_NCHW[indices_B]


@dataclass(frozen=True, slots=True)
class ImagesInPlace:
    """Read from where they are whenever they are needed."""

    examples: Sequence[_Example]
    format: PictureFormat

    def read(self, indices_B: Tensor) -> Tensor:
        """See `Images`."""
        wanted = self.format
        shape = (len(indices_B), wanted.num_channels, wanted.height, wanted.width)
        images_BCHW = torch.empty(shape, dtype=torch.uint8)
        for row, number in enumerate(indices_B.tolist()):
            source, index, _ = self.examples[number]
            images_BCHW[row] = decode_picture(source, index, wanted)
        return images_BCHW


def load_site_images(task: ImagesConfig) -> SiteImages:
    """The images of a site as its task's configuration says.

    Without `task.data` they are scikit-learn's digits; without `task.held_out` a part of the data is kept back. Raises
    DataError for data that is missing, malformed, too small or of one class only.
    """
    # A picture that is listed twice could be trained on and held out.
    sources = [open_source(entry, task) for entry in distinct_entries(task.data)] or [digits()]
    held_out_sources = [open_source(entry, task) for entry in distinct_entries(task.held_out)]
    class_names = task.classes or _all_class_names([*sources, *held_out_sources])
    examples = _examples(sources, class_names)
    labels_N = np.array([label for _, _, label in examples])
    if not task.classes and labels_N.min() == labels_N.max():
        where = ", ".join(source.place for source in sources)
        raise DataError(
            f"{where}: all images are of one class: add others, or list the classes of all sites in task.classes"
        )
    split = split_examples(
        len(examples),
        shards=task.shards,
        num_shards=task.num_shards,
        max_shard_examples=task.max_examples,
        max_held_out_examples=task.max_held_out_examples,
        keeps_held_out=not held_out_sources,
        held_out_share=_HELD_OUT_SHARE,
        labels=labels_N if task.shard_by == "label" else None,
    )
    train, held_out = (
        [examples[index] for index in split.train],
        [examples[index] for index in split.held_out],
    )
    if held_out_sources:
        examples = _examples(held_out_sources, class_names)
        chosen = split_examples(
            len(examples),
            shards=(),
            num_shards=1,
            max_shard_examples=task.max_held_out_examples,
            max_held_out_examples=None,
            keeps_held_out=False,
        )
        held_out = [examples[index] for index in chosen.train]
    wanted = _common_format(task, [*sources, *held_out_sources])
    return SiteImages(_labelled(train, wanted), _labelled(held_out, wanted), class_names, wanted)


def open_source(entry: Path, task: ImagesConfig) -> PictureSource:
    """The pictures that an entry of `data` or `held_out` names. Raises DataError."""
    if is_hub_source(entry):
        return _hub_source(HubSource.parse(entry), task.label_column)
    if entry.is_dir():
        return folder_source(entry)
    if entry.is_file():
        return idx_source(entry)
    raise DataError(f"no such file or folder: {entry}")


def _hub_source(hub: HubSource, label_column: str | None) -> PictureSource:
    dataset = load_hub_dataset(hub)
    import datasets

    columns = dataset.features
    images = [name for name, kind in columns.items() if isinstance(kind, datasets.Image)]
    if len(images) != 1:
        raise DataError(f"{hub} has {len(images)} columns of images ({', '.join(columns)}): one is needed")
    classes = [name for name, kind in columns.items() if isinstance(kind, datasets.ClassLabel)]
    label = label_column or (classes[0] if len(classes) == 1 else None)
    if label not in classes:
        raise DataError(
            f"{hub}: set task.label_column to one of its columns of classes ({', '.join(classes) or 'it has none'})"
        )
    labels = list(dataset[label])
    # A test set without answers has -1.
    if not labels or min(labels) < 0:
        raise DataError(f"{hub} holds no images, or some that have no label")
    folders = hub.folders()
    pictures = dataset.select_columns(images).cast_column(images[0], datasets.Image(decode=False))

    def open_picture(index: int) -> Image.Image:
        encoded = pictures[index][images[0]]
        return open_encoded(encoded["bytes"] or _read_below(folders, Path(encoded["path"])))

    return PictureSource(
        str(hub),
        tuple(columns[label].names),
        labels=labels,
        keys=range(len(labels)),
        is_grey=False,
        open_picture=open_picture,
    )


def _read_below(folders: Sequence[Path], path: Path) -> bytes:
    """The file that a row of a data set names; a stranger's row is to reach nothing but the data set. Raises ValueError."""
    resolved = path.resolve()
    if not any(resolved.is_relative_to(folder.resolve()) for folder in folders):
        raise ValueError(f"{path} is outside of the data set")
    if not resolved.is_file():
        raise ValueError(f"{path} is no file")
    with resolved.open("rb") as file:
        content = file.read(MAX_PICTURE_FILE_BYTES + 1)
    if len(content) > MAX_PICTURE_FILE_BYTES:
        raise ValueError(f"{path} is larger than {MAX_PICTURE_FILE_BYTES >> 20} MiB")
    return content


# --- classes, parts, format


def _all_class_names(sources: Sequence[PictureSource]) -> tuple[str, ...]:
    """In an order that does not depend on that of the sources: numbers as numbers, then names."""
    names = {name for source in sources for name in source.class_names}
    return tuple(sorted(names, key=lambda name: (not name.isdecimal(), len(name) * name.isdecimal(), name)))


def _examples(sources: Sequence[PictureSource], class_names: Sequence[str]) -> list[_Example]:
    label_of = {name: label for label, name in enumerate(class_names)}
    for source in sources:
        for name in source.class_names:
            if name not in label_of:
                raise DataError(f"{source.place}: the class {name!r} is not listed in task.classes")
    return [
        (source, index, label_of[source.class_names[label]])
        for source in sources
        for index, label in enumerate(source.labels)
    ]


def _common_format(task: ImagesConfig, sources: Sequence[PictureSource]) -> PictureFormat:
    num_channels = task.channels or (1 if all(source.is_grey for source in sources) else 3)
    for key, values in (("mean", task.mean), ("std", task.std)):
        if len(values) not in (1, num_channels):
            raise DataError(
                f"task.{key} has {len(values)} numbers, but images have {num_channels} channel(s)"
            )
    if task.image_pixels is not None:
        height = width = task.image_pixels
    else:
        height, width = picture_size(sources[0], 0)
    if min(height, width) < MIN_EDGE_PIXELS or max(height, width) > MAX_EDGE_PIXELS:
        raise DataError(
            f"{sources[0].place}: images of {width} x {height} pixels: set task.image_pixels to resize them "
            f"({MIN_EDGE_PIXELS} to {MAX_EDGE_PIXELS})"
        )
    return PictureFormat(num_channels, height, width, may_resize=task.image_pixels is not None)


def _labelled(examples: list[_Example], wanted: PictureFormat) -> LabelledImages:
    labels_N = torch.tensor([label for _, _, label in examples])
    in_place = ImagesInPlace(examples, wanted)
    if len(examples) * wanted.num_bytes > MAX_HELD_BYTES:
        return LabelledImages(in_place, labels_N)
    return LabelledImages(ImagesInMemory(in_place.read(torch.arange(len(examples)))), labels_N)
