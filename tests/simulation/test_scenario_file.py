"""Scenario files that are variants of others: what is laid over what, and which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2pcodistill.errors import ConfigError
from p2pcodistill.simulation.scenario import load_scenario
from p2pcodistill.simulation.scenario_file import load_scenario_table

BASE = """
name = "small"
mode = "virtual"
seeds = [0, 1]
sites = [{ name = "a" }, { name = "b" }]

[training]
num_steps = 100
learning_rate = 0.01

[[arms]]
name = "pair"
kind = "codistilled"
codistillation = { burn_in_steps = 10, weight = 0.5 }

[[arms]]
name = "alone"
kind = "alone"
"""


def write(folder: Path, **files: str) -> Path:
    for name, content in files.items():
        (folder / f"{name}.toml").write_text(content)
    return folder


def test_a_variant_says_only_what_differs(tmp_path: Path) -> None:
    write(
        tmp_path,
        base=BASE,
        variant="""
            extends = "base.toml"
            name = "large"
            seeds = [7]
            training.num_steps = 900
            arms = [
                { name = "pair", codistillation = { burn_in_steps = 90 } },
                { name = "pooled", kind = "pooled" },
            ]
        """,
    )
    scenario = load_scenario(tmp_path / "variant.toml", ["training.batch_size=8"])
    assert (scenario.name, scenario.mode, scenario.seeds) == ("large", "virtual", (7,))
    training = scenario.training
    assert (training.num_steps, training.learning_rate, training.batch_size) == (900, 0.01, 8)
    assert [(arm.name, arm.kind) for arm in scenario.arms] == [
        ("pair", "codistilled"),
        ("alone", "alone"),
        ("pooled", "pooled"),
    ]
    pair = scenario.codistillation_of(scenario.arms[0])
    assert (pair.burn_in_steps, pair.weight) == (90, 0.5)
    assert load_scenario(tmp_path / "base.toml").training.num_steps == 100


def test_a_variant_of_a_variant(tmp_path: Path) -> None:
    (tmp_path / "inner").mkdir()
    write(tmp_path, base=BASE, one='extends = "base.toml"\nseeds = [1]\nname = "one"')
    write(tmp_path / "inner", two='extends = "../one.toml"\nname = "two"')
    table = load_scenario_table(tmp_path / "inner" / "two.toml")
    assert (table["name"], table["seeds"], table["mode"]) == ("two", [1], "virtual")
    assert "extends" not in table


def test_of_several_files_each_is_laid_over_those_before(tmp_path: Path) -> None:
    write(
        tmp_path,
        base=BASE,
        sizes="[training]\nnum_steps = 5000\n[task]\nhidden_size = 1024",
        variant='extends = ["base.toml", "sizes.toml"]\n[task]\nnum_layers = 3',
    )
    scenario = load_scenario(tmp_path / "variant.toml")
    assert (scenario.training.num_steps, scenario.training.learning_rate) == (5000, 0.01)
    task = scenario.task.model_dump()
    assert (task["hidden_size"], task["num_layers"]) == (1024, 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('extends = "gone.toml"', "variant.toml extends gone.toml: no such file: .*gone.toml"),
        ("extends = 3", r'extends is the path of a scenario file, such as "\.\./pair\.toml", or .*, not 3'),
        ("extends = []", r"extends is the path of .*, not \[\]"),
        ('extends = ["base.toml", 3]', r"extends is the path of .*, not \['base.toml', 3\]"),
        ('extends = "variant.toml"', "extends leads back to .*variant.toml"),
        ('extends = "back.toml"', "variant.toml extends back.toml: .*back.toml: extends leads back"),
        ('extends = "base.toml"\narms = [{ name = "other" }]', r"arms.2.kind"),
        ('extends = "base.toml"\narms = [3]', r"arms.2"),
        ('extends = "base.toml"\ntraining = 3', "training"),
    ],
)
def test_variants_that_make_no_sense_are_refused_in_one_line(
    tmp_path: Path, content: str, message: str
) -> None:
    write(tmp_path, base=BASE, back='extends = "variant.toml"', variant=content)
    with pytest.raises(ConfigError, match=message) as caught:
        load_scenario(tmp_path / "variant.toml")
    assert "\n" not in str(caught.value)
