"""What a simulation writes before it starts: whole, readable by the node, and the same for every arm."""

from __future__ import annotations

import socket
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from p2pcodistill.config import NodeConfig
from p2pcodistill.errors import RunFolderError
from p2pcodistill.identity import Identity
from p2pcodistill.simulation.data import ScenarioText, prepare_data
from p2pcodistill.simulation.files import (
    create_run_folder,
    free_ports,
    loopback,
    node_files,
    point_latest,
    scenario_toml,
    write_node_files,
    write_scenario,
)
from p2pcodistill.simulation.jobs import make_jobs
from p2pcodistill.simulation.scenario import ScenarioConfig, load_scenario
from p2pcodistill.strict import load_toml, parse_model
from p2pcodistill.task_configs import LanguageModelConfig
from p2pcodistill.tasks.site_text import load_site_text
from p2pcodistill.topology.build import build_topology

NOON = datetime(2030, 1, 2, 12, 0, 0)


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(60):
        (folder / f"file-{index}.txt").write_text(f"file {index} says ä thing\n" * 40)
    return folder


def load(folder: Path, **changes: Any) -> ScenarioConfig:
    content = {
        "name": "small",
        "sites": [{"name": "berlin"}, {"name": "tokyo"}],
        "arms": [{"name": kind, "kind": kind} for kind in ("codistilled", "alone", "pooled")],
        "data": {"paths": ["corpus"], "max_bytes_per_site": 5000, "max_held_out_bytes": 1000},
        "training": {"batch_size": 4},
    }
    path = folder / "small.toml"
    path.write_text(tomli_w.dumps(content | changes))
    return load_scenario(path)


@pytest.fixture
def scenario(corpus: Path) -> ScenarioConfig:
    return load(corpus.parent)


# --- the run folder ----------------------------------------------------------------------------------------------


def test_every_simulation_has_a_folder_of_its_own_and_latest_points_to_the_newest(tmp_path: Path) -> None:
    folders = [create_run_folder(tmp_path / "runs", "small", NOON) for _ in range(3)]
    names = ["small-20300102-120000", "small-20300102-120000-2", "small-20300102-120000-3"]
    assert [folder.name for folder in folders] == names
    for folder in folders:
        point_latest(folder)
        assert (tmp_path / "runs" / "latest").readlink() == Path(folder.name)
    assert sorted(entry.name for entry in (tmp_path / "runs").iterdir()) == ["latest", *names]


def test_a_run_root_that_cannot_be_used_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match=r"cannot make a run folder in .*file"):
        create_run_folder(tmp_path / "file", "small", NOON)
    (tmp_path / "latest" / "mine").mkdir(parents=True)
    with pytest.raises(RunFolderError, match=r"cannot make the link .*latest"):
        point_latest(tmp_path / "small")
    assert (tmp_path / "latest" / "mine").is_dir()
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "latest"]


@pytest.mark.parametrize("group", [{}, {"num_threads": 1}, {"num_ranks": 2, "device": "cpu"}])
def test_the_written_scenario_is_the_scenario(corpus: Path, tmp_path: Path, group: dict[str, Any]) -> None:
    scenario = load(corpus.parent, group=group, seeds=[1, 2], topology="ring")
    path = tmp_path / "again.toml"
    path.write_text(scenario_toml(scenario))
    again = load_scenario(path)
    assert again == scenario
    assert ("num_threads" in again.group.model_fields_set) == ("num_threads" in group)


@pytest.mark.parametrize("name", ["images", "clicks"])
def test_the_written_scenario_of_another_task_is_the_scenario(tmp_path: Path, name: str) -> None:
    scenario = load(tmp_path, data={}, task={"name": name, "max_examples": 50})
    path = tmp_path / "again.toml"
    path.write_text(scenario_toml(scenario))
    assert load_scenario(path) == scenario


ARMS = [
    {"name": "ternary", "kind": "codistilled", "frames": {"delta": "ternary"}},
    {"name": "average", "kind": "codistilled", "codistillation": {"teacher_average_decay": 0.98}},
    {"name": "alone", "kind": "alone"},
]


