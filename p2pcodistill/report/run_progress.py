"""How far the jobs of a simulation are, and how long the rest will take: by the pace of those that ran before.

Nothing here starts anything. Who runs the jobs tells when one begins, what step its sites are at, and when it ends; another
thread may read at the same time.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

_MIN_MEASURED_S = 3.0
_MIN_MEASURED_SHARE = 0.01
"""What a running job's pace is measured over at least."""
_SETTLING_S = 1.0
"""What is heard of a job so soon after its begin is from before, where it goes on with what it had."""
_MIN_SHARE = 0.1
"""The least share of a job that says something of the whole."""


@dataclass(slots=True)
class JobProgress:
    """One job. `cost` is its expected duration in any unit that all jobs have in common."""

    group: str
    """Under which its sites are shown."""
    kinds: tuple[str, ...]
    """Whose pace this one's is taken from before it has one, the most alike first."""
    cost: float
    num_cores: int
    num_sites: int
    title: str
    """Names it among all of its stage."""
    state: Literal["waiting", "running", "finished"] = "waiting"
    duration_s: float | None = None
    """Of one that has finished: what all of it takes."""
    num_steps: int | None = None
    step: int = 0
    """The mean over its sites."""
    _begun_s: float = 0.0
    _steps: dict[str, int] = field(default_factory=dict)
    _share_before: float = 0.0
    _first: tuple[float, float] | None = None
    _last: tuple[float, float] = (0.0, 0.0)
    """(seconds, share done) when the pace began to be measured, and last."""

    @property
    def share(self) -> float:
        """What is done of it, between 0 and 1."""
        return min(1.0, self.step / self.num_steps) if self.num_steps else 0.0

    def begin(self, now_s: float) -> None:
        """It runs from now on."""
        self.state, self._begun_s = "running", now_s

    def advance(self, site: str, step: int, num_steps: int | None, now_s: float) -> None:
        """One of its sites is at `step`."""
        self.num_steps = num_steps or self.num_steps
        self._steps[site] = step
        self.step = sum(self._steps.values()) // self.num_sites
        self._last = now_s, self.share
        if now_s - self._begun_s < _SETTLING_S:
            self._first, self._share_before = self._last, self.share
        elif self._first is None or self.share < self._first[1]:  # a site that begins another life goes back
            self._first = self._last

    def end(self, duration_s: float) -> None:
        """It has finished, and its processes ran for so long since it began to run."""
        self.state, self.duration_s = "finished", duration_s / max(_MIN_SHARE, 1 - self._share_before)

    def pace_s(self) -> float | None:
        """Seconds that a unit of its cost took; None before there is enough to go by."""
        if self.duration_s is not None:
            return self.duration_s / self.cost
        if self.state != "running" or self._first is None:
            return None
        seconds, share = (last - first for first, last in zip(self._first, self._last, strict=True))
        if seconds < _MIN_MEASURED_S or share < _MIN_MEASURED_SHARE:
            return None
        return seconds / (share * self.cost)

    def time_left_s(self, pace_s: float, now_s: float) -> float:
        """What it still takes at such a pace, if it goes on now."""
        measured_s = self._last[0] if self._steps else self._begun_s
        since_s = now_s - measured_s if self.state == "running" else 0.0
        return max(0.0, (1 - self.share) * self.cost * pace_s - since_s)


