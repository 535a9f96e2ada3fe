"""Scenario files in virtual time, from the command to the report."""

from __future__ import annotations

import io
import json
import signal
from collections import Counter
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
import torch

from p2pcodistill.errors import GroupError
from p2pcodistill.simulation.data import prepare_data
from p2pcodistill.simulation.files import SCENARIO_FILE, write_scenario
from p2pcodistill.simulation.jobs import make_jobs
from p2pcodistill.simulation.processes import simulate
from p2pcodistill.simulation.scenario import load_scenario
from p2pcodistill.simulation.virtual import jobs
from p2pcodistill.simulation.virtual.job import run_job

REPOSITORY = Path(__file__).parents[2]


def scenario(**changes: Any) -> dict[str, Any]:
    """A small one: two sites, each arm of a kind."""
    return {
        "name": "small",
        "mode": "virtual",
        "topology": "pair",
        "sites": [{"name": "berlin"}, {"name": "tokyo"}],
        "data": {"max_bytes_per_site": 20_000, "max_held_out_bytes": 2_048},
        "arms": [{"name": kind, "kind": kind} for kind in ("codistilled", "alone", "pooled")],
        "group": {"num_threads": 1},
        "virtual": {"teacher_time_ratio": 0.0},
        "task": {"embedding_size": 8, "hidden_size": 16, "num_layers": 1, "window_tokens": 16},
        "training": {
            "num_steps": 60,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "precision": "float32",
            "evaluation_interval_steps": 20,
            "checkpoint_interval_steps": 20,
        },
        "codistillation": {"burn_in_steps": 10, "exchange_interval_steps": 10},
        "links": [{"between": ["berlin", "tokyo"], "bandwidth_mbit": 0.2, "latency_ms": 100}],
        "faults": [
            {"kind": "kill", "sites": ["tokyo"], "at_step": 25},
            {"kind": "restart", "sites": ["tokyo"], "at_step": 40},
        ],
    } | changes


def run(folder: Path, table: dict[str, Any]) -> tuple[Path, str]:
    """The run folder, and what was shown."""
    folder.mkdir(exist_ok=True)
    file = folder / "scenario.toml"
    file.write_text(tomli_w.dumps(table))
    stream = io.StringIO()
    assert simulate(file, run_root=folder / "runs", stream=stream) == 0
    return (folder / "runs" / "latest").resolve(), stream.getvalue()


def run_here(folder: Path, table: dict[str, Any]) -> Path:
    """The run folder of a scenario with one job, which runs in this process: it has loaded all that takes time."""
    folder.mkdir(exist_ok=True)
    file = folder / "scenario.toml"
    file.write_text(tomli_w.dumps(table))
    scenario = load_scenario(file)
    write_scenario(scenario, prepare_data(scenario), folder)
    scenario = load_scenario(folder / SCENARIO_FILE)
    (job,) = make_jobs(scenario)
    num_threads = torch.get_num_threads()
    try:
        torch.set_num_threads(job.num_threads)
        run_job(job, scenario, folder)
    finally:
        torch.set_num_threads(num_threads)
    return folder


def events(run_folder: Path) -> dict[str, str]:
    """All event logs of a run."""
    return {
        str(path.relative_to(run_folder)): path.read_text()
        for path in sorted(run_folder.glob("*/**/*.jsonl"))
    }


