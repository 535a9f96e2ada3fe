"""Runs without training: the same seed gives the same log, and what faults, links and graphs do can be computed by hand."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from p2pcodistill.simulation.fault_config import FaultConfig
from p2pcodistill.simulation.links import neighbour_pairs
from p2pcodistill.simulation.shaping import LinkShape
from p2pcodistill.simulation.virtual.run import VirtualSettings
from p2pcodistill.simulation.virtual.synthetic import SyntheticModel, SyntheticSchedule
from p2pcodistill.simulation.virtual.synthetic_run import SyntheticRun
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.records import to_record
from p2pcodistill.topology.build import build_topology, default_members
from p2pcodistill.topology.graph import Topology
from p2pcodistill.topology.statistics import distances_from

REPOSITORY = Path(__file__).parents[2]
MODEL = SyntheticModel(num_fp16_bytes=1_000_000, keyframe_bytes=500_000, delta_bytes=50_000)
INTERVAL_S = 5.0
SCHEDULE = SyntheticSchedule(num_versions=12, interval_steps=50, step_time_s=0.1, first_step=50)
WIDE = LinkShape(bandwidth_mbit=100, latency_ms=20)


class Told:
    """Everything that the sites of a run report."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def __call__(self, time_s: float, site: str, event: Event) -> None:
        self.records.append({"site": site} | to_record(event, time_unix_s=time_s))

    def of(self, name: str, **fields: Any) -> list[dict[str, Any]]:
        """The records of an event with these values."""
        return [r for r in self.records if r["event"] == name and all(r[k] == v for k, v in fields.items())]


def make_run(
    spec: str,
    told: Told | None = None,
    *,
    shape: LinkShape = WIDE,
    faults: Sequence[FaultConfig] = (),
    schedule: SyntheticSchedule = SCHEDULE,
    seed: int = 0,
) -> SyntheticRun:
    """A run over the members that `spec` speaks of, all links alike."""
    members = default_members(spec)
    assert members is not None
    topology = build_topology(spec, members)
    return SyntheticRun(
        topology,
        MODEL,
        schedule,
        settings=VirtualSettings(seed=seed),
        shapes=dict.fromkeys(neighbour_pairs(topology), (shape, shape)),
        faults=faults,
        on_event=told or (lambda _time_s, _site, _event: None),
    )


def log_of_a_rough_run(seed: int) -> str:
    """The digest of all that happens in a run with everything in it that is left to chance."""
    told = Told()
    rough = LinkShape(bandwidth_mbit=5, latency_ms=40, jitter_ms=30, loss_ratio=0.02, reset_interval_s=17)
    faults = (
        FaultConfig(kind="kill", sites=("1",), at_s=12.0),
        FaultConfig(kind="partition", sites=("3", "4"), at_step=150),
        FaultConfig(kind="restart", sites=("1",), at_s=21.0),
        FaultConfig(kind="heal", sites=("3", "4"), at_s=33.0),
    )
    make_run("small-world:8,4,0.2", told, shape=rough, faults=faults, seed=seed).run()
    counts = Counter(record["event"] for record in told.records)
    assert counts["peer-disconnected"] > 10 and counts["frame-fetched"] > 100
    return hashlib.sha256("\n".join(map(json.dumps, told.records)).encode()).hexdigest()


