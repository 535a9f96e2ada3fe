"""Pictures with labels, from wherever they come, and how one becomes a tensor.

Every source opens its pictures one by one, as Pillow's images, so that resizing, colours, caps and errors are the same for a
folder of files, a data set of the hub, MNIST's format and the digits.

Axes of tensors: B pictures, C channels, H and W pixels.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from p2pcodistill.errors import DataError
from p2pcodistill.tasks.idx import MIN_IDX_EDGE_PIXELS, Bytes, read_idx_pair

MAX_PICTURE_PIXELS = 1 << 26
"""Of a picture before it is resized; a larger one is refused before it is decoded."""
MAX_PICTURE_FILE_BYTES = 1 << 28
MIN_EDGE_PIXELS = MIN_IDX_EDGE_PIXELS
MAX_EDGE_PIXELS = 2048
# No others: some of Pillow's formats start programs.
_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr"})  # of at most 8 bits a channel


@dataclass(frozen=True, slots=True)
class PictureSource:
    """The labelled pictures of one place."""

    place: str
    """For errors."""
    class_names: tuple[str, ...]
    labels: Sequence[int]
    """Of each picture, indices of `class_names`."""
    keys: Sequence[str | int]
    """What tells a picture from the others of this source, on whatever machine it lies."""
    is_grey: bool
    """Whether the pictures have one channel by nature."""
    open_picture: Callable[[int], Image.Image]
    """Opens, and does not yet decode, one of them."""


@dataclass(frozen=True, slots=True)
class PictureFormat:
    """What every picture is to become."""

    num_channels: int
    height: int
    width: int
    may_resize: bool
    """Else a picture of another size is an error."""

    @property
    def num_bytes(self) -> int:
        """Of one picture."""
        return self.num_channels * self.height * self.width


def decode_picture(source: PictureSource, index: int, wanted: PictureFormat) -> Tensor:
    """The picture as a uint8 tensor of axes CHW; to be resized, it is cropped about its middle. Raises DataError."""
    mode = "L" if wanted.num_channels == 1 else "RGB"
    size = (wanted.width, wanted.height)
    with _opened(source, index) as picture:
        if picture.size != size and not wanted.may_resize:
            raise DataError(
                f"{_name(source, index)} has {picture.width} x {picture.height} pixels, others have "
                f"{wanted.width} x {wanted.height}: set task.image_pixels to resize all"
            )
        try:
            decoded = picture.convert(mode)
            if decoded.size != size:
                decoded = ImageOps.fit(decoded, size, Image.Resampling.BICUBIC)
        except Exception as error:  # decoders raise whatever they stumble over
            raise _unreadable(source, index, error) from None
    pixels_HWC = np.array(decoded, np.uint8).reshape(wanted.height, wanted.width, wanted.num_channels)
    return torch.from_numpy(pixels_HWC).permute(2, 0, 1).contiguous()


def picture_size(source: PictureSource, index: int) -> tuple[int, int]:
    """(height, width) as the picture's header states them. Raises DataError."""
    with _opened(source, index) as picture:
        return picture.height, picture.width


@contextmanager
def _opened(source: PictureSource, index: int) -> Iterator[Image.Image]:
    """The picture, not yet decoded, whose header is acceptable."""
    try:
        picture = source.open_picture(index)
    except Exception as error:
        raise _unreadable(source, index, error) from None
    with picture:
        if picture.width * picture.height > MAX_PICTURE_PIXELS:
            raise DataError(
                f"{_name(source, index)} has {picture.width} x {picture.height} pixels: "
                f"at most {MAX_PICTURE_PIXELS} are read"
            )
        if picture.mode not in _MODES:
            raise DataError(
                f"{_name(source, index)} has pixels of the kind {picture.mode!r}: save it with 8 bits a channel"
            )
        yield picture


def _name(source: PictureSource, index: int) -> str:
    return f"picture {source.keys[index]} of {source.place}"


def _unreadable(source: PictureSource, index: int, error: Exception) -> DataError:
    why = str(error).splitlines()[0] if str(error) else type(error).__name__
    return DataError(f"cannot read {_name(source, index)} ({why}): mend it or take it away")


# --- sources


def digits() -> PictureSource:
    """The 1797 handwritten digits of 8 x 8 pixels that scikit-learn brings along."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise DataError(
            "the digits come with scikit-learn: pip install scikit-learn, or name pictures with --data"
        ) from None
    found = load_digits()
    pixels_NHW = np.rint(found.images * (255 / 16)).astype(np.uint8)
    return _source_of_arrays("scikit-learn's digits", pixels_NHW, found.target.astype(np.uint8))


def idx_source(path: Path) -> PictureSource:
    """A file of images in MNIST's format, with its labels from beside it. Raises DataError."""
    images_NHW, labels_N = read_idx_pair(path)
    return _source_of_arrays(str(path), images_NHW, labels_N)


def _source_of_arrays(place: str, images_NHW: Bytes, labels_N: Bytes) -> PictureSource:
    return PictureSource(
        place,
        class_names=tuple(map(str, range(int(labels_N.max()) + 1))),
        labels=labels_N.tolist(),
        keys=range(len(labels_N)),
        is_grey=True,
        open_picture=lambda index: Image.fromarray(images_NHW[index]),
    )


def folder_source(folder: Path) -> PictureSource:
    """A folder of one folder a class, with pictures at any depth; other files are passed over. Raises DataError."""
    try:
        class_folders = sorted(
            entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith(".")
        )
    except OSError as error:
        raise DataError(f"cannot read {folder}: {error.strerror}") from None
    if not class_folders:
        raise DataError(
            f"{folder} holds no folders: put the pictures of each class into one, or name a file in MNIST's format"
        )
    labels: list[int] = []
    keys: list[str] = []
    for label, name in enumerate(class_folders):
        inside = _pictures_in(folder / name)
        if not inside:
            raise DataError(f"{folder / name} holds no pictures ({', '.join(sorted(_SUFFIXES))})")
        labels += [label] * len(inside)
        keys += [path.relative_to(folder).as_posix() for path in inside]
    return PictureSource(
        str(folder),
        tuple(class_folders),
        labels,
        keys,
        is_grey=False,
        open_picture=lambda index: Image.open(folder / keys[index], formats=_FORMATS),
    )


def _pictures_in(folder: Path) -> list[Path]:
    found: list[Path] = []
    for parent, subfolders, names in os.walk(folder):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        found += [
            Path(parent, name)
            for name in sorted(names)
            if not name.startswith(".") and Path(name).suffix.lower() in _SUFFIXES
        ]
    return found


def open_encoded(content: bytes) -> Image.Image:
    """A picture file's content, opened and not yet decoded."""
    return Image.open(io.BytesIO(content), formats=_FORMATS)
