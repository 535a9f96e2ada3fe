from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcodistill.report.history import Fetched, SiteHistory, TeacherTracker, read_event
from p2pcodistill.report.lives import TrafficTotals
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.node_events import (
    FrameFetched,
    FramePublished,
    GroupStarted,
    NodeStarted,
    Refused,
    TrafficMeasured,
    VersionAnnounced,
)
from p2pcodistill.telemetry.records import to_record
from p2pcodistill.telemetry.simulation_events import FaultInjected
from p2pcodistill.telemetry.training_events import (
    Evaluated,
    StepMeasured,
    TeacherExpired,
    TeacherGated,
    TeacherRefused,
    TeacherSwapped,
    TrainingEnded,
    TrainingStarted,
)


def node_started() -> NodeStarted:
    return NodeStarted("berlin", "run", "tcp://127.0.0.1:1", 1, ["tokyo"], 1)


def training_started(step: int = 0, num_steps: int = 100) -> TrainingStarted:
    return TrainingStarted(step, num_steps, 1000, 1, "cpu", "float32")


def measured(step: int, loss: float = 1.0, *, distillation_loss: float | None = None) -> StepMeasured:
    return StepMeasured(step, loss, distillation_loss, 1e-3, 10.0, 0.01, 1.0)


def traffic(sent: int, received: int) -> TrafficMeasured:
    return TrafficMeasured(sent, received, {}, {})


def history_of(*events: Event) -> SiteHistory:
    return SiteHistory.of(to_record(event, time_unix_s=100.0 + i) for i, event in enumerate(events))


def test_no_events_make_an_empty_history(tmp_path):
    history = SiteHistory.read(tmp_path / "events.jsonl")
    assert history == SiteHistory()
    assert history.final_val_loss is None
    assert history.mean_staleness_steps is None
    assert history.exchange_stall_ratio is None
    assert history.steps_per_s is None


def test_curves_and_totals_of_an_uneventful_life(make_events, make_records):
    history = SiteHistory.of(
        make_records(make_events("codistilled", "berlin", peers=("tokyo",), num_steps=500))
    )
    assert [step for step, _ in history.evaluations] == list(range(50, 501, 50))
    assert [step for step, _ in history.losses] == list(range(10, 501, 10))
    assert history.first_distilled_step == 210
    assert (history.num_steps, history.finished) == (500, True)
    assert (history.num_parameters, history.device, history.precision) == (940_000, "cpu", "float32")
    assert history.num_frames_published == 10
    assert history.num_bytes_sent == 10 * 1_612_000
    assert history.traffic[-1][1:] == (history.num_bytes_sent, history.num_bytes_received, 500)
    assert history.final_val_loss == history.evaluations[-1][1]
    assert history.exchange_stall_ratio == pytest.approx(0.0009 * 50 / history.duration_s)
    assert history.steps_per_s == pytest.approx(500 / history.duration_s)


def test_staleness_and_lag_are_sampled_from_the_first_swap_on():
    history = history_of(
        VersionAnnounced("tokyo", 1, 50, 10),
        measured(60),
        TeacherSwapped(65, "tokyo", 1, 50),
        measured(70),
        VersionAnnounced("tokyo", 1, 100, 10),
        VersionAnnounced("oslo", 1, 500, 10),
        measured(80),
        TeacherSwapped(85, "tokyo", 1, 100),
        measured(90),
    )
    assert history.staleness == [(70, {"tokyo": 0}), (80, {"tokyo": 50}), (90, {"tokyo": 0})]
    assert history.lag == [(70, {"tokyo": 20}), (80, {"tokyo": 30}), (90, {"tokyo": -10})]
    assert history.mean_staleness_steps == pytest.approx(50 / 3)
    assert history.mean_lag_steps == pytest.approx(40 / 3)
    assert history.num_teacher_swaps == 2


