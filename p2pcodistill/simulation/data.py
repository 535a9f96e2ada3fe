"""The data of a scenario's sites: what each of them trains on, and what all of them are evaluated on.

Text is split once, into files in the run folder, so that the folder says all there is to a run. Other data stays where it
is, and each site is told which of its parts to use.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from p2pcodistill.errors import ConfigError, DataError
from p2pcodistill.simulation.scenario import ScenarioConfig
from p2pcodistill.task_configs import LanguageModelConfig, TaskConfig
from p2pcodistill.tasks.entries import distinct_entries
from p2pcodistill.tasks.preflight import require_paths
from p2pcodistill.tasks.site_text import require_enough_text, require_held_out, split_corpus
from p2pcodistill.tasks.vocabulary import ByteVocabulary, Vocabulary, parse_vocabulary, read_vocabulary_file
from p2pcodistill.tasks.vocabulary_training import train_word_pieces

_DATA_FOLDER = "data"
_HELD_OUT_FILE = "held-out.txt"
_VOCABULARY_FILE = "vocabulary.json"
_UNLABELLED_FILE = "unlabelled.txt"


class ScenarioData(Protocol):
    """The data of a scenario, checked."""

    def write(self, folder: Path) -> None:
        """Put what the run folder is to hold of it there."""


@dataclass(frozen=True, slots=True)
class ScenarioText:
    """Text: held-out, and what each site trains on."""

    held_out: bytes
    shards: dict[str, bytes]
    vocabulary: bytes | None = None
    """The file of the word pieces that all sites use, if they do not use bytes."""
    unlabelled: bytes | None = None
    """A share of the text that no site learns the labels of."""

    def write(self, folder: Path) -> None:
        """See `ScenarioData`."""
        data_folder = folder / _DATA_FOLDER
        data_folder.mkdir()
        (data_folder / _HELD_OUT_FILE).write_bytes(self.held_out)
        for name, shard in self.shards.items():
            (data_folder / f"{name}.txt").write_bytes(shard)
        if self.vocabulary is not None:
            (data_folder / _VOCABULARY_FILE).write_bytes(self.vocabulary)
        if self.unlabelled is not None:
            (data_folder / _UNLABELLED_FILE).write_bytes(self.unlabelled)


@dataclass(frozen=True, slots=True)
class DataInPlace:
    """Data that is read where it is."""

    def write(self, folder: Path) -> None:
        """See `ScenarioData`."""


def evaluation_files(folder: Path) -> list[Path]:
    """Of a run on text: what all sites were evaluated on, and the word pieces that it was told in, if there are some."""
    paths = [folder / _DATA_FOLDER / name for name in (_HELD_OUT_FILE, _VOCABULARY_FILE)]
    return [path for path in paths if path.exists()]


def prepare_data(scenario: ScenarioConfig) -> ScenarioData:
    """The data of `scenario`, deterministically. Raises DataError where some is missing or there is too little."""
    if scenario.synthetic is not None:
        return DataInPlace()
    if isinstance(scenario.task, LanguageModelConfig):
        return split_scenario_text(scenario, scenario.task)
    of_sites = [path for site in scenario.sites for path in site.data]
    require_paths([*scenario.data.paths, *scenario.data.held_out, *of_sites])
    return DataInPlace()


def task_of_site(scenario: ScenarioConfig, shards: Sequence[str], folder: Path, up: Path) -> TaskConfig:
    """The task of a site that trains on the data of the sites `shards`.

    `folder` is the run folder, `up` its name where the task's paths are relative to.
    """
    if isinstance(scenario.task, LanguageModelConfig):
        written, data = folder / _DATA_FOLDER, up / _DATA_FOLDER
        has_unlabelled = scenario.data.unlabelled and scenario.task.unlabelled_batch_size is not None
        return scenario.task.model_copy(
            update={
                "data": tuple(data / f"{shard}.txt" for shard in shards),
                "held_out": (data / _HELD_OUT_FILE,),
                "max_held_out_bytes": (written / _HELD_OUT_FILE).stat().st_size,
                "vocabulary": data / _VOCABULARY_FILE if (written / _VOCABULARY_FILE).exists() else None,
                "unlabelled": (data / _UNLABELLED_FILE,) if has_unlabelled else scenario.task.unlabelled,
            }
        )
    sites = {site.name: site for site in scenario.sites}
    if scenario.sites[0].data:
        own = distinct_entries(path for shard in shards for path in sites[shard].data)
        return scenario.task.model_copy(update={"data": tuple(own), "held_out": scenario.data.held_out})
    return scenario.task.model_copy(
        update={
            "data": scenario.data.paths,
            "held_out": scenario.data.held_out,
            "shards": tuple(sorted(scenario.site_names.index(shard) for shard in shards)),
            "num_shards": len(sites),
        }
    )


def split_scenario_text(scenario: ScenarioConfig, task: LanguageModelConfig) -> ScenarioText:
    """The text of `scenario`, deterministically: one split of the common text, or one of each site's own.

    Raises DataError where text is missing or too short for any site to train on, ConfigError for unlabelled text amiss.
    """
    _require_unlabelled(scenario)
    names, data = scenario.site_names, scenario.data
    max_kept_bytes = 0 if data.held_out else data.max_held_out_bytes
    if scenario.sites[0].data:
        # Held-out text of all sites alike, or the model of a site would be judged on its own kind of text only.
        splits = [
            split_corpus(
                site.data,
                text_column=task.text_column,
                num_shards=1,
                max_shard_bytes=data.max_bytes_per_site,
                max_held_out_bytes=-(-max_kept_bytes // len(names)),
            )
            for site in scenario.sites
        ]
        held_out = b"".join(_well_formed(split.held_out) for split in splits)
        shards = tuple(split.shards[0] for split in splits)
    else:
        split = split_corpus(
            data.paths,
            text_column=task.text_column,
            num_shards=len(names) + (1 if data.unlabelled else 0),
            max_shard_bytes=data.max_bytes_per_site,
            max_held_out_bytes=max_kept_bytes,
            shard_by=data.shard_by,
        )
        held_out, shards = split.held_out, split.shards
    if data.held_out:
        given = split_corpus(
            data.held_out,
            text_column=task.text_column,
            num_shards=1,
            max_shard_bytes=data.max_held_out_bytes,
            max_held_out_bytes=0,
        )
        held_out = given.shards[0]
    shards = tuple(map(_well_formed, shards))
    text = ScenarioText(
        _well_formed(held_out),
        dict(zip(names, shards, strict=False)),
        _vocabulary_file(scenario, task, shards[: len(names)]),
        shards[-1] if data.unlabelled else None,
    )
    _require_enough(scenario, task, text)
    return text


def _require_unlabelled(scenario: ScenarioConfig) -> None:
    """Raise ConfigError where an arm distils on unlabelled text that there is none of."""
    if scenario.data.unlabelled and scenario.sites[0].data:
        raise ConfigError(
            "data.unlabelled is a share of text that is split between the sites, and these have their own: "
            "list task.unlabelled instead"
        )
    for arm in scenario.arms:
        task = scenario.task_of(arm)
        if not isinstance(task, LanguageModelConfig) or task.unlabelled_batch_size is None:
            continue
        if not task.unlabelled and not scenario.data.unlabelled:
            raise ConfigError(
                f"the arm {arm.name!r} has task.unlabelled_batch_size and no unlabelled text: set data.unlabelled = true"
            )


def _vocabulary_file(
    scenario: ScenarioConfig, task: LanguageModelConfig, shards: Sequence[bytes]
) -> bytes | None:
    if scenario.data.vocabulary_size is not None:
        return train_word_pieces(shards, scenario.data.vocabulary_size)
    return None if task.vocabulary is None else read_vocabulary_file(task.vocabulary)


def _require_enough(scenario: ScenarioConfig, task: LanguageModelConfig, text: ScenarioText) -> None:
    vocabulary: Vocabulary = ByteVocabulary()
    if text.vocabulary is not None:
        vocabulary = parse_vocabulary(text.vocabulary, str(task.vocabulary))
        task = task.model_copy(update={"vocabulary": Path(_VOCABULARY_FILE)})
    require_held_out(len(vocabulary.encode_documents([text.held_out])), task)
    for site in scenario.sites:
        try:
            require_enough_text(
                len(vocabulary.encode_documents([text.shards[site.name]])),
                site.data or scenario.data.paths,
                task,
                batch_size=scenario.training.batch_size * max(map(scenario.num_streams_of, scenario.arms)),
                num_ranks=scenario.group.num_ranks,
            )
        except DataError as error:
            raise DataError(f"the site {site.name}: {error}") from None


def _well_formed(text: bytes) -> bytes:
    """`text` such that a reader of text files takes it to the byte: UTF-8, last line ended, no longer than before."""
    # A split inside a very long line may cut a character, and what was cut off at its maximum has a torn last line.
    characters = text.decode(errors="ignore")
    return (characters if characters.endswith("\n") else characters[:-1] + "\n").encode()
