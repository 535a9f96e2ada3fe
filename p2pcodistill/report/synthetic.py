"""A run without training: what became of its checkpoints, as the simulation hands it over and as `summary.json` tells it."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from rich import box
from rich.table import Table
from rich.text import Text

from p2pcodistill.report.edges import EdgeResult
from p2pcodistill.report.history import SiteHistory
from p2pcodistill.report.summary import Summary
from p2pcodistill.report.table import byte_count, number, percent

Curve: TypeAlias = list[list[float]]
"""Rows of a moment in seconds, and what was so then."""
_FIGURES = (
    "mean_staleness_steps",
    "up_to_date_ratio",
    "everyone_knows_everyone_s",
    "known_ratio",
    "delivered_ratio",
    "bytes_sent",
    "virtual_s",
)


@dataclass(frozen=True, slots=True)
class SyntheticSite:
    """One site in the end. `faults` are (kind, completed steps)."""

    name: str
    num_steps: int
    finished: bool
    num_node_starts: int
    faults: tuple[tuple[str, int], ...]
    num_bytes_sent: int

    def history(self) -> SiteHistory:
        """As much of a site's history as there is without training."""
        return SiteHistory(
            num_steps=self.num_steps,
            finished=self.finished,
            num_node_starts=self.num_node_starts,
            faults=list(self.faults),
            num_bytes_sent=self.num_bytes_sent,
        )


