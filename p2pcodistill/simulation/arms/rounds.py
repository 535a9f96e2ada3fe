"""Local steps at every site, with an exchange of weights between them: the loop of all arms that average models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from p2pcodistill.simulation.arms.learner import Learner
from p2pcodistill.simulation.arms.run import ArmRun


def learners_of(arm: ArmRun) -> list[Learner]:
    """One for each site, with its log."""
    return [arm.learner(site) for site in arm.sites]


def train_in_rounds(arm: ArmRun, learners: Sequence[Learner], exchange: Callable[[int], None]) -> None:
    """Train `learners` in step, and call `exchange`, with its index, each time that an interval of steps is over.

    The last interval is over with training, however short it is. What is evaluated after an exchange is its result.
    """
    for learner in learners:
        learner.training.begin()
    index = 0
    for step in range(1, arm.training.num_steps + 1):
        for learner in learners:
            learner.compute_gradient()
            learner.training.update()
        if step % arm.interval_steps == 0 or step == arm.training.num_steps:
            exchange(index)
            index += 1
        for learner in learners:
            learner.training.conclude_step()
    for learner in learners:
        learner.training.end()
