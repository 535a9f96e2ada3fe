"""The search for settings: every arm gets the same grid, the best of it, and all that was tried is kept."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from p2pcodistill.errors import ConfigError, GroupError
from p2pcodistill.report.history import SiteHistory
from p2pcodistill.report.summary import ArmResult
from p2pcodistill.simulation.files import scenario_toml
from p2pcodistill.simulation.processes import simulate
from p2pcodistill.simulation.scenario import ScenarioConfig, load_scenario
from p2pcodistill.simulation.search import choose, describe_choice, search_scenario
from p2pcodistill.strict import parse_model

RATES = [1e-6, 1e-2, 10.0]
GRID = [
    {"key": "training.learning_rate", "values": RATES},
    {"key": "codistillation.weight", "values": [0.5, 1.0]},
    {"key": "training.label_smoothing", "values": [0.0, 0.1], "arms": ["smoothed"]},
]
ARMS = [
    {"name": "alone", "kind": "alone"},
    {"name": "smoothed", "kind": "alone", "training": {"learning_rate": 0.5, "warmup_steps": 3}},
    {"name": "codistilled", "kind": "codistilled"},
]


def table(**changes: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "mode": "virtual",
        "sites": [{"name": "a"}, {"name": "b"}],
        "arms": ARMS,
        "search": {"grid": GRID},
    } | changes


def scenario(**changes: Any) -> ScenarioConfig:
    return parse_model(ScenarioConfig, table(**changes), source="small.toml")


def test_each_arm_is_tried_with_each_combination_that_it_can_have() -> None:
    trials = search_scenario(scenario())
    assert (trials.seeds, trials.search) == ((1_000_000,), None)
    tried = [
        (
            arm.name.partition("-")[2],
            trials.training_of(arm).learning_rate,
            trials.training_of(arm).label_smoothing,
            trials.codistillation_of(arm).weight,
        )
        for arm in trials.arms
    ]
    assert tried == [
        *(("alone", rate, 0.0, 1.0) for rate in RATES),
        *(("smoothed", rate, share, 1.0) for rate in RATES for share in (0.0, 0.1)),
        *(("codistilled", rate, 0.0, weight) for rate in RATES for weight in (0.5, 1.0)),
    ]
    assert len({arm.name for arm in trials.arms}) == len(trials.arms)
    warmups = [trials.training_of(arm).warmup_steps for arm in trials.arms]
    assert warmups == [0] * 3 + [3] * 6 + [0] * 6, "what is not searched stays"


@pytest.mark.parametrize("arms", [ARMS, ARMS[:2]])
def test_the_scenario_of_the_trials_can_be_read_again(arms: list[dict[str, Any]], tmp_path: Path) -> None:
    is_codistilled = len(arms) == 3
    content = table(
        claims=[{"text": "It helps.", "arm": "smoothed", "measure": "loss-difference", "against": ["alone"]}],
        report={"title": "Alone", "curves": ["steps"]},
        links=[{"between": "all", "bandwidth_mbit": 1.0}],
        arms=ARMS,
        search={"grid": [GRID[0] | {"arms": [arm["name"] for arm in arms]}]},
    )
    searched = parse_model(ScenarioConfig, content, source="small.toml")
    (tmp_path / "trials.toml").write_text(scenario_toml(search_scenario(searched)))
    trials = load_scenario(tmp_path / "trials.toml")
    assert len(trials.arms) == len(arms) * len(RATES)
    assert (trials.claims, trials.report.curves, len(trials.links)) == ((), (), int(is_codistilled))


def results(losses: list[tuple[float, float]]) -> list[ArmResult]:
    """Of the trials, in their order: what the two sites ended with."""
    return [
        ArmResult(
            arm.name,
            arm.kind,
            1_000_000,
            {
                name: SiteHistory(evaluations=[(10, 0.1), (20, loss)])
                for name, loss in zip("ab", of, strict=True)
            },
        )
        for arm, of in zip(search_scenario(scenario()).arms, losses, strict=True)
    ]


def test_the_least_mean_final_loss_is_chosen_and_all_is_recorded(tmp_path: Path) -> None:
    worst = (9.0, 9.0)
    alone = [(2.0, 4.0), (3.5, 1.0), (1.0, math.nan)]
    smoothed = [worst, worst, worst, (2.0, 2.0), worst, worst]
    codistilled = [worst, worst, worst, worst, worst, (1.0, 1.0)]
    chosen = choose(scenario(), results([*alone, *smoothed, *codistilled]), tmp_path)
    assert chosen.search is None and chosen.seeds == (0,)
    rates = {arm.name: chosen.training_of(arm).learning_rate for arm in chosen.arms}
    assert rates == {"alone": 1e-2, "smoothed": 1e-2, "codistilled": 10.0}
    assert chosen.training_of(chosen.arms[1]).label_smoothing == 0.1
    assert chosen.training_of(chosen.arms[1]).warmup_steps == 3
    assert chosen.codistillation_of(chosen.arms[2]).weight == 1.0
    record = json.loads((tmp_path / "search.json").read_text())
    assert record["arms"]["alone"]["tried"] == [
        {"trial": f"0.{index}-alone", "settings": {"training.learning_rate": rate}, "final_val_loss": loss}
        for index, (rate, loss) in enumerate(zip(RATES, [3.0, 2.25, None], strict=True))
    ]
    assert "held-out data that the result is reported on" in record["chosen_on"]
    assert {arm: of["num_trials"] for arm, of in record["arms"].items()} == {
        "alone": 3,
        "smoothed": 6,
        "codistilled": 6,
    }
    edges = {arm: of["at_edge_of_grid"] for arm, of in record["arms"].items()}
    assert edges == {"alone": [], "smoothed": [], "codistilled": ["training.learning_rate"]}
    lines = describe_choice(tmp_path)
    assert lines[0] == "alone: training.learning_rate = 0.01 (2.250, of 3 trials)"
    assert "the best training.learning_rate is at the edge of the grid" in lines[2]


def test_an_arm_that_never_learns_ends_the_search(tmp_path: Path) -> None:
    bad = (math.nan, 1.0)
    with pytest.raises(GroupError, match=r"no trial of the arm alone has a finite loss: change search\.grid"):
        choose(scenario(), results([bad] * 15), tmp_path)


@pytest.mark.parametrize(
    ("search", "message"),
    [
        ({"grid": []}, "search.grid: .*at least 1"),
        ({"grid": [{"key": "training.learning_rate", "values": []}]}, "search.grid.0.values: .*at least 1"),
        (
            {"grid": [{"key": "learning_rate", "values": [1.0]}]},
            "'learning_rate' is no key of training, task",
        ),
        ({"grid": [{"key": "frames.delta", "values": ["off"]}]}, "'frames.delta' is no key of training"),
        (
            {"grid": [{"key": "training.learning_rat", "values": [1.0]}]},
            "the arm '0.0-alone': unknown key 'training.learning_rat': did you mean 'learning_rate'",
        ),
        ({"grid": [{"key": "training.learning_rate", "values": [-1.0]}]}, "training.learning_rate: .*-1.0"),
        ({"grid": [{"key": "training.seed", "values": [1]}]}, "training.seed is decided by the simulation"),
        (
            {"grid": [{"key": "codistillation.wait", "values": [1.0]}]},
            "codistillation.wait': did you mean 'weight'",
        ),
        (
            {"grid": [{"key": "training.num_steps", "values": [9]}]},
            "training.num_steps is what a result costs",
        ),
        (
            {"grid": [GRID[0], GRID[0] | {"values": [0.2], "arms": ["smoothed"]}]},
            "has training.learning_rate twice for the arm 'smoothed': list all its values in one table",
        ),
        (
            {"grid": [{"key": "task.max_held_out_bytes", "values": [100, 200]}]},
            "task.max_held_out_bytes is decided by the simulation",
        ),
        (
            {"grid": [{"key": "task.max_held_out_examples", "values": [100]}]},
            "task.max_held_out_examples decides what is evaluated on",
        ),
        ({"grid": [GRID[0] | {"arms": ["lone"]}]}, "'lone' is none of the arms alone, smoothed, codistilled"),
        ({"grid": [GRID[1] | {"arms": ["alone"]}]}, "the arm 'alone' has no codistillation.weight"),
        ({"grid": GRID, "seed": 0}, "search.seed is 0, one of the seeds of the result"),
        (
            {"grid": [{"key": "training.learning_rate", "values": [0.1] * 400}]},
            "search.grid makes 1200 trials, more than 1000",
        ),
        ({"gird": GRID}, "unknown key 'search.gird': did you mean 'grid'"),
    ],
)
def test_a_search_that_makes_no_sense_is_refused(search: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        scenario(search=search)
    assert "\n" not in str(caught.value)


def test_a_scenario_is_searched_and_then_run(tmp_path: Path) -> None:
    content = table(
        arms=[{"name": "pooled", "kind": "pooled"}],
        search={"grid": [{"key": "training.learning_rate", "values": RATES[:2]}]},
        data={"max_bytes_per_site": 20_000, "max_held_out_bytes": 2_048},
        group={"num_threads": 1},
        task={"embedding_size": 8, "hidden_size": 16, "num_layers": 1, "window_tokens": 16},
        training={"num_steps": 20, "batch_size": 4, "precision": "float32", "evaluation_interval_steps": 10},
    )
    (tmp_path / "small.toml").write_text(tomli_w.dumps(content))
    stream = io.StringIO()
    assert simulate(tmp_path / "small.toml", run_root=tmp_path / "runs", stream=stream) == 0
    folder = (tmp_path / "runs" / "latest").resolve()
    assert "pooled: training.learning_rate = 0.01" in stream.getvalue()
    ran = load_scenario(folder / "scenario.toml")
    assert (ran.search, ran.training_of(ran.arms[0]).learning_rate) == (None, 0.01)
    record = json.loads((folder / "search.json").read_text())["arms"]["pooled"]
    assert [of["settings"]["training.learning_rate"] for of in record["tried"]] == RATES[:2]
    for of in record["tried"]:
        events = folder / "search" / f"{of['trial']}-seed1000000" / "pooled" / "events.jsonl"
        assert SiteHistory.read(events).finished
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["seeds"] == [0] and summary["final_val_loss"]["pooled"] < 5.5
