"""The codistiller: one loss term and one call a step, and every rank does the same at the same step.

Run as a script, this file is one rank of the test with two (see `rank_main`).
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patience import GENEROUS_S
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from p2pcodistill.checkpoint.decoder import decode_frame
from p2pcodistill.checkpoint.encoder import FrameEncoder
from p2pcodistill.checkpoint.reference import Reference
from p2pcodistill.checkpoint.snapshot import Snapshot, take_snapshot
from p2pcodistill.codistill.codistiller import Codistiller
from p2pcodistill.codistill.exchange import ChainFile, Inbox, MemoryBoard, Offer
from p2pcodistill.config import CodistillationConfig, FramesConfig
from p2pcodistill.errors import ConfigError, NonFiniteError
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.training_events import SnapshotSkipped, TeacherRefused, TeacherSwapped

EACH_STEP = CodistillationConfig(
    burn_in_steps=0, exchange_interval_steps=1, agreement_interval_steps=1, loss="kl"
)


def linear(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Linear(3, 4)


@torch.no_grad()
def descend(model: nn.Module, rate: float) -> None:
    """A step of gradient descent (torch.optim takes seconds to import)."""
    for parameter in model.parameters():
        assert parameter.grad is not None
        parameter -= rate * parameter.grad
        parameter.grad = None


def reference_of(model: nn.Module, step: int) -> Reference:
    """`model` as its students get it."""
    frame = io.BytesIO()
    FrameEncoder(FramesConfig()).encode(take_snapshot(model, step), frame)
    return decode_frame(frame.getvalue(), None, max_bytes=1 << 20)


@dataclass
class ScriptedExchange:
    """An exchange whose every answer the test decides."""

    offers: dict[str, Offer] = field(default_factory=dict)
    stop_requested: bool = False
    published: list[Snapshot] = field(default_factory=list)
    prepared: list[tuple[Offer, Future[Reference]]] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    num_closed: int = 0
    ready: Reference | None = None

    def publish(self, snapshot: Snapshot) -> None:
        self.published.append(snapshot)

    def inbox(self) -> Inbox:
        return Inbox(dict(self.offers), self.stop_requested)

    def prepare(self, offer: Offer) -> Future[Reference]:
        future: Future[Reference] = Future()
        if self.ready is not None:
            future.set_result(self.ready)
        self.prepared.append((offer, future))
        return future

    def report(self, event: Event) -> None:
        self.events.append(event)

    def close(self) -> None:
        self.num_closed += 1

    def offer(self, step: int, *, incarnation: int = 0) -> Offer:
        self.offers["tokyo"] = Offer(
            "tokyo", incarnation, step, "/frames", (ChainFile(incarnation, step, f"{step}"),)
        )
        return self.offers["tokyo"]


@pytest.fixture
def exchange() -> ScriptedExchange:
    return ScriptedExchange()


def joined(
    model: nn.Module, exchange: ScriptedExchange | None, config: CodistillationConfig = EACH_STEP
) -> Codistiller:
    return Codistiller(model, config, exchange=exchange, teachers=[{"tokyo": 1.0}])


# --- the loss ------------------------------------------------------------------------------------------------


def test_a_student_on_its_own_trains_as_without_codistillation() -> None:
    model = linear(0)
    codistiller = joined(model, None)
    for _ in range(3):
        logits = model(torch.ones(2, 3))
        loss = codistiller.loss(logits, torch.ones(2, 3))
        assert loss.item() == 0 and codistiller.last_distillation_loss is None
        (logits.sum() + loss).backward()
        codistiller.step()
    codistiller.publish()
    codistiller.report(SnapshotSkipped(1, ""))
    codistiller.close()
    assert codistiller.num_steps == 3
    assert codistiller.exchange_s == 0
    assert not codistiller.stop_requested


def test_distillation_begins_after_burn_in_and_with_a_teacher(exchange: ScriptedExchange) -> None:
    model, peer = linear(0), linear(1)
    config = CodistillationConfig(burn_in_steps=4, agreement_interval_steps=1, loss="kl", weight=0.5)
    codistiller = joined(model, exchange, config)
    exchange.ready = reference_of(peer, 7)
    exchange.offer(7)
    inputs = torch.randn(5, 3)
    losses = []
    for _ in range(6):
        losses.append(codistiller.loss(model(inputs), inputs))
        codistiller.step()
    assert [loss.item() > 0 for loss in losses] == [False] * 4 + [True] * 2
    assert codistiller.last_distillation_loss is not None
    assert losses[-1].item() == pytest.approx(0.5 * codistiller.last_distillation_loss.item())
    log_q, log_p = model(inputs).log_softmax(-1), peer(inputs).log_softmax(-1)
    expected = (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    assert codistiller.last_distillation_loss.item() == pytest.approx(expected.item(), rel=1e-2)


IN_BURN_IN = CodistillationConfig(burn_in_steps=100)


def returns_a_tuple(model: nn.Module, inputs: Any, state: Any) -> tuple[Any, Any]:
    return (model(inputs), None), None


@pytest.mark.parametrize(
    ("forward", "inputs", "sentence"),
    [
        (None, torch.ones(2, 7), "RuntimeError: mat1 and mat2"),
        (lambda model, inputs, state: model(inputs), torch.ones(3, 3), "too many values to unpack"),
        (returns_a_tuple, torch.ones(2, 3), "'tuple' object has no attribute"),
        (
            lambda model, inputs, state: (model(inputs)[:1], None),
            torch.ones(2, 3),
            r"\(1, 4\), the student's \(2, 4\)",
        ),
    ],
)
def test_a_forward_that_does_not_fit_is_told_at_the_first_step(
    exchange: ScriptedExchange, forward: Any, inputs: Tensor, sentence: str
) -> None:
    codistiller = Codistiller(
        linear(0), IN_BURN_IN, exchange=exchange, teachers=[{"tokyo": 1.0}], forward=forward
    )
    with pytest.raises(ConfigError, match=sentence) as raised:
        codistiller.loss(torch.zeros(2, 4), inputs)
    assert "forward=" in str(raised.value) and "\n" not in str(raised.value)
    assert raised.value.__cause__ is not None


def test_logits_without_classes_are_told_at_the_first_step(exchange: ScriptedExchange) -> None:
    codistiller = joined(nn.Linear(3, 1), exchange, IN_BURN_IN)
    with pytest.raises(ConfigError, match="two or more classes"):
        codistiller.loss(torch.zeros(2, 1), torch.ones(2, 3))


def test_each_teacher_that_runs_does_so_once_a_batch() -> None:
    ran: list[nn.Module] = []

    def forward(module: nn.Module, inputs: Any, state: Any) -> tuple[Tensor, Any]:
        ran.append(module)
        return module(inputs), None

    board = MemoryBoard()
    for name in ("tokyo", "lagos"):
        board.exchange(name, ()).publish(take_snapshot(linear(0), 1))
    model = linear(0)
    codistiller = Codistiller(
        model,
        EACH_STEP,
        exchange=board.exchange("berlin", ("tokyo", "lagos")),
        teachers=[{"tokyo": 2.0, "lagos": 1.0}, {"tokyo": 1.0}],
        num_students=0,
        forward=forward,
    )
    inputs, targets = torch.randn(5, 3), torch.zeros(5, dtype=torch.int64)
    codistiller.loss(model(inputs), inputs, targets)  # tries one of them out
    codistiller.step()
    nums_run = []
    for _ in range(8):
        ran.clear()
        num_running = codistiller.num_running_teachers
        codistiller.loss(model(inputs), inputs, targets)
        codistiller.step()
        assert len(ran) == len(set(ran)) == num_running
        nums_run.append(num_running)
    assert {1, 2} <= set(nums_run), "by the tables of the schedule, in turn"


def test_the_trial_happens_once_and_leaves_no_trace(exchange: ScriptedExchange) -> None:
    states: list[Any] = []

    def forward(model: nn.Module, inputs: Any, state: Any) -> tuple[Tensor, Any]:
        states.append(state)
        assert not model.training and not torch.is_grad_enabled()
        return model(inputs), len(states)

    model = nn.Sequential(nn.Linear(3, 4), nn.Dropout(0.5))
    config = CodistillationConfig(burn_in_steps=3, agreement_interval_steps=1)
    codistiller = Codistiller(model, config, exchange=exchange, teachers=[{"tokyo": 1.0}], forward=forward)
    exchange.ready = reference_of(model, 10)
    exchange.offer(10)
    inputs = torch.ones(2, 3)
    random_state = torch.get_rng_state()
    codistiller.loss(torch.zeros(2, 4), inputs)
    assert torch.equal(torch.get_rng_state(), random_state)
    for _ in range(5):
        codistiller.step()
        codistiller.loss(torch.zeros(2, 4), inputs)
    assert states == [None, None, 2, 3], "the trial, then the teacher from its first state on"


def test_two_students_of_one_process_come_to_agree() -> None:
    torch.manual_seed(0)
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

    inputs = torch.randn(64, 3)

    def divergence() -> float:
        p, q = (model(inputs).softmax(-1) for model in models.values())
        return (p - q).abs().mean().item()

    before = divergence()
    for _ in range(60):
        for name, model in models.items():
            loss = students[name].loss(model(inputs), inputs)
            if loss.requires_grad:
                loss.backward()
                descend(model, 0.5)
            students[name].step()
    assert divergence() < 0.2 * before
    assert sum(isinstance(event, TeacherSwapped) for event in events) > 100


def test_weights_that_are_not_finite_are_not_published() -> None:
    events: list[Event] = []
    model = linear(0)
    board = MemoryBoard()
    codistiller = Codistiller(
        model, EACH_STEP, exchange=board.exchange("berlin", (), on_event=events.append), teachers=[]
    )
    with torch.no_grad():
        model.get_parameter("weight")[0, 0] = float("nan")
    codistiller.step()
    assert board.newest("berlin") is None
    assert [type(event) for event in events] == [SnapshotSkipped]


# --- publishing ----------------------------------------------------------------------------------------------


def test_snapshots_are_published_at_their_interval_and_once_at_the_end(exchange: ScriptedExchange) -> None:
    model = linear(0)
    codistiller = joined(model, exchange, CodistillationConfig(burn_in_steps=0, exchange_interval_steps=3))
    for _ in range(7):
        codistiller.step()
    codistiller.publish()
    codistiller.publish()
    assert [snapshot.step for snapshot in exchange.published] == [3, 6, 7]
    assert torch.equal(exchange.published[-1].tensors["weight"], model.get_parameter("weight"))
    assert codistiller.exchange_s > 0


def test_what_is_published_at_the_last_step_is_not_published_twice(exchange: ScriptedExchange) -> None:
    config = CodistillationConfig(burn_in_steps=3, exchange_interval_steps=3)
    codistiller = joined(linear(0), exchange, config)
    for _ in range(6):
        codistiller.step()
    codistiller.publish()
    assert [snapshot.step for snapshot in exchange.published] == [3, 6]


def test_in_burn_in_only_the_end_of_training_is_published(exchange: ScriptedExchange) -> None:
    config = CodistillationConfig(burn_in_steps=10, exchange_interval_steps=1)
    codistiller = joined(linear(0), exchange, config)
    for _ in range(9):
        codistiller.step()
    assert exchange.published == []
    codistiller.publish()
    assert [snapshot.step for snapshot in exchange.published] == [9]


def test_a_student_from_whom_nobody_learns_publishes_nothing(exchange: ScriptedExchange) -> None:
    codistiller = Codistiller(
        linear(0), EACH_STEP, exchange=exchange, teachers=[{"tokyo": 1.0}], num_students=0
    )
    codistiller.step()
    codistiller.publish()
    assert exchange.published == []


# --- averaging -----------------------------------------------------------------------------------------------

AVERAGED = CodistillationConfig(burn_in_steps=4, exchange_interval_steps=2, teacher_average_decay=0.5)


def step_with_weights(codistiller: Codistiller, model: nn.Module, values: list[float]) -> None:
    for value in values:
        with torch.no_grad():
            model.get_parameter("weight").fill_(value)
        codistiller.step()


def test_the_average_of_the_student_is_published(exchange: ScriptedExchange) -> None:
    model = linear(0)
    codistiller = joined(model, exchange, AVERAGED)
    step_with_weights(codistiller, model, [100.0, 100.0, 1.0, 3.0, 4.0])
    codistiller.publish()
    weights = [snapshot.tensors["weight"].unique().tolist() for snapshot in exchange.published]
    assert [snapshot.step for snapshot in exchange.published] == [4, 5]
    assert weights == [[2.0], [3.0]], "of the last interval of burn-in, and of what came after it"
    assert (model.get_parameter("weight") == 4).all()


def test_before_the_average_has_begun_the_student_itself_is_published(exchange: ScriptedExchange) -> None:
    model = linear(0)
    codistiller = joined(model, exchange, AVERAGED)
    step_with_weights(codistiller, model, [1.0, 2.0])
    codistiller.publish()
    assert exchange.published[0].tensors["weight"].unique().tolist() == [2.0]


def test_a_resumed_student_goes_on_with_its_average(exchange: ScriptedExchange) -> None:
    model = linear(0)
    codistiller = joined(model, exchange, AVERAGED)
    step_with_weights(codistiller, model, [0.0, 0.0, 1.0])
    restarted = ScriptedExchange()
    resumed = joined(model, restarted, AVERAGED)
    resumed.load_state_dict(codistiller.state_dict())
    step_with_weights(resumed, model, [3.0])
    assert restarted.published[0].tensors["weight"].unique().tolist() == [2.0]


def test_nothing_is_averaged_for_nobody(exchange: ScriptedExchange) -> None:
    for codistiller in (
        joined(linear(0), None, AVERAGED),
        Codistiller(linear(0), AVERAGED, exchange=exchange, teachers=[{"tokyo": 1.0}], num_students=0),
        joined(linear(0), exchange),
    ):
        for _ in range(6):
            codistiller.step()
        assert codistiller.state_dict()["average"] is None


# --- swapping ------------------------------------------------------------------------------------------------


def test_a_teacher_is_swapped_in_once_it_is_decoded(exchange: ScriptedExchange) -> None:
    codistiller = joined(linear(0), exchange)
    offer = exchange.offer(10)
    for _ in range(5):
        codistiller.step()
    [(prepared, future)] = exchange.prepared
    assert prepared == offer
    assert codistiller.teacher_versions == {} and exchange.events == []
    future.set_result(reference_of(linear(1), 10))
    codistiller.step()  # proposes
    codistiller.step()  # concludes
    assert codistiller.teacher_versions == {"tokyo": (0, 10)}
    assert exchange.events == [TeacherSwapped(7, "tokyo", 0, 10)]
    for _ in range(3):
        codistiller.step()
    assert len(exchange.prepared) == 1, "the same offer is not taken up again"


def test_a_teacher_can_be_kept_in_fewer_bytes(exchange: ScriptedExchange) -> None:
    model, peer, inputs = linear(0), linear(1), torch.randn(5, 3)
    exchange.ready = reference_of(peer, 10)
    exchange.offer(10)
    losses = []
    for precision in ("float32", "float16", "int8"):
        config = EACH_STEP.model_copy(update={"teacher_precision": precision})
        codistiller = joined(model, exchange, config)
        for _ in range(3):
            codistiller.step()
        losses.append(codistiller.loss(model(inputs), inputs).item())
    assert losses[1] == losses[0], "what travels as fp16 is exact in fp16"
    assert losses[2] == pytest.approx(losses[0], rel=0.05) and losses[2] != losses[0]


def test_only_newer_offers_are_taken_up_and_a_new_incarnation_is_newer(exchange: ScriptedExchange) -> None:
    codistiller = joined(linear(0), exchange)
    exchange.ready = reference_of(linear(1), 10)
    versions = []
    for incarnation, step in [(0, 10), (0, 9), (0, 11), (1, 2)]:
        exchange.offer(step, incarnation=incarnation)
        for _ in range(3):
            codistiller.step()
        versions.append(codistiller.teacher_versions["tokyo"])
    assert versions == [(0, 10), (0, 10), (0, 11), (1, 2)]
    assert len(exchange.prepared) == 3


def test_a_refused_checkpoint_is_reported_once_and_the_old_teacher_stays(exchange: ScriptedExchange) -> None:
    codistiller = joined(linear(0), exchange)
    exchange.ready = reference_of(linear(1), 1)
    exchange.offer(1)
    for _ in range(4):
        codistiller.step()
    exchange.ready = None
    faults: list[tuple[Exception | Reference, str]] = [
        (NonFiniteError("the tensor 'weight' holds NaN"), "non-finite"),
        (reference_of(nn.Linear(3, 5), 3), "wrong-schema"),
        (PermissionError("no"), "unreadable"),
        (ZeroDivisionError("a defect of the decoder"), "unreadable"),
    ]
    exchange.events.clear()
    for step, (fault, _) in enumerate(faults, start=2):
        exchange.offer(step)
        codistiller.step()
        codistiller.step()
        future = exchange.prepared[-1][1]
        if isinstance(fault, Exception):
            future.set_exception(fault)
        else:
            future.set_result(fault)
        for _ in range(4):
            codistiller.step()
    refusals = [event for event in exchange.events if isinstance(event, TeacherRefused)]
    assert [(event.teacher_step, event.reason) for event in refusals] == [
        (step, reason) for step, (_, reason) in enumerate(faults, start=2)
    ]
    assert len(exchange.events) == len(faults) == len(exchange.prepared) - 1
    assert codistiller.teacher_versions == {"tokyo": (0, 1)}
    exchange.ready = reference_of(linear(1), 9)
    exchange.offer(9)
    for _ in range(3):
        codistiller.step()
    assert codistiller.teacher_versions == {"tokyo": (0, 9)}, "the next good one is taken"


def test_a_file_that_a_newer_one_replaced_is_no_refusal(exchange: ScriptedExchange) -> None:
    codistiller = joined(linear(0), exchange)
    exchange.offer(1)
    codistiller.step()
    codistiller.step()
    exchange.prepared[0][1].set_exception(FileNotFoundError("gone"))
    exchange.ready = reference_of(linear(1), 2)
    exchange.offer(2)
    for _ in range(4):
        codistiller.step()
    assert codistiller.teacher_versions == {"tokyo": (0, 2)}
    assert [type(event) for event in exchange.events] == [TeacherSwapped]


def test_offers_of_strangers_are_passed_over(exchange: ScriptedExchange) -> None:
    codistiller = joined(linear(0), exchange)
    exchange.offers["mallory"] = Offer("mallory", 0, 1, "/frames", ())
    for _ in range(3):
        codistiller.step()
    assert exchange.prepared == []


def test_a_stop_is_agreed_at_a_step_boundary(exchange: ScriptedExchange) -> None:
    codistiller = joined(linear(0), exchange, CodistillationConfig(agreement_interval_steps=3))
    exchange.stop_requested = True
    seen = []
    for _ in range(5):
        codistiller.step()
        seen.append(codistiller.stop_requested)
    assert seen == [False, False, False, True, True]


# --- resume --------------------------------------------------------------------------------------------------


def stateful(model: nn.Module, inputs: Any, state: Tensor | None) -> tuple[Tensor, Tensor]:
    total = inputs if state is None else state + inputs
    return model(total), total


def test_a_resumed_student_has_its_teachers_before_its_first_step(exchange: ScriptedExchange) -> None:
    model, inputs = linear(0), torch.randn(5, 3)

    def student(exchange: ScriptedExchange) -> Codistiller:
        return Codistiller(model, EACH_STEP, exchange=exchange, teachers=[{"tokyo": 1.0}], forward=stateful)

    codistiller = student(exchange)
    exchange.ready = reference_of(linear(1), 10)
    exchange.offer(10)
    for _ in range(4):
        codistiller.loss(model(inputs), inputs)
        codistiller.step()
    saved = codistiller.state_dict()
    expected = codistiller.loss(model(inputs), inputs)

    resumed = student(ScriptedExchange(offers=exchange.offers, ready=exchange.ready))
    resumed.load_state_dict(saved)
    assert resumed.num_steps == 4
    assert resumed.exchange_s >= codistiller.exchange_s
    assert resumed.teacher_versions == {"tokyo": (0, 10)}
    assert torch.equal(resumed.loss(model(inputs), inputs), expected)


def test_a_student_resumes_without_the_teachers_that_the_store_has_lost(exchange: ScriptedExchange) -> None:
    codistiller = joined(linear(0), exchange)
    codistiller.load_state_dict(
        {"num_steps": 5, "exchange_s": 1.5, "teachers": {"tokyo": {"version": [0, 10], "state": None}}}
    )
    assert codistiller.teacher_versions == {}
    assert codistiller.loss(torch.zeros(2, 4), torch.zeros(2, 3)).item() == 0


def test_closing_closes_the_exchange(exchange: ScriptedExchange) -> None:
    codistiller = joined(linear(0), exchange)
    codistiller.close()
    assert exchange.num_closed == 1


# --- two ranks -----------------------------------------------------------------------------------------------

NUM_STEPS = 24


class SlowRankExchange(ScriptedExchange):
    """Every rank decodes at a pace of its own: its k-th candidate is there after a number of steps that depends on both."""

    def __init__(self, rank: int, references: list[Reference]) -> None:
        super().__init__()
        self.rank, self.references, self.num_steps = rank, references, 0
        self.pending: list[tuple[int, Offer, Future[Reference]]] = []

    def prepare(self, offer: Offer) -> Future[Reference]:
        future = super().prepare(offer)
        delay = (1 + 2 * self.rank) if len(self.prepared) % 2 else (4 - 2 * self.rank)
        self.pending.append((self.num_steps + delay, offer, future))
        return future

    def advance(self) -> None:
        self.num_steps += 1
        self.offer(min(self.num_steps // 3, len(self.references) - 1))
        self.stop_requested = self.rank == 0 and self.num_steps >= NUM_STEPS - 3
        for due, offer, future in self.pending:
            if due == self.num_steps:
                if offer.step == 3 and self.rank == 1:  # refused on one rank: refused on all
                    future.set_exception(NonFiniteError("injected"))
                else:
                    future.set_result(self.references[offer.step])


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    references = [reference_of(linear(100 + step), step) for step in range(8)]
    exchange = SlowRankExchange(rank, references)
    student = DistributedDataParallel(linear(0))
    codistiller = Codistiller(student, EACH_STEP, exchange=exchange, teachers=[{"tokyo": 1.0}])
    torch.manual_seed(rank)
    versions = []
    while not codistiller.stop_requested:
        inputs = torch.randn(4, 3)
        logits = student(inputs)
        loss = logits.square().mean() + codistiller.loss(logits, inputs)
        loss.backward()
        descend(student, 0.1)
        exchange.advance()
        codistiller.step()
        versions.append(codistiller.teacher_versions.get("tokyo"))
    restarted = SlowRankExchange(rank, references)
    if rank == 0:
        restarted.offer(7)
    restarted.ready = references[7]
    resumed = Codistiller(student, EACH_STEP, exchange=restarted, teachers=[{"tokyo": 1.0}])
    resumed.load_state_dict(codistiller.state_dict())
    result = {
        "versions": versions,
        "weights": student.module.weight.tolist(),
        "refused": [(e.teacher_step, e.reason) for e in exchange.events if isinstance(e, TeacherRefused)],
        "resumed": resumed.teacher_versions["tokyo"],
        "num_published": len(exchange.published),
    }
    (folder / f"rank-{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()
    # While all of it is there: DDP, the last to hold the group, would join threads that may wait for the interpreter.
    os._exit(0)


def test_two_ranks_swap_at_the_same_steps_and_stay_equal(tmp_path: Path) -> None:
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
    assert results[0]["versions"] == results[1]["versions"]
    assert results[0]["weights"] == results[1]["weights"]
    assert results[0]["resumed"] == results[1]["resumed"] == [0, 7]
    swapped = {step for _, step in filter(None, results[0]["versions"])}
    assert len(swapped) >= 3
    assert results[0]["refused"] == [[3, "refused"]] and 3 not in swapped, "one rank's refusal binds both"
    assert [result["num_published"] for result in results] == [len(results[0]["versions"]), 0]


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
