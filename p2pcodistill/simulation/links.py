"""The links between the sites of one job: which are shaped and how, and the relays that do it for real processes."""

from __future__ import annotations

import asyncio
import socket
import zlib
from collections.abc import Collection, Iterator, Mapping
from functools import partial

from p2pcodistill.simulation.fault_config import CUTS, FaultConfig
from p2pcodistill.simulation.faults import Partitions
from p2pcodistill.simulation.namespaces import Rates, SiteNetwork
from p2pcodistill.simulation.scenario import ScenarioConfig
from p2pcodistill.simulation.shaping import LinkShape, ShapedLink
from p2pcodistill.telemetry.simulation_events import LinkCarried
from p2pcodistill.topology.graph import Topology
from p2pcodistill.transport.shaper import BYTES_PER_MBIT, UploadCaps

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

    What `[[links]]` says of the two comes before what the topology's file says of an edge, and that before what it says of
    all; a link that none of them speaks of is perfect.
    """
    listed = {
        frozenset(link.between): LinkShape.from_config(link)
        for link in scenario.links
        if link.between != "all"
    }
    of_all = next((LinkShape.from_config(link) for link in scenario.links if link.between == "all"), PERFECT)

    def shape(sender: str, receiver: str) -> LinkShape:
        if (own := listed.get(frozenset((sender, receiver)))) is not None:
            return own
        if (of_file := topology.links.get((sender, receiver))) is not None:
            return LinkShape(
                of_file.bandwidth_mbit, latency_ms=of_file.latency_ms, loss_ratio=of_file.loss_ratio
            )
        return of_all

    return {(a, b): (shape(a, b), shape(b, a)) for a, b in neighbour_pairs(topology)}


def upload_caps(scenario: ScenarioConfig, topology: Topology) -> dict[str, UploadCaps]:
    """What the nodes of the sites may send, of those that may not send what they can: as their node files say."""
    caps = {}
    for site in scenario.sites:
        if site.name not in topology.members:
            continue
        of_links = {
            peer: BYTES_PER_MBIT * mbit
            for peer in topology.neighbours_of(site.name)
            if (mbit := scenario.max_upload_mbit(site.name, peer)) is not None
        }
        mbit = site.max_upload_mbit
        if of_links or mbit is not None:
            caps[site.name] = UploadCaps(None if mbit is None else BYTES_PER_MBIT * mbit, of_links)
    return caps


def _has_only_bandwidth(shape: LinkShape) -> bool:
    return shape == LinkShape(shape.bandwidth_mbit)


class JobLinks:
    """The relays of one job: one for each pair of neighbours whose link is not perfect, or that a fault separates.

    One side of such a pair dials the relay, the other is not told where its peer is: so both directions of all their
    connections share the one link. Open and close it once.
    """

    def __init__(
        self,
        scenario: ScenarioConfig,
        topology: Topology,
        listen_addresses: Mapping[str, str],
        *,
        seed: int,
        network: SiteNetwork | None = None,
    ) -> None:
        """`network`: the sites are in namespaces, which take over links that have no more to them than a bandwidth."""
        self._network = network
        self._rates: dict[tuple[str, str], Rates] = {}
        self._cuts = {kind: Partitions() for kind in CUTS}
        endangered = Partitions()
        for fault in scenario.faults:
            if fault.kind in CUTS:
                endangered.cut_off(fault.sites, fault.from_sites)
        self._links: dict[tuple[str, str], ShapedLink] = {}
        for (a, b), (there, back) in link_shapes(scenario, topology).items():
            is_calm = not endangered.separate(a, b)
            if network is not None and is_calm and _has_only_bandwidth(there) and _has_only_bandwidth(back):
                self._rates[a, b] = there.bandwidth_mbit, back.bandwidth_mbit
            elif (there, back) != (PERFECT, PERFECT) or not is_calm:
                self._links[a, b] = ShapedLink(
                    listen_addresses[b],
                    there,
                    back=back,
                    seed=zlib.crc32(f"{seed}/{a}/{b}".encode()),
                    make_near=socket.socket if network is None else partial(network.make_socket, a),
                    make_far=socket.socket if network is None else partial(network.make_socket, b),
                )
        self._dialled: dict[tuple[str, str], str | None] = {}

    async def open(self) -> None:
        """Begin to relay. Raises NamespaceError where the sites' network cannot be made."""
        if self._network is not None:
            await asyncio.to_thread(self._network.open, self._rates)
        for (a, b), link in self._links.items():
            self._dialled[a, b] = await link.open()
            self._dialled[b, a] = None

    def address(self, dialler: str, peer: str, address: str) -> str | None:
        """Where `dialler` is told that `peer` listens, at `address` in truth; None: nowhere, it waits to be dialled."""
        return self._dialled.get((dialler, peer), address)

    def separate(self, fault: FaultConfig) -> None:
        """Have a `partition` or `black-hole` begin."""
        self._cuts[fault.kind].cut_off(fault.sites, fault.from_sites)
        self._apply_cuts()

    def heal(self, sites: Collection[str]) -> None:
        """Connect `sites` again."""
        for cuts in self._cuts.values():
            cuts.heal(sites)
        self._apply_cuts()

    def _apply_cuts(self) -> None:
        for (a, b), link in self._links.items():
            if self._cuts["partition"].separate(a, b):
                link.block()
            else:
                link.unblock()
            link.black_hole(self._cuts["black-hole"].separate(a, b))

    def measure(self) -> list[LinkCarried]:
        """What each of the links carried so far; of those in namespaces, what they had carried when these were closed."""
        carried = [
            LinkCarried([a, b], link.num_bytes_forwarded, link.num_cuts, link.num_swallowed)
            for (a, b), link in self._links.items()
        ]
        if self._network is not None:
            carried += [
                LinkCarried(list(ends), num_bytes, 0) for ends, num_bytes in self._network.carried.items()
            ]
        return carried

    async def close(self) -> None:
        """End all connections."""
        try:
            for link in self._links.values():
                await link.close()
        finally:
            if self._network is not None:
                self._network.close()
