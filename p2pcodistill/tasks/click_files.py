"""Clicks in the format of Criteo's display advertising challenge (Anil et al. 2018, section 3.1), as numbers.

A row is a line of 40 columns with tabs in between: the label (1: clicked), 13 integers, 26 categories. A missing value is
empty. Files are plain or gzipped. In memory an example takes 209 bytes in every rank.

Axes of arrays: N examples, D dense features, K categories.
"""

from __future__ import annotations

import gzip
import itertools
import logging
import math
import os
import re
import zlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from p2pcodistill.errors import DataError
from p2pcodistill.task_configs import MalformedRows

NUM_INTEGERS = 13
NUM_CATEGORIES = 26
NUM_DENSE = 2 * NUM_INTEGERS
MAX_LINE_BYTES = 1 << 16

_NUM_COLUMNS = 1 + NUM_INTEGERS + NUM_CATEGORIES
_ROW = re.compile(rb"[01](?:\t(?:-?[0-9]{1,18})?){%d}(?:\t[^\t]*){%d}" % (NUM_INTEGERS, NUM_CATEGORIES))
_GZIP_MAGIC = b"\x1f\x8b"
_logger = logging.getLogger("p2pcodistill")

Floats: TypeAlias = NDArray[np.float32]


@dataclass(frozen=True)
class Clicks:
    """Examples as the model reads them."""

    dense_ND: Floats
    """Each integer's logarithm, 0 where it is missing; then for each integer, whether it is missing."""
    buckets_NK: NDArray[np.int32]
    """Of each category, the row of the table that all categories share: the bucket of its column that it is hashed into."""
    labels_N: NDArray[np.uint8]
    """1: clicked."""
    truth_N: NDArray[np.float64] | None = None
    """The probability that the label is 1, where that is known."""

    def __len__(self) -> int:
        return len(self.labels_N)

    def take(self, indices: NDArray[np.int64]) -> Clicks:
        """Those of these indices."""
        truth_N = None if self.truth_N is None else self.truth_N[indices]
        return Clicks(self.dense_ND[indices], self.buckets_NK[indices], self.labels_N[indices], truth_N)


def transform_integers(integers_NI: NDArray[np.floating[Any]]) -> Floats:
    """The dense features of integers, of which missing ones are NaN: logarithms of counts, that spread over decades."""
    is_missing_NI = np.isnan(integers_NI)
    logs_NI = np.sign(integers_NI) * np.log1p(np.abs(integers_NI))
    return np.hstack([np.where(is_missing_NI, 0, logs_NI), is_missing_NI]).astype(np.float32)


def bucket_of(category: bytes, column: int, num_buckets: int) -> int:
    """The row of the table for a category of the column (from 0): the same on all machines, and ever.

    The first bucket of each column is that of missing values.
    """
    bucket = 1 + zlib.crc32(category) % (num_buckets - 1) if category else 0
    return column * num_buckets + bucket


def click_files(paths: Sequence[Path]) -> list[Path]:
    """The files that `paths` name: files, and what is in folders, by name and without hidden entries. No file twice.

    Raises DataError for a path that is missing or empty.
    """
    found: dict[Path, Path] = {}
    for path in paths:
        if not path.exists():
            raise DataError(f"no such file or folder: {path}")
        inside = _walk(path) if path.is_dir() else [path]
        if not any(file.stat().st_size for file in inside):
            raise DataError(f"{path} is empty")
        for file in inside:
            found.setdefault(file.resolve(), file)
    return list(found.values())


def _walk(root: Path) -> list[Path]:
    files: list[Path] = []
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        files += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(file for file in files if file.is_file())


def require_click_files(paths: Sequence[Path], malformed_rows: MalformedRows) -> None:
    """What can be said of `paths` from the first row, before anything is started or much is read. Raises DataError."""
    files = click_files(paths)
    if malformed_rows != "skip":
        read_clicks(files, np.zeros(1, np.int64), num_buckets=2, malformed_rows=malformed_rows)


def count_rows(files: Sequence[Path]) -> int:
    """How many rows `files` have, whatever is in them. Raises DataError for a file that cannot be read."""
    return sum(1 for file in files for _ in _rows(file))


