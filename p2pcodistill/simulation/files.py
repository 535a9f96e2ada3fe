"""What a simulation writes before it starts anything: its run folder, the text of the sites, a file for each node.

<run root>/<scenario>-<time>/
  scenario.toml              the scenario as it ran, with every default; can be simulated again
  topology.<suffix>          the graph file, if the scenario names one; of several topology-2.<suffix> and so on
  data/held-out.txt          what every site of every arm is evaluated on
  data/<site>.txt            what the site trains on
  data/vocabulary.json       the word pieces of all sites, if they use some
  data/unlabelled.txt        text without labels, if arms may distil on such
  <arm>-seed<k>/nodes/       <site>.toml and <site>.key, with which `p2pcodistill node` runs the site
  <arm>-seed<k>/<site>/      the run folder of the node
  <arm>-seed<k>/pooled/workers/  the members or workers of an arm that has one site for all
  <arm>-seed<k>/simulator.jsonl  what was done to sites and links, as events
  search/, search.json       of a scenario that searches: its trials, in a run folder of their own, and the choice
  run.json, jobs.json        what it is made with and how it was begun; which of its jobs have finished
  lock                       held (flock) by the living simulation
  summary.json, report.html  the result
<run root>/latest            symbolic link to the newest of these
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any, TypeAlias

import tomli_w

from p2pcodistill.checkpoint.durable import write_durably
from p2pcodistill.config import NodeConfig, PeerConfig
from p2pcodistill.errors import RunFolderError
from p2pcodistill.identity import Identity
from p2pcodistill.simulation.data import ScenarioData, task_of_site
from p2pcodistill.simulation.jobs import Job, SiteRun, seeded_training
from p2pcodistill.simulation.scenario import (
    ARM_SECTIONS,
    DATA_KEYS_OF_TEXT,
    DECIDED_BY_SIMULATION,
    ScenarioConfig,
)
from p2pcodistill.simulation.synthetic_config import TRAINING_TABLES
from p2pcodistill.topology.build import files_of, map_files

LATEST_LINK = "latest"
SCENARIO_FILE = "scenario.toml"
_SIMULATOR_EVENTS_FILE = "simulator.jsonl"
_LOOPBACK = "127.0.0.1"

Dialled: TypeAlias = Callable[[str, str, str], str | None]
"""(site, peer, address at which the peer listens) -> address that the site is told, None for none."""


@dataclass(frozen=True, slots=True)
class NodeFiles:
    """Where one node finds its configuration and puts what it makes."""

    site: str
    node_file: Path
    run_folder: Path

    @property
    def events(self) -> Path:
        """The node's event log."""
        return self.run_folder / "events.jsonl"

    @property
    def log(self) -> Path:
        """What the node prints."""
        return self.run_folder / "node.log"


# --- the run folder ----------------------------------------------------------------------------------------------


def create_run_folder(run_root: Path, name: str, now: datetime) -> Path:
    """Make `<run_root>/<name>-<now>`, or with a number behind it where that exists. Raises RunFolderError."""
    stem = f"{name}-{now:%Y%m%d-%H%M%S}"
    number = 1
    try:
        run_root.mkdir(parents=True, exist_ok=True)
        while True:
            folder = run_root / (stem if number == 1 else f"{stem}-{number}")
            try:
                folder.mkdir()
            except FileExistsError:
                number += 1
            else:
                return folder
    except OSError as error:
        raise RunFolderError(f"cannot make a run folder in {run_root}: {error.strerror}") from None


def point_latest(folder: Path) -> None:
    """Have `latest`, beside `folder`, point to it; replaced atomically. Raises RunFolderError."""
    link = folder.parent / LATEST_LINK
    staged = folder.parent / f".{LATEST_LINK}-{os.getpid()}"
    try:
        staged.symlink_to(folder.name)
        staged.replace(link)
    except OSError as error:
        staged.unlink(missing_ok=True)
        raise RunFolderError(
            f"cannot make the link {link}: {error.strerror}; move what is there away"
        ) from None


