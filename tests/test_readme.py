"""The README keeps what it promises: its tables, files and commands are those of the code."""

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from p2pcodistill.config import (
    CodistillationConfig,
    FramesConfig,
    GroupConfig,
    NodeConfig,
    PeerConfig,
    TrainingConfig,
)
from p2pcodistill.identity import Identity
from p2pcodistill.strict import parse_model
from p2pcodistill.task_configs import (
    ClicksConfig,
    CustomTaskConfig,
    DataSource,
    ImagesConfig,
    LanguageModelConfig,
)
from p2pcodistill.topology.build import build_topology

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SECTIONS = {
    "": NodeConfig,
    "[[peers]]": PeerConfig,
    "[group]": GroupConfig,
    "[task]": DataSource,
    "[task] language-model": LanguageModelConfig,
    "[task] images": ImagesConfig,
    "[task] clicks": ClicksConfig,
    "[task] custom": CustomTaskConfig,
    "[training]": TrainingConfig,
    "[codistillation]": CodistillationConfig,
    "[frames]": FramesConfig,
}
TABLES = {"group", "task", "training", "codistillation", "frames"}


def configuration_reference() -> list[str]:
    """The rows of the README's configuration reference, from the models themselves."""
    rows = []
    for section, model in SECTIONS.items():
        for key, field in model.model_fields.items():
            if section == "" and key in TABLES:
                continue
            if section.startswith("[task] ") and key in DataSource.model_fields:
                continue
            default = "" if field.is_required() else f"`{show(field.get_default(call_default_factory=True))}`"
            rows.append(f"| {section} | `{key}` | {default} | {field.description} |")
    return rows


def show(value):
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return repr(list(value) if isinstance(value, tuple) else value).replace("'", '"')


@pytest.mark.parametrize("row", configuration_reference())
def test_every_key_is_in_the_configuration_reference(row):
    assert row in README


def test_every_file_of_the_annotated_tree_exists_and_every_package_is_in_it():
    tree = README.split("## The tree", 1)[1].split("```", 2)[1]
    folders, missing = [], []
    for line in tree.splitlines():
        if match := re.match(r"^( *)([\w./-]+)(\s|$)", line):
            depth = len(match[1]) // 2
            folders[depth:] = [match[2]]
            path = ROOT.joinpath(*folders)
            missing += [] if path.exists() else [path]
    assert missing == []
    modules = [path.name for path in (ROOT / "p2pcodistill").rglob("*.py") if not path.name.startswith("__")]
    assert [name for name in modules if name not in tree] == []


def test_the_example_for_a_users_own_loop_runs_as_printed(tmp_path):
    code = README.split("## Three lines in your own loop", 1)[1].split("```python\n", 1)[1].split("```", 1)[0]
    (tmp_path / "train.py").write_text(code.replace("range(1000)", "range(3)"))
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    run = subprocess.run(
        [sys.executable, "train.py"], cwd=tmp_path, env=os.environ | alone, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "it trains alone" in run.stderr


def test_pictures_and_results_are_there():
    for picture in ("report.png", "topologies.png", "private_data.png"):
        assert (ROOT / "docs" / picture).read_bytes().startswith(b"\x89PNG")
    assert "exchange_overhead" in (ROOT / "benchmarks" / "RESULTS.md").read_text()


def test_the_readme_links_to_files_that_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


def test_its_contents_lead_to_every_section():
    headings = re.findall(r"^## (.+)$", README, re.MULTILINE)
    assert re.findall(r"\[([^]]+)\]\(#[^)]+\)", README) == headings
    assert re.findall(r"\]\(#([^)]+)\)", README) == [title.lower().replace(" ", "-") for title in headings]


@pytest.mark.parametrize(
    "path", sorted((ROOT / "nodes").rglob("*.toml")), ids=lambda p: f"{p.parent.name}-{p.stem}"
)
def test_the_node_files_that_users_copy_are_valid(path):
    config = read_node_file(path)
    assert config.name == path.stem
    assert config.run == path.parent.name
    assert config.ordered_members == tuple(sorted(other.stem for other in path.parent.glob("*.toml")))


def read_node_file(path: Path) -> NodeConfig:
    """The file as it is once identities are pasted into it."""
    table = tomllib.loads(path.read_text())
    for peer in table["peers"]:
        assert peer["public_identity"] == f"PASTE WHAT 'p2pcodistill keygen {peer['name']}' PRINTED"
        peer["public_identity"] = str(Identity.generate().public)
    return parse_model(NodeConfig, table, source=path.name)


@pytest.mark.parametrize("folder", sorted((ROOT / "nodes").glob("*-sites")), ids=lambda p: p.name)
def test_every_two_neighbours_of_the_node_files_can_connect_and_mean_the_same_graph(folder):
    configs = {path.stem: read_node_file(path) for path in folder.glob("*.toml")}
    addresses = {(name, peer.name): peer.address for name, config in configs.items() for peer in config.peers}
    topologies = [build_topology(config.topology, config.ordered_members) for config in configs.values()]
    assert len({topology.digest for topology in topologies}) == 1
    reachable = {peer for (_, peer), address in addresses.items() if address is not None}
    for name in configs:
        for neighbour in topologies[0].neighbours_of(name):
            assert addresses[name, neighbour] or addresses[neighbour, name]
        for peer in reachable - {name}:
            port = port_of(configs[peer].listen)
            assert addresses[name, peer] == f"tcp://{peer}.example:{port}"


def port_of(listen: str) -> str:
    return listen.rpartition(":")[2]


def test_of_the_four_sites_one_is_behind_nat_and_can_be_helped_where_a_neighbour_is_too():
    configs = {path.stem: read_node_file(path) for path in (ROOT / "nodes" / "four-sites").glob("*.toml")}
    (hidden,) = [
        name
        for name in configs
        if all(peer.address is None for c in configs.values() for peer in c.peers if peer.name == name)
    ]
    (relay,) = configs[hidden].relays
    topology = build_topology(configs[hidden].topology, configs[hidden].ordered_members)
    assert configs[relay].relay and relay not in topology.neighbours_of(hidden)
    for neighbour in topology.neighbours_of(hidden):
        assert relay in topology.neighbours_of(neighbour), "so that it is connected with both"
