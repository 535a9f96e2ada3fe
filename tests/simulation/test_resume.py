"""Simulations that were stopped go on where they were: what has finished is kept, and the result is the same."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import tomli_w

from p2pcodistill.cli import main
from p2pcodistill.errors import GroupError, RunFolderError
from p2pcodistill.report.live import make_view
from p2pcodistill.report.run_progress import RunProgress
from p2pcodistill.runfolder import lock_folder
from p2pcodistill.simulation import processes, watch
from p2pcodistill.simulation.files import SCENARIO_FILE, find_run_folder
from p2pcodistill.simulation.finished import JOBS_FILE, FinishedJobs
from p2pcodistill.simulation.jobs import Job, make_jobs
from p2pcodistill.simulation.processes import resume, simulate
from p2pcodistill.simulation.scenario import ScenarioConfig, load_scenario
from p2pcodistill.simulation.virtual import jobs as virtual_jobs
from p2pcodistill.simulation.watch import JobWatch, stage_of
from p2pcodistill.telemetry.log import EventLog
from p2pcodistill.telemetry.records import to_record
from p2pcodistill.telemetry.training_events import TrainingEnded, TrainingStarted

REPOSITORY = Path(__file__).parents[2]

SYNTHETIC: dict[str, Any] = {
    "name": "few",
    "mode": "virtual",
    "topology": "ring:6",
    "seeds": [0, 1, 2],
    "synthetic": {"num_steps": 200, "exchange_interval_steps": 25, "event_logs": True},
    "links": [{"between": "all", "bandwidth_mbit": 100, "latency_ms": 50}],
    "faults": [
        {"kind": "kill", "sites": ["2"], "at_step": 60},
        {"kind": "restart", "sites": ["2"], "at_step": 120},
    ],
}
TRAINING: dict[str, Any] = {
    "name": "small",
    "mode": "virtual",
    "topology": "pair",
    "sites": [{"name": "berlin"}, {"name": "tokyo"}],
    "data": {"max_bytes_per_site": 20_000, "max_held_out_bytes": 2_048},
    "arms": [{"name": kind, "kind": kind} for kind in ("codistilled", "pooled")],
    "search": {"grid": [{"key": "training.learning_rate", "values": [1e-3, 1e-2], "arms": ["pooled"]}]},
    "group": {"num_threads": 1},
    "task": {"embedding_size": 8, "hidden_size": 16, "num_layers": 1, "window_tokens": 16},
    "training": {"num_steps": 60, "batch_size": 4, "precision": "float32", "evaluation_interval_steps": 10},
    "codistillation": {"burn_in_steps": 10, "exchange_interval_steps": 10},
}


def write(folder: Path, table: dict[str, Any]) -> Path:
    file = folder / "scenario.toml"
    file.write_text(tomli_w.dumps(table))
    return file


def newest(folder: Path) -> Path:
    return (folder / "runs" / "latest").resolve()


# --- virtual time: the same result -----------------------------------------------------------------------------------


def run_until(arguments: list[str], folder: Path, is_enough: Callable[[str], bool]) -> bool:
    """Simulate until a line that was printed is enough, and kill -9 then; False when it finished before."""
    command = [sys.executable, "-m", "p2pcodistill", "simulate", *arguments, "--runs", str(folder / "runs")]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as simulation:
        assert simulation.stdout is not None
        for line in simulation.stdout:
            if is_enough(line):
                simulation.kill()
                return True
    assert simulation.returncode == 0
    return False


def finished(run_folder: Path) -> dict[Path, int]:
    """The event logs of all jobs that are entered as finished, and when each was last written."""
    return {
        run_folder / entry.parent.relative_to(run_folder) / path: (entry.parent / path).stat().st_mtime_ns
        for entry in run_folder.rglob(JOBS_FILE)
        for job in json.loads(entry.read_text())["finished"].values()
        for path in job["files"]
    }


def logs(run_folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(run_folder)): path.read_text() for path in sorted(run_folder.rglob("*.jsonl"))
    }


def without_wall_times(value: Any) -> Any:
    """`value` without what the clock on the wall said."""
    if isinstance(value, Mapping):
        return {key: without_wall_times(one) for key, one in value.items() if key != "processor_s"}
    return [without_wall_times(one) for one in value] if isinstance(value, list) else value


def read_json(path: Path) -> Any:
    return without_wall_times(json.loads(path.read_text()))


@pytest.mark.parametrize(
    ("table", "num_kills", "num_lines"), [(SYNTHETIC, 2, 10), (TRAINING, 1, 8)], ids=["synthetic", "training"]
)
def test_a_run_that_was_killed_comes_to_what_one_that_was_not_comes_to(
    tmp_path: Path, table: dict[str, Any], num_kills: int, num_lines: int
) -> None:
    seed = random.SystemRandom().randrange(2**32)
    print(f"moments of seed {seed}")  # shown if it fails
    moments = random.Random(seed)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    for folder in (killed, whole):
        folder.mkdir()
    arguments = [str(write(killed, table))]
    num_killed = 0
    for _ in range(num_kills):
        lines_left = [moments.randrange(2, num_lines)]  # the first are told before anything runs

        def is_enough(line: str, left: list[int] = lines_left) -> bool:
            left[0] -= 1
            return left[0] == 0

        before = finished(newest(killed)) if num_killed else {}
        num_killed += run_until(arguments, killed, is_enough)
        assert finished(newest(killed)).items() >= before.items(), "what had finished was run again"
        arguments = ["--resume", "latest"]
    assert num_killed >= 1
    assert not run_until(arguments, killed, lambda _: False)
    assert not run_until([str(write(whole, table))], whole, lambda _: False)
    assert len(list((killed / "runs").glob("*-*"))) == 1, "all in one folder"

    one, other = newest(killed), newest(whole)
    assert len(logs(one)) >= 5 and logs(one) == logs(other)
    assert read_json(one / "summary.json") == read_json(other / "summary.json")
    if "search" in table:
        assert read_json(one / "search.json") == read_json(other / "search.json")
        assert (one / SCENARIO_FILE).read_text() == (other / SCENARIO_FILE).read_text()


# --- jobs that are played --------------------------------------------------------------------------------------------

PLAYED_JOB = """
import os, sys, time
from pathlib import Path
from p2pcodistill.simulation.files import SCENARIO_FILE, node_files
from p2pcodistill.simulation.jobs import make_jobs
from p2pcodistill.simulation.scenario import load_scenario
from p2pcodistill.telemetry.log import EventLog
from p2pcodistill.telemetry.training_events import Evaluated, TrainingEnded, TrainingStarted

