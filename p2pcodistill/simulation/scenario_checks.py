"""What the parts of a scenario have to be to each other: named once, with data apart, linked along edges."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from p2pcodistill.errors import ConfigError
from p2pcodistill.simulation.link_config import LinkConfig
from p2pcodistill.task_configs import LanguageModelConfig
from p2pcodistill.tasks.entries import have_overlap
from p2pcodistill.tasks.preflight import require_apart
from p2pcodistill.topology.build import build_topology

if TYPE_CHECKING:
    from p2pcodistill.simulation.scenario import ScenarioConfig


def refuse_repetition(what: str, values: Sequence[object]) -> None:
    """Raise ConfigError where one of `values`, each of which is a `what`, is there twice."""
    for value in values:
        if values.count(value) > 1:
            raise ConfigError(f"the {what} {value!r} is listed twice")


def refuse_overlaps(scenario: ScenarioConfig) -> None:
    """Raise DataError where a site would train on held-out data, ConfigError where two have data in common that is said to
    be disjoint. Paths are absolute.
    """
    of_sites = [path for site in scenario.sites for path in site.data]
    unlabelled = scenario.task.unlabelled if isinstance(scenario.task, LanguageModelConfig) else ()
    require_apart([*scenario.data.paths, *of_sites, *unlabelled], scenario.data.held_out)
    if all((arm.sharing or scenario.data.sharing) != "disjoint" for arm in scenario.arms):
        return
    for one, other in itertools.combinations(scenario.sites, 2):
        for path, others in itertools.product(one.data, other.data):
            if have_overlap(path, others):
                inner = path if others.resolve() in path.resolve().parents else others
                raise ConfigError(
                    f"the sites {one.name!r} and {other.name!r} both have {inner}, "
                    'and their data is to be disjoint: give each its own, or set data.sharing to "same" or "first"'
                )


def check_edges(spec: str, sites: Sequence[str], links: Sequence[LinkConfig]) -> None:
    """Raise TopologyError for one that does not fit the sites, ConfigError for a link that is none of its edges."""
    topology = build_topology(spec, sites)
    for link in links:
        if link.between == "all":
            continue
        first, second = link.between
        if second not in topology.neighbours_of(first):
            raise ConfigError(
                f"there is a link between {first!r} and {second!r}, which share no edge of the topology "
                f"{spec!r}: remove it, or choose a topology that joins them"
            )
