"""The images of sites: disjoint, the same on every machine, and refused in one line where something is wrong with them."""

from __future__ import annotations

import io
import itertools
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from p2pcodistill.errors import DataError
from p2pcodistill.task_configs import ImagesConfig
from p2pcodistill.tasks import image_data
from p2pcodistill.tasks.image_data import ImagesInMemory, ImagesInPlace, LabelledImages, load_site_images


def write_idx(
    folder: Path, name: str, images_NHW: np.ndarray[Any, Any], labels_N: np.ndarray[Any, Any]
) -> Path:
    for kind, content in (("images-idx3", images_NHW), ("labels-idx1", labels_N)):
        header = struct.pack(f">HBB{content.ndim}I", 0, 8, content.ndim, *content.shape)
        (folder / f"{name}-{kind}-ubyte").write_bytes(header + content.astype(np.uint8).tobytes())
    return folder / f"{name}-images-idx3-ubyte"


def numbered(num_images: int, *, first: int = 0, num_classes: int = 5) -> tuple[Any, Any]:
    """Images that say in their first two pixels which they are."""
    numbers = np.arange(first, first + num_images)
    images_NHW = np.zeros((num_images, 4, 6), np.uint8)
    images_NHW[:, 0, 0], images_NHW[:, 0, 1] = numbers // 256, numbers % 256
    return images_NHW, numbers % num_classes


def numbers_of(images: LabelledImages) -> list[int]:
    pixels = images.images.read(torch.arange(len(images.labels_N))).int()
    return (pixels[:, 0, 0, 0] * 256 + pixels[:, 0, 0, 1]).tolist()


def config(*data: Path, **keys: Any) -> ImagesConfig:
    return ImagesConfig(name="images", data=data, **keys)


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    return write_idx(tmp_path, "a", *numbered(400))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for index in range(24):
        path = tmp_path / "pictures" / ("cat", "dog")[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 4), (0, index, 200 * (index % 2))).save(path)
    return tmp_path / "pictures"


# --- parts


def test_shards_and_held_out_images_are_disjoint_and_together_all(mnist: Path) -> None:
    sites = [load_site_images(config(mnist, shards=(shard,), num_shards=3)) for shard in range(3)]
    held_out = numbers_of(sites[0].held_out)
    assert len(held_out) == 100 and all(numbers_of(site.held_out) == held_out for site in sites)
    parts = [numbers_of(site.train) for site in sites]
    assert [len(part) for part in parts] == [100, 100, 100]
    assert sorted([*held_out, *itertools.chain(*parts)]) == list(range(400))
    for part in parts:
        assert len(Counter(number % 5 for number in part)) == 5, "a mix"


def test_labels_stay_with_their_images(mnist: Path) -> None:
    site = load_site_images(config(mnist))
    for images in (site.train, site.held_out):
        assert [number % 5 for number in numbers_of(images)] == images.labels_N.tolist()


def test_several_shards_are_their_union_and_none_are_all(mnist: Path) -> None:
    def train(*shards: int, **keys: Any) -> list[int]:
        return sorted(numbers_of(load_site_images(config(mnist, shards=shards, num_shards=4, **keys)).train))

    assert train(0, 3) == sorted(train(0) + train(3))
    assert train() == train(0, 1, 2, 3)
    assert train(0, 3, max_examples=10) == sorted(train(0, max_examples=10) + train(3, max_examples=10))
    assert len(train(2, max_examples=10)) == 10


def test_what_is_held_out_does_not_depend_on_the_shards(mnist: Path) -> None:
    ways = [
        config(mnist, shards=shards, num_shards=num_shards, shard_by=by, max_held_out_examples=30)
        for shards, num_shards in (((), 1), ((1,), 2), ((5,), 7))
        for by in ("hash", "label")
    ]
    sites = [load_site_images(way) for way in ways]
    held_out = numbers_of(sites[0].held_out)
    assert len(held_out) == 30
    for site in sites:
        assert numbers_of(site.held_out) == held_out
        assert not set(held_out) & set(numbers_of(site.train))


def test_shards_by_label_have_few_classes_each_and_all_together(mnist: Path) -> None:
    sites = [
        load_site_images(config(mnist, shards=(shard,), num_shards=5, shard_by="label")) for shard in range(5)
    ]
    parts = [numbers_of(site.train) for site in sites]
    assert sorted(itertools.chain(*parts)) == sorted(numbers_of(load_site_images(config(mnist)).train))
    for site in sites:
        assert len(site.train.labels_N) == 60
        assert len(site.train.labels_N.unique()) <= 3, "most of one, and what is left of its neighbours"
        assert site.class_names == tuple("01234"), "the same model for all"


def test_a_capped_shard_by_label_has_all_of_its_classes(mnist: Path) -> None:
    site = load_site_images(config(mnist, shards=(0,), num_shards=2, shard_by="label", max_examples=40))
    assert len(site.train.labels_N) == 40 and len(site.train.labels_N.unique()) == 3