parent, folder, index, num_threads = sys.argv[1:]
folder, pipes = Path(folder), Path(os.environ["PLAYED_JOBS"])
job = make_jobs(load_scenario(folder / SCENARIO_FILE))[int(index)]
with (pipes / "begun").open("a") as begun:
    print(job.name, num_threads, file=begun)
if (pipes / "meet").exists():  # two at a time, or never
    def order():
        return [line.split()[0] for line in (pipes / "begun").read_text().splitlines()]
    while len(order()) < order().index(job.name) // 2 * 2 + 2:
        time.sleep(0.01)
if (pipes / "fail").exists() and job.name == (pipes / "fail").read_text():
    sys.exit("no room")
for place in node_files(job, folder):
    place.run_folder.mkdir(parents=True)
    events = EventLog(place.events)
    events.write(TrainingStarted(0, 60, 1000, 1, "cpu", "float32"))
    events.write(Evaluated(60, 2.0, 0.1))
    events.write(TrainingEnded(60, True, 0.1, 10.0))
"""


class PlayedJobs:
    """A scenario in virtual time whose jobs only say that they have trained."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        (folder / "job.py").write_text(PLAYED_JOB)
        monkeypatch.setenv("PLAYED_JOBS", str(folder))
        monkeypatch.setenv("PYTHONPATH", str(REPOSITORY))
        monkeypatch.setattr(virtual_jobs, "JOB_COMMAND", (sys.executable, str(folder / "job.py")))
        monkeypatch.setattr(processes, "available_cores", lambda: 2)
        monkeypatch.setattr(processes, "report", lambda *_: None)

    def run(self, **changes: Any) -> str:
        stream = io.StringIO()
        table = TRAINING | {"group": {}} | changes
        file = write(self.folder, {key: value for key, value in table.items() if value is not None})
        assert simulate(file, run_root=self.folder / "runs", stream=stream) == 0
        return stream.getvalue()

    def resume(self) -> str:
        stream = io.StringIO()
        assert resume(Path("latest"), run_root=self.folder / "runs", stream=stream) == 0
        return stream.getvalue()

    @property
    def begun(self) -> list[str]:
        """The jobs that were started, and their threads."""
        return (self.folder / "begun").read_text().splitlines()

    def fail(self, job: str | None) -> None:
        """Have that job fail."""
        (self.folder / "fail").write_text(job or "")


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PlayedJobs:
    return PlayedJobs(tmp_path, monkeypatch)


