"""Files that a crash leaves whole: written beside their place, synced, renamed."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_whole(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, all or nothing as long as the machine runs; `sync` it and its folder for more than that."""
    _replace(path, data, is_durable=False)


def write_durably(path: Path, data: bytes) -> None:
    """Replace `path` by `data`, all or nothing, durably."""
    _replace(path, data, is_durable=True)
    sync(path.parent)


def move(source: Path, target: Path) -> None:
    """Rename a file, or copy it from another file system."""
    try:
        source.replace(target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        shutil.copyfile(source, target)
        source.unlink()


def _replace(path: Path, data: bytes, *, is_durable: bool) -> None:
    staged = path.with_name(path.name + ".tmp")
    try:
        with staged.open("wb") as file:
            file.write(data)
            if is_durable:
                file.flush()
                os.fsync(file.fileno())
        staged.replace(path)
    except OSError:
        staged.unlink(missing_ok=True)
        raise
