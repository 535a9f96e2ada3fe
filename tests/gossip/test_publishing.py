"""Publishing: what is announced, how those who ask are answered, and when a keyframe is requested."""

from __future__ import annotations

from typing import Any

import pytest

from p2pcodistill.checkpoint.manifest import Version
from p2pcodistill.errors import MalformedError
from p2pcodistill.gossip.messages import Announce, CatchUp
from p2pcodistill.gossip.publishing import MAX_ANSWERS, MAX_FRAMES_PER_REQUEST, Publishing


def announce(frame: Any, num_more: int | None = None) -> Announce:
    return Announce(frame.signed.body, frame.signed.signature, num_more)


def publishing(*frames: Any) -> Publishing:
    return Publishing([frame.signed for frame in frames])


def answer(
    published: Publishing, held: int | None, *, student: str = "lima", at_any_price: bool = False
) -> list[Announce]:
    request = CatchUp(None if held is None else Version(1, held))
    return published.answer(student, request, known_incarnation=1, at_any_price=at_any_price)


def test_only_the_newest_own_frame_is_announced(sites: Any) -> None:
    published = publishing()
    assert published.announce_to("lima", known_incarnation=0) is None

    newer, older = sites.frame("berlin", 50), sites.frame("berlin", 40)
    assert published.publish(newer.signed)
    assert not published.publish(older.signed)

    assert published.announce_to("lima", known_incarnation=1) == announce(newer)


def test_a_keyframe_of_the_newest_version_is_taken_and_the_delta_frame_still_announced(sites: Any) -> None:
    _, first, second = sites.chain("berlin", 2)
    keyframe, late = sites.frame("berlin", 2, num_chunks=9), sites.frame("berlin", 1)
    published = publishing(first, second)

    assert not published.publish(keyframe.signed)
    assert not published.publish(keyframe.signed)
    assert not published.publish(late.signed)

    assert published.kept == (first.signed, second.signed, keyframe.signed)
    assert published.announce_to("lima", known_incarnation=1) == announce(second)


def test_what_is_kept_is_what_a_keyframe_would_not_beat(sites: Any) -> None:
    chain = sites.chain("berlin", 12)
    published = publishing(chain[0])
    for frame in chain[1:]:
        published.publish(frame.signed)

    # Eight delta frames of 17 384 bytes cost more than the keyframe of 132 072, seven do not.
    assert published.kept == tuple(frame.signed for frame in chain[-7:])


def test_a_path_is_announced_with_what_follows_counted(sites: Any) -> None:
    chain = sites.chain("berlin", 4)
    published = publishing(*chain)

    assert answer(published, 2) == [announce(chain[3], 1), announce(chain[4], 0)]
    assert answer(published, 4) == answer(published, 9) == []
    assert published.waiting == {}
    assert not published.take_request()


def test_where_a_keyframe_would_be_cheaper_it_is_requested_once_and_the_student_waits(sites: Any) -> None:
    chain = sites.chain("berlin", 3)
    published = publishing(*chain)

    assert answer(published, None) == []
    assert published.take_request()
    assert answer(published, None) == answer(published, None, student="tokyo") == []
    assert not published.take_request()
    assert published.waiting == {"lima": CatchUp(None), "tokyo": CatchUp(None)}

    keyframe = sites.frame("berlin", 3, num_chunks=9)
    published.publish(keyframe.signed)
    assert answer(published, None) == answer(published, None, student="tokyo") == [announce(keyframe, 0)]
    assert published.waiting == {}


def test_at_any_price_there_is_what_there_is(sites: Any) -> None:
    chain = sites.chain("berlin", 2)

    parts = answer(publishing(*chain), None, at_any_price=True)

    assert parts == [announce(frame, num_more) for frame, num_more in zip(chain, (2, 1, 0), strict=True)]


