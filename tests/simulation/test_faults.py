"""When faults are due, and whom partitions separate: pure, against the words of a scenario file."""

from __future__ import annotations

from typing import Any

import pytest

from p2pcodistill.simulation.fault_config import FaultConfig
from p2pcodistill.simulation.faults import (
    FaultSchedule,
    Partitions,
    absentees,
    afflicted,
    joiners,
    told,
)
from p2pcodistill.strict import parse_model
from p2pcodistill.telemetry.simulation_events import FaultInjected


def fault(kind: str, *sites: str, **more: Any) -> FaultConfig:
    return parse_model(FaultConfig, {"kind": kind, "sites": list(sites)} | more, source="test")


def due(schedule: FaultSchedule, elapsed_s: float = 0.0, **steps: int) -> list[str]:
    """The kinds of all that is due now, in order."""
    kinds = []
    while (found := schedule.pop_due(elapsed_s, steps)) is not None:
        kinds.append(found.kind)
    return kinds


def test_a_fault_is_due_at_its_time_or_with_the_first_of_its_sites() -> None:
    schedule = FaultSchedule(
        [
            fault("kill", "a", "b", at_step=10),
            fault("slow-down", "c", at_s=2.5, factor=10),
            fault("partition", "d", at_step=0),
        ]
    )
    assert (schedule.next_s, len(schedule.pending)) == (2.5, 3)
    assert due(schedule) == ["partition"], "a step of 0 is reached before training starts"
    assert due(schedule, 2.4, a=9, c=99) == []
    assert due(schedule, 2.5, b=10) == ["kill", "slow-down"]
    assert (schedule.next_s, schedule.pending) == (None, ())


@pytest.mark.parametrize("kind", ["restart", "replace", "heal", "join"])
def test_what_brings_a_site_back_waits_for_any_site(kind: str) -> None:
    schedule = FaultSchedule([fault(kind, "a", at_step=10)])
    assert due(schedule, a=0, b=9) == []
    assert due(schedule, a=0, b=10) == [kind]


def test_faults_of_one_site_keep_the_order_of_the_file() -> None:
    schedule = FaultSchedule(
        [
            fault("kill", "a", at_step=10),
            fault("restart", "a", at_step=10),
            fault("kill", "b", at_step=10),
            fault("slow-down", "a", at_s=1, factor=2),
        ]
    )
    assert due(schedule, 1.0, a=9, b=10) == ["kill"], "b's; a has yet to be killed"
    assert schedule.starts("a") and not schedule.starts("b")
    assert due(schedule, 1.0, a=10, b=10) == ["kill", "restart", "slow-down"]


def test_who_is_there_at_the_start_and_at_the_end() -> None:
    faults = [
        fault("kill", "a", "b", at_step=1),
        fault("join", "c", at_step=2),
        fault("leave", "d", at_step=2),
        fault("restart", "b", at_step=3),
        fault("hostile", "e", "f", at_step=4, does="flood"),
        fault("corrupt", "g", at_step=4),
        fault("replace", "f", at_step=5),
        fault("partition", "h", at_step=5),
        fault("slow-down", "i", at_step=5, factor=2),
    ]
    assert joiners(faults) == {"c"}
    assert absentees(faults) == {"a", "d", "e", "g"}
    assert afflicted(faults) == set("abcdefgi"), "what is between sites is nobody's own"


def test_what_is_told_of_a_fault() -> None:
    assert told(fault("clock", "a", at_s=1, offset_s=5), "a", 7) == FaultInjected("a", "clock", 7, None, 5.0)
    hostile = told(fault("hostile", "a", at_s=1, does="flood"), "a", 7)
    assert (hostile.does, hostile.ends_node) == ("flood", True)


def test_partitions_separate_their_sites_from_all_others() -> None:
    partitions = Partitions()
    partitions.cut_off(["a", "b"])
    partitions.cut_off(["c"])
    assert [partitions.separate(*pair) for pair in ("ab", "ac", "ad", "cd", "de")] == [
        False,
        True,
        True,
        True,
        False,
    ]
    partitions.heal(["a"])
    assert [partitions.separate(*pair) for pair in ("ab", "ad", "ac", "bd")] == [True, False, True, True]
    partitions.cut_off(["d"], ["e"])
    assert partitions.separate("e", "d") and not partitions.separate("d", "f")
    partitions.heal(["d"])
    assert not partitions.separate("e", "d")
    partitions.heal(["b", "c"])
    assert not any(partitions.separate(*pair) for pair in ("ab", "ac", "bd", "cd"))
