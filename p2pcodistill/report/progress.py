"""One site's state as its records up to now tell it, and the same in words.

Text that peers may have had a hand in is stripped of control characters here, before it reaches a screen or a log.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from p2pcodistill.report.history import TeacherTracker, read_event
from p2pcodistill.report.links import link_sentence, rate_mbit
from p2pcodistill.report.lives import TrafficTotals
from p2pcodistill.report.summary import reasons_in_words
from p2pcodistill.report.table import ABSENT, byte_count
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.node_events import (
    FramePublished,
    GroupExited,
    GroupStarted,
    LinkMeasured,
    NodeStarted,
    NodeStopped,
    NodeStopping,
    PeerConnected,
    PeerDisconnected,
    PeerQuarantined,
    PeerRecovered,
    PeerSuspected,
    Refused,
)
from p2pcodistill.telemetry.records import Record
from p2pcodistill.telemetry.simulation_events import FaultInjected, SyntheticMeasured
from p2pcodistill.telemetry.training_events import (
    Evaluated,
    StepMeasured,
    TeacherRefused,
    TrainingEnded,
    TrainingStarted,
)

State: TypeAlias = Literal[
    "waiting",
    "starting",
    "training",
    "restarting",
    "stopping",
    "serving",
    "simulating",
    "finished",
    "stopped",
    "killed",
    "failed",
]
ENDED: frozenset[State] = frozenset({"finished", "stopped", "failed"})

_ENDINGS: dict[str, State] = {"finished": "finished", "stopped": "stopped"}

SPEED_SMOOTHING = 0.2
"""Weight of a new measurement in the speed that the time left is estimated from."""
MAX_SENTENCE_CHARACTERS = 200


@dataclass(slots=True)
class Progress:
    """One site as its records up to now tell it. Numbers not known yet are None."""

    state: State = "waiting"
    step: int = 0
    num_steps: int | None = None
    loss: float | None = None
    val_loss: float | None = None
    steps_per_s: float | None = None
    neighbours: tuple[str, ...] = ()
    connected_peers: set[str] = field(default_factory=set)
    suspected_peers: dict[str, float] = field(default_factory=dict)
    """Those with a session that do not answer, and for how many seconds they had not when that was noticed."""
    links: dict[str, LinkMeasured] = field(default_factory=dict)
    """The last measurement of the link with each peer."""
    synthetic: SyntheticMeasured | None = None
    """Of a whole simulation without training, in place of a site."""
    refusals: Counter[str] = field(default_factory=Counter)
    """How many, by their reason."""
    last_refusal: str | None = None
    num_faults: int = 0
    last_fault: str | None = None
    _quarantines: dict[str, tuple[float, PeerQuarantined]] = field(default_factory=dict)
    _time_s: float = 0.0
    _newest_version: tuple[int, int] | None = None
    _num_fp16_bytes: int = 0
    _num_frame_bytes: int = 0
    _smooth_steps_per_s: float | None = None
    _teachers: TeacherTracker = field(default_factory=TeacherTracker)
    _traffic: TrafficTotals = field(default_factory=TrafficTotals)

    def update(self, record: Record) -> Event | None:
        """Take `record` into account; return its event, or None for one that this version does not know."""
        try:
            event = read_event(record)
        except ValueError:
            return None
        self._time_s = max(self._time_s, float(record.get("time_unix_s") or 0.0))
        self._teachers.update(event)
        self._traffic.update(event)
        match event:
            case NodeStarted():
                self.state = "starting"
                self.neighbours = tuple(event.neighbours)
                self.connected_peers.clear()
                self.suspected_peers.clear()
                self.links.clear()
                self._quarantines.clear()
            case NodeStopping():
                self.state = "stopping"
            case NodeStopped():
                self.state = _ENDINGS.get(event.reason, "failed")
                self.connected_peers.clear()
            case PeerConnected():
                self.connected_peers.add(event.peer)
            case PeerDisconnected():
                self.connected_peers.discard(event.peer)
                self.suspected_peers.pop(event.peer, None)
            case PeerSuspected():
                self.suspected_peers[event.peer] = event.silent_s
            case PeerRecovered():
                self.suspected_peers.pop(event.peer, None)
            case PeerQuarantined():
                self._quarantines[event.peer] = self._time_s + event.duration_s, event
            case LinkMeasured():
                self.links[event.peer] = event
            case GroupStarted():
                self.state = "starting"
            case GroupExited():
                if event.restart_in_s is not None:
                    self.state = "restarting"
                elif event.exit_status != 0 and self.state != "stopping":
                    self.state = "failed"
            case TrainingStarted():
                self.state = "training"
                self.step, self.num_steps = event.start_step, event.num_steps
                self._smooth_steps_per_s = None
            case StepMeasured():
                self.state = "stopping" if self.state == "stopping" else "training"
                self.step, self.loss = event.step, event.loss
                self._measure_speed(event.steps_per_s)
            case FramePublished():  # all that is heard of a user's own script
                self.state = "training" if self.state == "starting" else self.state
                self.step = max(self.step, event.step)
                self._publish(event)
            case Evaluated():
                self.val_loss = event.val_loss
            case TrainingEnded():
                self.state = ("serving" if self.neighbours else "finished") if event.finished else "stopping"
                self.step = event.step
            case FaultInjected():
                self.num_faults += 1
                factor = "" if event.factor is None else f" by {event.factor:g}"
                whom = "" if self.synthetic is None else f" of {event.site}"
                self.last_fault = printable(f"{event.kind}{whom}{factor} at step {event.step}")
                if event.ends_node and self.synthetic is None:
                    self.state = "killed"
                    self.connected_peers.clear()
            case SyntheticMeasured():
                self.state = "simulating"
                self.step, self.num_steps, self.synthetic = event.step, event.num_steps, event
            case Refused():
                who = f"from {event.peer}: " if event.peer else ""
                self._refuse(event.reason, f"{who}{event.why}", event.num_times)
            case TeacherRefused():
                self._refuse(
                    event.reason, f"teacher {event.teacher} of step {event.teacher_step}: {event.why}"
                )
        return event

    def _measure_speed(self, steps_per_s: float | None) -> None:
        self.steps_per_s = steps_per_s
        if steps_per_s is not None:
            before = steps_per_s if self._smooth_steps_per_s is None else self._smooth_steps_per_s
            self._smooth_steps_per_s = before + SPEED_SMOOTHING * (steps_per_s - before)

    def _publish(self, event: FramePublished) -> None:
        version = (event.incarnation, event.step)
        if version != self._newest_version:  # else a keyframe of the same once more
            self._newest_version = version
            self._num_fp16_bytes += event.num_fp16_bytes
            self._num_frame_bytes += event.num_bytes

    def _refuse(self, reason: str, why: str, num_times: int = 1) -> None:
        self.refusals[reason] += num_times
        self.last_refusal = printable(f"{reason}: {why}")

    @property
    def num_refusals(self) -> int:
        """All that was refused so far."""
        return self.refusals.total()

    @property
    def quarantined_peers(self) -> dict[str, str]:
        """Why, for each peer that is not listened to now."""
        return {
            peer: printable(
                f"for {event.duration_s:g} s, after {event.num_refusals} refusals, the last of them {event.reason}"
            )
            for peer, (until_s, event) in self._quarantines.items()
            if self._time_s < until_s
        }

    @property
    def staleness_steps(self) -> dict[str, int]:
        """Per teacher in use: its newest announced step minus the step in use."""
        return self._teachers.staleness_steps()

    @property
    def resting_teachers(self) -> dict[str, str]:
        """Why, for each teacher that is kept from teaching now."""
        return {teacher: printable(why) for teacher, why in self._teachers.resting.items()}

    @property
    def num_bytes_sent(self) -> int:
        """Bytes sent over all lives of the node."""
        return self.synthetic.num_bytes_sent if self.synthetic else self._traffic.num_bytes_sent

    @property
    def num_bytes_received(self) -> int:
        """Bytes received over all lives of the node."""
        return self._traffic.num_bytes_received

    @property
    def frame_ratio(self) -> float | None:
        """How many times smaller than raw fp16 the checkpoints published so far were; None before the first.

        Keyframes that repeat one for whoever lacks the frames before it are left out.
        """
        return self._num_fp16_bytes / self._num_frame_bytes if self._num_frame_bytes else None

    @property
    def time_left_s(self) -> float | None:
        """Until the last step, at the recent speed; None unless training."""
        if self.state != "training" or self.num_steps is None or not self._smooth_steps_per_s:
            return None
        return max(0, self.num_steps - self.step) / self._smooth_steps_per_s


def printable(text: str) -> str:
    """`text` on one line, without control characters and not longer than a screen can bear."""
    clean = "".join(
        character if character.isprintable() else "\N{REPLACEMENT CHARACTER}" for character in text
    )
    if len(clean) <= MAX_SENTENCE_CHARACTERS:
        return clean
    return clean[: MAX_SENTENCE_CHARACTERS - 1] + "…"


def describe(progress: Progress) -> str:
    """One line about a site: everything that is known, nothing that is not."""
    parts: list[str] = [progress.state]
    if progress.num_steps is not None:
        parts.append(f"step {progress.step}/{progress.num_steps}")
    if progress.loss is not None:
        parts.append(f"loss {progress.loss:.3f}")
    if progress.val_loss is not None:
        parts.append(f"held-out {progress.val_loss:.3f}")
    if progress.neighbours and progress.state not in ENDED:
        resting = progress.resting_teachers
        parts += [
            f"{teacher} {steps} steps stale{' and not teaching' if teacher in resting else ''}"
            for teacher, steps in progress.staleness_steps.items()
        ]
        parts.append(f"{len(progress.connected_peers)}/{len(progress.neighbours)} peers")
    if progress.synthetic is not None:
        if progress.synthetic.mean_staleness_steps is not None:
            parts.append(f"teachers {synthetic_staleness(progress.synthetic)} steps stale")
        parts += describe_synthetic(progress.synthetic)
    if progress.num_bytes_sent or progress.num_bytes_received:
        parts.append(f"sent {byte_count(progress.num_bytes_sent)}")
        if progress.synthetic is None:
            parts.append(f"received {byte_count(progress.num_bytes_received)}")
    if progress.frame_ratio is not None:
        parts.append(f"{progress.frame_ratio:.1f} times smaller than fp16")
    if progress.state == "training" and progress.steps_per_s is not None:
        parts.append(f"{progress.steps_per_s:.1f} steps/s")
    if progress.time_left_s is not None:
        parts.append(f"{duration(progress.time_left_s)} left")
    if progress.links and progress.state not in ENDED:
        link = min(progress.links.values(), key=rate_mbit)
        thinnest = "link" if len(progress.links) == 1 else "thinnest link"
        parts.append(f"{thinnest} to {link.peer}: {link_sentence(link)}")
    return ", ".join(parts)


def describe_synthetic(measured: SyntheticMeasured) -> list[str]:
    """How far knowledge and checkpoints have come in a simulation without training."""
    parts = []
    if measured.num_sites_up < measured.num_sites:
        parts.append(f"{measured.num_sites_up} sites up")
    parts.append(f"{100 * measured.known_ratio:.0f} % of all pairs of sites know of each other")
    parts.append(f"{measured.num_deliveries:,} versions delivered")
    return parts


def synthetic_staleness(measured: SyntheticMeasured) -> str:
    """The mean over edges, and the most; a dash where there is none."""
    if measured.mean_staleness_steps is None:
        return ABSENT
    return f"{measured.mean_staleness_steps:.0f}, at most {measured.max_staleness_steps}"


def refusals_in_words(refusals: Counter[str]) -> str:
    """How many, and of which reasons where there are several."""
    if len(refusals) < 2:
        return str(refusals.total())
    return printable(f"{refusals.total()} ({reasons_in_words(refusals)})")


def duration(seconds: float) -> str:
    """`seconds` as m:ss or h:mm:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
