"""What the benchmark of faults runs and counts, against doing it by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
import tomli_w

from benchmarks.faults import (
    ALONE,
    CODISTILLED,
    FAULT_FREE,
    FAULTS,
    NUM_REAL_PARAMETERS,
    NUM_SMALL_PARAMETERS,
    NUM_STEPS,
    SEEDS,
    SIMULATIONS,
    Part,
    healthy_sites,
    lost_share,
    measure,
    shrink,
    small,
)
from p2pcodistill.checkpoint.manifest import DEFAULT_CHUNK_BYTES
from p2pcodistill.simulation.scenario import load_scenario

ALL = ("berlin", "tokyo", "lima", "accra")


def test_every_scenario_of_faults_is_measured() -> None:
    files = {
        path.stem
        for path in SIMULATIONS.glob("*.toml")
        if path.read_text().startswith("# A ring of four ") and "virtual" not in path.stem
    }
    assert files == set(FAULTS)


@pytest.mark.parametrize("name", [FAULT_FREE, *FAULTS])
def test_what_is_run_is_a_virtual_ring_of_four_with_the_faults_of_the_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / "small.toml"
    path.write_text(tomli_w.dumps(small(name)))
    scenario = load_scenario(path)
    assert (scenario.mode, scenario.topology, scenario.seeds) == ("virtual", "ring", SEEDS)
    assert scenario.site_names == ALL and scenario.training.num_steps == NUM_STEPS
    arms = [arm.kind for arm in scenario.arms]
    if name == FAULT_FREE:
        assert arms == ["codistilled", "alone"] and not (scenario.faults or scenario.links)
        return
    assert arms == ["codistilled"]
    full = load_scenario(SIMULATIONS / f"{name}.toml")
    share = NUM_STEPS / full.training.num_steps
    assert [(fault.kind, fault.sites) for fault in scenario.faults] == [
        (fault.kind, fault.sites) for fault in full.faults
    ]
    for fault, original in zip(scenario.faults, full.faults, strict=True):
        if original.at_step is not None:
            assert fault.at_step == pytest.approx(share * original.at_step, abs=0.5)


def test_a_thin_link_is_as_thin_for_the_small_model() -> None:
    link = {"bandwidth_mbit": 1.0, "reset_interval_s": 10.0, "latency_ms": 100.0}
    shrink(link)
    frame_s = 2 * NUM_SMALL_PARAMETERS * 8 / (link["bandwidth_mbit"] * 1e6)
    assert frame_s == pytest.approx(2 * NUM_REAL_PARAMETERS * 8 / 1e6), "a checkpoint takes as long"
    chunks_between_resets = link["reset_interval_s"] / frame_s
    assert chunks_between_resets == pytest.approx(10.0 * 1e6 / 8 / DEFAULT_CHUNK_BYTES)
    assert link["latency_ms"] == 100.0


def test_who_is_healthy() -> None:
    expected = {"kills": ALL, "partition": ALL, "weak-link": ALL, "black-hole": ALL, "restart-all": ALL}
    for name in FAULTS:
        scenario = load_scenario(SIMULATIONS / f"{name}.toml")
        assert healthy_sites(scenario) == expected.get(name, ("berlin", "lima", "accra"))


def test_the_lost_share_of_the_gain() -> None:
    losses = {}
    for seed in SEEDS:
        losses[Part(FAULT_FREE, ALONE, seed)] = dict.fromkeys(ALL, 2.0 + seed)
        losses[Part(FAULT_FREE, CODISTILLED, seed)] = dict.fromkeys(ALL, 1.6 + seed)
        losses[Part("flood", CODISTILLED, seed)] = {"berlin": 1.7 + seed, "lima": 1.6 + seed}
    assert lost_share(losses, "flood", ["berlin"]) == pytest.approx(0.25)
    assert lost_share(losses, "flood", ["berlin", "lima"]) == pytest.approx(0.125)
    assert lost_share(losses, "flood", ["berlin"], seeds=[1]) == pytest.approx(0.25)


def test_what_was_measured_is_not_measured_again(tmp_path: Path) -> None:
    (tmp_path / "flood-codistilled-1.json").write_text('{"berlin": 1.5}')
    assert measure(Part("flood", CODISTILLED, 1), folder=tmp_path) == {"berlin": 1.5}
