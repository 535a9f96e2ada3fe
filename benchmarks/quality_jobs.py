"""The jobs of `codec_quality`, spread over the cores: runs that train, and chains of frames of what they have trained."""

from __future__ import annotations

import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.chains import (
    checkpoint_path,
    ideal_delta_bytes,
    list_checkpoints,
    load_checkpoint,
    num_exact_bytes,
    plane_entropy_bytes,
    save_checkpoint,
    send,
)
from benchmarks.training import Run, SiteResult, evaluate_tensors, make_task, train
from p2pcodistill.checkpoint.snapshot import Snapshot
from p2pcodistill.config import FramesConfig

EVALUATION_STRIDE = 2  # of the checkpoints of a chain, the teachers' losses are measured on one in so many

Key = TypeVar("Key")


@dataclass(frozen=True)
class TrainJob:
    """Train a run; its checkpoints are kept in `checkpoints`, if that is given."""

    run: Run
    folder: Path
    checkpoints: Path | None = None

    def __call__(self) -> dict[str, SiteResult]:
        keep = self._keep if self.checkpoints is not None else lambda _site, _snapshot: None
        return train(self.run, self.folder, keep)

    def _keep(self, site: str, snapshot: Snapshot) -> None:
        assert self.checkpoints is not None
        self.checkpoints.mkdir(exist_ok=True)
        save_checkpoint(checkpoint_path(self.checkpoints, site, snapshot.step), snapshot)


@dataclass
class ChainResult:
    """What became of a chain; lists go by frame, the keyframe first."""

    steps: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    ideal_sizes: list[float] = field(default_factory=list)
    exact_sizes: list[int] = field(default_factory=list)
    codecs: list[str] = field(default_factory=list)
    excess_losses: dict[int, float] = field(default_factory=dict)
    """By step: held-out loss of the reference / that of the exact weights, minus 1."""
    num_fp16_bytes: int = 0
    keyframe_efficiency: float = 0.0
    keyframe_efficiency_by_tensor: float = 0.0

    def delta_ratio(self, up_to_step: int = sys.maxsize) -> float:
        """Raw fp16 bytes / bytes sent, of the delta frames."""
        sizes = [
            size for step, size in zip(self.steps[1:], self.sizes[1:], strict=True) if step <= up_to_step
        ]
        return self.num_fp16_bytes * len(sizes) / sum(sizes)

    def mean_excess_loss(self, up_to_step: int = sys.maxsize) -> float:
        """Of the steps after the keyframe's."""
        return statistics.mean(loss for step, loss in self.excess_losses.items() if step <= up_to_step)

    @property
    def entropy_efficiency(self) -> float:
        """Order-0 entropy of the codes, and scales / bytes sent for them, framing included; of all delta frames."""
        return sum(self.ideal_sizes[1:]) / (sum(self.sizes[1:]) - sum(self.exact_sizes[1:]))

    @property
    def entropy_efficiency_of_all_bytes(self) -> float:
        """The same, by all bytes of the delta frames: those of tensors that travel exactly, too."""
        return sum(self.ideal_sizes[1:]) / sum(self.sizes[1:])


@dataclass(frozen=True)
class ChainJob:
    """Send the checkpoints of one site of a run as a chain of frames, in its own order and interval."""

    run: Run
    site: str
    config: FramesConfig
    folder: Path
    checkpoints: Path

    def __call__(self) -> ChainResult:
        torch.set_num_threads(1)
        task = make_task(self.run, self.site, self.folder)
        model = task.make_model()
        result = ChainResult()
        paths = list_checkpoints(self.checkpoints, self.site)
        for index, sent in enumerate(send(map(load_checkpoint, paths), self.config)):
            result.steps.append(sent.step)
            result.sizes.append(len(sent.data))
            result.exact_sizes.append(num_exact_bytes(sent.data))
            result.codecs.append(sent.codec)
            result.num_fp16_bytes = sent.num_fp16_bytes
            result.ideal_sizes.append(0.0 if sent.is_keyframe else ideal_delta_bytes(sent.data))
            if index > 0 and (index % EVALUATION_STRIDE == 0 or index == len(paths) - 1):
                exact = evaluate_tensors(task, model, load_checkpoint(paths[index]).tensors)
                loss = evaluate_tensors(task, model, sent.reference.tensors)
                result.excess_losses[sent.step] = loss / exact - 1
        result.keyframe_efficiency, result.keyframe_efficiency_by_tensor = keyframe_efficiency(
            load_checkpoint(paths[-1])
        )
        return result


def keyframe_efficiency(checkpoint: Snapshot) -> tuple[float, float]:
    """Order-0 entropy of the byte planes of what a keyframe holds / its bytes: planes of the model, and of each tensor.

    All bytes of the frame count, so what travels exactly (fp32 biases, running statistics) is in the planes, too.
    """
    sent = next(send([checkpoint], FramesConfig(keyframe="fp16")))
    tensors = sent.reference.tensors.values()
    by_tensor = sum(plane_entropy_bytes([tensor]) for tensor in tensors)
    return plane_entropy_bytes(tensors) / len(sent.data), by_tensor / len(sent.data)


def run_jobs(jobs: Sequence[tuple[Key, Callable[[], Any]]], what: str) -> dict[Key, Any]:
    """The results of all jobs, by key, a process each core; says on stderr what is done."""
    started_s = time.monotonic()
    results: dict[Key, Any] = {}
    num_processes = min(len(jobs), os.cpu_count() or 1)
    with ProcessPoolExecutor(num_processes, mp_context=get_context("spawn")) as pool:
        keys = {pool.submit(job): key for key, job in jobs}
        for future in as_completed(keys):
            results[keys[future]] = future.result()
            label = keys[future]
            label = ", ".join(map(str, label)) if isinstance(label, tuple) else str(label)
            done = f"{what} {len(results)}/{len(jobs)} ({label})"
            print(f"{done}, {time.monotonic() - started_s:.0f} s", file=sys.stderr, flush=True)
    return results
