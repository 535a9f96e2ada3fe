"""Every file in `simulations/` is a scenario that loads; those of virtual time also run, cut down to a handful of steps."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from p2pcodistill.simulation.processes import simulate
from p2pcodistill.simulation.scenario import load_scenario

FILES = sorted((Path(__file__).parents[2] / "simulations").glob("*.toml"))
CUT_SHORT = ("table1_churn", "fig3_images", "regularisation", "minor_changes")
"""Of which one arm is run, too."""


def named(name: str) -> Path:
    return next(file for file in FILES if file.stem == name)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_scenario_file_loads_and_says_how_to_run_it(file: Path) -> None:
    scenario = load_scenario(file)
    assert scenario.name == file.stem
    assert scenario.description
    assert f"simulate simulations/{file.name}" in file.read_text()


@pytest.mark.parametrize("name", CUT_SHORT)
def test_scenarios_of_claims_have_seeds_and_sources(name: str) -> None:
    scenario = load_scenario(named(name))
    assert len(scenario.seeds) >= 3
    assert any(claim.is_judged and claim.source for claim in scenario.claims)
    assert scenario.report.curves and scenario.report.bars
    distilled_steps = scenario.training.num_steps - scenario.codistillation.burn_in_steps
    assert distilled_steps >= 10 * scenario.codistillation.exchange_interval_steps


@pytest.mark.parametrize("name", CUT_SHORT)
def test_scenarios_of_claims_run_for_a_few_steps(name: str, tmp_path: Path) -> None:
    scenario = load_scenario(named(name))
    arm = next(arm.name for arm in scenario.arms if arm.kind == "codistilled")
    shortened = tmp_path / "simulations" / f"{name}.toml"
    shortened.parent.mkdir()
    shortened.write_text(without_claims(named(name).read_text(), arm))
    overrides = [
        "seeds=[7]",
        "training.num_steps=6",
        "training.batch_size=16",
        "training.warmup_steps=0",
        "training.learning_rate_drops=[]",
        "training.weight_decay_changes=[]",
        "training.evaluation_interval_steps=3",
        "training.report_interval_steps=3",
        "training.checkpoint_interval_steps=6",
        "codistillation.burn_in_steps=2",
        "codistillation.exchange_interval_steps=2",
        *(["task.num_generated_examples=2000"] if scenario.task.name == "clicks" else []),
    ]
    assert simulate(shortened, overrides=overrides, run_root=tmp_path / "runs", stream=io.StringIO()) == 0
    summary = json.loads((tmp_path / "runs" / "latest" / "summary.json").read_text())
    (of_arm,) = summary["comparison"]["arms"]
    assert of_arm["name"] == arm
    assert of_arm["num_steps"] == 6
    assert of_arm["final_loss"]["mean"] > 0


def without_claims(text: str, arm: str) -> str:
    """The scenario with that arm alone, and without a search."""
    parts = text.split("\n\n")
    kept = [
        part
        for part in parts
        if not part.startswith(("[[claims]]", "# Two trials", "# Four trials", "[search]"))
        and (not part.startswith("[[arms]]") or f'name = "{arm}"' in part)
    ]
    return "\n\n".join(kept)
