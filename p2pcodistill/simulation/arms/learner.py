"""One model that is trained in virtual time, by the reference loop: the part of which arms are made.

The loop is cut where an arm does something of its own: between the gradient and the update, and between the update and what
is due after it. Several learners live in one process; each has random states, a time and a count of its traffic of its own.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from p2pcodistill.codistill.codistiller import Codistiller
from p2pcodistill.codistill.exchange import MemoryBoard
from p2pcodistill.codistill.gate import Criterion
from p2pcodistill.codistill.teachers import Forward
from p2pcodistill.config import GroupSpec
from p2pcodistill.group.randomness import random_states, restore_random_states
from p2pcodistill.group.train import Training, choose_device
from p2pcodistill.simulation.virtual.step_time import StepTimes
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.node_events import TrafficMeasured
from p2pcodistill.telemetry.training_events import Evaluated, StepMeasured, TrainingEnded

Tell = Callable[[float, Event], None]
"""(virtual seconds, event)."""


class Learner:
    """The training of `spec` under the name of a site or worker; `tell` gets its events.

    A step's gradient is the mean over `num_workers` batches: the arm brings those of the others. Of several that read the
    data of one site, it has the `share` (k, n). `teachers`, with their weights, are found on `board`. It begins at `now_s`.
    """

    def __init__(
        self,
        name: str,
        spec: GroupSpec,
        tell: Tell,
        step_times: StepTimes,
        *,
        num_workers: int = 1,
        share: tuple[int, int] = (0, 1),
        teachers: Mapping[str, float] | None = None,
        board: MemoryBoard | None = None,
        now_s: float = 0.0,
    ) -> None:
        self.name = name
        self.now_s = now_s
        self.metrics: dict[str, float] = {}
        """What the arm adds to each evaluation."""
        self.traffic_of: Sequence[Learner] = (self,)
        """Whose traffic its log tells, as a sum."""
        self._tell, self._step_times, self._spec = tell, step_times, spec
        self._teachers, self._board = dict(teachers or {}), board or MemoryBoard()
        self._sent: dict[str, int] = {}
        self._received: dict[str, int] = {}
        self._told: TrafficMeasured | None = None
        self._codistiller: Codistiller
        self._device = choose_device(spec.group, num_local_ranks=1, local_rank=0)
        self.training = Training(
            spec,
            self._device,
            None,
            join=self._join,
            clock=lambda: self.now_s,
            num_workers=num_workers,
            share=share,
        )
        self._random_states = random_states(self._device)

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        return self.training.model

    @property
    def num_steps(self) -> int:
        """Completed updates."""
        return self.training.num_steps

    def compute_gradient(self) -> Tensor:
        """The next batch's loss, a scalar, and its gradient, left in the model; takes the time of a step."""
        restore_random_states(self._random_states, self._device)
        num_teachers = self._codistiller.num_running_teachers
        loss = self.training.compute_gradient()
        self._random_states = random_states(self._device)
        self.now_s += self._step_times(self.name, num_teachers=num_teachers)
        return loss

    def step(self) -> None:
        """A whole step by itself, and what is due after it."""
        self.compute_gradient()
        self.training.update()
        self.training.conclude_step()

    def report(self, event: Event) -> None:
        """Tell an event now, and before an evaluation or the end what has been sent by then."""
        if isinstance(event, Evaluated | TrainingEnded):
            traffic = self._traffic()
            if traffic is not None and traffic != self._told:
                self._told = traffic
                self._tell(self.now_s, traffic)
        if isinstance(event, Evaluated):
            event = dataclasses.replace(event, metrics=event.metrics | self.metrics)
        elif isinstance(event, StepMeasured | TrainingEnded):
            event = dataclasses.replace(event, exchange_s=0.0)  # measured in real time
        self._tell(self.now_s, event)

    def send(self, num_bytes: int, to: Learner) -> None:
        """Count what is sent. It takes no time."""
        self._sent[to.name] = self._sent.get(to.name, 0) + num_bytes
        to._received[self.name] = to._received.get(self.name, 0) + num_bytes

    def _traffic(self) -> TrafficMeasured | None:
        """None while there is none."""
        sent, received = Counter[str](), Counter[str]()
        for learner in self.traffic_of:
            sent.update(learner._sent)
            received.update(learner._received)
        if not sent and not received:
            return None
        return TrafficMeasured(sent.total(), received.total(), dict(sent), dict(received))

    def _join(
        self, model: nn.Module, *, forward: Forward | None = None, criterion: Criterion | None = None
    ) -> Codistiller:
        self._codistiller = Codistiller(
            model,
            self._spec.codistillation,
            exchange=self._board.exchange(self.name, self._teachers, on_event=self.report),
            teachers=(self._teachers,),
            num_students=0,
            forward=forward,
            criterion=criterion,
            clock=lambda: self.now_s,
        )
        return self._codistiller


def wait_for_each_other(learners: Sequence[Learner]) -> None:
    """The first to arrive waits for the last."""
    latest_s = max(learner.now_s for learner in learners)
    for learner in learners:
        learner.now_s = latest_s
