"""Plans: what is appended, replaced and dropped, and when the origin is asked for a path."""

from __future__ import annotations

from typing import Any

import pytest

from p2pcodistill.checkpoint.chain import MAX_CHAIN_FRAMES
from p2pcodistill.checkpoint.manifest import MIN_CHUNK_BYTES, Version
from p2pcodistill.gossip.download import Download
from p2pcodistill.gossip.messages import CatchUp
from p2pcodistill.gossip.plan import MAX_REQUESTS_WITHOUT_NEWS, Plan

FROM_NOTHING = CatchUp(None)


def at(step: int) -> Version:
    return Version(1, step)


class Planned:
    """A plan for tokyo's frames, which are known by their steps."""

    def __init__(self, sites: Any, held: int | None) -> None:
        self.plan = Plan(None if held is None else at(held))
        self._sites = sites

    def frame(self, step: int, base: int | None, **changes: Any) -> Any:
        sizes = {"num_chunks": 2, "num_fp16_bytes": 10 * MIN_CHUNK_BYTES} | changes
        return self._sites.frame("tokyo", step, base=base, **sizes).signed

    def delta(self, step: int, **changes: Any) -> Any:
        return self.frame(step, step - 1, **changes)

    def announce(self, *frames: Any) -> Planned:
        for signed in frames:
            self.plan.announce("tokyo", signed)
        return self

    def fetch(self) -> Planned:
        """The head is being fetched."""
        assert self.plan.head is not None
        self.plan.download = Download(self.plan.head, 0.0)
        return self

    def store(self, *, held: int | None) -> bool:
        """The head has been fetched."""
        offer = self.plan.offers[0]
        self.plan.download = None
        return self.plan.store(offer.frame_id, offer.version, None if held is None else at(held))

    @property
    def steps(self) -> list[int]:
        return [offer.version.step for offer in self.plan.offers]


@pytest.fixture
def at_5(sites: Any) -> Planned:
    """What holds step 5."""
    return Planned(sites, 5)


def test_what_leads_on_is_appended_and_what_does_not_is_asked_for(at_5: Planned) -> None:
    at_5.announce(at_5.delta(6), at_5.delta(7))
    assert at_5.steps == [6, 7]
    assert at_5.plan.ask("tokyo") is None

    at_5.announce(at_5.delta(9))
    assert at_5.steps == [6, 7]
    assert at_5.plan.ask("tokyo") == CatchUp(at(5))
    assert at_5.plan.ask("tokyo") is None, "one request at a time"
    at_5.announce(at_5.delta(10))
    assert at_5.plan.ask("tokyo") is None


def test_what_is_old_or_planned_changes_nothing(at_5: Planned) -> None:
    planned = at_5.delta(6)
    at_5.announce(planned, planned, at_5.delta(5), at_5.frame(5, None), at_5.frame(6, None))

    assert at_5.steps == [6]
    assert at_5.plan.ask("tokyo") is None


def test_a_keyframe_replaces_all_but_what_is_being_fetched(at_5: Planned) -> None:
    at_5.announce(at_5.delta(6), at_5.delta(7), at_5.frame(8, None))
    assert at_5.steps == [8]

    at_5.fetch().announce(at_5.delta(9), at_5.frame(10, None), at_5.delta(11))
    assert at_5.steps == [8, 10, 11]
    assert at_5.plan.is_head_skippable
    at_5.plan.skip_head()
    assert at_5.steps == [10, 11]
    assert not at_5.plan.is_head_skippable


def test_a_keyframe_makes_a_request_superfluous(at_5: Planned) -> None:
    at_5.announce(at_5.delta(9), at_5.frame(10, None))

    assert at_5.plan.ask("tokyo") is None


@pytest.mark.parametrize("num_chunks", [1, 2])
def test_delta_frames_that_have_become_too_many_are_left_to_a_path(at_5: Planned, num_chunks: int) -> None:
    at_5.announce(at_5.delta(6)).fetch()
    frames = [at_5.delta(step, num_chunks=num_chunks) for step in range(7, 7 + MAX_CHAIN_FRAMES)]
    at_5.announce(*frames[: 9 if num_chunks == 2 else MAX_CHAIN_FRAMES - 1])
    assert at_5.plan.ask("tokyo") is None

    at_5.announce(*frames)

    assert at_5.steps == [6]
    assert at_5.plan.ask("tokyo") == CatchUp(at(5))


