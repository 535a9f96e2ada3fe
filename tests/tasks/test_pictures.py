"""Pictures: folders of them, and how any picture becomes a tensor, or an error of one line."""

from __future__ import annotations

import struct
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from p2pcodistill.errors import DataError
from p2pcodistill.tasks.pictures import (
    PictureFormat,
    decode_picture,
    digits,
    folder_source,
    open_encoded,
    picture_size,
)


def save(path: Path, *, size: tuple[int, int] = (6, 5), color: object = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)
    return path


def png_header(width: int, height: int) -> bytes:
    """The beginning of a PNG file of that size."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 1000) + b"IDAT"


def as_they_are(channels: int = 3) -> PictureFormat:
    return PictureFormat(channels, height=5, width=6, may_resize=False)


# --- folders


def test_a_folder_has_one_folder_a_class(tmp_path: Path) -> None:
    save(tmp_path / "dog" / "b.PNG")
    save(tmp_path / "cat" / "deeper" / "c.jpg")
    save(tmp_path / "cat" / "a.png")
    (tmp_path / "cat" / "notes.txt").write_text("no picture")
    (tmp_path / "labels.csv").write_text("no class")
    save(tmp_path / "cat" / ".hidden.png")
    save(tmp_path / ".hidden" / "a.png")
    source = folder_source(tmp_path)
    assert source.class_names == ("cat", "dog")
    assert list(zip(source.keys, source.labels, strict=True)) == [
        ("cat/a.png", 0),
        ("cat/deeper/c.jpg", 0),
        ("dog/b.PNG", 1),
    ]
    assert [picture_size(source, index) for index in range(3)] == [(5, 6)] * 3


def test_folders_without_classes_or_pictures_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no folders: put the pictures of each class"):
        folder_source(tmp_path)
    save(tmp_path / "cat" / "a.png")
    (tmp_path / "dog").mkdir()
    with pytest.raises(DataError, match=r"dog holds no pictures \(\.bmp, "):
        folder_source(tmp_path)
    with pytest.raises(DataError, match="cannot read"):
        folder_source(tmp_path / "missing")


# --- decoding


@pytest.mark.parametrize(
    ("mode", "color", "rgb", "grey"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30), 18),
        ("L", 77, (77, 77, 77), 77),
        ("1", 1, (255, 255, 255), 255),
        ("P", 5, None, None),
        ("RGBA", (10, 20, 30, 9), (10, 20, 30), 18),
    ],
)
def test_pictures_of_all_kinds_become_colours_or_grey(
    tmp_path: Path, mode: str, color: object, rgb: tuple[int, ...] | None, grey: int | None
) -> None:
    path = save(tmp_path / "a" / "a.png", mode=mode, color=color)
    source = folder_source(tmp_path)
    with Image.open(path) as picture:  # of a palette, what the palette says
        rgb, grey = (
            rgb or picture.convert("RGB").getpixel((0, 0)),
            grey or picture.convert("L").getpixel((0, 0)),
        )
    colours = decode_picture(source, 0, as_they_are())
    assert colours.dtype == torch.uint8 and colours.shape == (3, 5, 6)
    assert colours[:, 2, 3].tolist() == list(rgb)
    assert decode_picture(source, 0, as_they_are(1)).unique().tolist() == [grey]


def test_rows_and_columns_stay_where_they_are(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    pixels_HWC = np.random.default_rng(0).integers(256, size=(5, 6, 3), dtype=np.uint8)
    Image.fromarray(pixels_HWC).save(tmp_path / "a" / "a.png")
    tensor_CHW = decode_picture(folder_source(tmp_path), 0, as_they_are())
    assert torch.equal(tensor_CHW, torch.from_numpy(pixels_HWC).permute(2, 0, 1))


def test_a_resized_picture_is_cropped_about_its_middle(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    picture = Image.new("L", (40, 20), 0)
    picture.paste(200, (10, 0, 30, 20))  # the middle square
    picture.save(tmp_path / "a" / "a.png")
    wanted = PictureFormat(1, height=8, width=8, may_resize=True)
    tensor_CHW = decode_picture(folder_source(tmp_path), 0, wanted)
    assert tensor_CHW.min() > 150 and tensor_CHW[0, :, 2:6].unique().tolist() == [200]


def test_pictures_of_other_sizes_are_refused_unless_they_may_be_resized(tmp_path: Path) -> None:
    save(tmp_path / "a" / "a.png", size=(7, 5))
    with pytest.raises(
        DataError, match=r"a/a\.png .* has 7 x 5 pixels, others have 6 x 5: set task.image_pixels"
    ):
        decode_picture(folder_source(tmp_path), 0, as_they_are())


UNREADABLE = {
    "no picture": (b"no picture", "cannot read picture"),
    "empty": (b"", "cannot read picture"),
    "torn": (None, "cannot read picture"),
    "too large": (png_header(9000, 9000), f"9000 x 9000 pixels: at most {1 << 26} are read"),
    "a bomb": (png_header(2**31 - 1, 2**31 - 1), "cannot read picture"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_unreadable_pictures_are_named_in_one_line(tmp_path: Path, name: str) -> None:
    path = save(tmp_path / "a" / "a.png", color=(1, 2, 3))
    content, sentence = UNREADABLE[name]
    path.write_bytes(path.read_bytes()[:50] if content is None else content)
    with pytest.raises(DataError, match=sentence) as refusal:
        decode_picture(folder_source(tmp_path), 0, as_they_are())
    assert f"picture a/a.png of {tmp_path}" in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_picture_that_vanished_is_named(tmp_path: Path) -> None:
    path = save(tmp_path / "a" / "a.png")
    source = folder_source(tmp_path)
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read picture a/a\.png"):
        decode_picture(source, 0, as_they_are())


def test_more_than_eight_bits_a_channel_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.fromarray(np.full((5, 6), 40_000, np.uint16)).save(tmp_path / "a" / "a.png")
    with pytest.raises(DataError, match=r"pixels of the kind 'I;16': save it with 8 bits a channel"):
        decode_picture(folder_source(tmp_path), 0, as_they_are())


def test_formats_that_start_programs_are_no_pictures() -> None:
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\n"
    with pytest.raises(OSError, match="cannot identify"):
        open_encoded(postscript)


@given(
    content=st.binary(max_size=200),
    kind=st.sampled_from([b"", b"BM", b"GIF89a", png_header(6, 5), b"P6 6 5 255 "]),
)
def test_arbitrary_files_are_decoded_or_refused(
    content: bytes, kind: bytes, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.mktemp("any")
    (folder / "a").mkdir()
    (folder / "a" / "a.png").write_bytes(kind + content)
    try:
        assert decode_picture(folder_source(folder), 0, as_they_are()).shape == (3, 5, 6)
    except DataError as error:
        assert "\n" not in str(error)


# --- the digits


def test_the_digits_are_there_without_a_download() -> None:
    source = digits()
    assert source.class_names == tuple("0123456789") and source.is_grey
    assert len(source.keys) == len(source.labels) == 1797
    tensors = [decode_picture(source, index, PictureFormat(1, 8, 8, may_resize=False)) for index in range(20)]
    values = torch.stack(tensors).unique()
    assert values[0] == 0 and values[-1] == 255 and len(values) == 17


def test_without_scikit_learn_the_error_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        digits()
