"""Files of text: deterministic, disjoint, and never learnt from where they are evaluated on."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.errors import DataError
from p2pcodistill.tasks import text as text_module
from p2pcodistill.tasks.text import split_text, standard_library_files, text_files


def lines(name: str, num_lines: int) -> bytes:
    return b"".join(f"{name} line {index}\n".encode() for index in range(num_lines))


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    for index in range(40):
        file = folder / f"part-{index % 4}" / f"file-{index}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(lines(f"f{index}", 60 + index))
    return folder


def origins(text: bytes) -> set[bytes]:
    """The files that whole lines of `text` come from."""
    return {line.split(b" ")[0] for line in text.splitlines() if line.count(b" ") == 2}


def test_shards_and_held_out_share_no_file(corpus: Path) -> None:
    split = split_text(text_files([corpus]), num_shards=3, max_shard_bytes=None, max_held_out_bytes=2000)
    parts = [origins(split.held_out), *map(origins, split.shards)]
    assert 1 <= len(split.held_out) <= 2000
    assert len(parts[0]) >= 4, "the held-out text is a mix"
    assert sum(map(len, parts)) == len(set().union(*parts)) == 40


def test_split_does_not_depend_on_where_the_files_lie_or_on_their_order(corpus: Path, tmp_path: Path) -> None:
    moved = tmp_path / "elsewhere"
    files = text_files([corpus])
    first = split_text(files, num_shards=2, max_shard_bytes=3000, max_held_out_bytes=1000)
    corpus.rename(moved)
    files = text_files([moved])
    random.Random(0).shuffle(files)
    assert split_text(files, num_shards=2, max_shard_bytes=3000, max_held_out_bytes=1000) == first


def test_a_limited_shard_is_a_mix_of_many_files(tmp_path: Path) -> None:
    (tmp_path / "huge.txt").write_bytes(lines("huge", 50_000))
    for index in range(60):
        (tmp_path / f"{index}.txt").write_bytes(lines(f"f{index}", 100))
    split = split_text(text_files([tmp_path]), num_shards=1, max_shard_bytes=8000, max_held_out_bytes=0)
    assert len(split.shards[0]) == 8000
    assert len(origins(split.shards[0])) >= 16


def test_a_limited_shard_of_few_files_takes_all_it_may(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(lines("a", 1000))
    split = split_text([tmp_path / "a.txt"], num_shards=1, max_shard_bytes=5000, max_held_out_bytes=0)
    assert len(split.shards[0]) > 4900


@pytest.mark.parametrize("num_files", [1, 2, 3, 7, 20, 40])
def test_what_is_held_out_does_not_depend_on_the_number_of_shards(corpus: Path, num_files: int) -> None:
    files = text_files([corpus])[:num_files]
    splits = [
        split_text(files, num_shards=num_shards, max_shard_bytes=None, max_held_out_bytes=800)
        for num_shards in (1, 2, 4, 8)
    ]
    assert len({split.held_out_documents for split in splits}) == 1
    for split in splits:
        seen = [set(split.held_out.splitlines()), *(set(shard.splitlines()) for shard in split.shards)]
        assert sum(map(len, seen)) == len(set().union(*seen)), "disjoint"


def test_a_file_is_a_document(corpus: Path) -> None:
    split = split_text(text_files([corpus]), num_shards=2, max_shard_bytes=None, max_held_out_bytes=0)
    documents = [document for shard in split.shard_documents for document in shard]
    assert sorted(documents) == sorted(file.read_bytes() for file in text_files([corpus]))
    assert split.shards == tuple(b"".join(shard) for shard in split.shard_documents)


def test_fewer_files_than_parts_are_cut_at_line_ends(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(lines("a", 5000))
    split = split_text([tmp_path / "a.txt"], num_shards=4, max_shard_bytes=None, max_held_out_bytes=1600)
    seen = [set(split.held_out.splitlines()), *(set(shard.splitlines()) for shard in split.shards)]
    assert set().union(*seen) == set(lines("a", 5000).splitlines())
    assert sum(map(len, seen)) == 5000, "disjoint"
    assert 1200 <= len(split.held_out) <= 1600
    assert max(map(len, split.shards)) < 1.2 * min(map(len, split.shards))
    positions = [int(line.split()[-1]) for line in split.held_out.splitlines()]
    assert positions[-1] - positions[0] > 4000, "the held-out text is a mix"


@given(
    contents=st.lists(st.text(alphabet="ab\n", min_size=1, max_size=300), min_size=1, max_size=6),
    num_shards=st.integers(1, 4),
    max_shard_bytes=st.none() | st.integers(1, 400),
    max_held_out_bytes=st.integers(0, 200),
)
def test_any_text_is_split_within_the_caps_or_refused(
    contents: list[str],
    num_shards: int,
    max_shard_bytes: int | None,
    max_held_out_bytes: int,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("any")
    files = [folder / str(index) for index in range(len(contents))]
    for file, content in zip(files, contents, strict=True):
        file.write_text(content)
    try:
        split = split_text(
            files,
            num_shards=num_shards,
            max_shard_bytes=max_shard_bytes,
            max_held_out_bytes=max_held_out_bytes,
        )
    except DataError as error:
        assert "give more text" in str(error)
        return
    assert len(split.shards) == num_shards
    assert len(split.held_out) <= max_held_out_bytes
    assert all(1 <= len(shard) <= (max_shard_bytes or 10_000) for shard in split.shards)
    num_all = sum(len(content) + 1 for content in contents)
    assert len(split.held_out) + sum(map(len, split.shards)) <= num_all


def test_long_lines_are_cut_anywhere(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"x" * 100_000)
    split = split_text([tmp_path / "a.txt"], num_shards=2, max_shard_bytes=10_000, max_held_out_bytes=1600)
    assert [len(shard) for shard in split.shards] == [10_000, 10_000]
    assert len(split.held_out) == 1600


def test_folders_pass_over_what_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("grüße\n")
    (tmp_path / "nul.bin").write_bytes(b"abc\0def")
    (tmp_path / "latin-1.txt").write_bytes("grüße\n".encode("latin-1"))
    (tmp_path / "empty.txt").touch()
    (tmp_path / ".hidden").write_text("secret\n")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_text("secret\n")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "link.txt").symlink_to(tmp_path / "text.txt")
    assert len(text_files([tmp_path])) == 1
    assert len(text_files([tmp_path, tmp_path / "text.txt"])) == 1, "no file twice"


def test_a_sample_may_end_inside_a_character(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a" + "ü" * 10_000)
    assert text_files([tmp_path / "a.txt"]) == [tmp_path / "a.txt"]


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("missing", None, "no such file or folder"),
        ("empty", b"", "empty, unreadable or not UTF-8"),
        ("blank", b" \n", "empty, unreadable or not UTF-8"),
        ("binary", b"\0\1\2", "empty, unreadable or not UTF-8"),
    ],
)
def test_a_bad_file_is_named(tmp_path: Path, name: str, content: bytes | None, sentence: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError, match=sentence) as refusal:
        text_files([path])
    assert str(path) in str(refusal.value)


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="holds no text files") as refusal:
        text_files([tmp_path])
    assert str(tmp_path) in str(refusal.value)


def test_no_paths_are_an_error() -> None:
    with pytest.raises(DataError, match="no data"):
        text_files([])
    with pytest.raises(DataError, match="no data"):
        split_text([], num_shards=1, max_shard_bytes=None, max_held_out_bytes=10)


def test_a_file_that_vanishes_is_named(corpus: Path) -> None:
    files = text_files([corpus])
    files[0].unlink()
    with pytest.raises(DataError, match="cannot read") as refusal:
        split_text(files, num_shards=1, max_shard_bytes=None, max_held_out_bytes=0)
    assert str(files[0]) in str(refusal.value)


def test_the_standard_library_has_enough_for_a_pair() -> None:
    files = standard_library_files()
    assert all(file.suffix == ".py" for file in files)
    assert not any({"site-packages", "dist-packages"} & set(file.parts) for file in files)
    split = split_text(files, num_shards=2, max_shard_bytes=500_000, max_held_out_bytes=32_768)
    assert [len(shard) for shard in split.shards] == [500_000, 500_000]
    assert len(split.held_out) == 32_768


def test_a_python_without_sources_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(text_module.sysconfig, "get_path", lambda _name: str(tmp_path))
    with pytest.raises(DataError, match="--data"):
        standard_library_files()
