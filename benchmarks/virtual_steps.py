"""Eight small models in one process: what training them as one batched model would give over training them one by one.

The models are the click task's, each with a batch of its own. One by one is what virtual runs do, `Learner.step`. Batched
is `torch.func`: the parameters stacked, one forward and backward pass under `vmap`, one optimizer for all. It is measured
against the same steps one by one, both without what the loop of a virtual run adds: events, random states, the gate. What
batching saves of these is taken off the virtual run's own step to tell what it would give there.

With teachers, each student learns from the seven others' checkpoints, which are the same for all students: in virtual runs
they need not be.
"""

from __future__ import annotations

import copy
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

from benchmarks.figure import print_figure
from p2pcodistill.checkpoint.snapshot import take_snapshot
from p2pcodistill.codistill.exchange import MemoryBoard
from p2pcodistill.codistill.losses import distillation_loss
from p2pcodistill.config import CodistillationConfig, FramesConfig, GroupConfig, GroupSpec, TrainingConfig
from p2pcodistill.group.optimizer import make_optimizer, set_step
from p2pcodistill.group.task import load_task
from p2pcodistill.simulation.arms.learner import Learner
from p2pcodistill.simulation.scenario_tables import VirtualConfig
from p2pcodistill.simulation.virtual.step_time import StepTimes
from p2pcodistill.task_configs import ClicksConfig

NUM_MODELS = 8
BATCH_SIZES = (32, 128, 512)
WORTHWHILE_RATIO = 1.5
NUM_ROUNDS, NUM_STEPS = 9, 4
_CPU = torch.device("cpu")


def make_spec(index: int, folder: Path, *, batch_size: int) -> GroupSpec:
    """The training of the model with this index, on generated clicks of its own order."""
    folder.mkdir()
    return GroupSpec(
        site=f"site-{index}",
        link_address="",
        link_token="",
        outbox_folder=folder,
        training_folder=folder,
        model_path=folder / "model.safetensors",
        error_path=folder / "group-error.txt",
        teachers=({},),
        num_students=0,
        group=GroupConfig(),
        task=ClicksConfig(name="clicks", num_generated_examples=8000),
        training=TrainingConfig(
            batch_size=batch_size,
            seed=index,
            precision="float32",
            num_steps=1_000_000,
            evaluation_interval_steps=1_000_000,
            checkpoint_interval_steps=1_000_000,
        ),
        codistillation=CodistillationConfig(burn_in_steps=0, agreement_interval_steps=1),
        frames=FramesConfig(),
    )


def make_models(specs: Sequence[GroupSpec]) -> list[nn.Module]:
    """One for each spec, of its seed."""
    models = []
    for spec in specs:
        task = load_task(spec, rank=0, num_ranks=1, device=_CPU)
        torch.manual_seed(spec.training.seed)
        models.append(task.make_model())
    return models


class OneByOne:
    """Each model's own pass and update; `teachers` are frozen, and the one with a student's index does not teach it."""

    def __init__(self, specs: Sequence[GroupSpec], teachers: Sequence[nn.Module] = ()) -> None:
        self.models = make_models(specs)
        self._specs, self._teachers = specs, teachers
        self._tasks = [load_task(spec, rank=0, num_ranks=1, device=_CPU) for spec in specs]
        self._optimizers = [
            make_optimizer(spec.training, model) for spec, model in zip(specs, self.models, strict=True)
        ]
        self._num_steps = 0

    def step(self) -> None:
        """One step of each."""
        for index, (task, model, optimizer) in enumerate(
            zip(self._tasks, self.models, self._optimizers, strict=True)
        ):
            inputs, labels_B = task.next_batch()
            logits_B2, _ = task.forward(model, inputs, None)
            loss = task.loss(logits_B2, labels_B)
            others = [teacher for place, teacher in enumerate(self._teachers) if place != index]
            if others:
                with torch.no_grad():
                    theirs = [task.forward(teacher, inputs, None)[0] for teacher in others]
                loss = loss + distillation_loss(logits_B2, theirs, [1 / len(others)] * len(others))
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            config = self._specs[index].training
            nn.utils.clip_grad_norm_(model.parameters(), config.max_gradient_norm)
            set_step(optimizer, config, self._num_steps)
            optimizer.step()
        self._num_steps += 1


