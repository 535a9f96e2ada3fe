"""Node processes of a simulation: started, followed, stopped, never left behind. The nodes are fake, the processes real."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomli_w
from patience import GENEROUS_S

from p2pcodistill.errors import ConfigError, DataError, GroupError
from p2pcodistill.report.history import SiteHistory
from p2pcodistill.simulation import job_run, processes, run_record
from p2pcodistill.simulation.links import JobLinks
from p2pcodistill.simulation.processes import resume, simulate
from p2pcodistill.telemetry.log import EventLog
from p2pcodistill.telemetry.training_events import TrainingEnded

REPOSITORY = Path(__file__).parents[2]

# What stands in for `p2pcodistill node`: reads its node file, does what FAKE_NODE says for its run and site, and tells it in
# events. Faults wait for their counterpart at a named pipe, never for time to pass.
FAKE_NODE = """
import json, os, signal, sys, time, tomllib
from pathlib import Path
from p2pcodistill.group.lifeline import die_with_parent
from p2pcodistill.telemetry.log import EventLog
from p2pcodistill.telemetry.node_events import NodeStarted, NodeStopped, TrafficMeasured
from p2pcodistill.telemetry.training_events import Evaluated, StepMeasured, TrainingEnded, TrainingStarted

signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
flag, parent_pid, file = sys.argv[1:]
assert flag == "--die-with-parent"
die_with_parent(int(parent_pid))
file = Path(file)
config = tomllib.loads(file.read_text())
site, run = config["name"], config["run"]
events_path = file.parent / config["run_folder"] / "events.jsonl"
events = EventLog(events_path)
pipes = Path(os.environ["FAKE_NODE_PIPES"])
behaviour = json.loads(os.environ["FAKE_NODE"]).get(f"{run}/{site}", "train")
peers = [peer["name"] for peer in config["peers"]]
events.write(NodeStarted(site, run, config["listen"], 1, peers, os.getpid()))
print(f"{site} does: {behaviour}")

def meet(other):  # returns when `other` is here, too
    for name, mode in sorted([(f"{run}-{site}", "w"), (f"{run}-{other}", "r")]):
        open(pipes / name, mode).close()

def wait_for_stop():
    signal.sigwait({signal.SIGTERM})
    events.write(NodeStopped(site, "stopped"))

def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True

def train():
    for other in peers:
        meet(other)
    here = pipes / f"running-{run}-{site}"
    here.touch()
    num_steps = config["training"]["num_steps"]
    print("at once:", len(list(pipes.glob("running-*"))))
    events.write(TrainingStarted(0, num_steps, 1000, 1, "cpu", "float32"))
    gain = 0.5 if run.startswith("alone") else 1.0
    for step in range(50, num_steps + 1, 50):
        events.write(StepMeasured(step, 5 - gain * step / num_steps, None, 1e-3, 20.0, 0.01, 2.5))
        events.write(Evaluated(step, 5 - gain * step / num_steps, 0.1))
    events.write(TrafficMeasured(700, 500, {}, {}))
    events.write(TrainingEnded(num_steps, True, 0.1, 10.0))
    events.write(NodeStopped(site, "finished"))
    here.unlink()

