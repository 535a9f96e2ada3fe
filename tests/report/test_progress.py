from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.report.progress import MAX_SENTENCE_CHARACTERS, Progress, describe, duration, printable
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.node_events import (
    FramePublished,
    GroupExited,
    GroupStarted,
    NodeStarted,
    NodeStopped,
    PeerConnected,
    PeerDisconnected,
    Refused,
    TrafficMeasured,
    VersionAnnounced,
)
from p2pcodistill.telemetry.records import to_record
from p2pcodistill.telemetry.training_events import (
    Evaluated,
    StepMeasured,
    TeacherExpired,
    TeacherGated,
    TeacherReadmitted,
    TeacherRefused,
    TeacherSwapped,
    TrainingEnded,
    TrainingStarted,
)

NODE_STARTED = NodeStarted("berlin", "run", "tcp://127.0.0.1:1", 1, ["tokyo"], 1)
TRAINING_STARTED = TrainingStarted(0, 100, 1000, 1, "cpu", "float32")


def measured(step: int, steps_per_s: float = 10.0) -> StepMeasured:
    return StepMeasured(step, 1.25, None, 1e-3, steps_per_s, 0.0, 1.0)


def progress_of(*events: Event) -> Progress:
    progress = Progress()
    for event in events:
        progress.update(to_record(event))
    return progress


@pytest.mark.parametrize(
    ("events", "state"),
    [
        ([], "waiting"),
        ([NODE_STARTED], "starting"),
        ([NODE_STARTED, TRAINING_STARTED], "training"),
        ([TRAINING_STARTED, GroupExited(1, 2.0)], "restarting"),
        ([TRAINING_STARTED, GroupExited(1, 2.0), GroupStarted(1, 1, 1)], "starting"),
        ([TRAINING_STARTED, GroupExited(1, None)], "failed"),
        ([TRAINING_STARTED, TrainingEnded(40, False, 0.0, 1.0)], "stopping"),
        (
            [NODE_STARTED, TRAINING_STARTED, TrainingEnded(100, True, 0.0, 1.0), GroupExited(0, None)],
            "serving",
        ),
        ([TRAINING_STARTED, TrainingEnded(100, True, 0.0, 1.0)], "finished"),
        ([NodeStopped("berlin", "finished")], "finished"),
        ([NodeStopped("berlin", "stopped")], "stopped"),
        ([NodeStopped("berlin", "failed")], "failed"),
    ],
)
def test_state(events, state):
    assert progress_of(*events).state == state


def test_what_training_tells():
    progress = progress_of(NODE_STARTED, TRAINING_STARTED, measured(40), Evaluated(40, 1.5, 0.1))
    assert (progress.step, progress.num_steps, progress.loss, progress.val_loss) == (40, 100, 1.25, 1.5)
    assert progress.time_left_s == pytest.approx(6.0)


def test_the_time_left_follows_the_recent_speed():
    progress = progress_of(TRAINING_STARTED, measured(10, 10.0), *[measured(20, 5.0)] * 40)
    assert progress.steps_per_s == 5.0
    assert progress.time_left_s == pytest.approx(80 / 5.0, rel=0.01)
    progress.update(to_record(TrainingEnded(100, True, 0.0, 1.0)))
    assert progress.time_left_s is None


def test_values_that_are_not_finite_are_absent():
    progress = progress_of(TRAINING_STARTED, measured(10, math.inf), Evaluated(10, math.nan, 0.1))
    assert progress.val_loss is None
    assert progress.time_left_s is None


def test_peers_staleness_and_traffic():
    progress = progress_of(
        NODE_STARTED,
        PeerConnected("tokyo"),
        VersionAnnounced("tokyo", 1, 50, 10),
        TeacherSwapped(55, "tokyo", 1, 50),
        VersionAnnounced("tokyo", 1, 100, 10),
        TrafficMeasured(100, 200, {}, {}),
    )
    assert progress.connected_peers == {"tokyo"}
    assert progress.staleness_steps == {"tokyo": 50}
    assert (progress.num_bytes_sent, progress.num_bytes_received) == (100, 200)
    progress.update(to_record(PeerDisconnected("tokyo", "gone")))
    assert not progress.connected_peers
    progress.update(to_record(NODE_STARTED))
    progress.update(to_record(TrafficMeasured(5, 5, {}, {})))
    assert (progress.num_bytes_sent, progress.num_bytes_received) == (105, 205)


