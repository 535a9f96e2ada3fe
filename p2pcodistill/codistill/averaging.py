"""An exponential moving average of the student, to be published, or evaluated and kept, instead of its last weights.

A model that is an average of many steps lacks the noise of the last few.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from p2pcodistill.checkpoint.snapshot import Snapshot, take_snapshot


class WeightAverage:
    """The average of `model`'s parameters and persistent buffers (batch norm's statistics), with `decay` a step.

    What is no floating-point number, such as a counter, and what is not persistent is the model's own. The first
    1 / (1 - decay) steps count alike, so that the model with which the average begins weighs no more than others.
    Memory: one copy of what is averaged beside the model; for what is of half precision, another one in float32.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay = decay
        self._num_steps = 0
        # Made before training has left anything in the model that cannot be copied; it has no part in the computation.
        self._module = copy.deepcopy(model).requires_grad_(False)
        pairs = list(zip(model.named_parameters(), self._module.parameters(), strict=True))
        # The parameters themselves, not views of their memory: what moves a model gives them other memory.
        self._sources = {name: source for (name, source), _ in pairs if source.is_floating_point()}
        self._published = [own for _, own in pairs if own.is_floating_point()]
        self._exact = [(own, source) for (_, source), own in pairs if not own.is_floating_point()]
        # A small step in half precision would be lost in rounding.
        self._averages = [own.to(torch.promote_types(own.dtype, torch.float32)) for own in self._published]
        self._modules = list(zip(self._module.modules(), model.modules(), strict=True))
        self._buffers = {
            f"{prefix}.{name}".lstrip("."): _AveragedBuffer(own, others, name, _in_full(buffer))
            for (prefix, others), own in zip(model.named_modules(), self._module.modules(), strict=True)
            for name, buffer in others._buffers.items()
            if buffer is not None
            and buffer.is_floating_point()
            and name not in others._non_persistent_buffers_set
        }

    @property
    def has_begun(self) -> bool:
        """Whether there is anything to publish."""
        return self._num_steps > 0

    @torch.no_grad()
    def update(self) -> None:
        """Count the model as it is now; to be called after each step from the first one that is to count."""
        pairs = zip(self._sources.values(), self._averages, strict=True)
        sources = [source.to(average.dtype) for source, average in pairs]
        self._num_steps += 1
        weight = max(1 - self._decay, 1 / self._num_steps)
        torch._foreach_lerp_(self._averages, sources, weight)
        for buffer in self._buffers.values():
            buffer.update(weight)

    @torch.no_grad()
    def take_snapshot(self, step: int, *, on_device: bool = False) -> Snapshot:
        """As `checkpoint.snapshot.take_snapshot` of the model, with its average in place of what is averaged."""
        return take_snapshot(self.model(), step, on_device=on_device)

    @torch.no_grad()
    def model(self) -> nn.Module:
        """The model with its average, as it is now, in place of what is averaged: the same module at each call.

        Before the first update it is the model with which the average was made.
        """
        for published, average in zip(self._published, self._averages, strict=True):
            published.copy_(average)
        for own, source in self._exact:
            own.copy_(source)
        averaged = {(buffer.own, buffer.name) for buffer in self._buffers.values()}
        for own_module, others in self._modules:
            for name, other in others._buffers.items():
                if (own_module, name) not in averaged:
                    own_module._buffers[name] = other
        for buffer in self._buffers.values():
            getattr(buffer.own, buffer.name).copy_(buffer.average)
        return self._module

    def state_dict(self) -> dict[str, Any]:
        """Plain data and tensors: the average, and how many steps are in it."""
        tensors: dict[str, Tensor] = {}
        if self.has_begun:
            tensors = dict(zip(self._sources, self._averages, strict=True))
            tensors |= {name: buffer.average for name, buffer in self._buffers.items()}
        return {"num_steps": self._num_steps, "tensors": tensors}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`."""
        self._num_steps = state["num_steps"]
        tensors: Mapping[str, Tensor] = state["tensors"]
        for name, average in zip(self._sources, self._averages, strict=True):
            if name in tensors:
                average.copy_(tensors[name])
        for name, buffer in self._buffers.items():
            if name in tensors:
                buffer.average.copy_(tensors[name])


@dataclass(frozen=True, slots=True)
class _AveragedBuffer:
    """A buffer of the published module (`own`) and of the model (`others`), and its average between the two."""

    own: nn.Module
    others: nn.Module
    name: str
    average: Tensor

    def update(self, weight: float) -> None:
        # Looked up at each step: a module may have put another tensor there.
        source: Tensor = getattr(self.others, self.name).to(self.average.dtype)
        # What did not change stays as it is, and no mask of infinities becomes NaN.
        moved = self.average.lerp(source, weight)
        self.average.copy_(torch.where(self.average == source, source, moved))


def _in_full(tensor: Tensor) -> Tensor:
    """A copy of its own, in float32 if it is of half precision."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32), copy=True)