def test_the_same_seed_gives_the_same_log_in_any_process() -> None:
    program = "from simulation.test_virtual_runs import log_of_a_rough_run as log; print(log(3), log(4))"
    path = os.pathsep.join([str(REPOSITORY / "tests"), str(REPOSITORY)])
    logs = [
        subprocess.run(
            [sys.executable, "-c", program],
            env=os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout.split()
        for hash_seed in ("1", "2")
    ]
    assert logs[0] == logs[1]
    assert logs[0][0] != logs[0][1]


@pytest.mark.parametrize(
    "spec", ["ring:9", "torus:3x4", "hypercube:3", "exponential:12", "random-regular:12,3,1", "line:6"]
)
def test_knowledge_spreads_by_one_hop_an_exchange(spec: str) -> None:
    run = make_run(spec)
    run.run()
    assert run.is_complete
    for origin in run.network.topology.members:
        distances = distances_from(run.network.topology, origin)
        arrivals = run.spread.arrivals(origin)
        assert {origin: 0} | {site: a.num_hops for site, a in arrivals.items()} == distances
        for arrival in arrivals.values():
            # All publish at the same moments; from the last of these on it takes a transfer.
            exchanges, transfer_s = divmod(arrival.time_s, INTERVAL_S)
            assert exchanges == arrival.num_hops and 0 < transfer_s < 1


def test_of_a_schedule_only_those_teach_whose_turn_it_is() -> None:
    turn, always = make_run("one-peer-exponential:8"), make_run("exponential:8")
    for run in (turn, always):
        run.run()
        assert run.is_complete
    # Versions arrive all the same.
    assert turn.num_deliveries == always.num_deliveries
    assert turn.num_bytes_fetched == always.num_bytes_fetched
    # From its second version on, a site learns from the one 2, 4 and 1 before it, in turn.
    arrivals = turn.spread.arrivals("0")
    exchanges = {site: int(arrival.time_s / INTERVAL_S + 0.01) for site, arrival in arrivals.items()}
    assert exchanges == {"2": 1, "4": 2, "6": 2, "1": 3, "3": 3, "5": 3, "7": 3}
    assert {site: arrivals[site].num_hops for site in "246"} == {"2": 1, "4": 1, "6": 2}


def test_every_version_is_delivered_once_along_every_edge() -> None:
    told = Told()
    run = make_run("ring:5", told)
    run.run()
    assert run.num_deliveries == 12 * 10
    assert len(told.of("teacher-swapped", teacher="0", site="1")) == 12
    # A keyframe and eleven delta frames, twice from each site.
    assert run.num_bytes_fetched == pytest.approx(10 * (500_000 + 11 * 50_000), rel=1e-3)
    assert run.num_resent_bytes == 0 and told.of("refused") == []
    carried = run.bytes_by_link()
    assert len(carried) == 10
    assert all(1_050_000 < link.num_bytes < 1_080_000 for link in carried.values())


def test_staleness_on_a_thin_link_is_what_bandwidth_and_size_make_it() -> None:
    # A version of 500 kB (all of them keyframes) every 5 s, and a link that carries 50 kB a second, so that it takes 10 s.
    told = Told()
    schedule = SyntheticSchedule(num_versions=40, interval_steps=50, step_time_s=0.1, first_step=50)
    topology = build_topology("pair", ["a", "b"])
    thin = LinkShape(bandwidth_mbit=0.4)
    run = SyntheticRun(
        topology,
        SyntheticModel(num_fp16_bytes=1_000_000, keyframe_bytes=500_000, delta_bytes=500_000),
        schedule,
        shapes={("a", "b"): (thin, LinkShape())},
        on_event=told,
        keep_curves=True,
    )
    run.run(200.0)
    swaps = [record["time_unix_s"] for record in told.of("teacher-swapped", site="b")]
    assert swaps[0] == pytest.approx(15.0, abs=0.2)  # published at 5 s, 10 s under way
    gaps = [after - before for before, after in itertools.pairwise(swaps)]
    assert all(gap == pytest.approx(10.0, rel=0.03) for gap in gaps)
    assert run.staleness.edges["b", "a"].mean_steps < 0.1  # its wants have to travel the thin way
    behind = run.staleness.edges["a", "b"]
    # What arrives was published 10 s or two intervals before, and nothing newer comes for another 10 s. A delta frame cannot
    # be overtaken; a path is begun anew by a keyframe where the way has become too long.
    assert max(steps for _, steps in behind.curve) >= 150
    assert behind.mean_steps >= 100


def test_a_slow_student_holds_nobody_up_and_catches_up_by_keyframes() -> None:
    # A delta frame every 5 s takes 6.7 s on its link, a keyframe 67 s; the seven others have links to spare.
    model = SyntheticModel(num_fp16_bytes=10_000_000, keyframe_bytes=5_000_000, delta_bytes=500_000)
    schedule = SyntheticSchedule(num_versions=40, interval_steps=50, step_time_s=0.1, first_step=50)
    thin = LinkShape(bandwidth_mbit=0.6, latency_ms=20)
    topology = build_topology("star:9", members := [str(index) for index in range(9)])
    hub, *fast, slow = members

    def run(to_slow: LinkShape) -> Told:
        told = Told()
        shapes = dict.fromkeys(neighbour_pairs(topology), (WIDE, WIDE)) | {(hub, slow): (to_slow, WIDE)}
        made = SyntheticRun(topology, model, schedule, shapes=shapes, on_event=told)
        made.run(400.0)
        assert made.is_complete
        return told

    def swaps(told: Told, site: str) -> dict[int, float]:
        records = told.of("teacher-swapped", site=site, teacher=hub)
        return {record["teacher_step"]: record["time_unix_s"] for record in records}

    alike, unlike = run(WIDE), run(thin)
    for site in fast:
        assert len(swaps(alike, site)) == schedule.num_versions
        assert swaps(unlike, site) == pytest.approx(swaps(alike, site), abs=0.1), (
            "chunks are smaller, that is all"
        )
    assert {record["kind"] for record in unlike.of("frame-fetched", site=slow)} == {"keyframe"}
    times_s = [0.0, *swaps(unlike, slow).values()]
    assert len(times_s) == 5 and all(b - a < 75.0 for a, b in itertools.pairwise(times_s)), (
        "one after the other"
    )


def test_versions_arrive_in_spite_of_losses_and_resets() -> None:
    told = Told()
    rough = LinkShape(bandwidth_mbit=8, latency_ms=100, jitter_ms=50, loss_ratio=0.05, reset_interval_s=7)
    run = make_run("ring:4", told, shape=rough)
    run.run()
    assert run.is_complete
    assert all(link.faults.num_cuts > 5 for link in run.network.links.values())
    assert sum(link.faults.num_packets_lost for link in run.network.links.values()) > 100
    assert told.of("refused") == []


def test_a_site_that_is_cut_off_catches_up_when_it_is_healed() -> None:
    told = Told()
    faults = (
        FaultConfig(kind="partition", sites=("0",), at_s=16.0),
        FaultConfig(kind="heal", sites=("0",), at_s=41.0),
    )
    run = make_run("ring:4", told, faults=faults)
    run.run()
    assert run.is_complete
    away = [
        record
        for record in told.of("teacher-swapped")
        if 16.1 < record["time_unix_s"] < 41.0 and "0" in (record["site"], record["teacher"])
    ]
    assert away == []
    back = [r for r in told.of("teacher-swapped", site="0") if r["time_unix_s"] > 41.0]
    assert back[0]["time_unix_s"] < 44.0


def test_a_killed_site_comes_back_with_its_store() -> None:
    told = Told()
    faults = (
        FaultConfig(kind="kill", sites=("2",), at_s=21.0),
        FaultConfig(kind="restart", sites=("2",), at_s=27.0),
    )
    run = make_run("ring:4", told, faults=faults)
    run.run()
    assert run.is_complete
    assert [r["incarnation"] for r in told.of("node-started", site="2")] == [0, 1]
    published = told.of("frame-published", site="2")
    assert [r["incarnation"] for r in published] == sorted(r["incarnation"] for r in published)
    assert next(r["kind"] for r in published if r["incarnation"] == 2) == "keyframe"
    # What its teachers had sent before was there: only what came later was fetched, by delta frames.
    fetched_later = [r for r in told.of("frame-fetched", site="2", origin="1") if r["time_unix_s"] > 27]
    assert fetched_later and {r["kind"] for r in fetched_later} == {"delta"}
    taken_up = [r for r in told.of("teacher-swapped", site="2") if r["time_unix_s"] == 27.0]
    assert sorted(r["teacher"] for r in taken_up) == ["1", "3"]


def test_a_killed_site_is_behind_nobody() -> None:
    run = make_run("ring:3", faults=(FaultConfig(kind="kill", sites=("1",), at_s=21.0),))
    run.run(until_s=60.0)
    assert 0 < run.staleness.edges["0", "1"].duration_s < 21.0
    assert run.staleness.edges["1", "0"].duration_s > 40.0, "0 goes on with what it has"


def test_a_site_that_takes_up_the_last_versions_twice_counts_once() -> None:
    end_s = 70.0  # 0 is slow and has the last version of its teachers long before it has published its own
    faults = (
        FaultConfig(kind="slow-down", sites=("0",), at_s=0.0, factor=2.0),
        FaultConfig(kind="kill", sites=("0",), at_s=end_s),
        FaultConfig(kind="restart", sites=("0",), at_s=end_s + 1.0),
        FaultConfig(kind="kill", sites=("0",), at_s=end_s + 2.0),
        FaultConfig(kind="restart", sites=("0",), at_s=end_s + 3.0),
    )
    told = Told()
    run = make_run("ring:3", told, faults=faults)
    run.run()
    last_step = SCHEDULE.first_step + (SCHEDULE.num_versions - 1) * SCHEDULE.interval_steps
    last = told.of("teacher-swapped", teacher_step=last_step)
    edges = Counter((record["teacher"], record["site"]) for record in last)
    assert edges["1", "0"] == edges["2", "0"] == 3, "with each launch"
    assert run.is_complete
    assert len(edges) == 6, "it is over when every edge is done"


def test_a_download_goes_on_where_a_kill_cut_it_off() -> None:
    told = Told()
    faults = (
        FaultConfig(kind="kill", sites=("1",), at_s=11.0),
        FaultConfig(kind="restart", sites=("1",), at_s=16.0),
    )
    # A keyframe of half a megabyte, in two chunks, takes 8 s.
    run = make_run("line:2", told, shape=LinkShape(bandwidth_mbit=0.5), faults=faults)
    run.run()
    assert run.is_complete
    first = told.of("frame-fetched", site="1")[0]
    assert first["kind"] == "keyframe" and first["step"] == 50
    # One chunk was there: the rest takes 4 s, after a handshake and a delta frame's manifest or two.
    assert first["time_unix_s"] < 16.0 + 6.0


def test_two_that_cannot_connect_exchange_through_a_third() -> None:
    told = Told()
    edges = [("a", "b", 1.0), ("c", "a", 1.0), ("c", "b", 1.0)]  # c itself learns from nobody
    run = SyntheticRun(Topology("abc", edges, source="test"), MODEL, SCHEDULE, on_event=told)
    run.network.link_between("a", "b").block()
    run.run()
    assert run.is_complete
    assert [(r["origin"], r["student"]) for r in told.of("relay-started", site="c")] == [("a", "b")]
    assert told.of("teacher-swapped", site="b", teacher="a")
    assert run.bytes_by_link()["a", "b"].num_bytes == 0 and told.of("refused") == []


def test_sites_join_leave_and_slow_down() -> None:
    told = Told()
    faults = (
        FaultConfig(kind="slow-down", sites=("1",), at_s=20.0, factor=3.0),
        FaultConfig(kind="leave", sites=("2",), at_s=31.0),
        FaultConfig(kind="join", sites=("3",), at_s=12.0),
    )
    run = make_run("ring:4", told, faults=faults)
    run.run(180.0)
    assert told.of("node-started", site="3")[0]["time_unix_s"] == 12.0
    assert told.of("node-stopped", site="2") == [
        {"site": "2", "event": "node-stopped", "time_unix_s": 31.0, "reason": "stopped"}
    ]
    times_s = [r["time_unix_s"] for r in told.of("frame-published", site="1", kind="delta")]
    gaps = [round(after - before, 6) for before, after in itertools.pairwise(times_s)]
    assert gaps[:2] == [5.0, 5.0] and set(gaps[3:]) == {15.0}
    assert told.of("training-ended", site="2") == []
    assert {r["site"] for r in told.of("training-ended")} == {"0", "1", "3"}


def test_a_fault_that_never_happens_is_an_error() -> None:
    faults = (FaultConfig(kind="kill", sites=("1",), at_s=10_000.0),)
    with pytest.raises(RuntimeError, match="the fault 'kill' of 1 never happened"):
        make_run("ring:4", faults=faults).run(100.0)


def test_ruined_weights_pass_nothing_on() -> None:
    faults = (FaultConfig(kind="corrupt", sites=("1",), at_s=0.0),)
    run = make_run("line:3", faults=faults)
    run.run()
    assert run.spread.arrivals("1") == {} and list(run.spread.arrivals("0")) == ["1"]


def test_cost_does_not_grow_with_the_number_of_sites() -> None:
    """Counted in events of the clock, which no busy machine can change."""
    costs = {}
    for num_sites in (10, 50):
        run = make_run(f"ring:{num_sites}", schedule=SyntheticSchedule(20, 10, 0.1, 10))
        run.run()
        costs[num_sites] = run.network.clock.num_events / run.num_deliveries
    assert costs[50] < 1.1 * costs[10]
