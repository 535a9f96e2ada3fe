"""Downloads: credit, batches, deadlines, resume, bad and late chunks, overtaking, chains."""

from __future__ import annotations

from typing import Any

import pytest

from p2pcodistill.checkpoint.manifest import MIN_CHUNK_BYTES
from p2pcodistill.gossip import window
from p2pcodistill.gossip.codec import decode_message
from p2pcodistill.gossip.download import MAX_BAD_CHUNKS
from p2pcodistill.gossip.events import (
    AbandonFrame,
    Action,
    BeginFetch,
    CompleteFrame,
    Report,
    SendPayload,
    StoreChunk,
    send,
)
from p2pcodistill.gossip.messages import MAX_WANT_INDICES, CatchUp, Chunk, Want
from p2pcodistill.gossip.transfer import Transfers
from p2pcodistill.telemetry.node_events import Refused

CHUNK = MIN_CHUNK_BYTES
STALL_S = 10.0


def wants(actions: list[Action]) -> list[tuple[str, tuple[int, ...]]]:
    """(peer, indices) of each want among `actions`."""
    found = []
    for action in actions:
        if isinstance(action, SendPayload):
            message = decode_message(action.payload)
            if isinstance(message, Want):
                found.append((action.peer, message.indices))
    return found


class Fetch:
    """Drives `Transfers` through one test, at a time that stands still unless the test moves it."""

    def __init__(self, *, window_chunks: int = 4, peers: tuple[str, ...] = ("tokyo",)) -> None:
        self.transfers = Transfers({}, window_bytes=window_chunks * CHUNK, stall_timeout_s=STALL_S)
        self.now_s = 100.0
        for peer in peers:
            self.transfers.open(peer)

    def act(self) -> list[Action]:
        return self.transfers.next_actions(self.now_s)

    def start(self, frame: Any, *, peer: str = "tokyo", present: tuple[int, ...] = ()) -> list[Action]:
        self.transfers.announce(peer, frame.signed)
        assert BeginFetch(frame.signed) in self.act()
        self.transfers.begin(frame.frame_id, present)
        return self.act()

    def receive(
        self, frame: Any, *indices: int, peer: str = "tokyo", data: bytes | None = None
    ) -> list[Action]:
        actions: list[Action] = []
        for index in indices:
            chunk = Chunk(frame.frame_id, index, frame.chunks[index] if data is None else data)
            actions += self.transfers.receive(peer, chunk, self.now_s)
            actions += self.act()
        return actions

    def tick(self, seconds: float) -> list[Action]:
        self.now_s += seconds
        self.transfers.tick(self.now_s)
        return self.act()


@pytest.fixture
def fetch() -> Fetch:
    return Fetch()


# --- the plain way -------------------------------------------------------------------------------------------


def test_chunks_are_wanted_in_order_stored_and_completed(fetch: Fetch, sites: Any) -> None:
    frame = sites.frame("tokyo", 1, num_chunks=3)

    assert wants(fetch.start(frame)) == [("tokyo", (0, 1, 2))]
    assert fetch.receive(frame, 2, 0) == [
        StoreChunk(frame.frame_id, 2, frame.chunks[2]),
        StoreChunk(frame.frame_id, 0, frame.chunks[0]),
    ]
    assert fetch.receive(frame, 1) == [
        StoreChunk(frame.frame_id, 1, frame.chunks[1]),
        CompleteFrame(frame.frame_id),
    ]
    assert fetch.act() == []
    assert fetch.transfers.fetching == (frame.frame_id,)

    download = fetch.transfers.store(frame.frame_id, frame.version)

    assert download is not None
    assert (download.offer.signed, download.num_resent_bytes) == (frame.signed, 0)
    assert fetch.transfers.fetching == ()
    assert fetch.act() == []


def test_the_window_bounds_what_is_asked_and_is_refilled_by_halves(fetch: Fetch, sites: Any) -> None:
    frame = sites.frame("tokyo", 1, num_chunks=9)

    assert wants(fetch.start(frame)) == [("tokyo", (0, 1, 2, 3))]
    assert wants(fetch.receive(frame, 0)) == []
    assert wants(fetch.receive(frame, 1)) == [("tokyo", (4, 5))]
    assert wants(fetch.receive(frame, 2, 3)) == [("tokyo", (6, 7))]
    assert wants(fetch.receive(frame, 4, 5)) == [("tokyo", (8,))]
    assert fetch.receive(frame, 6, 7, 8)[-1] == CompleteFrame(frame.frame_id)
    assert wants(fetch.start(sites.frame("lima", 1, num_chunks=9))) == [("tokyo", (0, 1, 2, 3))]


