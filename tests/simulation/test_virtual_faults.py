"""What befalls sites in virtual time, without training: quick, counted, and the same each time."""

from __future__ import annotations

from typing import Any

import pytest

from p2pcodistill.simulation.fault_config import FaultConfig
from p2pcodistill.simulation.virtual.synthetic import SyntheticModel, SyntheticSchedule
from p2pcodistill.simulation.virtual.synthetic_run import SyntheticRun
from p2pcodistill.strict import parse_model
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.records import to_record
from p2pcodistill.topology.build import build_topology

SITES = ("a", "b", "c", "d")
NUM_VERSIONS = 30


class Run:
    """A ring of four with these faults, run to its end."""

    def __init__(self, *faults: dict[str, Any]) -> None:
        self.records: list[dict[str, Any]] = []
        self.run = SyntheticRun(
            build_topology("ring", SITES),
            SyntheticModel.of(100_000),
            SyntheticSchedule(NUM_VERSIONS, interval_steps=25, step_time_s=0.1, first_step=25),
            faults=[parse_model(FaultConfig, fault, source="test") for fault in faults],
            on_event=self._note,
        )
        self.run.run()

    def _note(self, time_s: float, site: str, event: Event) -> None:
        self.records.append({"site": site} | to_record(event, time_unix_s=time_s))

    def of(self, name: str, **fields: Any) -> list[dict[str, Any]]:
        return [r for r in self.records if r["event"] == name and all(r[k] == v for k, v in fields.items())]

    def last_step(self, teacher: str, student: str) -> int:
        return max(r["teacher_step"] for r in self.of("teacher-swapped", site=student, teacher=teacher))


LAST_STEP = NUM_VERSIONS * 25


@pytest.mark.parametrize("does", ["garbage", "replay", "forge", "flood"])
def test_a_hostile_site_hurts_nobody(does: str) -> None:
    fault = {"kind": "hostile", "sites": ["b"], "at_step": 200, "does": does}
    run, again = Run(fault), Run(fault)
    assert run.records == again.records
    assert run.run.network.hostile["b"].num_misdeeds > 50
    for neighbour in ("a", "c"):
        assert run.of("peer-quarantined", site=neighbour, peer="b")
        assert run.last_step("b", neighbour) <= 200
        assert run.last_step("d", neighbour) == LAST_STEP
        assert run.last_step(neighbour, "d") == LAST_STEP


def test_who_was_hostile_is_honest_again_after_a_restart() -> None:
    run = Run(
        {"kind": "hostile", "sites": ["b"], "at_step": 100, "does": "garbage"},
        {"kind": "kill", "sites": ["b"], "at_s": 12},
        {"kind": "restart", "sites": ["b"], "at_s": 20},
    )
    assert "b" not in run.run.network.hostile
    assert [r["incarnation"] for r in run.of("node-started", site="b")] == [0, 1]
    # Not before its quarantine is over; what it publishes after that is taken.
    (quarantined,) = run.of("peer-quarantined", site="a")
    over_s = quarantined["time_unix_s"] + quarantined["duration_s"]
    swapped = [r["time_unix_s"] for r in run.of("teacher-swapped", site="a", teacher="b")]
    assert not [time_s for time_s in swapped if quarantined["time_unix_s"] < time_s < over_s]
    assert run.last_step("b", "a") == LAST_STEP


def test_a_new_machine_publishes_everything_anew_under_higher_incarnations() -> None:
    run = Run({"kind": "replace", "sites": ["b"], "at_step": 300})
    assert run.run.is_complete
    assert [r["incarnation"] for r in run.of("node-started", site="b")] == [0, 0]
    versions = [
        (r["incarnation"], r["teacher_step"]) for r in run.of("teacher-swapped", site="a", teacher="b")
    ]
    assert versions == sorted(versions) and versions[0][0] == 1 < versions[-1][0]
    assert not run.of("teacher-refused")


def test_of_two_machines_the_newer_one_is_heard() -> None:
    run = Run({"kind": "impostor", "sites": ["b"], "at_step": 300})
    network = run.run.network
    assert network.impostors.keys() == {"b"}
    for neighbour in ("a", "c"):
        assert network.link_between(neighbour, "b").faults.num_claims_refused > 0
        (why,) = {r["why"] for r in run.of("refused", site=neighbour, peer="b", reason="replayed")}
        assert "two processes hold its key" in why
        assert max(r["incarnation"] for r in run.of("teacher-swapped", site=neighbour, teacher="b")) > 1
        assert run.last_step("d", neighbour) == LAST_STEP


def test_one_link_is_dark_or_cut_and_the_others_are_not() -> None:
    for kind, what in (("black-hole", "was silent for"), ("partition", "was reset")):
        run = Run(
            {"kind": kind, "sites": ["b"], "from_sites": ["c"], "at_step": 200},
            {"kind": "heal", "sites": ["b"], "at_step": 500},
        )
        assert run.run.is_complete
        swallowed = {ends: link.faults.num_payloads_swallowed for ends, link in run.run.network.links.items()}
        assert (swallowed.pop(("b", "c")) > 0) == (kind == "black-hole")
        assert not any(swallowed.values())
        (ended,) = run.of("peer-disconnected", site="b", peer="c")
        assert what in ended["why"]
        assert not run.of("peer-disconnected", peer="a")
