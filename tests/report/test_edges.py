"""Who had which version when, computed by hand for two sites, and drawn for two and for many."""

from __future__ import annotations

from typing import Any

import pytest

from p2pcodistill.report.edges import EdgeResults, bytes_sent_by_peer
from p2pcodistill.report.figures import to_svg
from p2pcodistill.report.staleness import StalenessTracker
from p2pcodistill.report.staleness_figures import MAX_LINES, staleness_picture
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.node_events import FramePublished, NodeStarted, NodeStopped, TrafficMeasured
from p2pcodistill.telemetry.records import Record, to_record
from p2pcodistill.telemetry.simulation_events import FaultInjected
from p2pcodistill.telemetry.training_events import TeacherSwapped, TrainingEnded


def record(time_s: float, event: Event) -> Record:
    return to_record(event, time_unix_s=1000.0 + time_s)


def published(time_s: float, step: int, incarnation: int = 1, kind: str = "delta") -> Record:
    return record(time_s, FramePublished(incarnation, step, kind, 100, 200))


def swapped(time_s: float, teacher: str, step: int, incarnation: int = 1) -> Record:
    return record(time_s, TeacherSwapped(0, teacher, incarnation, step))


def ended(time_s: float) -> Record:
    return record(time_s, TrainingEnded(100, True, 0.0, time_s))


def traffic(time_s: float, **sent: int) -> Record:
    return record(time_s, TrafficMeasured(sum(sent.values()), 0, sent, {}))


BERLIN = [
    published(0, 10, kind="keyframe"),
    published(10, 20),
    published(20, 30),
    published(20, 30, kind="keyframe"),  # somebody needed it: nothing new
    record(40, NodeStarted("berlin", "run", "", 2, [], 1)),
]
TOKYO = [swapped(4, "berlin", 10), swapped(15, "berlin", 20), swapped(26, "berlin", 30)]


def test_staleness_is_what_the_times_of_publications_and_swaps_make_it() -> None:
    tracker = StalenessTracker.of({"tokyo": [*TOKYO, ended(36)], "berlin": [*BERLIN, published(50, 90)]})
    edge = tracker.edges["berlin", "tokyo"]
    curve = [(time_s - 1000, steps) for time_s, steps in edge.curve]
    assert curve == [(4, 0), (10, 10), (15, 0), (20, 10), (26, 0), (36, 0)]
    # From 4 s to the end of tokyo's training at 36 s: 11 s ten steps behind.
    assert tracker.seconds_at == pytest.approx({0: 21.0, 10: 11.0})
    assert edge.mean_steps == pytest.approx(110 / 32) == tracker.mean_steps
    assert edge.num_versions == 3
    assert tracker.share_at_or_below(9) == pytest.approx(21 / 32)
    assert [version for _, version in tracker.published["berlin"]] == [(1, 10), (1, 20), (1, 30), (1, 90)]


def test_an_origin_that_went_back_makes_nobody_stale() -> None:
    tokyo = [swapped(5, "berlin", 100), ended(20)]
    records = {"berlin": [published(0, 100), published(10, 60, 2)], "tokyo": tokyo}
    assert StalenessTracker.of(records).seconds_at == {0: 15.0}


def test_a_student_that_is_launched_again_is_counted_again() -> None:
    tokyo = [swapped(5, "berlin", 10), ended(8), swapped(12, "berlin", 10), ended(20)]
    tracker = StalenessTracker.of({"berlin": [published(0, 10), published(10, 20)], "tokyo": tokyo})
    assert tracker.seconds_at == {0: 3.0, 10: 8.0}


@pytest.mark.parametrize(
    "end",
    [FaultInjected("tokyo", "kill", 5), NodeStopped("tokyo", "stopped")],
    ids=["killed", "stopped"],
)
def test_a_student_whose_node_is_gone_is_behind_nobody(end: Event) -> None:
    berlin = [published(0, 10), published(10, 20), published(100, 110)]
    # The simulator's log is another one: what it tells comes behind what the node told.
    tokyo = [swapped(5, "berlin", 10), swapped(50, "berlin", 20), ended(60), record(8, end)]
    assert StalenessTracker.of({"berlin": berlin, "tokyo": tokyo}).seconds_at == {0: 3.0 + 10.0}
    slowed = [swapped(5, "berlin", 10), record(8, FaultInjected("tokyo", "slow-down", 5, 2.0)), ended(12)]
    assert StalenessTracker.of({"berlin": berlin, "tokyo": slowed}).seconds_at == {0: 5.0, 10: 2.0}


def test_records_of_other_versions_and_without_time_are_passed_over() -> None:
    odd: list[dict[str, Any]] = [
        {"event": "frame-published", "time_unix_s": None},
        {"event": "teacher-swapped", "time_unix_s": 1.0},
        {"event": "who-knows", "time_unix_s": 1.0},
    ]
    tracker = StalenessTracker.of({"berlin": odd})
    assert tracker.edges == {} and tracker.mean_steps is None and tracker.share_at_or_below(1) is None


def test_bytes_add_up_over_the_lives_of_a_node() -> None:
    start = record(0, NodeStarted("berlin", "run", "", 1, [], 1))
    records = [start, traffic(1, tokyo=5), traffic(2, tokyo=10, lima=1), start, traffic(3, tokyo=7)]
    assert bytes_sent_by_peer(records) == {"tokyo": 17, "lima": 1}
    assert bytes_sent_by_peer([traffic(1, tokyo=5), traffic(2, tokyo=3)]) == {"tokyo": 8}
    assert bytes_sent_by_peer([]) == {}


def test_edges_are_listed_with_their_bytes_and_drawn() -> None:
    results = EdgeResults.of({"tokyo": TOKYO, "berlin": [*BERLIN, traffic(30, tokyo=1234)]})
    (edge,) = results.rows
    assert (edge.teacher, edge.student, edge.num_bytes, edge.num_versions) == ("berlin", "tokyo", 1234, 3)
    assert edge.max_staleness_steps == 10
    figure = staleness_picture(results, {"berlin": "#123456"}, with_timeline=True)
    assert figure is not None
    picture = to_svg(figure, "versions")
    assert "berlin → tokyo" in picture and "#123456" in picture
    assert staleness_picture(EdgeResults.of({"berlin": BERLIN}), {}, with_timeline=True) is None


def test_many_edges_are_drawn_as_their_mean() -> None:
    students = {f"s{index}": TOKYO for index in range(MAX_LINES + 1)}
    results = EdgeResults.of({"berlin": BERLIN} | students)
    figure = staleness_picture(results, {}, with_timeline=True)
    assert figure is not None
    (top, mean) = figure.axes[0].get_lines()
    heights = dict(zip(mean.get_xdata(), mean.get_ydata(), strict=True))
    assert max(heights.values()) == max(top.get_ydata()) == 10
    assert heights[min(heights)] == 0
