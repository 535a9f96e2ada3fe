"""What each fault of `simulations/` takes from the sites that have none of their own, of what codistillation gains them.

    python -m benchmarks.faults [--into FOLDER] [NAME ...]

Virtual time, three paired seeds, a ring of four: each scenario file with a smaller model, its faults at the same shares of
the run. The gain of a site is its final loss when it trains alone, less that when it codistills; the figure is the share of
the healthy sites' gain without faults (mean over sites and seeds) that is missing with them. What was run is kept in FOLDER,
and not run again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import tempfile
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import tomli_w

from benchmarks.figure import print_figure
from p2pcodistill.checkpoint.manifest import DEFAULT_CHUNK_BYTES
from p2pcodistill.report.history import SiteHistory
from p2pcodistill.simulation.data import prepare_data
from p2pcodistill.simulation.faults import afflicted
from p2pcodistill.simulation.files import SCENARIO_FILE, node_files, simulator_events, write_scenario
from p2pcodistill.simulation.jobs import make_jobs
from p2pcodistill.simulation.scenario import ScenarioConfig, load_scenario
from p2pcodistill.simulation.virtual.job import run_job

SIMULATIONS = Path(__file__).parents[1] / "simulations"
FAULTS = (
    "kills",
    "restart-all",
    "partition",
    "black-hole",
    "slow-site",
    "weak-link",
    "wrong-clock",
    "replaced-machine",
    "two-machines",
    "garbage",
    "replays",
    "forgeries",
    "flood",
    "ruined-weights",
)
FAULT_FREE = "fault-free"
SEEDS = (0, 1, 2)
MAX_LOST = 0.25
NUM_STEPS = 600
STEP_TIME_S = 2.0
SMALL: dict[str, dict[str, Any]] = {
    "data": {"max_bytes_per_site": 30_000, "max_held_out_bytes": 32_768},
    "task": {"name": "language-model", "embedding_size": 32, "hidden_size": 64, "num_layers": 1},
    "training": {
        "num_steps": NUM_STEPS,
        "learning_rate": 1e-2,
        "precision": "float32",
        "evaluation_interval_steps": 100,
    },
    "codistillation": {"burn_in_steps": 60, "exchange_interval_steps": 25},
    "virtual": {"step_time_s": STEP_TIME_S},
    "group": {"num_threads": 1},
}
"""An exchange takes 50 s of virtual time: as for a model that is worth an hour of such exchanges."""
NUM_SMALL_PARAMETERS = 49_920
NUM_REAL_PARAMETERS = 10_000_000
"""A link that a scenario calls thin is as thin for the small model as it would be for one of this size: so are its bits per
second, and how many chunks it carries from one reset to the next (chunks of the small model are its whole frames)."""

NUM_PROCESSES = 2
CODISTILLED, ALONE = "codistilled", "alone"
ARMS_WITHOUT = ((FAULT_FREE, CODISTILLED), (FAULT_FREE, ALONE))


class Part(NamedTuple):
    """One arm of one scenario under one seed."""

    name: str
    arm: str
    seed: int


Losses = Mapping[Part, Mapping[str, float]]
"""Final losses of each part, by site."""


def main() -> None:
    """Print a figure for each fault."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(FAULTS)}; default: all")
    parser.add_argument("--into", type=Path, metavar="FOLDER", help="keep the results here")
    options = parser.parse_args()
    for name in options.names:
        if name not in FAULTS:
            parser.error(f"there is no fault {name!r}: choose from {', '.join(FAULTS)}")
    names = options.names or FAULTS
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.into or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        parts = [Part(name, arm, seed) for name, arm in ARMS_WITHOUT for seed in SEEDS]
        parts += [Part(name, CODISTILLED, seed) for name in names for seed in SEEDS]
        with multiprocessing.get_context("spawn").Pool(NUM_PROCESSES, maxtasksperchild=6) as pool:
            losses: dict[Part, dict[str, float]] = {}
            for part, found in zip(parts, pool.imap(partial(measure, folder=folder), parts), strict=True):
                losses[part] = found
                if part.name in names and part.seed == SEEDS[-1]:
                    report(part.name, losses)


def report(name: str, losses: Losses) -> None:
    """Print the figure of one fault."""
    scenario = load_scenario(SIMULATIONS / f"{name}.toml")
    healthy = healthy_sites(scenario)
    lost = lost_share(losses, name, healthy)
    print_figure(
        "lost_gain",
        round(lost, 3),
        "share of the healthy sites' codistillation gain",
        f"<= {MAX_LOST:g}",
        holds=lost <= MAX_LOST,
        on=f"virtual time, ring of four, {NUM_STEPS} steps, {NUM_SMALL_PARAMETERS} parameters, seeds {SEEDS}",
        fault=name,
        healthy_sites=list(healthy),
        by_seed=[round(lost_share(losses, name, healthy, seeds=(seed,)), 3) for seed in SEEDS],
        alone=round(mean_loss(losses, FAULT_FREE, ALONE, healthy), 4),
        codistilled_fault_free=round(mean_loss(losses, FAULT_FREE, CODISTILLED, healthy), 4),
        codistilled=round(mean_loss(losses, name, CODISTILLED, healthy), 4),
    )