def test_a_keyframe_that_waits_is_kept_when_the_delta_frames_after_it_are_not(at_5: Planned) -> None:
    at_5.announce(at_5.delta(6)).fetch()
    at_5.announce(at_5.frame(7, None, num_chunks=9), *(at_5.delta(step, num_chunks=5) for step in (8, 9, 10)))

    assert at_5.steps == [6, 7]
    assert at_5.plan.ask("tokyo") is not None


# --- paths -----------------------------------------------------------------------------------------------------------


def test_a_path_takes_the_place_of_the_plan_and_keeps_what_is_being_fetched(at_5: Planned) -> None:
    at_5.announce(at_5.delta(6)).fetch()
    at_5.announce(at_5.delta(9))
    head = at_5.plan.head
    assert at_5.plan.ask("tokyo") == CatchUp(at(5))

    at_5.plan.follow("tokyo", [at_5.delta(step) for step in (6, 7, 8, 9)])

    assert at_5.steps == [6, 7, 8, 9]
    assert at_5.plan.head is head
    assert at_5.plan.asked is None


def test_where_a_path_ends_below_what_is_announced_the_rest_is_asked_for(at_5: Planned) -> None:
    at_5.announce(at_5.delta(9))
    assert at_5.plan.ask("oslo", origin="tokyo") == CatchUp(at(5), origin="tokyo")

    at_5.plan.follow("oslo", [at_5.delta(step) for step in (6, 7)])

    assert at_5.steps == [6, 7]
    assert at_5.plan.ask("oslo", origin="tokyo") is None, "first what there is"
    at_5.fetch().store(held=6)
    assert at_5.plan.ask("oslo", origin="tokyo") is None
    at_5.fetch().store(held=7)
    assert at_5.plan.ask("lima", origin="tokyo") == CatchUp(at(7), origin="tokyo")
    at_5.plan.follow("lima", [at_5.delta(7)])
    assert at_5.plan.ask("tokyo") == CatchUp(at(7)), "that was nothing new"
    at_5.plan.follow("tokyo", [at_5.delta(8), at_5.delta(9)])
    at_5.fetch().store(held=8)
    at_5.fetch().store(held=9)
    assert at_5.plan.ask("tokyo") is None


def test_a_path_by_a_keyframe_comes_after_what_is_being_fetched(at_5: Planned) -> None:
    at_5.announce(at_5.delta(6)).fetch().announce(at_5.delta(9))
    at_5.plan.ask("tokyo")

    at_5.plan.follow("tokyo", [at_5.frame(9, None)])

    assert at_5.steps == [6, 9]
    assert at_5.plan.is_head_skippable


def test_a_path_counts_from_what_has_arrived_since_it_was_asked_for(at_5: Planned) -> None:
    at_5.announce(at_5.delta(6), at_5.delta(7), at_5.delta(9)).fetch()
    at_5.plan.ask("tokyo")
    at_5.store(held=6)
    at_5.fetch()

    at_5.plan.follow("tokyo", [at_5.delta(step) for step in (6, 7, 8, 9)])

    assert at_5.steps == [7, 8, 9]


def test_a_path_that_no_longer_fits_is_asked_for_anew(at_5: Planned) -> None:
    at_5.announce(at_5.delta(9))
    at_5.plan.ask("tokyo")
    at_5.plan.break_chain()

    at_5.plan.follow("tokyo", [at_5.delta(step) for step in (6, 7, 8, 9)])

    assert at_5.steps == []
    assert at_5.plan.ask("tokyo") == CatchUp(None, afresh=True)


