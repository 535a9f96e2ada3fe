"""Trains what the quality of frames is measured on: a run's students in one process, with the demo's settings.

Two models: the demo's language model, its data split as in the demo, and a small convolutional network with batch norm on
images of letters (`letters.py`). A run is a function of its description: the same on the same machine and versions.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from benchmarks.letters import LettersTask
from p2pcodistill.checkpoint.reference import Reference
from p2pcodistill.checkpoint.snapshot import Snapshot, take_snapshot
from p2pcodistill.codistill.codistiller import Codistiller
from p2pcodistill.codistill.exchange import Exchange, MemoryBoard, Offer
from p2pcodistill.codistill.teachers import map_tensors
from p2pcodistill.config import CodistillationConfig, FramesConfig, GroupSpec, TrainingConfig
from p2pcodistill.group.optimizer import learning_rate
from p2pcodistill.group.task import Task
from p2pcodistill.group.train import choose_precision
from p2pcodistill.simulation.data import split_scenario_text
from p2pcodistill.simulation.scenario import ScenarioConfig, load_scenario
from p2pcodistill.task_configs import LanguageModelConfig
from p2pcodistill.tasks.language_model import LanguageModelTask
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.node_events import FramePublished
from p2pcodistill.telemetry.training_events import SnapshotSkipped, TeacherRefused

DEMO = Path(__file__).parent.parent / "simulations" / "pair.toml"
SITES = ("berlin", "tokyo")
EXACT = FramesConfig(delta="off")
"""fp16 keyframes: every exchange sends the whole model."""
CONSTANT_LEARNING_RATE = 2e-3
TEACHER_EVALUATION_STEPS = 250
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Run:
    """A description of a run. `frames` is how checkpoints travel, None for students that learn alone."""

    model: Literal["language-model", "letters"]
    schedule: Literal["cosine", "constant"]
    seed: int
    num_steps: int
    frames: FramesConfig | None
    average_decay: float = 0.0

    def __str__(self) -> str:
        how = "alone" if self.frames is None else f"delta {self.frames.delta}"
        how += f", average {self.average_decay}" if self.average_decay else ""
        return f"{self.model}, {self.schedule}, seed {self.seed}, {how}"


@dataclass
class SiteResult:
    """What one student went through: held-out loss by step, and the frames that it sent."""

    val_losses: dict[int, float] = field(default_factory=dict)
    frame_sizes: list[int] = field(default_factory=list)
    num_fp16_bytes: int = 0
    """Of one checkpoint."""
    teacher_losses: dict[int, float] = field(default_factory=dict)
    """Held-out loss, by step, of the other site's checkpoints as they arrived."""

    @property
    def final_loss(self) -> float:
        """After the last step."""
        return self.val_losses[max(self.val_losses)]

    def first_step_at_or_below(self, loss: float) -> int | None:
        """The first evaluated step."""
        return next((step for step, value in sorted(self.val_losses.items()) if value <= loss), None)


def demo_scenario() -> ScenarioConfig:
    """The demo."""
    return load_scenario(DEMO)


def training_config(run: Run, site: str) -> TrainingConfig:
    """The demo's, with the run's schedule and length, and the seed that the node of that site would have."""
    text = f"p2pcodistill-seed/{run.seed}/{site}"
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big") >> 1
    config = demo_scenario().training
    rate = config.learning_rate if run.schedule == "cosine" else CONSTANT_LEARNING_RATE
    if run.model == "letters":
        rate = CONSTANT_LEARNING_RATE
    update = {"learning_rate_schedule": run.schedule, "learning_rate": rate, "num_steps": run.num_steps}
    return config.model_copy(update=update | {"seed": seed})


def make_task(run: Run, site: str, folder: Path) -> Task:
    """The data of one site; `folder` holds the demo's text, which is written there when it is missing."""
    config = training_config(run, site)
    if run.model == "letters":
        return LettersTask(batch_size=64, seed=config.seed)
    held_out = _write_text(folder)
    task = demo_scenario().task.model_copy(
        update={
            "data": (folder / f"{site}.txt",),
            "held_out": (held_out,),
            "max_held_out_bytes": held_out.stat().st_size,
        }
    )
    spec = GroupSpec.model_construct(task=task, training=config)
    return LanguageModelTask(spec, rank=0, num_ranks=1, device=_CPU)


def _write_text(folder: Path) -> Path:
    held_out = folder / "held-out.txt"
    if not held_out.exists():
        scenario = demo_scenario()
        assert isinstance(scenario.task, LanguageModelConfig)
        text = split_scenario_text(scenario, scenario.task)
        for site, shard in text.shards.items():
            (folder / f"{site}.txt").write_bytes(shard)
        partial = held_out.with_suffix(f".{id(text)}")  # several processes may be at it
        partial.write_bytes(text.held_out)
        partial.replace(held_out)
    return held_out