def healthy_sites(scenario: ScenarioConfig) -> tuple[str, ...]:
    """Those without a fault of their own; all of them where none is."""
    sick = afflicted(scenario.faults)
    return tuple(name for name in scenario.site_names if name not in sick) or scenario.site_names


def lost_share(losses: Losses, name: str, healthy: Sequence[str], *, seeds: Sequence[int] = SEEDS) -> float:
    """The share of the gain of `healthy` sites that is missing, mean over sites and `seeds`."""
    alone = mean_loss(losses, FAULT_FREE, ALONE, healthy, seeds)
    free = mean_loss(losses, FAULT_FREE, CODISTILLED, healthy, seeds)
    return (mean_loss(losses, name, CODISTILLED, healthy, seeds) - free) / (alone - free)


def mean_loss(
    losses: Losses, name: str, arm: str, sites: Sequence[str], seeds: Sequence[int] = SEEDS
) -> float:
    """Over sites and seeds."""
    found = [losses[Part(name, arm, seed)][site] for seed in seeds for site in sites]
    return sum(found) / len(found)


def measure(part: Part, *, folder: Path) -> dict[str, float]:
    """Final losses of the sites that have finished, unless they are in `folder` already."""
    kept = folder / f"{part.name}-{part.arm}-{part.seed}.json"
    if not kept.exists():
        with tempfile.TemporaryDirectory() as scratch:
            losses = run(part, Path(scratch))
        staged = kept.with_suffix(".new")
        staged.write_text(json.dumps(losses))
        staged.replace(kept)
    result: dict[str, float] = json.loads(kept.read_text())
    return result


def run(part: Part, folder: Path) -> dict[str, float]:
    """Run it in `folder`, which is empty; final losses of the sites that have finished."""
    file = folder / f"{part.name}.toml"
    file.write_text(tomli_w.dumps(small(part.name)))
    scenario = load_scenario(file)
    run_folder = folder / "run"
    run_folder.mkdir()
    write_scenario(scenario, prepare_data(scenario), run_folder)
    scenario = load_scenario(run_folder / SCENARIO_FILE)
    losses = {}
    for job in make_jobs(scenario):
        if (job.arm.name, job.seed) != (part.arm, part.seed):
            continue
        run_job(job, scenario, run_folder)
        if part.arm == CODISTILLED:
            require_all_faults(scenario, simulator_events(job, run_folder))
        for place in node_files(job, run_folder):
            history = SiteHistory.read(place.events)
            if history.finished and history.final_val_loss is not None:
                losses[place.site] = history.final_val_loss
    return losses


def require_all_faults(scenario: ScenarioConfig, log: Path) -> None:
    """Assert by the simulator's `log` that every fault has happened, and that what links were to lose or break, they did."""
    told = [json.loads(line) for line in log.read_text().splitlines()]
    happened = Counter(record["kind"] for record in told if record["event"] == "fault-injected")
    assert happened == Counter(fault.kind for fault in scenario.faults for _ in fault.sites)
    links = [record for record in told if record["event"] == "link-carried"]
    if any(fault.kind == "black-hole" for fault in scenario.faults):
        assert any(link["num_swallowed"] for link in links)
    if scenario.links:
        assert any(link["num_cuts"] for link in links)


def small(name: str) -> dict[str, Any]:
    """The scenario as it is run here; the first one, without faults, has the arm of the lone sites, too."""
    table = tomllib.loads((SIMULATIONS / f"{FAULTS[0] if name == FAULT_FREE else name}.toml").read_text())
    share = NUM_STEPS / table["training"]["num_steps"]
    for key, changes in SMALL.items():
        table[key] = table.get(key, {}) | changes
    for fault in table.get("faults", ()):
        if "at_step" in fault:
            fault["at_step"] = round(fault["at_step"] * share)
    for link in table.get("links", ()):
        shrink(link)
    if name == FAULT_FREE:
        table["faults"] = []
    else:
        table["arms"] = [arm for arm in table["arms"] if arm["kind"] == "codistilled"]
    return table | {"name": name, "mode": "virtual", "seeds": list(SEEDS)}


def shrink(link: dict[str, Any]) -> None:
    """Have a link be for the small model what it would be for a real one."""
    share = NUM_SMALL_PARAMETERS / NUM_REAL_PARAMETERS
    num_real_bytes = link["bandwidth_mbit"] * 1e6 / 8 * link["reset_interval_s"]
    link["bandwidth_mbit"] *= share
    num_frame_bytes = 2 * NUM_SMALL_PARAMETERS
    chunk_s = num_frame_bytes / (link["bandwidth_mbit"] * 1e6 / 8)
    link["reset_interval_s"] = num_real_bytes / DEFAULT_CHUNK_BYTES * chunk_s


if __name__ == "__main__":
    main()
