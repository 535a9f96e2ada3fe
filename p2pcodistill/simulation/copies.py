"""All copies of a model in one process, as in a paper's experiment, with the delays that real links would cause.

    class Student:
        def __init__(self, name, join):
            self.model = make_model()
            self.codistiller = join(self.model)

        def update(self):
            loss = criterion(logits, targets) + self.codistiller.loss(logits, inputs)
            ...
            self.codistiller.step()
            return self.codistiller.num_steps < 1000

    copies = Copies(build_topology("ring", ["a", "b", "c", "d"]), Student, step_time_s=0.2)
    copies.run()

Each copy trains on its own data, one update after the other in the order of virtual time. Between them is what is between
real sites: the production protocol, and the very frames that it would carry, over links of a certain bandwidth and delay. So
a teacher is as stale as links and step time make it. Updates take the time that they are given, all else in training takes
none.

The same arguments lead to the same events, bit for bit, on one machine with one set of versions and threads of torch.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from p2pcodistill.codistill.codistiller import Codistiller
from p2pcodistill.codistill.gate import Criterion
from p2pcodistill.codistill.teachers import Forward
from p2pcodistill.config import CodistillationConfig, FramesConfig
from p2pcodistill.group.randomness import random_states, restore_random_states
from p2pcodistill.group.train import Join
from p2pcodistill.simulation.fault_config import FaultConfig
from p2pcodistill.simulation.faults import absentees, impostor_of
from p2pcodistill.simulation.virtual.clock import VirtualClock
from p2pcodistill.simulation.virtual.exchange import VirtualExchange
from p2pcodistill.simulation.virtual.run import Shapes, VirtualRun, VirtualSettings
from p2pcodistill.simulation.virtual.site import VirtualSite
from p2pcodistill.simulation.virtual.surroundings import OnEvent
from p2pcodistill.topology.graph import Topology

_CPU = torch.device("cpu")


class Student(Protocol):
    """One copy: a model with its data and optimiser, made anew for each launch of its site."""

    def update(self) -> bool:
        """Make one update, which ends with a call of `Codistiller.step`; False when it was the last one."""


MakeStudent = Callable[[str, Join], Student]
"""(site, join) -> the student of that site. `join(model)` makes its codistiller, and is to be called once.

