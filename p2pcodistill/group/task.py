"""What the reference loop asks of a task.

Tasks lie in a layer above this one: the group's spec names one, and it is imported by that name.
"""

from __future__ import annotations

import importlib
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.stateful import Stateful

from p2pcodistill.codistill.teachers import State
from p2pcodistill.config import GroupSpec

_TASKS = {"language-model": ("p2pcodistill.tasks.language_model", "LanguageModelTask")}


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

    def evaluate(self, model: nn.Module) -> float:
        """The held-out loss of a model in eval mode."""


def load_task(spec: GroupSpec, *, rank: int, num_ranks: int, device: torch.device) -> Task:
    """The task that `spec` names, for one rank. Raises DataError when its data is missing or too small."""
    module, name = _TASKS[spec.task.name]
    task: Task = getattr(importlib.import_module(module), name)(
        spec, rank=rank, num_ranks=num_ranks, device=device
    )
    return task
