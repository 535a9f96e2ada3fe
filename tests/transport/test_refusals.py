"""No refusal goes uncounted, and no flood becomes a flood of events."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.transport.base import Rejected
from p2pcodistill.transport.refusals import RefusalLog


def test_the_first_is_told_at_once_and_a_flood_as_one() -> None:
    told: list[Rejected] = []
    log = RefusalLog(told.append, interval_s=1.0)
    for index in range(1000):
        log.note("a", "malformed", f"number {index}", index / 10_000)
    log.note(None, "unknown-peer", "a stranger", 0.2)
    assert told == [Rejected("a", "malformed", "number 0"), Rejected(None, "unknown-peer", "a stranger")]
    log.flush(0.5)
    assert len(told) == 2, "the interval is not over"
    log.flush(1.0)
    assert told[2:] == [Rejected("a", "malformed", "number 999", 999)]
    log.flush(5.0)
    assert len(told) == 3
    log.note("a", "malformed", "again", 5.0)
    assert told[3:] == [Rejected("a", "malformed", "again")]


@given(st.lists(st.tuples(st.sampled_from("ab"), st.floats(0, 2), st.booleans())))
def test_every_refusal_is_counted_once(notes: list[tuple[str, float, bool]]) -> None:
    told: list[Rejected] = []
    log = RefusalLog(told.append, interval_s=1.0)
    now_s = 0.0
    for peer, later_s, flush in notes:
        now_s += later_s
        log.note(peer, "malformed", "", now_s)
        if flush:
            log.flush(now_s)
    log.flush(now_s + 1.01)
    for peer in "ab":
        num_told = sum(event.num_times for event in told if event.peer == peer)
        assert num_told == sum(noted == peer for noted, _, _ in notes)
