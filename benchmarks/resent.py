"""`resent_bytes`: what is sent twice when the receiving node is killed in the middle of a transfer and started again.

The student fetches through the simulator's relay (100 Mbit/s, 40 ms round trip); when half of the frame has passed, its
node is killed (SIGKILL), and another one goes on in its run folder. What the relay carried beyond the frame itself was
sent twice, or is an envelope or control, which count as sent twice here. A window is 2.25 times what the link holds,
of which the chunk on its way is a part.
"""

from __future__ import annotations

import asyncio
import tempfile
from pathlib import Path

from benchmarks.bulk import events_of, linked_nodes, publish, wait_for
from benchmarks.figure import print_figure
from benchmarks.site_pair import SITES, start_node
from p2pcodistill.checkpoint.manifest import DEFAULT_CHUNK_BYTES
from p2pcodistill.simulation.shaping import LinkShape

NUM_BYTES = 64 << 20
SHAPE = LinkShape(bandwidth_mbit=100.0, latency_ms=20.0)
WINDOW_BYTES = int(2.25 * (100e6 / 8 * SHAPE.round_trip_s + DEFAULT_CHUNK_BYTES))


def main() -> None:
    """Measure and print the figure."""
    with tempfile.TemporaryDirectory() as name:
        asyncio.run(_measure(Path(name)))


async def _measure(folder: Path) -> None:
    student = SITES[1]
    async with linked_nodes(folder, NUM_BYTES, SHAPE) as (link, nodes):
        publish(folder, 1)
        await asyncio.to_thread(wait_for, lambda: link.num_bytes_forwarded >= NUM_BYTES // 2, "half")
        nodes[student].kill()
        nodes[student].wait()
        num_bytes_at_cut = link.num_bytes_forwarded
        nodes[student] = start_node(folder, student)
        [fetched] = await asyncio.to_thread(
            wait_for, lambda: events_of(folder / student, "frame-fetched"), "the rest"
        )
        num_bytes = link.num_bytes_forwarded
    num_resent_bytes = num_bytes - fetched["num_bytes"]
    print_figure(
        "resent_bytes",
        num_resent_bytes,
        "bytes",
        f"at most one window, {WINDOW_BYTES}",
        holds=num_resent_bytes <= WINDOW_BYTES,
        on=f"{NUM_BYTES >> 20} MiB through a relay of 100 Mbit/s and 40 ms round trip; the receiving node killed after "
        "half, and started again; envelopes and both directions' control count as sent twice",
        share_at_cut=round(num_bytes_at_cut / NUM_BYTES, 3),
    )


if __name__ == "__main__":
    main()