def find_run_folder(run: Path, run_root: Path) -> Path:
    """The folder `run` of a simulation that was begun; `latest` is the newest below `run_root`. Raises RunFolderError."""
    folder = run_root / LATEST_LINK if run == Path(LATEST_LINK) else run
    if folder.is_symlink():  # told by its own name: the link will point to another
        folder = folder.parent / folder.readlink()
    if not folder.is_dir():
        raise RunFolderError(f"there is no run folder {folder}: name one of those in {run_root}")
    if not (folder / SCENARIO_FILE).exists():
        raise RunFolderError(
            f"{folder} has no {SCENARIO_FILE}: no simulation began there; run the scenario anew"
        )
    return folder


def write_scenario(scenario: ScenarioConfig, data: ScenarioData, folder: Path) -> ScenarioConfig:
    """Write the scenario and its data into the run folder; returns the scenario that runs from there.

    Topology files are copied, so that the folder says all there is to the run. The scenario comes last: where it is, all is.
    """
    copies: dict[str, str] = {}
    for path in dict.fromkeys(path for spec in scenario.topologies() for path in files_of(spec)):
        number = f"-{len(copies) + 1}" if copies else ""
        copies[path] = f"topology{number}{Path(path).suffix}"
        shutil.copyfile(path, folder / copies[path])
    data.write(folder)
    scenario = scenario.with_topology_files(lambda path: str(folder / copies[path]))
    rewrite_scenario(scenario, folder)
    return scenario


def rewrite_scenario(scenario: ScenarioConfig, folder: Path) -> None:
    """Put `scenario`, whose topology files lie in `folder`, in the place of the one that is there, if any."""
    as_written = scenario.with_topology_files(lambda path: Path(path).name)
    write_durably(folder / SCENARIO_FILE, scenario_toml(as_written).encode())


def scenario_toml(scenario: ScenarioConfig) -> str:
    """A scenario file that means the same as `scenario`, with every default written out that it does not decide itself."""
    table = scenario.model_dump(mode="json", exclude_none=True)
    for section, key in DECIDED_BY_SIMULATION:
        table[section].pop(key, None)
    if scenario.task.name != "language-model":
        for key in DATA_KEYS_OF_TEXT:
            table["data"].pop(key, None)
    for arm, entry in zip(scenario.arms, table["arms"], strict=True):
        for section in ARM_SECTIONS:
            if (own := getattr(arm, section)) is not None:  # only what it sets otherwise than the scenario
                entry[section] = own.model_dump(mode="json", exclude_unset=True)
        for section in ("training", "task"):
            if not entry[section]:
                del entry[section]
    if "num_threads" not in scenario.group.model_fields_set:
        del table["group"]["num_threads"]
    if scenario.mode != "virtual":
        del table["virtual"]
    if scenario.num_sites is not None:
        del table["sites"]
    if scenario.synthetic is not None:
        for key in TRAINING_TABLES:
            del table[key]
    return _toml(table)


def _toml(table: dict[str, Any]) -> str:
    return "# Written by p2pcodistill simulate.\n" + tomli_w.dumps(table)


# --- nodes -------------------------------------------------------------------------------------------------------


def free_ports(count: int, *, taken: set[int]) -> list[int]:
    """`count` distinct TCP ports that are free on loopback now and not in `taken`, which they are added to."""
    ports: list[int] = []
    with ExitStack() as bound:  # all stay bound until the last is found, so that none is found twice
        while len(ports) < count:
            listener = bound.enter_context(socket.socket())
            listener.bind((_LOOPBACK, 0))
            port: int = listener.getsockname()[1]
            if port not in taken:
                taken.add(port)
                ports.append(port)
    return ports


def node_files(job: Job, folder: Path) -> list[NodeFiles]:
    """The places of the job's nodes in the run folder, in the order of its sites."""
    arm = folder / job.run
    return [NodeFiles(site.name, arm / "nodes" / f"{site.name}.toml", arm / site.name) for site in job.sites]


