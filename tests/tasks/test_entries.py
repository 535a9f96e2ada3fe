"""Whether entries of `data` and `held_out` are the same, or have something in common."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pcodistill.errors import DataError
from p2pcodistill.task_configs import ImagesConfig
from p2pcodistill.tasks.entries import distinct_entries, have_overlap
from p2pcodistill.tasks.preflight import require_data


def test_an_entry_is_there_once_whatever_it_is_called(tmp_path: Path) -> None:
    file, link = tmp_path / "file", tmp_path / "link"
    file.touch()
    link.symlink_to(file)
    entries = [
        file,
        Path("hf:a/b"),
        link,
        tmp_path / "x" / ".." / "file",
        Path("hf:a/b#train"),
        Path("hf:a/b#test"),
    ]
    assert distinct_entries(entries) == [file, Path("hf:a/b"), Path("hf:a/b#test")]


@pytest.mark.parametrize(
    ("one", "other", "overlap"),
    [
        ("/a/b", "/a/b", True),
        ("/a", "/a/b/c", True),
        ("/a/b", "/a/bc", False),
        ("hf:a/b", "hf:a/b:c", True),
        ("hf:a/b:c", "hf:a/b:d", False),
        ("hf:a/b", "hf:a/c", False),
        ("hf:a/b#train[:10%]", "hf:a/b", True),
        ("hf:a/b#train[:10%]", "hf:a/b#train[10%:]", False),
        ("hf:a/b#train+test", "hf:a/b#test", True),
        ("hf:a/b", "/a/b", False),
    ],
)
def test_what_entries_have_in_common_is_seen_by_their_names(one: str, other: str, overlap: bool) -> None:
    assert have_overlap(Path(one), Path(other)) == have_overlap(Path(other), Path(one)) == overlap


def test_a_node_is_not_evaluated_on_what_it_trains_on(tmp_path: Path) -> None:
    (tmp_path / "part").mkdir()
    task = ImagesConfig(name="images", data=(tmp_path,), held_out=(tmp_path / "part",))
    with pytest.raises(
        DataError, match=r"part is to be evaluated on and overlaps .*, which is to be trained on"
    ) as refusal:
        require_data(task, batch_size=2, num_ranks=1)
    assert "\n" not in str(refusal.value)