def test_a_frame_that_cannot_be_had_is_bypassed_by_a_keyframe_or_waited_for(at_5: Planned) -> None:
    at_5.announce(at_5.delta(6), at_5.delta(7))
    at_5.plan.lose_head()
    assert at_5.steps == []
    assert at_5.plan.ask("tokyo") == FROM_NOTHING

    at_5.plan.follow("tokyo", [at_5.frame(4, None), at_5.delta(5), at_5.delta(6), at_5.delta(7)])
    assert at_5.steps == []
    assert at_5.plan.ask("tokyo") is None, "until something new is announced"
    at_5.announce(at_5.delta(7), at_5.delta(8))
    assert at_5.plan.ask("tokyo") == FROM_NOTHING
    at_5.plan.follow("tokyo", [at_5.frame(8, None)])
    assert at_5.steps == [8]


def test_what_depends_on_a_lost_frame_goes_and_a_later_keyframe_stays(at_5: Planned) -> None:
    at_5.announce(at_5.delta(6)).fetch().announce(at_5.frame(8, None), at_5.delta(9))
    at_5.plan.lose_head()
    assert at_5.steps == [8, 9]
    assert at_5.plan.ask("tokyo") is None

    at_5.plan.refuse_head()
    assert at_5.steps == []
    assert at_5.plan.ask("tokyo") is None


def test_a_frame_that_could_not_be_had_is_tried_again_in_a_new_session(at_5: Planned) -> None:
    at_5.announce(at_5.delta(6))
    at_5.plan.lose_head()
    at_5.plan.close("tokyo", is_origin=True)
    assert at_5.plan.ask("tokyo") is None

    at_5.announce(at_5.delta(6))

    assert at_5.steps == [6]


def test_an_origin_that_cannot_help_is_not_asked_for_ever(at_5: Planned) -> None:
    at_5.announce(at_5.delta(9))
    num_asked = 0
    while at_5.plan.ask("tokyo") is not None:
        num_asked += 1
        at_5.plan.follow("tokyo", [at_5.delta(9)])  # as if it started at 8
    assert num_asked == MAX_REQUESTS_WITHOUT_NEWS

    at_5.announce(at_5.delta(12))
    assert at_5.plan.ask("tokyo") == CatchUp(at(5))


# --- what is stored --------------------------------------------------------------------------------------------------


def test_a_stored_frame_leads_further(at_5: Planned) -> None:
    at_5.announce(at_5.delta(6), at_5.delta(7))

    assert at_5.store(held=6)
    assert at_5.steps == [7]
    assert at_5.plan.held == at(6)


def test_what_the_store_reaches_already_is_not_fetched(at_5: Planned) -> None:
    at_5.announce(at_5.delta(6), at_5.delta(7), at_5.delta(8))

    assert at_5.store(held=7)
    assert at_5.steps == [8]


def test_a_chain_that_does_not_reach_what_was_stored_needs_a_keyframe(at_5: Planned) -> None:
    at_5.announce(at_5.delta(6), at_5.delta(7))

    assert not at_5.store(held=5)
    assert at_5.steps == []
    assert at_5.plan.ask("tokyo") == FROM_NOTHING


def test_an_older_keyframe_leads_no_further(sites: Any) -> None:
    planned = Planned(sites, None)
    planned.announce(planned.frame(5, None))
    assert planned.store(held=5)
    planned.announce(planned.delta(7))
    planned.plan.ask("tokyo")
    planned.plan.break_chain()
    planned.plan.follow("tokyo", [planned.frame(3, None), *(planned.delta(step) for step in (4, 5, 6, 7))])

    assert planned.steps == [3, 4, 5, 6, 7]
    assert [planned.store(held=step) for step in (3, 4)] == [True, True], "after a broken chain all is new"


def test_a_chain_that_breaks_twice_without_news_is_left_alone(at_5: Planned) -> None:
    at_5.plan.break_chain()
    assert at_5.plan.ask("tokyo") == CatchUp(None, afresh=True)
    at_5.plan.follow("tokyo", [at_5.frame(9, None)])
    at_5.store(held=9)

    at_5.plan.break_chain()
    assert at_5.plan.ask("tokyo") is None

    at_5.announce(at_5.delta(10))
    assert at_5.plan.ask("tokyo") == CatchUp(None, afresh=True)