match behaviour:
    case "train":
        train()
    case "come back":  # the first life goes on until it is ended, the second one to the end
        lives = len([line for line in events_path.read_text().splitlines() if '"node-started"' in line])
        if lives == 1:
            events.write(TrainingStarted(0, 100, 1000, 1, "cpu", "float32"))
            events.write(StepMeasured(50, 4.5, None, 1e-3, 20.0, 0.01, 2.5))
            wait_for_stop()
            sys.exit(143)
        train()
    case "stay":  # finished, but waiting for somebody
        for step in (50, 100):
            events.write(StepMeasured(step, 4.5, None, 1e-3, 20.0, 0.01, 2.5))
        events.write(Evaluated(100, 4.0, 0.1))
        events.write(TrainingEnded(100, True, 0.1, 10.0))
        wait_for_stop()
        sys.exit(143)
    case "take a while":  # to begin: a second is much more than a simulation needs to end a node too early
        if signal.sigtimedwait({signal.SIGTERM}, 1.0):
            events.write(TrainingStarted(100, 100, 1000, 1, "cpu", "float32"))
            sys.exit(143)
        train()
    case "fail":  # once the peer is there
        for other in peers:
            meet(other)
        sys.exit("the roof is on fire")
    case "killed":
        for other in peers:
            meet(other)
        os.kill(os.getpid(), signal.SIGKILL)
    case "wait":
        for other in peers:
            meet(other)
        wait_for_stop()
        sys.exit(143)
    case "end":  # at once, after telling whom to wait for
        with open(pipes / "alive", "w") as pipe:
            print(os.getpid(), file=pipe)
        os._exit(0)
    case "outlast":  # goes on when the other has ended and the simulation has collected it
        pid = int(open(pipes / "alive").read())
        while is_there(pid):
            time.sleep(0.01)
        events.write(StepMeasured(50, 4.5, None, 1e-3, 20.0, 0.01, 2.5))
        wait_for_stop()
    case "give up":
        events.write(TrainingStarted(0, 100, 1000, 1, "cpu", "float32"))
    case "interrupt" | "terminate":
        for other in peers:
            meet(other)
        os.kill(os.getppid(), signal.SIGINT if behaviour == "interrupt" else signal.SIGTERM)
        wait_for_stop()
    case "interrupt twice":  # and never stop by itself
        os.kill(os.getppid(), signal.SIGINT)
        wait_for_stop()
        os.kill(os.getppid(), signal.SIGINT)
        signal.sigwait({signal.SIGUSR1})
    case "interrupt and never stop":
        os.kill(os.getppid(), signal.SIGINT)
        wait_for_stop()
        signal.sigwait({signal.SIGUSR1})
    case "tell and wait":  # the pipe closes when the process ends
        pipe = open(pipes / "alive", "w")
        print(site, file=pipe, flush=True)
        signal.sigwait({signal.SIGUSR1})
"""


class Simulation:
    """A small scenario whose nodes are fake, and what came of it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.runs = folder / "runs"
        self.pipes = folder / "pipes"
        self.pipes.mkdir()
        for site in ("berlin", "tokyo"):
            os.mkfifo(self.pipes / f"codistilled-seed0-{site}")
        os.mkfifo(self.pipes / "alive")
        corpus = folder / "corpus"
        corpus.mkdir()
        for index in range(40):
            (corpus / f"{index}.txt").write_text(f"file {index} says something\n" * 40)
        self.fake = folder / "fake_node.py"
        self.fake.write_text(FAKE_NODE)
        self.path = folder / "small.toml"
        self.content: dict[str, Any] = {
            "name": "small",
            "sites": [{"name": "berlin"}, {"name": "tokyo"}],
            "arms": [{"name": kind, "kind": kind} for kind in ("alone", "codistilled", "pooled")],
            "data": {"paths": ["corpus"], "max_bytes_per_site": 5000},
            "training": {"num_steps": 100, "batch_size": 4},
        }
        self.environment = {"FAKE_NODE_PIPES": str(self.pipes), "PYTHONPATH": str(REPOSITORY)}
        for name, value in self.environment.items():
            monkeypatch.setenv(name, value)
        self._monkeypatch = monkeypatch
        self.behave({})
        self.use_cores(2)

    def behave(self, behaviours: dict[str, str]) -> None:
        """What the fake nodes do, by `run/site`; the others train."""
        self.environment["FAKE_NODE"] = json.dumps(behaviours)
        self._monkeypatch.setenv("FAKE_NODE", self.environment["FAKE_NODE"])

    def use_cores(self, num_cores: int) -> None:
        """Let the machine have `num_cores`."""
        self._monkeypatch.setattr(processes, "available_cores", lambda: num_cores)

    @property
    def node_command(self) -> tuple[str, str]:
        """Runs the fake node."""
        return (sys.executable, str(self.fake))

    def run(self, *overrides: str) -> tuple[int, str]:
        """The exit status and what was shown."""
        self.path.write_text(tomli_w.dumps(self.content))
        stream = io.StringIO()
        status = simulate(
            self.path, overrides=overrides, run_root=self.runs, stream=stream, node_command=self.node_command
        )
        return status, stream.getvalue()

    def resume(self) -> tuple[int, str]:
        """Go on with the newest run."""
        stream = io.StringIO()
        status = resume(Path("latest"), run_root=self.runs, stream=stream, node_command=self.node_command)
        return status, stream.getvalue()

    def events(self, run: str, site: str) -> list[dict[str, Any]]:
        """The site's events in the newest run."""
        path = self.runs / "latest" / run / site / "events.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()]

    def was_stopped(self, run: str, site: str) -> bool:
        """Whether the site's node was asked to stop, and did."""
        return self.events(run, site)[-1].get("reason") == "stopped"