def test_given_held_out_images_leave_the_data_whole(mnist: Path, tmp_path: Path) -> None:
    held_out = write_idx(tmp_path, "b", *numbered(40, first=1000))
    site = load_site_images(config(mnist, held_out=(held_out,), max_held_out_examples=30))
    assert sorted(numbers_of(site.train)) == list(range(400))
    numbers = numbers_of(site.held_out)
    assert len(numbers) == 30 and min(numbers) >= 1000 and numbers != list(range(1000, 1030)), "a mix"


def test_several_files_are_one_set(mnist: Path, tmp_path: Path) -> None:
    more = write_idx(tmp_path, "b", *numbered(100, first=400))
    site = load_site_images(config(mnist, more))
    assert sorted(numbers_of(site.train) + numbers_of(site.held_out)) == list(range(500))


def test_a_file_that_is_listed_twice_is_there_once(mnist: Path) -> None:
    site = load_site_images(config(mnist, mnist.parent / "." / mnist.name, mnist))
    assert sorted(numbers_of(site.train) + numbers_of(site.held_out)) == list(range(400))


# --- kinds of data


def test_without_data_there_are_digits() -> None:
    sites = [
        load_site_images(ImagesConfig(name="images", shards=(shard,), num_shards=2)) for shard in range(2)
    ]
    assert [len(site.train.labels_N) for site in sites] == [674, 674]
    assert len(sites[0].held_out.labels_N) == 449
    assert sites[0].class_names == tuple("0123456789")
    assert sites[0].train.images.read(torch.tensor([0, 5])).shape == (2, 1, 8, 8)


