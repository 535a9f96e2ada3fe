"""What can be trained: one strict model a task, told apart by `name`; `[task]` of a node file and of a scenario.

The tasks themselves are in `tasks/`.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeAlias

from pydantic import Discriminator, Field, FiniteFloat, Tag, model_validator

from p2pcodistill.errors import ConfigError
from p2pcodistill.strict import NonNegativeInt, PositiveFloat, PositiveInt, StrictModel

MalformedRows: TypeAlias = Literal["error", "skip", "pad"]
"""What becomes of rows that cannot be read."""


HUB_PREFIX = "hf:"
"""Of entries of `data` that are no paths: data sets of the Hugging Face hub, see `tasks/hub.py`."""


def is_hub_source(entry: Path) -> bool:
    """Whether an entry of `data` or `held_out` names a data set of the hub."""
    return str(entry).startswith(HUB_PREFIX)


def entry_in(base_folder: Path, entry: Path) -> Path:
    """The absolute path of an entry of `data` or `held_out` that is relative to `base_folder`; one of the hub as it is."""
    return entry if is_hub_source(entry) else (base_folder / entry).absolute()


class DataSource(StrictModel):
    """Where a task's examples come from; the keys that all tasks have."""

    data: tuple[Path, ...] = ()
    """Files or folders of this site; empty: this site's share of the data that the task brings along."""
    held_out: tuple[Path, ...] = ()
    """Files or folders to evaluate on; empty: a part of `data` that is then not trained on."""
    shards: tuple[NonNegativeInt, ...] = ()
    """Which of `num_shards` disjoint parts of the data this site trains on; empty: all, where `data` is given."""
    num_shards: PositiveInt = 1
    """In how many disjoint parts of equal size the data is split."""

    @model_validator(mode="after")
    def _check_shards(self) -> Self:
        for shard in self.shards:
            if shard >= self.num_shards:
                raise ConfigError(
                    f"there is no shard {shard} of {self.num_shards}: shards count from 0; raise num_shards, or lower it"
                )
            if self.shards.count(shard) > 1:
                raise ConfigError(f"the shard {shard} is listed twice")
        return self

    def located_in(self, base_folder: Path) -> Self:
        """The same task with absolute paths; relative ones mean `base_folder`."""
        data, held_out = (
            tuple(entry_in(base_folder, path) for path in paths) for paths in (self.data, self.held_out)
        )
        return self.model_copy(update={"data": data, "held_out": held_out})

    def of_member(self, index: int, num_members: int) -> Self:
        """The same task for the site that is `index` of the run's `num_members`: its share of what all sites have."""
        if self.data or self.shards:
            return self
        return self.model_copy(update={"shards": (index,), "num_shards": num_members})


class LanguageModelConfig(DataSource):
    """The language-model task: which model, over which vocabulary; by default a byte-level LSTM."""

    name: Literal["language-model"] = "language-model"
    """What is trained: a byte-level LSTM language model; without `data`, on the Python standard library's sources."""
    model: Literal["lstm", "layer-norm-lstm", "transformer", "hugging-face"] = "lstm"
    """An LSTM, as it is or with the paper's layer normalisation, carries its state on; the others see one window."""
    architecture: str | None = None
    """Of a `hugging-face` model: a model type of the library `transformers`, such as `gpt2`, or a `config.json` file."""
    architecture_options: dict[str, Any] = Field(default_factory=dict)
    """A table of what to set otherwise in that architecture's configuration, such as `n_layer`."""
    vocabulary: Path | None = None
    """A file of word pieces, the same at all sites (see `p2pcodistill vocabulary`); none: bytes."""
    text_column: str = "text"
    """Column of `hf:` data sets that holds the text."""
    unlabelled: tuple[Path, ...] = ()
    """Files or folders of text that the student agrees with its teachers on, without learning what is written there."""
    unlabelled_batch_size: PositiveInt | None = None
    """Documents of `unlabelled` per step and rank; none: `training.batch_size`."""
    max_data_bytes: PositiveInt | None = None
    """Train on at most this much text."""
    max_held_out_bytes: PositiveInt = 32_768
    """Evaluate on at most this much text."""
    embedding_size: PositiveInt = 64
    """Width of a token's embedding in an LSTM; in a transformer, it is `hidden_size`."""
    hidden_size: PositiveInt = 256
    """Width of each layer."""
    num_layers: PositiveInt = 2
    """LSTM layers, or transformer blocks."""
    num_heads: PositiveInt = 4
    """Attention heads of each transformer block."""
    window_tokens: PositiveInt = 32
    """Tokens of a document per step: as far as back-propagation through time goes, and all that a transformer sees."""

    @model_validator(mode="after")
    def _check_model(self) -> Self:
        if (self.architecture is None) == (self.model == "hugging-face"):
            raise ConfigError("architecture belongs to model = 'hugging-face', which needs it")
        if self.architecture_options and self.architecture is None:
            raise ConfigError("architecture_options are those of an architecture: set that, or remove them")
        if self.model == "transformer" and self.hidden_size % self.num_heads:
            raise ConfigError(
                f"hidden_size ({self.hidden_size}) is not a multiple of num_heads ({self.num_heads})"
            )
        return self

    def located_in(self, base_folder: Path) -> Self:
        """The same task with absolute paths; relative ones mean `base_folder`."""
        located: dict[str, Any] = {
            "unlabelled": tuple(entry_in(base_folder, path) for path in self.unlabelled)
        }
        if self.vocabulary is not None:
            located["vocabulary"] = entry_in(base_folder, self.vocabulary)
        if self.architecture is not None and self.architecture.endswith(".json"):
            located["architecture"] = str(entry_in(base_folder, Path(self.architecture)))
        return super().located_in(base_folder).model_copy(update=located)


