"""What the sites are doing right now, in lines: for pipes and log files."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self, TextIO

from p2pcodistill.report.progress import Progress, describe, printable, refusals_in_words
from p2pcodistill.report.run_progress import RunProgress
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.node_events import (
    MemberTrustChanged,
    PeerQuarantined,
    PeerRecovered,
    PeerSuspected,
    RelayStarted,
    RelayStopped,
)
from p2pcodistill.telemetry.records import Record
from p2pcodistill.telemetry.simulation_events import FaultInjected, SyntheticMeasured
from p2pcodistill.telemetry.training_events import (
    Evaluated,
    StepMeasured,
    TeacherExpired,
    TeacherGated,
    TeacherReadmitted,
)


class PlainView:
    """A line when a site's state changes, and after an evaluation if its last line is `interval_s` ago or more.

    A site that evaluates more rarely is heard of after `4 * interval_s`. What changes between sites is told at once:
    teachers that do not teach for now, peers that do not answer or are not listened to, relaying, faults. So are
    refusals, but no more often than every `interval_s` a site: the line says how many there were. Of jobs there is a line
    for each that has finished, and one after `jobs_interval_s` without such.
    """

    def __init__(
        self,
        title: str,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
        *,
        interval_s: float = 10.0,
        jobs_interval_s: float = 60.0,
    ) -> None:
        self._title = title
        self._stream = stream
        self._clock = clock
        self._interval_s = interval_s
        self._jobs_interval_s = jobs_interval_s
        self._sites: dict[tuple[str, str], _PlainSite] = {}
        self._jobs: RunProgress | None = None
        self._jobs_line_s = 0.0
        self._told_jobs: set[int] = set()

    def __enter__(self) -> Self:
        self._print(self._title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for (group, site), shown in self._sites.items():
            self._print_refusals(group, site, shown)

    def update(self, group: str, site: str, record: Record) -> None:
        """See `View.update`."""
        shown = self._sites.setdefault((group, site), _PlainSite())
        state_before = shown.progress.state
        event = shown.progress.update(record)
        now_s = self._clock()
        if event is not None and (news := _news(event, shown.progress)) is not None:
            self._print(f"{group} {site}: {printable(news)}")
        silent_s = now_s - shown.line_s
        if (
            shown.progress.state != state_before
            or (isinstance(event, Evaluated | SyntheticMeasured) and silent_s >= self._interval_s)
            or (isinstance(event, StepMeasured) and silent_s >= 4 * self._interval_s)
        ):
            shown.line_s = now_s
            self._print(f"{group} {site}: {describe(shown.progress)}")
        if now_s - shown.refusal_s >= self._interval_s:
            shown.refusal_s = now_s if self._print_refusals(group, site, shown) else shown.refusal_s
        if self._jobs is not None and now_s - self._jobs_line_s >= self._jobs_interval_s:
            running = ", ".join(self._jobs.running())
            self._print_jobs(f"{self._jobs.describe()}; running: {running}")

    def show_jobs(self, jobs: RunProgress) -> None:
        """See `View.show_jobs`."""
        finished = {index: job for index, job in enumerate(jobs.jobs) if job.state == "finished"}
        if self._jobs is not jobs:
            self._jobs, self._told_jobs = jobs, set(finished)
            self._print_jobs(jobs.describe())
        for index in finished.keys() - self._told_jobs:
            self._told_jobs.add(index)
            self._print_jobs(f"{finished[index].title} is done; {jobs.describe()}")

    def _print_jobs(self, line: str) -> None:
        self._jobs_line_s = self._clock()
        self._print(printable(line))

    def _print_refusals(self, group: str, site: str, shown: _PlainSite) -> bool:
        count = shown.progress.num_refusals
        if count == shown.num_told_refusals:
            return False
        shown.num_told_refusals = count
        told = refusals_in_words(shown.progress.refusals)
        self._print(f"{group} {site}: {told} refused so far; the last: {shown.progress.last_refusal}")
        return True

    def _print(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


@dataclass(slots=True)
class _PlainSite:
    progress: Progress = field(default_factory=Progress)
    line_s: float = float("-inf")
    refusal_s: float = float("-inf")
    num_told_refusals: int = 0


def _news(event: Event, progress: Progress) -> str | None:
    """What is told at once; None for what can wait."""
    match event:
        case FaultInjected():
            return f"fault: {progress.last_fault}"
        case TeacherGated(teacher=teacher) | TeacherExpired(teacher=teacher):
            return f"does not learn from {teacher} for now: {progress.resting_teachers[teacher]}"
        case TeacherReadmitted():
            return f"learns from {event.teacher} again"
        case PeerSuspected():
            return f"{event.peer} has not answered for {event.silent_s:.0f} s: others are asked before it"
        case PeerRecovered():
            return f"{event.peer} answers again, after {event.silent_s:.0f} s"
        case PeerQuarantined():
            return f"does not listen to {event.peer} {progress.quarantined_peers[event.peer]}"
        case MemberTrustChanged():
            return f"{'trusts' if event.is_trusted else 'no longer trusts'} {event.member}: {event.why}"
        case RelayStarted():
            return f"relays checkpoints of {event.origin} to {event.student}"
        case RelayStopped():
            return f"no longer relays checkpoints of {event.origin}"
    return None