def test_the_written_scenario_says_of_an_arm_what_differs(corpus: Path, tmp_path: Path) -> None:
    scenario = load(corpus.parent, arms=ARMS, frames={"delta": "lossless"})
    path = tmp_path / "again.toml"
    path.write_text(scenario_toml(scenario))
    assert load_toml(path)["arms"] == ARMS
    changed = load_scenario(path, ["frames.keyframe=int8", "codistillation.burn_in_steps=3"])
    assert changed.frames_of(changed.arms[0]).model_dump() == {
        **scenario.frames.model_dump(),
        "delta": "ternary",
        "keyframe": "int8",
    }
    assert changed.codistillation_of(changed.arms[1]).burn_in_steps == 3


def test_a_topology_file_goes_with_the_run(corpus: Path, tmp_path: Path) -> None:
    (corpus.parent / "ours.edgelist").write_text("berlin tokyo\ntokyo berlin\n")
    scenario = load(corpus.parent, topology="ours.edgelist")
    folder = create_run_folder(tmp_path / "runs", "small", NOON)
    used = write_scenario(scenario, prepare_data(scenario), folder)
    (corpus.parent / "ours.edgelist").unlink()
    moved = folder.rename(tmp_path / "moved")
    assert used.topology == str(folder / "topology.edgelist")
    assert load_scenario(moved / "scenario.toml").topology == str(moved / "topology.edgelist")


def test_so_do_several(corpus: Path, tmp_path: Path) -> None:
    for name, teacher in (("day", "berlin tokyo"), ("night", "tokyo berlin")):
        (corpus.parent / f"{name}.edgelist").write_text(f"{teacher}\n")
    scenario = load(corpus.parent, topology="files:day.edgelist,night.edgelist")
    folder = create_run_folder(tmp_path / "runs", "small", NOON)
    used = write_scenario(scenario, prepare_data(scenario), folder)
    assert used.topology == f"files:{folder}/topology.edgelist,{folder}/topology-2.edgelist"
    again = load_scenario(folder / "scenario.toml")
    assert build_topology(again.topology, again.site_names).schedule_of("tokyo") == ({"berlin": 1.0}, {})


# --- nodes -------------------------------------------------------------------------------------------------------


def prepare(scenario: ScenarioConfig, run_root: Path) -> tuple[Path, dict[tuple[str, str], NodeConfig]]:
    """Everything written, moved elsewhere, and read back as a node would: (folder, {(run, site): config})."""
    folder = create_run_folder(run_root, scenario.name, NOON)
    scenario = write_scenario(scenario, prepare_data(scenario), folder)
    jobs, taken = make_jobs(scenario), set[int]()
    for job in jobs:
        written = write_node_files(
            job, scenario, folder, addresses=list(map(loopback, free_ports(len(job.sites), taken=taken)))
        )
        assert written == node_files(job, folder)
        assert all(place.run_folder.is_dir() for place in written)
    folder = folder.rename(run_root / "moved")
    configs = {
        (job.run, place.site): parse_model(
            NodeConfig, load_toml(place.node_file), source=str(place.node_file)
        )
        for job in jobs
        for place in node_files(job, folder)
    }
    return folder, configs


def test_nodes_of_an_arm_know_each_other_and_lone_ones_nobody(
    scenario: ScenarioConfig, tmp_path: Path
) -> None:
    folder, configs = prepare(scenario, tmp_path / "runs")
    assert list(configs) == [
        ("codistilled-seed0", "berlin"),
        ("codistilled-seed0", "tokyo"),
        ("alone-seed0", "berlin"),
        ("alone-seed0", "tokyo"),
        ("pooled-seed0", "pooled"),
    ]
    identities = {}
    for (run, site), config in configs.items():
        nodes = folder / run / "nodes"
        assert (config.name, config.run) == (site, run)
        assert config.identity is not None
        assert config.run_folder is not None
        assert (nodes / config.run_folder).resolve() == folder / run / site
        identities[run, site] = Identity.load(nodes / config.identity)
        topology = build_topology(config.topology, config.ordered_members, base_folder=nodes)
        assert topology.members == (("berlin", "tokyo") if run == "codistilled-seed0" else (site,))
    assert len({str(identity.public) for identity in identities.values()}) == 5
    assert len({config.listen for config in configs.values()}) == 5
    (peer,) = configs["codistilled-seed0", "berlin"].peers
    assert (peer.name, peer.address) == ("tokyo", configs["codistilled-seed0", "tokyo"].listen)
    assert peer.identity == identities["codistilled-seed0", "tokyo"].public
    assert not any(config.peers for (run, _), config in configs.items() if run != "codistilled-seed0")


