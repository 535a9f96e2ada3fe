"""Training checkpoints: everything that a group needs to go on as if it had never stopped.

    training/step-00000250/shared.pt    model, optimiser, ...: what all ranks have in common, written by rank 0
                           rank-0.pt    random states, data position, carried states: what each rank has of its own
                           *.sha256     hash of each
    training/step-00000500/...

A checkpoint is written by all ranks into a folder with another name, flushed to the disk, and renamed when all of it is
there. The last two are kept, because the disk may have lied: what does not match its hash is passed over.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
import torch.distributed as dist

from p2pcodistill.errors import ChecksumError, GroupError

MAX_KEPT_CHECKPOINTS = 2
_MAX_LISTED_CHECKPOINTS = 16
_PARTIAL = "partial"
_STEP_FOLDER = re.compile(r"step-(\d{8,18})")

_logger = logging.getLogger("p2pcodistill")

SavedState: TypeAlias = dict[str, Any]
"""Plain data and tensors, as `torch.load(weights_only=True)` takes them."""


@dataclass(frozen=True)
class TrainingCheckpoint:
    """What was saved after `step` updates."""

    step: int
    shared: SavedState
    own: SavedState


class TrainingCheckpoints:
    """The training checkpoints in `folder`, which all ranks can reach. `save` and `load` are called by every rank at once.

    `process_group` is a gloo group of all ranks; None for a single rank.
    """

    def __init__(self, folder: Path, process_group: dist.ProcessGroup | None) -> None:
        self._folder = folder
        self._group = process_group
        self._rank = 0 if process_group is None else dist.get_rank(process_group)
        self._num_ranks = 1 if process_group is None else dist.get_world_size(process_group)

    def save(self, step: int, *, shared: Mapping[str, Any], own: Mapping[str, Any]) -> None:
        """Write a checkpoint. `shared` counts on rank 0. It is complete when this returns on rank 0.

        Checkpoints of later steps are removed: training has gone back behind them because they did not match their hash.
        """
        partial = self._folder / _PARTIAL
        if self._rank == 0:
            # First of all: should they be readable again, none is ever to be resumed from, or kept in place of this branch.
            for abandoned in [other for other in self._steps() if other > step]:
                shutil.rmtree(self._folder / _folder_name(abandoned))
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
            _write(partial / "shared.pt", {"num_ranks": self._num_ranks, "state": dict(shared)})
        self._barrier()
        _write(partial / f"rank-{self._rank}.pt", dict(own))
        self._barrier()
        if self._rank == 0:
            _sync_folder(partial)
            target = self._folder / _folder_name(step)
            shutil.rmtree(target, ignore_errors=True)  # one that did not match its hash was gone back from
            partial.rename(target)
            _sync_folder(self._folder)
            for old in self._steps()[MAX_KEPT_CHECKPOINTS:]:
                shutil.rmtree(self._folder / _folder_name(old))

    def load(self) -> TrainingCheckpoint | None:
        """The newest checkpoint that every rank can read; None when there is none.

        Raises GroupError for a checkpoint of another number of ranks.
        """
        for step in self._agreed_steps():
            checkpoint = self._read(step)
            if self._lowest(checkpoint is not None):
                return checkpoint
        return None

    def _read(self, step: int) -> TrainingCheckpoint | None:
        folder = self._folder / _folder_name(step)
        try:
            shared = _read(folder / "shared.pt")
            if shared["num_ranks"] != self._num_ranks:
                raise GroupError(
                    f"{folder} was written by {shared['num_ranks']} rank(s), and there are {self._num_ranks}: "
                    "set group.num_ranks back, or start in a new run folder"
                )
            return TrainingCheckpoint(step, shared["state"], _read(folder / f"rank-{self._rank}.pt"))
        except (OSError, ChecksumError) as error:
            _logger.warning("passing over a damaged training checkpoint: %s", error)
            return None

    def _steps(self) -> list[int]:
        """The steps of the checkpoints on disk, newest first."""
        if not self._folder.is_dir():
            return []
        found = (_STEP_FOLDER.fullmatch(path.name) for path in self._folder.iterdir())
        return sorted((int(match.group(1)) for match in found if match), reverse=True)

    def _agreed_steps(self) -> list[int]:
        steps = self._steps()[:_MAX_LISTED_CHECKPOINTS]
        if self._group is None:
            return steps
        listed = torch.full((_MAX_LISTED_CHECKPOINTS,), -1, dtype=torch.int64)
        listed[: len(steps)] = torch.tensor(steps, dtype=torch.int64)
        dist.broadcast(listed, group=self._group, group_src=0)
        return [step for step in listed.tolist() if step >= 0]

    def _lowest(self, value: bool) -> bool:
        lowest = torch.tensor(int(value))
        if self._group is not None:
            dist.all_reduce(lowest, dist.ReduceOp.MIN, self._group)
        return bool(lowest)

    def _barrier(self) -> None:
        if self._group is not None:
            dist.barrier(self._group)


def _folder_name(step: int) -> str:
    return f"step-{step:08d}"


def _write(path: Path, state: SavedState) -> None:
    with path.open("w+b") as file:
        torch.save(state, file)
        file.seek(0)
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        os.fsync(file.fileno())
    with path.with_suffix(".sha256").open("w", encoding="ascii") as file:
        file.write(digest)
        file.flush()
        os.fsync(file.fileno())


def _read(path: Path) -> SavedState:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        if digest != path.with_suffix(".sha256").read_text(encoding="utf-8", errors="replace"):
            raise ChecksumError(f"{path} does not match its hash")
        file.seek(0)
        state: SavedState = torch.load(file, map_location="cpu", weights_only=True)
    return state


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