def test_a_keyframe_is_requested_again_when_it_does_not_come(sites: Any) -> None:
    chain = sites.chain("berlin", 20)
    published = publishing(*chain[10:13])
    requests = []
    for frame in chain[13 : 13 + 2 * MAX_FRAMES_PER_REQUEST]:
        assert answer(published, None, at_any_price=True) == []
        requests.append(published.take_request())
        published.publish(frame.signed)

    assert requests == [True, False] * MAX_FRAMES_PER_REQUEST


def test_before_anything_is_published_nothing_is_requested(sites: Any) -> None:
    published = publishing()

    assert answer(published, None) == []
    assert published.waiting == {"lima": CatchUp(None)}
    assert not published.take_request()
    published.close("lima")
    assert published.waiting == {}


def test_without_a_keyframe_the_raw_size_is_what_one_would_cost(sites: Any) -> None:
    frames = [sites.frame("berlin", step, base=step - 1, num_fp16_bytes=40_000) for step in (5, 6, 7)]
    published = publishing(*frames)

    assert answer(published, 6) == [announce(frames[-1], 0)]
    assert answer(published, 5) == []


def test_nothing_is_said_under_an_incarnation_that_the_student_has_left_behind(sites: Any) -> None:
    published = publishing(sites.frame("berlin", 50, incarnation=2))
    assert published.announce_to("lima", known_incarnation=2) is not None
    assert published.announce_to("lima", known_incarnation=3) is None
    held = Version(3, 9)
    assert published.answer("tokyo", CatchUp(None), known_incarnation=3, at_any_price=True) == []
    assert published.waiting == {"tokyo": CatchUp(None)}

    published.publish(sites.frame("berlin", 50, incarnation=4).signed)

    assert published.announce_to("lima", known_incarnation=3) is not None
    assert len(published.answer("tokyo", CatchUp(held), known_incarnation=3, at_any_price=True)) == 1


def test_a_past_life_is_what_was_neither_remembered_nor_told(sites: Any) -> None:
    published = publishing(sites.frame("berlin", 50, incarnation=2))
    assert not published.is_from_past_life(2)
    assert published.is_from_past_life(3)

    published.publish(sites.frame("berlin", 50, incarnation=4).signed)
    assert published.is_from_past_life(4)
    published.announce_to("lima", known_incarnation=2)
    assert not published.is_from_past_life(4)
    published.publish(sites.frame("berlin", 50, incarnation=5).signed)
    published.answer("rome", CatchUp(None), known_incarnation=2, at_any_price=False)
    assert not published.is_from_past_life(5)
    assert published.is_from_past_life(6)


def test_who_could_not_apply_a_chain_gets_a_new_keyframe_and_nothing_else(sites: Any) -> None:
    published = publishing(*sites.chain("berlin", 1, num_chunks=1))
    assert len(answer(published, None)) == 2  # cheap enough for anyone else

    request = CatchUp(None, afresh=True)
    assert published.answer("lima", request, known_incarnation=1, at_any_price=False) == []
    assert published.take_request()
    assert published.waiting == {"lima": request}

    keyframe = sites.frame("berlin", 1, num_chunks=9)
    published.publish(keyframe.signed)
    assert published.answer("lima", request, known_incarnation=1, at_any_price=False) == [
        announce(keyframe, 0)
    ]


def test_a_student_that_asks_again_and_again_is_refused_until_there_is_news(sites: Any) -> None:
    chain = sites.chain("berlin", 3)
    published = publishing(*chain[:3])
    for _ in range(MAX_ANSWERS):
        assert answer(published, 1)
    with pytest.raises(MalformedError, match="again and again"):
        answer(published, 1)
    assert answer(published, 1, student="tokyo")
    published.publish(chain[3].signed)
    assert answer(published, 1)


def test_no_path_leads_over_a_frame_that_was_lost(sites: Any) -> None:
    chain = sites.chain("berlin", 3)
    published = publishing(*chain)
    published.lose(chain[2].frame_id)
    assert answer(published, 1) == []
    assert published.take_request()
    assert answer(published, 2, student="tokyo") == [announce(chain[3], 0)]