@dataclass(frozen=True, slots=True)
class SyntheticResult:
    """One run without training, under one seed. Seconds are virtual ones, sites and edges in member order.

    Staleness is in steps behind the newest checkpoint that the teacher has published; what a site *knows* is from whom
    something went into its checkpoints, over however many sites.
    """

    seed: int
    topology: str
    diameter: int | None
    """The longest of all shortest ways from teacher to student; None where there is a pair without a way."""
    num_steps: int
    step_time_s: float
    exchange_interval_steps: int
    virtual_s: float
    processor_s: float
    num_events: int
    """Callbacks of the clock."""
    num_deliveries: int
    """Versions that came to be in use at a student, each once a student."""
    num_due_deliveries: int
    """Versions that would have, had each teacher's student got every one."""
    num_bytes_fetched: int
    num_resent_bytes: int
    """Of frames, what was fetched more than once."""
    is_complete: bool
    """Whether every student has the last version of each of its teachers."""
    sites: tuple[SyntheticSite, ...]
    edges: tuple[EdgeResult, ...]
    seconds_at_staleness: tuple[tuple[int, float], ...]
    """How long edges were so many steps behind, all edges together."""
    staleness: Curve
    """(seconds, mean over edges, stalest edge)."""
    known: Curve
    """(seconds, share of the sites that know of an origin: mean over origins, slowest origin, quickest origin)."""
    known_ratio: float
    everyone_knows_everyone_s: float | None
    by_hops: tuple[tuple[int, int, float, float, float], ...]
    """(sites that first knowledge came over, pairs, seconds until the first, mean, last of them)."""
    arrivals_s: tuple[tuple[float | None, ...], ...] = ()
    """When each site (row) first knew of each origin (column), None: never; empty for many sites."""

    @property
    def mean_staleness_steps(self) -> float | None:
        """Mean over time and edges."""
        total_s = sum(seconds for _, seconds in self.seconds_at_staleness)
        return (
            sum(steps * seconds for steps, seconds in self.seconds_at_staleness) / total_s
            if total_s
            else None
        )

    @property
    def up_to_date_ratio(self) -> float | None:
        """Share of the time, over all edges, at which a student was less than an exchange behind."""
        total_s = sum(seconds for _, seconds in self.seconds_at_staleness)
        if not total_s:
            return None
        interval_steps = self.exchange_interval_steps
        return sum(s for steps, s in self.seconds_at_staleness if steps < interval_steps) / total_s

    @property
    def num_bytes_sent(self) -> int:
        """By all sites."""
        return sum(site.num_bytes_sent for site in self.sites)

    def to_json(self) -> str:
        """One object, to be read by `from_json`."""
        return json.dumps(dataclasses.asdict(self), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> SyntheticResult:
        """The inverse of `to_json`."""
        table: dict[str, Any] = json.loads(text)
        table["sites"] = tuple(
            SyntheticSite(**site | {"faults": tuple((kind, step) for kind, step in site["faults"])})
            for site in table["sites"]
        )
        table["edges"] = tuple(EdgeResult(**edge) for edge in table["edges"])
        for name in ("seconds_at_staleness", "by_hops", "arrivals_s"):
            table[name] = tuple(tuple(row) for row in table[name])
        return cls(**table)


def summarise_synthetic(scenario_name: str, results: Sequence[SyntheticResult]) -> Summary:
    """What `summary.json` holds of a scenario without training; `results` has one for each seed, at least one.

    The mean over seeds of each figure, None if it is None for one of them, and in `by_seed` those of each:

    - `mean_staleness_steps`: mean over time and edges; `up_to_date_ratio`: share of the time at which a student was less
      than an exchange behind its teacher.
    - `everyone_knows_everyone_s`: when something of every site had gone into every other's checkpoints; `known_ratio`: the
      share of all pairs for which it had in the end; `max_hops` and `diameter`: the longest way that first knowledge came,
      and the longest that the graph has.
    - `delivered_ratio`: versions that came to be in use at a student / all that its teachers published (the others were
      overtaken).
    - `bytes_sent`, `bytes_resent`: of all sites; `bytes_per_link`: least, median and most that a teacher's site sent to a
      student's.
    - `virtual_s`, `processor_s`: how long it took the sites, and this machine.
    """
    first = results[0]
    by_seed = [_figures(result) for result in results]
    return {
        "scenario": scenario_name,
        "topology": first.topology,
        "num_sites": len(first.sites),
        "num_edges": len(first.edges),
        "num_steps": first.num_steps,
        "seeds": [result.seed for result in results],
        **{name: _mean([figures[name] for figures in by_seed]) for name in _FIGURES},
        "by_seed": by_seed,
    }


def _figures(result: SyntheticResult) -> dict[str, Any]:
    per_link = sorted(edge.num_bytes for edge in result.edges) or [0]
    return {
        "seed": result.seed,
        "mean_staleness_steps": result.mean_staleness_steps,
        "up_to_date_ratio": result.up_to_date_ratio,
        "everyone_knows_everyone_s": result.everyone_knows_everyone_s,
        "known_ratio": result.known_ratio,
        "max_hops": max((row[0] for row in result.by_hops), default=0),
        "diameter": result.diameter,
        "delivered_ratio": result.num_deliveries / result.num_due_deliveries,
        "num_deliveries": result.num_deliveries,
        "bytes_sent": result.num_bytes_sent,
        "bytes_resent": result.num_resent_bytes,
        "bytes_per_link": {
            "least": per_link[0],
            "median": per_link[len(per_link) // 2],
            "most": per_link[-1],
        },
        "num_faults": sum(len(site.faults) for site in result.sites),
        "is_complete": result.is_complete,
        "virtual_s": result.virtual_s,
        "processor_s": result.processor_s,
        "num_events": result.num_events,
    }


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if len(known) == len(values) else None


def synthetic_headline(summary: Summary) -> str:
    """The outcome in a few plain sentences."""
    first = summary["by_seed"][0]
    sentences = []
    if summary["mean_staleness_steps"] is None:
        sentences.append("No student ever got a checkpoint of a teacher.")
    else:
        sentences.append(
            f"Teachers were {number(summary['mean_staleness_steps'], 1)} steps stale on average, and less than one exchange "
            f"for {percent(summary['up_to_date_ratio'])} of the time."
        )
    if summary["everyone_knows_everyone_s"] is not None:
        ways = "" if first["diameter"] is None else f" (the longest way of the graph is {first['diameter']})"
        sentences.append(
            f"Something of every site had reached every other after {seconds(summary['everyone_knows_everyone_s'])}, "
            f"over at most {first['max_hops']} sites{ways}."
        )
    else:
        sentences.append(
            f"In the end, {share(summary['known_ratio'])} of all pairs of sites knew of each other."
        )
    per_link = first["bytes_per_link"]
    sentences.append(
        f"Each link carried {byte_count(per_link['median'])} one way (median; "
        f"{byte_count(per_link['least'])} to {byte_count(per_link['most'])})."
    )
    if not all(seed["is_complete"] for seed in summary["by_seed"]):
        sentences.append("Not every student got the last version of each of its teachers.")
    if len(summary["seeds"]) > 1:
        sentences.append(f"Times and shares are means of {len(summary['seeds'])} seeds.")
    return " ".join(sentences)


def synthetic_table(summary: Summary) -> Table:
    """A line per seed, legible at 100 columns; the headline is the caption."""
    result = Table(
        title=f"{summary['scenario']}: {summary['num_sites']} sites, {summary['topology']}, {summary['num_steps']} steps",
        caption=Text(synthetic_headline(summary)),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
    )
    for heading in (
        "\nseed",
        "stale\nsteps",
        "up to\ndate",
        "all know\nall after",
        "over\nsites",
        "deli-\nvered",
        "of all\nversions",
        "\nsent",
        "sent\nagain",
        "virtual\ntime",
        "processor\ntime",
    ):
        result.add_column(heading, justify="right", no_wrap=True)
    for figures in summary["by_seed"]:
        known_s = figures["everyone_knows_everyone_s"]
        result.add_row(
            str(figures["seed"]),
            number(figures["mean_staleness_steps"], 1),
            percent(figures["up_to_date_ratio"]),
            f"{share(figures['known_ratio'])} know" if known_s is None else seconds(known_s),
            str(figures["max_hops"]),
            f"{figures['num_deliveries']:,}",
            percent(figures["delivered_ratio"]),
            byte_count(figures["bytes_sent"]),
            byte_count(figures["bytes_resent"]),
            seconds(figures["virtual_s"]),
            seconds(figures["processor_s"]),
        )
    return result


def share(ratio: float) -> str:
    """A share in percent, that is 100 % only where it is all."""
    return percent(ratio) if ratio == 1 or ratio < 0.99 else percent(min(ratio, 0.9999), 2)


def seconds(duration_s: float) -> str:
    """A time in the unit that suits it."""
    if duration_s < 120:
        return f"{duration_s:.1f} s"
    if duration_s < 7200:
        return f"{duration_s / 60:.1f} min"
    return f"{duration_s / 3600:.1f} h"


def states_of(sites: Sequence[SyntheticSite]) -> Mapping[str, SiteHistory]:
    """The sites' histories, for what shows the state of each."""
    return {site.name: site.history() for site in sites}
