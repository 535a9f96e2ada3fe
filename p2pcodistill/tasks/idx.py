"""MNIST's file format, IDX, plain or gzipped: a file of images and beside it a file of their labels.

A header of big-endian numbers (two zero bytes, the code of unsigned bytes, the number of dimensions, the size of each), and
then the bytes. The files are somebody else's: nothing is allocated before it was read.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

import numpy as np

from p2pcodistill.errors import DataError

MAX_IDX_BYTES = 4 << 30
"""Files that claim to hold more are refused."""
MAX_IDX_IMAGES = 1 << 23
"""More are refused, however small: each has a label and an entry in lists."""
MIN_IDX_EDGE_PIXELS = 4
_UNSIGNED_BYTES = 0x08
_GZIP_MAGIC = b"\x1f\x8b"
_PIECE_BYTES = 1 << 20

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]


def read_idx_pair(images_path: Path) -> tuple[Bytes, Bytes]:
    """(images_NHW, labels_N) of a file of images and of the file of labels that its name leads to. Raises DataError."""
    labels_path = labels_beside(images_path)
    # By the headers, before anything is held: tiny images can be many.
    num_images, height, width = read_idx_shape(images_path, num_dimensions=3, what="images")
    (num_labels,) = read_idx_shape(labels_path, num_dimensions=1, what="labels")
    if num_images != num_labels:
        raise DataError(
            f"{images_path} has {num_images} images, but {labels_path} has {num_labels} labels: "
            "are they of the same set?"
        )
    if num_images > MAX_IDX_IMAGES:
        raise DataError(
            f"{images_path} claims to hold {num_images} images: more than {MAX_IDX_IMAGES} are not read"
        )
    if min(height, width) < MIN_IDX_EDGE_PIXELS:
        raise DataError(
            f"{images_path} has images of {width} x {height} pixels: {MIN_IDX_EDGE_PIXELS} x {MIN_IDX_EDGE_PIXELS} are "
            "the least"
        )
    images_NHW = read_idx(images_path, num_dimensions=3, what="images")
    return images_NHW, read_idx(labels_path, num_dimensions=1, what="labels")


def labels_beside(images_path: Path) -> Path:
    """`x-labels-idx1-ubyte` beside `x-images-idx3-ubyte`, gzipped or not. Raises DataError where there is none."""
    name = images_path.name.removesuffix(".gz").replace("images", "labels").replace("idx3", "idx1")
    for candidate in (f"{name}.gz", name) if images_path.suffix == ".gz" else (name, f"{name}.gz"):
        path = images_path.with_name(candidate)
        if path != images_path and path.is_file():
            return path
    raise DataError(
        f"{images_path}: there is no file of labels {name} beside it: name files as MNIST's are, "
        "x-images-idx3-ubyte and x-labels-idx1-ubyte"
    )


def read_idx(path: Path, *, num_dimensions: int, what: str) -> Bytes:
    """The unsigned bytes in an IDX file of `what`, in the shape that it states. Raises DataError that names the file."""
    with _opened(path) as file:
        return _parse(file, path, _parse_shape(file, path, num_dimensions, what))


def read_idx_shape(path: Path, *, num_dimensions: int, what: str) -> tuple[int, ...]:
    """The shape that an IDX file of `what` states. Raises DataError like `read_idx`."""
    with _opened(path) as file:
        return _parse_shape(file, path, num_dimensions, what)


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    """The file's content, unzipped. Raises DataError for what goes wrong while it is read."""
    try:
        with path.open("rb") as file:
            is_gzipped = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
            file.seek(0)
            if not is_gzipped:
                yield file
                return
            with gzip.open(file) as unzipped:
                yield cast(IO[bytes], unzipped)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{path} is a damaged gzip file: fetch it again") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _parse_shape(file: IO[bytes], path: Path, num_dimensions: int, what: str) -> tuple[int, ...]:
    header = file.read(4)
    if len(header) < 4 or header[:2] != b"\0\0" or header[2] != _UNSIGNED_BYTES:
        raise DataError(f"{path} is not a file of {what} in MNIST's format (IDX, unsigned bytes)")
    if header[3] != num_dimensions:
        raise DataError(
            f"{path} has {header[3]} dimensions where {what} have {num_dimensions}: name the file of images, "
            "its labels are found beside it"
        )
    sizes = file.read(4 * num_dimensions)
    if len(sizes) < 4 * num_dimensions:
        raise DataError(f"{path} ends inside its header: fetch it again")
    shape = struct.unpack(f">{num_dimensions}I", sizes)
    num_bytes = math.prod(shape)
    if num_bytes == 0:
        raise DataError(f"{path} holds no {what}")
    if num_bytes > MAX_IDX_BYTES:
        raise DataError(
            f"{path} claims to hold {num_bytes} bytes of {what}: more than {MAX_IDX_BYTES >> 30} GiB are not read"
        )
    return shape


def _parse(file: IO[bytes], path: Path, shape: tuple[int, ...]) -> Bytes:
    num_bytes = math.prod(shape)
    content = _read_at_most(file, num_bytes + 1)
    if len(content) != num_bytes:
        more = "more" if len(content) > num_bytes else "fewer"
        raise DataError(
            f"{path} has {more} bytes than the {num_bytes} that its header states: fetch it again"
        )
    return np.frombuffer(content, np.uint8).reshape(shape)


def _read_at_most(file: IO[bytes], num_bytes: int) -> bytearray:
    """In pieces: `read` would allocate what a header states before it knows whether the file has it."""
    content = bytearray()
    while len(content) < num_bytes:
        piece = file.read(min(_PIECE_BYTES, num_bytes - len(content)))
        if not piece:
            break
        content += piece
    return content
