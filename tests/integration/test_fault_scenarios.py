"""The fault scenarios of `simulations/`, short, in real processes with tiny models: training ends, nothing is lost or left.

`make soak` does the same for longer (tests/soak.py).
"""

from __future__ import annotations

import io
import itertools
import json
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
from integration.conftest import TINY, is_ours, merged, write_text
from integration.stores import require_whole_store

from p2pcodistill.simulation.processes import simulate

SIMULATIONS = Path(__file__).parents[2] / "simulations"
SHORT: dict[str, Any] = merged(
    {key: TINY[key] for key in ("training", "group")},
    {
        "arms": [{"name": "codistilled", "kind": "codistilled"}],
        "task": {"embedding_size": 8, "hidden_size": 16, "window_bytes": 16},
        "data": {"max_bytes_per_site": 40_000, "max_held_out_bytes": 4096},
        "codistillation": {"burn_in_steps": 10, "exchange_interval_steps": 20, "agreement_interval_steps": 5},
        "training": {"evaluation_interval_steps": 50},
    },
)


class ShortRun:
    """A scenario file cut down to `num_steps` of a tiny model, its faults at the same shares of them; run to its end,
    which is `num_more_steps` later."""

    def __init__(self, folder: Path, name: str, *, num_steps: int, num_more_steps: int = 0) -> None:
        scenario = tomllib.loads((SIMULATIONS / f"{name}.toml").read_text())
        share = num_steps / scenario["training"]["num_steps"]
        for fault in scenario.get("faults", ()):
            fault["at_step"] = round(fault["at_step"] * share)
        self.names = [site["name"] for site in scenario["sites"]]
        for index, site in enumerate(self.names):
            write_text(folder / f"{site}.txt", seed=index, num_bytes=60_000)
        own = {
            "training": {"num_steps": num_steps + num_more_steps},
            "data": {"paths": [f"{site}.txt" for site in self.names]},
        }
        path = folder / f"{name}.toml"
        path.write_text(tomli_w.dumps(merged(scenario, SHORT, own)))
        self.status = simulate(path, run_root=folder / "runs", stream=io.StringIO())
        run_folder = folder / "runs" / "latest"
        self.folder = run_folder / "codistilled-seed0"
        (self.arm,) = json.loads((run_folder / "summary.json").read_text())["arms"]
        self.simulator = self._read(self.folder / "simulator.jsonl")
        self.faults = Counter(
            record["kind"] for record in self.simulator if record["event"] == "fault-injected"
        )

    def require_healthy(self) -> None:
        """All sites have finished and learnt from their teachers, and their stores hold what their events tell, whole."""
        assert self.status == 0
        for name, site in self.arm["sites"].items():
            assert site["finished"] and site["num_teacher_swaps"] >= 2, (name, site)
            require_whole_store(self.folder / "nodes" / f"{name}.toml", self.folder / name)

    def events(self, site: str, name: str, **fields: Any) -> list[dict[str, Any]]:
        """The events of that name at `site` whose fields have these values."""
        return [
            record
            for record in self._read(self.folder / site / "events.jsonl")
            if record["event"] == name and all(record[key] == value for key, value in fields.items())
        ]

    @staticmethod
    def _read(path: Path) -> list[dict[str, Any]]:
        return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    left = [process for process in psutil.Process().children(recursive=True) if is_ours(process)]
    assert left == [], f"processes outlived the simulation: {left}"


def test_every_node_of_a_ring_is_killed_in_turn(tmp_path: Path) -> None:
    run = ShortRun(tmp_path, "kills", num_steps=800)
    assert run.faults == {"kill": 5, "restart": 5}
    starts = {name: site["num_node_starts"] for name, site in run.arm["sites"].items()}
    assert starts == {"berlin": 3, "tokyo": 2, "lima": 2, "accra": 2}
    for name in run.names:
        assert all(record["start_step"] > 0 for record in run.events(name, "training-started")[1:]), "resumed"
    run.require_healthy()


def test_a_ring_falls_apart_and_heals(tmp_path: Path) -> None:
    # Who could not be reached for long is dialled less and less often: time to find each other again.
    run = ShortRun(tmp_path, "partition", num_steps=500, num_more_steps=500)
    assert run.faults == {"partition": 2, "heal": 2}
    cut, healed = (
        next(r["time_unix_s"] for r in run.simulator if r.get("kind") == kind)
        for kind in ("partition", "heal")
    )
    for here, there in (("tokyo", "lima"), ("berlin", "accra")):
        swaps = [record["time_unix_s"] for record in run.events(here, "teacher-swapped", teacher=there)]
        assert min(swaps) < cut and max(swaps) > healed, "before and after, they learn from each other"
        fetched = [record["time_unix_s"] for record in run.events(here, "frame-fetched", origin=there)]
        assert not [time_s for time_s in fetched if cut + 0.5 < time_s < healed], (
            "and nothing passes in between"
        )
        assert run.events(here, "peer-disconnected", peer=there)
    within = [record["time_unix_s"] for record in run.events("berlin", "teacher-swapped", teacher="tokyo")]
    assert [time_s for time_s in within if cut < time_s < healed], "the two sides go on"
    links = {tuple(r["sites"]): r["num_cuts"] for r in run.simulator if r["event"] == "link-carried"}
    assert links.keys() == {("berlin", "accra"), ("tokyo", "lima")} and min(links.values()) >= 2
    run.require_healthy()


def test_a_slow_site_slows_nobody_else(tmp_path: Path) -> None:
    run = ShortRun(tmp_path, "slow-site", num_steps=400)
    assert run.faults == {"slow-down": 2}
    begun, over = (record for record in run.simulator if record.get("kind") == "slow-down")

    def num_steps(site: str) -> int:
        steps = [(record["time_unix_s"], record["step"]) for record in run.events(site, "step-measured")]
        return sum(
            after[1] - before[1]
            for before, after in itertools.pairwise(steps)
            if begun["time_unix_s"] < before[0] and after[0] < over["time_unix_s"]
        )

    assert num_steps("berlin") > 3 * num_steps("tokyo") > 0
    run.require_healthy()


def test_a_weak_link_is_enough(tmp_path: Path) -> None:
    run = ShortRun(tmp_path, "weak-link", num_steps=1000)
    (link,) = (record for record in run.simulator if record["event"] == "link-carried")
    sent = sum(run.arm["sites"][name]["bytes_sent"] for name in run.names)
    assert link["num_bytes"] > 0.8 * sent
    run.require_healthy()


def test_all_sites_restart_at_once(tmp_path: Path) -> None:
    run = ShortRun(tmp_path, "restart-all", num_steps=800)
    assert run.faults == {"kill": 2, "restart": 2}
    killed_s = min(record["time_unix_s"] for record in run.simulator if record.get("kind") == "kill")
    start_steps = []
    for name in run.names:
        assert run.arm["sites"][name]["num_node_starts"] == 2
        again = run.events(name, "training-started")[-1]
        start_steps.append(again["start_step"])
        if run.events(name, "teacher-swapped")[0]["time_unix_s"] < killed_s:
            # What it had of its teacher was on disk: that teaches before its first step.
            assert run.events(name, "teacher-swapped", step=again["start_step"])
    assert max(start_steps) >= 300, "whoever was half-way went on from there"
    run.require_healthy()
