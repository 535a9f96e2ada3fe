"""The optimizer of the reference loop, and what it is told before each update: the rate and the weight decay of that step.

A schedule is a pure function of the configuration and the number of completed steps, so a resumed run needs no state of it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from p2pcodistill.config import TrainingConfig

_IS_DECAYED = "is_decayed"


def make_optimizer(config: TrainingConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The configured optimizer over all parameters of `model`; `set_step` tells it rate and weight decay."""
    groups = _parameter_groups(config, model)
    rate = config.learning_rate
    match config.optimizer:
        case "sgd":
            return torch.optim.SGD(groups, lr=rate, momentum=config.momentum, nesterov=config.nesterov)
        case "adagrad":
            return torch.optim.Adagrad(groups, lr=rate)
        case "adam":
            adam = (
                torch.optim.AdamW if config.weight_decay or config.weight_decay_changes else torch.optim.Adam
            )
            # One pass over each parameter, which saves a tenth of a small model's step.
            return adam(groups, lr=rate, fused=True)


def _parameter_groups(config: TrainingConfig, model: nn.Module) -> Iterable[Any]:
    if config.decay_norms_and_biases:
        return model.parameters()
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    others = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, _IS_DECAYED: True}, {"params": others, _IS_DECAYED: False}]
    return [group for group in groups if group["params"]]


def set_step(
    optimizer: torch.optim.Optimizer, config: TrainingConfig, num_steps: int, *, num_workers: int = 1
) -> None:
    """Prepare `optimizer` for the update after `num_steps`."""
    rate, decay = learning_rate(config, num_steps, num_workers=num_workers), weight_decay(config, num_steps)
    for group in optimizer.param_groups:
        group["lr"] = rate
        group["weight_decay"] = decay if group.get(_IS_DECAYED, True) else 0.0


def learning_rate(config: TrainingConfig, num_steps: int, *, num_workers: int = 1) -> float:
    """The rate of the update after `num_steps`, whose gradient is the mean over the batches of `num_workers`.

    Gradual warm-up and linear scaling are those of Goyal et al. 2017, section 2.
    """
    warmup = min(1.0, (num_steps + 1) / max(1, config.warmup_steps))
    rate = config.learning_rate
    if config.reference_batch_size is not None:
        scale = config.batch_size * num_workers / config.reference_batch_size
        rate *= scale
        warmup += (1 - warmup) / scale
    match config.learning_rate_schedule:
        case "constant":
            rate *= warmup
        case "linear":
            rate *= warmup * (1 - num_steps / config.num_steps)
        case "cosine":
            rate = rate * warmup * 0.5 * (1 + math.cos(math.pi * num_steps / config.num_steps))
    return rate * math.prod(factor for step, factor in config.learning_rate_drops if step <= num_steps)


def weight_decay(config: TrainingConfig, num_steps: int) -> float:
    """The weight decay of the update after `num_steps`."""
    values = [value for step, value in config.weight_decay_changes if step <= num_steps]
    return values[-1] if values else config.weight_decay