A student that is to survive faults saves what it needs by itself, and goes on from it when it is made again. The site may be
an `impostor_of` one, whose disk is another."""


class Copies:
    """The students of all members of `topology`, in virtual time. For one use: make it, `run` it, look at its students.

    A step takes `step_time_s`, for all or by site, or what that, called with the site, draws for its next step, and by
    `teacher_time_ratio` of that longer for each teacher that runs in it. `shapes` has the links that are not perfect (see
    `simulation.links`), `faults` what is to go wrong. `on_event` gets all that the sites report, as (virtual seconds, site,
    event). `forget` removes what the student of a site saved, when a new
    machine takes its place. Each student has random states of torch and Python of its own, which `settings.seed` and its
    site's name decide.
    """

    def __init__(
        self,
        topology: Topology,
        make_student: MakeStudent,
        *,
        codistillation: CodistillationConfig | None = None,
        frames: FramesConfig | None = None,
        step_time_s: float | Mapping[str, float] | Callable[[str], float] = 0.1,
        teacher_time_ratio: float = 0.0,
        name: str = "run",
        settings: VirtualSettings | None = None,
        shapes: Shapes | None = None,
        faults: Sequence[FaultConfig] = (),
        on_event: OnEvent = lambda _time_s, _site, _event: None,
        on_fault: Callable[[float, FaultConfig], None] = lambda _time_s, _fault: None,
        forget: Callable[[str], None] = lambda _site: None,
    ) -> None:
        self.network = VirtualRun(
            topology,
            name=name,
            settings=settings,
            shapes=shapes,
            faults=faults,
            on_event=on_event,
            on_fault=on_fault,
        )
        absent = absentees(faults)
        self._expected = [member for member in topology.members if member not in absent]

        def ranks_of(site: VirtualSite, student: str) -> _TrainingRanks:
            site.ranks = _TrainingRanks(
                site,
                student,
                topology,
                make_student,
                forget,
                codistillation or CodistillationConfig(),
                frames or FramesConfig(),
                _step_times(step_time_s, site.name),
                teacher_time_ratio,
                self.network.clock,
                seed=_seed_of(self.network.settings.seed, student),
            )
            return site.ranks

        self._ranks = {member: ranks_of(site, member) for member, site in self.network.sites.items()}
        for member, site in self.network.impostors.items():
            ranks_of(site, impostor_of(member))

    @property
    def now_s(self) -> float:
        """Virtual seconds since the start."""
        return self.network.clock.now_s

    @property
    def students(self) -> dict[str, Student]:
        """By site, those of the last launch; none for a site that never was launched."""
        return {member: ranks.student for member, ranks in self._ranks.items() if ranks.student is not None}

    def run(self, until_s: float = float("inf")) -> None:
        """Train until every student that is to finish has, or until `until_s`. Raises RuntimeError for a fault that never
        happened, and whatever a student raises."""
        own = random_states(_CPU)
        try:
            self.network.run(until_s, is_over=self._is_over)
        finally:
            restore_random_states(own, _CPU)

    def _is_over(self) -> bool:
        return all(self._ranks[member].has_finished for member in self._expected)


def _step_times(
    step_time_s: float | Mapping[str, float] | Callable[[str], float], site: str
) -> Callable[[], float]:
    if isinstance(step_time_s, int | float):
        return lambda: step_time_s
    if isinstance(step_time_s, Mapping):
        return lambda: step_time_s[site]
    return lambda: step_time_s(site)


def _seed_of(seed: int, site: str) -> int:
    return int.from_bytes(hashlib.sha256(f"p2pcodistill-copies/{seed}/{site}".encode()).digest()[:4], "big")


class _TrainingRanks:
    """The `Ranks` of a site whose student really trains."""

    def __init__(
        self,
        site: VirtualSite,
        student: str,
        topology: Topology,
        make_student: MakeStudent,
        forget: Callable[[str], None],
        codistillation: CodistillationConfig,
        frames: FramesConfig,
        step_time_s: Callable[[], float],
        teacher_time_ratio: float,
        clock: VirtualClock,
        *,
        seed: int,
    ) -> None:
        self._site, self._name, self._topology = site, student, topology
        self._make_student, self._forget = make_student, forget
        self._codistillation, self._frames = codistillation, frames
        self._step_time_s, self._teacher_time_ratio = step_time_s, teacher_time_ratio
        self._clock, self._seed = clock, seed
        self._factor = 1.0
        self._launch = 0
        self._exchange: VirtualExchange | None = None
        self._codistiller: Codistiller | None = None
        self._random_states: dict[str, Any] = {}
        self._ruin: torch.Generator | None = None
        self._on_stopped: Callable[[], None] | None = None
        self.student: Student | None = None
        self.has_finished = False

    @property
    def num_steps(self) -> int:
        """See `virtual.ranks.Ranks`."""
        return self._codistiller.num_steps if self._codistiller is not None else 0

    def launch(self) -> None:
        """See `virtual.ranks.Ranks`."""
        self._launch += 1
        self._on_stopped = None
        self.has_finished = False
        self._exchange = VirtualExchange(self._site, self._frames)
        self._exchange.ruin = self._ruin
        torch.manual_seed(self._seed)
        random.seed(self._seed)
        self.student = self._make_student(self._name, self._join)
        self._random_states = random_states(_CPU)
        self._wait()

    def kill(self) -> None:
        """See `virtual.ranks.Ranks`."""
        self._launch += 1

    def leave(self, done: Callable[[], None]) -> None:
        """See `virtual.ranks.Ranks`. The student sees `Codistiller.stop_requested` soon."""
        if self._exchange is None or self.has_finished:
            done()
        else:
            self._exchange.request_stop()
            self._on_stopped = done

    def take_offer(self, origin: str) -> None:
        """See `virtual.ranks.Ranks`."""
        if self._exchange is not None:
            self._exchange.take_offer(origin)

    def make_keyframe(self) -> None:
        """See `virtual.ranks.Ranks`."""
        if self._exchange is not None:
            self._exchange.make_keyframe()

    def forget(self) -> None:
        """See `virtual.ranks.Ranks`."""
        self._forget(self._name)

    def slow_down(self, factor: float) -> None:
        """See `virtual.ranks.Ranks`. The step that is being made takes the time that it was given."""
        self._factor = factor

    def corrupt(self) -> None:
        """See `virtual.ranks.Ranks`."""
        self._ruin = torch.Generator().manual_seed(self._seed)
        if self._exchange is not None:
            self._exchange.ruin = self._ruin

    def _join(
        self, model: nn.Module, *, forward: Forward | None = None, criterion: Criterion | None = None
    ) -> Codistiller:
        name = self._site.name
        self._codistiller = Codistiller(
            model,
            self._codistillation,
            exchange=self._exchange,
            teachers=self._topology.schedule_of(name),
            num_students=len(self._topology.students_of(name)),
            forward=forward,
            criterion=criterion,
            clock=lambda: self._clock.now_s,
        )
        return self._codistiller

    def _wait(self) -> None:
        num_teachers = self._codistiller.num_running_teachers if self._codistiller is not None else 0
        duration_s = self._step_time_s() * (1 + self._teacher_time_ratio * num_teachers)
        self._clock.call_later(duration_s * self._factor, self._update, self._launch)

    def _update(self, launch: int) -> None:
        if launch != self._launch or self.student is None:
            return
        restore_random_states(self._random_states, _CPU)
        goes_on = self.student.update()
        self._random_states = random_states(_CPU)
        if goes_on:
            self._wait()
            return
        if self._exchange is not None:
            self._exchange.close()
        on_stopped, self._on_stopped = self._on_stopped, None
        if on_stopped is not None:
            on_stopped()
            return
        self.has_finished = True
        self._site.finish()