def test_the_time_for_which_a_simulation_was_stopped_does_not_count_unless_a_fault_was_the_cause():
    events = [
        (100.0, node_started()),
        (101.0, training_started()),
        (130.0, Evaluated(50, 2.0, 0.1)),
        (36_000.0, node_started()),
        (36_001.0, training_started(50)),
        (36_030.0, traffic(10, 10)),
        (36_031.0, Evaluated(100, 1.5, 0.1)),
    ]
    records = [to_record(event, time_unix_s=time_s) for time_s, event in events]
    history = SiteHistory.of(records)
    assert [detail.time_s for detail in history.evaluation_details.values()] == [30.0, 61.0]
    assert history.traffic[0].time_s == 60.0
    fault = to_record(FaultInjected("berlin", "restart", 50), time_unix_s=35_999.0)
    history = SiteHistory.of([*records, fault])
    assert [detail.time_s for detail in history.evaluation_details.values()] == [30.0, 35_931.0]


def test_an_origin_that_went_back_is_not_stale():
    tracker = TeacherTracker()
    tracker.update(TeacherSwapped(10, "tokyo", 1, 300))
    tracker.update(VersionAnnounced("tokyo", 2, 250, 10))
    assert tracker.staleness_steps() == {"tokyo": 0}
    tracker.update(VersionAnnounced("tokyo", 1, 900, 10))  # older incarnation: overtaken
    assert tracker.staleness_steps() == {"tokyo": 0}
    tracker.update(VersionAnnounced("tokyo", 2, 350, 10))
    assert tracker.staleness_steps() == {"tokyo": 50}
    assert tracker.lag_steps(320) == {"tokyo": 20}


def test_a_resume_drops_what_lay_beyond_it_and_the_later_record_wins():
    history = history_of(
        training_started(),
        measured(10, 5.0),
        measured(20, 4.0),
        Evaluated(20, 4.5, 0.1),
        measured(30, 3.0),
        Evaluated(30, 3.5, 0.1),
        GroupStarted(1, 1, 1),
        training_started(20),
        measured(30, 2.9),
        measured(40, 2.0),
        Evaluated(40, 2.5, 0.1),
    )
    assert history.losses == [(10, 5.0), (20, 4.0), (30, 2.9), (40, 2.0)]
    assert history.evaluations == [(20, 4.5), (40, 2.5)]
    assert history.num_steps == 40
    assert history.num_measured_steps == 50  # ten of them twice
    assert history.duration_s == pytest.approx(5.0)
    assert not history.finished


def test_traffic_adds_up_over_restarts_of_the_node():
    history = history_of(
        node_started(), traffic(10, 1), traffic(30, 2), node_started(), traffic(5, 1), traffic(7, 9)
    )
    assert [(p.num_bytes_sent, p.num_bytes_received) for p in history.traffic] == [
        (10, 1),
        (30, 2),
        (35, 3),
        (37, 11),
    ]
    assert [p.time_s for p in history.traffic] == [1.0, 2.0, 3.0, 4.0]
    assert (history.num_bytes_sent, history.num_bytes_received, history.num_node_starts) == (37, 11, 2)


def test_a_counter_that_falls_means_a_restart_whose_record_was_lost():
    totals = TrafficTotals()
    for event in (node_started(), traffic(30, 2), traffic(5, 3)):
        totals.update(event)
    assert (totals.num_bytes_sent, totals.num_bytes_received) == (35, 5)


def test_the_loops_own_totals_also_cover_what_came_after_the_last_measurement():
    whole = history_of(training_started(), measured(10), TrainingEnded(14, True, 0.5, 1.6))
    assert (whole.exchange_s, whole.duration_s, whole.num_measured_steps, whole.num_steps) == (
        0.5,
        1.6,
        14,
        14,
    )
    resumed = history_of(
        training_started(),
        measured(10),
        training_started(10),
        measured(20),
        TrainingEnded(20, True, 0.01, 1.1),
    )
    assert (resumed.exchange_s, resumed.duration_s, resumed.num_measured_steps) == (0.02, 2.0, 20)


def test_a_loss_that_was_not_finite_is_nan():
    history = history_of(measured(10, math.nan), Evaluated(10, math.inf, 0.1))
    assert math.isnan(history.losses[0][1])
    assert history.final_val_loss is not None and math.isnan(history.final_val_loss)
    assert history.first_step_at_or_below(100.0) is None


