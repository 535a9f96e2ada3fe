"""A run in virtual time: sites, the links between them, and what goes wrong when.

Everything happens in one thread, in an order that the seed decides: two runs with the same arguments report the same events.
What the groups do is up to the caller, who gives every site its `ranks` before the run.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from p2pcodistill.checkpoint.manifest import (
    DEFAULT_CHUNK_BYTES,
    Manifest,
    SignedManifest,
    sign_manifest,
    verify_manifest,
)
from p2pcodistill.gossip.membership import members_digest
from p2pcodistill.gossip.messages import PROTOCOL_VERSION, Hello
from p2pcodistill.gossip.protocol import DEFAULT_PING_INTERVAL_S, DEFAULT_WINDOW_BYTES
from p2pcodistill.identity import Identity, PublicIdentity
from p2pcodistill.simulation.fault_config import CUTS, FaultConfig
from p2pcodistill.simulation.faults import FaultSchedule, Partitions, joiners
from p2pcodistill.simulation.hostile import HostileSite
from p2pcodistill.simulation.links import PERFECT, neighbour_pairs
from p2pcodistill.simulation.shaping import LinkShape
from p2pcodistill.simulation.virtual.clock import VirtualClock
from p2pcodistill.simulation.virtual.hostile import HostileEndpoint
from p2pcodistill.simulation.virtual.links import VirtualLink
from p2pcodistill.simulation.virtual.site import VirtualSite
from p2pcodistill.simulation.virtual.surroundings import TICK_S, TRAFFIC_INTERVAL_S, OnEvent, Surroundings
from p2pcodistill.topology.graph import Topology
from p2pcodistill.transport.shaper import UploadCaps

DEFAULT_FAULT_POLL_S = 0.1
_MAX_VERIFIED = 20_000

Shapes = Mapping[tuple[str, str], tuple[LinkShape, LinkShape]]
"""Of the link between two sites, in either order: what it carries from the first to the second, and back."""


@dataclass(frozen=True, slots=True)
class VirtualSettings:
    """How a run is simulated.

    `bytes_scale`: each byte of a frame in memory stands for so many on the links and in events.
    """

    seed: int = 0
    bytes_scale: int = 1
    chunk_bytes: int = DEFAULT_CHUNK_BYTES
    """Of a chunk in memory."""
    window_bytes: int = DEFAULT_WINDOW_BYTES
    """In memory, too."""
    tick_s: float = TICK_S
    ping_interval_s: float = DEFAULT_PING_INTERVAL_S
    traffic_interval_s: float | None = TRAFFIC_INTERVAL_S
    """None: traffic is measured once, in the end."""
    fault_poll_s: float = DEFAULT_FAULT_POLL_S
    """How often a fault that waits for a step is looked at."""
    caps: Mapping[str, UploadCaps] = field(default_factory=dict)
    """The sites whose uploads are capped."""


class VirtualRun:
    """The sites of `topology` in virtual time, and the links along its edges.

    `shapes` has the links that are not perfect. `on_event` gets all that the sites report, `on_fault` each of `faults` when
    it happens.
    """

    def __init__(
        self,
        topology: Topology,
        *,
        name: str = "run",
        settings: VirtualSettings | None = None,
        shapes: Shapes | None = None,
        faults: Sequence[FaultConfig] = (),
        on_event: OnEvent = lambda _time_s, _site, _event: None,
        on_fault: Callable[[float, FaultConfig], None] = lambda _time_s, _fault: None,
    ) -> None:
        self.settings = settings = settings or VirtualSettings()
        self.topology = topology
        self.clock = VirtualClock()
        self._on_fault = on_fault
        self._schedule = FaultSchedule(faults)
        self._absent = joiners(faults)
        self._cuts = {kind: Partitions() for kind in CUTS}
        self._is_cut = {kind: dict[tuple[str, str], None]() for kind in CUTS}
        self._max_steps: dict[str, int] = {}
        self._identities = identities = {
            member: seeded_identity(settings.seed, member) for member in topology.members
        }
        members = {member: identity.public for member, identity in identities.items()}
        memo = VerifyMemo()
        self._around = around = Surroundings(
            run=name,
            clock=self.clock,
            members=members,
            members_digest=members_digest(members),
            topology_digest=topology.digest,
            students_of={member: topology.students_of(member) for member in topology.members},
            on_event=on_event,
            bytes_scale=settings.bytes_scale,
            chunk_bytes=settings.chunk_bytes,
            window_bytes=settings.window_bytes,
            tick_s=settings.tick_s,
            ping_interval_s=settings.ping_interval_s,
            sign=memo.sign,
            verify=memo,
            traffic_interval_s=settings.traffic_interval_s,
            caps=settings.caps,
        )
        self.sites = {member: self._site(member, around) for member in topology.members}
        unheard = replace(around, on_event=lambda _time_s, _site, _event: None)
        self.impostors = {
            member: self._site(member, unheard)
            for fault in faults
            if fault.kind == "impostor"
            for member in fault.sites
        }
        """The second machine with the identity of each of these sites, whose events are not reported."""
        self.hostile: dict[str, HostileEndpoint] = {}
        """What speaks in the place of a site that has turned bad."""
        self.links: dict[tuple[str, str], VirtualLink] = {}
        """By its two ends, in member order."""
        for a, b in neighbour_pairs(topology):
            self._join(a, b, shapes or {})

    def run(self, until_s: float, *, is_over: Callable[[], bool] | None = None) -> None:
        """Start the sites, let time pass until `until_s` or until it `is_over`, and let the sites say their last words.

        Raises RuntimeError for a fault that has not happened by then.
        """
        for member, site in self.sites.items():
            if member not in self._absent:
                site.start()
        if self._schedule.pending:
            self._look_for_faults()
        self.clock.run(until_s, is_over=is_over)
        for site in self.sites.values():
            site.end()
        if pending := self._schedule.pending:
            raise RuntimeError(
                f"the fault {pending[0].kind!r} of {', '.join(pending[0].sites)} never happened"
            )

    def link_between(self, a: str, b: str) -> VirtualLink:
        """The link between two neighbours. Raises KeyError if they are none."""
        return self.links[(a, b) if (a, b) in self.links else (b, a)]

    def apply(self, fault: FaultConfig) -> None:
        """Have something go wrong, or be mended, now."""
        self._on_fault(self.clock.now_s, fault)
        match fault.kind:
            case "partition" | "black-hole":
                self._cuts[fault.kind].cut_off(fault.sites, fault.from_sites)
                self._separate()
            case "heal":
                for cuts in self._cuts.values():
                    cuts.heal(fault.sites)
                self._separate()
            case _:
                for name in fault.sites:
                    self._befall(self.sites[name], fault)

    # --- inside ------------------------------------------------------------------------------------------------------

    def _site(self, name: str, around: Surroundings) -> VirtualSite:
        teachers, students = self.topology.teachers_of(name), self.topology.students_of(name)
        return VirtualSite(name, self._identities[name], tuple(teachers), tuple(students), around)

    def _join(self, a: str, b: str, shapes: Shapes) -> None:
        if (b, a) in shapes:
            shape = shapes[b, a][::-1]
        else:
            shape = shapes.get((a, b), (PERFECT, PERFECT))
        link = VirtualLink(self.clock, (a, b), shape, seed=f"{self.settings.seed}")
        self.links[a, b] = link
        for machines in (self.sites, self.impostors):
            for name, peer in ((a, b), (b, a)):
                if name in machines:
                    machines[name].links[peer] = link

    def _befall(self, site: VirtualSite, fault: FaultConfig) -> None:
        match fault.kind:
            case "kill" | "leave" if site.name in self.hostile:
                self.hostile.pop(site.name).end()
            case "kill":
                site.kill()
            case "leave":
                site.leave()
            case "restart" | "join":
                site.start()
            case "replace":
                if site.name in self.hostile:
                    self.hostile.pop(site.name).end()
                site.kill()
                site.forget()
                site.start()
            case "impostor":
                self.impostors[site.name].start()
            case "hostile":
                self._turn(site, fault)
            case "slow-down":
                assert fault.factor is not None and site.ranks is not None
                site.ranks.slow_down(fault.factor)
            case "corrupt":
                assert site.ranks is not None
                site.ranks.corrupt()

    def _turn(self, site: VirtualSite, fault: FaultConfig) -> None:
        """The site does nothing any more but what the fault says."""
        assert fault.does is not None
        if site.name in self.hostile:
            self.hostile.pop(site.name).end()
        site.kill()
        around, own = self._around, site.store.frames(site.name)
        hostile = HostileSite(
            site.name,
            self._identities[site.name],
            fault.does,
            hello=Hello(
                PROTOCOL_VERSION,
                around.run,
                around.members_digest,
                around.topology_digest,
                site.store.incarnation,
                0,
            ),
            newest=own[-1].signed if own else None,
            others=[member for member in self.topology.members if member != site.name],
            seed=self.settings.seed,
        )
        self.hostile[site.name] = HostileEndpoint(site.name, hostile, site.links, self.clock)
        self.hostile[site.name].start()

    def _separate(self) -> None:
        for ends, link in self.links.items():
            for kind, cuts in self._cuts.items():
                is_cut, is_separated = ends in self._is_cut[kind], cuts.separate(*ends)
                if is_separated == is_cut:
                    continue
                if is_separated:
                    self._is_cut[kind][ends] = None
                else:
                    del self._is_cut[kind][ends]
                if kind == "black-hole":
                    link.darken(is_separated)
                elif is_separated:
                    link.block()
                else:
                    link.unblock()

    def _look_for_faults(self) -> None:
        for name, site in self.sites.items():
            if site.ranks is not None:
                self._max_steps[name] = max(self._max_steps.get(name, 0), site.ranks.num_steps)
        now_s = self.clock.now_s
        while (fault := self._schedule.pop_due(now_s, self._max_steps)) is not None:
            self.apply(fault)
        pending = self._schedule.pending
        if not pending:
            return
        next_s = self._schedule.next_s
        waits_for_step = any(fault.at_step is not None for fault in pending)
        if next_s is None or waits_for_step or next_s <= now_s:  # the last: it waits for another of its sites
            polled_s = now_s + self.settings.fault_poll_s
            next_s = polled_s if next_s is None or next_s <= now_s else min(next_s, polled_s)
        self.clock.call_at(next_s, self._look_for_faults)


class VerifyMemo:
    """`verify_manifest` for many sites in one process: what one of them has signed or verified under a key, no other has to
    verify."""

    def __init__(self) -> None:
        self._verified: dict[tuple[bytes, bytes, bytes], SignedManifest] = {}

    def __call__(self, body: bytes, signature: bytes, public: PublicIdentity) -> SignedManifest:
        """See `checkpoint.manifest.verify_manifest`. What does not verify is tried anew each time."""
        key = body, signature, public.signing_key
        known = self._verified.get(key)
        if known is None:
            known = verify_manifest(body, signature, public)
            self._keep(known, public)
        return known

    def sign(self, manifest: Manifest, identity: Identity) -> SignedManifest:
        """See `checkpoint.manifest.sign_manifest`."""
        signed = sign_manifest(manifest, identity)
        self._keep(signed, identity.public)
        return signed

    def _keep(self, signed: SignedManifest, public: PublicIdentity) -> None:
        self._verified[signed.body, signed.signature, public.signing_key] = signed
        if len(self._verified) > _MAX_VERIFIED:
            del self._verified[next(iter(self._verified))]


def seeded_identity(seed: int, name: str) -> Identity:
    """The same keys for the same seed and name. Worth nothing as a secret."""
    secrets = [
        hashlib.sha256(f"p2pcodistill-virtual/{use}/{seed}/{name}".encode()).digest()
        for use in ("sign", "curve")
    ]
    return Identity.from_secrets(*secrets)
