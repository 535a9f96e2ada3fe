"""When the student learns from its teachers, and when it publishes (Anil et al. 2018, Algorithm 1).

`num_steps` is always the number of updates that are complete.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from p2pcodistill.config import CodistillationConfig


def distillation_weight(config: CodistillationConfig, num_steps: int) -> float:
    """Factor of the distillation loss in the update after `num_steps`: 0 in burn-in, then ramped up to `weight`."""
    num_steps_after_burn_in = num_steps + 1 - config.burn_in_steps
    if num_steps_after_burn_in <= 0:
        return 0.0
    return config.weight * min(1.0, num_steps_after_burn_in / max(1, config.ramp_steps))


def teachers_due(
    config: CodistillationConfig, teachers: Sequence[Mapping[str, float]], num_steps: int
) -> Mapping[str, float]:
    """Who teaches in the update after `num_steps`, with which weights, of a schedule over the intervals gone through.

    `teachers` has one table for each exchange interval; they are used in turn. Empty without any.
    """
    return teachers[num_steps // config.exchange_interval_steps % len(teachers)] if teachers else {}


def exchange_is_due(config: CodistillationConfig, num_steps: int) -> bool:
    """Whether the student is to be published after `num_steps`: at the end of its burn-in, and then at every multiple of
    the interval, so that a long one does not put off the first teachers.

    What it has learned until then would harm its students (Anil et al. 2018, section 2.1), however far they are: a site
    may have started late, or anew.
    """
    if num_steps <= config.burn_in_steps:
        return num_steps == config.burn_in_steps > 0
    return num_steps % config.exchange_interval_steps == 0


def averaging_is_due(config: CodistillationConfig, num_steps: int) -> bool:
    """Whether the student after `num_steps` counts in the average that is published: from one interval before the end of
    burn-in on, so that the first one published is an average, too.
    """
    return (
        config.teacher_average_decay > 0 and num_steps > config.burn_in_steps - config.exchange_interval_steps
    )


def agreement_is_due(config: CodistillationConfig, num_steps: int) -> bool:
    """Whether the ranks are to begin a vote on new teachers and on stopping after `num_steps`."""
    return num_steps % config.agreement_interval_steps == 0