def test_the_ratio_of_frames_counts_each_checkpoint_once():
    assert Progress().frame_ratio is None
    keyframe, delta = FramePublished(1, 50, "keyframe", 80, 100), FramePublished(1, 100, "delta", 20, 100)
    again = FramePublished(1, 100, "keyframe", 80, 100)
    assert progress_of(keyframe).frame_ratio == pytest.approx(1.25)
    assert progress_of(keyframe, delta, again).frame_ratio == pytest.approx(2.0)
    restarted = FramePublished(2, 100, "keyframe", 100, 100)
    assert progress_of(keyframe, delta, again, restarted).frame_ratio == pytest.approx(1.5)
    old = Progress()
    record = to_record(keyframe)
    del record["kind"]  # as before delta frames
    old.update(record)
    assert old.frame_ratio == pytest.approx(1.25)


def test_refusals_are_counted_and_the_last_is_kept():
    progress = progress_of(
        Refused("tokyo", "malformed", "the manifest does not parse"),
        TeacherRefused(60, "tokyo", 1, 50, "non-finite", "weight holds NaN"),
    )
    assert progress.num_refusals == 2
    assert progress.last_refusal == "non-finite: teacher tokyo of step 50: weight holds NaN"
    assert progress_of(Refused("tokyo", "malformed", "x")).last_refusal == "malformed: from tokyo: x"
    assert progress_of(Refused(None, "unknown-peer", "x")).last_refusal == "unknown-peer: x"


GATED = TeacherGated(60, "tokyo", 1, 50, 5.5, 1.5, "its loss on local batches is 5.500, the student's 1.500")


def test_teachers_that_are_kept_from_teaching_are_named_until_they_teach_again():
    swapped, expired = (
        TeacherSwapped(55, "tokyo", 1, 50),
        TeacherExpired(60, "tokyo", 1, 50, 90, 1.0, "stale\x1b"),
    )
    assert progress_of(swapped).resting_teachers == {}
    assert progress_of(swapped, GATED).resting_teachers == {"tokyo": GATED.why}
    newer = TeacherSwapped(70, "tokyo", 1, 100)
    assert progress_of(swapped, GATED, newer).resting_teachers == {"tokyo": GATED.why}, (
        "gated until it recovers"
    )
    assert progress_of(GATED, TeacherReadmitted(75, "tokyo", 1, 100, 1.5, 1.4)).resting_teachers == {}
    assert progress_of(swapped, expired).resting_teachers == {"tokyo": "stale\N{REPLACEMENT CHARACTER}"}
    assert progress_of(swapped, expired, newer).resting_teachers == {}
    assert progress_of(GATED, expired, TRAINING_STARTED).resting_teachers == {}, "nothing remembers it"
    resumed = replace(TRAINING_STARTED, start_step=60)
    assert progress_of(GATED, resumed).resting_teachers == {"tokyo": GATED.why}
    line = describe(progress_of(NODE_STARTED, swapped, GATED))
    assert "tokyo 0 steps stale and not teaching" in line


def test_unknown_records_change_nothing():
    progress = Progress()
    assert progress.update({"event": "from-the-future"}) is None
    assert describe(progress) == "waiting"


def test_describe_says_what_is_known_and_nothing_else():
    assert describe(Progress()) == "waiting"
    progress = progress_of(
        NODE_STARTED,
        TRAINING_STARTED,
        PeerConnected("tokyo"),
        TeacherSwapped(55, "tokyo", 1, 50),
        TrafficMeasured(1_600_000, 800_000, {}, {}),
        FramePublished(1, 50, "delta", 100, 1800),
        measured(60),
        Evaluated(60, 1.5, 0.1),
    )
    assert describe(progress) == (
        "training, step 60/100, loss 1.250, held-out 1.500, tokyo 0 steps stale, 1/1 peers, "
        "sent 1.6 MB, received 800.0 kB, 18.0 times smaller than fp16, 10.0 steps/s, 0:04 left"
    )


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (605, "10:05"), (3_725, "1:02:05")]
)
def test_duration(seconds, text):
    assert duration(seconds) == text


@given(st.text(max_size=400))
def test_printable_lets_no_control_character_through(text):
    shown = printable(text)
    assert shown.isprintable()
    assert len(shown) <= MAX_SENTENCE_CHARACTERS
    if text.isprintable() and len(text) <= MAX_SENTENCE_CHARACTERS:
        assert shown == text
