"""Scenario files without training: what is accepted, and from the command to the report."""

from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from p2pcodistill.errors import ConfigError, GroupError, TopologyError
from p2pcodistill.report.synthetic import SyntheticResult
from p2pcodistill.simulation.files import scenario_toml
from p2pcodistill.simulation.links import link_shapes
from p2pcodistill.simulation.processes import simulate
from p2pcodistill.simulation.scenario import ScenarioConfig, load_scenario
from p2pcodistill.simulation.shaping import LinkShape
from p2pcodistill.simulation.synthetic_config import SyntheticConfig
from p2pcodistill.simulation.virtual.synthetic_job import model_of
from p2pcodistill.topology.build import build_topology
from p2pcodistill.topology.statistics import distances_from

REPOSITORY = Path(__file__).parents[2]


def table(**changes: Any) -> dict[str, Any]:
    """Eight sites on a ring."""
    base = {
        "name": "small",
        "mode": "virtual",
        "topology": "ring:8",
        "synthetic": {"num_parameters": 1_000_000, "num_steps": 400},
        "links": [{"between": "all", "bandwidth_mbit": 20, "latency_ms": 30}],
    }
    return base | changes


def load(folder: Path, content: dict[str, Any], *overrides: str) -> ScenarioConfig:
    file = folder / "scenario.toml"
    file.write_text(tomli_w.dumps(content))
    return load_scenario(file, overrides)


def run(folder: Path, content: dict[str, Any]) -> tuple[Path, str]:
    """The run folder, and what was shown."""
    folder.mkdir(exist_ok=True)
    file = folder / "scenario.toml"
    file.write_text(tomli_w.dumps(content))
    stream = io.StringIO()
    assert simulate(file, run_root=folder / "runs", stream=stream) == 0
    return (folder / "runs" / "latest").resolve(), stream.getvalue()


def result_of(folder: Path, seed: int = 0) -> SyntheticResult:
    return SyntheticResult.from_json((folder / f"synthetic-seed{seed}" / "synthetic.json").read_text())


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# --- the file --------------------------------------------------------------------------------------------------------


def test_sites_come_from_a_number_or_from_the_topology(tmp_path: Path) -> None:
    numbered = ("0", "1", "2", "3")
    assert load(tmp_path, table(topology="ring", num_sites=4)).site_names == numbered
    assert load(tmp_path, table(topology="ring:4")).site_names == numbered
    graph = tmp_path / "graph.edgelist"
    graph.write_text("berlin tokyo\ntokyo lima\nlima berlin\n")
    assert load(tmp_path, table(topology="graph.edgelist")).site_names == ("berlin", "tokyo", "lima")


def test_scenarios_that_train_may_leave_their_sites_to_the_topology_too(tmp_path: Path) -> None:
    content = {"name": "x", "topology": "ring:4", "arms": [{"name": "codistilled", "kind": "codistilled"}]}
    assert len(load(tmp_path, content).sites) == 4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"topology": "ring"}, "which sites are there.*num_sites"),
        ({"topology": "rong:8"}, "rong"),
        ({"num_sites": 1, "topology": "ring"}, "num_sites: .*greater than or equal to 2"),
        ({"num_sites": 1001, "topology": "ring"}, "num_sites: .*less than or equal to 1000"),
        ({"num_sites": 4, "sites": [{"name": "a"}, {"name": "b"}]}, "num_sites and .*exclude each other"),
        ({"num_sites": 4}, "ring:8"),
        ({"mode": "processes"}, r"\[synthetic\] is for mode = \"virtual\""),
        ({"training": {"num_steps": 10}}, "nothing is trained .*remove 'training'"),
        ({"arms": []}, "nothing is trained .*remove 'arms'"),
        ({"synthetic": {"num_step": 5}}, "unknown key 'synthetic.num_step': did you mean 'num_steps'"),
        ({"synthetic": {"num_steps": 49}}, "49 steps end before the first exchange, at step 50"),
        ({"links": [{"between": "everybody"}]}, "links"),
        ({"links": [{"between": "all"}, {"between": "all"}]}, "the link between 'all' is listed twice"),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(
    tmp_path: Path, changes: dict[str, Any], told: str
) -> None:
    with pytest.raises((ConfigError, TopologyError), match=told) as error:
        load(tmp_path, table(**changes))
    assert "\n" not in str(error.value) and "scenario.toml" in str(error.value)