class ClicksConfig(DataSource):
    """The click-through task: a dense network over integers and hashed categories, after the paper's (Anil et al. 2018)."""

    name: Literal["clicks"]
    """What is trained: a dense network that predicts clicks; without `data`, on generated ones of known probability."""
    max_examples: PositiveInt | None = None
    """Train on at most this many examples of each shard."""
    max_held_out_examples: PositiveInt | None = None
    """Evaluate on at most this many examples."""
    malformed_rows: MalformedRows = "error"
    """Rows of `data` that are malformed: `skip` them, or `pad` those that lack columns at the end with missing values."""
    num_generated_examples: PositiveInt = 80_000
    """Without `data`: how many examples are generated, before they are split."""
    generator_seed: NonNegativeInt = 0
    """Without `data`: which examples are generated, and what decides a click; the training's seed has no part in it."""
    num_buckets: Annotated[int, Field(ge=2)] = 1000
    """Into how many buckets the categories of each column are hashed, missing ones included."""
    embedding_size: PositiveInt = 8
    """Width of a category's embedding."""
    hidden_sizes: tuple[PositiveInt, ...] = (128, 64, 32)
    """Widths of the hidden layers; the paper's are 2560, 1024 and 256."""
    activation: Literal["relu", "gelu", "smelu"] = "relu"
    """Of the hidden layers; `gelu` and `smelu` are smooth, so that predictions change less from retrain to retrain."""


class ImagesConfig(DataSource):
    """The images task: a convolutional classifier with batch norm, small or as in He et al. 2015."""

    name: Literal["images"]
    """What is trained: a classifier of images with batch norm; without `data`, on scikit-learn's 1797 digits."""
    max_examples: PositiveInt | None = None
    """Train on at most this many images of each shard."""
    max_held_out_examples: PositiveInt | None = None
    """Evaluate on at most this many images."""
    shard_by: Literal["hash", "label"] = "hash"
    """How images are dealt to shards: `hash`: at random; `label`: by class, so that each shard has few classes only."""
    classes: tuple[str, ...] = ()
    """Names of the classes in the order of all sites; empty: those in the data. Set it where a site may lack some."""
    label_column: str | None = None
    """Of data sets of the hub: the column of labels; none: the only one of classes."""
    image_pixels: PositiveInt | None = None
    """Resize images to squares of this edge, cropped about the middle; none: as they are, all of one size."""
    channels: Literal[1, 3] | None = None
    """1: grey, 3: colours; none: grey for digits and MNIST's format, else colours."""
    mean: Annotated[tuple[FiniteFloat, ...], Field(min_length=1)] = (0.5,)
    """Subtracted from the channels' values in 0 to 1, one number for all or one each. The same at all sites."""
    std: Annotated[tuple[PositiveFloat, ...], Field(min_length=1)] = (0.5,)
    """What the channels' values are then divided by, as for `mean`."""
    crop_padding: NonNegativeInt = 0
    """Augmentation: crop training images at random out of a black margin of this many pixels; 0: do not."""
    flip: bool = False
    """Augmentation: mirror training images left to right, one in two."""
    model: Literal["cnn", "resnet-18", "resnet-50"] = "cnn"
    """`cnn`: three convolutions; ResNets begin as for CIFAR with images up to 64 pixels, else as for ImageNet."""
    width: PositiveInt | None = None
    """Channels of the model's first stage; none: 32 for the CNN, 64 for ResNets, as published."""


class CustomTaskConfig(DataSource):
    """A task of your own: a class of yours that implements `group.task.Task`."""

    name: Literal["custom"]
    """What is trained: a task of your own."""
    task: str
    """Where it is, `package.module:Class`; the package must be importable at the site."""
    options: dict[str, Any] = Field(default_factory=dict)
    """A table of options, for your task alone to read."""

    @model_validator(mode="after")
    def _check_task(self) -> Self:
        if not re.fullmatch(r"\w+(\.\w+)*:\w+", self.task):
            raise ConfigError(f"task {self.task!r} names no class: write package.module:Class")
        return self


def _name_of(task: Any) -> str:
    """By which the models of tasks are told apart; `[task]` without a name is the language model."""
    return str(
        task.get("name", "language-model")
        if isinstance(task, dict)
        else getattr(task, "name", "language-model")
    )


TaskConfig: TypeAlias = Annotated[
    Annotated[LanguageModelConfig, Tag("language-model")]
    | Annotated[ClicksConfig, Tag("clicks")]
    | Annotated[ImagesConfig, Tag("images")]
    | Annotated[CustomTaskConfig, Tag("custom")],
    Discriminator(_name_of),
]
