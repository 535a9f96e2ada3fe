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
    LanguageModelConfig,
    NodeConfig,
    PeerConfig,
    TrainingConfig,
    parse_model,
)
from p2pcodistill.identity import Identity

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
SECTIONS = {
    "": NodeConfig,
    "[[peers]]": PeerConfig,
    "[group]": GroupConfig,
    "[task]": LanguageModelConfig,
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
            default = "" if field.is_required() else f"`{show(field.default)}`"
            rows.append(f"| {section} | `{key}` | {default} | {field.description} |")
    return rows


def show(value):
    if isinstance(value, bool) or value is None:
        return {True: "true", False: "false", None: "none"}[value]
    return "[]" if value == () else repr(value).replace("'", '"')


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
    assert (ROOT / "docs" / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "exchange_overhead" in (ROOT / "benchmarks" / "RESULTS.md").read_text()


def test_the_readme_links_to_files_that_exist():
    links = re.findall(r"\]\(([^)#:]+)\)", README)
    assert links and [link for link in links if not (ROOT / link).exists()] == []


@pytest.mark.parametrize("path", sorted((ROOT / "nodes").rglob("*.toml")), ids=lambda p: p.name)
def test_the_node_files_that_users_copy_are_valid(path):
    table = tomllib.loads(path.read_text())
    assert table["peers"][0]["public_identity"].startswith("PASTE")
    table["peers"][0]["public_identity"] = str(Identity.generate().public)
    config = parse_model(NodeConfig, table, source=path.name)
    assert config.name == path.stem
    assert config.ordered_members == ("berlin", "tokyo")