@pytest.fixture
def simulation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Simulation]:
    before = living_descendants()
    # A shell that runs the tests in the background has SIGINT ignored; here it is as a user's terminal has it.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    handlers = [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)]
    yield Simulation(tmp_path, monkeypatch)
    until_s = time.monotonic() + GENEROUS_S  # those whose parent was killed are dying
    while (left := living_descendants()) != before and time.monotonic() < until_s:
        time.sleep(0.01)
    assert left == before, "processes were left behind"
    assert [signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)] == handlers
    signal.signal(signal.SIGINT, inherited)


def living_descendants() -> list[psutil.Process]:
    """Without the dead that this process has yet to collect: other tests have it adopt orphans."""
    found = psutil.Process().children(recursive=True)
    return [process for process in found if process.status() != psutil.STATUS_ZOMBIE]


def test_all_arms_finish_and_are_reported(simulation: Simulation) -> None:
    status, shown = simulation.run()
    assert status == 0
    folder = (simulation.runs / "latest").resolve()
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["gap_closed_ratio"] == 1.0
    assert [(arm["name"], list(arm["sites"])) for arm in summary["arms"]] == [
        ("alone", ["berlin", "tokyo"]),
        ("codistilled", ["berlin", "tokyo"]),
        ("pooled", ["pooled"]),
    ]
    report = (folder / "report.html").read_text()
    assert "max_bytes_per_site" in report, "the configuration is in the report"
    assert run_record.versions(2)["torch"] in report
    assert f"{folder.name}/summary.json" in shown
    assert f"{folder.name}/report.html" in shown
    assert "codistilled" in shown
    assert (folder / "alone-seed0" / "berlin" / "node.log").read_text().startswith("berlin does: train\n")


def test_simulating_does_not_import_torch() -> None:
    program = "import sys, p2pcodistill.simulation.processes; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, check=False).returncode == 0


@pytest.mark.parametrize("num_cores", [1, 2, 4])
def test_jobs_keep_to_the_cores_and_sites_that_exchange_run_together(
    simulation: Simulation, num_cores: int
) -> None:
    simulation.use_cores(num_cores)
    status, _ = simulation.run("seeds=[0]")
    assert status == 0, "berlin and tokyo waited for each other: they ran at the same time"
    logs = sorted((simulation.runs / "latest").glob("*-seed0/*/node.log"))
    at_once = [int(log.read_text().partition("at once:")[2]) for log in logs]
    assert len(at_once) == 5
    assert max(at_once) <= max(num_cores, 2)


def test_every_seed_runs_every_arm(simulation: Simulation) -> None:
    simulation.content["arms"] = [{"name": "lone", "kind": "alone"}, {"name": "all", "kind": "pooled"}]
    status, shown = simulation.run("seeds=[3,1]")
    assert status == 0
    summary = json.loads((simulation.runs / "latest" / "summary.json").read_text())
    assert [(arm["name"], arm["seed"]) for arm in summary["arms"]] == [
        ("lone", 3),
        ("all", 3),
        ("lone", 1),
        ("all", 1),
    ]
    assert "lone seed 3" in shown, "the live view tells seeds apart"


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("fail", r"exited with status 1; .*node\.log:\ntokyo does: fail\nthe roof is on fire$"),
        ("killed", r"was killed by SIGKILL; the end of its log, .*node\.log:\ntokyo does: killed$"),
    ],
)
def test_a_node_that_fails_is_named_and_the_others_are_stopped(
    simulation: Simulation, behaviour: str, message: str
) -> None:
    simulation.behave({"codistilled-seed0/tokyo": behaviour, "codistilled-seed0/berlin": "wait"})
    with pytest.raises(GroupError, match=rf"^the site tokyo of the arm codistilled \(seed 0\) {message}"):
        simulation.run()
    assert simulation.was_stopped("codistilled-seed0", "berlin")
    assert not list((simulation.runs / "latest").glob("alone-seed0/*/node.log")), "nothing else was started"
    assert not (simulation.runs / "latest" / "summary.json").exists()


def test_a_node_that_ends_early_without_an_error_is_an_error_too(simulation: Simulation) -> None:
    simulation.behave({"pooled-seed0/pooled": "give up"})
    with pytest.raises(GroupError, match=r"the site pooled of the arm pooled .* ended before its training"):
        simulation.run()


def test_a_node_command_that_does_not_exist_leaves_nothing(simulation: Simulation) -> None:
    simulation.path.write_text(tomli_w.dumps(simulation.content))
    with pytest.raises(FileNotFoundError, match="no-such-command"):
        simulate(
            simulation.path, run_root=simulation.runs, stream=io.StringIO(), node_command=["/no-such-command"]
        )