def test_data_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "scenario.toml"
    file.write_text(tomli_w.dumps(table()))
    with pytest.raises(ConfigError, match=r"nothing is trained .* leave out --data"):
        load_scenario(file, data=[tmp_path])


def test_a_link_of_its_own_comes_before_a_file_and_that_before_all(tmp_path: Path) -> None:
    graph = {
        "directed": False,
        "multigraph": False,
        "graph": {},
        "nodes": [{"id": name} for name in ("a", "b", "c")],
        "edges": [
            {"source": "a", "target": "b", "bandwidth_mbit": 5},
            {"source": "b", "target": "c", "bandwidth_mbit": 6},
            {"source": "c", "target": "a"},
        ],
    }
    (tmp_path / "graph.json").write_text(json.dumps(graph))
    links = [{"between": "all", "latency_ms": 7}, {"between": ["b", "c"], "bandwidth_mbit": 1}]
    scenario = load(tmp_path, table(topology="graph.json", links=links))
    shapes = link_shapes(scenario, build_topology(scenario.topology, scenario.site_names))
    assert shapes == {
        ("a", "b"): (LinkShape(5.0), LinkShape(5.0)),
        ("a", "c"): (LinkShape(latency_ms=7.0), LinkShape(latency_ms=7.0)),
        ("b", "c"): (LinkShape(1.0), LinkShape(1.0)),
    }


def test_the_written_scenario_means_the_same_and_is_short(tmp_path: Path) -> None:
    scenario = load(tmp_path, table(topology="exponential:1000"))
    text = scenario_toml(scenario)
    assert len(text) < 2000 and "num_sites = 1000" in text
    (tmp_path / "again.toml").write_text(text)
    assert load_scenario(tmp_path / "again.toml") == scenario


@pytest.mark.parametrize(
    ("changes", "versions"),
    [
        ({}, (50, 8)),
        ({"burn_in_steps": 120}, (150, 6)),
        ({"burn_in_steps": 150}, (150, 6)),
        ({"exchange_interval_steps": 400}, (400, 1)),
    ],
)
def test_versions_are_published_when_a_training_group_would(
    changes: dict[str, int], versions: tuple[int, int]
) -> None:
    synthetic = SyntheticConfig(num_steps=400, **changes)
    assert (synthetic.first_step, synthetic.num_versions) == versions


def test_sizes_are_given_by_ratios_or_in_bytes() -> None:
    model = model_of(SyntheticConfig(num_parameters=1000, keyframe_ratio=2.0, delta_ratio=10.0))
    assert (model.num_fp16_bytes, model.keyframe_bytes, model.delta_bytes) == (2000, 1000, 200)
    model = model_of(SyntheticConfig(num_parameters=1000, keyframe_bytes=1500, delta_bytes=7))
    assert (model.keyframe_bytes, model.delta_bytes) == (1500, 7)


@pytest.mark.parametrize("name", ["thousand-sites", "forty-sites"])
def test_the_scenarios_to_copy_are_valid(name: str) -> None:
    scenario = load_scenario(REPOSITORY / "simulations" / f"{name}.toml")
    assert scenario.synthetic is not None and scenario.name == name
    assert len(scenario.sites) == {"thousand-sites": 1000, "forty-sites": 40}[name]


# --- the run ---------------------------------------------------------------------------------------------------------


