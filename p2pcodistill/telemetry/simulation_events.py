"""What a simulation says of what it did to sites and links."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from p2pcodistill.telemetry.event import Event


@dataclass(frozen=True, slots=True)
class FaultInjected(Event):
    """A simulation did this to `site`, which had completed `step` steps as far as its events told.

    `kind` is that of the scenario's fault, `factor` how many times slower a slowed site is, `offset_s` by how much a clock
    is wrong from now on, `does` what a hostile site does.
    """

    name: ClassVar[str] = "fault-injected"
    site: str
    kind: str
    step: int
    factor: float | None = None
    offset_s: float | None = None
    does: str | None = None

    @property
    def ends_node(self) -> bool:
        """Whether the node that ran at the site is no more."""
        return self.kind in ("kill", "replace", "hostile")


@dataclass(frozen=True, slots=True)
class SyntheticMeasured(Event):
    """A simulation without training, as a whole, at `step` of each site: what has been exchanged by now.

    Staleness is that of all edges up to now, its mean over time; `known_ratio` is the share of all pairs of sites of which
    the one has learnt of the other; `num_deliveries` counts versions that came to be in use, each once a student.
    """

    name: ClassVar[str] = "synthetic-measured"
    step: int
    num_steps: int
    num_sites: int
    num_sites_up: int
    mean_staleness_steps: float | None
    max_staleness_steps: int
    known_ratio: float
    num_deliveries: int
    num_bytes_sent: int


@dataclass(frozen=True, slots=True)
class LinkCarried(Event):
    """What a simulated link between two `sites` carried in all, both directions, and how often it broke a connection."""

    name: ClassVar[str] = "link-carried"
    sites: list[str]
    num_bytes: int
    num_cuts: int
    num_swallowed: int = 0
    """What a black hole kept from arriving: pieces or payloads."""
