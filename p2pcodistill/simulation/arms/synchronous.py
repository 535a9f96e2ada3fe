"""Synchronous SGD: one model, the mean of all workers' gradients in each step, and everyone waits for the slowest.

Gradients travel by a ring all-reduce. Buffers, such as running means, are those of the first worker.
"""

from __future__ import annotations

from p2pcodistill.simulation.arms.learner import wait_for_each_other
from p2pcodistill.simulation.arms.run import ArmRun
from p2pcodistill.simulation.arms.weights import (
    count_all_reduce,
    gradients_of,
    mean,
    num_bytes,
    put,
    rounded,
    set_gradients,
    weights_of,
)
from p2pcodistill.simulation.arms.workers import make_workers


def run(arm: ArmRun) -> None:
    """See `run.ArmModule`."""
    precision = arm.config.precision or "float32"
    workers = make_workers(arm, has_lead=True)
    lead, *others = workers
    lead.traffic_of = workers
    common = weights_of(lead.model)
    for other in others:
        put(common, weights_of(other.model))
    lead.training.begin()
    for _ in range(arm.training.num_steps):
        for worker in workers:
            worker.compute_gradient()
        wait_for_each_other(workers)
        gradients = [gradients_of(worker.model) for worker in workers]
        count_all_reduce(workers, num_bytes(gradients[0], precision))
        set_gradients(mean([rounded(tensors, precision) for tensors in gradients]), lead.model)
        lead.training.update()
        for other in others:
            put(common, weights_of(other.model))
        lead.training.conclude_step()
    lead.training.end()
