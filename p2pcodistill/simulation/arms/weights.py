"""What arms do with models as a whole: average them, copy them, and say how large they are on the wire.

The weights of a model are its floating parameters and buffers, in the order of the module; a tied one is there once.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from p2pcodistill.simulation.arms.learner import Learner

Precision = Literal["float32", "float16", "bfloat16"]


def weights_of(model: nn.Module) -> list[Tensor]:
    """The live tensors, without their gradients."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return [tensor.detach() for tensor in tensors if tensor.is_floating_point()]


def buffers_of(model: nn.Module) -> list[Tensor]:
    """All live buffers, also those that count."""
    return list(model.buffers())


def gradients_of(model: nn.Module) -> list[Tensor]:
    """Of the parameters that are trained: zeros where the last batch had nothing to do with one."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [torch.zeros_like(own) if own.grad is None else own.grad for own in trained]


def set_gradients(gradients: Sequence[Tensor], model: nn.Module) -> None:
    """Have the next update of `model` use these; the inverse of `gradients_of`."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for own, gradient in zip(trained, gradients, strict=True):
        own.grad = gradient


def rounded(tensors: Sequence[Tensor], precision: Precision) -> list[Tensor]:
    """What arrives of `tensors` that are sent in that precision."""
    if precision == "float32":
        return list(tensors)
    return [tensor.to(_dtype(precision)).to(tensor.dtype) for tensor in tensors]


def weighted_mean(tensors_N: Sequence[Sequence[Tensor]], weights_N: Sequence[float]) -> list[Tensor]:
    """The weighted sum of N lists of tensors, tensor by tensor; the weights add up to 1."""
    total = [tensor * weights_N[0] for tensor in tensors_N[0]]
    for tensors, weight in zip(tensors_N[1:], weights_N[1:], strict=True):
        torch._foreach_add_(total, list(tensors), alpha=weight)
    return total


def mean(tensors_N: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    """The plain mean of N lists of tensors, tensor by tensor."""
    return weighted_mean(tensors_N, [1 / len(tensors_N)] * len(tensors_N))


def put(tensors: Sequence[Tensor], into: Sequence[Tensor]) -> None:
    """Copy values."""
    for tensor, target in zip(tensors, into, strict=True):
        target.copy_(tensor)


def num_bytes(tensors: Sequence[Tensor], precision: Precision) -> int:
    """Of `tensors` on the wire, without any envelope."""
    return sum(tensor.numel() for tensor in tensors) * _dtype(precision).itemsize


def _dtype(precision: Precision) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, precision)
    return dtype


def count_all_reduce(learners: Sequence[Learner], total_bytes: int) -> None:
    """Count an all-reduce of so many bytes round a ring, which sends the least: 2 (n - 1) / n of them from each of n."""
    for sender, receiver in zip(learners, [*learners[1:], learners[0]], strict=True):
        if sender is not receiver:
            sender.send(2 * (len(learners) - 1) * total_bytes // len(learners), receiver)