def test_a_ring_from_the_command_to_the_report_and_alike_each_time(tmp_path: Path) -> None:
    folder, shown = run(tmp_path / "first", table(seeds=[0, 1]))
    result = result_of(folder)
    assert result.is_complete and result.num_deliveries == result.num_due_deliveries == 8 * 2 * 8
    assert [site.num_steps for site in result.sites] == [400] * 8 and all(s.finished for s in result.sites)
    # Knowledge came over as many sites as the graph says, an exchange for each.
    counted = Counter(
        hops
        for origin in map(str, range(8))
        for hops in distances_from(build_topology("ring", list(map(str, range(8)))), origin).values()
        if hops
    )
    assert {hops: num_pairs for hops, num_pairs, *_ in result.by_hops} == counted
    interval_s = result.exchange_interval_steps * result.step_time_s
    for hops, _, first_s, _, last_s in result.by_hops:
        assert hops * interval_s < first_s <= last_s < (hops + 1) * interval_s
    assert result.known[-1][1:] == [1.0, 1.0, 1.0]
    assert result.arrivals_s[0][0] == 0.0 and result.arrivals_s[0][4] == max(map(max, result.arrivals_s))
    # Nobody is behind but while a frame is on its way; each link carries the same.
    assert sum(s for steps, s in result.seconds_at_staleness if steps > 50) == 0
    assert len({edge.num_bytes for edge in result.edges}) < 4 and len(result.edges) == 16
    assert min(edge.num_bytes for edge in result.edges) > 1_250_000 + 7 * 100_000

    summary = json.loads((folder / "summary.json").read_text())
    assert summary["num_sites"] == 8 and summary["seeds"] == [0, 1]
    assert [figures["max_hops"] for figures in summary["by_seed"]] == [4, 4]
    assert summary["everyone_knows_everyone_s"] == pytest.approx(result.everyone_knows_everyone_s, rel=0.05)
    assert "small: 8 sites, ring:8, 400 steps" in shown and "over at most 4 sites" in shown
    assert "synthetic seed 0 8 sites: simulating, step 4/400" in shown
    page = (folder / "report.html").read_text()
    for part in ("Who knew of whom when", "Share of the time", "When each site first knew", "finished (8)"):
        assert part in page

    again, _ = run(tmp_path / "again", table())
    logs = [path / "synthetic-seed0" / "simulator.jsonl" for path in (folder, again)]
    assert logs[0].read_text() == logs[1].read_text() != ""
    assert result_of(again).edges == result.edges


def test_faults_are_told_and_sites_that_are_gone_are_shown(tmp_path: Path) -> None:
    faults = [
        {"kind": "kill", "sites": ["3"], "at_step": 120},
        {"kind": "partition", "sites": ["6"], "at_step": 200},
        {"kind": "heal", "sites": ["6"], "at_step": 330},
    ]
    folder, shown = run(tmp_path, table(faults=faults))
    result = result_of(folder)
    sites = {site.name: site for site in result.sites}
    assert sites["3"].faults == (("kill", 120),) and not sites["3"].finished
    assert [kind for kind, _ in sites["6"].faults] == ["partition", "heal"] and sites["6"].finished
    assert not result.is_complete
    assert max(steps for steps, _ in result.seconds_at_staleness) >= 100, "while 6 was cut off"
    told = records(folder / "synthetic-seed0" / "simulator.jsonl")
    counts = Counter(record["event"] for record in told)
    assert (
        counts["fault-injected"] == 3 and counts["link-carried"] == 8 and counts["synthetic-measured"] >= 99
    )
    assert [r["num_sites_up"] for r in told if r["event"] == "synthetic-measured"][-1] == 7
    assert "8 sites: fault: kill of 3 at step 120" in shown
    page = (folder / "report.html").read_text()
    assert "killed (1)" in page and "finished after faults (1)" in page and "kill at step 120" in page


def test_event_logs_are_written_on_demand_as_nodes_would(tmp_path: Path) -> None:
    content = table(synthetic={"num_parameters": 1_000_000, "num_steps": 200, "event_logs": True})
    folder, _ = run(tmp_path, content)
    for site in map(str, range(8)):
        told = records(folder / "synthetic-seed0" / site / "events.jsonl")
        counts = Counter(record["event"] for record in told)
        assert counts["frame-published"] == 4 and counts["teacher-swapped"] == 8
    assert not list((tmp_path / "runs").glob("*/data"))


def test_a_fault_that_never_came_fails_the_run(tmp_path: Path) -> None:
    with pytest.raises(GroupError, match=r"the fault 'kill' of 3 never happened: choose an earlier moment"):
        run(tmp_path, table(faults=[{"kind": "kill", "sites": ["3"], "at_step": 4000}]))