def test_pictures_in_folders_have_colours_and_class_names(folder: Path) -> None:
    site = load_site_images(config(folder))
    assert site.class_names == ("cat", "dog") and site.format.num_channels == 3
    images_BCHW = site.train.images.read(torch.arange(18))
    assert images_BCHW.shape == (18, 3, 4, 6)
    assert (images_BCHW[:, 2, 0, 0] // 200).tolist() == site.train.labels_N.tolist()


def test_moved_folders_are_split_alike(folder: Path, tmp_path: Path) -> None:
    before = load_site_images(config(folder)).train.images.read(torch.arange(18))
    folder.rename(tmp_path / "elsewhere")
    assert torch.equal(
        load_site_images(config(tmp_path / "elsewhere")).train.images.read(torch.arange(18)), before
    )


def test_a_set_beyond_memory_is_read_where_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = load_site_images(config(folder))
    monkeypatch.setattr(image_data, "MAX_HELD_BYTES", 100)
    in_place = load_site_images(config(folder))
    assert isinstance(site.train.images, ImagesInMemory) and isinstance(in_place.train.images, ImagesInPlace)
    indices_B = torch.tensor([3, 0, 17, 3])
    assert torch.equal(site.train.images.read(indices_B), in_place.train.images.read(indices_B))


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "hub"
    folder.mkdir()
    return folder


def write_hub(folder: Path, split: str, labels: list[int], **more_columns: Any) -> None:
    encoded = []
    for index in range(len(labels)):
        file = io.BytesIO()
        Image.new("L", (6, 4), index).save(file, "PNG")
        encoded.append({"bytes": file.getvalue(), "path": None})
    features = {"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["dog", "cat"])}
    columns = {"picture": encoded, "kind": labels}
    for name, (kind, values) in more_columns.items():
        features[name], columns[name] = kind, values
    dataset = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    dataset.to_parquet(folder / f"{split}-00000.parquet")


def test_data_sets_of_the_hub(hub_folder: Path) -> None:
    write_hub(hub_folder, "train", [0, 1] * 10)
    write_hub(hub_folder, "test", [1, 0, 0])
    source = Path(f"hf:{hub_folder}")
    site = load_site_images(config(source, held_out=(Path(f"{source}#test"),), channels=1))
    assert site.class_names == ("cat", "dog"), "sorted, as in folders"
    pixels = site.train.images.read(torch.arange(20))[:, 0, 0, 0]
    assert [(1 + index) % 2 for index in pixels.tolist()] == site.train.labels_N.tolist()
    assert sorted(site.held_out.labels_N.tolist()) == [0, 1, 1]


def test_which_of_several_columns_of_classes_is_asked(hub_folder: Path) -> None:
    write_hub(
        hub_folder, "train", [0, 1] * 10, size=(datasets.ClassLabel(names=["s", "m", "l"]), [2, 0] * 10)
    )
    source = Path(f"hf:{hub_folder}")
    with pytest.raises(DataError, match=r"set task.label_column to one of .*\(kind, size\)"):
        load_site_images(config(source))
    assert load_site_images(config(source, label_column="size")).class_names == ("l", "m", "s")
    with pytest.raises(DataError, match=r"set task\.label_column"):
        load_site_images(config(source, label_column="picture"))


def test_a_damaged_picture_of_the_hub_is_named(hub_folder: Path) -> None:
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": b"no picture", "path": None}] * 8, "label": [0, 1] * 4}
    datasets.Dataset.from_dict(rows, features=features).to_parquet(hub_folder / "train-00000.parquet")
    with pytest.raises(DataError, match=r"cannot read picture \d of hf:"):
        load_site_images(config(Path(f"hf:{hub_folder}")))


def test_rows_of_the_hub_reach_no_other_files(hub_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside, outside = hub_folder / "a.png", hub_folder.parent / "b.png"
    for path in (inside, outside):
        Image.new("L", (6, 4), 9).save(path)
    (hub_folder / "link.png").symlink_to(outside)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})

    def load(*paths: Path) -> int:
        rows = {
            "image": [{"bytes": None, "path": str(path)} for path in paths] * 8,
            "label": [0, 1] * 4 * len(paths),
        }
        datasets.Dataset.from_dict(rows, features=features).to_parquet(hub_folder / "train-00000.parquet")
        site = load_site_images(config(Path(f"hf:{hub_folder}"), channels=1))
        return len(site.train.labels_N) + len(site.held_out.labels_N)

    assert load(inside) == 8
    refused = {
        outside: "is outside of the data set",
        hub_folder / ".." / "b.png": "is outside of the data set",
        hub_folder / "link.png": "is outside of the data set",
        hub_folder: "is no file",
    }
    for path, why in refused.items():
        with pytest.raises(DataError, match=rf"cannot read picture \d of hf:.* {why}"):
            load(path)
    monkeypatch.setattr(image_data, "MAX_PICTURE_FILE_BYTES", 20)
    with pytest.raises(DataError, match="is larger than"):
        load(inside)


def test_hub_data_without_images_or_labels_is_refused(hub_folder: Path) -> None:
    write_hub(hub_folder, "train", [0, -1] * 10)
    with pytest.raises(DataError, match="some that have no label"):
        load_site_images(config(Path(f"hf:{hub_folder}")))
    (hub_folder / "train-00000.parquet").unlink()
    (hub_folder / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(DataError, match=r"has 0 columns of images \(text\)"):
        load_site_images(config(Path(f"hf:{hub_folder}")))


# --- classes and formats


def test_numbered_classes_are_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    images_NHW, _ = numbered(24)
    site = load_site_images(config(write_idx(tmp_path, "a", images_NHW, np.arange(24) % 12)))
    assert site.class_names == tuple(str(number) for number in range(12))


def test_listed_classes_are_the_same_at_sites_that_lack_some(folder: Path) -> None:
    classes = ("wolf", "dog", "cat")
    site = load_site_images(config(folder, classes=classes))
    assert site.class_names == classes
    assert site.train.labels_N.unique().tolist() == [1, 2]
    with pytest.raises(DataError, match=r"the class 'dog' is not listed in task\.classes"):
        load_site_images(config(folder, classes=("wolf", "cat")))


def test_images_of_one_class_are_refused_unless_others_are_elsewhere(tmp_path: Path) -> None:
    images_NHW, labels_N = numbered(40)
    path = write_idx(tmp_path, "a", images_NHW, labels_N * 0 + 3)
    with pytest.raises(DataError, match=r"all images are of one class.*task\.classes"):
        load_site_images(config(path))
    assert load_site_images(config(path, classes=tuple("01234"))).train.labels_N.unique().tolist() == [3]


@pytest.mark.parametrize(("channels", "pixels"), [(1, None), (3, None), (1, 5), (3, 9)])
def test_channels_and_size_are_as_asked(mnist: Path, folder: Path, channels: int, pixels: int | None) -> None:
    for data in (mnist, folder):
        site = load_site_images(config(data, channels=channels, image_pixels=pixels))
        size = (pixels, pixels) if pixels else (4, 6)
        assert site.held_out.images.read(torch.arange(2)).shape == (2, channels, *size)


MALFORMED: dict[str, tuple[dict[str, Any], str]] = {
    "too few": ({"num_shards": 400, "shards": (0,)}, "too few for"),
    "missing": ({"held_out": (Path("/missing"),)}, "no such file or folder: /missing"),
    "means": ({"mean": (0.1, 0.2)}, r"task\.mean has 2 numbers, but images have 1 channel"),
    "stds": ({"channels": 3, "std": (0.1, 0.2)}, r"task\.std has 2 numbers, but images have 3 channel"),
    "too small": ({"image_pixels": 3}, r"images of 3 x 3 pixels: set task\.image_pixels"),
    "too large": ({"image_pixels": 5000}, r"images of 5000 x 5000 pixels: set task\.image_pixels"),
}


@pytest.mark.parametrize("name", MALFORMED)
def test_what_does_not_fit_is_said_in_one_line(mnist: Path, name: str) -> None:
    keys, sentence = MALFORMED[name]
    with pytest.raises(DataError, match=sentence) as refusal:
        load_site_images(config(mnist, **keys))
    assert "\n" not in str(refusal.value)


def test_pictures_of_two_sizes_need_a_common_one(folder: Path) -> None:
    Image.new("RGB", (7, 4)).save(folder / "cat" / "wide.png")
    with pytest.raises(DataError, match=r"set task\.image_pixels"):
        load_site_images(config(folder))
    assert load_site_images(config(folder, image_pixels=8)).format.height == 8
