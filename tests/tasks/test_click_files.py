"""Criteo's format: what is read, and what is refused by name."""

from __future__ import annotations

import gzip
import math
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.errors import DataError
from p2pcodistill.tasks.click_files import (
    MAX_LINE_BYTES,
    NUM_CATEGORIES,
    NUM_DENSE,
    NUM_INTEGERS,
    Clicks,
    bucket_of,
    click_files,
    count_rows,
    read_clicks,
    require_click_files,
)

NUM_BUCKETS = 100


def row(label: object = 0, integers: dict[int, object] | None = None, categories: str = "c") -> str:
    values = [(integers or {}).get(index, index) for index in range(NUM_INTEGERS)]
    return "\t".join(map(str, [label, *values, *(f"{categories}{k}" for k in range(NUM_CATEGORIES))]))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "clicks.tsv"
    path.write_text("".join(row(index % 2, {0: index}, f"c{index}-") + "\n" for index in range(20)))
    return path


def read(*files: Path, **options: object) -> Clicks:
    return read_clicks(files, num_buckets=NUM_BUCKETS, **options)  # type: ignore[arg-type]


def same(first: Clicks, second: Clicks) -> bool:
    return (
        np.array_equal(first.dense_ND, second.dense_ND)
        and np.array_equal(first.buckets_NK, second.buckets_NK)
        and np.array_equal(first.labels_N, second.labels_N)
    )


# --- what is read ------------------------------------------------------------------------------------------------


def test_a_row_becomes_logarithms_flags_buckets_and_a_label(tmp_path: Path) -> None:
    path = tmp_path / "clicks.tsv"
    line = row(1, {0: "", 1: -2, 2: 1000})
    path.write_text(line.removesuffix("c25") + "\r\n")  # the last category is missing
    clicks = read(path)
    assert len(clicks) == 1 and clicks.truth_N is None
    assert clicks.labels_N.tolist() == [1]
    assert clicks.dense_ND.shape == (1, NUM_DENSE)
    values, flags = np.split(clicks.dense_ND[0], 2)
    logs = [0, -math.log(3), math.log(1001), *(math.log1p(index) for index in range(3, NUM_INTEGERS))]
    np.testing.assert_allclose(values, logs, rtol=1e-6)
    assert flags.tolist() == [1] + 12 * [0]
    expected = [bucket_of(f"c{k}".encode(), k, NUM_BUCKETS) for k in range(NUM_CATEGORIES - 1)]
    assert clicks.buckets_NK[0].tolist() == [*expected, 25 * NUM_BUCKETS]


def test_buckets_are_the_same_for_ever() -> None:
    assert bucket_of(b"68fd1e64", 0, 1000) == 653
    assert bucket_of(b"68fd1e64", 3, 1000) == 3653
    assert bucket_of(b"", 3, 1000) == 3000


@given(st.binary(min_size=1, max_size=20), st.integers(0, NUM_CATEGORIES - 1), st.integers(2, 1000))
def test_a_bucket_is_its_columns_own_and_not_that_of_missing_values(
    category: bytes, column: int, num_buckets: int
) -> None:
    assert column * num_buckets < bucket_of(category, column, num_buckets) < (column + 1) * num_buckets


def test_gzipped_files_are_read_whatever_they_are_called(file: Path, tmp_path: Path) -> None:
    zipped = tmp_path / "zipped"
    zipped.write_bytes(gzip.compress(file.read_bytes()))
    assert count_rows([zipped]) == 20
    assert same(read(zipped), read(file))


def test_rows_are_counted_over_all_files_and_empty_lines_are_none(file: Path, tmp_path: Path) -> None:
    more = tmp_path / "more.tsv"
    more.write_text(f"\n{row(1)}\n\n{row(0)}")  # the last line has no end
    assert count_rows([file, more]) == 22
    both = read(file, more)
    assert both.labels_N[-2:].tolist() == [1, 0]
    chosen = np.array([0, 3, 19, 20])
    assert same(read(file, more, wanted=chosen), both.take(chosen))


