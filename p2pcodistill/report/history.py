"""What one site went through, folded from its events: curves, staleness, traffic and totals.

Everything here is a pure function of the records of one `events.jsonl`. A run may span several lives of the node and of its
group, and a group that restarts resumes from an earlier step. The rules:

- curves keep what led to the present model: when training goes back to a step, what was recorded beyond it is dropped, and
  of two records of one step the later one stays;
- totals keep what was really spent: bytes, teacher swaps, published frames and seconds add up over all lives; pauses between
  them, for which a simulation was stopped, do not count.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple, TypeAlias, TypeVar

from p2pcodistill.report.lives import Elapsed, TrafficTotals
from p2pcodistill.report.peers import PeerHistory, note_peers
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.log import EventTail
from p2pcodistill.telemetry.node_events import (
    FrameFetched,
    FramePublished,
    GroupStarted,
    NodeStarted,
    Refused,
    RelayStarted,
    TrafficMeasured,
    VersionAnnounced,
)
from p2pcodistill.telemetry.records import Record, from_record
from p2pcodistill.telemetry.simulation_events import FaultInjected
from p2pcodistill.telemetry.training_events import (
    Evaluated,
    StepMeasured,
    TeacherExpired,
    TeacherGated,
    TeacherReadmitted,
    TeacherRefused,
    TeacherSwapped,
    TrainingEnded,
    TrainingStarted,
)

Curve: TypeAlias = list[tuple[int, float]]
"""(step, value), steps strictly increasing. A value that was not finite is NaN."""
TeacherCurve: TypeAlias = list[tuple[int, dict[str, int]]]
"""(step, {teacher: steps}), steps strictly increasing."""

Value = TypeVar("Value")


def read_event(record: Record) -> Event:
    """The event of a record, whichever version of this package wrote it: frames without a kind were all keyframes.

    Raises ValueError as `telemetry.records.from_record` does.
    """
    if record.get("event") in (FramePublished.name, FrameFetched.name):
        record = {"kind": "keyframe"} | record
    return from_record(record)


class TrafficPoint(NamedTuple):
    """Bytes moved up to a moment, over all lives of the node, envelopes included."""

    time_s: float
    """As of an `EvaluationDetail`."""
    num_bytes_sent: int
    num_bytes_received: int
    step: int
    """The step that training had reached by then."""


@dataclass(frozen=True, slots=True)
class EvaluationDetail:
    """What there is to an evaluation beside its loss."""

    time_s: float
    """Since the first record, without the time for which a simulation was stopped."""
    num_bytes_sent: int
    """By then."""
    metrics: Mapping[str, float]


@dataclass(slots=True)
class Fetched:
    """What a site has fetched of one teacher: versions, as (incarnation, step), and the bytes of frames that it took."""

    versions: set[tuple[int, int]] = field(default_factory=set)
    num_bytes: int = 0


class TeacherTracker:
    """Which version of each teacher is in use at a site, which is the newest that its origin announced, and who is kept
    from teaching."""

    def __init__(self) -> None:
        self._announced: dict[str, tuple[int, int]] = {}
        self._in_use: dict[str, tuple[int, int]] = {}
        self._gated: dict[str, str] = {}
        self._expired: dict[str, str] = {}

    @property
    def resting(self) -> dict[str, str]:
        """Why, for each teacher that is in use but does not teach: gated, or over a limit."""
        return self._expired | self._gated

    def update(self, event: Event) -> None:
        """Take an announcement, a swap or a decision about a teacher into account; other events change nothing."""
        if isinstance(event, VersionAnnounced):
            self._announce(event.origin, (event.incarnation, event.step))
        elif isinstance(event, TeacherSwapped):
            self._in_use[event.teacher] = (event.incarnation, event.teacher_step)
            # A teacher from the store is in use before its origin has been heard of.
            self._announce(event.teacher, (event.incarnation, event.teacher_step))
            self._expired.pop(event.teacher, None)
        elif isinstance(event, TeacherGated):
            self._gated[event.teacher] = event.why
        elif isinstance(event, TeacherReadmitted):
            self._gated.pop(event.teacher, None)
        elif isinstance(event, TeacherExpired):
            self._expired[event.teacher] = event.why
        elif isinstance(event, TrainingStarted) and event.start_step == 0:
            self._gated.clear()  # no checkpoint remembers it
            self._expired.clear()

    def _announce(self, origin: str, version: tuple[int, int]) -> None:
        self._announced[origin] = max(version, self._announced.get(origin, version))

    def staleness_steps(self) -> dict[str, int]:
        """Per teacher in use: its origin's newest announced step minus the step in use here.

        Never negative: an origin that resumed from an earlier step announces smaller steps under a higher incarnation, and
        a version that is ahead of them is not stale.
        """
        return {
            teacher: max(0, self._announced[teacher][1] - step) for teacher, (_, step) in self._in_use.items()
        }

    def lag_steps(self, student_step: int) -> dict[str, int]:
        """Per teacher in use: `student_step` minus the teacher's step; negative for a student that is behind."""
        return {teacher: student_step - step for teacher, (_, step) in self._in_use.items()}


