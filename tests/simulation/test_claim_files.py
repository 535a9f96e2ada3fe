"""The scenario of every claim: which `make reproduce` runs, each with a variant for a GPU; going on where it was stopped."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from p2pcodistill.simulation.scenario import load_scenario
from p2pcodistill.simulation.scenario_file import load_scenario_table

ROOT = Path(__file__).parents[2]
SIMULATIONS = ROOT / "simulations"


def load_reproduce() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reproduce", SIMULATIONS / "reproduce.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


REPRODUCE = load_reproduce()
VARIANTS = {"private_data_alone", "private_data_shrunk", "private_data_unlike", "versus_averaging_unlike"}
"""Of scenarios that have a variant for a GPU already."""


def test_all_scenarios_with_claims_are_reproduced() -> None:
    with_claims = {
        file.stem for file in SIMULATIONS.glob("*.toml") if load_scenario_table(file).get("claims")
    }
    assert with_claims == set(REPRODUCE.CLAIMS)


@pytest.mark.parametrize("name", REPRODUCE.CLAIMS)
def test_each_has_the_seeds_that_a_spread_needs_and_figures(name: str) -> None:
    scenario = load_scenario(SIMULATIONS / f"{name}.toml")
    assert len(scenario.seeds) >= 3
    assert scenario.report.curves and scenario.report.bars
    assert scenario.mode == "virtual"


@pytest.mark.parametrize("name", sorted(set(REPRODUCE.CLAIMS) - VARIANTS))
def test_each_has_a_variant_for_a_gpu_that_says_whether_anybody_tried_it(name: str) -> None:
    file = SIMULATIONS / "gpu" / f"{name}.toml"
    variant, small = load_scenario(file), load_scenario(SIMULATIONS / f"{name}.toml")
    assert variant.group.device == "cuda"
    assert variant.name == f"{name}_gpu"
    assert variant.claims == small.claims
    assert variant.training.num_steps > small.training.num_steps
    own_rate = variant.training.learning_rate
    rates = [variant.training_of(arm).learning_rate / own_rate for arm in variant.arms]
    assert all(0.4 <= rate <= 3 for rate in rates), "no arm trains at a rate that is for laptops"
    assert ("# Untried" in file.read_text()) != ("# Tried" in file.read_text())


def test_what_is_complete_is_not_run_again_and_what_was_stopped_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def call(command: list[str]) -> int:
        calls.append(command)
        return 0

    monkeypatch.setattr(REPRODUCE, "RUNS", tmp_path)
    monkeypatch.setattr(subprocess, "call", call)
    begin = [sys.executable, "-m", "p2pcodistill", "simulate"]
    assert REPRODUCE.run("two_phase") == 0
    assert calls.pop() == [*begin, str(SIMULATIONS / "two_phase.toml"), "--runs", str(tmp_path)]
    (tmp_path / "two_phase-20260103-100000").mkdir()  # stopped before there was a scenario to go on with
    for name in (
        "two_phase-20260101-100000",
        "two_phase-20260102-100000",
        "private_data_shrunk-20260103-100000",
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "scenario.toml").write_text("")
    newest = tmp_path / "two_phase-20260102-100000"
    (newest / "result.md").write_text("## Two phases\n")
    assert REPRODUCE.latest_run("private_data") is None, "another scenario whose name begins alike"
    assert REPRODUCE.main(["two_phase"]) == 0
    assert calls == [[*begin, "--resume", str(newest)]], "which runs what is missing, if anything"
    assert (tmp_path / "RESULTS.md").read_text() == "## Two phases\n"


def test_a_failure_ends_it_and_an_unknown_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(REPRODUCE, "RUNS", tmp_path)
    monkeypatch.setattr(subprocess, "call", lambda command: 2)
    assert REPRODUCE.main(["two_phase", "topologies"]) == 2
    assert "two_phase ended with status 2; `make reproduce` goes on with it" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        REPRODUCE.main(["three_phase"])
    assert "no such scenario: three_phase" in capsys.readouterr().err
