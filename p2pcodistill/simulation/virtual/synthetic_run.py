"""A whole run without training: a topology, synthetic checkpoints, and the figures of what became of them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from p2pcodistill.checkpoint.manifest import DEFAULT_CHUNK_BYTES
from p2pcodistill.gossip.protocol import DEFAULT_WINDOW_BYTES
from p2pcodistill.links import choose_chunk_bytes
from p2pcodistill.report.staleness import StalenessTracker
from p2pcodistill.simulation.fault_config import FaultConfig
from p2pcodistill.simulation.virtual.run import Shapes, VirtualRun, VirtualSettings
from p2pcodistill.simulation.virtual.spread import SpreadTracker
from p2pcodistill.simulation.virtual.surroundings import OnEvent
from p2pcodistill.simulation.virtual.synthetic import SyntheticModel, SyntheticRanks, SyntheticSchedule
from p2pcodistill.telemetry import node_events, simulation_events, training_events
from p2pcodistill.telemetry.event import Event as TelemetryEvent
from p2pcodistill.topology.graph import Topology

_PATIENCE_INTERVALS = 20
"""How long a run goes on after the last version should have been published, for stragglers."""
_GC_THRESHOLD = 100_000
"""Next to nothing of what a large run makes is garbage before its end: looking for it all the time would cost a sixth."""


def _least_chunk_bytes(topology: Topology, settings: VirtualSettings, shapes: Shapes) -> int:
    """The smallest chunks that any site makes of a small frame, for a student behind the thinnest link."""
    rates = [shape.bytes_per_s for both in shapes.values() for shape in both]
    for site, caps in settings.caps.items():
        rates += caps.link_bytes_s.values()
        if caps.site_bytes_s is not None:
            rates.append(caps.site_bytes_s / max(1, len(topology.students_of(site))))
    return choose_chunk_bytes(0, min((rate for rate in rates if rate is not None), default=None))


@dataclass(frozen=True, slots=True)
class LinkBytes:
    """What one direction of a link was given to carry, and the most that waited for it."""

    num_bytes: int
    max_bytes_queued: int


class SyntheticRun:
    """A run of `topology` in which every site publishes as `schedule` says; for one use.

    It is over when every student has the last version of each of its teachers. `settings` are those of a `VirtualRun`, with
    sizes as on the links: `chunk_bytes` and `window_bytes` are scaled down here, as far as the model allows.
    """

    def __init__(
        self,
        topology: Topology,
        model: SyntheticModel,
        schedule: SyntheticSchedule,
        *,
        settings: VirtualSettings | None = None,
        shapes: Shapes | None = None,
        faults: Sequence[FaultConfig] = (),
        keep_curves: bool = False,
        on_event: OnEvent | None = None,
        on_fault: Callable[[float, FaultConfig], None] = lambda _time_s, _fault: None,
    ) -> None:
        settings = settings or VirtualSettings(
            chunk_bytes=DEFAULT_CHUNK_BYTES, window_bytes=DEFAULT_WINDOW_BYTES
        )
        shortest_bytes = (
            settings.chunk_bytes * _least_chunk_bytes(topology, settings, shapes or {}) // DEFAULT_CHUNK_BYTES
        )
        scale = model.scale_for(len(topology.members), chunk_bytes=shortest_bytes)
        self.staleness = StalenessTracker(keep_curves=keep_curves)
        self.spread = SpreadTracker(topology.members)
        self.num_deliveries = 0
        """Versions that came to be in use at a student."""
        self.num_bytes_fetched = 0
        self.num_resent_bytes = 0
        self._on_event, self._on_fault = on_event, on_fault
        self._schedule = schedule
        self._last_step = schedule.first_step + (schedule.num_versions - 1) * schedule.interval_steps
        # As (teacher, student); a set, for a site that is started again takes up what it has once more.
        self._edges_left = {
            (teacher, member) for member in topology.members for teacher in topology.teachers_of(member)
        }
        self.network = VirtualRun(
            topology,
            settings=replace(
                settings,
                bytes_scale=scale,
                chunk_bytes=settings.chunk_bytes // scale,
                window_bytes=settings.window_bytes // scale,
                fault_poll_s=schedule.step_time_s,
            ),
            shapes=shapes,
            faults=faults,
            on_event=self._note,
            on_fault=self._note_fault,
        )
        sites, impostors = self.network.sites.values(), self.network.impostors.values()
        for site in (*sites, *impostors):
            site.ranks = SyntheticRanks(
                site,
                topology.members,
                topology.schedule_of(site.name),
                model,
                schedule,
                self.network.clock,
                bytes_scale=scale,
                on_knowledge=None if site in impostors else self.spread.update,
            )

    def run(self, until_s: float | None = None) -> None:
        """Let it happen, until `until_s` at most. Raises RuntimeError for a fault that never happened."""
        if until_s is None:
            num_steps = self._last_step + _PATIENCE_INTERVALS * self._schedule.interval_steps
            until_s = num_steps * self._schedule.step_time_s
        thresholds = gc.get_threshold()
        gc.set_threshold(_GC_THRESHOLD, *thresholds[1:])
        try:
            self.network.run(until_s, is_over=lambda: not self._edges_left)
        finally:
            gc.set_threshold(*thresholds)
        self.staleness.close(self.network.clock.now_s)

    @property
    def is_complete(self) -> bool:
        """Whether every student has the last version of each of its teachers."""
        return not self._edges_left

    def bytes_by_link(self) -> dict[tuple[str, str], LinkBytes]:
        """Of each direction of each link, as (sender, receiver)."""
        carried = {}
        for ends, link in self.network.links.items():
            for sender, receiver in (ends, ends[::-1]):
                wire = link.wire_from(sender)
                carried[sender, receiver] = LinkBytes(wire.num_bytes_sent, wire.max_bytes_queued)
        return carried

    def _note_fault(self, time_s: float, fault: FaultConfig) -> None:
        for site in fault.sites:
            self.staleness.update(time_s, site, simulation_events.FaultInjected(site, fault.kind, 0))
        self._on_fault(time_s, fault)

    def _note(self, time_s: float, site: str, event: TelemetryEvent) -> None:
        if isinstance(event, node_events.FrameFetched):
            self.num_bytes_fetched += event.num_bytes
            self.num_resent_bytes += event.num_resent_bytes
        elif not isinstance(event, node_events.VersionAnnounced):  # these two are by far the most
            self.staleness.update(time_s, site, event)
            if isinstance(event, training_events.TeacherSwapped):
                self.num_deliveries += 1
                if event.teacher_step == self._last_step:
                    self._edges_left.discard((event.teacher, site))
        if self._on_event is not None:
            self._on_event(time_s, site, event)