class Batched:
    """The same as `OneByOne`, with N models as one whose parameters have an axis more."""

    def __init__(self, specs: Sequence[GroupSpec], teachers: Sequence[nn.Module] = ()) -> None:
        models = make_models(specs)
        self.names = [name for name, _ in models[0].named_parameters()]
        self.stacked = nn.ParameterList(_stack(models, name) for name in self.names)
        self._teachers = {name: _stack(teachers, name) for name in self.names} if teachers else {}
        self._skeleton = copy.deepcopy(models[0]).to("meta")
        self._config = specs[0].training
        self._tasks = [load_task(spec, rank=0, num_ranks=1, device=_CPU) for spec in specs]
        self._optimizer = make_optimizer(self._config, self.stacked)
        self._num_steps = 0

    def step(self) -> None:
        """One step of each."""
        batches = [task.next_batch() for task in self._tasks]
        inputs_N = tuple(
            torch.stack(tensors) for tensors in zip(*(inputs for inputs, _ in batches), strict=True)
        )
        labels_NB = torch.stack([labels_B for _, labels_B in batches])
        own = dict(zip(self.names, self.stacked, strict=True))
        logits_NB2 = vmap(self._predict)(own, inputs_N)
        # A loss is a mean over a batch, and each model wants the gradient of its own.
        loss = self._tasks[0].loss(logits_NB2.flatten(0, 1), labels_NB.flatten()) * len(batches)
        if self._teachers:
            loss = loss + self._distil(logits_NB2, inputs_N)
        self._optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self._clip()
        set_step(self._optimizer, self._config, self._num_steps)
        self._optimizer.step()
        self._num_steps += 1

    def _predict(self, parameters: Mapping[str, Tensor], inputs: tuple[Tensor, ...]) -> Tensor:
        logits_B2: Tensor = functional_call(self._skeleton, dict(parameters), inputs)
        return logits_B2

    def _distil(self, logits_NB2: Tensor, inputs_N: tuple[Tensor, ...]) -> Tensor:
        """The sum of all students' soft cross-entropy with the mean prediction of the others' teachers."""
        num_models, batch_size = logits_NB2.shape[:2]
        with torch.no_grad():
            all_inputs = tuple(tensor.flatten(0, 1) for tensor in inputs_N)
            theirs = vmap(self._predict, in_dims=(0, None))(self._teachers, all_inputs)
            probabilities_TNB2 = theirs.softmax(-1).unflatten(1, (num_models, batch_size))
            weights_NT = (1 - torch.eye(num_models)) / (num_models - 1)
            target_NB2 = torch.einsum("nt,tnbc->nbc", weights_NT, probabilities_TNB2)
        return -(target_NB2 * logits_NB2.log_softmax(-1)).sum(-1).mean(1).sum()

    def _clip(self) -> None:
        """The norm of each model's gradient, as `clip_grad_norm_` does of one."""
        gradients = [parameter.grad for parameter in self.stacked if parameter.grad is not None]
        norms = torch.stack([torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in gradients])
        factors_N = (self._config.max_gradient_norm / (norms.norm(dim=0) + 1e-6)).clamp(max=1.0)
        for grad in gradients:
            grad.mul_(factors_N.view(-1, *[1] * (grad.ndim - 1)))


def _stack(models: Sequence[nn.Module], name: str) -> nn.Parameter:
    return nn.Parameter(torch.stack([model.get_parameter(name).detach() for model in models]))


class VirtualRun:
    """The same by the learners of a virtual run."""

    def __init__(self, specs: Sequence[GroupSpec], teachers: Sequence[nn.Module] = ()) -> None:
        board = MemoryBoard()
        for spec, teacher in zip(specs, teachers, strict=False):
            board.exchange(spec.site, ()).publish(take_snapshot(teacher, 1))
        self.learners = [
            Learner(
                spec.site,
                spec,
                lambda _time_s, _event: None,
                StepTimes(VirtualConfig(), seed=0),
                teachers={other.site: 1.0 for other in specs if teachers and other is not spec},
                board=board,
            )
            for spec in specs
        ]

    def step(self) -> None:
        """One step of each."""
        for learner in self.learners:
            learner.step()


def measure(ways: Mapping[str, Callable[[], None]]) -> dict[str, list[float]]:
    """Milliseconds of processor time of a step of all models, by way and round; the ways take turns."""
    for step in ways.values():
        step()
        step()
    rounds_ms: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(NUM_ROUNDS):
        for way, step in ways.items():
            start_s = time.process_time()
            for _ in range(NUM_STEPS):
                step()
            rounds_ms[way].append((time.process_time() - start_s) / NUM_STEPS * 1e3)
    return rounds_ms


def main() -> None:
    """Print the figure for each size of batch, with and without teachers."""
    torch.set_num_threads(1)
    for batch_size in BATCH_SIZES:
        for has_teachers in (False, True):
            with tempfile.TemporaryDirectory() as folder:
                _print(batch_size, has_teachers, Path(folder))


def _print(batch_size: int, has_teachers: bool, folder: Path) -> None:
    specs = [make_spec(index, folder / f"{index}", batch_size=batch_size) for index in range(NUM_MODELS)]
    teachers = [model.eval().requires_grad_(False) for model in make_models(specs)] if has_teachers else []
    ways = {way.__name__: way(specs, teachers).step for way in (OneByOne, Batched, VirtualRun)}
    rounds_ms = measure(ways)
    triples = list(zip(*(rounds_ms[way] for way in ways), strict=True))
    ratio = statistics.median(one / batched for one, batched, _ in triples)
    in_run = statistics.median(
        virtual / max(virtual - (one - batched), batched) for one, batched, virtual in triples
    )
    print_figure(
        "virtual_steps_s",
        round(ratio, 2),
        "ratio of steps per second, batched to one by one",
        f"a comparison: {WORTHWHILE_RATIO} in virtual runs would be worth building in",
        holds=None,
        on=f"one core, {NUM_MODELS} click networks of 248,449 parameters, batches of {batch_size}, "
        f"{NUM_MODELS - 1 if has_teachers else 0} teachers each, Adam, float32",
        in_virtual_runs=round(in_run, 2),
        one_by_one_ms=round(statistics.median(rounds_ms["OneByOne"]), 1),
        batched_ms=round(statistics.median(rounds_ms["Batched"]), 1),
        virtual_run_ms=round(statistics.median(rounds_ms["VirtualRun"]), 1),
    )


if __name__ == "__main__":
    main()
