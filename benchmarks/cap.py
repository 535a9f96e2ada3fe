"""`cap_ratio`: what a site with a cap on its uploads sends over 30 s / the cap, counted on the wire, envelopes included.

Two nodes; the student dials the teacher through the simulator's relay, which limits nothing and counts both directions: what
comes back (wants and receipts) is too little to matter and counts against the cap.
"""

from __future__ import annotations

import asyncio
import tempfile
import time
from pathlib import Path

from benchmarks.bulk import linked_nodes, publish, wait_for
from benchmarks.figure import print_figure
from p2pcodistill.simulation.shaping import LinkShape

CAP_MBIT = 40.0
DURATION_S = 30.0
BOUNDS = (0.95, 1.02)
_CAP_BYTES_S = CAP_MBIT * 1e6 / 8
_NUM_BYTES = int(2 * DURATION_S * _CAP_BYTES_S)
_WARM_UP_BYTES = int(_CAP_BYTES_S)


def main() -> None:
    """Measure and print the figure."""
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(_measure(Path(name)))


async def _measure(folder: Path) -> None:
    settings = {"max_upload_mbit": CAP_MBIT}
    async with linked_nodes(folder, _NUM_BYTES, LinkShape(), settings) as (link, _):
        publish(folder, 1)
        await asyncio.to_thread(wait_for, lambda: link.num_bytes_forwarded >= _WARM_UP_BYTES, "a start")
        num_bytes_before, started_s = link.num_bytes_forwarded, time.monotonic()
        await asyncio.sleep(DURATION_S)
        num_bytes, seconds = link.num_bytes_forwarded - num_bytes_before, time.monotonic() - started_s
    value = round(num_bytes / seconds / _CAP_BYTES_S, 4)
    print_figure(
        "cap_ratio",
        value,
        "of the configured rate",
        f"within {BOUNDS[0]} to {BOUNDS[1]}",
        holds=BOUNDS[0] <= value <= BOUNDS[1],
        on=f"max_upload_mbit = {CAP_MBIT:g}, {DURATION_S:g} s of one transfer between two nodes, TCP payload",
    )


if __name__ == "__main__":
    main()