def test_jobs_and_trials_run_side_by_side_with_one_thread_each_and_the_longest_first(
    played: PlayedJobs,
) -> None:
    (played.folder / "meet").touch()
    grid = [{"key": "training.learning_rate", "values": [1e-3, 1e-2]}]
    arms = [
        {"name": "short", "kind": "alone", "training": {"num_steps": 30}},
        {"name": "alone", "kind": "alone"},
        {"name": "together", "kind": "codistilled"},
        {"name": "pooled", "kind": "pooled"},
    ]
    shown = played.run(arms=arms, search={"grid": grid})
    trials, jobs = played.begun[:12], played.begun[12:]
    assert all(line.endswith(" 1") for line in played.begun)
    tried = [line.split("-")[1] for line in trials]
    assert tried[:2] == ["together"] * 2 and tried[-4:] == ["short"] * 4
    ran = [line.split("-")[0] for line in jobs]
    assert "together" in ran[:2] and ran[-2:] == ["short"] * 2 and len(ran) == 6
    assert "search: 11 of 12 trials done, 1 running; then 6 jobs" in shown and "6 of 6 jobs done" in shown


def test_fewer_jobs_than_cores_share_these(played: PlayedJobs) -> None:
    played.run(arms=[{"name": "pooled", "kind": "pooled"}], search=None)
    assert played.begun == ["pooled-seed0 2"]


def test_after_a_failure_only_what_has_not_finished_runs_again(played: PlayedJobs) -> None:
    played.fail("pooled-seed0")
    stream = io.StringIO()
    file = write(played.folder, TRAINING)
    with pytest.raises(GroupError, match="no room"):
        simulate(file, run_root=played.folder / "runs", stream=stream)
    folder = newest(played.folder)
    told = stream.getvalue().splitlines()[-1]
    assert told.startswith("what has finished is kept; to go on: p2pcodistill simulate --resume ")
    assert told.endswith(folder.name)
    assert {line.split()[0] for line in played.begun} >= {
        "1.0-pooled-seed1000000",
        "1.1-pooled-seed1000000",
        "pooled-seed0",
    }
    chosen = (folder / SCENARIO_FILE).read_text()
    was_begun = set(played.begun)
    (played.folder / "begun").unlink()
    played.fail(None)
    played.resume()
    assert "pooled-seed0 1" in played.begun and not any("1000000" in line for line in played.begun)
    assert len(was_begun | set(played.begun)) == 4
    assert (folder / SCENARIO_FILE).read_text() == chosen, "the choice of the search is kept"
    (played.folder / "begun").write_text("")
    assert played.resume() == f"{find_run_folder(Path('latest'), played.folder / 'runs')} is complete\n"
    assert played.begun == []


def test_ctrl_c_tells_how_to_go_on(played: PlayedJobs, monkeypatch: pytest.MonkeyPatch) -> None:
    program = f"import os, signal; os.kill(os.getppid(), {signal.SIGINT:d}); signal.pause()"
    monkeypatch.setattr(virtual_jobs, "JOB_COMMAND", (sys.executable, "-c", program))
    stream = io.StringIO()
    root = played.folder / "my runs"
    assert simulate(write(played.folder, TRAINING), run_root=root, stream=stream) == 128 + signal.SIGINT
    run_folder = find_run_folder(Path("latest"), root)
    assert stream.getvalue().endswith(
        f"stopped by SIGINT; to go on: p2pcodistill simulate --resume '{run_folder}'\n"
    )


# --- what has finished -----------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    table = {key: value for key, value in TRAINING.items() if key != "search"}
    arms = [{"name": kind, "kind": kind} for kind in ("codistilled", "alone", "pooled")]
    write(tmp_path, table | {"arms": arms})
    return tmp_path


def loaded(run_folder: Path) -> tuple[ScenarioConfig, dict[str, Job]]:
    scenario = load_scenario(run_folder / SCENARIO_FILE)
    return scenario, {job.name: job for job in make_jobs(scenario)}


def train(run_folder: Path, site: str, *, has_finished: bool = True) -> Path:
    path = run_folder / site / "events.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    events = EventLog(path)
    events.write(TrainingStarted(0, 60, 1000, 1, "cpu", "float32"))
    events.write(TrainingEnded(60 if has_finished else 30, has_finished, 0.1, 10.0))
    events.close()
    return path


def test_a_job_has_finished_when_it_is_entered_and_all_of_it_is_there(run_folder: Path) -> None:
    scenario, jobs = loaded(run_folder)
    assert list(jobs) == ["codistilled-seed0", "alone-seed0/berlin", "alone-seed0/tokyo", "pooled-seed0"]
    path = train(run_folder, "alone-seed0/berlin")
    (path.parent / "model.safetensors").write_bytes(b"weights")
    berlin = jobs["alone-seed0/berlin"]
    assert FinishedJobs(scenario, run_folder).duration_s(berlin) is None, "a folder alone means nothing"
    FinishedJobs(scenario, run_folder).add(berlin, 12.5)
    again = FinishedJobs(scenario, run_folder)
    assert [again.duration_s(job) for job in jobs.values()] == [None, 12.5, None, None]
    path.write_text(path.read_text() + "\n")
    assert again.duration_s(berlin) is None
    again.add(berlin, 13.0)
    assert again.duration_s(berlin) == 13.0
    (path.parent / "model.safetensors").unlink()
    assert FinishedJobs(scenario, run_folder).duration_s(berlin) == 13.0, (
        "models are large, and not read again"
    )
    path.unlink()
    assert FinishedJobs(scenario, run_folder).duration_s(berlin) is None


