"""The fault scenarios of `simulations/` cut short, in virtual time or real processes, and what is asked of all of them."""

from __future__ import annotations

import io
import json
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

import tomli_w
from integration.conftest import TINY, merged, write_text
from integration.stores import require_whole_store

from p2pcodistill.simulation.data import prepare_data
from p2pcodistill.simulation.faults import absentees
from p2pcodistill.simulation.files import SCENARIO_FILE, write_scenario
from p2pcodistill.simulation.jobs import make_jobs
from p2pcodistill.simulation.processes import simulate
from p2pcodistill.simulation.scenario import load_scenario
from p2pcodistill.simulation.virtual.job import run_job

SIMULATIONS = Path(__file__).parents[2] / "simulations"
FAULT_SCENARIOS = sorted(
    path.stem
    for path in SIMULATIONS.glob("*.toml")
    if "[[faults]]" in path.read_text() or "[[links]]" in path.read_text()
    if 'mode = "virtual"' not in path.read_text()
)
SHORT: dict[str, Any] = merged(
    {key: TINY[key] for key in ("training", "group")},
    {
        "arms": [{"name": "codistilled", "kind": "codistilled"}],
        "task": {"embedding_size": 8, "hidden_size": 16, "window_tokens": 16},
        "data": {"max_bytes_per_site": 40_000, "max_held_out_bytes": 4096},
        "codistillation": {"burn_in_steps": 10, "exchange_interval_steps": 20, "agreement_interval_steps": 5},
        "training": {"evaluation_interval_steps": 50, "checkpoint_interval_steps": 20},
    },
)
VIRTUAL: dict[str, Any] = {
    "virtual": {"step_time_s": 1.0, "teacher_time_ratio": 0.0},
    "training": {"checkpoint_interval_steps": 10},
    "codistillation": {"burn_in_steps": 5, "exchange_interval_steps": 10},
}
"""Steps that take so long that quarantines and silences come and go within a run of few of them."""


class FaultRun:
    """A scenario file cut down to `num_steps` of a tiny model, its faults at the same shares of them; run to its end,
    which is `num_more_steps` later. `changes` are merged into the file's tables."""

    def __init__(
        self,
        folder: Path,
        name: str,
        *,
        num_steps: int,
        num_more_steps: int = 0,
        mode: str = "virtual",
        **changes: Any,
    ) -> None:
        scenario = merged(tomllib.loads((SIMULATIONS / f"{name}.toml").read_text()), changes)
        share = num_steps / scenario["training"]["num_steps"]
        for fault in scenario.get("faults", ()):
            if "at_step" in fault:
                fault["at_step"] = round(fault["at_step"] * share)
        self.names = [site["name"] for site in scenario["sites"]]
        for index, site in enumerate(self.names):
            write_text(folder / f"{site}.txt", seed=index, num_bytes=60_000)
        own: dict[str, Any] = {
            "mode": mode,
            "training": {"num_steps": num_steps + num_more_steps},
            "data": {"paths": [f"{site}.txt" for site in self.names]},
        }
        if mode == "virtual":
            own = merged(VIRTUAL, own)
        path = folder / f"{name}.toml"
        path.write_text(tomli_w.dumps(merged(scenario, SHORT, own)))
        self.scenario = load_scenario(path)
        run_folder = self._run_virtual(folder) if mode == "virtual" else self._run_processes(path)
        self.folder = run_folder / "codistilled-seed0"
        self.simulator = self._read(self.folder / "simulator.jsonl")
        self.faults = Counter(r["kind"] for r in self.simulator if r["event"] == "fault-injected")
        self.require_all_faults()

    def _run_virtual(self, folder: Path) -> Path:
        run_folder = folder / "run"
        run_folder.mkdir()
        write_scenario(self.scenario, prepare_data(self.scenario), run_folder)
        scenario = load_scenario(run_folder / SCENARIO_FILE)
        (job,) = make_jobs(scenario)
        run_job(job, scenario, run_folder)
        return run_folder

    def _run_processes(self, path: Path) -> Path:
        runs = path.parent / "runs"
        assert simulate(path, run_root=runs, stream=io.StringIO()) == 0
        return runs / "latest"

    # --- what happened -----------------------------------------------------------------------------------------------

    def events(self, site: str, name: str, **fields: Any) -> list[dict[str, Any]]:
        """The events of that name at `site` whose fields have these values."""
        return [
            record
            for record in self.log(site)
            if record["event"] == name and all(record[key] == value for key, value in fields.items())
        ]

    def log(self, site: str) -> list[dict[str, Any]]:
        """All that `site` told."""
        return self._read(self.folder / site / "events.jsonl")

    def fault_times_s(self, kind: str) -> list[float]:
        """When faults of that kind happened, one entry a site."""
        return [r["time_unix_s"] for r in self.simulator if r.get("kind") == kind]

    def link(self, *sites: str) -> dict[str, Any]:
        """What the link between two sites carried."""
        (found,) = (
            r for r in self.simulator if r["event"] == "link-carried" and set(r["sites"]) == set(sites)
        )
        return found

    def has_finished(self, site: str) -> bool:
        """Whether it made all its steps, after whatever befell it."""
        ended = self.events(site, "training-ended")
        return bool(ended) and ended[-1]["finished"]

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]

    # --- what is asked of it -----------------------------------------------------------------------------------------

    def require_all_faults(self) -> None:
        """Every fault of the file has happened to each of its sites."""
        expected = Counter(fault.kind for fault in self.scenario.faults for _ in fault.sites)
        assert self.faults == expected

    @property
    def expected_absent(self) -> frozenset[str]:
        """The sites that faults take away for good."""
        return absentees(self.scenario.faults)

    def require_healthy(self, *absent: str) -> None:
        """All but the `absent` have finished and learnt from their teachers."""
        for name in self.names:
            if name not in absent:
                assert self.has_finished(name), name
                assert len(self.events(name, "teacher-swapped")) >= 2, name

    def require_whole_stores(self) -> None:
        """After real processes: what their events tell of is on disk, whole."""
        for name in self.names:
            require_whole_store(self.folder / "nodes" / f"{name}.toml", self.folder / name)