def test_folders_are_read_in_the_order_of_names_without_hidden_files(file: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    (folder / "day_1").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name in ("day_1/part", "day_0", ".hidden", ".git/config"):
        (folder / name).write_text(row() + "\n")
    (folder / "day_2").symlink_to(file)
    names = [path.name for path in click_files([folder, file])]
    assert names == ["day_0", "part", "day_2"], "no file twice"


# --- what is malformed -------------------------------------------------------------------------------------------

SHORT = "\t".join(row().split("\t")[:38])
MALFORMED = [
    (SHORT, "38 columns instead of 40"),
    (row() + "\tmore", "41 columns instead of 40"),
    (row(2), "the label is '2', not 0 or 1"),
    (row(""), "the label is '', not 0 or 1"),
    (row(0, {4: "1.5"}), "'1.5' is not an integer"),
    (row(0, {0: "-"}), "'-' is not an integer"),
    (row(0, {12: "9" * 30}), f"'{'9' * 30}' is not an integer"),
    ("not a row of clicks", "1 columns instead of 40"),
]


@pytest.mark.parametrize(("line", "fault"), MALFORMED)
def test_a_malformed_row_is_refused_by_name_unless_it_is_to_be_skipped(
    line: str, fault: str, file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = read(file)
    file.write_text(f"{file.read_text()}{line}\n{line}\n")
    with pytest.raises(DataError) as refusal:
        read(file)
    told = f"2 of 22 rows are malformed, the first in {file}, line 21: {fault}"
    assert str(refusal.value) == f'{told}: mend them, or set task.malformed_rows to "skip" (or "pad")'
    assert same(read(file, malformed_rows="skip"), good)
    assert caplog.messages == [f"{told}: skipped"]


def test_rows_whose_last_tabs_were_cut_off_can_be_padded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole, cut = tmp_path / "whole.tsv", tmp_path / "cut.tsv"
    whole.write_text(f"{row(1)}\n{SHORT}\t\t\n")
    cut.write_text(f"{row(1)}\n{SHORT}\n")
    assert same(read(cut, malformed_rows="pad"), read(whole))
    assert caplog.messages == ["1 of 2 rows lacked columns at the end: taken as missing"]


@pytest.mark.parametrize("line", [line for line, _ in MALFORMED if line != SHORT])
def test_padding_mends_nothing_else(line: str, tmp_path: Path) -> None:
    path = tmp_path / "clicks.tsv"
    path.write_text(line)
    with pytest.raises(DataError, match="1 of 1 rows are malformed"):
        read(path, malformed_rows="pad")


@given(content=st.binary(max_size=300))
def test_any_bytes_are_rows_or_refused(content: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("any") / "clicks"
    path.write_bytes(row().encode() + b"\n" + content)
    try:
        num_rows = count_rows([path])
        assert 1 <= len(read(path, malformed_rows="skip")) <= num_rows
        assert len(read(path)) == num_rows
    except DataError as error:
        assert str(path) in str(error) and "\n" not in str(error)


# --- files that cannot be read -----------------------------------------------------------------------------------


def test_a_missing_or_empty_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "empty.tsv").touch()
    (tmp_path / "folder").mkdir()
    for name, fault in [
        ("missing", "no such file or folder: "),
        ("empty.tsv", "is empty"),
        ("folder", "is empty"),
    ]:
        with pytest.raises(DataError, match=fault):
            click_files([tmp_path / name])


def test_a_line_without_end_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    path = tmp_path / "zeros.gz"
    path.write_bytes(gzip.compress(bytes(20 * MAX_LINE_BYTES)))
    with pytest.raises(DataError, match=r"zeros\.gz, line 1 is longer than 65536 bytes"):
        count_rows([path])


def test_a_damaged_archive_is_refused(file: Path) -> None:
    whole = gzip.compress(file.read_bytes())
    broken = bytearray(whole)
    broken[len(whole) // 2] ^= 0xFF
    for content in (whole[:-20], bytes(broken), whole[:10] + bytes(50)):
        file.write_bytes(content)
        with pytest.raises(DataError, match=f"cannot read {file}: "):
            count_rows([file])


def test_the_first_row_is_looked_at_before_anything_starts(file: Path) -> None:
    require_click_files([file], "error")
    file.write_text(f"label,i1,i2\n{file.read_text()}")
    with pytest.raises(DataError, match=r"clicks\.tsv, line 1: 1 columns instead of 40"):
        require_click_files([file], "error")
    require_click_files([file], "skip")
    with pytest.raises(DataError, match="no such file"):
        require_click_files([file.with_name("missing")], "skip")