def test_a_chunk_for_which_credit_is_short_waits(sites: Any) -> None:
    fetch = Fetch()
    fetch.transfers = Transfers({}, window_bytes=5 * CHUNK // 2, stall_timeout_s=STALL_S)
    fetch.transfers.open("tokyo")
    frame = sites.frame("tokyo", 1, num_chunks=4)

    assert wants(fetch.start(frame)) == [("tokyo", (0, 1))]
    assert wants(fetch.receive(frame, 0)) == [("tokyo", (2, 3))]  # of which the last is a short one


def test_a_large_want_is_split(sites: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(window, "FIRST_WINDOW_BYTES", 2 * MAX_WANT_INDICES * CHUNK)
    fetch = Fetch(window_chunks=2 * MAX_WANT_INDICES)
    frame = sites.frame("tokyo", 1, num_chunks=MAX_WANT_INDICES + 5)

    assert [len(indices) for _, indices in wants(fetch.start(frame))] == [MAX_WANT_INDICES, 5]


def test_what_the_store_holds_is_not_wanted(fetch: Fetch, sites: Any) -> None:
    frame = sites.frame("tokyo", 1, num_chunks=5)
    assert wants(fetch.start(frame, present=(0, 3))) == [("tokyo", (1, 2, 4))]

    whole = sites.frame("lima", 1, num_chunks=2)
    assert fetch.start(whole, present=(0, 1)) == [CompleteFrame(whole.frame_id)]


def test_any_peer_that_holds_the_frame_serves(sites: Any) -> None:
    fetch = Fetch(window_chunks=2, peers=("tokyo", "lima"))
    frame = sites.frame("tokyo", 1, num_chunks=6)
    fetch.start(frame)
    fetch.transfers.announce("lima", frame.signed)

    assert wants(fetch.act()) == [("lima", (2, 3))]
    assert wants(fetch.receive(frame, 2, peer="lima")) == [("lima", (4,))]
    # What was asked of one and comes from the other is welcome, and its second coming is counted.
    fetch.receive(frame, 0, peer="lima")
    fetch.receive(frame, 0, 1)
    assert fetch.receive(frame, 3, 4, peer="lima")[-1:] == [StoreChunk(frame.frame_id, 4, frame.chunks[4])]
    assert fetch.receive(frame, 5)[-1] == CompleteFrame(frame.frame_id)
    download = fetch.transfers.store(frame.frame_id, frame.version)
    assert download is not None
    assert download.num_resent_bytes == CHUNK


# --- cuts and stalls -----------------------------------------------------------------------------------------


def test_after_a_cut_only_missing_chunks_are_wanted_again(fetch: Fetch, sites: Any) -> None:
    frame = sites.frame("tokyo", 1, num_chunks=6)
    fetch.start(frame)
    fetch.receive(frame, 0, 2)

    fetch.transfers.close("tokyo")
    assert fetch.act() == []
    fetch.transfers.open("tokyo")

    assert wants(fetch.act()) == [("tokyo", (1, 3, 4, 5))]


def test_a_silent_peer_is_asked_again_and_progress_moves_the_deadline(fetch: Fetch, sites: Any) -> None:
    frame = sites.frame("tokyo", 1, num_chunks=4)
    fetch.start(frame)

    assert fetch.tick(STALL_S - 1) == []
    fetch.receive(frame, 0)
    assert fetch.tick(STALL_S + 1) == []  # its chunks take 9 s each, which is slow, not silent
    assert wants(fetch.tick(STALL_S)) == [("tokyo", (1, 2, 3))]


def test_a_late_chunk_counts_once_and_its_double_as_resent(fetch: Fetch, sites: Any) -> None:
    frame = sites.frame("tokyo", 1, num_chunks=2)
    fetch.start(frame)
    assert wants(fetch.tick(STALL_S)) == [("tokyo", (0, 1))]

    assert StoreChunk(frame.frame_id, 0, frame.chunks[0]) in fetch.receive(frame, 0)
    assert fetch.receive(frame, 0) == []
    fetch.receive(frame, 1)

    download = fetch.transfers.store(frame.frame_id, frame.version)
    assert download is not None
    assert download.num_resent_bytes == CHUNK


def test_idle_time_is_not_silence(fetch: Fetch, sites: Any) -> None:
    first, second = sites.frame("tokyo", 1, num_chunks=1), sites.frame("tokyo", 2, num_chunks=1)
    fetch.start(first)
    fetch.receive(first, 0)
    fetch.transfers.store(first.frame_id, first.version)
    fetch.tick(1000.0)

    assert wants(fetch.start(second)) == [("tokyo", (0,))]
    assert fetch.tick(STALL_S - 1) == []
    assert wants(fetch.tick(1)) == [("tokyo", (0,))]


def test_a_stalled_peer_is_asked_last(sites: Any) -> None:
    fetch = Fetch(window_chunks=2, peers=("tokyo", "lima"))
    frame = sites.frame("tokyo", 1, num_chunks=2)
    fetch.start(frame)
    fetch.transfers.announce("lima", frame.signed)
    assert fetch.act() == []

    assert wants(fetch.tick(STALL_S)) == [("lima", (0, 1))]


# --- bad chunks and lost sources -----------------------------------------------------------------------------


def refusals(actions: list[Action]) -> list[tuple[str | None, str]]:
    events = [action.event for action in actions if isinstance(action, Report)]
    return [(event.peer, event.reason) for event in events if isinstance(event, Refused)]


def test_a_bad_chunk_is_not_stored_and_wanted_again(fetch: Fetch, sites: Any) -> None:
    frame = sites.frame("tokyo", 1, num_chunks=3)
    fetch.start(frame)

    actions = fetch.receive(frame, 1, data=bytes(CHUNK))
    assert refusals(actions) == [("tokyo", "bad-checksum")]
    assert not any(isinstance(action, StoreChunk) for action in actions)
    assert wants(actions) == [("tokyo", (1,))]
    assert fetch.receive(frame, 0, 1, 2)[-1] == CompleteFrame(frame.frame_id)


@pytest.mark.parametrize(
    ("index", "data"), [(1, bytes(CHUNK - 1)), (2, bytes(CHUNK)), (0, b""), (3, bytes(CHUNK))]
)
def test_a_chunk_of_wrong_length_or_index_is_malformed(
    fetch: Fetch, sites: Any, index: int, data: bytes
) -> None:
    frame = sites.frame("tokyo", 1, num_chunks=3)
    fetch.start(frame)

    assert refusals(fetch.receive(frame, index, data=data)) == [("tokyo", "malformed")]
    assert fetch.receive(frame, 0, 1, 2)[-1] == CompleteFrame(frame.frame_id)


def test_after_three_bad_chunks_the_peer_is_not_asked_for_that_frame_any_more(sites: Any) -> None:
    fetch = Fetch(window_chunks=6, peers=("tokyo", "lima"))
    frame = sites.frame("tokyo", 1, num_chunks=6)
    fetch.start(frame)
    fetch.transfers.announce("lima", frame.signed)

    actions = fetch.receive(frame, 0, 1, 2, data=bytes(CHUNK))
    assert len(refusals(actions)) == MAX_BAD_CHUNKS
    assert wants(actions) == [("lima", (0,)), ("lima", (1,)), ("lima", (2, 3, 4, 5))]
    fetch.transfers.announce("tokyo", frame.signed)  # announcing it again does not help
    of_lima = sites.frame("lima", 1, num_chunks=9)
    assert wants(fetch.start(of_lima)) == [("tokyo", (0, 1, 2, 3, 4, 5))]
    assert wants(fetch.receive(frame, 0, 1, 2, 3, peer="lima")) == []


def test_a_frame_that_nobody_can_send_is_given_up(fetch: Fetch, sites: Any) -> None:
    frame = sites.frame("tokyo", 1, num_chunks=4)
    fetch.start(frame)

    assert AbandonFrame(frame.frame_id) in fetch.receive(frame, 0, 1, 2, data=bytes(CHUNK))
    assert fetch.transfers.fetching == ()
    fetch.transfers.announce("tokyo", frame.signed)
    assert fetch.act() == []
    assert wants(fetch.start(sites.frame("tokyo", 2))) == [("tokyo", (0, 1, 2))]


def test_an_uninvited_bad_chunk_makes_nobody_a_source(sites: Any) -> None:
    fetch = Fetch(peers=("tokyo", "lima"))
    frame = sites.frame("tokyo", 1, num_chunks=8)
    fetch.start(frame)

    actions = fetch.receive(frame, 7, peer="lima", data=b"x")

    assert refusals(actions) == [("lima", "malformed")]
    assert wants(actions) == []


def test_chunks_of_frames_that_are_not_fetched_are_ignored(fetch: Fetch, sites: Any) -> None:
    frame = sites.frame("tokyo", 1)
    assert fetch.receive(frame, 0) == []

    fetch.transfers.announce("tokyo", frame.signed)
    assert fetch.act() == [BeginFetch(frame.signed)]
    assert fetch.receive(frame, 0) == []  # the store has not said yet what it holds


def test_a_frame_that_is_gone_is_given_up(fetch: Fetch, sites: Any) -> None:
    old, new = sites.frame("tokyo", 1), sites.frame("tokyo", 2)
    fetch.start(old)
    fetch.receive(old, 0)
    fetch.transfers.announce("tokyo", new.signed)
    assert fetch.act() == []

    fetch.transfers.lose_source("tokyo", old.frame_id)

    assert fetch.act() == [AbandonFrame(old.frame_id), BeginFetch(new.signed)]
    fetch.transfers.begin(new.frame_id, ())
    assert wants(fetch.act()) == [("tokyo", (0, 1, 2))], "the credit is back"


def test_for_the_newest_frame_gone_a_path_is_asked_and_in_a_new_session_it_is_tried_again(
    fetch: Fetch, sites: Any
) -> None:
    frame = sites.frame("tokyo", 1)
    fetch.start(frame)
    fetch.transfers.lose_source("tokyo", frame.frame_id)
    assert fetch.act() == [AbandonFrame(frame.frame_id), send("tokyo", CatchUp(None))]
    fetch.transfers.announce("tokyo", frame.signed)
    assert fetch.act() == []

    fetch.transfers.close("tokyo")
    fetch.transfers.open("tokyo")
    fetch.transfers.announce("tokyo", frame.signed)

    assert fetch.act() == [BeginFetch(frame.signed)]


def test_a_frame_gone_here_is_fetched_there(sites: Any) -> None:
    fetch = Fetch(peers=("tokyo", "lima"))
    frame = sites.frame("tokyo", 1, num_chunks=4)
    fetch.start(frame)
    fetch.transfers.announce("lima", frame.signed)
    fetch.receive(frame, 1)

    fetch.transfers.lose_source("tokyo", frame.frame_id)

    assert wants(fetch.act()) == [("lima", (0, 2, 3))]


def test_what_the_store_refuses_is_given_up(fetch: Fetch, sites: Any) -> None:
    frame = sites.frame("tokyo", 1)
    fetch.transfers.announce("tokyo", frame.signed)
    fetch.act()

    download = fetch.transfers.give_up(frame.frame_id)

    assert download is not None
    assert download.offer.signed == frame.signed
    assert fetch.act() == []
    assert fetch.transfers.give_up(frame.frame_id) is None
    assert fetch.transfers.store(frame.frame_id, frame.version) is None
    fetch.transfers.begin(frame.frame_id, ())
    assert fetch.act() == []


def test_what_the_store_refuses_midway_gives_its_credit_back(fetch: Fetch, sites: Any) -> None:
    frame = sites.frame("tokyo", 1)
    fetch.start(frame)
    fetch.receive(frame, 0)

    fetch.transfers.give_up(frame.frame_id)

    assert fetch.receive(frame, 1) == []
    assert wants(fetch.start(sites.frame("tokyo", 2, num_chunks=9))) == [("tokyo", (0, 1, 2, 3))]


# --- overtaking ----------------------------------------------------------------------------------------------


def test_a_newer_keyframe_replaces_a_download_of_which_nothing_is_under_way(fetch: Fetch, sites: Any) -> None:
    old, new = sites.frame("tokyo", 1), sites.frame("tokyo", 2)
    fetch.start(old)
    fetch.transfers.close("tokyo")
    fetch.transfers.open("tokyo")

    fetch.transfers.announce("tokyo", new.signed)

    assert fetch.act() == [AbandonFrame(old.frame_id), BeginFetch(new.signed)]
    fetch.transfers.begin(new.frame_id, ())
    assert wants(fetch.act()) == [("tokyo", (0, 1, 2))]


def test_a_newer_keyframe_waits_for_the_store_to_say_what_is_there(fetch: Fetch, sites: Any) -> None:
    for present, is_replaced in (((), True), ((0,), False)):
        old, new = (sites.frame("tokyo", step, content=str(present)) for step in (1, 2))
        fetch.transfers.announce("tokyo", old.signed)
        assert fetch.act() == [BeginFetch(old.signed)]
        fetch.transfers.announce("tokyo", new.signed)
        assert fetch.act() == []

        fetch.transfers.begin(old.frame_id, present)

        assert (AbandonFrame(old.frame_id) in fetch.act()) == is_replaced
        fetch.transfers.give_up(new.frame_id)


def test_a_download_under_way_is_finished_and_those_between_are_skipped(fetch: Fetch, sites: Any) -> None:
    frames = [sites.frame("tokyo", step, num_chunks=2) for step in range(1, 5)]
    first, *_, last = frames
    fetch.start(first)
    for newer in frames[1:]:
        fetch.transfers.announce("tokyo", newer.signed)
        assert fetch.act() == []

    assert fetch.receive(first, 0, 1)[-1] == CompleteFrame(first.frame_id)
    assert fetch.act() == []
    fetch.transfers.store(first.frame_id, first.version)
    assert fetch.act() == [BeginFetch(last.signed)]


def test_one_frame_per_origin_is_fetched_at_a_time(sites: Any) -> None:
    fetch = Fetch(peers=("tokyo", "lima"))
    of_tokyo, of_lima = sites.frame("tokyo", 1), sites.frame("lima", 1)

    assert wants(fetch.start(of_tokyo)) == [("tokyo", (0, 1, 2))]
    assert wants(fetch.start(of_lima, peer="lima")) == [("lima", (0, 1, 2))]
    assert fetch.transfers.fetching == (of_tokyo.frame_id, of_lima.frame_id)


# --- chains --------------------------------------------------------------------------------------------------


def test_delta_frames_are_fetched_one_after_the_other_the_oldest_first(fetch: Fetch, sites: Any) -> None:
    keyframe, first, second = sites.chain("tokyo", 2)
    fetch.start(keyframe)
    fetch.receive(keyframe, 0)
    fetch.transfers.announce("tokyo", first.signed)
    fetch.transfers.announce("tokyo", second.signed)
    assert fetch.act() == []

    fetch.receive(keyframe, *range(1, 9))
    fetch.transfers.store(keyframe.frame_id, keyframe.version)
    assert fetch.act() == [BeginFetch(first.signed)]
    fetch.transfers.begin(first.frame_id, ())
    fetch.act()
    fetch.receive(first, 0, 1)
    download = fetch.transfers.store(first.frame_id, first.version)

    assert download is not None and download.leads_further
    assert fetch.act() == [BeginFetch(second.signed)]


def test_a_download_whose_chain_broke_is_given_up_with_its_credit(fetch: Fetch, sites: Any) -> None:
    keyframe, first, *_ = sites.chain("tokyo", 1)
    fetch.transfers = Transfers({"tokyo": keyframe.version}, window_bytes=4 * CHUNK, stall_timeout_s=STALL_S)
    fetch.transfers.open("tokyo")
    assert wants(fetch.start(first)) == [("tokyo", (0, 1))]

    fetch.transfers.break_chain("tokyo")

    assert fetch.act() == [AbandonFrame(first.frame_id), send("tokyo", CatchUp(None, afresh=True))]
    assert fetch.receive(first, 0) == []
    assert wants(fetch.start(sites.frame("tokyo", 9, num_chunks=9))) == [("tokyo", (0, 1, 2, 3))]


def test_a_path_is_asked_of_an_origin_that_is_there(sites: Any) -> None:
    fetch = Fetch(peers=("lima",))
    fetch.transfers.announce("tokyo", sites.frame("tokyo", 5, base=4).signed)
    assert fetch.act() == []

    fetch.transfers.open("tokyo")

    assert fetch.act() == [send("tokyo", CatchUp(None))]
    assert fetch.transfers.asked("tokyo") == CatchUp(None)
    assert fetch.transfers.asked("lima") is None
