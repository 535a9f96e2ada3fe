"""A run as its folder tells it, whoever made it: what a comparison of runs is made from."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from p2pcodistill.report.summary import ArmResult
from p2pcodistill.runfolder import flatten
from p2pcodistill.task_configs import LanguageModelConfig, TaskConfig

Clock: TypeAlias = Literal["wall clock", "virtual"]
"""Which seconds a run is told in."""


@dataclass(frozen=True, slots=True)
class HeldOut:
    """What the models of a run were evaluated on."""

    text: str | None
    """Digest of the text and its vocabulary, where the run folder has them."""
    labels: str | None
    """Digest of the labels that final models have predicted, where one has left predictions."""
    source: str
    """What the configuration says of it."""

    def has_same_kind(self, other: HeldOut) -> bool:
        """Whether there is a digest of both to tell them apart by."""
        return None not in (self.text, other.text) or None not in (self.labels, other.labels)

    def is_same(self, other: HeldOut) -> bool:
        """Whether both are the same; without a digest of both, whether their configurations say so."""
        if self.text is not None and other.text is not None:
            return self.text == other.text
        if self.labels is not None and other.labels is not None:
            return self.labels == other.labels
        return self.source == other.source


@dataclass(frozen=True, slots=True)
class RecordedRun:
    """One run. Every one of `results` has been evaluated."""

    name: str
    folder: Path
    kind: Literal["scenario", "site"]
    results: Sequence[ArmResult]
    unfinished: Sequence[str]
    """What there is to say of each arm and seed that has not got to its end."""
    num_steps: int
    loss_unit: str
    task: str
    clock: Clock
    held_out: HeldOut
    settings: Mapping[str, str]
    """All of its configuration, by dotted key."""
    configuration_text: str

    @property
    def arms(self) -> dict[str, str]:
        """The kind of each arm, by its name."""
        return {result.name: result.kind for result in self.results}

    @property
    def seeds(self) -> list[int]:
        """Those that there are results of."""
        return sorted({result.seed for result in self.results})

    @property
    def num_parameters(self) -> list[int]:
        """Of its models; of more than one size where arms differ."""
        sizes = {history.num_parameters for result in self.results for history in result.sites.values()} - {
            None
        }
        return sorted(size for size in sizes if size is not None)


def settings_of(table: Mapping[str, Any]) -> dict[str, str]:
    """The values of a nested table as text, by dotted key."""
    return {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in flatten(table).items()
    }


def loss_unit_of_task(task: TaskConfig, *, has_pieces: bool = False) -> str:
    """What held-out losses are counted in; `has_pieces`: text is of word pieces, whatever `task` says."""
    if not isinstance(task, LanguageModelConfig):
        return "nats/example"
    return "nats/token" if has_pieces or task.vocabulary is not None else "nats/byte"


def digest_of(*contents: bytes) -> str:
    """Of some files' contents, for telling them apart."""
    digest = hashlib.sha256()
    for content in contents:
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.hexdigest()


def labels_digest(paths: Sequence[Path]) -> str | None:
    """Of the labels in the first of these files with predictions that exists; None without any, or if it is damaged."""
    from safetensors import SafetensorError, safe_open

    path = next((path for path in paths if path.exists()), None)
    if path is None:
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            return digest_of(file.get_tensor("labels_N").tobytes())
    except (SafetensorError, OSError, ValueError):
        return None
