"""The text of one site: its shards of its data, and what is held out."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pcodistill.errors import ConfigError, DataError
from p2pcodistill.task_configs import LanguageModelConfig
from p2pcodistill.tasks.site_text import (
    comes_from_hub,
    load_site_text,
    load_unlabelled,
    require_enough_text,
    require_held_out,
    require_text_files,
)


def lines(name: str, num_lines: int) -> bytes:
    return b"".join(f"{name} line {index}\n".encode() for index in range(num_lines))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(40):
        (folder / f"file-{index}.txt").write_bytes(lines(f"f{index}", 60 + index))
    return folder


def origins(text: bytes) -> set[bytes]:
    """The files that whole lines of `text` come from."""
    return {line.split(b" ")[0] for line in text.splitlines() if line.count(b" ") == 2}


def test_sites_without_data_share_the_standard_library() -> None:
    task = LanguageModelConfig(max_data_bytes=20_000, max_held_out_bytes=2000)
    sites = [load_site_text(task.of_member(index, 2)) for index in range(2)]
    assert sites[0].held_out == sites[1].held_out
    assert sites[0].train != sites[1].train


def test_a_site_may_have_several_shards(corpus: Path) -> None:
    task = LanguageModelConfig(data=(corpus,), num_shards=4)
    single = [load_site_text(task.model_copy(update={"shards": (index,)})) for index in range(4)]
    both = load_site_text(task.model_copy(update={"shards": (0, 2)}))
    assert both.train == single[0].train + single[2].train
    assert both.held_out == single[1].held_out
    assert not origins(both.train) & origins(single[1].train + single[3].train)
    assert origins(load_site_text(task).train) == set().union(*(origins(site.train) for site in single))


def test_given_held_out_text_is_not_taken_from_the_data(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_bytes(lines("held", 10))
    task = LanguageModelConfig(data=(corpus,), held_out=(tmp_path / "held.txt",))
    text = load_site_text(task.of_member(1, 2))
    assert text.held_out == lines("held", 10)
    assert len(origins(text.train)) == 40, "a site's own data is all its own"


def test_given_data_without_held_out_keeps_some_back(corpus: Path) -> None:
    text = load_site_text(LanguageModelConfig(data=(corpus,), max_held_out_bytes=1000))
    assert 900 <= len(text.held_out) <= 1000
    assert not origins(text.held_out) & origins(text.train)


def test_unlabelled_text_is_read_whole(corpus: Path) -> None:
    task = LanguageModelConfig(data=(corpus,), unlabelled=(corpus / "file-3.txt",))
    assert load_unlabelled(task) == (lines("f3", 63),)


def test_too_little_text_says_what_is_needed(corpus: Path) -> None:
    task = LanguageModelConfig(data=(corpus,))
    num_bytes = len(load_site_text(task).train)
    require_enough_text(num_bytes, task.data, task, batch_size=4, num_ranks=2)
    with pytest.raises(DataError, match="bytes need 330000: give more text, or lower") as refusal:
        require_enough_text(num_bytes, task.data, task, batch_size=5000, num_ranks=2)
    assert str(corpus) in str(refusal.value)
    pieces = task.model_copy(update={"vocabulary": Path("pieces.json")})
    with pytest.raises(DataError, match="tokens need 330000"):
        require_enough_text(num_bytes, task.data, pieces, batch_size=5000, num_ranks=2)
    require_held_out(2, task)
    with pytest.raises(DataError, match="held-out"):
        require_held_out(1, task)


@pytest.mark.parametrize(
    ("key", "sentence"),
    [("held_out", "no such file"), ("unlabelled", "no such file"), ("vocabulary", "vocabulary train")],
)
def test_what_is_missing_is_named_before_anything_starts(corpus: Path, key: str, sentence: str) -> None:
    missing = corpus / "missing"
    value = missing if key == "vocabulary" else (missing,)
    task = LanguageModelConfig(data=(corpus,)).model_copy(update={key: value})
    with pytest.raises(DataError, match=sentence) as refusal:
        require_text_files(task, batch_size=4, num_ranks=1)
    assert str(missing) in str(refusal.value)


def test_what_is_too_little_is_told_before_anything_starts(corpus: Path) -> None:
    task = LanguageModelConfig(data=(corpus,))
    require_text_files(task, batch_size=4, num_ranks=2)
    with pytest.raises(DataError, match="need 3300000"):
        require_text_files(task, batch_size=50_000, num_ranks=2)


def test_a_batch_of_unlabelled_text_needs_some(corpus: Path) -> None:
    task = LanguageModelConfig(data=(corpus,), unlabelled_batch_size=3)
    with pytest.raises(ConfigError, match="unlabelled_batch_size is for unlabelled text: list some"):
        require_text_files(task, batch_size=4, num_ranks=1)


def test_files_and_data_sets_do_not_mix() -> None:
    assert comes_from_hub([Path("hf:a"), Path("hf:b#test")])
    assert not comes_from_hub([])
    with pytest.raises(DataError, match=r"^corpus: files and hf: data sets do not mix"):
        comes_from_hub([Path("hf:a"), Path("corpus")])