def test_arms_differ_in_peers_and_data_only(scenario: ScenarioConfig, tmp_path: Path) -> None:
    _, configs = prepare(scenario, tmp_path / "runs")
    for site in ("berlin", "tokyo"):
        lone, member = configs["alone-seed0", site], configs["codistilled-seed0", site]
        for section in ("group", "task", "training", "codistillation", "frames"):
            assert getattr(lone, section) == getattr(member, section)
    pooled, berlin = configs["pooled-seed0", "pooled"], configs["alone-seed0", "berlin"]
    assert pooled.training == berlin.training
    assert pooled.task == berlin.task.model_copy(update={"data": pooled.task.data})


def test_what_an_arm_sets_reaches_its_nodes(corpus: Path, tmp_path: Path) -> None:
    scenario = load(corpus.parent, arms=ARMS, frames={"delta": "lossless", "target_error": 0.5})
    _, configs = prepare(scenario, tmp_path / "runs")
    told = {
        run: (config.frames.delta, config.frames.target_error, config.codistillation.teacher_average_decay)
        for (run, site), config in configs.items()
        if site == "berlin"
    }
    assert told == {
        "ternary-seed0": ("ternary", 0.5, 0.0),
        "average-seed0": ("lossless", 0.5, 0.98),
        "alone-seed0": ("lossless", 0.5, 0.0),
    }


def test_what_the_group_will_read_is_the_split_text_to_the_byte(
    scenario: ScenarioConfig, tmp_path: Path
) -> None:
    text = prepare_data(scenario)
    assert isinstance(text, ScenarioText)
    folder, configs = prepare(scenario, tmp_path / "runs")
    for (run, site), config in configs.items():
        nodes = folder / run / "nodes"
        assert isinstance(config.task, LanguageModelConfig)
        task = config.task.model_copy(
            update={
                "data": tuple(nodes / path for path in config.task.data),
                "held_out": tuple(nodes / path for path in config.task.held_out),
            }
        )
        read = load_site_text(task)
        assert read.held_out == text.held_out
        shards = [text.shards[site]] if site in text.shards else list(text.shards.values())
        assert len(read.train) == sum(map(len, shards))
        assert all(shard in read.train for shard in shards)


def test_threads_of_the_plan_and_a_topology_file_reach_the_node(corpus: Path, tmp_path: Path) -> None:
    (corpus.parent / "ours.edgelist").write_text("berlin tokyo\n")
    scenario = load(corpus.parent, topology="ours.edgelist", group={"num_threads": 3})
    folder, configs = prepare(scenario, tmp_path / "runs")
    config = configs["codistilled-seed0", "tokyo"]
    assert config.group.num_threads == 3
    nodes = folder / "codistilled-seed0" / "nodes"
    topology = build_topology(config.topology, config.ordered_members, base_folder=nodes)
    assert topology.schedule_of("berlin") == ({},)
    assert topology.schedule_of("tokyo") == ({"berlin": 1.0},)


def test_free_ports_are_distinct_and_can_be_bound() -> None:
    taken: set[int] = set()
    ports = free_ports(20, taken=taken) + free_ports(20, taken=taken)
    assert len(set(ports)) == 40
    assert taken == set(ports)
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", ports[-1]))
        assert listener.getsockname()[1] == ports[-1]
