"""Events: records round trip, logs survive a killed writer, tails read only whole lines."""

import json

import pytest

from p2pcodistill.telemetry.log import EventLog, EventTail
from p2pcodistill.telemetry.node_events import PeerConnected
from p2pcodistill.telemetry.records import EVENT_TYPES, from_record, to_record
from p2pcodistill.telemetry.training_events import Evaluated, TeacherSwapped


def test_records_round_trip():
    event = TeacherSwapped(step=250, teacher="tokyo", incarnation=1, teacher_step=200)
    record = to_record(event, time_unix_s=12.5)
    assert record == {
        "event": "teacher-swapped",
        "time_unix_s": 12.5,
        "step": 250,
        "teacher": "tokyo",
        "incarnation": 1,
        "teacher_step": 200,
    }
    assert from_record(json.loads(json.dumps(record))) == event


def test_event_names_are_unique():
    assert len({cls.name for cls in EVENT_TYPES.values()}) == len(EVENT_TYPES) > 15


def test_a_diverged_loss_is_null_and_still_strict_json():
    record = to_record(Evaluated(step=1, val_loss=float("nan"), duration_s=0.0))
    assert json.loads(json.dumps(record, allow_nan=False))["val_loss"] is None


@pytest.mark.parametrize("record", [{}, {"event": "no-such-event"}, {"event": "evaluated", "step": 1}])
def test_records_that_are_no_events(record):
    with pytest.raises(ValueError, match="event"):
        from_record(record)


def test_a_tail_reads_whole_lines_once_and_a_new_writer_heals_a_torn_one(tmp_path):
    path = tmp_path / "events.jsonl"
    tail = EventTail(path)
    assert list(tail.read()) == []
    seen = []
    log = EventLog(path, seen.append)
    log.write(PeerConnected(peer="tokyo"))
    assert [record["peer"] for record in tail.read()] == ["tokyo"]
    assert [record["peer"] for record in seen] == ["tokyo"]
    log.close()
    with path.open("a") as file:
        file.write('{"event":"peer-conn')
    assert list(tail.read()) == []
    log = EventLog(path)
    log.write(PeerConnected(peer="lima"))
    log.close()
    assert [record["peer"] for record in tail.read()] == ["lima"]
    assert [record["peer"] for record in EventTail(path).read()] == ["tokyo", "lima"]
