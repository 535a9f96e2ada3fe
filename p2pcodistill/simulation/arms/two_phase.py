"""Two-phase distillation: first an ensemble of lone models, then one student of it, on the first site's data.

The student is that of the reference loop; its teachers are the ensemble's members as they are after `teacher_steps`, sent to
it once. In the log the student's steps are counted on from there: what two phases cost are the steps of both.
"""

from __future__ import annotations

from p2pcodistill.checkpoint.snapshot import take_snapshot
from p2pcodistill.codistill.exchange import MemoryBoard
from p2pcodistill.config import CodistillationConfig
from p2pcodistill.simulation.arms.ensemble import MeanPrediction, train_side_by_side
from p2pcodistill.simulation.arms.learner import Learner, Tell, wait_for_each_other
from p2pcodistill.simulation.arms.run import ArmRun
from p2pcodistill.simulation.arms.steps import count_steps
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.node_events import FramePublished
from p2pcodistill.telemetry.training_events import Evaluated, TrainingEnded, TrainingStarted

_STUDENT = "student"


def run(arm: ArmRun) -> None:
    """See `run.ArmModule`."""
    teacher_steps = arm.config.teacher_steps or arm.training.num_steps
    tell = arm.tell()
    members = _train_ensemble(arm, teacher_steps, tell)
    board = MemoryBoard()
    student = arm.learner(
        arm.sites[0],
        name=_STUDENT,
        is_lead=True,
        tell=lambda time_s, event: tell(time_s, count_steps(event, lambda step: step + teacher_steps)),
        teachers={member.name: 1.0 for member in members},
        board=board,
        codistillation=_as_student(arm),
        now_s=members[0].now_s,
    )
    student.traffic_of = (student, *members)
    for member in members:
        _send(member, student, board, arm)
    ensemble = MeanPrediction([member.training.kept_model for member in members])
    student.metrics["teacher_loss"] = student.training.evaluate(ensemble).loss
    while student.training.is_under_way:
        student.step()
    student.training.end()


def _as_student(arm: ArmRun) -> CodistillationConfig:
    """The teachers are no early ones: they teach as soon as they are there, unless the arm says otherwise."""
    own = arm.config.codistillation
    at_once = {"burn_in_steps": 0, "agreement_interval_steps": 1}
    update = {key: value for key, value in at_once.items() if own is None or key not in own.model_fields_set}
    return arm.scenario.codistillation.model_copy(update=update)


def _train_ensemble(arm: ArmRun, num_steps: int, tell: Tell) -> list[Learner]:
    """The members after their last step; what the first of them measures goes into the log."""
    sum_steps = num_steps + arm.training.num_steps

    def hear_first(time_s: float, event: Event) -> None:
        if isinstance(event, TrainingStarted):
            tell(time_s, count_steps(event, lambda step: sum_steps if step == num_steps else step))
        elif not isinstance(event, Evaluated | TrainingEnded):
            tell(time_s, event)

    members = [
        arm.learner(
            site,
            tell=hear_first if index == 0 else None,
            num_steps=num_steps,
            evaluation_interval_steps=num_steps,
        )
        for index, site in enumerate(arm.sites[: arm.config.num_members])
    ]
    train_side_by_side(members)
    wait_for_each_other(members)
    return members


def _send(member: Learner, student: Learner, board: MemoryBoard, arm: ArmRun) -> None:
    """Publish a member as a keyframe, and count it as sent."""

    def count(event: Event) -> None:
        if isinstance(event, FramePublished):
            member.send(event.num_bytes, student)

    exchange = board.exchange(member.name, (), frames=arm.scenario.frames, on_event=count)
    exchange.publish(take_snapshot(member.training.kept_model, member.num_steps))