def read_clicks(
    files: Sequence[Path],
    wanted: NDArray[np.int64] | None = None,
    *,
    num_buckets: int,
    malformed_rows: MalformedRows = "error",
) -> Clicks:
    """The rows of `files` with the indices `wanted` (ascending; None: all), with categories in `num_buckets` a column.

    Rows that are malformed are counted. With "skip" they are left out, with "pad" those that only lack columns at the end
    get missing values there (some tools cut tabs off); the log says how many.

    Raises DataError that names the first malformed row and says how many there are, and for a file that cannot be read.
    """
    integers, buckets, labels = array("f"), array("i"), array("B")
    num_rows, num_padded, num_malformed, first_fault = 0, 0, 0, ""
    for file, number, row in _rows_of(files, wanted):
        num_rows += 1
        num_missing = _NUM_COLUMNS - 1 - row.count(b"\t")
        if malformed_rows == "pad" and 0 < num_missing <= NUM_CATEGORIES:
            row += b"\t" * num_missing
            num_padded += 1
        if not _ROW.fullmatch(row):
            num_malformed += 1
            first_fault = first_fault or f"{file}, line {number}: {_fault_of(row)}"
            continue
        label, *values = row.split(b"\t")
        labels.append(label == b"1")
        integers.extend([float(value) if value else math.nan for value in values[:NUM_INTEGERS]])
        buckets.extend(
            [bucket_of(value, column, num_buckets) for column, value in enumerate(values[NUM_INTEGERS:])]
        )
    if num_malformed:
        told = f"{num_malformed} of {num_rows} rows are malformed, the first in {first_fault}"
        if malformed_rows != "skip":
            raise DataError(f'{told}: mend them, or set task.malformed_rows to "skip" (or "pad")')
        _logger.warning("%s: skipped", told)
    if num_padded:
        _logger.warning("%d of %d rows lacked columns at the end: taken as missing", num_padded, num_rows)
    return Clicks(
        transform_integers(np.array(integers, np.float32).reshape(-1, NUM_INTEGERS)),
        np.array(buckets, np.int32).reshape(-1, NUM_CATEGORIES),
        np.array(labels, np.uint8),
    )


def _rows_of(files: Sequence[Path], wanted: NDArray[np.int64] | None) -> Iterator[tuple[Path, int, bytes]]:
    """(file, line number, line) of the rows with the indices `wanted` (ascending; None: all)."""
    rows = ((file, number, row) for file in files for number, row in _rows(file))
    if wanted is None:
        yield from rows
        return
    next_index = 0
    for index in wanted.tolist():
        yield from itertools.islice(rows, index - next_index, index - next_index + 1)
        next_index = index + 1


def _fault_of(row: bytes) -> str:
    columns = row.split(b"\t")
    if len(columns) != _NUM_COLUMNS:
        return f"{len(columns)} columns instead of {_NUM_COLUMNS}"
    if columns[0] not in (b"0", b"1"):
        return f"the label is {_shown(columns[0])}, not 0 or 1"
    bad = next(
        value for value in columns[1 : 1 + NUM_INTEGERS] if not re.fullmatch(rb"(-?[0-9]{1,18})?", value)
    )
    return f"{_shown(bad)} is not an integer"


def _shown(value: bytes) -> str:
    return repr(value[:40].decode(errors="replace"))


def _rows(file: Path) -> Iterator[tuple[int, bytes]]:
    """(line number from 1, the line without its end) of each line that is not empty."""
    try:
        with file.open("rb") as raw:
            is_gzipped = raw.read(len(_GZIP_MAGIC)) == _GZIP_MAGIC
        with gzip.open(file) if is_gzipped else file.open("rb") as lines:
            number = 0
            while line := lines.readline(MAX_LINE_BYTES + 1):
                number += 1
                if len(line) > MAX_LINE_BYTES:
                    raise DataError(
                        f"{file}, line {number} is longer than {MAX_LINE_BYTES} bytes: this is no file of clicks"
                    )
                if row := line.rstrip(b"\r\n"):
                    yield number, row
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from None
