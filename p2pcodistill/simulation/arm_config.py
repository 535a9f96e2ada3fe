"""An arm of a scenario: one of the things that are compared, and what it sets otherwise than the scenario."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from p2pcodistill.config import CodistillationConfig, FramesConfig
from p2pcodistill.errors import ConfigError
from p2pcodistill.simulation.arms.kinds import KINDS, ArmKind
from p2pcodistill.simulation.link_config import LinkConfig
from p2pcodistill.strict import NonNegativeInt, PositiveFloat, PositiveInt, StrictModel

Sharing = Literal["disjoint", "same", "first"]
"""What sites train on: data of their own; all that there is, each in another order; or what the first site has."""
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")


SAME_FOR_ALL_ARMS = (
    "max_held_out_examples",
    "num_generated_examples",
    "generator_seed",
    "malformed_rows",
    "classes",
    "image_pixels",
    "label_column",
    "text_column",
)
"""Keys of `[task]` that decide what an arm would be evaluated on."""


def _check_label(label: Any) -> Any:
    # Labels name folders and are part of a run's name; a non-string is the model's to refuse.
    if isinstance(label, str) and not _LABEL.fullmatch(label):
        raise ValueError("use at most 40 letters, digits, '.', '_' or '-', starting with a letter or digit")
    return label


Label = Annotated[str, BeforeValidator(_check_label)]


class ArmConfig(StrictModel):
    """One of the things that are compared. Every key but the first two can be left out."""

    name: Label
    kind: Literal[
        "codistilled",
        "alone",
        "pooled",
        "synchronous",
        "asynchronous",
        "ensemble",
        "two-phase",
        "fedavg",
        "diloco",
        "gossip-averaging",
    ]
    """`codistilled`: the sites learn from each other along the topology. `alone`: each site on its own data, no peers.
    `pooled`: one site with the data of all. Of several arms of one kind, the headline compares the first. In virtual time
    only: `synchronous`: one model, the sites' gradients averaged in each step. `asynchronous`: one model on a parameter
    server, to which sites send gradients of what they fetched last. `ensemble`: the mean prediction of lone models.
    `two-phase`: one site's student of such an ensemble. `fedavg`, `diloco`: local steps, then all models (or what they have
    learnt since) are averaged. `gossip-averaging`: local steps, then each site averages with its neighbours (D-PSGD)."""
    training: dict[str, Any] = Field(default_factory=dict)
    """Keys of `[training]` that differ in this arm; `num_steps`, for instance, to train for longer."""
    task: dict[str, Any] = Field(default_factory=dict)
    """Keys of `[task]` that differ in this arm."""
    num_sites: PositiveInt | None = None
    """So many of the scenario's sites are in this arm, the first ones, each with its own data as in the others; else all."""
    sharing: Sharing | None = None
    """In place of `data.sharing`."""
    initialisation: Literal["same", "different"] | None = None
    """Whether the sites start from the same model; by default those do that are averaged, and no others."""
    codistillation: CodistillationConfig | None = None
    """Keys of `[codistillation]` that differ in this arm: codistilled, or the student of a two-phase one."""
    frames: FramesConfig | None = None
    """Keys of `[frames]` that differ in this arm: codistilled or two-phase."""
    topology: str | None = None
    """In place of the scenario's, of an arm that is codistilled or averages by gossip."""
    links: tuple[LinkConfig, ...] | None = None
    """In place of the scenario's, of a codistilled arm; `[]`: perfect ones."""
    interval_steps: PositiveInt | None = None
    """Local steps between two averages; by default those of `codistillation.exchange_interval_steps`."""
    precision: Literal["float32", "float16", "bfloat16"] | None = None
    """What gradients or weights are rounded to where an arm sends them; float32 by default."""
    outer_learning_rate: PositiveFloat | None = None
    """Of a diloco arm's outer optimizer; 0.7 by default."""
    outer_momentum: Annotated[float, Field(ge=0, lt=1)] | None = None
    """Nesterov momentum of a diloco arm's outer optimizer; 0.9 by default, 0 is plain SGD."""
    num_workers: PositiveInt | None = None
    """Workers that compute a step's gradient: of all sites, one each by default, or of each site where it has a model of its
    own, one by default. The batch is `training.batch_size` of each; the slowest decides how long a step takes."""
    worker_ramp_steps: NonNegativeInt | None = None
    """In the time of how many steps the workers of an asynchronous arm begin, one after the other; 0 by default."""
    num_members: Annotated[int, Field(ge=2)] | None = None
    """How many of the sites' lone models make the ensemble; by default all."""
    teacher_steps: PositiveInt | None = None
    """Updates of a two-phase arm's teachers, before those of the student; by default `training.num_steps`."""

    @property
    def of_kind(self) -> ArmKind:
        """What is particular to the arm's kind."""
        return KINDS[self.kind]

    @model_validator(mode="after")
    def _check(self) -> ArmConfig:
        for key in SAME_FOR_ALL_ARMS:
            if key in self.task:
                raise ConfigError(
                    f"the arm {self.name!r}: task.{key} decides what is evaluated on, the same for all arms: "
                    "remove it, or set it in [task]"
                )
        optional = set().union(*(kind.keys for kind in KINDS.values()))
        for key in type(self).model_fields:
            if key in optional - self.of_kind.keys and getattr(self, key) is not None:
                others = [name for name, kind in KINDS.items() if key in kind.keys]
                raise ConfigError(
                    f"the arm {self.name!r} is {self.kind}: remove its {key}, which is for arms of the kind "
                    f"{', '.join(others)}"
                )
        return self
