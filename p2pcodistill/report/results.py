"""The files that a report is made of, and how it is told on a terminal."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.table import Table

from p2pcodistill.report.summary import Summary

SUMMARY_FILE = "summary.json"
REPORT_FILE = "report.html"
RESULT_FILE = "result.md"
_MIN_TABLE_WIDTH = 100


def write_summary(summary: Summary, folder: Path) -> None:
    """The figures, for programs."""
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2, allow_nan=False) + "\n")


def tell(tables: Sequence[Table], notes: Sequence[str], folder: Path, stream: TextIO) -> None:
    """Print the tables, what there is to be said with them, and where the files are."""
    console = Console(file=stream)
    console.width = max(console.width, _MIN_TABLE_WIDTH)
    console.print(*tables)
    for note in notes:
        print(note, file=stream)
    print(f"summary: {folder / SUMMARY_FILE}\nreport:  {folder / REPORT_FILE}", file=stream)
