"""The folder that holds everything of one run at one site. A node opens it, and keeps others out while it lives.

<run folder>/
  config.json        what this run is; a node with another configuration is refused
  events.jsonl       every event of the node and its ranks, one JSON object a line (telemetry/)
  group.log          output of torchrun and the ranks
  group.json         what the node told its ranks at the last launch
  lock               held (flock) by the living node
  link               symbolic link to the private folder with the node's socket, while it lives
  outbox/            encoded frames on their way from rank 0 to the node
  store/             signed frames, this site's and its teachers' (checkpoint/store.py)
  training/          training checkpoints, from which a restarted group goes on
  model.safetensors  the final model
  predictions.safetensors  what it says of held-out examples
  vocabulary.json    the word pieces that it predicts, if it is a language model of such
"""

from __future__ import annotations

import errno
import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from p2pcodistill.errors import RunFolderError

CONFIG_FILE = "config.json"
EVENTS_FILE = "events.jsonl"
PREDICTIONS_FILE = "predictions.safetensors"
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_full_disk(error: OSError) -> bool:
    """Whether there is no room left, on the disk or in what may be used of it."""
    return error.errno in _NO_ROOM


def lock_folder(path: Path, user: str) -> IO[bytes]:
    """Keep others out of the folder `path` until what is returned is closed, or this process ends.

    `user` says who uses it. Raises RunFolderError when somebody else does, OSError when the folder cannot be written.
    """
    lock = (path / "lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        lock.close()
        raise RunFolderError(
            f"another {user} is running in {path}: stop it first, or choose another run folder"
        ) from None
    return lock


class RunFolder:
    """An opened run folder: paths, and the lock that this process holds until `close`."""

    def __init__(self, path: Path, description: dict[str, Any]) -> None:
        """Create or reopen the folder `path`.

        `description` is what must not change between two starts in one folder. Raises RunFolderError when another node
        holds the folder, or when it belongs to another configuration (naming the first key that differs).
        """
        self.path = path
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._lock = lock_folder(path, "node")
        except OSError as error:
            raise RunFolderError(f"cannot use the run folder {path}: {error.strerror}") from None
        try:
            self._check_description(description)
            for folder in (self.outbox, self.training):
                folder.mkdir(exist_ok=True)
        except BaseException:
            self._lock.close()
            raise

    @property
    def events(self) -> Path:
        """The event log."""
        return self.path / EVENTS_FILE

    @property
    def group_log(self) -> Path:
        """Output of the workers."""
        return self.path / "group.log"

    @property
    def group_spec(self) -> Path:
        """What the node tells its ranks."""
        return self.path / "group.json"

    @property
    def link_pointer(self) -> Path:
        """Symbolic link to the folder of the link's socket."""
        return self.path / "link"

    @property
    def outbox(self) -> Path:
        """Frames on their way to the node."""
        return self.path / "outbox"

    @property
    def store(self) -> Path:
        """The frame store."""
        return self.path / "store"

    @property
    def training(self) -> Path:
        """Training checkpoints."""
        return self.path / "training"

    @property
    def group_error(self) -> Path:
        """What a rank said that only the user can mend."""
        return self.path / "group-error.txt"

    @property
    def model(self) -> Path:
        """The final model."""
        return self.path / "model.safetensors"

    def close(self) -> None:
        """Let go of the lock."""
        self._lock.close()

    def _check_description(self, description: dict[str, Any]) -> None:
        file = self.path / CONFIG_FILE
        ours = flatten(json.loads(json.dumps(description)))
        if not file.exists():
            staged = file.with_suffix(".tmp")
            staged.write_text(json.dumps(description, indent=2) + "\n")
            staged.replace(file)
            return
        try:
            theirs = flatten(json.loads(file.read_text()))
        except (OSError, ValueError, AttributeError):
            raise RunFolderError(
                f"{file} is damaged: choose another run folder, this one is not touched"
            ) from None
        for key in [*theirs, *ours]:
            if theirs.get(key) != ours.get(key):
                raise RunFolderError(
                    f"{self.path} belongs to another configuration: {key} was {theirs.get(key)!r} and is now "
                    f"{ours.get(key)!r}; restore it, or choose another run folder"
                )


def flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """The values of a nested table by dotted key."""
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
