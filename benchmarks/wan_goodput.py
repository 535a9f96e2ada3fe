"""`wan_goodput_ratio`: a frame over a thin, far link that is reset every 30 s; useful bytes / what the link could carry.

Two nodes; the student dials the teacher through the simulator's relay: 20 Mbit/s each way, 100 ms one way, all TCP
connections reset every 30 s. The clock runs from the moment the student begins to fetch the frame until it is verified and
stored.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from benchmarks.bulk import events_of, linked_nodes, publish, wait_for
from benchmarks.figure import print_figure
from benchmarks.site_pair import SITES
from p2pcodistill.simulation.shaping import LinkShape

SHAPE = LinkShape(bandwidth_mbit=20.0, latency_ms=100.0, reset_interval_s=30.0)
MIN_S = 90.0
MIN_RATIO = 0.85
_CAPACITY_BYTES_S = 20e6 / 8
NUM_BYTES = int(1.1 * MIN_S * _CAPACITY_BYTES_S * MIN_RATIO)
"""Takes longer than MIN_S if the bound is met narrowly, or missed; a better ratio is measured over a little less."""


def main() -> None:
    """Measure and print the figure."""
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(_measure(Path(name)))


async def _measure(folder: Path) -> None:
    async with linked_nodes(folder, NUM_BYTES, SHAPE) as (link, _):
        fetched = await asyncio.to_thread(_fetch, folder)
        cpu_s = time.process_time()
    losses = events_of(folder / SITES[1], "link-measured")[-1]["num_connection_losses"]
    value = round(NUM_BYTES / fetched["duration_s"] / _CAPACITY_BYTES_S, 3)
    print_figure(
        "wan_goodput_ratio",
        value,
        "of the link's capacity",
        f"at least {MIN_RATIO}",
        holds=value >= MIN_RATIO,
        on=f"{NUM_BYTES / 1e6:.0f} MB between two nodes through a relay of 20 Mbit/s and 200 ms round trip that resets all "
        "connections every 30 s",
        duration_s=round(fetched["duration_s"], 1),
        num_resets=link.num_cuts,
        num_sessions_lost=losses,
        num_resent_bytes=fetched["num_resent_bytes"],
        relay_cpu_s=round(cpu_s, 1),
    )


def _fetch(folder: Path) -> dict[str, float]:
    publish(folder, 1)
    fetched = wait_for(
        lambda: events_of(folder / SITES[1], "frame-fetched"), "the frame is fetched", timeout_s=600.0
    )
    return dict(fetched[0])


if __name__ == "__main__":
    main()
