"""One job of a scenario without training: its run, told in a few events while it goes on, and its result."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt

from p2pcodistill.errors import GroupError
from p2pcodistill.report.edges import EdgeResult, sample_staleness
from p2pcodistill.report.synthetic import Curve, SyntheticResult, SyntheticSite
from p2pcodistill.simulation.fault_config import FaultConfig
from p2pcodistill.simulation.faults import told
from p2pcodistill.simulation.files import node_files, simulator_events
from p2pcodistill.simulation.jobs import Job
from p2pcodistill.simulation.links import link_shapes, upload_caps
from p2pcodistill.simulation.scenario import ScenarioConfig
from p2pcodistill.simulation.synthetic_config import RESULT_FILE, SyntheticConfig
from p2pcodistill.simulation.virtual.logs import VirtualLogs
from p2pcodistill.simulation.virtual.run import VirtualSettings
from p2pcodistill.simulation.virtual.spread import SpreadTracker
from p2pcodistill.simulation.virtual.synthetic import SyntheticModel, SyntheticSchedule
from p2pcodistill.simulation.virtual.synthetic_run import SyntheticRun
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.node_events import NodeStarted
from p2pcodistill.telemetry.simulation_events import SyntheticMeasured
from p2pcodistill.telemetry.training_events import TeacherSwapped, TrainingEnded
from p2pcodistill.topology.build import build_topology
from p2pcodistill.topology.graph import Topology
from p2pcodistill.topology.statistics import diameter

MAX_SITES_IN_DETAIL = 40
"""With more, the result does not say of each pair of sites when the one knew of the other."""
_NUM_MEASUREMENTS = 100
_NUM_TIMES = 200


def run_synthetic_job(job: Job, scenario: ScenarioConfig, folder: Path) -> None:
    """Run `job`, and leave its result and events in the run folder. Raises GroupError for a fault that never happened."""
    synthetic = scenario.synthetic
    assert synthetic is not None
    logs = VirtualLogs()
    try:
        run = _SyntheticJob(job, scenario, synthetic, folder, logs)
        (folder / job.run / RESULT_FILE).write_text(run.run().to_json())
    finally:
        logs.flush()


class _SyntheticJob:
    def __init__(
        self,
        job: Job,
        scenario: ScenarioConfig,
        synthetic: SyntheticConfig,
        folder: Path,
        logs: VirtualLogs,
    ) -> None:
        self._job, self._synthetic, self._logs = job, synthetic, logs
        self._step_time_s = scenario.virtual.step_time_s
        self._simulator_path = simulator_events(job, folder)
        self._logs_of: dict[str, Path] = {}
        if synthetic.event_logs:
            for place in node_files(job, folder):
                place.run_folder.mkdir(parents=True)
                self._logs_of[place.site] = place.events
        self._topology = build_topology(scenario.topology, scenario.site_names)
        self._num_starts = dict.fromkeys(scenario.site_names, 0)
        self._finished: set[str] = set()
        self._newest: dict[tuple[str, str], tuple[int, int]] = {}  # that each student has had of each teacher
        self._num_deliveries = 0
        self._faults: dict[str, list[tuple[str, int]]] = {name: [] for name in scenario.site_names}
        self._run = SyntheticRun(
            self._topology,
            model_of(synthetic),
            SyntheticSchedule(
                synthetic.num_versions,
                synthetic.exchange_interval_steps,
                self._step_time_s,
                first_step=synthetic.first_step,
            ),
            settings=VirtualSettings(seed=job.seed, caps=upload_caps(scenario, self._topology)),
            shapes=link_shapes(scenario, self._topology),
            faults=scenario.faults,
            keep_curves=True,
            on_event=self._note_event,
            on_fault=self._note_fault,
        )

    def run(self) -> SyntheticResult:
        """All of it."""
        begun_s = time.process_time()
        interval_s = self._synthetic.num_steps * self._step_time_s / _NUM_MEASUREMENTS
        self._run.network.clock.call_later(interval_s, self._measure, interval_s)
        try:
            self._run.run()
        except RuntimeError as error:  # a fault that never happened
            raise GroupError(f"{error}: choose an earlier moment") from None
        network = self._run.network
        for link in network.links.values():
            self._write(network.clock.now_s, link.measure())
        return self._result(time.process_time() - begun_s)

    # --- what happens --------------------------------------------------------------------------------------------------

    def _write(self, time_s: float, event: Event) -> None:
        self._logs.write(self._simulator_path, time_s, event)

    def _note_event(self, time_s: float, site: str, event: Event) -> None:
        if isinstance(event, NodeStarted):
            self._num_starts[site] += 1
        elif isinstance(event, TrainingEnded):
            self._finished.add(site)
        elif isinstance(event, TeacherSwapped):
            version = event.incarnation, event.teacher_step
            if version > self._newest.get((event.teacher, site), (0, -1)):
                self._newest[event.teacher, site] = version
                self._num_deliveries += 1
        if (path := self._logs_of.get(site)) is not None:
            self._logs.write(path, time_s, event)

    def _note_fault(self, time_s: float, fault: FaultConfig) -> None:
        for name in fault.sites:
            ranks = self._run.network.sites[name].ranks
            step = ranks.num_steps if ranks is not None else 0
            self._faults[name].append((fault.kind, step))
            self._write(time_s, told(fault, name, step))

    def _measure(self, interval_s: float) -> None:
        """Tell how far the run is, and do so again: for the live view."""
        run, clock = self._run, self._run.network.clock
        self._write(
            clock.now_s,
            SyntheticMeasured(
                step=min(self._synthetic.num_steps, round(clock.now_s / self._step_time_s)),
                num_steps=self._synthetic.num_steps,
                num_sites=len(self._topology.members),
                num_sites_up=sum(site.is_up for site in run.network.sites.values()),
                mean_staleness_steps=run.staleness.mean_steps,
                max_staleness_steps=max(run.staleness.seconds_at, default=0),
                known_ratio=run.spread.known_ratio,
                num_deliveries=self._num_deliveries,
                num_bytes_sent=sum(
                    link.wire_from(site).num_bytes_sent
                    for link in run.network.links.values()
                    for site in link.ends
                ),
            ),
        )
        self._logs.flush()
        clock.call_later(interval_s, self._measure, interval_s)

    # --- what came of it -----------------------------------------------------------------------------------------------

    def _result(self, processor_s: float) -> SyntheticResult:
        run, members = self._run, self._topology.members
        carried = run.bytes_by_link()
        sent = dict.fromkeys(members, 0)
        for (sender, _), link in carried.items():
            sent[sender] += link.num_bytes
        spread, end_s = run.spread, run.network.clock.now_s
        return SyntheticResult(
            seed=self._job.seed,
            topology=Path(self._topology.source).name,
            diameter=diameter(self._topology),
            num_steps=self._synthetic.num_steps,
            step_time_s=self._step_time_s,
            exchange_interval_steps=self._synthetic.exchange_interval_steps,
            virtual_s=end_s,
            processor_s=processor_s,
            num_events=run.network.clock.num_events,
            num_deliveries=self._num_deliveries,
            num_due_deliveries=self._synthetic.num_versions
            * sum(len(self._topology.teachers_of(member)) for member in members),
            num_bytes_fetched=run.num_bytes_fetched,
            num_resent_bytes=run.num_resent_bytes,
            is_complete=run.is_complete,
            sites=tuple(self._site(name, sent[name]) for name in members),
            edges=_edges(run, self._topology, {ends: link.num_bytes for ends, link in carried.items()}),
            seconds_at_staleness=tuple(sorted(run.staleness.seconds_at.items())),
            staleness=[list(row) for row in sample_staleness(run.staleness, 0.0, end_s, _NUM_TIMES)],
            known=known_over_time(spread, end_s),
            known_ratio=spread.known_ratio,
            everyone_knows_everyone_s=spread.complete_s,
            by_hops=_by_hops(spread),
            arrivals_s=_arrivals(spread) if len(members) <= MAX_SITES_IN_DETAIL else (),
        )

    def _site(self, name: str, num_bytes_sent: int) -> SyntheticSite:
        ranks = self._run.network.sites[name].ranks
        return SyntheticSite(
            name,
            min(ranks.num_steps, self._synthetic.num_steps) if ranks is not None else 0,
            name in self._finished,
            self._num_starts[name],
            tuple(self._faults[name]),
            num_bytes_sent,
        )


def model_of(synthetic: SyntheticConfig) -> SyntheticModel:
    """The sizes that the table gives."""
    model = SyntheticModel.of(
        synthetic.num_parameters,
        keyframe_ratio=synthetic.keyframe_ratio,
        delta_ratio=synthetic.delta_ratio,
    )
    return SyntheticModel(
        model.num_fp16_bytes,
        synthetic.keyframe_bytes or model.keyframe_bytes,
        synthetic.delta_bytes or model.delta_bytes,
    )


def _edges(
    run: SyntheticRun, topology: Topology, num_bytes: Mapping[tuple[str, str], int]
) -> tuple[EdgeResult, ...]:
    """All edges of the topology, also those along which nothing ever came."""
    edges = []
    for student in topology.members:
        for teacher in topology.teachers_of(student):
            used = run.staleness.edges.get((teacher, student))
            edges.append(
                EdgeResult(
                    teacher,
                    student,
                    num_bytes[teacher, student],
                    used.num_versions if used else 0,
                    used.mean_steps if used else 0.0,
                    max((steps for _, steps in used.curve), default=0) if used else 0,
                )
            )
    return tuple(edges)


def known_over_time(spread: SpreadTracker, end_s: float) -> Curve:
    """(seconds, share of the sites that know of an origin by then: mean over origins, slowest origin, quickest origin)."""
    times_s = np.linspace(0.0, end_s, _NUM_TIMES + 1)
    arrivals_s = np.sort(spread.times_s, axis=0)[1:]  # without the origin itself, which comes first
    shares: npt.NDArray[np.float64] = np.stack(
        [np.searchsorted(column, times_s, side="right") for column in arrivals_s.T]
    ) / len(arrivals_s)
    rows = zip(times_s, shares.mean(axis=0), shares.min(axis=0), shares.max(axis=0), strict=True)
    return [[float(value) for value in row] for row in rows]


def _by_hops(spread: SpreadTracker) -> tuple[tuple[int, int, float, float, float], ...]:
    times_s, hops = spread.times_s, spread.hops
    is_known = np.isfinite(times_s) & ~np.eye(len(times_s), dtype=np.bool_)
    rows = []
    for num_hops in np.unique(hops[is_known]):
        came_s = times_s[is_known & (hops == num_hops)]
        rows.append(
            (int(num_hops), len(came_s), float(came_s.min()), float(came_s.mean()), float(came_s.max()))
        )
    return tuple(rows)


def _arrivals(spread: SpreadTracker) -> tuple[tuple[float | None, ...], ...]:
    return tuple(
        tuple(float(time_s) if np.isfinite(time_s) else None for time_s in row) for row in spread.times_s
    )
