"""Serving: what can be wanted, and how long a frame is kept for those who are reading it."""

from __future__ import annotations

from typing import Any

import pytest

from p2pcodistill.errors import MalformedError
from p2pcodistill.gossip.messages import Want
from p2pcodistill.gossip.serving import READER_GRACE_S, Serving


def test_the_newest_frame_of_each_origin_can_be_wanted(sites: Any) -> None:
    first, second, other = sites.frame("berlin", 1), sites.frame("berlin", 2), sites.frame("tokyo", 1)
    serving = Serving([first.signed])

    serving.hold(other.signed, now_s=0.0)
    serving.hold(second.signed, now_s=0.0)

    assert [serving.want("lima", Want(frame.frame_id, (0, 2))) for frame in (first, second, other)] == [
        False,
        True,
        True,
    ]
    assert not serving.want("lima", Want("00" * 32, (0,)))


def test_chunks_that_a_frame_does_not_have_are_malformed(sites: Any) -> None:
    frame = sites.frame("berlin", 1, num_chunks=3)
    serving = Serving([frame.signed])

    with pytest.raises(MalformedError, match="lima wants chunk 3 of a frame with 3"):
        serving.want("lima", Want(frame.frame_id, (2, 3)))
    assert serving.in_use(0.0) == ()


def test_a_reader_keeps_its_frame_until_it_wants_another(sites: Any) -> None:
    first, second, third = (sites.frame("berlin", step) for step in (1, 2, 3))
    serving = Serving([first.signed])
    serving.want("lima", Want(first.frame_id, (0,)))

    serving.hold(second.signed, now_s=1000.0)
    assert serving.in_use(1000.0) == (first.frame_id,)
    assert serving.want("lima", Want(first.frame_id, (1,)))

    serving.want("lima", Want(second.frame_id, (0,)))
    assert serving.in_use(1000.0) == (second.frame_id,)
    serving.hold(third.signed, now_s=1001.0)
    assert not serving.want("lima", Want(first.frame_id, (1,)))


def test_a_reader_that_left_keeps_its_frame_for_a_while(sites: Any) -> None:
    first, second, third = (sites.frame("berlin", step) for step in (1, 2, 3))
    serving = Serving([first.signed])
    serving.want("lima", Want(first.frame_id, (0,)))
    serving.hold(second.signed, now_s=5.0)

    serving.close("lima", now_s=10.0)
    serving.close("lima", now_s=50.0)  # closing twice does not prolong it
    assert serving.in_use(10.0 + READER_GRACE_S - 1) == (first.frame_id,)
    assert serving.in_use(10.0 + READER_GRACE_S) == ()

    serving.hold(third.signed, now_s=10.0 + READER_GRACE_S)
    assert not serving.want("lima", Want(first.frame_id, (1,)))


def test_a_reader_that_comes_back_keeps_its_frame(sites: Any) -> None:
    frame = sites.frame("berlin", 1)
    serving = Serving([frame.signed])
    serving.want("lima", Want(frame.frame_id, (0,)))
    serving.close("lima", now_s=0.0)

    serving.want("lima", Want(frame.frame_id, (1,)))

    assert serving.in_use(10 * READER_GRACE_S) == (frame.frame_id,)
