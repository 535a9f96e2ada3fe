"""Decentralised SGD (D-PSGD, Lian et al. 2017): local steps, then each site averages with its neighbours of the topology.

A site sends its model to its students. Of a graph that changes, each exchange uses the next one. Weights are those of
Metropolis and Hastings: on an undirected graph, and where all have equally many neighbours, the mean over all sites stays
what it is. Sites do not come to one model: each one's own is evaluated, not their mean.
"""

from __future__ import annotations

from p2pcodistill.simulation.arms.learner import Learner
from p2pcodistill.simulation.arms.rounds import learners_of, train_in_rounds
from p2pcodistill.simulation.arms.run import ArmRun
from p2pcodistill.simulation.arms.weights import num_bytes, put, rounded, weighted_mean, weights_of
from p2pcodistill.topology.graph import Topology


def run(arm: ArmRun) -> None:
    """See `run.ArmModule`."""
    precision = arm.config.precision or "float32"
    learners = {learner.name: learner for learner in learners_of(arm)}
    models = {name: weights_of(learner.model) for name, learner in learners.items()}

    def average(index: int) -> None:
        weights = {name: mixing_weights(arm.topology, name, index) for name in learners}
        _wait_for_neighbours(learners, weights)
        sent = {name: rounded(tensors, precision) for name, tensors in models.items()}
        mixed = {}
        for name, table in weights.items():
            own = 1 - sum(table.values())
            mixed[name] = weighted_mean(
                [models[name], *(sent[teacher] for teacher in table)], [own, *table.values()]
            )
            for teacher in table:
                learners[teacher].send(num_bytes(models[teacher], precision), learners[name])
        for name, tensors in mixed.items():
            put(tensors, models[name])

    train_in_rounds(arm, list(learners.values()), average)


def mixing_weights(topology: Topology, member: str, index: int) -> dict[str, float]:
    """{teacher: weight} in the average of `member` at exchange `index`; what is left of 1 is its own."""

    def degree(name: str) -> int:
        students = sum(name in topology.teachers_at(other, index) for other in topology.members)
        return max(students, len(topology.teachers_at(name, index)))

    return {
        teacher: 1 / (1 + max(degree(member), degree(teacher)))
        for teacher in topology.teachers_at(member, index)
    }


def _wait_for_neighbours(learners: dict[str, Learner], weights: dict[str, dict[str, float]]) -> None:
    """Each waits for those whose models it needs."""
    ready_s = {name: learner.now_s for name, learner in learners.items()}
    for name, table in weights.items():
        learners[name].now_s = max(ready_s[name], *(ready_s[teacher] for teacher in table), 0.0)
