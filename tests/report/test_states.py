"""How it ended for each site, from made-up histories: in words, drawn, and in the report."""

from __future__ import annotations

import pytest

from p2pcodistill.report.figures import to_svg
from p2pcodistill.report.history import SiteHistory
from p2pcodistill.report.html import write_report
from p2pcodistill.report.states import COLOURS, state_of, state_rows, states_picture
from p2pcodistill.report.summary import ArmResult, summarise
from p2pcodistill.topology.build import build_topology

SITES = ("berlin", "lagos", "lima", "tokyo")


def history(*faults: str, finished: bool = False, num_node_starts: int = 1) -> SiteHistory:
    return SiteHistory(
        finished=finished,
        num_node_starts=num_node_starts,
        num_steps=60,
        faults=[(kind, 10 * index) for index, kind in enumerate(faults, start=1)],
    )


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ("finished", history(finished=True)),
        ("finished after faults", history("kill", "restart", finished=True)),
        ("killed", history("kill")),
        ("killed", history("kill", "restart", "kill", "heal")),
        ("left", history("slow-down", "leave")),
        ("not finished", history()),
        ("not finished", history("kill", "restart")),
        ("not finished", history("partition")),
        ("never started", history(num_node_starts=0)),
    ],
)
def test_the_state_of_a_site_is_what_befell_it_last(state: str, told: SiteHistory) -> None:
    assert state_of(told) == state


@pytest.fixture
def arm() -> ArmResult:
    sites = {
        "berlin": history(finished=True),
        "lagos": history("kill", "restart", finished=True),
        "lima": history("kill"),
        "tokyo": history("partition", "heal", finished=True),
    }
    sites["berlin"].staleness = [(40, {"tokyo": 30, "lagos": 0}), (60, {"tokyo": 5, "lagos": 20})]
    sites["tokyo"].staleness = [(60, {"berlin": 0, "lima": 0})]
    return ArmResult("codistilled", "codistilled", 0, sites)


def test_each_site_has_the_colour_of_its_state_and_the_legend_counts_them(arm: ArmResult) -> None:
    figure = states_picture(build_topology("ring", SITES), arm.sites)
    assert figure is not None
    picture = to_svg(figure, "states")
    for told in (*SITES, "finished (1)", "finished after faults (2)", "killed (1)"):
        assert told in picture
    assert "left (" not in picture
    assert COLOURS["killed"].lower() in picture and COLOURS["left"].lower() not in picture


def test_a_row_for_each_site_tells_its_stalest_teacher_and_its_faults(arm: ArmResult) -> None:
    assert state_rows(arm.sites) == [
        ["berlin", "finished", "60", "20 (lagos)", "–"],
        ["lagos", "finished after faults", "60", "–", "kill at step 10, restart at step 20"],
        ["lima", "killed", "60", "–", "kill at step 10"],
        ["tokyo", "finished after faults", "60", "0", "partition at step 10, heal at step 20"],
    ]


def test_of_many_sites_those_that_did_not_simply_finish_are_listed(monkeypatch, arm: ArmResult) -> None:
    monkeypatch.setattr("p2pcodistill.report.states.MAX_ROWS", 3)
    assert [row[0] for row in state_rows(arm.sites)] == ["lagos", "lima", "tokyo"]


@pytest.mark.parametrize(("sites", "is_told"), [(("berlin", "tokyo"), False), (SITES, True)])
def test_the_report_draws_the_topology_of_more_than_two_sites(make_arms, tmp_path, sites, is_told) -> None:
    arms, path = make_arms(sites=sites), tmp_path / "report.html"
    write_report(
        path,
        title="ring",
        summary=summarise("ring", arms, 2000),
        arms=arms,
        configuration_text="",
        versions={},
        topology=build_topology("full", sites),
    )
    page = path.read_text()
    assert ("How the sites ended" in page) == ('id="states-' in page) == is_told
    assert ("finished (4)" in page) == is_told