@pytest.mark.parametrize(
    ("behaviour", "signum"), [("interrupt", signal.SIGINT), ("terminate", signal.SIGTERM)]
)
def test_a_signal_stops_every_node_in_order(
    simulation: Simulation, behaviour: str, signum: signal.Signals
) -> None:
    simulation.behave({"codistilled-seed0/tokyo": behaviour, "codistilled-seed0/berlin": "wait"})
    status, shown = simulation.run()
    assert status == 128 + signum
    assert simulation.was_stopped("codistilled-seed0", "tokyo")
    assert simulation.was_stopped("codistilled-seed0", "berlin")
    assert f"stopped by {signum.name}" in shown
    assert "small-" in shown.splitlines()[-1], "where to find what was written"
    assert not list((simulation.runs / "latest").glob("alone-seed0/*/node.log")), "nothing else was started"


def test_what_has_finished_is_kept_and_nodes_that_were_stopped_go_on(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "report", lambda *_: None)
    simulation.content["arms"] = [{"name": kind, "kind": kind} for kind in ("codistilled", "pooled")]
    simulation.behave({"pooled-seed0/pooled": "interrupt"})
    assert simulation.run()[0] == 128 + signal.SIGINT
    run_folder = (simulation.runs / "latest").resolve()
    key = (run_folder / "pooled-seed0/nodes/pooled.key").read_text()
    simulation.behave({})
    status, shown = simulation.resume()
    assert status == 0 and "1 of 2 jobs done, 1 waiting" in shown
    lives = {path.parent.name: path.read_text().count(" does: ") for path in run_folder.rglob("node.log")}
    assert lives == {"berlin": 1, "tokyo": 1, "pooled": 2}
    assert (run_folder / "pooled-seed0/nodes/pooled.key").read_text() == key
    assert SiteHistory.read(run_folder / "pooled-seed0/pooled/events.jsonl").num_node_starts == 2
    status, shown = simulation.resume()
    assert status == 0 and shown.splitlines()[0].endswith(f"{run_folder.name} is complete")


@pytest.mark.parametrize("has_faults", [False, True])
def test_sites_that_were_stopped_together_go_on_together_but_for_faults(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch, has_faults: bool
) -> None:
    monkeypatch.setattr(processes, "report", lambda *_: None)
    monkeypatch.setattr(job_run, "LINGER_S", 0.0)
    faults = [{"kind": "kill", "sites": ["tokyo"], "at_step": 50}] if has_faults else []
    only_codistilled(simulation, *faults)
    simulation.behave({"codistilled-seed0/tokyo": "interrupt", "codistilled-seed0/berlin": "wait"})
    assert simulation.run()[0] == 128 + signal.SIGINT
    # What comes back in a second life is in its first where the job began anew.
    simulation.behave(
        {"codistilled-seed0/tokyo": "come back", "codistilled-seed0/berlin": "stay"} if has_faults else {}
    )
    assert simulation.resume()[0] == 0
    num_lives = 1 if has_faults else 2
    for site in ("berlin", "tokyo"):
        events = simulation.events("codistilled-seed0", site)
        assert [record["event"] for record in events].count("node-started") == num_lives


def test_what_sites_said_before_a_stop_does_not_end_them_when_they_go_on(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "report", lambda *_: None)
    monkeypatch.setattr(job_run, "LINGER_S", 0.0)
    only_codistilled(simulation)
    simulation.behave({"codistilled-seed0/tokyo": "interrupt", "codistilled-seed0/berlin": "wait"})
    assert simulation.run()[0] == 128 + signal.SIGINT
    for site in ("berlin", "tokyo"):  # as if it had been stopped between their end and that of the job
        events = EventLog(simulation.runs / "latest/codistilled-seed0" / site / "events.jsonl")
        events.write(TrainingEnded(100, True, 0.1, 10.0))
        events.close()
    simulation.behave({f"codistilled-seed0/{site}": "take a while" for site in ("berlin", "tokyo")})
    assert simulation.resume()[0] == 0
    for site in ("berlin", "tokyo"):
        assert simulation.events("codistilled-seed0", site)[-1]["reason"] == "finished"


def test_a_second_signal_kills_at_once(simulation: Simulation) -> None:
    simulation.content["arms"] = [{"name": "pooled", "kind": "pooled"}]
    simulation.behave({"pooled-seed0/pooled": "interrupt twice"})
    status, _ = simulation.run("group.stop_grace_s=1e6")
    assert status == 128 + signal.SIGINT
    assert simulation.was_stopped("pooled-seed0", "pooled"), (
        "the second signal came after the first was heard"
    )


