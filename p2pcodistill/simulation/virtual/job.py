"""One job of a scenario in virtual time, in a process of its own: `python -m p2pcodistill.simulation.virtual.job`.

It leaves the same files as real nodes do (see `simulation.files`), but for the stores of frames: the logs tell the story
in virtual seconds from the job's start.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from p2pcodistill.errors import UserError
from p2pcodistill.group.lifeline import die_with_parent
from p2pcodistill.simulation.fault_config import FaultConfig
from p2pcodistill.simulation.faults import impostor_of, told
from p2pcodistill.simulation.files import (
    SCENARIO_FILE,
    NodeFiles,
    loopback,
    simulator_events,
    write_node_files,
)
from p2pcodistill.simulation.jobs import Job, make_jobs
from p2pcodistill.simulation.links import link_shapes, upload_caps
from p2pcodistill.simulation.machines import add_impostor, replace_machine
from p2pcodistill.simulation.scenario import ScenarioConfig, load_scenario
from p2pcodistill.simulation.virtual.logs import VirtualLogs
from p2pcodistill.simulation.virtual.run import VirtualSettings
from p2pcodistill.simulation.virtual.specs import spec_of
from p2pcodistill.simulation.virtual.step_time import StepTimes
from p2pcodistill.simulation.virtual.synthetic_job import run_synthetic_job
from p2pcodistill.telemetry.event import Event
from p2pcodistill.topology.build import build_topology

_FIRST_PORT = 5600
"""Nobody listens there: node files have to name some address."""


def main(arguments: Sequence[str]) -> int:
    """`arguments`: the process to die with, the run folder, the job's place in `make_jobs`, its number of threads.

    Exit status 0, or 2 with one line on standard error.
    """
    parent, folder, index, num_threads = arguments
    die_with_parent(int(parent))
    try:
        scenario = load_scenario(Path(folder, SCENARIO_FILE))
        job = replace(make_jobs(scenario)[int(index)], num_threads=int(num_threads))
        run_job(job, scenario, Path(folder))
    except UserError as error:
        print(f"p2pcodistill: {error}", file=sys.stderr)
        return 2
    return 0


def run_job(job: Job, scenario: ScenarioConfig, folder: Path) -> None:
    """Run all sites of `job`. `scenario` is the one in the run folder."""
    if scenario.synthetic is not None:
        run_synthetic_job(job, scenario, folder)
        return
    addresses = [loopback(_FIRST_PORT + index) for index in range(len(job.sites))]
    places = {place.site: place for place in write_node_files(job, scenario, folder, addresses=addresses)}
    for fault in scenario.faults if job.arm.kind == "codistilled" else ():
        if fault.kind == "impostor":
            for name in fault.sites:
                places[impostor_of(name)] = add_impostor(places[name], port=_FIRST_PORT + len(places))
    logs = VirtualLogs()
    try:
        if job.arm.of_kind.module is None:
            _train(job, scenario.of_arm(job.arm), folder, places, logs)
        else:
            _train_otherwise(job, scenario, folder, places, logs)
    finally:
        logs.flush()


def _train_otherwise(
    job: Job, scenario: ScenarioConfig, folder: Path, places: dict[str, NodeFiles], logs: VirtualLogs
) -> None:
    """An arm of which neither nodes nor copies of them are the parts."""
    import torch

    from p2pcodistill.simulation.arms.run import ArmRun, run_arm

    torch.set_num_threads(job.num_threads)
    run_arm(ArmRun(job, scenario, folder, places, logs))


def _train(
    job: Job, scenario: ScenarioConfig, folder: Path, places: dict[str, NodeFiles], logs: VirtualLogs
) -> None:
    import torch  # only where there is something to train

    from p2pcodistill.group.train import Join, Training, choose_device
    from p2pcodistill.simulation.copies import Copies

    class ReferenceStudent:
        """The reference loop, one update at a time."""

        def __init__(self, name: str, join: Join) -> None:
            spec = spec_of(places[name])
            clock = copies.network.clock
            device = choose_device(spec.group, num_local_ranks=1, local_rank=0)
            self._training = Training(spec, device, None, join=join, clock=lambda: clock.now_s)
            self._training.begin()

        def update(self) -> bool:
            """See `copies.Student`."""
            if self._training.is_under_way:
                self._training.advance()
            if self._training.is_under_way:
                return True
            self._training.end()
            return False

    torch.set_num_threads(job.num_threads)
    topology = build_topology(scenario.topology, [site.name for site in job.sites])
    is_codistilled = job.arm.kind == "codistilled"
    simulator_path = simulator_events(job, folder)

    offsets_s = dict.fromkeys(places, 0.0)

    def note_fault(time_s: float, fault: FaultConfig) -> None:
        for name in fault.sites:
            ranks = copies.network.sites[name].ranks
            step = ranks.num_steps if ranks is not None else 0
            logs.write(simulator_path, time_s, told(fault, name, step))
            if fault.offset_s is not None:
                offsets_s[name] = fault.offset_s

    def note_event(time_s: float, site: str, event: Event) -> None:
        logs.write(places[site].events, time_s + offsets_s[site], event)

    copies = Copies(
        topology,
        ReferenceStudent,
        codistillation=scenario.codistillation,
        frames=scenario.frames,
        step_time_s=StepTimes(scenario.virtual, seed=job.seed, num_workers=job.arm.num_workers or 1),
        teacher_time_ratio=scenario.virtual.teacher_time_ratio,
        name=job.run,
        settings=VirtualSettings(
            seed=job.seed,
            fault_poll_s=scenario.virtual.step_time_s,
            caps=upload_caps(scenario, topology) if is_codistilled else {},
        ),
        shapes=link_shapes(scenario, topology) if is_codistilled else None,
        faults=scenario.faults if is_codistilled else (),
        on_event=note_event,
        on_fault=note_fault,
        forget=lambda name: replace_machine(places[name]),
    )
    copies.run()
    if is_codistilled:
        for link in copies.network.links.values():
            logs.write(simulator_path, copies.now_s, link.measure())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
