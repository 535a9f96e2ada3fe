"""Text of data sets that are streamed: held out and sharded by what a document says. The files are the tests' own."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
import pytest

from p2pcodistill.config import TrainingConfig
from p2pcodistill.errors import DataError
from p2pcodistill.task_configs import LanguageModelConfig
from p2pcodistill.tasks import hub_text as hub_text_module
from p2pcodistill.tasks.hub_text import hub_documents, shard_documents, split_hub_text, take_held_out
from p2pcodistill.tasks.language_data import LanguageData
from p2pcodistill.tasks.site_text import load_site_text
from p2pcodistill.tasks.vocabulary import ByteVocabulary

NUM_DOCUMENTS = 400


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An entry of `data` for a data set of small documents."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(hub_text_module, "_HELD_OUT_SHARE", 8)
    folder = tmp_path / "documents"
    folder.mkdir()
    rows = [{"text": f"document {index} of many\n", "number": index} for index in range(NUM_DOCUMENTS)]
    write(folder / "train.jsonl", [*rows, {"text": " ", "number": 0}])
    return Path(f"hf:{folder}")


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


ALL = {f"document {index} of many\n".encode() for index in range(NUM_DOCUMENTS)}


def shard(source: Path, index: int, *, num_shards: int = 2, seed: int = 0) -> list[bytes]:
    return list(
        shard_documents(
            [source], "text", shards=[index], num_shards=num_shards, keeps_held_out=True, shuffle_seed=seed
        )
    )


def test_shards_and_held_out_documents_are_all_there_is(source: Path) -> None:
    held_out = take_held_out([source], "text", 10**6)
    parts = [set(held_out), set(shard(source, 0)), set(shard(source, 1))]
    assert set().union(*parts) == ALL
    assert sum(map(len, parts)) == NUM_DOCUMENTS, "disjoint"
    assert all(len(part) > 20 for part in parts)
    assert not {*shard(source, 3, num_shards=4)} & {*held_out}, "whatever the number of shards"


def test_documents_come_in_an_order_of_the_seeds(source: Path) -> None:
    assert shard(source, 0, seed=1) == shard(source, 0, seed=1)
    assert shard(source, 0, seed=1) != shard(source, 0, seed=2)
    assert sorted(shard(source, 0, seed=1)) == sorted(shard(source, 0, seed=2))


def test_a_split_takes_the_first_documents_of_each_part(source: Path) -> None:
    split = split_hub_text([source], "text", num_shards=2, max_shard_bytes=500, max_held_out_bytes=200)
    assert [len(shard) for shard in split.shards] == [500, 500]
    assert len(split.held_out) == 200
    assert split.held_out == b"".join(take_held_out([source], "text", 200))
    whole = split_hub_text([source], "text", num_shards=2, max_shard_bytes=None, max_held_out_bytes=0)
    assert {document for shard in whole.shard_documents for document in shard} == ALL


def test_a_site_may_hold_a_part_in_memory(source: Path) -> None:
    task = LanguageModelConfig(data=(source,), max_data_bytes=600, max_held_out_bytes=100)
    sites = [
        load_site_text(task.model_copy(update={"shards": (index,), "num_shards": 2})) for index in range(2)
    ]
    assert len(sites[0].train) == len(sites[1].train) == 600
    assert sites[0].held_out == sites[1].held_out
    assert not {*sites[0].train_documents[:-1]} & {*sites[1].train_documents[:-1]}


def read(data: LanguageData, num_batches: int) -> list[list[list[int]]]:
    return [data.streams.next_batch()[0].tolist() for _ in range(num_batches)]


def test_a_site_streams_what_it_trains_on_and_resumes(source: Path) -> None:
    def data(seed: int = 0) -> LanguageData:
        config = LanguageModelConfig(data=(source,), window_tokens=8)
        return LanguageData(
            config, TrainingConfig(batch_size=3, seed=seed), ByteVocabulary(), rank=0, num_ranks=1
        )

    streamed = data()
    assert bytes(streamed.held_out.tolist()) == b"".join(take_held_out([source], "text", 32_768))
    for _ in range(20):
        inputs_BT, _ = streamed.streams.next_batch()
        assert inputs_BT.shape == (3, 8)
    assert streamed.streams.progress()["num_documents_visited"] >= 20 * 3 * 8 / 24
    resumed = data()
    resumed.streams.load_state_dict(streamed.streams.state_dict())
    assert read(resumed, 5) == read(streamed, 5)
    assert read(data(0), 5) != read(data(1), 5)


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ("body", r"has no column 'body': set task.text_column to one of text, number"),
        ("number", r"the column 'number' holds no text"),
    ],
)
def test_a_column_without_text_is_named(source: Path, column: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as refusal:
        next(hub_documents([source], column))
    assert str(source) in str(refusal.value)


def test_too_few_documents_are_an_error(tmp_path: Path, source: Path) -> None:
    folder = tmp_path / "few"
    folder.mkdir()
    write(folder / "train.jsonl", [{"text": "the only one"}])
    few = Path(f"hf:{folder}")
    with pytest.raises(DataError, match="too few documents for 4 shard"):
        split_hub_text([few], "text", num_shards=4, max_shard_bytes=100, max_held_out_bytes=100)
    with pytest.raises(DataError, match="give held-out text"):
        take_held_out([few], "text", 100)