def train(
    run: Run, folder: Path, on_snapshot: Callable[[str, Snapshot], None] = lambda _site, _snapshot: None
) -> dict[str, SiteResult]:
    """Train the run's students in turn, one update each; what became of them, by site.

    `on_snapshot` gets every checkpoint that is published.
    """
    torch.set_num_threads(1)
    board = MemoryBoard()
    students = {site: _Student(run, site, board, folder, on_snapshot) for site in SITES}
    for _ in range(run.num_steps):
        for student in students.values():
            student.update()
    return {site: student.result for site, student in students.items()}


class _Student:
    def __init__(
        self,
        run: Run,
        site: str,
        board: MemoryBoard,
        folder: Path,
        on_snapshot: Callable[[str, Snapshot], None],
    ) -> None:
        self._config = training_config(run, site)
        self._dtype = choose_precision(self._config, _CPU)
        self._task = make_task(run, site, folder)
        torch.manual_seed(self._config.seed)
        self._model = self._task.make_model()
        self._judged = copy.deepcopy(self._model)
        self._optimizer = torch.optim.Adam(self._model.parameters())
        self._state: Any = None
        self._step = 0
        self.result = SiteResult()
        exchange, teachers = None, dict[str, float]()
        if run.frames is not None:
            teachers = {other: 1.0 for other in SITES if other != site}
            inner = board.exchange(site, list(teachers), frames=run.frames, on_event=self._count)
            exchange = _Tap(inner, lambda snapshot: on_snapshot(site, snapshot), self._judge)
        config = codistillation_config(run)
        self._codistiller = Codistiller(
            self._model,
            config,
            exchange=exchange,
            teachers=[teachers],
            forward=self._task.forward,
            criterion=self._task.loss,
        )

    def update(self) -> None:
        """One update, as in `group.train`, and an evaluation where one is due."""
        inputs, targets = self._task.next_batch()
        with torch.autocast("cpu", torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            logits, state = self._task.forward(self._model, inputs, self._state)
            loss = self._task.loss(logits, targets) + self._codistiller.loss(logits, inputs, targets)
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), self._config.max_gradient_norm)
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(self._config, self._step)
        self._optimizer.step()
        self._codistiller.step()
        self._state = map_tensors(Tensor.detach, state)
        self._step += 1
        is_last = self._step == self._config.num_steps
        if is_last or self._step % self._config.evaluation_interval_steps == 0:
            self.result.val_losses[self._step] = evaluate(self._task, self._model, self._dtype)

    def _judge(self, teacher: Reference) -> None:
        if teacher.step % TEACHER_EVALUATION_STEPS == 0 or teacher.step == self._config.num_steps:
            loss = evaluate_tensors(self._task, self._judged, teacher.tensors)
            self.result.teacher_losses[teacher.step] = loss

    def _count(self, event: Event) -> None:
        match event:
            case FramePublished():
                self.result.frame_sizes.append(event.num_bytes)
                self.result.num_fp16_bytes = event.num_fp16_bytes
            case TeacherRefused() | SnapshotSkipped():
                raise RuntimeError(f"the exchange failed: {event}")


class _Tap:
    """An exchange that shows what passes: the snapshots that are published, and the teachers that arrive."""

    def __init__(
        self,
        exchange: Exchange,
        on_snapshot: Callable[[Snapshot], None],
        on_teacher: Callable[[Reference], None],
    ) -> None:
        self._exchange, self._on_snapshot, self._on_teacher = exchange, on_snapshot, on_teacher
        self.inbox, self.report, self.close = exchange.inbox, exchange.report, exchange.close

    def publish(self, snapshot: Snapshot) -> None:
        self._on_snapshot(snapshot)
        self._exchange.publish(snapshot)

    def prepare(self, offer: Offer) -> Future[Reference]:
        future = self._exchange.prepare(offer)
        self._on_teacher(future.result())
        return future


def codistillation_config(run: Run) -> CodistillationConfig:
    """The demo's, with the run's averaging; a run that is too short for the demo's burn-in has a shorter one."""
    config = demo_scenario().codistillation
    burn_in_steps = min(config.burn_in_steps, run.num_steps // 2)
    update = {"teacher_average_decay": run.average_decay, "burn_in_steps": burn_in_steps}
    return config.model_copy(update=update)


def evaluate(task: Task, model: nn.Module, dtype: torch.dtype) -> float:
    """The held-out loss of a model, which is left in training mode."""
    model.eval()
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        loss = task.evaluate(model).loss
    model.train()
    return loss


def evaluate_tensors(task: Task, model: nn.Module, tensors: Mapping[str, Tensor]) -> float:
    """The held-out loss, in fp32, of a checkpoint that is loaded into `model`."""
    model.load_state_dict(dict(tensors))
    return evaluate(task, model, torch.float32)


def train_checkpoints(run: Run, folder: Path, num_checkpoints: int) -> Iterator[Snapshot]:
    """Checkpoints of one lone student of the run, one exchange interval apart, from the end of burn-in on."""
    config = codistillation_config(run)
    student = _Student(run, SITES[0], MemoryBoard(), folder, lambda _site, _snapshot: None)
    torch.set_num_threads(1)
    for index in range(num_checkpoints):
        for _ in range(config.burn_in_steps if index == 0 else config.exchange_interval_steps):
            student.update()
        yield take_snapshot(student._model, student._step)
