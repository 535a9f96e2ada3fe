"""Asynchronous SGD: workers send a parameter server gradients of the model as they fetched it last, and nobody waits.

Meanwhile others have moved the model: with n workers of one speed a gradient is n - 1 updates old when it arrives. The
server has the one optimizer and makes as many updates as all workers' steps in a synchronous arm together. Its log counts
rounds of n updates, so that a step is as many examples there as in that arm; schedules and intervals mean rounds as well.
"""

from __future__ import annotations

import dataclasses
import heapq
from typing import Any

from torch import Tensor

from p2pcodistill.config import TrainingConfig
from p2pcodistill.simulation.arms.learner import Tell
from p2pcodistill.simulation.arms.run import ArmRun
from p2pcodistill.simulation.arms.steps import count_steps
from p2pcodistill.simulation.arms.weights import (
    buffers_of,
    gradients_of,
    num_bytes,
    put,
    rounded,
    set_gradients,
    weights_of,
)
from p2pcodistill.simulation.arms.workers import make_workers
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.training_events import StepMeasured


def run(arm: ArmRun) -> None:
    """See `run.ArmModule`."""
    precision = arm.config.precision or "float32"
    workers = make_workers(arm, has_lead=False)
    tell = _told_in_rounds(arm.tell(), len(workers))
    server = arm.learner(arm.sites[0], is_lead=True, tell=tell, **_stretched(arm.training, len(workers)))
    server.name, server.traffic_of = "server", (server, *workers)
    common = weights_of(server.model)
    fetched_at: dict[int, int] = {}
    losses: dict[int, Tensor] = {}
    # A heap of (virtual seconds, worker): when it begins, or its gradient arrives.
    due: list[tuple[float, int]] = []
    sum_staleness = 0

    def fetch_and_compute(index: int) -> None:
        worker = workers[index]
        put(rounded(common, precision), weights_of(worker.model))
        server.send(num_bytes(common, precision), worker)
        fetched_at[index] = server.num_steps
        losses[index] = worker.compute_gradient()
        heapq.heappush(due, (worker.now_s, index))

    server.training.begin()
    for index, worker in enumerate(workers):
        worker.now_s = _start_s(arm, index, len(workers))
        heapq.heappush(due, (worker.now_s, index))
    while server.training.is_under_way:
        server.now_s, index = heapq.heappop(due)
        if index not in losses:
            fetch_and_compute(index)
            continue
        worker = workers[index]
        gradients = gradients_of(worker.model)
        worker.send(num_bytes(gradients, precision), server)
        set_gradients(rounded(gradients, precision), server.model)
        put(buffers_of(worker.model), buffers_of(server.model))
        server.training.count_loss(losses[index])
        sum_staleness += server.num_steps - fetched_at[index]
        server.training.update()
        server.metrics["mean_staleness_updates"] = sum_staleness / server.num_steps
        server.training.conclude_step()
        if server.training.is_under_way:
            fetch_and_compute(index)
    server.training.end()


def _start_s(arm: ArmRun, index: int, num_workers: int) -> float:
    """When a worker begins: they come one after the other, evenly over the ramp."""
    ramp_s = (arm.config.worker_ramp_steps or 0) * arm.scenario.virtual.step_time_s
    return ramp_s * index / max(1, num_workers - 1)


def _stretched(training: TrainingConfig, num_updates: int) -> dict[str, Any]:
    """The same schedules and intervals where a round is so many updates."""
    counts = ("num_steps", "warmup_steps", "evaluation_interval_steps", "report_interval_steps")
    changes = ("learning_rate_drops", "weight_decay_changes")
    return {
        **{name: getattr(training, name) * num_updates for name in counts},
        **{
            name: tuple((step * num_updates, value) for step, value in getattr(training, name))
            for name in changes
        },
        "checkpoint_interval_steps": training.num_steps * num_updates,
        "average_decay": training.average_decay ** (1 / num_updates) if training.average_decay else 0.0,
    }


def _told_in_rounds(tell: Tell, num_updates: int) -> Tell:
    def tell_rounds(time_s: float, event: Event) -> None:
        event = count_steps(event, lambda step: step // num_updates)
        if isinstance(event, StepMeasured):
            event = dataclasses.replace(event, steps_per_s=event.steps_per_s / num_updates)
        tell(time_s, event)

    return tell_rounds
