"""Local SGD, or federated averaging (McMahan et al. 2017) where all take part in each round.

Each site takes local steps from the common model, with an optimizer of its own whose state stays there; then all models are
replaced by their mean. With an interval of one step and an optimizer without state it is synchronous SGD. Models travel by a
ring all-reduce: no other way of averaging sends less.
"""

from __future__ import annotations

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


def run(arm: ArmRun) -> None:
    """See `run.ArmModule`."""
    precision = arm.config.precision or "float32"
    learners = learners_of(arm)
    models = [weights_of(learner.model) for learner in learners]

    def average(_index: int) -> None:
        wait_for_each_other(learners)
        count_all_reduce(learners, num_bytes(models[0], precision))
        common = mean([rounded(weights, precision) for weights in models])
        for weights in models:
            put(common, weights)

    train_in_rounds(arm, learners, average)