def test_a_node_that_does_not_stop_is_killed_when_its_time_is_up(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "STOP_MARGIN_S", 0.1)
    simulation.content["arms"] = [{"name": "pooled", "kind": "pooled"}]
    simulation.behave({"pooled-seed0/pooled": "interrupt and never stop"})
    status, _ = simulation.run("group.stop_grace_s=0.1")
    assert status == 128 + signal.SIGINT


FAKE_HOSTILE_NODE = """
import pathlib, signal, sys, tomllib
from p2pcodistill.telemetry.log import EventLog
from p2pcodistill.telemetry.training_events import StepMeasured
deed, _, _, file = sys.argv[1:]
file = pathlib.Path(file)
pathlib.Path(__file__).with_name("deed").write_text(deed)
events = EventLog(file.parent / tomllib.loads(file.read_text())["run_folder"] / "events.jsonl")
events.write(StepMeasured(60, 4.5, None, 1e-3, 20.0, 0.01, 2.5))
signal.pause()
"""


def only_codistilled(simulation: Simulation, *faults: dict[str, Any]) -> None:
    simulation.content["arms"] = [{"name": "codistilled", "kind": "codistilled"}]
    simulation.content["faults"] = list(faults)


def faults_told(simulation: Simulation) -> list[tuple[str, str, int]]:
    lines = (simulation.runs / "latest" / "codistilled-seed0" / "simulator.jsonl").read_text().splitlines()
    return [(record["kind"], record["site"], record["step"]) for record in map(json.loads, lines)]


@pytest.mark.parametrize("end", ["kill", "leave"])
def test_a_site_that_goes_and_comes_back_is_one_run(simulation: Simulation, end: str) -> None:
    only_codistilled(
        simulation,
        {"kind": end, "sites": ["tokyo"], "at_step": 50},
        {"kind": "restart", "sites": ["tokyo"], "at_step": 50},
    )
    simulation.behave({"codistilled-seed0/tokyo": "come back"})
    status, shown = simulation.run()
    assert status == 0
    assert faults_told(simulation) == [(end, "tokyo", 50), ("restart", "tokyo", 50)]
    (tokyo,) = [
        site
        for arm in json.loads((simulation.runs / "latest" / "summary.json").read_text())["arms"]
        for name, site in arm["sites"].items()
        if name == "tokyo"
    ]
    assert (tokyo["num_faults"], tokyo["num_node_starts"], tokyo["finished"]) == (2, 2, True)
    assert f"codistilled tokyo: fault: {end}" in shown


def test_a_site_that_is_gone_for_good_does_not_hold_up_the_others(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_run, "LINGER_S", 0.0)
    only_codistilled(simulation, {"kind": "kill", "sites": ["tokyo"], "at_step": 50})
    simulation.behave({"codistilled-seed0/tokyo": "come back", "codistilled-seed0/berlin": "stay"})
    status, _ = simulation.run()
    assert status == 0
    assert simulation.was_stopped("codistilled-seed0", "berlin")
    notes = json.loads((simulation.runs / "latest" / "summary.json").read_text())["notes"]
    assert any("tokyo" in note and "kill at step 50" in note for note in notes)


