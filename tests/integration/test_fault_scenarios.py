"""The fault scenarios of `simulations/`, short, in virtual time: production gossip, real frames, no waiting.

`test_fault_processes` has those to which real processes add something; `make soak` runs all of them in processes.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from integration.fault_runs import FAULT_SCENARIOS, FaultRun

NUM_STEPS = 100
A_DAY_S = 86_400.0


@pytest.fixture(autouse=True)
def threads_as_before() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    yield
    torch.set_num_threads(num_threads)


def test_every_node_of_a_ring_is_killed_in_turn(tmp_path: Path) -> None:
    run = FaultRun(tmp_path, "kills", num_steps=NUM_STEPS)
    starts = {name: len(run.events(name, "node-started")) for name in run.names}
    assert starts == {"berlin": 3, "tokyo": 2, "lima": 2, "accra": 2}
    for name in run.names:
        assert all(r["start_step"] > 0 for r in run.events(name, "training-started")[1:]), "resumed"
    run.require_healthy()


def test_all_sites_restart_at_once(tmp_path: Path) -> None:
    run = FaultRun(tmp_path, "restart-all", num_steps=NUM_STEPS)
    for name in run.names:
        first, again = run.events(name, "training-started")
        assert (first["start_step"], again["start_step"]) == (0, NUM_STEPS // 2)
        # What it had of its teachers was in its store: they teach before its first step.
        assert len(run.events(name, "teacher-swapped", step=NUM_STEPS // 2)) == 2
    run.require_healthy()


def test_a_ring_falls_apart_and_heals(tmp_path: Path) -> None:
    run = FaultRun(tmp_path, "partition", num_steps=NUM_STEPS)
    (cut_s, *_), (healed_s, *_) = run.fault_times_s("partition"), run.fault_times_s("heal")
    for here, there in (("tokyo", "lima"), ("berlin", "accra")):
        swapped = [r["time_unix_s"] for r in run.events(here, "teacher-swapped", teacher=there)]
        assert min(swapped) < cut_s and max(swapped) > healed_s
        fetched = [r["time_unix_s"] for r in run.events(here, "frame-fetched", origin=there)]
        assert not [time_s for time_s in fetched if cut_s < time_s < healed_s]
        assert run.events(here, "peer-disconnected", peer=there)
    within = [r["time_unix_s"] for r in run.events("berlin", "teacher-swapped", teacher="tokyo")]
    assert [time_s for time_s in within if cut_s < time_s < healed_s], "the two sides go on"
    run.require_healthy()


def test_what_vanishes_on_the_way_is_noticed_and_made_up_for(tmp_path: Path) -> None:
    run = FaultRun(tmp_path, "black-hole", num_steps=NUM_STEPS)
    (dark_s, _), (lit_s, _) = run.fault_times_s("black-hole"), run.fault_times_s("heal")
    for here, there in (("berlin", "tokyo"), ("tokyo", "lima"), ("lima", "accra")):
        assert run.link(here, there)["num_swallowed"] > 0
        assert any("silent" in r["why"] for r in run.events(here, "peer-disconnected", peer=there))
    assert run.link("berlin", "accra")["num_swallowed"] == 0
    fetched = [r["time_unix_s"] for r in run.events("berlin", "frame-fetched", origin="tokyo")]
    assert min(fetched) < dark_s and max(fetched) > lit_s
    assert not [time_s for time_s in fetched if dark_s + 1.0 < time_s < lit_s]
    run.require_healthy()


def test_a_slow_site_slows_nobody_else(tmp_path: Path) -> None:
    run = FaultRun(tmp_path, "slow-site", num_steps=NUM_STEPS)
    begun_s, over_s = run.fault_times_s("slow-down")

    def num_steps(site: str) -> int:
        steps = [(r["time_unix_s"], r["step"]) for r in run.events(site, "step-measured")]
        return sum(
            after[1] - before[1]
            for before, after in itertools.pairwise(steps)
            if begun_s <= before[0] and after[0] <= over_s
        )

    assert num_steps("berlin") >= 9 * num_steps("tokyo") > 0
    run.require_healthy()


def test_a_weak_link_is_enough(tmp_path: Path) -> None:
    # As thin for the tiny model as it is in the file for a large one.
    thin = {"between": ["berlin", "tokyo"], "bandwidth_mbit": 0.02, "latency_ms": 100.0, "jitter_ms": 10.0}
    thin |= {"loss_ratio": 0.005, "reset_interval_s": 10.0}
    run = FaultRun(tmp_path, "weak-link", num_steps=NUM_STEPS, links=[thin])
    assert run.link("berlin", "tokyo")["num_cuts"] >= 9

    def mean_lag(teacher: str) -> float:
        swapped = run.events("berlin", "teacher-swapped", teacher=teacher)
        assert len(swapped) >= 3
        return sum(r["step"] - r["teacher_step"] for r in swapped) / len(swapped)

    assert mean_lag("tokyo") > mean_lag("accra")
    run.require_healthy()


def test_versions_are_not_ordered_by_the_clock(tmp_path: Path) -> None:
    for name in ("wrong", "right"):
        (tmp_path / name).mkdir()
    wrong = FaultRun(tmp_path / "wrong", "wrong-clock", num_steps=NUM_STEPS)
    right = FaultRun(tmp_path / "right", "wrong-clock", num_steps=NUM_STEPS, faults=[])
    (_, set_s) = wrong.fault_times_s("clock")

    seen = set()
    for site in wrong.names:
        for ours, theirs in zip(wrong.log(site), right.log(site), strict=True):
            offset_s = ours.pop("time_unix_s") - (time_s := theirs.pop("time_unix_s"))
            assert ours == theirs, "and nothing else differs in the whole run"
            if 0 < time_s != set_s:
                seen.add((site, time_s > set_s, round(offset_s)))
    assert seen == {
        *((site, is_late, 0) for site in ("berlin", "lima", "accra") for is_late in (False, True)),
        ("tokyo", False, A_DAY_S),
        ("tokyo", True, -A_DAY_S),
    }
    wrong.require_healthy()


def test_a_new_machine_takes_the_place_of_a_site(tmp_path: Path) -> None:
    run = FaultRun(tmp_path, "replaced-machine", num_steps=NUM_STEPS)
    (replaced_s,) = run.fault_times_s("replace")
    assert [r["start_step"] for r in run.events("tokyo", "training-started")] == [0, 0]
    assert [r["incarnation"] for r in run.events("tokyo", "node-started")] == [0, 0], "it remembers nothing"
    for neighbour in ("berlin", "lima"):
        swapped = run.events(neighbour, "teacher-swapped", teacher="tokyo")
        before = {r["incarnation"] for r in swapped if r["time_unix_s"] < replaced_s}
        after = {r["incarnation"] for r in swapped if r["time_unix_s"] > replaced_s + 1.0}
        assert before == {1} and after and min(after) > 1, "what the new machine says is newer"
        assert not run.events(neighbour, "teacher-refused")
    run.require_healthy()


def test_two_machines_with_one_identity_are_named_and_harm_nobody(tmp_path: Path) -> None:
    run = FaultRun(tmp_path, "two-machines", num_steps=NUM_STEPS)
    (doubled_s,) = run.fault_times_s("impostor")
    for neighbour in ("berlin", "lima"):
        refused = run.events(neighbour, "refused", peer="tokyo", reason="replayed")
        assert [r for r in refused if "two processes hold its key" in r["why"]]
        swapped = run.events(neighbour, "teacher-swapped", teacher="tokyo")
        newer = [r for r in swapped if r["time_unix_s"] > doubled_s + 1.0]
        assert newer and min(r["incarnation"] for r in newer) > 1, "the newer machine teaches"
    assert not run.events("accra", "refused", peer="tokyo")
    run.require_healthy()


@pytest.mark.parametrize(
    ("name", "reasons"),
    [
        ("garbage", {"malformed", "oversized"}),
        ("replays", {"replayed"}),
        ("forgeries", {"bad-signature"}),
        ("flood", {"flooding"}),
    ],
)
def test_a_peer_gone_bad_is_refused_quarantined_and_outlived(
    tmp_path: Path, name: str, reasons: set[str]
) -> None:
    run = FaultRun(tmp_path, name, num_steps=NUM_STEPS)
    (turned_s,) = run.fault_times_s("hostile")
    for neighbour in ("berlin", "lima"):
        refused = run.events(neighbour, "refused", peer="tokyo")
        assert {r["reason"] for r in refused} >= reasons
        assert min(r["time_unix_s"] for r in refused) >= turned_s
        assert run.events(neighbour, "peer-quarantined", peer="tokyo")
        fetched = run.events(neighbour, "frame-fetched", origin="tokyo")
        assert fetched and max(r["time_unix_s"] for r in fetched) <= turned_s
    assert not run.events("accra", "refused"), "it is no neighbour"
    assert not run.has_finished("tokyo")
    run.require_healthy("tokyo")


def test_ruined_weights_do_not_teach(tmp_path: Path) -> None:
    run = FaultRun(tmp_path, "ruined-weights", num_steps=NUM_STEPS)
    (ruined_s,) = run.fault_times_s("corrupt")
    for neighbour in ("berlin", "lima"):
        gated, readmitted = (
            [r["time_unix_s"] for r in run.events(neighbour, f"teacher-{what}", teacher="tokyo")]
            for what in ("gated", "readmitted")
        )
        assert max(gated) > ruined_s and not [time_s for time_s in readmitted if time_s > max(gated)]
        assert not run.events(neighbour, "teacher-refused"), "they are valid"
    run.require_healthy("tokyo")


def test_every_fault_scenario_is_tested_here() -> None:
    source = Path(__file__).read_text()
    assert not [name for name in FAULT_SCENARIOS if f'"{name}"' not in source]