class RunProgress:
    """The jobs of one simulation: in `stages`, of which each begins when the one before has ended, in order of their start.

    A stage has a name where there are several.
    """

    def __init__(
        self,
        stages: Sequence[tuple[str, Sequence[JobProgress]]],
        num_cores: int,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stages, self._num_cores, self._clock = stages, num_cores, clock
        self.jobs = [job for _, jobs in stages for job in jobs]

    def begin(self, job: JobProgress) -> None:
        """`job` runs."""
        job.begin(self._clock())

    def advance(self, job: JobProgress, site: str, step: int, num_steps: int | None = None) -> None:
        """A site of `job` is at `step` of so many, where that is known anew."""
        job.advance(site, step, num_steps, self._clock())

    def end(self, job: JobProgress, duration_s: float) -> None:
        """`job` has finished, now or before, and ran for so long."""
        job.end(duration_s)

    @property
    def num_finished(self) -> int:
        """Of all stages."""
        return sum(job.state == "finished" for job in self.jobs)

    def time_left_s(self) -> float | None:
        """Until the last job ends; None before there is anything to go by."""
        pace_of = _Paces(self.jobs)
        now_s, left_s = self._clock(), 0.0
        for _, jobs in self._stages:
            running: list[tuple[float, int]] = []
            waiting: list[tuple[float, int]] = []
            for job in jobs:
                if job.state == "finished":
                    continue
                pace_s = pace_of(job)
                if pace_s is None:
                    return None
                item = job.time_left_s(pace_s, now_s), min(job.num_cores, self._num_cores)
                (running if job.state == "running" else waiting).append(item)
            left_s += _makespan_s(running, waiting, self._num_cores)
        return left_s

    def describe(self) -> str:
        """How many jobs are in which state, and about how much time is left."""
        parts: list[str] = []
        for name, jobs in self._stages:
            states = Counter(job.state for job in jobs)
            if name and states["finished"] == len(jobs):
                continue  # nothing more to say of it
            if parts:
                parts.append(f"then {_count(len(jobs), 'job')}")
                continue
            one = "trial" if name else "job"
            told = f"{states['finished']} of {_count(len(jobs), one)} done"
            told += "".join(f", {states[state]} {state}" for state in ("running", "waiting") if states[state])
            parts.append(f"{name}: {told}" if name else told)
        left_s = self.time_left_s()
        if left_s is not None and self.num_finished < len(self.jobs):
            parts.append(f"about {about(left_s)} left")
        return "; ".join(parts)

    def running(self) -> list[str]:
        """The jobs that run, and their steps."""
        return [
            job.title + (f" (step {job.step} of {job.num_steps})" if job.num_steps else "")
            for job in self.jobs
            if job.state == "running"
        ]

    def waiting(self) -> list[str]:
        """The groups with jobs that wait, and how many where it is not one."""
        groups = Counter(job.group for job in self.jobs if job.state == "waiting")
        return [f"{group} ({count} jobs)" if count > 1 else group for group, count in groups.items()]


class _Paces:
    """The pace of each job: its own, that of the most alike, or that of any."""

    def __init__(self, jobs: Iterable[JobProgress]) -> None:
        self._of_kind: dict[str | None, list[float]] = {}
        for job in jobs:
            if (pace_s := job.pace_s()) is not None:
                for kind in (*job.kinds, None):
                    self._of_kind.setdefault(kind, []).append(pace_s)

    def __call__(self, job: JobProgress) -> float | None:
        if (own_s := job.pace_s()) is not None:
            return own_s
        for kind in (*job.kinds, None):
            if paces_s := self._of_kind.get(kind):
                return sum(paces_s) / len(paces_s)
        return None


def _makespan_s(
    running: Sequence[tuple[float, int]], waiting: Sequence[tuple[float, int]], num_cores: int
) -> float:
    """When the last of these (seconds, cores) ends if each starts, in this order, as soon as its cores are free."""
    ends = list(running)
    heapq.heapify(ends)
    now_s, last_s = 0.0, max((end_s for end_s, _ in running), default=0.0)
    num_free = num_cores - sum(cores for _, cores in running)
    while waiting:
        held: list[tuple[float, int]] = []
        for index, (duration_s, cores) in enumerate(waiting):
            if num_free <= 0:
                held += waiting[index:]
                break
            if cores > num_free:
                held.append((duration_s, cores))
                continue
            num_free -= cores
            last_s = max(last_s, now_s + duration_s)
            heapq.heappush(ends, (now_s + duration_s, cores))
        waiting = held
        now_s, cores = heapq.heappop(ends)
        num_free += cores
    return last_s


def _count(number: int, what: str) -> str:
    return f"{number} {what}" if number == 1 else f"{number} {what}s"


def about(seconds: float) -> str:
    """`seconds` as precisely as an estimate is worth."""
    if seconds < 90:
        return f"{max(10, 10 * round(seconds / 10))} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    return f"{minutes // 60} h {10 * (minutes % 60 // 10):02} min"
