"""Data sets of the Hugging Face hub, as entries of a task's `data` and `held_out`: `hf:OWNER/NAME:SUBSET#SPLIT`.

`:SUBSET` may be left out where the data set has only one, `#SPLIT` is `train` by default. In place of OWNER/NAME, a folder
will do that holds files which the library `datasets` reads. The library is optional and imported when it is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2pcodistill.errors import DataError
from p2pcodistill.task_configs import HUB_PREFIX


@dataclass(frozen=True, slots=True)
class HubSource:
    """One split of a data set."""

    name: str
    subset: str | None
    split: str

    @classmethod
    def parse(cls, entry: Path) -> HubSource:
        """The source that an entry of `data` names. Raises DataError."""
        rest, _, split = str(entry).removeprefix(HUB_PREFIX).partition("#")
        name, _, subset = rest.partition(":")
        if not name:
            raise DataError(f"{entry}: write {HUB_PREFIX}OWNER/NAME, and #SPLIT where it is not train")
        return cls(name, subset or None, split or "train")

    def folders(self) -> tuple[Path, ...]:
        """Where the files of the data set may lie: its own folder, or the caches of what was downloaded.

        The library `datasets` must be there.
        """
        own = Path(self.name)
        if own.is_dir():
            return (own,)
        import datasets
        import huggingface_hub

        return Path(datasets.config.HF_DATASETS_CACHE), Path(huggingface_hub.constants.HF_HUB_CACHE)

    def __str__(self) -> str:
        subset = f":{self.subset}" if self.subset else ""
        return f"{HUB_PREFIX}{self.name}{subset}#{self.split}"


def load_hub_dataset(source: HubSource, *, streaming: bool = False) -> Any:
    """The `datasets.Dataset` of a source (`IterableDataset`, when streaming), downloaded to the library's cache if need be.

    Raises DataError where the library is missing, or cannot find or read the data set.
    """
    try:
        import datasets
    except ImportError:
        raise DataError(
            f"{source} needs the library datasets: pip install 'p2pcodistill[datasets]'"
        ) from None
    try:
        return datasets.load_dataset(source.name, source.subset, split=source.split, streaming=streaming)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        why = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(f"cannot load {source}: {why}") from None
