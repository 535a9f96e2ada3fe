"""DiLoCo (Douillard et al. 2023): local steps, and an outer optimizer with Nesterov momentum for what they have changed.

What the sites have moved away from the common model, on average, is the outer gradient of its parameters. With an outer rate
of 1 and no momentum it is federated averaging. Buffers, such as running means, are averaged. Where the last round is cut
short by the end of training, its models are averaged, too: the outer momentum of whole rounds would carry them too far.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from p2pcodistill.simulation.arms.learner import wait_for_each_other
from p2pcodistill.simulation.arms.rounds import learners_of, train_in_rounds
from p2pcodistill.simulation.arms.run import ArmRun
from p2pcodistill.simulation.arms.weights import (
    count_all_reduce,
    mean,
    num_bytes,
    put,
    rounded,
    weights_of,
)

DEFAULT_OUTER_LEARNING_RATE = 0.7
DEFAULT_OUTER_MOMENTUM = 0.9


def run(arm: ArmRun) -> None:
    """See `run.ArmModule`."""
    config, precision = arm.config, arm.config.precision or "float32"
    momentum = DEFAULT_OUTER_MOMENTUM if config.outer_momentum is None else config.outer_momentum
    learners = learners_of(arm)
    models = [weights_of(learner.model) for learner in learners]
    common = mean(models)
    num_parameters = _num_parameters(learners[0].model)
    parameters = [nn.Parameter(tensor) for tensor in common[:num_parameters]]  # in the same memory
    outer = torch.optim.SGD(
        parameters,
        lr=config.outer_learning_rate or DEFAULT_OUTER_LEARNING_RATE,
        momentum=momentum,
        nesterov=momentum > 0,
    )

    def step_outside(_index: int) -> None:
        wait_for_each_other(learners)
        count_all_reduce(learners, num_bytes(models[0], precision))
        moved = mean([rounded(_difference(common, weights), precision) for weights in models])
        is_whole = learners[0].num_steps % arm.interval_steps == 0
        num_outer = num_parameters if is_whole else 0
        if is_whole:
            for parameter, change in zip(parameters, moved[:num_outer], strict=True):
                parameter.grad = change
            outer.step()
        for averaged, change in zip(common[num_outer:], moved[num_outer:], strict=True):
            averaged.sub_(change)
        for weights in models:
            put(common, weights)

    train_in_rounds(arm, learners, step_outside)


def _difference(ones: Sequence[Tensor], others: Sequence[Tensor]) -> list[Tensor]:
    return [one - other for one, other in zip(ones, others, strict=True)]


def _num_parameters(model: nn.Module) -> int:
    """How many of the weights are parameters; they come first."""
    return sum(parameter.is_floating_point() for parameter in model.parameters())
