"""Codistillation as a training loop sees it: one loss term, and one call after each update.

    loss = criterion(logits, targets) + codistiller.loss(logits, inputs, targets)
    loss.backward(); optimizer.step()
    codistiller.step()

This is Algorithm 1 of Anil et al. 2018: after burn-in the student also agrees with the mean prediction of its neighbours'
last checkpoints. Nothing here waits for a neighbour: a snapshot is copied, a decoded checkpoint is swapped in, and every
rank of the group does both at the same step.

Who teaches in an update: the teachers whose turn it is in the schedule, as far as their checkpoints are here, are within the
limits on staleness and age (`freshness`) and are not gated off (`gate`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from p2pcodistill.checkpoint.manifest import Version
from p2pcodistill.checkpoint.snapshot import take_snapshot
from p2pcodistill.codistill.agreement import Ages, Agreement, Decision, Vote
from p2pcodistill.codistill.averaging import WeightAverage
from p2pcodistill.codistill.candidates import Candidate, Candidates
from p2pcodistill.codistill.exchange import Exchange, Inbox
from p2pcodistill.codistill.freshness import (
    AgeClock,
    Freshness,
    Limits,
    staleness_steps,
    weigh_by_age,
)
from p2pcodistill.codistill.gate import NUM_COLUMNS, Criterion, Gate, keep_sound
from p2pcodistill.codistill.losses import Weight, distillation_loss
from p2pcodistill.codistill.schedule import (
    agreement_is_due,
    averaging_is_due,
    distillation_weight,
    exchange_is_due,
    teachers_due,
)
from p2pcodistill.codistill.teachers import Forward, TeacherBank, forward_stateless, unwrap
from p2pcodistill.config import CodistillationConfig
from p2pcodistill.errors import ConfigError, RefusedError
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.training_events import (
    TeacherExpired,
    TeacherGated,
    TeacherReadmitted,
    TeacherRefused,
    TeacherSwapped,
)


class Codistiller:
    """One student's side of codistillation. Create it with `p2pcodistill.join(model)`.

    Every rank of a group has one, and calls `step` after every update and `load_state_dict` at the same points.
    `exchange` is None for a student on its own. `teachers` is a schedule over this student's exchange count: one table for
    each exchange interval, used in turn, that maps each neighbour that teaches this student then to its (positive) weight;
    a single table for a graph that stays, none without teachers. `num_students` neighbours learn from it, and with none it
    publishes nothing.
    `forward` runs the model for stateful teachers (see `teachers.Forward`). `criterion(logits, targets)` is the loss by
    which the gate compares teachers with the student: by default the cross-entropy of classes. `clock` is monotonic, in
    seconds: what teachers' ages are counted by. `process_group` is a gloo group of all ranks;
    by default one is made where torch.distributed is initialised with more than one rank. `snapshots_on_device` leaves what
    is published where the model is (see `config.FramesConfig.device`).

    Memory: one copy of the model a teacher, a smaller one in a lower `teacher_precision`; with `teacher_average_decay`, one
    for the average on rank 0. On the host, the exchange has the fp16 reference of each chain beside that.
    """

    def __init__(
        self,
        model: nn.Module,
        config: CodistillationConfig,
        *,
        exchange: Exchange | None,
        teachers: Sequence[Mapping[str, float]],
        num_students: int = 1,
        forward: Forward | None = None,
        criterion: Criterion | None = None,
        clock: Callable[[], float] = time.monotonic,
        process_group: dist.ProcessGroup | None = None,
        snapshots_on_device: bool = False,
    ) -> None:
        has_ranks = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
        if process_group is None and exchange is not None and has_ranks:
            process_group = dist.new_group(backend="gloo")
        self._model = unwrap(model)
        self._config = config
        self._snapshots_on_device = snapshots_on_device
        self._exchange = exchange
        self._schedule = [dict(table) for table in teachers] if exchange else []
        if not all(0 < weight < float("inf") for table in self._schedule for weight in table.values()):
            raise ValueError("the weights of teachers are positive numbers")
        names = list(dict.fromkeys(name for table in self._schedule for name in table))
        self._bank = TeacherBank(
            self._model, names, forward or forward_stateless, precision=config.teacher_precision
        )
        self._gate = Gate(names, config.gate_margin, self._bank.device, criterion=criterion, loss=config.loss)
        self._ages = AgeClock(clock)
        self._limits = Limits(config)
        self._is_lead = process_group is None or dist.get_rank(process_group) == 0
        self._publishes = exchange is not None and num_students > 0 and self._is_lead
        self._average: WeightAverage | None = None
        if self._publishes and config.teacher_average_decay > 0:
            self._average = WeightAverage(self._model, config.teacher_average_decay)
        self._agreement = Agreement(names, process_group, num_columns=NUM_COLUMNS)
        self._candidates = Candidates(self._bank.check)
        self._num_steps = 0
        self._published_step: int | None = None
        self._stop_requested = False
        self._last_distillation_loss: Tensor | None = None
        self._is_rehearsed = not names
        self.exchange_s = 0.0
        """Seconds that the training thread has spent in exchange: averaging, copying snapshots, agreeing, swapping."""

    @property
    def num_steps(self) -> int:
        """Completed updates."""
        return self._num_steps

    @property
    def stop_requested(self) -> bool:
        """Whether the ranks have agreed to stop after this step, because the node asked for it."""
        return self._stop_requested

    @property
    def teacher_versions(self) -> dict[str, Version]:
        """(incarnation, step) of each teacher whose checkpoint is here; the same on every rank."""
        return self._bank.versions

    @property
    def teacher_weights(self) -> dict[str, float]:
        """Who teaches in the next update, with which weights, which add up to 1; the same on every rank.

        Burn-in and ramp aside, and what the gate does to a single batch.
        """
        teaching = [name for name in self._eligible if name not in self._gate.gated]
        ages_s = {name: self._limits.age_s(name) for name in teaching}
        return weigh_by_age(self._due, ages_s, self._config.age_half_life_s)

    @property
    def _due(self) -> Mapping[str, float]:
        return teachers_due(self._config, self._schedule, self._num_steps)

    @property
    def _eligible(self) -> list[str]:
        """Those whose turn it is, whose checkpoint is here and within the limits: the gate aside."""
        expired, versions = self._limits.expired, self._bank.versions
        return [name for name in self._due if name in versions and name not in expired]

    @property
    def _running(self) -> set[str]:
        """Those who teach, and those who are probed."""
        probed = {name for name in self._gate.probed if name in self._eligible}
        return {*self.teacher_weights, *probed}

    @property
    def num_running_teachers(self) -> int:
        """Whose forward pass the next update computes; 0 in burn-in. The same on every rank."""
        is_on = distillation_weight(self._config, self._num_steps) > 0 and bool(self._schedule)
        return len(self._running) if is_on else 0

    @property
    def last_distillation_loss(self) -> Tensor | None:
        """The last batch's psi, unweighted and detached; None in burn-in and without teachers."""
        return self._last_distillation_loss

    def loss(self, logits: Tensor, inputs: Any, targets: Any = None) -> Tensor:
        """The term to add to the loss of this batch: weight * psi (Anil et al. 2018, Algorithm 1); a float32 scalar.

        `logits` are the student's, classes last; `inputs` are what `forward` takes. The teachers run here, under the
        autocast that is on. It is 0 in burn-in and while there is no teacher. All positions count alike: there is no mask
        for padding.

        With `targets`, which are what the criterion takes, the gate compares each teacher's loss on this batch with the
        student's; without, a teacher is only kept out when it is not finite.

        The first call also tries a teacher on the batch. Raises ConfigError when that fails: `forward` or the criterion does
        not fit then.
        """
        if not self._is_rehearsed:
            self._rehearse(logits, inputs, targets)
        psi = None
        weight = distillation_weight(self._config, self._num_steps)
        if weight > 0 and self._schedule:
            psi = self._distil(logits, inputs, targets)
        self._last_distillation_loss = None if psi is None else psi.detach()
        return logits.new_zeros((), dtype=torch.float32) if psi is None else weight * psi

    def step(self) -> None:
        """Call after every update, on every rank: publishes a snapshot, votes and swaps teachers when it is time."""
        self._num_steps += 1
        if self._exchange is None:
            return
        start_s = time.perf_counter()
        if self._average is not None and averaging_is_due(self._config, self._num_steps):
            self._average.update()
        self._conclude_round()
        if exchange_is_due(self._config, self._num_steps):
            self._publish()
        if agreement_is_due(self._config, self._num_steps):
            self._begin_round()
        self.exchange_s += time.perf_counter() - start_s

    def publish(self) -> None:
        """Publish the student as it is now (or its average), unless `step` has just done it: at the end of training."""
        if self._exchange is None:
            return
        start_s = time.perf_counter()
        self._publish()
        self.exchange_s += time.perf_counter() - start_s

    def report(self, event: Event) -> None:
        """Add an event to the site's log; does nothing on ranks other than 0 and without a node."""
        if self._exchange is not None:
            self._exchange.report(event)

    def state_dict(self) -> dict[str, Any]:
        """This rank's part of a training checkpoint: steps, versions and carried states of the teachers, their ages, who is
        gated, the average.

        Plain data and tensors, some of them the live ones. The teachers' weights are not in it: the node's store has them.
        """
        return {
            "num_steps": self._num_steps,
            "exchange_s": self.exchange_s,
            "teachers": self._bank.state_dict(),
            "ages": self._ages.state_dict(),
            "gate": self._gate.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, on every rank at once: waits until the checkpoints that the node holds are teachers."""
        self._num_steps = state["num_steps"]
        self.exchange_s = state["exchange_s"]
        self._bank.load_state_dict(state["teachers"])
        self._ages.load_state_dict(state.get("ages", {}))  # checkpoints had neither once
        self._gate.load_state_dict(state.get("gate", {}))
        if self._average is not None and state["average"] is not None:
            self._average.load_state_dict(state["average"])
        if self._exchange is None or not state["teachers"]:
            return
        self._conclude_round()
        self._begin_round()
        self._conclude_round()
        self._candidates.wait()
        self._begin_round()
        self._conclude_round()

    def close(self) -> None:
        """Hand over what was published and end the exchange. Safe to call twice."""
        if self._exchange is not None:
            self._exchange.close()

    def _rehearse(self, logits: Tensor, inputs: Any, targets: Any) -> None:
        """Find out at the first step, not when a neighbour's checkpoint arrives, whether teachers can be run and judged."""
        try:
            self._psi(logits.detach(), [self._bank.rehearse(inputs)], [1.0])
        except Exception as error:  # whatever it is, the cause tells it
            raise ConfigError(
                f"the model cannot be run as a teacher on this batch ({_in_one_line(error)}): tell "
                "p2pcodistill.join by its forward= how to get the student's logits from the inputs given to loss"
            ) from error
        try:
            self._gate.measure(logits, targets)
        except Exception as error:
            raise ConfigError(
                f"the gate cannot compute a loss from the logits and targets given to loss ({_in_one_line(error)}): "
                "give p2pcodistill.join the criterion= that training uses, or leave out the targets"
            ) from error
        self._is_rehearsed = True

    def _distil(self, logits: Tensor, inputs: Any, targets: Any) -> Tensor | None:
        """psi of this batch; None when nobody teaches. Also runs who is probed."""
        weights = self.teacher_weights
        watched = self._gate.watch(logits, self._bank.predict(inputs, self._running), targets)
        if not weights:
            return None
        teachers = [watched[name] for name in weights]
        sound_weights, is_any_sound = keep_sound(
            list(weights.values()), [teacher.is_sound for teacher in teachers]
        )
        return self._psi(logits, [teacher.logits for teacher in teachers], sound_weights) * is_any_sound

    def _psi(self, logits: Tensor, teacher_logits: list[Tensor], teacher_weights: Sequence[Weight]) -> Tensor:
        return distillation_loss(
            logits,
            teacher_logits,
            teacher_weights,
            loss=self._config.loss,
            aggregation=self._config.aggregation,
            temperature=self._config.temperature,
        )

    def _publish(self) -> None:
        if self._exchange is None or not self._publishes or self._published_step == self._num_steps:
            return
        if self._average is not None and self._average.has_begun:
            snapshot = self._average.take_snapshot(self._num_steps, on_device=self._snapshots_on_device)
        else:
            snapshot = take_snapshot(self._model, self._num_steps, on_device=self._snapshots_on_device)
        self._exchange.publish(snapshot)
        self._published_step = self._num_steps

    def _begin_round(self) -> None:
        assert self._exchange is not None
        inbox = self._exchange.inbox() if self._is_lead else Inbox()
        self._ages.hear(inbox.newest, inbox.known_ages_s)
        names = self._bank.teachers
        self._agreement.propose(
            inbox,
            {name: self._ages_of(name) for name in names},
            {name: self._candidates.vote(name) for name in names},
            self._gate.take_tally(),
        )

    def _ages_of(self, name: str) -> Ages:
        return Ages(
            self._ages.age_s(name, self._bank.versions.get(name)),
            self._ages.age_s(name, self._candidates.version(name)),
        )

    def _conclude_round(self) -> None:
        decision = self._agreement.conclude()
        if decision is None or self._exchange is None:
            return
        self._judge(decision)
        for candidate, vote in self._candidates.conclude(decision.votes):
            self._settle(candidate, vote)
        self._candidates.take_up(decision.inbox.offers, self._exchange)
        self._apply_limits(decision)
        self._stop_requested = self._stop_requested or decision.inbox.stop_requested

    def _judge(self, decision: Decision) -> None:
        """Gate and readmit teachers, by how their versions in use did until the round began."""
        for verdict in self._gate.judge(decision.tally):
            name, losses = verdict.teacher, (verdict.loss, verdict.student_loss)
            version = self._bank.versions.get(name, Version(0, 0))
            if verdict.is_gated:
                self.report(TeacherGated(self._num_steps, name, *version, *losses, verdict.why))
            else:
                self.report(TeacherReadmitted(self._num_steps, name, *version, *losses))

    def _apply_limits(self, decision: Decision) -> None:
        """Note how fresh the teachers are, and who is over a limit."""
        newest = decision.inbox.newest
        for name, version in self._bank.versions.items():
            ages, is_swapped = decision.ages[name], decision.votes[name] is Vote.READY
            age_s = ages.candidate_s if is_swapped else ages.in_use_s
            stale = staleness_steps(newest.get(name, version), version)
            self._ages.forget(name, version)
            is_revoked = name in decision.inbox.revoked
            why = self._limits.note(name, version, Freshness(stale, age_s), is_revoked=is_revoked)
            if why is not None:
                self.report(TeacherExpired(self._num_steps, name, *version, stale, age_s, why))

    def _settle(self, candidate: Candidate, vote: Vote) -> None:
        offer = candidate.offer
        event: Event
        if vote is Vote.READY:
            self._bank.load(offer.teacher, candidate.reference.result(), offer.version)
            self._gate.renew(offer.teacher)
            if offer.teacher in self._gate.gated:
                self._bank.forget_state(offer.teacher)
            event = TeacherSwapped(self._num_steps, offer.teacher, offer.incarnation, offer.step)
        elif vote is Vote.REFUSE:
            refusal = candidate.refusal or RefusedError("another rank refused it")
            reason = refusal.reason if isinstance(refusal, RefusedError) else "unreadable"
            event = TeacherRefused(
                self._num_steps, offer.teacher, offer.incarnation, offer.step, reason, str(refusal)
            )
        else:
            return
        self.report(event)


def _in_one_line(error: Exception) -> str:
    reason = str(error).partition("\n")[0]
    return f"{type(error).__name__}: {reason}"
