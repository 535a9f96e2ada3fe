"""An ensemble: the mean prediction of models that were trained each by itself, evaluated along their training."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from p2pcodistill.group.predictions import save_predictions
from p2pcodistill.runfolder import PREDICTIONS_FILE
from p2pcodistill.simulation.arms.learner import Learner, Tell
from p2pcodistill.simulation.arms.run import ArmRun
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.training_events import Evaluated, TrainingEnded, TrainingStarted


class MeanPrediction(nn.Module):
    """The mean of its members' predictions, as a model that is called as each of them is.

    Members are called with tensors, and where they have a state with that as the last argument: None at first, here a tuple
    of theirs after that. What it returns as logits are logarithms of mean probabilities; classes are last.
    """

    def __init__(self, members: Sequence[nn.Module]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def forward(self, *inputs: Any) -> Any:
        """The logits, or (logits, next state) of members that have a state."""
        *others, state = inputs
        if isinstance(state, Tensor):
            return _mean([member(*inputs) for member in self.members])
        of_members = state or [None] * len(self.members)
        pairs = [member(*others, own) for member, own in zip(self.members, of_members, strict=True)]
        return _mean([logits for logits, _ in pairs]), tuple(own for _, own in pairs)


def _mean(logits_N: Sequence[Tensor]) -> Tensor:
    probabilities_N = torch.stack([logits.float().log_softmax(-1) for logits in logits_N])
    return probabilities_N.logsumexp(0) - math.log(len(logits_N))


def run(arm: ArmRun) -> None:
    """See `run.ArmModule`. The log is that of the first member, with the ensemble's evaluations in place of its own.

    Its times are those of the slowest member so far, without which there is no ensemble.
    """
    tell = arm.tell()
    losses: list[float] = []
    members: list[Learner] = []

    def hear(is_first: bool) -> Tell:
        def hear_member(_time_s: float, event: Event) -> None:
            time_s = max(member.now_s for member in members)
            if isinstance(event, Evaluated):
                losses.append(event.val_loss)
                if len(losses) == len(members):
                    tell(time_s, _evaluated(members, event, losses))
                    losses.clear()
            elif is_first:
                tell(time_s, _of_all(event, members))

        return hear_member

    for site in arm.sites[: arm.config.num_members]:
        members.append(arm.learner(site, tell=hear(not members)))
    train_side_by_side(members)
    together = MeanPrediction([member.training.kept_model for member in members])
    save_predictions(members[0].training.predict(together), arm.folder / PREDICTIONS_FILE)


def train_side_by_side(members: Sequence[Learner]) -> None:
    """Train each by itself, one step after the other."""
    for member in members:
        member.training.begin()
    while members[0].training.is_under_way:
        for member in members:
            member.step()
    for member in members:
        member.training.end()


def _evaluated(members: Sequence[Learner], last: Evaluated, losses: Sequence[float]) -> Evaluated:
    together = members[0].training.evaluate(
        MeanPrediction([member.training.kept_model for member in members])
    )
    metrics = {"mean_member_loss": sum(losses) / len(losses), "best_member_loss": min(losses)}
    return dataclasses.replace(last, val_loss=together.loss, metrics=together.metrics | metrics)


def _of_all(event: Event, members: Sequence[Learner]) -> Event:
    if isinstance(event, TrainingStarted):
        return dataclasses.replace(event, num_parameters=event.num_parameters * len(members))
    if isinstance(event, TrainingEnded):
        return dataclasses.replace(event, duration_s=max(member.now_s for member in members))
    return event
