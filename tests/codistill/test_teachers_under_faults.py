"""Teachers that come and go, grow old or are ruined, as a training loop meets them.

Run as a script, this file is one rank of the test with two (see `rank_main`).
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patience import GENEROUS_S
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel

from p2pcodistill.checkpoint.manifest import Version
from p2pcodistill.checkpoint.reference import Reference
from p2pcodistill.codistill.codistiller import Codistiller
from p2pcodistill.codistill.exchange import ChainFile, Inbox, MemoryBoard, Offer
from p2pcodistill.codistill.gate import MIN_PREDICTIONS, PROBE_INTERVAL_ROUNDS
from p2pcodistill.codistill.losses import distillation_loss
from p2pcodistill.config import CodistillationConfig
from p2pcodistill.errors import ConfigError
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.training_events import (
    TeacherExpired,
    TeacherGated,
    TeacherReadmitted,
    TeacherSwapped,
)
from tests.codistill.test_codistiller import descend, linear, reference_of
from tests.codistill.test_freshness import Clock
from tests.codistill.test_losses import AGGREGATIONS, LOSSES

EACH_STEP = CodistillationConfig(burn_in_steps=0, exchange_interval_steps=4, agreement_interval_steps=1)
INPUTS = torch.randn(MIN_PREDICTIONS, 3, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(MIN_PREDICTIONS) % 4


class Teachers:
    """An exchange with the teachers that the test gives it, decoded at once."""

    def __init__(self, **models: nn.Module) -> None:
        self.events: list[Event] = []
        self.announced: dict[str, Version] = {}
        self.known_ages_s: dict[str, dict[Version, float]] = {}
        self._offers: dict[str, Offer] = {}
        self._references: dict[str, Reference] = {}
        for name, model in models.items():
            self.offer(name, model, 10)

    def offer(self, name: str, model: nn.Module, step: int, *, incarnation: int = 0) -> None:
        chain = (ChainFile(incarnation, step, ""),)
        self._offers[name] = Offer(name, incarnation, step, "", chain)
        self._references[name] = reference_of(model, step)

    def publish(self, snapshot: Any) -> None:
        pass

    def inbox(self) -> Inbox:
        return Inbox(dict(self._offers), announced=dict(self.announced), known_ages_s=self.known_ages_s)

    def prepare(self, offer: Offer) -> Future[Reference]:
        future: Future[Reference] = Future()
        future.set_result(self._references[offer.teacher])
        return future

    def report(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        pass

    def all(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def update(codistiller: Codistiller, model: nn.Module, *, targets: Tensor | None = TARGETS) -> Tensor:
    """One step of training, without a learning rate; the distillation term."""
    logits = model(INPUTS)
    term = codistiller.loss(logits, INPUTS, targets)
    (functional.cross_entropy(logits, TARGETS) + term).backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in model.parameters())
    model.zero_grad()
    codistiller.step()
    return term.detach()


def updates(codistiller: Codistiller, model: nn.Module, num: int, **options: Any) -> list[float]:
    return [update(codistiller, model, **options).item() for _ in range(num)]


def good() -> nn.Module:
    """A teacher that knows the targets no worse than a student just initialised."""
    return linear(1)


def ruined() -> nn.Module:
    """Valid, finite weights that are confident and wrong."""
    model = linear(2)
    with torch.no_grad():
        model.get_parameter("weight").mul_(300)
    return model


def overflowing() -> nn.Module:
    """Finite weights in a model whose predictions are not: see `overflow`."""
    model = linear(3)
    with torch.no_grad():
        model.get_parameter("bias").fill_(6e4)
    return model


def overflow(model: nn.Module, inputs: Any, state: Any) -> tuple[Tensor, Any]:
    """Predictions that leave fp32's range where the bias is very large, and are the model's own elsewhere."""
    logits = model(inputs)
    return logits * torch.where(model.get_parameter("bias").mean() > 5e4, 1e38, 1.0), None


def sure_to_be_worse() -> None:
    losses = [
        functional.cross_entropy(model(INPUTS), TARGETS).item() for model in (good(), linear(0), ruined())
    ]
    assert losses[0] < losses[1] + 1 and losses[2] > losses[1] + 20


# --- a schedule of teachers ----------------------------------------------------------------------------------------


def test_who_teaches_follows_the_students_own_exchange_count() -> None:
    model = linear(0)
    exchange = Teachers(a=linear(1), b=linear(2), c=linear(3))
    schedule = [{"a": 1.0}, {"b": 1.0, "c": 3.0}, {}]
    codistiller = Codistiller(model, EACH_STEP, exchange=exchange, teachers=schedule)
    updates(codistiller, model, 3)  # offered, decoded, agreed
    assert codistiller.teacher_versions.keys() == {"a", "b", "c"}, "all have a slot, whoever teaches now"
    weights = []
    for _ in range(3, 16):
        weights.append(codistiller.teacher_weights)
        update(codistiller, model)
    b_and_c = {"b": 0.25, "c": 0.75}
    assert weights == [{"a": 1.0}] + [b_and_c] * 4 + [{}] * 4 + [{"a": 1.0}] * 4


def test_only_the_teachers_whose_turn_it_is_run_and_count() -> None:
    num_runs = {"a": 0, "b": 0}

    def forward(model: nn.Module, inputs: Any, state: Any) -> tuple[Tensor, Any]:
        num_runs["a" if model.get_parameter("bias")[0] > 0 else "b"] += 1
        return model(inputs), None

    a, b = linear(1), linear(2)
    with torch.no_grad():
        a.get_parameter("bias").fill_(1.0)
        b.get_parameter("bias").fill_(-1.0)
    model, exchange = linear(0), Teachers(a=a, b=b)
    codistiller = Codistiller(
        model, EACH_STEP, exchange=exchange, teachers=[{"a": 1.0}, {"b": 1.0}], forward=forward
    )
    updates(codistiller, model, 4)
    num_runs.update(a=0, b=0)
    [term] = updates(codistiller, model, 1)
    expected = distillation_loss(model(INPUTS), [b(INPUTS)], [1.0])
    assert term == pytest.approx(expected.item(), rel=1e-2)
    updates(codistiller, model, 6)
    assert num_runs == {"a": 3, "b": 4}


def test_an_empty_schedule_is_no_teachers() -> None:
    model, exchange = linear(0), Teachers()
    for schedule in ([], [{}], [{}, {}]):
        codistiller = Codistiller(model, EACH_STEP, exchange=exchange, teachers=schedule)
        assert updates(codistiller, model, 3) == [0, 0, 0]


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf")])
def test_weights_are_positive_numbers(weight: float) -> None:
    with pytest.raises(ValueError, match="positive"):
        Codistiller(linear(0), EACH_STEP, exchange=Teachers(), teachers=[{"a": 1.0}, {"a": weight}])


# --- limits and weights by age -------------------------------------------------------------------------------------


def aging(exchange: Teachers, clock: Clock, **config: Any) -> tuple[Codistiller, nn.Module]:
    model = linear(0)
    codistiller = Codistiller(
        model,
        EACH_STEP.model_copy(update=config),
        exchange=exchange,
        teachers=[{"a": 1.0, "b": 1.0}],
        clock=clock,
    )
    updates(codistiller, model, 3)
    assert codistiller.teacher_weights == {"a": 0.5, "b": 0.5}
    return codistiller, model


def test_a_stale_teacher_rests_until_its_newer_version_is_here() -> None:
    exchange = Teachers(a=linear(1), b=linear(2))
    codistiller, model = aging(exchange, Clock(), max_staleness_steps=50)
    exchange.announced["a"] = Version(0, 60)
    updates(codistiller, model, 2)
    assert codistiller.teacher_weights == {"a": 0.5, "b": 0.5}, "50 steps are within the limit"
    exchange.announced["a"] = Version(0, 61)
    updates(codistiller, model, 2)
    assert codistiller.teacher_weights == {"b": 1.0}
    [expired] = exchange.all(TeacherExpired)
    assert (expired.teacher, expired.teacher_step, expired.staleness_steps) == ("a", 10, 51)
    updates(codistiller, model, 3)
    exchange.offer("a", linear(1), 61)
    updates(codistiller, model, 3)
    assert codistiller.teacher_weights == {"a": 0.5, "b": 0.5}
    assert len(exchange.all(TeacherExpired)) == 1, "told once"


def test_an_old_teacher_rests_though_nothing_newer_was_announced() -> None:
    exchange, clock = Teachers(a=linear(1), b=linear(2)), Clock()
    codistiller, model = aging(exchange, clock, max_age_s=100.0)
    clock.now_s += 60
    exchange.offer("b", linear(2), 20)
    updates(codistiller, model, 3)
    clock.now_s += 60
    updates(codistiller, model, 2)
    assert codistiller.teacher_weights == {"b": 1.0}
    [expired] = exchange.all(TeacherExpired)
    assert (expired.teacher, expired.age_s, expired.staleness_steps) == ("a", 120.0, 0)
    assert expired.why == "120 s old, and the limit is 100 s"


def test_a_slow_site_is_no_sinner() -> None:
    exchange, clock = Teachers(a=linear(1), b=linear(2)), Clock()
    codistiller, model = aging(exchange, clock, max_staleness_steps=1)
    updates(
        codistiller, model, 200
    )  # the teachers are at step 10, far behind, and have announced nothing newer
    assert codistiller.teacher_weights == {"a": 0.5, "b": 0.5}


def test_weights_follow_age() -> None:
    exchange, clock = Teachers(a=linear(1), b=linear(2)), Clock()
    codistiller, model = aging(exchange, clock, age_half_life_s=60.0)
    clock.now_s += 60
    exchange.offer("b", linear(2), 20)
    updates(codistiller, model, 3)
    # a is 60 s old, b new: 1/2 against 1.
    assert codistiller.teacher_weights == pytest.approx({"a": 1 / 3, "b": 2 / 3})
    exchange.announced["b"] = Version(0, 30)
    clock.now_s += 600
    updates(codistiller, model, 2)
    assert codistiller.teacher_weights == pytest.approx({"a": 1 / 3, "b": 2 / 3}), "they grow old together"


def test_an_age_starts_when_a_version_is_announced_not_when_it_arrives() -> None:
    exchange, clock = Teachers(a=linear(1), b=linear(2)), Clock()
    codistiller, model = aging(exchange, clock, age_half_life_s=60.0)
    exchange.announced["a"] = Version(0, 20)
    updates(codistiller, model, 1)
    clock.now_s += 120  # a slow link
    exchange.offer("a", linear(1), 20)
    exchange.offer("b", linear(2), 20)
    updates(codistiller, model, 3)
    assert codistiller.teacher_weights == pytest.approx({"a": 0.2, "b": 0.8})


def test_ages_and_limits_outlive_a_restart() -> None:
    exchange, clock = Teachers(a=linear(1), b=linear(2)), Clock()
    codistiller, model = aging(exchange, clock, max_age_s=100.0)
    clock.now_s += 99
    updates(codistiller, model, 2)
    saved = codistiller.state_dict()
    restarted_clock = Clock(5.0)
    resumed = Codistiller(
        model,
        EACH_STEP.model_copy(update={"max_age_s": 100.0}),
        exchange=exchange,
        teachers=[{"a": 1.0, "b": 1.0}],
        clock=restarted_clock,
    )
    resumed.load_state_dict(saved)
    assert resumed.teacher_weights == {"a": 0.5, "b": 0.5}, "not punished for the time it was down"
    restarted_clock.now_s += 2
    updates(resumed, model, 2)
    assert resumed.teacher_weights == {}, "nor any younger for it"


def test_a_crash_after_a_training_checkpoint_makes_nobody_young() -> None:
    exchange, clock = Teachers(a=linear(1), b=linear(2)), Clock()
    codistiller, model = aging(exchange, clock, max_age_s=100.0)
    saved = codistiller.state_dict()
    exchange.offer("a", linear(3), 20)
    updates(codistiller, model, 2)
    clock.now_s += 99
    # The ranks crash here. The node has heard of the newer version of a, which is on offer, when they did.
    exchange.known_ages_s = {"a": {Version(0, 20): 99.0}}
    resumed = Codistiller(
        model,
        EACH_STEP.model_copy(update={"max_age_s": 100.0}),
        exchange=exchange,
        teachers=[{"a": 1.0}],
        clock=(restarted_clock := Clock(5.0)),
    )
    resumed.load_state_dict(saved)
    assert resumed.teacher_versions == {"a": (0, 20)} and resumed.teacher_weights == {"a": 1.0}
    exchange.known_ages_s = {"a": {Version(0, 20): 101.0}}
    restarted_clock.now_s += 2
    updates(resumed, model, 2)
    assert resumed.teacher_weights == {}


# --- the gate ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("targets", [TARGETS, None])
def test_healthy_teachers_teach_as_without_a_gate(
    loss: Any, aggregation: Any, targets: Tensor | None
) -> None:
    teachers = [linear(1), linear(4), linear(5)]
    weights = {"a": 1.0, "b": 2.0, "c": 7.0}
    terms = []
    for margin in (1.0, 0.0):
        config = EACH_STEP.model_copy(
            update={"loss": loss, "aggregation": aggregation, "gate_margin": margin}
        )
        model, exchange = linear(0), Teachers(**dict(zip("abc", teachers, strict=True)))
        codistiller = Codistiller(model, config, exchange=exchange, teachers=[weights])
        for _ in range(20):
            logits = model(INPUTS)
            term = codistiller.loss(logits, INPUTS, targets)
            (functional.cross_entropy(logits, TARGETS) + term).backward()
            descend(model, 0.1)
            codistiller.step()
            terms.append(term.item())
        assert not exchange.all(TeacherGated)
    assert terms[:20] == terms[20:] and terms[19] != 0
    as_fp16 = [reference_of(teacher, 1).tensors for teacher in teachers]
    logits = [functional.linear(INPUTS, t["weight"].float(), t["bias"].float()) for t in as_fp16]
    plain = distillation_loss(model(INPUTS), logits, [0.1, 0.2, 0.7], loss=loss, aggregation=aggregation)
    assert codistiller.loss(model(INPUTS), INPUTS, targets).item() == plain.item(), "to the last bit"


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("targets", [TARGETS, None])
def test_predictions_that_are_not_finite_harm_no_step_and_are_gated(
    loss: Any, aggregation: Any, targets: Tensor | None
) -> None:
    config = EACH_STEP.model_copy(
        update={"loss": loss, "aggregation": aggregation, "agreement_interval_steps": 5}
    )
    terms = []
    for teachers in ({"a": good()}, {"a": good(), "b": overflowing()}):
        model, exchange = linear(0), Teachers(**teachers)
        codistiller = Codistiller(
            model, config, exchange=exchange, teachers=[dict.fromkeys(teachers, 1.0)], forward=overflow
        )
        terms.append(updates(codistiller, model, 20, targets=targets))
    assert terms[1] == pytest.approx(terms[0]) and terms[1][-1] != 0
    [gated] = exchange.all(TeacherGated)
    [swapped] = [event for event in exchange.all(TeacherSwapped) if event.teacher == "b"]
    assert (gated.teacher, gated.teacher_step, gated.why) == ("b", 10, "its predictions are not finite")
    assert swapped.step < gated.step <= swapped.step + 5
    assert codistiller.teacher_weights == {"a": 1.0}


def test_with_nobody_left_the_student_trains_on_its_labels_alone() -> None:
    model, exchange = linear(0), Teachers(b=overflowing())
    codistiller = Codistiller(model, EACH_STEP, exchange=exchange, teachers=[{"b": 1.0}], forward=overflow)
    assert updates(codistiller, model, 10) == [0.0] * 10


def test_ruined_weights_harm_no_step_and_are_gated_with_both_losses() -> None:
    sure_to_be_worse()
    model, exchange = linear(0), Teachers(a=good(), b=ruined())
    config = EACH_STEP.model_copy(update={"agreement_interval_steps": 5})
    codistiller = Codistiller(model, config, exchange=exchange, teachers=[{"a": 1.0, "b": 1.0}])
    alone = Codistiller(linear(0), config, exchange=Teachers(a=good()), teachers=[{"a": 1.0}])
    assert updates(codistiller, model, 20) == pytest.approx(updates(alone, linear(0), 20))
    [gated] = exchange.all(TeacherGated)
    student_loss = functional.cross_entropy(model(INPUTS), TARGETS).item()
    assert (
        gated.teacher == "b"
        and gated.loss > 20
        and gated.student_loss == pytest.approx(student_loss, rel=1e-3)
    )
    assert f"{gated.loss:.3f}" in gated.why


def test_without_targets_or_with_a_margin_of_zero_losses_do_not_count() -> None:
    for config, targets in ((EACH_STEP, None), (EACH_STEP.model_copy(update={"gate_margin": 0.0}), TARGETS)):
        model, exchange = linear(0), Teachers(b=ruined())
        codistiller = Codistiller(model, config, exchange=exchange, teachers=[{"b": 1.0}])
        assert updates(codistiller, model, 8, targets=targets)[-1] > 0
        assert not exchange.all(TeacherGated)


def test_a_good_version_after_a_ruined_one_teaches_after_its_probe() -> None:
    model, exchange = linear(0), Teachers(b=ruined())
    codistiller = Codistiller(model, EACH_STEP, exchange=exchange, teachers=[{"b": 1.0}])
    updates(codistiller, model, 6)
    assert codistiller.teacher_weights == {}
    exchange.offer("b", good(), 20)
    updates(codistiller, model, 4)
    assert codistiller.teacher_versions == {"b": (0, 20)}
    updates(codistiller, model, 2)
    [readmitted] = exchange.all(TeacherReadmitted)
    assert (readmitted.teacher, readmitted.teacher_step) == ("b", 20) and readmitted.loss < 2
    assert codistiller.teacher_weights == {"b": 1.0} and update(codistiller, model) > 0


def test_a_teacher_recovers_when_the_student_falls_back_to_it() -> None:
    model, exchange = linear(0), Teachers(b=good())
    with torch.no_grad():  # a student that knows all
        model.get_parameter("weight").zero_()
    margin = EACH_STEP.model_copy(update={"gate_margin": 0.01})
    worse = linear(9)
    exchange.offer("b", worse, 20)
    codistiller = Codistiller(model, margin, exchange=exchange, teachers=[{"b": 1.0}])
    updates(codistiller, model, 5)
    [gated] = exchange.all(TeacherGated)
    assert gated.loss > gated.student_loss + 0.01
    model.load_state_dict(worse.state_dict())  # as bad as the teacher
    updates(codistiller, model, PROBE_INTERVAL_ROUNDS + 3)
    [readmitted] = exchange.all(TeacherReadmitted)
    assert readmitted.loss == pytest.approx(readmitted.student_loss, abs=0.01)


def test_a_gated_teacher_is_run_for_probes_only_and_from_no_state() -> None:
    states: list[Any] = []

    def forward(model: nn.Module, inputs: Any, state: int | None) -> tuple[Tensor, int]:
        states.append(state)
        return model(inputs), (state or 0) + 1

    model, exchange = linear(0), Teachers(b=ruined())
    codistiller = Codistiller(model, EACH_STEP, exchange=exchange, teachers=[{"b": 1.0}], forward=forward)
    while not exchange.all(TeacherGated):
        update(codistiller, model)
    states.clear()
    num_cycles = 5
    updates(codistiller, model, num_cycles * (PROBE_INTERVAL_ROUNDS + 2))
    assert num_cycles <= len(states) <= 2 * num_cycles + 1
    assert states[0] is None and set(states) <= {None, 1}


def test_a_gated_teacher_stays_gated_when_training_resumes() -> None:
    model, exchange = linear(0), Teachers(a=good(), b=ruined())
    schedule = [{"a": 1.0, "b": 1.0}]
    codistiller = Codistiller(model, EACH_STEP, exchange=exchange, teachers=schedule)
    updates(codistiller, model, 6)
    saved = codistiller.state_dict()
    restarted = Teachers(a=good(), b=ruined())
    resumed = Codistiller(model, EACH_STEP, exchange=restarted, teachers=schedule)
    resumed.load_state_dict(saved)
    assert resumed.teacher_versions.keys() == {"a", "b"} and resumed.teacher_weights == {"a": 1.0}
    updates(resumed, model, 30)
    assert resumed.teacher_weights == {"a": 1.0} and not restarted.all(TeacherReadmitted)


def test_a_gated_teacher_that_the_store_has_lost_is_not_run() -> None:
    model = linear(0)
    resumed = Codistiller(model, EACH_STEP, exchange=Teachers(), teachers=[{"b": 1.0}])
    state = resumed.state_dict()
    state["teachers"] = {"b": {"version": [0, 10], "state": None}}
    state["gate"] = {"b": {"for_loss": True, "rest_rounds": 0}}
    resumed.load_state_dict(state)
    assert updates(resumed, model, 3) == [0, 0, 0]


def test_a_checkpoint_from_before_there_was_a_gate_loads() -> None:
    model, exchange = linear(0), Teachers(a=good())
    codistiller = Codistiller(model, EACH_STEP, exchange=exchange, teachers=[{"a": 1.0}])
    updates(codistiller, model, 4)
    old = {key: value for key, value in codistiller.state_dict().items() if key not in ("ages", "gate")}
    resumed = Codistiller(model, EACH_STEP, exchange=exchange, teachers=[{"a": 1.0}])
    resumed.load_state_dict(old)
    assert resumed.teacher_weights == {"a": 1.0}


def test_targets_that_need_a_criterion_are_told_at_the_first_step() -> None:
    model = linear(0)
    config = EACH_STEP.model_copy(update={"burn_in_steps": 100})
    soft_targets = torch.full((MIN_PREDICTIONS, 4), 0.25)
    codistiller = Codistiller(model, config, exchange=Teachers(), teachers=[{"a": 1.0}])
    with pytest.raises(ConfigError, match="criterion=") as raised:
        codistiller.loss(model(INPUTS), INPUTS, soft_targets)
    assert "\n" not in str(raised.value) and raised.value.__cause__ is not None
    codistiller = Codistiller(
        model, config, exchange=Teachers(), teachers=[{"a": 1.0}], criterion=functional.cross_entropy
    )
    assert codistiller.loss(model(INPUTS), INPUTS, soft_targets).item() == 0


def test_two_students_keep_training_when_one_of_them_is_ruined() -> None:
    board = MemoryBoard()
    models = {"berlin": linear(0), "tokyo": linear(1)}
    events: list[Event] = []
    students = {
        name: Codistiller(
            model,
            EACH_STEP,
            exchange=board.exchange(name, models.keys() - {name}, on_event=events.append),
            teachers=[{other: 1.0 for other in models if other != name}],
        )
        for name, model in models.items()
    }
    losses = []
    for step in range(80):
        if step == 30:
            with torch.no_grad():
                models["tokyo"].get_parameter("weight").mul_(-1000)
        for name, model in models.items():
            logits = model(INPUTS)
            loss = functional.cross_entropy(logits, TARGETS)
            (loss + students[name].loss(logits, INPUTS, TARGETS)).backward()
            descend(model, 0.1 if name == "berlin" or step < 30 else 0.0)  # ruined for good
            students[name].step()
            if name == "berlin":
                losses.append(loss.item())
    assert [event.teacher for event in events if isinstance(event, TeacherGated)] == ["tokyo"]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses)), "no step was harmed"


# --- two ranks -----------------------------------------------------------------------------------------------------


def rank_main(rank: int, folder: Path) -> None:
    """A teacher that is bad on rank 1's batches only: the mean over both decides, at the same step."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    student = DistributedDataParallel(linear(0))
    expert = linear(0)  # as good as the student, but sure that the first input means the last class
    with torch.no_grad():
        expert.get_parameter("weight")[3, 0] += 60.0
    exchange = Teachers(a=good(), b=expert)
    clock = Clock(1000.0 * rank)
    config = EACH_STEP.model_copy(update={"max_age_s": 50.0, "agreement_interval_steps": 3})
    codistiller = Codistiller(
        student, config, exchange=exchange, teachers=[{"a": 1.0, "b": 1.0}], clock=clock
    )
    inputs = INPUTS.clone()
    inputs[:, 0] = float(rank)
    weights = []
    for step in range(40):
        logits = student(inputs)
        (functional.cross_entropy(logits, TARGETS) + codistiller.loss(logits, inputs, TARGETS)).backward()
        descend(student, 0.0)
        clock.now_s += 2.0 if rank == 0 else 0.1  # the clocks do not agree; rank 0's counts
        if step == 20:
            exchange.offer("b", linear(0), 20)
        codistiller.step()
        weights.append(codistiller.teacher_weights)
    result = {"weights": weights, "events": [type(event).__name__ for event in exchange.events]}
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
    # While all of it is there: DDP, the last to hold the group, would join threads that may wait for the interpreter.
    os._exit(0)


def test_two_ranks_with_different_batches_and_clocks_decide_alike(tmp_path: Path) -> None:
    path = os.pathsep.join(str(Path(__file__).parents[index]) for index in (1, 2))
    environment = os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=GENEROUS_S) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    results = [json.loads((tmp_path / f"rank-{rank}.json").read_text()) for rank in range(2)]
    assert results[0] == results[1]
    seen = [weights for weights, _ in itertools.groupby(results[0]["weights"])]
    both, a_alone, b_alone = {"a": 0.5, "b": 0.5}, {"a": 1.0}, {"b": 1.0}
    assert seen == [{}, both, a_alone, both, b_alone], "b gated, b readmitted, a too old"


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
