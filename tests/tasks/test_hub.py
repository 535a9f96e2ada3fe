"""Data sets of the hub: how they are named, and what is said where one cannot be loaded. The files are the tests' own."""

from __future__ import annotations

import sys
from pathlib import Path

import datasets
import pytest

from p2pcodistill.errors import DataError
from p2pcodistill.task_configs import ImagesConfig, is_hub_source
from p2pcodistill.tasks.hub import HubSource, load_hub_dataset


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "lines"
    folder.mkdir()
    for split, lines in (("train", ["a", "b"]), ("test", ["c"])):
        (folder / f"{split}.jsonl").write_text("".join(f'{{"text": "{line}"}}\n' for line in lines))
    return folder


@pytest.mark.parametrize(
    ("entry", "source"),
    [
        ("hf:ylecun/mnist", HubSource("ylecun/mnist", None, "train")),
        ("hf:ylecun/mnist#test", HubSource("ylecun/mnist", None, "test")),
        ("hf:Salesforce/wikitext:wikitext-2-v1", HubSource("Salesforce/wikitext", "wikitext-2-v1", "train")),
        ("hf:cifar100:plain_text#test[:10%]", HubSource("cifar100", "plain_text", "test[:10%]")),
    ],
)
def test_entries_name_a_data_set_a_subset_and_a_split(entry: str, source: HubSource) -> None:
    assert is_hub_source(Path(entry))
    assert HubSource.parse(Path(entry)) == source
    assert HubSource.parse(Path(str(source))) == source


def test_an_entry_without_a_name_is_refused() -> None:
    with pytest.raises(DataError, match="write hf:OWNER/NAME"):
        HubSource.parse(Path("hf:#test"))


def test_entries_stay_as_they_are_where_paths_become_absolute(tmp_path: Path) -> None:
    entries = (Path("hf:ylecun/mnist"), Path("pictures"))
    task = ImagesConfig(name="images", data=entries, held_out=entries).located_in(tmp_path)
    assert task.data == task.held_out == (entries[0], tmp_path / "pictures")


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("split", "lines"), [("train", ["a", "b"]), ("test", ["c"])])
def test_a_split_is_loaded(folder: Path, streaming: bool, split: str, lines: list[str]) -> None:
    dataset = load_hub_dataset(HubSource(str(folder), None, split), streaming=streaming)
    assert [row["text"] for row in dataset] == lines
    assert isinstance(dataset, datasets.IterableDataset) == streaming


def test_what_cannot_be_loaded_is_named_in_one_line(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for source in (
        HubSource(str(folder), None, "no-such-split"),
        HubSource(str(folder), "no-such-subset", "train"),
        HubSource(str(tmp_path / "empty"), None, "train"),
        HubSource("no such name", None, "train"),
    ):
        with pytest.raises(DataError, match="cannot load") as refusal:
            load_hub_dataset(source)
        assert str(source) in str(refusal.value) and "\n" not in str(refusal.value)


def test_without_the_library_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match=r"pip install 'p2pcodistill\[datasets\]'"):
        load_hub_dataset(HubSource("ylecun/mnist", None, "train"))
