"""The search for every arm's best settings, over the same grid, recorded in the run folder.

It is a scenario of its own, with an arm for each combination, that runs in the folder `search` of the run; its results and
the choice are in `search.json`. Then the scenario runs with what was chosen, under seeds that the choice has not seen. The
held-out data is the same, however: final losses are a little better than on data that nothing was chosen on, and the more
so, the more trials an arm had. Give all arms equally many.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from p2pcodistill.errors import GroupError
from p2pcodistill.report.summary import ArmResult
from p2pcodistill.simulation.scenario import ScenarioConfig
from p2pcodistill.simulation.scenario_tables import ReportConfig
from p2pcodistill.simulation.search_config import SearchConfig, Settings, trial_arms, with_settings

SEARCH_FOLDER = "search"
SEARCH_FILE = "search.json"
CHOSEN_ON = "the held-out data that the result is reported on, under a seed of its own"


def search_scenario(scenario: ScenarioConfig) -> ScenarioConfig:
    """The scenario of the trials, without what is said of the arms. `scenario` has a search."""
    search = _search_of(scenario)
    arms = tuple(tried for tried, _, _ in trial_arms(search, scenario.arms).values())
    update: dict[str, Any] = {
        "arms": arms,
        "seeds": (search.seed,),
        "search": None,
        "report": ReportConfig(),
        "claims": (),
    }
    if all(arm.kind != "codistilled" for arm in arms):  # which alone have any
        update |= {"links": (), "faults": ()}
    return scenario.model_copy(update=update)


def choose(scenario: ScenarioConfig, results: list[ArmResult], folder: Path) -> ScenarioConfig:
    """`scenario` with every arm's best settings: those of the least final held-out loss, mean over its sites.

    Writes `search.json`. Raises GroupError for an arm of which no trial has a finite loss.
    """
    search = _search_of(scenario)
    loss_of = {result.name: _final_loss(result) for result in results}
    tried: dict[str, list[tuple[float, str, Settings]]] = {}
    for name, (_, settings, arm) in trial_arms(search, scenario.arms).items():
        tried.setdefault(arm.name, []).append((loss_of[name], name, settings))
    record: dict[str, Any] = {"seed": search.seed, "chosen_on": CHOSEN_ON, "arms": {}}
    chosen: dict[str, Settings] = {}
    for arm_name, trials in tried.items():
        loss, _, settings = min(trials, key=lambda trial: trial[0])
        if not math.isfinite(loss):
            raise GroupError(f"no trial of the arm {arm_name} has a finite loss: change search.grid")
        chosen[arm_name] = settings
        record["arms"][arm_name] = {
            "chosen": settings,
            "final_val_loss": loss,
            "num_trials": len(trials),
            "at_edge_of_grid": _at_edge(settings, [of for _, _, of in trials]),
            "tried": [
                {"trial": name, "settings": of, "final_val_loss": own if math.isfinite(own) else None}
                for own, name, of in trials
            ],
        }
    (folder / SEARCH_FILE).write_text(json.dumps(record, indent=2, allow_nan=False) + "\n")
    arms = tuple(with_settings(arm, chosen.get(arm.name, {})) for arm in scenario.arms)
    return scenario.model_copy(update={"arms": arms, "search": None})


def describe_choice(folder: Path) -> list[str]:
    """A line for each arm that was searched, from the `search.json` in `folder`."""
    record = json.loads((folder / SEARCH_FILE).read_text())
    lines = []
    for arm, found in record["arms"].items():
        settings = ", ".join(f"{key} = {value}" for key, value in found["chosen"].items())
        edge = found["at_edge_of_grid"]
        more = f"; the best {', '.join(edge)} is at the edge of the grid" if edge else ""
        lines.append(
            f"{arm}: {settings} ({found['final_val_loss']:.3f}, of {len(found['tried'])} trials{more})"
        )
    return lines


def _search_of(scenario: ScenarioConfig) -> SearchConfig:
    assert scenario.search is not None, "else there is nothing to search"
    return scenario.search


def _final_loss(result: ArmResult) -> float:
    """Infinite where a site has none, or none that is finite."""
    losses = [history.final_val_loss for history in result.sites.values()]
    known = [loss for loss in losses if loss is not None and math.isfinite(loss)]
    return sum(known) / len(known) if len(known) == len(losses) else math.inf


def _at_edge(chosen: Settings, tried: list[Settings]) -> list[str]:
    """The keys whose best value is the smallest or the largest of three or more numbers: more might be better."""
    keys = []
    for key, value in chosen.items():
        values = {of[key] for of in tried if isinstance(of[key], int | float)}
        if len(values) >= 3 and value in (min(values), max(values)):
            keys.append(key)
    return keys
