"""One job of a scenario in virtual time, in a process of its own: `python -m p2pcodistill.simulation.virtual.job`.

It leaves the same files as real nodes do (see `simulation.files`), but for the stores of frames: the logs tell the story
in virtual seconds from the job's start.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from p2pcodistill.config import GroupSpec, NodeConfig, load_toml, parse_model
from p2pcodistill.errors import UserError
from p2pcodistill.group.lifeline import die_with_parent
from p2pcodistill.simulation.files import (
    SCENARIO_FILE,
    NodeFiles,
    simulator_events,
    write_node_files,
)
from p2pcodistill.simulation.jobs import Job, make_jobs
from p2pcodistill.simulation.links import link_shapes
from p2pcodistill.simulation.scenario import FaultConfig, ScenarioConfig, load_scenario
from p2pcodistill.simulation.virtual.logs import VirtualLogs
from p2pcodistill.simulation.virtual.run import VirtualSettings
from p2pcodistill.telemetry import Event, FaultInjected, LinkCarried
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
    ports = [_FIRST_PORT + index for index in range(len(job.sites))]
    places = {place.site: place for place in write_node_files(job, scenario, folder, ports=ports)}
    logs = VirtualLogs()
    try:
        _train(job, scenario, folder, places, logs)
    finally:
        logs.flush()


def _train(
    job: Job, scenario: ScenarioConfig, folder: Path, places: dict[str, NodeFiles], logs: VirtualLogs
) -> None:
    import torch  # only where there is something to train

    from p2pcodistill.group.train import Join, Training
    from p2pcodistill.simulation.copies import Copies

    class ReferenceStudent:
        """The reference loop, one update at a time."""

        def __init__(self, name: str, join: Join) -> None:
            spec = _spec(places[name])
            clock = copies.network.clock
            self._training = Training(spec, torch.device("cpu"), None, join=join, clock=lambda: clock.now_s)
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

    def note_fault(time_s: float, fault: FaultConfig) -> None:
        for name in fault.sites:
            ranks = copies.network.sites[name].ranks
            step = ranks.num_steps if ranks is not None else 0
            logs.write(simulator_path, time_s, FaultInjected(name, fault.kind, step, fault.factor))

    def note_event(time_s: float, site: str, event: Event) -> None:
        logs.write(places[site].events, time_s, event)

    copies = Copies(
        topology,
        ReferenceStudent,
        codistillation=scenario.codistillation_of(job.arm),
        frames=scenario.frames_of(job.arm),
        step_time_s=scenario.virtual.step_time_s,
        name=job.run,
        settings=VirtualSettings(seed=job.seed, fault_poll_s=scenario.virtual.step_time_s),
        shapes=link_shapes(scenario, topology) if is_codistilled else None,
        faults=scenario.faults if is_codistilled else (),
        on_event=note_event,
        on_fault=note_fault,
    )
    copies.run()
    if is_codistilled:
        for ends, link in copies.network.links.items():
            num_bytes = sum(link.wire_from(site).num_bytes_sent for site in ends)
            logs.write(simulator_path, copies.now_s, LinkCarried(list(ends), num_bytes, link.faults.num_cuts))


def _spec(place: NodeFiles) -> GroupSpec:
    """What the node of this file would tell its ranks, as far as one rank without a node is concerned."""
    config = parse_model(NodeConfig, load_toml(place.node_file), source=str(place.node_file))
    folder = place.run_folder
    training_folder = folder / "training"
    training_folder.mkdir(exist_ok=True)
    return GroupSpec(
        site=config.name,
        link_address="",
        link_token="",
        outbox_folder=folder,
        training_folder=training_folder,
        model_path=folder / "model.safetensors",
        error_path=folder / "group-error.txt",
        teachers=({},),  # the exchange is not that of a node
        num_students=0,
        shard_index=0,
        num_shards=1,
        group=config.group,
        task=config.task.located_in(place.node_file.parent),
        training=config.training.of_site(config.name),
        codistillation=config.codistillation,
        frames=config.frames,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
