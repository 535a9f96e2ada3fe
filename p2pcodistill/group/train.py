"""The reference training loop, which torchrun starts once a rank: `python -m p2pcodistill.group.train`.

An ordinary PyTorch loop with DDP and autocast, plus the three lines of codistillation (`join`, `loss`, `step`); the rest is
what a run on unreliable machines needs: complete training checkpoints, an agreed stop, evaluation, events.

On the CPU and without peers, a resumed run is bit-identical to one that was never stopped, on the same processor and
versions, with up to two ranks (the order in which more than two are summed may differ in the first step after a resume). On
GPUs a resume is as complete, but cuDNN may compute other last bits.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from safetensors.torch import save_model
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from p2pcodistill.codistill.averaging import WeightAverage
from p2pcodistill.codistill.codistiller import Codistiller
from p2pcodistill.codistill.gate import Criterion
from p2pcodistill.codistill.teachers import Forward, State, map_tensors
from p2pcodistill.config import GroupConfig, GroupSpec, TrainingConfig
from p2pcodistill.errors import GroupError, UserError
from p2pcodistill.group.checkpoints import TrainingCheckpoint, TrainingCheckpoints
from p2pcodistill.group.exchange import join, read_group_spec
from p2pcodistill.group.lifeline import die_with_parent
from p2pcodistill.group.meter import Meter
from p2pcodistill.group.optimizer import learning_rate, make_optimizer, set_step
from p2pcodistill.group.predictions import save_predictions
from p2pcodistill.group.randomness import random_states, restore_random_states, seed_random_states
from p2pcodistill.group.smoothing import LabelSmoothing
from p2pcodistill.group.task import Evaluation, Predictions, load_task
from p2pcodistill.runfolder import PREDICTIONS_FILE
from p2pcodistill.telemetry.training_events import (
    Evaluated,
    TrainingCheckpointed,
    TrainingEnded,
    TrainingStarted,
)


def main() -> int:
    """Train as the node's spec says. Exit status 0 (finished or stopped) or 2 (one line says what to mend)."""
    die_with_parent()
    logging.basicConfig(format="%(levelname)s: %(message)s")
    spec = None
    try:
        spec = read_group_spec()
        if spec is None:
            raise GroupError(
                "this is a node's training loop: run `p2pcodistill node` or `p2pcodistill simulate`"
            )
        train(spec)
    except UserError as error:
        print(f"p2pcodistill: {error}", file=sys.stderr)
        if spec is not None:
            # torchrun keeps exit statuses to itself: this is how the node learns not to try again.
            spec.error_path.write_text(f"{error}\n")
        return 2
    return 0


def train(spec: GroupSpec) -> None:
    """Train this rank to the end, or to the step at which the ranks agree to stop. Raises UserError."""
    torch.set_num_threads(spec.group.num_threads)
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    device = choose_device(
        spec.group, num_local_ranks=int(os.environ.get("LOCAL_WORLD_SIZE", "1")), local_rank=_local_rank()
    )
    if device.type == "cuda":
        torch.cuda.set_device(device)
    control_group = None
    if num_ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        control_group = dist.new_group(backend="gloo")
    try:
        Training(spec, device, control_group).run()
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", "0"))


def choose_device(config: GroupConfig, *, num_local_ranks: int, local_rank: int) -> torch.device:
    """This rank's device: a GPU of its own where the machine has one for each of its ranks, else the CPU.

    Raises GroupError when GPUs are asked for and there are too few.
    """
    num_gpus = 0 if config.device == "cpu" else torch.cuda.device_count()
    if config.device == "cuda" and num_gpus < num_local_ranks:
        raise GroupError(
            f'group.device is "cuda", but there are {num_gpus} GPUs for {num_local_ranks} rank(s): lower '
            'group.num_ranks or set group.device to "cpu"'
        )
    return torch.device("cuda", local_rank) if num_gpus >= num_local_ranks else torch.device("cpu")


def choose_precision(config: TrainingConfig, device: torch.device) -> torch.dtype:
    """The dtype of autocast: what is configured, or bfloat16 where the processor multiplies it natively."""
    if config.precision != "auto":
        return torch.bfloat16 if config.precision == "bfloat16" else torch.float32
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
        native = bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
    return torch.bfloat16 if native else torch.float32


class Join(Protocol):
    """Makes the `Codistiller` of a model, as `group.exchange.join` does."""

    def __call__(
        self, model: nn.Module, *, forward: Forward | None = None, criterion: Criterion | None = None
    ) -> Codistiller: ...