def test_links_are_closed_when_events_cannot_be_read(
    simulation: Simulation, monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[JobLinks] = []
    close = JobLinks.close

    def fail(_: job_run.JobRun) -> None:
        raise GroupError("unreadable")

    async def note(links: JobLinks) -> None:
        closed.append(links)
        await close(links)

    monkeypatch.setattr(job_run.JobRun, "_read_events", fail)
    monkeypatch.setattr(JobLinks, "close", note)
    only_codistilled(simulation)
    with pytest.raises(GroupError, match="unreadable"):
        simulation.run()
    assert len(closed) == 1


def test_a_site_is_replaced_at_once(simulation: Simulation) -> None:
    only_codistilled(simulation, {"kind": "replace", "sites": ["tokyo"], "at_step": 50})
    simulation.behave({"codistilled-seed0/tokyo": "come back"})
    assert simulation.run()[0] == 0
    assert faults_told(simulation) == [("replace", "tokyo", 50)]
    (arm,) = json.loads((simulation.runs / "latest" / "summary.json").read_text())["arms"]
    assert (arm["sites"]["tokyo"]["num_node_starts"], arm["sites"]["tokyo"]["finished"]) == (2, True)


@pytest.mark.parametrize(
    ("kind", "own", "deed"), [("hostile", {"does": "flood"}, "flood"), ("corrupt", {}, "ruin")]
)
def test_who_turns_bad_is_another_program_that_nobody_waits_for(
    simulation: Simulation,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    kind: str,
    own: dict[str, Any],
    deed: str,
) -> None:
    monkeypatch.setattr(job_run, "LINGER_S", 0.0)
    program = tmp_path / "hostile.py"
    program.write_text(FAKE_HOSTILE_NODE)
    monkeypatch.setattr(job_run, "HOSTILE_COMMAND", (sys.executable, str(program)))
    only_codistilled(simulation, {"kind": kind, "sites": ["tokyo"], "at_step": 50} | own)
    simulation.behave({"codistilled-seed0/tokyo": "come back", "codistilled-seed0/berlin": "stay"})
    simulation.content["faults"].append({"kind": "kill", "sites": ["tokyo"], "at_step": 60})
    assert simulation.run()[0] == 0
    assert (tmp_path / "deed").read_text() == deed
    assert faults_told(simulation) == [(kind, "tokyo", 50), ("kill", "tokyo", 60)]


def test_a_site_joins_when_its_time_has_come(simulation: Simulation) -> None:
    only_codistilled(simulation, {"kind": "join", "sites": ["tokyo"], "at_s": 0.0})
    assert simulation.run()[0] == 0
    assert faults_told(simulation) == [("join", "tokyo", 0)]


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        ([{"kind": "kill", "sites": ["tokyo"], "at_step": 101}], "'kill' of 'tokyo' at step 101 never came"),
        ([{"kind": "kill", "sites": ["tokyo"], "at_s": 1e6}], "'kill' of 'tokyo' after 1e.06 s never came"),
        (
            [{"kind": "join", "sites": ["tokyo", "berlin"], "at_step": 1}],
            "'join' of 'tokyo', 'berlin' at step 1 never came: .* step 0 .tokyo.",
        ),
    ],
)
def test_a_fault_that_never_came_fails_the_run(
    simulation: Simulation, faults: list[dict[str, Any]], message: str
) -> None:
    only_codistilled(simulation, *faults)
    with pytest.raises(GroupError, match=message):
        simulation.run()


@pytest.mark.parametrize("kind", ["kill", "replace"])
def test_a_fault_that_comes_when_the_site_has_ended_fails_the_run(simulation: Simulation, kind: str) -> None:
    only_codistilled(simulation, {"kind": kind, "sites": ["tokyo", "berlin"], "at_step": 50})
    simulation.behave({"codistilled-seed0/tokyo": "end", "codistilled-seed0/berlin": "outlast"})
    with pytest.raises(GroupError, match=r"at step 50 came too late: the node of 'tokyo' had ended"):
        simulation.run()
    assert simulation.was_stopped("codistilled-seed0", "berlin")


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal")
def test_nodes_die_with_a_simulation_that_is_killed(simulation: Simulation) -> None:
    simulation.behave(
        {"codistilled-seed0/tokyo": "tell and wait", "codistilled-seed0/berlin": "tell and wait"}
    )
    simulation.path.write_text(tomli_w.dumps(simulation.content))
    program = (
        "import sys; from pathlib import Path; from p2pcodistill.simulation.processes import simulate\n"
        "path, runs, *node_command = sys.argv[1:]\n"
        "simulate(Path(path), run_root=Path(runs), stream=sys.stdout, node_command=node_command)\n"
    )
    arguments = [str(simulation.path), str(simulation.runs), *simulation.node_command]
    command = [sys.executable, "-c", program, *arguments]
    with (
        subprocess.Popen(command, stdout=subprocess.DEVNULL, cwd=simulation.folder) as parent,
        (simulation.pipes / "alive").open() as pipe,
    ):
        assert {pipe.readline().strip(), pipe.readline().strip()} == {"berlin", "tokyo"}
        parent.kill()
        assert pipe.read() == "", "the pipe ends when both nodes have"
    assert parent.returncode == -signal.SIGKILL


def test_what_is_wrong_is_said_before_a_folder_is_made(simulation: Simulation) -> None:
    with pytest.raises(ConfigError, match="did you mean 'num_steps'"):
        simulation.run("training.num_step=3")
    with pytest.raises(DataError, match=r"the site berlin: .*batch_size"):
        simulation.run("training.batch_size=1000")
    assert not simulation.runs.exists()
