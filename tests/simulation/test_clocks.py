"""Wall clocks that are wrong in real processes, and logs that are read as if they had been right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import p2pcodistill
from p2pcodistill.simulation.clocks import WrongClock, put_right
from p2pcodistill.telemetry.records import Record, to_record
from p2pcodistill.telemetry.simulation_events import FaultInjected
from p2pcodistill.telemetry.training_events import StepMeasured

A_DAY_S = 86_400.0
TELL = """
import sys, time
for _ in sys.stdin:
    print(time.time(), time.time_ns() / 1e9, flush=True)
"""


def test_processes_that_run_already_see_the_clock_being_set(tmp_path: Path) -> None:
    clock = WrongClock(tmp_path / "clock")
    process = subprocess.Popen(
        [sys.executable, "-c", TELL],
        env=os.environ | clock.environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None
    try:
        for offset_s in (None, A_DAY_S, -A_DAY_S, 0.0):
            if offset_s is not None:
                clock.set(offset_s)
            process.stdin.write("\n")
            process.stdin.flush()
            for told_s in map(float, process.stdout.readline().split()):
                assert told_s - time.time() == pytest.approx(offset_s or 0.0, abs=60)
    finally:
        process.kill()
        process.communicate()


def test_the_environment_keeps_what_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    clock = WrongClock(tmp_path / "clock")
    assert clock.environment == {"PYTHONPATH": f"{tmp_path / 'clock'}{os.pathsep}elsewhere"}


def told(time_s: float, offset_s: float) -> Record:
    return to_record(FaultInjected("a", "clock", 0, offset_s=offset_s), time_unix_s=time_s)


def measured(time_s: float) -> Record:
    return to_record(StepMeasured(1, 0.0, None, 0.1, 1.0, 0.0, 1.0), time_unix_s=time_s)


def test_logs_are_put_right() -> None:
    true_times_s = [1000.0, 1010.0, 1020.0, 1030.0, 1040.0, 1050.0, 1060.0]
    offsets_s = [0.0, A_DAY_S, A_DAY_S, -A_DAY_S, -A_DAY_S, 0.0, 0.0]
    changes = [told(1005.0, A_DAY_S), told(1025.0, -A_DAY_S), told(1045.0, 0.0)]
    log = [measured(time_s + offset_s) for time_s, offset_s in zip(true_times_s, offsets_s, strict=True)]
    righted = put_right(log, changes)
    assert [record["time_unix_s"] for record in righted] == true_times_s
    assert [record | {"time_unix_s": 0} for record in righted] == [r | {"time_unix_s": 0} for r in log]


def test_a_clock_that_was_wrong_from_the_start_is_put_right_and_others_are_left_alone() -> None:
    log = [measured(1000.0 + A_DAY_S), measured(1010.0 + A_DAY_S)]
    assert [r["time_unix_s"] for r in put_right(log, [told(999.5, A_DAY_S)])] == [1000.0, 1010.0]
    kill = to_record(FaultInjected("a", "kill", 0), time_unix_s=999.5)
    assert put_right(log, [kill]) == log


def test_nothing_but_event_logs_and_the_names_of_run_folders_depends_on_a_wall_clock() -> None:
    wall_clock = re.compile(
        r"\btime\.(time|time_ns|localtime|gmtime|ctime)\b|\bfrom time import|\bdatetime\."
    )
    package = Path(p2pcodistill.__file__).parent
    readers = {
        str(path.relative_to(package)): len(found)
        for path in sorted(package.rglob("*.py"))
        if (found := wall_clock.findall(path.read_text())) and path.name != "clocks.py"
    }
    assert readers == {"telemetry/records.py": 1, "simulation/processes.py": 1, "simulation/reporting.py": 1}
