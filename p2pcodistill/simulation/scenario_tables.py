"""The tables of a scenario file that say something of simulations only: sites, data, virtual time, the report."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from p2pcodistill.simulation.arm_config import Sharing
from p2pcodistill.strict import NonNegativeFloat, PositiveFloat, PositiveInt, SiteName, StrictModel


class SiteConfig(StrictModel):
    """A site of the simulation."""

    name: SiteName
    data: tuple[Path, ...] = ()
    """Files or folders with this site's own text. Either every site lists some or none does; with none, `[data]` is split
    between the sites."""
    max_upload_mbit: PositiveFloat | None = None
    """What its node sends to all peers together at most, as in a node's file; left out: no cap."""


class DataConfig(StrictModel):
    """The data that the sites learn from, and how much of it."""

    paths: tuple[Path, ...] = ()
    """Files or folders, split into held-out data and one share a site; empty: the data that the task brings along (of the
    language model, the sources of the Python standard library)."""
    held_out: tuple[Path, ...] = ()
    """Files or folders that every site of every arm is evaluated on; empty: a part of `paths`."""
    sharing: Sharing = "disjoint"
    """`disjoint`: each site has a part of its own. `same`: each has the data of all sites, in an order of its own."""
    shard_by: Literal["hash", "path"] = "hash"
    """How files of text are dealt to sites: `hash`: at random, all alike; `path`: each site has folders of its own, unlike
    those of others."""
    max_bytes_per_site: PositiveInt = 500_000
    """Text, for the language model; of other tasks, `task.max_examples` limits what a site trains on."""
    max_held_out_bytes: PositiveInt = 32_768
    """Held-out text, for the language model."""
    vocabulary_size: PositiveInt | None = None
    """Train so many word pieces on the text of all sites, for the language model; none: `task.vocabulary`, or bytes."""
    unlabelled: bool = False
    """Split off one share of text more, which arms that set `task.unlabelled_batch_size` distil on without its labels."""


class VirtualConfig(StrictModel):
    """What virtual time is made of, where `mode` is `virtual`."""

    step_time_s: PositiveFloat = 0.1
    """Virtual seconds that an update takes; where there is a tail, in the median (lognormal) or at least (exponential)."""
    step_time_tail: Literal["none", "lognormal", "exponential"] = "none"
    """How the durations of updates are spread. Each update of each worker draws its own; of several, the slowest counts."""
    step_time_spread: PositiveFloat = 0.5
    """Of the tail. `lognormal`: standard deviation of the duration's logarithm. `exponential`: mean of what a duration is
    above the least one, as a share of that."""
    teacher_time_ratio: NonNegativeFloat = 1 / 3
    """By which share of its duration each teacher's forward pass makes an update longer; 0: not at all, as on a GPU that has
    room for it (Anil et al. 2018)."""


class ReportConfig(StrictModel):
    """How the result is presented."""

    title: str | None = None
    """Heading of the live view and of the report; the scenario's name by default."""
    curves: tuple[Literal["steps", "seconds", "bytes"], ...] = ()
    """Over what the arms' held-out losses are drawn side by side: the mean of each arm's sites and seeds."""
    bars: tuple[Literal["final-loss", "churn", "calibration-error", "diversity"], ...] = ()
    """Of which measures the arms get a bar each."""
