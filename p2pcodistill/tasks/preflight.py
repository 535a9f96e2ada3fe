"""What can be said of a task's data before anything is started or much is read."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path

from p2pcodistill.errors import DataError
from p2pcodistill.task_configs import ClicksConfig, LanguageModelConfig, TaskConfig, is_hub_source
from p2pcodistill.tasks.entries import have_overlap
from p2pcodistill.tasks.site_text import require_text_files


def require_data(task: TaskConfig, *, batch_size: int, num_ranks: int) -> None:
    """Raise DataError for data of `task` that is missing, or too little by the look of its files. Paths are absolute."""
    require_paths([*task.data, *task.held_out])
    unlabelled = task.unlabelled if isinstance(task, LanguageModelConfig) else ()
    require_apart([*task.data, *unlabelled], task.held_out)
    if isinstance(task, LanguageModelConfig):
        require_text_files(task, batch_size=batch_size, num_ranks=num_ranks)
    if isinstance(task, ClicksConfig):
        # Here, because it brings numpy, which a node does without.
        from p2pcodistill.tasks.click_files import require_click_files

        for paths in filter(None, (task.data, task.held_out)):
            require_click_files(paths, task.malformed_rows)


def require_paths(paths: Iterable[Path]) -> None:
    """Raise DataError unless all of them exist; what the hub has is for the task to find out."""
    for path in paths:
        if not is_hub_source(path) and not path.exists():
            raise DataError(f"no such file or folder: {path}")


def require_apart(trained_on: Iterable[Path], held_out: Iterable[Path]) -> None:
    """Raise DataError where what is evaluated on is trained on as well, by the names of both. Paths are absolute."""
    for path, other in itertools.product(trained_on, held_out):
        if have_overlap(path, other):
            raise DataError(
                f"{other} is to be evaluated on and overlaps {path}, which is to be trained on: list other data in one"
            )
