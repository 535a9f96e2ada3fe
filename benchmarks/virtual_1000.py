"""A thousand sites in virtual time, without training: what it costs, how that grows, and how knowledge spreads.

Each run is made in a process of its own, whose peak memory is its own. `python -m benchmarks.virtual_1000 RUN` makes one.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time

from benchmarks.figure import print_figure
from p2pcodistill.simulation.links import neighbour_pairs
from p2pcodistill.simulation.shaping import LinkShape
from p2pcodistill.simulation.virtual.synthetic import SyntheticModel, SyntheticSchedule
from p2pcodistill.simulation.virtual.synthetic_run import SyntheticRun
from p2pcodistill.topology.build import build_topology, default_members
from p2pcodistill.topology.statistics import diameter, distances_from

MODEL = SyntheticModel.of(1_000_000)
SCHEDULE = SyntheticSchedule(num_versions=50, interval_steps=50, step_time_s=0.08, first_step=50)
LINK = LinkShape(bandwidth_mbit=100, latency_ms=30)
LARGE = ("exponential:1000", "ring:1000", "random-regular:1000,4,0")
SMALL = "exponential:10"
SPREAD = (
    "ring:24",
    "line:12",
    "star:9",
    "torus:5x6",
    "hypercube:6",
    "exponential:48",
    "random-regular:40,3,0",
    "tree:2,4",
)
MAX_S = 120.0
MAX_MIB = 4096.0
MAX_GROWTH = 2.0
_WHAT = f"one core, a model of a million parameters, {SCHEDULE.num_versions} versions each, links of 100 Mbit/s and 30 ms"


def make_run(spec: str) -> SyntheticRun:
    """A run over the members that `spec` speaks of."""
    members = default_members(spec)
    assert members is not None
    topology = build_topology(spec, members)
    shapes = dict.fromkeys(neighbour_pairs(topology), (LINK, LINK))
    return SyntheticRun(topology, MODEL, SCHEDULE, shapes=shapes)


def measure(spec: str) -> None:
    """Run it, and print what it came to."""
    start_s = time.process_time()
    run = make_run(spec)
    run.run()
    duration_s = time.process_time() - start_s
    print(
        json.dumps(
            {
                "seconds": duration_s,
                "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
                "is_complete": run.is_complete,
                "num_deliveries": run.num_deliveries,
                "num_events": run.network.clock.num_events,
                "virtual_s": run.network.clock.now_s,
                "mean_staleness_steps": run.staleness.mean_steps,
                "gigabytes": sum(link.num_bytes for link in run.bytes_by_link().values()) / 1e9,
                "everyone_knows_everyone_s": run.spread.complete_s,
            }
        )
    )


def spread_matches(spec: str) -> bool:
    """Whether what each origin knew reached everyone by as many exchanges as the graph's distances say."""
    run = make_run(spec)
    run.run()
    topology = run.network.topology
    return run.is_complete and all(
        {origin: 0} | {site: arrival.num_hops for site, arrival in run.spread.arrivals(origin).items()}
        == distances_from(topology, origin)
        and all(
            arrival.num_hops == int(arrival.time_s / (SCHEDULE.interval_steps * SCHEDULE.step_time_s))
            for arrival in run.spread.arrivals(origin).values()
        )
        for origin in topology.members
    )


def main() -> None:
    """Print the figures."""
    cost_us = {}
    for spec in (SMALL, *LARGE):
        command = [sys.executable, "-m", "benchmarks.virtual_1000", spec]
        result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        cost_us[spec] = 1e6 * result["seconds"] / result["num_deliveries"]
        if spec == SMALL:
            continue
        holds = result["seconds"] <= MAX_S and result["peak_mib"] <= MAX_MIB and result["is_complete"]
        print_figure(
            "virtual_1000_s",
            round(result.pop("seconds"), 1),
            "seconds of one core",
            f"<= {MAX_S:g}, {MAX_MIB / 1024:g} GiB",
            holds=holds,
            on=_WHAT,
            topology=spec,
            microseconds_per_delivery=round(cost_us[spec], 1),
            **result,
        )
    growth = cost_us[LARGE[0]] / cost_us[SMALL]
    print_figure(
        "virtual_cost_growth",
        round(growth, 2),
        "seconds per delivered version at 1000 sites / at 10",
        f"<= {MAX_GROWTH:g}",
        holds=growth <= MAX_GROWTH,
        on=f"{_WHAT}, exponential graphs",
        microseconds_at_1000=round(cost_us[LARGE[0]], 1),
        microseconds_at_10=round(cost_us[SMALL], 1),
    )
    matches = {spec: spread_matches(spec) for spec in SPREAD}
    diameters = {}
    for spec in SPREAD:
        members = default_members(spec)
        assert members is not None
        diameters[spec] = diameter(build_topology(spec, members))
    print_figure(
        "spread_hops",
        sum(matches.values()),
        f"graphs of {len(SPREAD)} on which knowledge reaches every site by as many exchanges as its distance",
        f"== {len(SPREAD)}",
        holds=all(matches.values()),
        on="virtual time, every origin",
        diameters=diameters,
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure(sys.argv[1])
    else:
        main()
