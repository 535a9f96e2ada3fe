"""MNIST's format: read as it is written, refused in one line where it is damaged, and never believed before it is read."""

from __future__ import annotations

import gzip
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.errors import DataError
from p2pcodistill.tasks.idx import labels_beside, read_idx, read_idx_pair

IMAGES = np.arange(3 * 4 * 5, dtype=np.uint8).reshape(3, 4, 5)
LABELS = np.array([7, 0, 2], np.uint8)


def idx(*shape: int, content: bytes, code: int = 8) -> bytes:
    return struct.pack(f">HBB{len(shape)}I", 0, code, len(shape), *shape) + content


IMAGES_IDX = idx(3, 4, 5, content=IMAGES.tobytes())
LABELS_IDX = idx(3, content=LABELS.tobytes())


@pytest.mark.parametrize("packs_images", [True, False])
@pytest.mark.parametrize("packs_labels", [True, False])
@pytest.mark.parametrize("dot", ["-", "."])
def test_images_are_read_with_the_labels_beside_them(
    tmp_path: Path, packs_images: bool, packs_labels: bool, dot: str
) -> None:
    images = tmp_path / f"train-images{dot}idx3-ubyte{'.gz' * packs_images}"
    labels = tmp_path / f"train-labels{dot}idx1-ubyte{'.gz' * packs_labels}"
    images.write_bytes(gzip.compress(IMAGES_IDX) if packs_images else IMAGES_IDX)
    labels.write_bytes(gzip.compress(LABELS_IDX) if packs_labels else LABELS_IDX)
    images_NHW, labels_N = read_idx_pair(images)
    assert np.array_equal(images_NHW, IMAGES) and np.array_equal(labels_N, LABELS)


def test_where_both_are_there_packed_images_go_with_packed_labels(tmp_path: Path) -> None:
    for name in ("a-labels-idx1-ubyte", "a-labels-idx1-ubyte.gz"):
        (tmp_path / name).touch()
    assert labels_beside(tmp_path / "a-images-idx3-ubyte.gz").name == "a-labels-idx1-ubyte.gz"
    assert labels_beside(tmp_path / "a-images-idx3-ubyte").name == "a-labels-idx1-ubyte"


@pytest.mark.parametrize("name", ["a-images-idx3-ubyte", "pictures.bin"])
def test_labels_that_are_missing_are_named(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(IMAGES_IDX)
    with pytest.raises(DataError, match="no file of labels"):
        read_idx_pair(tmp_path / name)


def test_as_many_labels_as_images(tmp_path: Path) -> None:
    (tmp_path / "a-images-idx3-ubyte").write_bytes(IMAGES_IDX)
    (tmp_path / "a-labels-idx1-ubyte").write_bytes(idx(2, content=b""))  # the header says it
    with pytest.raises(DataError, match=r"has 3 images, but .* has 2 labels"):
        read_idx_pair(tmp_path / "a-images-idx3-ubyte")


def test_many_tiny_images_are_refused_by_their_header(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write(*shape: int) -> Path:
        (tmp_path / "a-images-idx3-ubyte").write_bytes(idx(*shape, content=b""))
        (tmp_path / "a-labels-idx1-ubyte").write_bytes(idx(shape[0], content=b""))
        return tmp_path / "a-images-idx3-ubyte"

    with pytest.raises(DataError, match=r"has images of 1 x 1 pixels: 4 x 4 are the least"):
        read_idx_pair(write(3_000_000, 1, 1))
    with pytest.raises(DataError, match=r"claims to hold 9000000 images: more than 8388608 are not read"):
        read_idx_pair(write(9_000_000, 4, 4))


MALFORMED = {
    "empty": (b"", "not a file of images in MNIST's format"),
    "text": (b"a,b,c\n1,2,3\n", "not a file of images in MNIST's format"),
    "floats": (idx(1, 1, 1, content=b"\0\0\0\0", code=0x0D), "not a file of images in MNIST's format"),
    "labels": (LABELS_IDX, "has 1 dimensions where images have 3: name the file of images"),
    "torn header": (IMAGES_IDX[:9], "ends inside its header"),
    "no images": (idx(0, 4, 5, content=b""), "holds no images"),
    "no pixels": (idx(3, 0, 5, content=b""), "holds no images"),
    "torn": (IMAGES_IDX[:-1], "has fewer bytes than the 60"),
    "longer": (IMAGES_IDX + b"\0", "has more bytes than the 60"),
    "absurd": (idx(2**32 - 1, 2**32 - 1, 2**32 - 1, content=b"x"), "claims to hold .* more than 4 GiB"),
    "torn gzip": (gzip.compress(IMAGES_IDX)[:-20], "damaged gzip file"),
    "no gzip": (b"\x1f\x8b" + b"x" * 30, "damaged gzip file"),
    "damaged gzip": (gzip.compress(IMAGES_IDX)[:10] + b"\xff" * 30, "damaged gzip file"),
    "wrong sum": (gzip.compress(IMAGES_IDX)[:-8] + b"\xff" * 8, "damaged gzip file"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_malformed_files_are_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, sentence = MALFORMED[name]
    path = tmp_path / "a-images-idx3-ubyte"
    path.write_bytes(content)
    with pytest.raises(DataError, match=sentence) as refusal:
        read_idx(path, num_dimensions=3, what="images")
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_path_that_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"cannot read .*: Is a directory"):
        read_idx(tmp_path, num_dimensions=3, what="images")


@pytest.mark.parametrize("packs", [True, False])
def test_memory_follows_what_is_there_and_not_what_is_claimed(tmp_path: Path, packs: bool) -> None:
    path = tmp_path / "a-images-idx3-ubyte"
    content = idx(1000, 1000, 1000, content=b"x" * 100)
    path.write_bytes(gzip.compress(content) if packs else content)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match="fewer bytes than the 1000000000"):
            read_idx(path, num_dimensions=3, what="images")
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak_bytes < 10 << 20


@given(content=st.binary(max_size=100), packs=st.booleans())
def test_arbitrary_bytes_are_read_or_refused(
    content: bytes, packs: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.mktemp("any") / "a-images-idx3-ubyte"
    content = b"\0\0\x08\x03" + content
    path.write_bytes(gzip.compress(content) if packs else content)
    try:
        images = read_idx(path, num_dimensions=3, what="images")
    except DataError:
        return
    assert images.size == len(content) - 16
