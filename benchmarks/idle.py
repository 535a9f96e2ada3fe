"""`idle_core_ratio`: what nodes cost that have nothing to do: eight on a ring, connected, no exchange under way.

The largest share of a core that any of the node processes takes, over half a minute. Their workers wait, uncounted.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.bulk import events_of, wait_for
from benchmarks.figure import print_figure
from benchmarks.site_pair import SITES, running_nodes, write_node_files

NUM_SITES = 8
DURATION_S = 30.0
MAX_RATIO = 0.03
_SETTLE_S = 5.0


def main() -> None:
    """Measure and print the figure."""
    sites = (*SITES, *(f"site-{index}" for index in range(NUM_SITES - len(SITES))))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_node_files(folder, "benchmarks.bulk", {"topology": "ring"}, sites=sites)
        with running_nodes(folder, sites) as nodes:
            for site in sites:
                wait_for((folder / f"{site}-joined").exists, f"the worker of {site} has joined")
                wait_for(
                    lambda s=site: len(events_of(folder / s, "peer-connected")) >= 2, f"{site} has peers"
                )
            time.sleep(_SETTLE_S)
            processes = [psutil.Process(node.pid) for node in nodes.values()]
            before_s = [_cpu_s(process) for process in processes]
            time.sleep(DURATION_S)
            ratios = [
                (_cpu_s(process) - s) / DURATION_S for process, s in zip(processes, before_s, strict=True)
            ]
    value = round(max(ratios), 4)
    print_figure(
        "idle_core_ratio",
        value,
        "of a core, the busiest node",
        f"at most {MAX_RATIO}",
        holds=value <= MAX_RATIO,
        on=f"{NUM_SITES} nodes on a ring on loopback, {DURATION_S:g} s",
        ratios=[round(ratio, 4) for ratio in ratios],
    )


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


if __name__ == "__main__":
    main()
