"""MNIST's file format, IDX, plain or gzipped: a file of images and beside it a file of their labels.

A header of big-endian numbers (two zero bytes, the code of unsigned bytes, the number of dimensions, the size of each), and
then the bytes. The files are somebody else's: nothing is allocated before it was read.
"""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO, Any, TypeAlias, cast

import numpy as np

from p2pcodistill.errors import DataError

MAX_IDX_BYTES = 4 << 30
"""Files that claim to hold more are refused."""
_UNSIGNED_BYTES = 0x08
_GZIP_MAGIC = b"\x1f\x8b"
_PIECE_BYTES = 1 << 20

Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]


def read_idx_pair(images_path: Path) -> tuple[Bytes, Bytes]:
    """(images_NHW, labels_N) of a file of images and of the file of labels that its name leads to. Raises DataError."""
    images_NHW = read_idx(images_path, num_dimensions=3, what="images")
    labels_path = labels_beside(images_path)
    labels_N = read_idx(labels_path, num_dimensions=1, what="labels")
    if len(images_NHW) != len(labels_N):
        raise DataError(
            f"{images_path} has {len(images_NHW)} images, but {labels_path} has {len(labels_N)} labels: "
            "are they of the same set?"
        )
    return images_NHW, labels_N


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
    try:
        with path.open("rb") as file:
            is_gzipped = file.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
            file.seek(0)
            if not is_gzipped:
                return _parse(file, path, num_dimensions, what)
            with gzip.open(file) as unzipped:
                return _parse(cast(IO[bytes], unzipped), path, num_dimensions, what)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise DataError(f"{path} is a damaged gzip file: fetch it again") from None
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from None


def _parse(file: IO[bytes], path: Path, num_dimensions: int, what: str) -> Bytes:
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