def test_a_scenario_runs_in_virtual_time_alike_each_time(tmp_path: Path) -> None:
    first, shown = run(tmp_path / "first", scenario())
    logs = events(first)
    assert set(logs) == {
        "codistilled-seed0/berlin/events.jsonl",
        "codistilled-seed0/tokyo/events.jsonl",
        "codistilled-seed0/simulator.jsonl",
        "alone-seed0/berlin/events.jsonl",
        "alone-seed0/tokyo/events.jsonl",
        "pooled-seed0/pooled/events.jsonl",
    }
    told = [json.loads(line) for line in logs["codistilled-seed0/tokyo/events.jsonl"].splitlines()]
    counts = Counter(record["event"] for record in told)
    assert counts["node-started"] == counts["training-started"] == 2
    assert counts["teacher-swapped"] >= 2 and counts["training-ended"] == 1
    assert [r["start_step"] for r in told if r["event"] == "training-started"] == [0, 20]
    faults = [json.loads(line) for line in logs["codistilled-seed0/simulator.jsonl"].splitlines()]
    assert [r["kind"] for r in faults if r["event"] == "fault-injected"] == ["kill", "restart"]
    (link,) = [r for r in faults if r["event"] == "link-carried"]
    assert link["sites"] == ["berlin", "tokyo"] and link["num_bytes"] > 10_000

    summary = json.loads((first / "summary.json").read_text())
    losses = summary["final_val_loss"]
    assert all(2 < losses[kind] < 5 for kind in ("codistilled", "alone", "pooled"))
    assert summary["arms"][0]["sites"]["berlin"]["steps_per_s"] == pytest.approx(10.0)
    assert "Who had which version when" in (first / "report.html").read_text()
    assert "small: 60 steps" in shown

    again = run_here(tmp_path / "again", scenario(arms=[{"name": "codistilled", "kind": "codistilled"}]))
    assert events(again) == {name: log for name, log in logs.items() if name.startswith("codistilled")}


def test_the_steps_take_the_time_that_the_scenario_gives_them(tmp_path: Path) -> None:
    virtual = {"step_time_s": 2.0, "teacher_time_ratio": 0.0}
    changes = {"virtual": virtual, "faults": [], "arms": [{"name": "x", "kind": "codistilled"}]}
    folder = run_here(tmp_path, scenario(**changes))
    told = [json.loads(line) for line in (folder / "x-seed0/berlin/events.jsonl").read_text().splitlines()]
    (ended,) = [record for record in told if record["event"] == "training-ended"]
    assert ended["time_unix_s"] == ended["duration_s"] == pytest.approx(120.0)


def test_a_job_that_fails_is_named_with_the_end_of_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs, "JOB_COMMAND", (*jobs.JOB_COMMAND[:1], "-c", "raise SystemExit('no room')"))
    with pytest.raises(GroupError, match=r"the arm codistilled \(seed 0\) ended with status 1.*\nno room"):
        run(tmp_path, scenario())


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_every_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, signum: signal.Signals
) -> None:
    program = f"import os, signal; print(os.getpid(), flush=True); os.kill(os.getppid(), {signum:d}); signal.pause()"
    monkeypatch.setattr(jobs, "JOB_COMMAND", (*jobs.JOB_COMMAND[:1], "-c", program))
    file = tmp_path / "scenario.toml"
    file.write_text(tomli_w.dumps(scenario(arms=[{"name": "codistilled", "kind": "codistilled"}])))
    handlers = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    stream = io.StringIO()
    assert simulate(file, run_root=tmp_path / "runs", stream=stream) == 128 + signum
    assert f"stopped by {signum.name}" in stream.getvalue()
    (log,) = (tmp_path / "runs" / "latest").glob("codistilled-seed0/virtual-*.log")
    assert not psutil.pid_exists(int(log.read_text()))
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_the_ring_of_eight(tmp_path: Path) -> None:
    stream = io.StringIO()
    file = REPOSITORY / "simulations" / "ring-of-eight-virtual.toml"
    assert simulate(file, run_root=tmp_path, stream=stream) == 0
    folder = (tmp_path / "latest").resolve()
    summary = json.loads((folder / "summary.json").read_text())
    sites = summary["arms"][0]["sites"]
    assert len(sites) == 8 and all(site["finished"] for site in sites.values())
    # Half of 5 steps/s in burn-in, and three fifths of that with two teachers.
    assert 1.5 < sites["mumbai"]["steps_per_s"] < 2.0
    assert sites["berlin"]["mean_staleness_steps"] > sites["mumbai"]["mean_staleness_steps"]
    faults = (folder / "codistilled-seed0" / "simulator.jsonl").read_text()
    assert Counter(json.loads(line)["event"] for line in faults.splitlines()) == {
        "fault-injected": 5,
        "link-carried": 8,
    }