class Training:
    """One rank's training: built from a spec, resumed from its last checkpoint, then `run`."""

    def __init__(
        self,
        spec: GroupSpec,
        device: torch.device,
        control_group: dist.ProcessGroup | None,
        *,
        join: Join = join,
        clock: Callable[[], float] = time.perf_counter,
        num_workers: int | None = None,
        share: tuple[int, int] | None = None,
    ) -> None:
        """`join` makes the codistiller of the model. `clock`, in seconds, is what durations are measured with.

        A step's gradient is the mean over the batches of `num_workers`, and (k, n) as `share` reads every nth part of the
        data from the kth on: those of ranks, unless a simulation has workers of its own.
        """
        self._clock = clock
        self._config = config = spec.training
        self._device = device
        self._rank = 0 if control_group is None else dist.get_rank(control_group)
        self._num_ranks = 1 if control_group is None else dist.get_world_size(control_group)
        self._num_workers = self._num_ranks if num_workers is None else num_workers
        self._model_path = spec.model_path
        self._dtype = choose_precision(config, device)
        reader, num_readers = share or (self._rank, self._num_ranks)
        self._task = load_task(spec, rank=reader, num_ranks=num_readers, device=device)
        own_seed = config.seed if config.initialisation_seed is None else config.initialisation_seed
        torch.manual_seed(own_seed % 2**63)
        self._model = self._task.make_model()
        self._optimizer = make_optimizer(config, self._model)
        self._smoothing = LabelSmoothing(config)
        self._average: WeightAverage | None = None
        if config.average_decay > 0 and self._rank == 0:
            self._average = WeightAverage(self._model, config.average_decay)
        self._state: State = None
        self._step = 0
        self._saved_step = 0
        self._earlier_s = 0.0
        self._checkpoints = TrainingCheckpoints(spec.training_folder, control_group)
        checkpoint = self._checkpoints.load()
        self._codistiller = join(self._model, forward=self._task.forward, criterion=self._task.loss)
        seed_random_states(config.seed, reader)
        if checkpoint is not None:
            self._resume(checkpoint)
        self._student: nn.Module = self._model
        if control_group is not None:
            device_ids = [device.index] if device.type == "cuda" else None
            self._student = DistributedDataParallel(self._model, device_ids=device_ids)
        self._started_s = clock()
        self._meter = Meter(clock, self._codistiller.exchange_s)

    def run(self) -> None:
        """Train until the last step or the agreed stop, save what a restart needs, and close the exchange.

        Resumed from the checkpoint of the last step, it only evaluates and publishes the model once more: a kill may have
        taken both on their way to the node.
        """
        try:
            self.begin()
            while self.is_under_way:
                self.advance()
            self.end()
        finally:
            self._codistiller.close()

    @property
    def model(self) -> nn.Module:
        """What is trained."""
        return self._model

    @property
    def num_steps(self) -> int:
        """Completed updates."""
        return self._step

    def count_loss(self, loss: Tensor) -> None:
        """Count in the next report a batch's loss whose gradient was computed elsewhere."""
        self._meter.add(loss, None)

    @property
    def is_under_way(self) -> bool:
        """Whether there is another update to make: it is not the end, and the ranks have not agreed to stop."""
        return self._step < self._config.num_steps and not self._codistiller.stop_requested

    def begin(self) -> None:
        """What comes before the first update; `run` is this, then `advance` while training `is_under_way`, then `end`."""
        if self._step >= self._config.num_steps:
            self._codistiller.publish()
            self._evaluate()
            return
        self._report_start()
        if self._step > 0 and self._step % self._config.evaluation_interval_steps == 0:
            self._evaluate()  # the event of the last life may have been on its way when that was killed

    def advance(self) -> None:
        """Make one update, and what is due after it: these three, in which others may have their say in between."""
        self.compute_gradient()
        self.update()
        self.conclude_step()

    def conclude_step(self) -> None:
        """What is due after an update: to average, to publish, to report, to evaluate, to save."""
        config = self._config
        if self._average is not None:
            self._average.update()  # of what an arm has made of the model since the update
        is_last = self._step == config.num_steps
        if is_last:
            self._codistiller.publish()
        if is_last or self._step % config.report_interval_steps == 0:
            self._report_progress()
        if is_last or self._step % config.evaluation_interval_steps == 0:
            self._evaluate()
        if is_last and self._rank == 0:
            # Before the last checkpoint, by which a restarted group knows that nothing is left to do.
            save_model_file(self.kept_model, self._model_path)
            predictions_path = self._model_path.with_name(PREDICTIONS_FILE)
            save_predictions(self.predict(self.kept_model), predictions_path)
        if is_last or self._step % config.checkpoint_interval_steps == 0:
            self._save_checkpoint()

    def end(self) -> None:
        """What comes after the last update of this life."""
        self._save_checkpoint()
        finished = self._step >= self._config.num_steps
        exchange_s = self._codistiller.exchange_s
        self._codistiller.report(TrainingEnded(self._step, finished, exchange_s, self._duration_s))

    def _report_start(self) -> None:
        num_parameters = sum(parameter.numel() for parameter in self._model.parameters())
        precision = str(self._dtype).removeprefix("torch.")
        self._codistiller.report(
            TrainingStarted(
                self._step,
                self._config.num_steps,
                num_parameters,
                self._num_workers,
                self._device.type,
                precision,
            )
        )

    def compute_gradient(self) -> Tensor:
        """The gradient of the next batch's loss (Anil et al. 2018, Algorithm 1), left in the parameters.

        Returns that loss, a scalar, without smoothing and distillation.
        """
        inputs, targets = self._task.next_batch()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            logits, state = self._task.forward(self._student, inputs, self._state)
            loss = self._task.loss(logits, targets)
            distillation = self._codistiller.loss(logits, inputs, targets)
        smoothed = self._smoothing.smooth(loss, logits, targets)
        self._optimizer.zero_grad()
        (smoothed + distillation).backward()  # type: ignore[no-untyped-call]
        self._state = map_tensors(Tensor.detach, state)
        if self._rank == 0:  # which alone measures, and so empties it
            self._meter.add(loss.detach(), self._codistiller.last_distillation_loss)
        return loss.detach()

    def update(self) -> None:
        """Update the parameters by the gradient that they have."""
        if self._config.max_gradient_norm:
            nn.utils.clip_grad_norm_(self._model.parameters(), self._config.max_gradient_norm)
        set_step(self._optimizer, self._config, self._step, num_workers=self._num_workers)
        self._optimizer.step()
        self._codistiller.step()
        self._step += 1

    def _report_progress(self) -> None:
        if self._rank != 0:
            return
        rate = learning_rate(self._config, self._step - 1, num_workers=self._num_workers)
        self._codistiller.report(self._meter.measure(self._step, rate, self._codistiller.exchange_s))

    def _evaluate(self) -> None:
        """Evaluate on rank 0; the other ranks go on to the next all-reduce."""
        if self._rank != 0:
            return
        start_s = self._clock()
        evaluation = self.evaluate(self.kept_model)
        metrics = evaluation.metrics
        if self._average is not None:
            metrics = metrics | {"unaveraged_loss": self.evaluate(self._model).loss}
        duration_s = self._clock() - start_s
        self._codistiller.report(Evaluated(self._step, evaluation.loss, duration_s, metrics))

    def evaluate(self, model: nn.Module) -> Evaluation:
        """How good `model` is on held-out data, in the precision of this training."""
        model.eval()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            evaluation = self._task.evaluate(model)
        model.train()
        return evaluation

    def predict(self, model: nn.Module) -> Predictions:
        """What `model` says of held-out examples, in the precision of this training."""
        model.eval()
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self._dtype == torch.bfloat16):
            predictions = self._task.predict(model)
        model.train()
        return predictions

    @property
    def kept_model(self) -> nn.Module:
        """What a user keeps of the run, and what is evaluated: the model, or its average where there is to be one."""
        return self._model if self._average is None else self._average.model()

    @property
    def _duration_s(self) -> float:
        return self._earlier_s + self._clock() - self._started_s

    def _save_checkpoint(self) -> None:
        if self._saved_step == self._step:
            return
        start_s = self._clock()
        shared = {
            "model": self._model.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "average": None if self._average is None else self._average.state_dict(),
            "duration_s": self._duration_s,
        }
        own = {
            "task": self._task.state_dict(),
            "state": self._state,
            "smoothing": self._smoothing.state_dict(),
            "codistiller": self._codistiller.state_dict(),
            "random": random_states(self._device),
        }
        self._checkpoints.save(self._step, shared=shared, own=own)
        self._saved_step = self._step
        self._codistiller.report(TrainingCheckpointed(self._step, self._clock() - start_s))

    def _resume(self, checkpoint: TrainingCheckpoint) -> None:
        self._step = self._saved_step = checkpoint.step
        self._model.load_state_dict(checkpoint.shared["model"])
        self._optimizer.load_state_dict(checkpoint.shared["optimizer"])
        self._earlier_s = checkpoint.shared["duration_s"]
        if self._average is not None and checkpoint.shared.get("average") is not None:
            self._average.load_state_dict(checkpoint.shared["average"])
        self._task.load_state_dict(checkpoint.own["task"])
        self._state = map_tensors(lambda tensor: tensor.to(self._device), checkpoint.own["state"])
        if "smoothing" in checkpoint.own:  # checkpoints had neither once
            self._smoothing.load_state_dict(checkpoint.own["smoothing"], self._device)
        self._codistiller.load_state_dict(checkpoint.own["codistiller"])
        restore_random_states(checkpoint.own["random"], self._device)


def save_model_file(model: nn.Module, path: Path) -> None:
    """Write the model as safetensors, at once or not at all; read it with `safetensors.torch.load_model`."""
    partial = path.with_name(f"{path.name}.part")
    save_model(model, str(partial))
    with partial.open("rb") as file:
        os.fsync(file.fileno())
    partial.replace(path)


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # Everything is written. Threads of gloo and DDP that ask for the interpreter while it shuts down would abort the
    # process, and the node would take that for a crash.
    os._exit(status)