@dataclass(slots=True)
class SiteHistory:
    """One site's run, from the records of its `events.jsonl`. Numbers that no event has told yet are 0 or None."""

    evaluations: Curve = field(default_factory=list)
    """Held-out loss."""
    evaluation_details: dict[int, EvaluationDetail] = field(default_factory=dict)
    """By step, of the newest evaluation at each."""
    losses: Curve = field(default_factory=list)
    """Training loss, the mean over the steps since the previous point."""
    staleness: TeacherCurve = field(default_factory=list)
    """Per teacher: the origin's newest announced step minus the step in use, at each measurement from the first swap on."""
    lag: TeacherCurve = field(default_factory=list)
    """Per teacher: student step minus teacher step, sampled likewise."""
    traffic: list[TrafficPoint] = field(default_factory=list)
    num_steps: int = 0
    """Completed updates of the present model."""
    first_distilled_step: int | None = None
    """First measured step at which the distillation loss was on: burn-in ended at or shortly before it."""
    num_parameters: int | None = None
    device: str | None = None
    precision: str | None = None
    num_bytes_sent: int = 0
    num_bytes_received: int = 0
    num_teacher_swaps: int = 0
    num_frames_published: int = 0
    num_keyframes_published: int = 0
    num_fp16_bytes: int | None = None
    """A checkpoint of this site's as raw fp16."""
    fetched: dict[str, Fetched] = field(default_factory=dict)
    """Per teacher."""
    swapped: dict[str, set[tuple[int, int]]] = field(default_factory=dict)
    """Per teacher: the versions that were learnt from."""
    num_gatings: dict[str, int] = field(default_factory=dict)
    """Per teacher: how often it was gated off."""
    num_expiries: dict[str, int] = field(default_factory=dict)
    """Per teacher: how many of its versions were over a limit on staleness or age."""
    num_refusals: int = 0
    refusals: Counter[str] = field(default_factory=Counter)
    """How many, by their reason."""
    peers: dict[str, PeerHistory] = field(default_factory=dict)
    """What there was to say about each peer."""
    num_bytes_relayed: dict[str, int] = field(default_factory=dict)
    """Per origin that does not teach this site: bytes of its frames that were fetched for others."""
    faults: list[tuple[str, int]] = field(default_factory=list)
    """What a simulation did to the site: the kind, and the step that it had reached."""
    num_node_starts: int = 0
    num_group_starts: int = 0
    num_measured_steps: int = 0
    """Updates that `duration_s` covers, repeated ones included."""
    exchange_s: float = 0.0
    """Seconds that the training thread spent in exchange, over all lives."""
    duration_s: float = 0.0
    """Seconds of training that `exchange_s` is a part of."""
    finished: bool = False
    """Training reached its last step (and was not stopped early)."""

    @classmethod
    def read(cls, path: Path) -> SiteHistory:
        """The history in an `events.jsonl`; empty if there is no such file.

        Torn lines and events of other versions are passed over.
        """
        return cls.of(EventTail(path).read())

    @classmethod
    def of(cls, records: Iterable[Record]) -> SiteHistory:
        """The history that `records` tell, in their order."""
        history = cls()
        records = list(records)
        teachers, traffic = TeacherTracker(), TrafficTotals()
        elapsed = Elapsed(counts_pauses=any(record.get("event") == FaultInjected.name for record in records))
        last_step = 0
        for record in records:
            try:
                event = read_event(record)
            except ValueError:
                continue
            time_s = float(record.get("time_unix_s") or 0.0)
            elapsed_s = elapsed.update(event, time_s)
            teachers.update(event)
            traffic.update(event)
            note_peers(history.peers, event)
            match event:
                case NodeStarted():
                    history.num_node_starts += 1
                case GroupStarted():
                    history.num_group_starts += 1
                case TrainingStarted():
                    history._go_back_to(event.start_step)
                    last_step = event.start_step
                    history.num_parameters = event.num_parameters
                    history.device = event.device
                    history.precision = event.precision
                case StepMeasured():
                    history._measure(event, teachers, num_new_steps=event.step - last_step)
                    last_step = event.step
                case Evaluated():
                    _put(history.evaluations, event.step, _number(event.val_loss))
                    metrics = {name: _number(value) for name, value in event.metrics.items()}
                    history.evaluation_details[event.step] = EvaluationDetail(
                        elapsed_s, traffic.num_bytes_sent, metrics
                    )
                case TeacherSwapped():
                    history.num_teacher_swaps += 1
                    history.swapped.setdefault(event.teacher, set()).add(
                        (event.incarnation, event.teacher_step)
                    )
                case FramePublished():
                    history.num_frames_published += 1
                    history.num_keyframes_published += event.kind == "keyframe"
                    history.num_fp16_bytes = event.num_fp16_bytes
                case RelayStarted():
                    history.num_bytes_relayed.setdefault(event.origin, 0)
                case FrameFetched():
                    history._fetch(event)
                case Refused():
                    history._refuse(event.reason, event.num_times)
                case TeacherRefused():
                    history._refuse(event.reason)
                case TeacherGated():
                    history.num_gatings[event.teacher] = history.num_gatings.get(event.teacher, 0) + 1
                case TeacherExpired():
                    history.num_expiries[event.teacher] = history.num_expiries.get(event.teacher, 0) + 1
                case FaultInjected():
                    history.faults.append((event.kind, event.step))
                case TrafficMeasured():
                    history.num_bytes_sent = traffic.num_bytes_sent
                    history.num_bytes_received = traffic.num_bytes_received
                    history.traffic.append(
                        TrafficPoint(
                            elapsed_s, history.num_bytes_sent, history.num_bytes_received, history.num_steps
                        )
                    )
                case TrainingEnded():
                    history._end(event, num_new_steps=event.step - last_step)
        return history

    def _fetch(self, event: FrameFetched) -> None:
        num_bytes = event.num_bytes + event.num_resent_bytes
        if event.origin in self.num_bytes_relayed:  # it teaches others
            self.num_bytes_relayed[event.origin] += num_bytes
            return
        fetched = self.fetched.setdefault(event.origin, Fetched())
        fetched.versions.add((event.incarnation, event.step))
        fetched.num_bytes += num_bytes

    def _refuse(self, reason: str, num_times: int = 1) -> None:
        self.num_refusals += num_times
        self.refusals[reason] += num_times

    def _go_back_to(self, step: int) -> None:
        for curve in (self.evaluations, self.losses, self.staleness, self.lag):
            while curve and curve[-1][0] > step:
                curve.pop()
        self.num_steps = step
        self.finished = False

    def _measure(self, event: StepMeasured, teachers: TeacherTracker, *, num_new_steps: int) -> None:
        _put(self.losses, event.step, _number(event.loss))
        if staleness := teachers.staleness_steps():
            _put(self.staleness, event.step, staleness)
            _put(self.lag, event.step, teachers.lag_steps(event.step))
        if event.distillation_loss is not None and self.first_distilled_step is None:
            self.first_distilled_step = event.step
        self.num_steps = event.step
        self.num_measured_steps += max(0, num_new_steps)
        self.exchange_s += event.exchange_s
        self.duration_s += event.duration_s

    def _end(self, event: TrainingEnded, *, num_new_steps: int) -> None:
        self.num_steps = event.step
        self.finished = event.finished
        # The loop's own totals also cover what came after the last measurement; they are the smaller ones only where they
        # leave out an earlier life of the group.
        if event.duration_s > self.duration_s:
            self.exchange_s = event.exchange_s
            self.duration_s = event.duration_s
            self.num_measured_steps += max(0, num_new_steps)

    @property
    def final_val_loss(self) -> float | None:
        """The last evaluation's held-out loss; None before the first, NaN if it was not finite."""
        return self.evaluations[-1][1] if self.evaluations else None

    @property
    def mean_staleness_steps(self) -> float | None:
        """Mean over samples and teachers; None without teachers."""
        return _mean_steps(self.staleness)

    @property
    def mean_lag_steps(self) -> float | None:
        """Mean over samples and teachers; None without teachers."""
        return _mean_steps(self.lag)

    @property
    def exchange_stall_ratio(self) -> float | None:
        """The share of training time that the training thread spent in exchange."""
        return self.exchange_s / self.duration_s if self.duration_s > 0 else None

    @property
    def steps_per_s(self) -> float | None:
        """Mean speed of training."""
        return self.num_measured_steps / self.duration_s if self.duration_s > 0 else None

    def first_step_at_or_below(self, val_loss: float) -> int | None:
        """The first evaluated step whose held-out loss is at or below `val_loss`; None if there is none."""
        return next((step for step, loss in self.evaluations if loss <= val_loss), None)


def _put(curve: list[tuple[int, Value]], step: int, value: Value) -> None:
    while curve and curve[-1][0] >= step:
        curve.pop()
    curve.append((step, value))


def _number(value: float | None) -> float:
    # A value that is not finite travels as null (see telemetry).
    return math.nan if value is None else float(value)


def _mean_steps(curve: TeacherCurve) -> float | None:
    samples = [steps for _, by_teacher in curve for steps in by_teacher.values()]
    return sum(samples) / len(samples) if samples else None