def test_what_is_entered_is_how_long_the_job_ran_since_its_last_start(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = 1000.0
    monkeypatch.setattr(watch, "time", SimpleNamespace(monotonic=lambda: now_s))
    scenario, jobs = loaded(run_folder)
    stage = stage_of(list(jobs.values()), scenario)
    progress = RunProgress([("", list(stage.values()))], 1, clock=lambda: now_s)
    finished = FinishedJobs(scenario, run_folder)
    job = jobs["pooled-seed0"]
    train(run_folder, "pooled-seed0/pooled")
    with make_view("small", io.StringIO()) as view:
        following = JobWatch(scenario, stage, progress=progress, finished=finished, view=view)
        following.begin(job)
        now_s += 0.5
        following.note(job, "pooled", to_record(TrainingStarted(30, 60, 1000, 1, "cpu", "float32")))
        now_s += 3.5
        following.end(job)
    assert finished.duration_s(job) == 4.0
    assert stage[job.name].duration_s == 8.0, (
        "what the estimate goes by: all of it, of which half was done before"
    )


def test_a_job_whose_training_stopped_early_is_not_entered(run_folder: Path) -> None:
    scenario, jobs = loaded(run_folder)
    train(run_folder, "codistilled-seed0/berlin")
    train(run_folder, "codistilled-seed0/tokyo", has_finished=False)
    with pytest.raises(
        GroupError, match=r"the site tokyo of the arm codistilled .* ended before its training"
    ):
        FinishedJobs(scenario, run_folder).add(jobs["codistilled-seed0"], 1.0)
    assert not (run_folder / JOBS_FILE).exists()
    train(run_folder, "codistilled-seed0/tokyo")
    FinishedJobs(scenario, run_folder).add(jobs["codistilled-seed0"], 1.0)


def test_finished_jobs_of_another_scenario_or_a_damaged_file_are_refused(run_folder: Path) -> None:
    scenario, jobs = loaded(run_folder)
    train(run_folder, "pooled-seed0/pooled")
    FinishedJobs(scenario, run_folder).add(jobs["pooled-seed0"], 1.0)
    text = (run_folder / SCENARIO_FILE).read_text()
    (run_folder / SCENARIO_FILE).write_text(text.replace("num_steps = 60", "num_steps = 61"))
    with pytest.raises(
        RunFolderError, match=r"scenario\.toml was changed since the simulation began: restore"
    ):
        FinishedJobs(scenario, run_folder)
    (run_folder / SCENARIO_FILE).write_text(text)
    whole = json.loads((run_folder / JOBS_FILE).read_text())
    entries = (
        None,
        [],
        {"duration_s": 1.0},
        {"duration_s": None, "files": {}},
        {"duration_s": 1.0, "files": []},
    )
    damaged = [json.dumps(whole | {"finished": {"pooled-seed0": entry}}) for entry in entries]
    for damage in ("{", "[]", '{"scenario": "x"}', *damaged):
        (run_folder / JOBS_FILE).write_text(damage)
        with pytest.raises(RunFolderError, match=r"jobs\.json is damaged: remove it, and all jobs run again"):
            FinishedJobs(scenario, run_folder)


# --- what cannot go on -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--resume", "RUN", "scenario.toml"], "leave out FILE"),
        (["--resume", "RUN", "--set", "training.num_steps=3"], "leave out --set"),
        (["--resume", "RUN", "--data", "corpus"], "leave out --data"),
        (["--resume", "RUN", "--namespaces"], "leave out --namespaces"),
        ([], "give FILE, or --resume RUN"),
        (["--resume", "nowhere"], "there is no run folder nowhere"),
        (["--resume", "latest", "--runs", "RUN"], "there is no run folder"),
        (["--resume", "RUN"], "is no run that can go on: there is no run.json"),
        (["--resume", "EMPTY"], "has no scenario.toml"),
    ],
)
def test_what_cannot_go_on_is_refused_in_one_line(
    run_folder: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], told: str
) -> None:
    (run_folder / "empty").mkdir()
    names = {"RUN": str(run_folder), "EMPTY": str(run_folder / "empty")}
    assert main(["simulate", *(names.get(argument, argument) for argument in arguments)]) == 2
    shown = capsys.readouterr().err
    assert told in shown and shown.count("\n") == 1


def test_a_run_in_use_is_left_alone(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lock_folder(run_folder, "simulation"):
        assert main(["simulate", "--resume", str(run_folder)]) == 2
    assert f"another simulation is running in {run_folder}: stop it first" in capsys.readouterr().err
