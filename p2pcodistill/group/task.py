"""What the reference loop asks of a task.

Tasks lie in a layer above this one: the group's spec names one, and it is imported by that name.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from p2pcodistill.codistill.teachers import State
from p2pcodistill.config import GroupSpec
from p2pcodistill.group.custom_task import find_task_class
from p2pcodistill.task_configs import CustomTaskConfig

MAX_PREDICTIONS = 4096
"""Of how many held-out examples a task predicts, at most, for comparisons between models."""
_TASKS = {
    "language-model": ("p2pcodistill.tasks.language_model", "LanguageModelTask"),
    "images": ("p2pcodistill.tasks.images", "ImagesTask"),
    "clicks": ("p2pcodistill.tasks.clicks", "ClicksTask"),
}


@dataclass(frozen=True, slots=True)
class Evaluation:
    """How good a model is on held-out data: the loss, and what else the task measures, by name."""

    loss: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Predictions:
    """What a model says of held-out examples, always the same ones: class probabilities, and the true classes."""

    probabilities_NC: Tensor  # float32 on the CPU
    labels_N: Tensor  # int64 on the CPU


class Task(Stateful, Protocol):
    """One rank's data and what to do with it; its state dict is the position in the data (plain data and tensors)."""

    def make_model(self) -> nn.Module:
        """A new model on the task's device, initialised from torch's random state."""

    def next_batch(self) -> tuple[Any, Any]:
        """(inputs, targets) of this rank's next batch, on the task's device; never ends."""

    def forward(self, model: nn.Module, inputs: Any, state: State) -> tuple[Tensor, State]:
        """(logits, next state) of a student or teacher; a `codistill.teachers.Forward`."""

    def loss(self, logits: Tensor, targets: Any) -> Tensor:
        """The loss on labels, a float32 scalar."""

    def evaluate(self, model: nn.Module) -> Evaluation:
        """How good a model in eval mode is on all held-out data."""

    def predict(self, model: nn.Module) -> Predictions:
        """What a model in eval mode says of at most `MAX_PREDICTIONS` held-out examples."""


def load_task(spec: GroupSpec, *, rank: int, num_ranks: int, device: torch.device) -> Task:
    """The task that `spec` names, for one rank.

    Raises DataError when its data is missing or too small, ConfigError for a task of the user's own that is none.
    """
    if isinstance(spec.task, CustomTaskConfig):
        make = find_task_class(spec.task.task, Task)
    else:
        module, name = _TASKS[spec.task.name]
        make = getattr(importlib.import_module(module), name)
    task: Task = make(spec, rank=rank, num_ranks=num_ranks, device=device)
    return task
