"""The kinds of arms that there are: which sites one has, which keys, and where it is run.

A kind with a module of its own is simulated in one process, in virtual time: `arms.run` imports the module, late, for it
trains. The others are nodes, or the copies of them that `simulation.copies` makes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

POOLED_SITE = "pooled"
"""The site of a kind that has one for all data."""


@dataclass(frozen=True, slots=True)
class ArmKind:
    """What is particular to a kind.

    `sites`: `together`, all sites in one job; `apart`, each in a job of its own; `one`, a single site with all data.
    """

    sites: Literal["together", "apart", "one"]
    keys: frozenset[str] = frozenset()
    """Of an arm of this kind, beside those that all arms have."""
    module: str | None = None
    """In `simulation.arms`."""
    starts_alike: bool = False
    """Whether its sites start from the same model, unless the arm says otherwise."""


KINDS = {
    "codistilled": ArmKind(
        "together", frozenset({"codistillation", "frames", "topology", "links", "num_workers"})
    ),
    "alone": ArmKind("apart", frozenset({"num_workers"})),
    "pooled": ArmKind("one", frozenset({"num_workers"})),
    "synchronous": ArmKind("one", frozenset({"num_workers", "precision"}), "synchronous"),
    "asynchronous": ArmKind(
        "one", frozenset({"num_workers", "precision", "worker_ramp_steps"}), "asynchronous"
    ),
    "ensemble": ArmKind("one", frozenset({"num_members"}), "ensemble"),
    "two-phase": ArmKind(
        "one", frozenset({"num_members", "teacher_steps", "codistillation", "frames"}), "two_phase"
    ),
    "fedavg": ArmKind("together", frozenset({"interval_steps", "precision"}), "fedavg", starts_alike=True),
    "diloco": ArmKind(
        "together",
        frozenset({"interval_steps", "precision", "outer_learning_rate", "outer_momentum"}),
        "diloco",
        starts_alike=True,
    ),
    "gossip-averaging": ArmKind(
        "together",
        frozenset({"interval_steps", "precision", "topology"}),
        "gossip_averaging",
        starts_alike=True,
    ),
}
