"""Serving: what can be wanted, and how long a frame is kept for those who are reading it."""

from __future__ import annotations

from typing import Any

import pytest

from p2pcodistill.checkpoint.manifest import MIN_CHUNK_BYTES
from p2pcodistill.errors import MalformedError
from p2pcodistill.gossip.messages import Want
from p2pcodistill.gossip.serving import READER_GRACE_S, Serving

WINDOW_BYTES = 4 * MIN_CHUNK_BYTES


def holding(*frames: Any, window_bytes: int = WINDOW_BYTES) -> Serving:
    """What serves these frames of berlin."""
    serving = Serving(window_bytes=window_bytes)
    hold(serving, *frames, now_s=0.0)
    return serving


def hold(serving: Serving, *frames: Any, now_s: float) -> None:
    (origin,) = {frame.signed.manifest.origin for frame in frames}
    serving.hold(origin, [frame.signed for frame in frames], now_s)


def test_what_is_held_of_each_origin_can_be_wanted(sites: Any) -> None:
    first, second, third = (sites.frame("berlin", step) for step in (1, 2, 3))
    other = sites.frame("tokyo", 1)
    serving = holding(first, second)

    hold(serving, other, now_s=0.0)
    hold(serving, second, third, now_s=0.0)

    frames = (first, second, third, other)
    wanted = [
        serving.want(f"reader {i}", Want(frame.frame_id, (0, 2)), 0.0) for i, frame in enumerate(frames)
    ]
    assert wanted == [False, True, True, True]
    assert not serving.want("lima", Want("00" * 32, (0,)), 0.0)


def test_chunks_that_a_frame_does_not_have_are_malformed(sites: Any) -> None:
    frame = sites.frame("berlin", 1, num_chunks=3)
    serving = holding(frame)

    with pytest.raises(MalformedError, match="lima wants chunk 3 of a frame with 3"):
        serving.want("lima", Want(frame.frame_id, (2, 3)), 0.0)
    assert serving.in_use(0.0) == ()


def test_more_than_a_window_at_once_is_malformed(sites: Any) -> None:
    frame = sites.frame("berlin", 1, num_chunks=6)
    serving = holding(frame)

    with pytest.raises(MalformedError, match="lima wants more than 65536 bytes at once"):
        serving.want("lima", Want(frame.frame_id, (0, 1, 2, 3, 4)), 0.0)
    assert serving.in_use(0.0) == ()
    assert serving.want("lima", Want(frame.frame_id, (0, 2, 3, 4)), 0.0)


@pytest.mark.parametrize(("num_spare_bytes", "is_served"), [(1000, True), (999, False)])
def test_a_short_last_chunk_counts_as_what_it_is(sites: Any, num_spare_bytes: int, is_served: bool) -> None:
    frame = sites.frame("berlin", 1, num_chunks=3)
    serving = holding(frame, window_bytes=2 * MIN_CHUNK_BYTES + num_spare_bytes)

    want = Want(frame.frame_id, (0, 1, 2))
    if is_served:
        assert serving.want("lima", want, 0.0)
    else:
        with pytest.raises(MalformedError, match="at once"):
            serving.want("lima", want, 0.0)


def test_a_single_chunk_is_served_under_any_window(sites: Any) -> None:
    frame = sites.frame("berlin", 1)
    serving = holding(frame, window_bytes=1)

    assert serving.want("lima", Want(frame.frame_id, (1,)), 0.0)
    with pytest.raises(MalformedError, match=f"more than {MIN_CHUNK_BYTES} bytes"):
        serving.want("lima", Want(frame.frame_id, (0, 1)), 0.0)


def test_a_reader_keeps_its_frame_until_it_wants_another(sites: Any) -> None:
    first, second, third = (sites.frame("berlin", step) for step in (1, 2, 3))
    serving = holding(first)
    serving.want("lima", Want(first.frame_id, (0,)), 0.0)

    hold(serving, second, now_s=1000.0)
    assert serving.in_use(1000.0) == (first.frame_id,)
    assert serving.want("lima", Want(first.frame_id, (1,)), 0.0)

    serving.want("lima", Want(second.frame_id, (0,)), 0.0)
    assert serving.in_use(1000.0) == (second.frame_id,)
    hold(serving, third, now_s=1001.0)
    assert not serving.want("lima", Want(first.frame_id, (1,)), 0.0)


def test_a_reader_that_left_keeps_its_frame_for_a_while(sites: Any) -> None:
    first, second, third = (sites.frame("berlin", step) for step in (1, 2, 3))
    serving = holding(first)
    serving.want("lima", Want(first.frame_id, (0,)), 0.0)
    hold(serving, second, now_s=5.0)

    serving.close("lima", now_s=10.0)
    serving.close("lima", now_s=50.0)  # closing twice does not prolong it
    assert serving.in_use(10.0 + READER_GRACE_S - 1) == (first.frame_id,)
    assert serving.in_use(10.0 + READER_GRACE_S) == ()

    hold(serving, third, now_s=10.0 + READER_GRACE_S)
    assert not serving.want("lima", Want(first.frame_id, (1,)), 0.0)


def test_a_reader_that_comes_back_keeps_its_frame(sites: Any) -> None:
    frame = sites.frame("berlin", 1)
    serving = holding(frame)
    serving.want("lima", Want(frame.frame_id, (0,)), 0.0)
    serving.close("lima", now_s=0.0)

    serving.want("lima", Want(frame.frame_id, (1,)), 0.0)

    assert serving.in_use(10 * READER_GRACE_S) == (frame.frame_id,)
