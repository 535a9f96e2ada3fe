"""The links between the sites of one job: which are shaped and how, and the relays that do it for real processes."""

from __future__ import annotations

import zlib
from collections.abc import Collection, Iterator, Mapping

from p2pcodistill.simulation.faults import Partitions
from p2pcodistill.simulation.scenario import ScenarioConfig
from p2pcodistill.simulation.shaping import LinkShape, ShapedLink
from p2pcodistill.telemetry import LinkCarried
from p2pcodistill.topology.graph import Topology

PERFECT = LinkShape()


def neighbour_pairs(topology: Topology) -> Iterator[tuple[str, str]]:
    """Each two members that share an edge, once, in member order."""
    rank = {member: index for index, member in enumerate(topology.members)}
    for first in topology.members:
        for second in topology.neighbours_of(first):
            if rank[first] < rank[second]:
                yield first, second


def link_shapes(
    scenario: ScenarioConfig, topology: Topology
) -> dict[tuple[str, str], tuple[LinkShape, LinkShape]]:
    """How each pair of neighbours is connected: the shape from the first to the second, and back.

    What `[[links]]` says comes before what the topology's file says of an edge; a link that neither speaks of is perfect.
    """
    listed = {frozenset(link.between): LinkShape.from_config(link) for link in scenario.links}

    def shape(sender: str, receiver: str) -> LinkShape:
        if (own := listed.get(frozenset((sender, receiver)))) is not None:
            return own
        if (of_file := topology.links.get((sender, receiver))) is not None:
            return LinkShape(
                of_file.bandwidth_mbit, latency_ms=of_file.latency_ms, loss_ratio=of_file.loss_ratio
            )
        return PERFECT

    return {(a, b): (shape(a, b), shape(b, a)) for a, b in neighbour_pairs(topology)}


class JobLinks:
    """The relays of one job: one for each pair of neighbours whose link is not perfect, or that a partition separates.

    One side of such a pair dials the relay, the other is not told where its peer is: so both directions of all their
    connections share the one link. Open and close it once.
    """

    def __init__(
        self, scenario: ScenarioConfig, topology: Topology, listen_addresses: Mapping[str, str], *, seed: int
    ) -> None:
        self._partitions = Partitions()
        endangered = [fault.sites for fault in scenario.faults if fault.kind == "partition"]
        self._links = {
            (a, b): ShapedLink(
                listen_addresses[b], there, back=back, seed=zlib.crc32(f"{seed}/{a}/{b}".encode())
            )
            for (a, b), (there, back) in link_shapes(scenario, topology).items()
            if (there, back) != (PERFECT, PERFECT)
            or any((a in sites) != (b in sites) for sites in endangered)
        }
        self._dialled: dict[tuple[str, str], str | None] = {}

    async def open(self) -> None:
        """Begin to relay."""
        for (a, b), link in self._links.items():
            self._dialled[a, b] = await link.open()
            self._dialled[b, a] = None

    def address(self, dialler: str, peer: str, address: str) -> str | None:
        """Where `dialler` is told that `peer` listens, at `address` in truth; None: nowhere, it waits to be dialled."""
        return self._dialled.get((dialler, peer), address)

    def cut_off(self, sites: Collection[str]) -> None:
        """Cut `sites` off from all others."""
        self._partitions.cut_off(sites)
        self._apply_partitions()

    def heal(self, sites: Collection[str]) -> None:
        """Connect `sites` again."""
        self._partitions.heal(sites)
        self._apply_partitions()

    def _apply_partitions(self) -> None:
        for (a, b), link in self._links.items():
            if self._partitions.separate(a, b):
                link.block()
            else:
                link.unblock()

    def measure(self) -> list[LinkCarried]:
        """What each of the links carried so far."""
        return [
            LinkCarried([a, b], link.num_bytes_forwarded, link.num_cuts)
            for (a, b), link in self._links.items()
        ]

    async def close(self) -> None:
        """End all connections."""
        for link in self._links.values():
            await link.close()
