"""Fault scenarios in real processes, with tiny models: kill -9, broken connections, machines, clocks, strange neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from integration.conftest import is_ours
from integration.fault_runs import FaultRun
from patience import GENEROUS_S

from p2pcodistill.simulation.faults import impostor_of

A_DAY_S = 86_400.0


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    yield
    ours = [process for process in psutil.Process().children(recursive=True) if is_ours(process)]
    _, left = psutil.wait_procs(ours, timeout=GENEROUS_S)
    for process in left:
        process.kill()
    assert left == [], f"processes outlived the simulation: {left}"


def test_a_ring_falls_apart_and_heals(tmp_path: Path) -> None:
    # Who could not be reached for long is dialled less and less often: time to find each other again.
    run = FaultRun(tmp_path, "partition", num_steps=500, num_more_steps=500, mode="processes")
    (cut_s, *_), (healed_s, *_) = run.fault_times_s("partition"), run.fault_times_s("heal")
    for here, there in (("tokyo", "lima"), ("berlin", "accra")):
        swapped = [r["time_unix_s"] for r in run.events(here, "teacher-swapped", teacher=there)]
        assert min(swapped) < cut_s and max(swapped) > healed_s, "before and after, they learn"
        # What came just before the cut may be told of later, but nothing comes that was published after it.
        published_s = {
            (r["incarnation"], r["step"]): r["time_unix_s"]
            for r in reversed(run.events(there, "frame-published"))  # keyframes may follow their delta frames
        }
        fetched = [r for r in run.events(here, "frame-fetched", origin=there) if r["time_unix_s"] < healed_s]
        assert max(published_s[r["incarnation"], r["step"]] for r in fetched) < cut_s + 0.5
        assert run.events(here, "peer-disconnected", peer=there)
        assert run.link(here, there)["num_cuts"] >= 2
    within = [r["time_unix_s"] for r in run.events("berlin", "teacher-swapped", teacher="tokyo")]
    assert [time_s for time_s in within if cut_s < time_s < healed_s], "the two sides go on"
    run.require_healthy()
    run.require_whole_stores()


def test_a_new_machine_with_a_wrong_clock_beside_a_peer_gone_bad(tmp_path: Path) -> None:
    faults = [
        {"kind": "clock", "sites": ["tokyo"], "at_s": 0, "offset_s": A_DAY_S},
        {"kind": "hostile", "sites": ["accra"], "at_step": 300, "does": "garbage"},
        {"kind": "replace", "sites": ["tokyo"], "at_step": 400},
        {"kind": "clock", "sites": ["tokyo"], "at_step": 600, "offset_s": -A_DAY_S},
    ]
    run = FaultRun(
        tmp_path, "replaced-machine", num_steps=300, num_more_steps=300, mode="processes", faults=faults
    )
    (replaced_s,), (turned_s,) = run.fault_times_s("replace"), run.fault_times_s("hostile")
    started = run.events("tokyo", "training-started")
    assert [r["start_step"] for r in started] == [0, 0], "nothing was left of the old machine"
    for r in started:
        assert r["time_unix_s"] - replaced_s > A_DAY_S / 2, "it is tomorrow there"
    ended = run.events("tokyo", "training-ended")[-1]
    assert ended["finished"] and ended["time_unix_s"] - replaced_s < -A_DAY_S / 2, "and yesterday"
    # The others may have finished before the new machine has anything to teach.
    assert max(r["incarnation"] for r in run.events("tokyo", "frame-published")) > 1, "it was reminded"
    for neighbour in ("berlin", "lima"):
        swapped = run.events(neighbour, "teacher-swapped", teacher="tokyo")
        assert {r["incarnation"] for r in swapped if r["time_unix_s"] < replaced_s} == {1}
        refused = run.events(neighbour, "refused", peer="accra")
        assert {r["reason"] for r in refused} >= {"malformed", "oversized"}
        assert min(r["time_unix_s"] for r in refused) > turned_s - 1.0
        assert run.events(neighbour, "peer-quarantined", peer="accra")
        assert not run.events(neighbour, "teacher-refused")
    run.require_healthy("accra")
    run.require_whole_stores()


def test_two_machines_with_one_identity_beside_ruined_weights_and_a_black_hole(tmp_path: Path) -> None:
    faults = [
        {"kind": "impostor", "sites": ["tokyo"], "at_step": 300},
        {"kind": "corrupt", "sites": ["accra"], "at_step": 300},
        {"kind": "black-hole", "sites": ["lima"], "from_sites": ["accra"], "at_step": 500},
        {"kind": "heal", "sites": ["lima"], "at_step": 2000},
    ]
    run = FaultRun(
        tmp_path, "two-machines", num_steps=300, num_more_steps=600, mode="processes", faults=faults
    )
    (ruined_s,) = run.fault_times_s("corrupt")
    refused = run.events("berlin", "refused", peer="tokyo", reason="replayed")
    assert [r for r in refused if "two processes hold its key" in r["why"]]
    published = run.events(impostor_of("tokyo"), "frame-published")
    assert max(r["incarnation"] for r in published) > 1, "it was told of the other's past"
    for neighbour in ("berlin", "lima"):
        gated = run.events(neighbour, "teacher-gated", teacher="accra")[-1]
        assert gated["time_unix_s"] > ruined_s and gated["loss"] > gated["student_loss"]
        readmitted = run.events(neighbour, "teacher-readmitted", teacher="accra")
        assert not [r for r in readmitted if r["time_unix_s"] > gated["time_unix_s"]]
        assert not run.events(neighbour, "teacher-refused", teacher="accra"), "they are valid"
    assert run.link("lima", "accra")["num_swallowed"] > 0
    run.require_healthy("accra")
    run.require_whole_stores()