def test_frames_are_counted_by_kind_and_origin():
    history = history_of(
        FramePublished(1, 50, "keyframe", 80, 100),
        FramePublished(1, 100, "delta", 5, 100),
        FramePublished(1, 100, "keyframe", 80, 100),
        FrameFetched("tokyo", 1, 60, "keyframe", 70, 0, 0.1),
        FrameFetched("tokyo", 1, 110, "delta", 4, 3, 0.1),
        FrameFetched("oslo", 1, 60, "keyframe", 70, 0, 0.1),
    )
    assert (history.num_frames_published, history.num_keyframes_published) == (3, 2)
    assert history.num_fp16_bytes == 100
    assert history.fetched == {"tokyo": Fetched({(1, 60), (1, 110)}, 77), "oslo": Fetched({(1, 60)}, 70)}


def test_logs_from_before_delta_frames_are_read():
    record = to_record(FramePublished(1, 50, "delta", 80, 100), time_unix_s=1.0)
    del record["kind"]
    assert read_event(record) == FramePublished(1, 50, "keyframe", 80, 100)
    assert SiteHistory.of([record]).num_keyframes_published == 1


def test_refusals_of_node_and_ranks_are_counted():
    history = history_of(
        Refused(None, "malformed", "x"),
        TeacherRefused(5, "tokyo", 1, 4, "non-finite", "x"),
        FramePublished(1, 5, "keyframe", 1, 1),
    )
    assert (history.num_refusals, history.num_frames_published) == (2, 1)


def test_decisions_about_teachers_are_counted_by_teacher():
    gated = [TeacherGated(step, "tokyo", 1, 4, 5.0, 1.0, "worse") for step in (5, 50)]
    history = history_of(
        *gated, TeacherGated(9, "oslo", 1, 4, None, None, "x"), TeacherExpired(9, "oslo", 1, 4, 9, 1.0, "x")
    )
    assert history.num_gatings == {"tokyo": 2, "oslo": 1}
    assert history.num_expiries == {"oslo": 1}
    assert history.num_refusals == 0


def test_first_step_at_or_below_takes_equality():
    history = history_of(Evaluated(50, 3.0, 0.1), Evaluated(100, 2.0, 0.1), Evaluated(150, 1.0, 0.1))
    assert history.first_step_at_or_below(2.0) == 100
    assert history.first_step_at_or_below(0.5) is None


def test_reading_passes_over_torn_lines_and_unknown_events(tmp_path):
    path = tmp_path / "events.jsonl"
    good = json.dumps(to_record(Evaluated(50, 3.0, 0.1)))
    lacking = json.dumps({"event": "evaluated", "step": 60})
    path.write_text(
        f'{good}\n{{"event": "eval\n{{"event":"from-the-future","x":1}}\n{lacking}\n[1]\n{good[:20]}'
    )
    assert SiteHistory.read(path).evaluations == [(50, 3.0)]


STEPS = st.integers(0, 200)
NUM_BYTES = st.integers(0, 1000)
NAMES = st.sampled_from(["tokyo", "oslo"])
LOSSES = st.floats(allow_nan=True)
EVENTS = st.one_of(
    st.just(node_started()),
    st.builds(training_started, STEPS),
    st.builds(measured, STEPS, LOSSES),
    st.builds(Evaluated, STEPS, LOSSES, st.just(0.1)),
    st.builds(traffic, NUM_BYTES, NUM_BYTES),
    st.builds(VersionAnnounced, NAMES, st.integers(1, 3), STEPS, NUM_BYTES),
    st.builds(TeacherSwapped, STEPS, NAMES, st.integers(1, 3), STEPS),
    st.builds(TrainingEnded, STEPS, st.booleans(), st.just(0.1), st.just(1.0)),
)


@settings(max_examples=150, deadline=None)
@given(st.lists(EVENTS, max_size=40))
def test_any_order_of_events_makes_a_consistent_history(events):
    history = history_of(*events)
    for curve in (history.evaluations, history.losses, history.staleness, history.lag):
        steps = [step for step, _ in curve]
        assert steps == sorted(set(steps))
    assert all(value >= 0 for _, by_teacher in history.staleness for value in by_teacher.values())
    for before, after in zip(history.traffic, history.traffic[1:], strict=False):
        assert after.num_bytes_sent >= before.num_bytes_sent
        assert after.num_bytes_received >= before.num_bytes_received
    assert history.exchange_stall_ratio is None or 0 <= history.exchange_stall_ratio <= 1