def simulator_events(job: Job, folder: Path) -> Path:
    """Where the simulation tells of the job's faults and links, as events."""
    return folder / job.run / _SIMULATOR_EVENTS_FILE


def loopback(port: int) -> str:
    """The address of a node on this machine."""
    return f"tcp://{_LOOPBACK}:{port}"


def write_node_files(
    job: Job,
    scenario: ScenarioConfig,
    folder: Path,
    *,
    addresses: Sequence[str],
    dialled: Dialled | None = None,
) -> list[NodeFiles]:
    """Write identity and node file of each of the job's sites, and make their run folders; who has an identity keeps it.

    `scenario` is the one that `write_scenario` returned; `addresses` has one for each site to listen at. `dialled` decides
    where each site is told that its peers are; by default, where they listen.
    """
    files = node_files(job, folder)
    identities = [_identity(place) for place in files]
    members = [
        PeerConfig(name=site.name, public_identity=str(identity.public), address=address)
        for site, identity, address in zip(job.sites, identities, addresses, strict=True)
    ]
    for site, place in zip(job.sites, files, strict=True):
        place.run_folder.mkdir(parents=True, exist_ok=True)
        config = _node_config(site, members, job, scenario, folder, dialled)
        place.node_file.write_text(_toml(config.model_dump(mode="json", exclude_none=True)))
    return files


def _identity(place: NodeFiles) -> Identity:
    key_file = place.node_file.with_suffix(".key")
    if key_file.exists():
        return Identity.load(key_file)
    identity = Identity.generate()
    key_file.parent.mkdir(parents=True, exist_ok=True)
    identity.save(key_file)
    return identity


def remove_job(job: Job, folder: Path) -> None:
    """Remove all that the job has left in the run folder, if anything."""
    places = node_files(job, folder)
    if job.arm.of_kind.sites == "apart":  # others of the arm have theirs beside it
        for place in places:
            place.node_file.unlink(missing_ok=True)
            place.node_file.with_suffix(".key").unlink(missing_ok=True)
        left = [place.run_folder for place in places]
    else:
        left = [folder / job.run]
    for path in left:
        if path.exists():
            shutil.rmtree(path)


def _device(scenario: ScenarioConfig) -> str:
    """In virtual time, where many jobs run beside each other, a GPU has to be asked for."""
    is_cpu = scenario.mode == "virtual" and scenario.group.device == "auto"
    return "cpu" if is_cpu else scenario.group.device


def _node_config(
    site: SiteRun,
    members: list[PeerConfig],
    job: Job,
    scenario: ScenarioConfig,
    folder: Path,
    dialled: Dialled | None,
) -> NodeConfig:
    def told(member: PeerConfig) -> PeerConfig:
        address = member.address if dialled is None else dialled(site.name, member.name, str(member.address))
        mbit = scenario.max_upload_mbit(site.name, member.name)
        return member.model_copy(update={"address": address, "max_upload_mbit": mbit})

    # Paths are relative to the node's file, so that the whole run folder can be moved.
    up = Path("..", "..")
    scenario = scenario.of_arm(job.arm)
    return NodeConfig(
        name=site.name,
        run=job.run,
        listen=next(str(member.address) for member in members if member.name == site.name),
        identity=Path(f"{site.name}.key"),
        run_folder=Path("..", site.name),
        topology=map_files(scenario.topology, lambda path: str(up / Path(path).name)),
        peers=tuple(told(member) for member in members if member.name != site.name),
        members=tuple(member.name for member in members),
        max_upload_mbit=next((s.max_upload_mbit for s in scenario.sites if s.name == site.name), None),
        group=scenario.group.model_copy(update={"num_threads": job.num_threads, "device": _device(scenario)}),
        task=task_of_site(scenario, site.shards, folder, up),
        training=seeded_training(scenario.training, job.arm, job.seed),
        codistillation=scenario.codistillation,
        frames=scenario.frames,
    )
