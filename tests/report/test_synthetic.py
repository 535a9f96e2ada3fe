"""Runs without training: their figures by hand, and their pictures for a few sites and for many."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rich.console import Console

from p2pcodistill.report.edges import EdgeResult
from p2pcodistill.report.figures import to_svg
from p2pcodistill.report.synthetic import (
    SyntheticResult,
    SyntheticSite,
    seconds,
    share,
    summarise_synthetic,
    synthetic_headline,
    synthetic_table,
)
from p2pcodistill.report.synthetic_html import (
    arrivals_picture,
    spread_picture,
    staleness_picture,
    traffic_picture,
    write_synthetic_report,
)
from p2pcodistill.topology.build import build_topology


def make_result(num_sites: int = 4, **changes) -> SyntheticResult:
    """A ring on which all went well."""
    names = [str(index) for index in range(num_sites)]
    topology = build_topology("ring", names)
    edges = tuple(
        EdgeResult(teacher, student, 1000 + 10 * index, 8, 12.5, 50)
        for index, student in enumerate(names)
        for teacher in topology.teachers_of(student)
    )
    is_small = num_sites <= 40
    result = SyntheticResult(
        seed=0,
        topology=f"ring:{num_sites}",
        diameter=num_sites // 2,
        num_steps=400,
        step_time_s=0.1,
        exchange_interval_steps=50,
        virtual_s=42.0,
        processor_s=0.5,
        num_events=1234,
        num_deliveries=60,
        num_due_deliveries=64,
        num_bytes_fetched=9000,
        num_resent_bytes=10,
        is_complete=True,
        sites=tuple(SyntheticSite(name, 400, True, 1, (), 2000) for name in names),
        edges=edges,
        seconds_at_staleness=((0, 75.0), (50, 20.0), (100, 5.0)),
        staleness=[[5.0, 0.0, 0.0], [10.0, 20.0, 50.0], [42.0, 0.0, 0.0]],
        known=[[0.0, 0.0, 0.0, 0.0], [10.0, 0.5, 0.4, 0.6], [42.0, 1.0, 1.0, 1.0]],
        known_ratio=1.0,
        everyone_knows_everyone_s=30.0,
        by_hops=((1, 8, 5.0, 6.0, 7.0), (2, 4, 10.0, 11.0, 30.0)),
        arrivals_s=tuple(
            tuple(5.0 * abs(a - b) if (a, b) != (0, 1) else None for b in range(num_sites))
            for a in range(num_sites)
        )
        if is_small
        else (),
    )
    return replace(result, **changes)


def test_figures_by_hand() -> None:
    summary = summarise_synthetic("ring", [make_result(), make_result(seed=1, known_ratio=0.5)])
    assert summary["mean_staleness_steps"] == pytest.approx((20 * 50 + 5 * 100) / 100)
    assert summary["up_to_date_ratio"] == pytest.approx(0.75)
    assert summary["delivered_ratio"] == pytest.approx(60 / 64)
    assert summary["known_ratio"] == 0.75 and summary["bytes_sent"] == 8000
    first = summary["by_seed"][0]
    assert (first["max_hops"], first["diameter"], first["num_faults"]) == (2, 2, 0)
    assert first["bytes_per_link"] == {"least": 1000, "median": 1020, "most": 1030}


def test_what_cannot_be_told_is_none() -> None:
    nothing = make_result(
        seconds_at_staleness=(),
        by_hops=(),
        known_ratio=0.0,
        everyone_knows_everyone_s=None,
        is_complete=False,
    )
    summary = summarise_synthetic("ring", [make_result(), nothing])
    assert summary["mean_staleness_steps"] is None and summary["everyone_knows_everyone_s"] is None
    told = synthetic_headline(summary)
    assert "No student ever got a checkpoint" in told
    assert "50 % of all pairs of sites knew of each other" in told
    assert "Not every student got the last version" in told


def test_the_result_survives_its_file() -> None:
    result = make_result(sites=(SyntheticSite("0", 7, False, 1, (("kill", 7),), 5),))
    assert SyntheticResult.from_json(result.to_json()) == result


def test_the_table_is_legible_at_100_columns() -> None:
    console = Console(width=100, record=True, file=None)
    with console.capture() as captured:
        console.print(synthetic_table(summarise_synthetic("ring", [make_result(1000, known_ratio=0.999999)])))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 100
    assert "ring: 1000 sites, ring:1000, 400 steps" in lines[0]
    assert "Teachers were 15.0 steps stale on average" in captured.get().replace("\n", " ")


def test_a_share_is_all_only_if_it_is() -> None:
    assert [share(ratio) for ratio in (0.0, 0.456, 0.9951, 0.999999, 1.0)] == [
        "0 %", "46 %", "99.51 %", "99.99 %", "100 %",
    ]  # fmt: skip
    assert [seconds(s) for s in (1.25, 300.0, 9000.0)] == ["1.2 s", "5.0 min", "2.5 h"]


@pytest.mark.parametrize("num_sites", [4, 40, 1000])
def test_the_pictures_of_few_sites_and_of_many(num_sites: int) -> None:
    result = make_result(num_sites)
    staleness, spread, arrivals = staleness_picture(result), spread_picture(result), arrivals_picture(result)
    assert staleness is not None and spread is not None
    for figure in (staleness, spread, traffic_picture(result)):
        for axes in figure.axes:
            assert axes.get_xlim()[0] == 0, "nothing is negative"
    assert (arrivals is not None) == (num_sites <= 40)
    links = to_svg(traffic_picture(result), "traffic")
    assert ("0 → 1" in links) == (num_sites == 4)
    assert ("links, one way" in links) == (num_sites > 4)


def test_the_histogram_has_bars_from_zero_on() -> None:
    figure = staleness_picture(make_result())
    assert figure is not None
    bars = [(bar.get_x(), bar.get_width(), round(bar.get_height(), 2)) for bar in figure.axes[1].patches]
    assert bars == [(0, 50, 0.75), (50, 50, 0.2), (100, 50, 0.05)]
    assert figure.axes[1].get_xlim() == (0, 150)


@pytest.mark.parametrize(("num_sites", "is_drawn"), [(4, True), (40, True), (1000, False)])
def test_the_report_draws_the_topology_where_it_can_be_read(tmp_path, num_sites: int, is_drawn: bool) -> None:
    result = make_result(num_sites)
    sites = (replace(result.sites[0], finished=False, faults=(("kill", 20),)), *result.sites[1:])
    result = replace(result, sites=sites)
    path = tmp_path / "report.html"
    write_synthetic_report(
        path,
        title="<ring>",
        summary=summarise_synthetic("ring", [result]),
        result=result,
        topology=build_topology("ring", [site.name for site in sites]),
        configuration_text="[synthetic]",
        versions={"python": "3.11"},
    )
    page = path.read_text()
    assert "&lt;ring&gt;" in page and "<script" not in page
    assert ('id="states-' in page) == is_drawn
    assert ("killed (1)" in page) == is_drawn and "kill at step 20" in page
    assert ("more are left out" in page) == (num_sites == 1000)
