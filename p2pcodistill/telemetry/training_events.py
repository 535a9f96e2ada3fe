"""What the ranks say: of steps, evaluations, teachers, checkpoints."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from p2pcodistill.telemetry.event import Event


@dataclass(frozen=True, slots=True)
class TrainingStarted(Event):
    """Rank 0 is about to take its first step. `num_parameters` counts elements; `start_step` is above 0 after a resume."""

    name: ClassVar[str] = "training-started"
    start_step: int
    num_steps: int
    num_parameters: int
    num_ranks: int
    device: str
    precision: str


@dataclass(frozen=True, slots=True)
class StepMeasured(Event):
    """Means over the steps since the previous such event, at `step` (1-based count of completed updates)."""

    name: ClassVar[str] = "step-measured"
    step: int
    loss: float
    distillation_loss: float | None
    learning_rate: float
    steps_per_s: float
    exchange_s: float
    duration_s: float


@dataclass(frozen=True, slots=True)
class Evaluated(Event):
    """Held-out loss (mean nats per prediction) after `step` updates, and what else the task measures, by name."""

    name: ClassVar[str] = "evaluated"
    step: int
    val_loss: float
    duration_s: float
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TeacherSwapped(Event):
    """After `step` updates this version of `teacher` took the last one's place, the same on every rank.

    The group learns from it from then on, unless it is gated or over a limit.
    """

    name: ClassVar[str] = "teacher-swapped"
    step: int
    teacher: str
    incarnation: int
    teacher_step: int


@dataclass(frozen=True, slots=True)
class TeacherRefused(Event):
    """A fetched checkpoint did not become a teacher: it does not decode, does not fit or is not finite."""

    name: ClassVar[str] = "teacher-refused"
    step: int
    teacher: str
    incarnation: int
    teacher_step: int
    reason: str
    why: str


@dataclass(frozen=True, slots=True)
class TeacherGated(Event):
    """All ranks agree that this version of `teacher` does not teach until it recovers: it is worse than the student.

    Losses are means over the ranks' batches of the last round of agreement; None where they could not be measured.
    """

    name: ClassVar[str] = "teacher-gated"
    step: int
    teacher: str
    incarnation: int
    teacher_step: int
    loss: float | None
    student_loss: float | None
    why: str


@dataclass(frozen=True, slots=True)
class TeacherReadmitted(Event):
    """A gated teacher has recovered, and teaches again. Losses as in `TeacherGated`."""

    name: ClassVar[str] = "teacher-readmitted"
    step: int
    teacher: str
    incarnation: int
    teacher_step: int
    loss: float | None
    student_loss: float | None


@dataclass(frozen=True, slots=True)
class TeacherExpired(Event):
    """This version of `teacher` is over a limit on staleness or age, and does not teach until a newer one comes."""

    name: ClassVar[str] = "teacher-expired"
    step: int
    teacher: str
    incarnation: int
    teacher_step: int
    staleness_steps: int
    age_s: float
    why: str


@dataclass(frozen=True, slots=True)
class SnapshotSkipped(Event):
    """An exchange was due and nothing was published. `why`: encoder or node were busy, or weights are not finite."""

    name: ClassVar[str] = "snapshot-skipped"
    step: int
    why: str


@dataclass(frozen=True, slots=True)
class TrainingCheckpointed(Event):
    """A complete training checkpoint is on disk."""

    name: ClassVar[str] = "training-checkpointed"
    step: int
    duration_s: float


@dataclass(frozen=True, slots=True)
class TrainingEnded(Event):
    """The loop is over: `finished` is False when the ranks agreed to stop early."""

    name: ClassVar[str] = "training-ended"
    step: int
    finished: bool
    exchange_s: float
    duration_s: float
