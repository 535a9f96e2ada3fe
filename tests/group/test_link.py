"""The link between rank 0 and the node: joining, both directions, strangers, a node that does not answer."""

import asyncio
import stat
import threading
from dataclasses import replace
from pathlib import Path

import msgpack
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.errors import GroupError, MalformedError
from p2pcodistill.group.link import NodeLink, RankLink
from p2pcodistill.group.link_messages import (
    ChainBroken,
    EventHappened,
    FrameOffer,
    FrameOffered,
    FrameReady,
    FrameTaken,
    Joined,
    KeyframeWanted,
    Left,
    LinksMeasured,
    ReferenceReady,
    StopRequested,
    TrustChanged,
    VersionKnown,
    Welcome,
    decode_link_message,
    encode_link_message,
)
from p2pcodistill.telemetry.records import to_record
from p2pcodistill.telemetry.training_events import Evaluated

OFFER = FrameOffer("tokyo", 1, 50, "/store", ((1, 0, "a.frame"), (1, 50, "b.frame")))
READY = FrameReady("/out/50.frame", 50, 0, "ternary+pco", b"h" * 32, 2000)
REFERENCE = ReferenceReady("/out/tokyo.reference", "tokyo", 1, 50, "reference+blosc2", b"h" * 32, 2000)
BROKEN = ChainBroken("tokyo", 1, 50)
KNOWN = VersionKnown("tokyo", 1, 100, 12.5)
NOTHING = Welcome(())


def event(step: int) -> EventHappened:
    return EventHappened(to_record(Evaluated(step=step, val_loss=1.5, duration_s=0.1), time_unix_s=0.0))


MESSAGES = [
    Joined("token"),
    READY,
    replace(READY, base_step=None),
    REFERENCE,
    BROKEN,
    event(1),
    Left(),
    Welcome((OFFER, OFFER)),
    Welcome((), (KNOWN, VersionKnown("oslo", 0, 10))),
    FrameOffered(OFFER),
    FrameTaken(50, 0, accepted=True),
    FrameTaken(50, None, accepted=False),
    KeyframeWanted(),
    StopRequested(),
    KNOWN,
    LinksMeasured(1.5e6),
    Welcome((), (), ("oslo",)),
    TrustChanged("tokyo", is_trusted=False),
]


@pytest.mark.parametrize("message", MESSAGES, ids=lambda m: type(m).__name__)
def test_messages_round_trip(message):
    assert decode_link_message(encode_link_message(message)) == message


@pytest.mark.parametrize("num_frames", [0, 65])
def test_a_chain_has_a_bounded_number_of_frames(num_frames):
    offer = replace(OFFER, frames=OFFER.frames[:1] * num_frames)
    with pytest.raises(MalformedError, match="1 to 64 frames"):
        decode_link_message(encode_link_message(FrameOffered(offer)))


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused_or_a_message(data):
    try:
        assert isinstance(decode_link_message(data), tuple(type(m) for m in MESSAGES))
    except MalformedError as error:
        assert "link message" in str(error)


@given(st.recursive(st.none() | st.integers(-9, 9) | st.text(max_size=5), lambda x: st.lists(x, max_size=4)))
def test_arbitrary_structures_are_refused_or_a_message(value):
    try:
        assert isinstance(decode_link_message(msgpack.packb(value)), tuple(type(m) for m in MESSAGES))
    except MalformedError as error:
        assert "link message" in str(error)


@pytest.fixture
def node_link(tmp_path):
    link = NodeLink(tmp_path / "link")
    link.address = link.open()
    yield link
    link.close()


async def join(node_link: NodeLink, rank: RankLink, welcome: Welcome = NOTHING) -> Welcome:
    connecting = asyncio.create_task(asyncio.to_thread(rank.connect, 10))
    assert isinstance(await node_link.receive(), Joined)
    await node_link.send(welcome)
    return await connecting


async def test_rank_zero_joins_and_both_sides_talk(node_link):
    arrived: list[object] = []
    stop_arrived = threading.Event()

    def on_message(message: object) -> None:
        arrived.append(message)
        if isinstance(message, StopRequested):
            stop_arrived.set()

    node_link.expect("secret")
    rank = RankLink(node_link.address, "secret", on_message)
    welcome = Welcome((OFFER,), (KNOWN,))
    assert await join(node_link, rank, welcome) == welcome
    assert node_link.joined
    for message in (READY, REFERENCE, BROKEN, event(1)):
        rank.send(message)
        assert await node_link.receive() == message
    orders = [
        FrameOffered(OFFER),
        KNOWN,
        FrameTaken(50, 0, accepted=True),
        KeyframeWanted(),
        StopRequested(),
    ]
    for order in orders:
        await node_link.send(order)
    assert await asyncio.to_thread(stop_arrived.wait, 10)
    assert arrived == orders
    await asyncio.to_thread(rank.close, 1)


async def test_closing_flushes_what_is_queued(node_link):
    node_link.expect("secret")
    rank = RankLink(node_link.address, "secret", lambda _: None)
    await join(node_link, rank)
    for step in range(200):
        rank.send(event(step))
    closing = asyncio.create_task(asyncio.to_thread(rank.close, 10))
    received = [(await node_link.receive()).record["step"] for _ in range(200)]
    assert await node_link.receive() == Left(), "the last word says that nothing more will come"
    await closing
    assert received == list(range(200))


async def test_a_rank_of_an_earlier_launch_is_not_listened_to(node_link):
    node_link.expect("first")
    old = RankLink(node_link.address, "first", lambda _: None)
    await join(node_link, old)
    node_link.expect("second")
    assert not node_link.joined
    old.send(event(1))
    late = RankLink(node_link.address, "first", lambda _: None)
    late_joins = asyncio.create_task(asyncio.to_thread(late.connect, 0.5))
    new = RankLink(node_link.address, "second", lambda _: None)
    await join(node_link, new)
    old.send(event(2))
    new.send(event(3))
    assert await node_link.receive() == event(3)
    with pytest.raises(GroupError, match="did not answer"):
        await late_joins
    for rank in (old, new):
        await asyncio.to_thread(rank.close, 1)


async def test_garbage_from_a_rank_is_a_named_error(node_link):
    node_link.expect("secret")
    context = zmq.Context()
    dealer = context.socket(zmq.DEALER)
    dealer.connect(node_link.address)
    dealer.send(encode_link_message(Joined("secret")))
    assert isinstance(await node_link.receive(), Joined)
    wrong = [
        StopRequested(),
        replace(READY, path=3),
        replace(READY, base_step=0.5),
        replace(REFERENCE, origin=None),
        replace(REFERENCE, schema_hash="h"),
        replace(BROKEN, step=True),
        EventHappened({"event": "never heard of"}),
    ]
    for garbage in (b"\xc1", *map(encode_link_message, wrong)):
        dealer.send(garbage)
        with pytest.raises(MalformedError):
            await node_link.receive()
    dealer.close(0)
    context.term()


def test_the_socket_lies_in_a_private_folder_and_a_stale_one_is_removed(tmp_path):
    pointer = tmp_path / "link"
    killed = NodeLink(pointer)
    killed.open()
    stale = pointer.readlink()
    link = NodeLink(pointer)  # as after kill -9: the first one never closed
    address = link.open()
    folder = Path(address.removeprefix("ipc://")).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert not stale.exists() and pointer.readlink() == folder
    link.close()
    assert not folder.exists() and not pointer.is_symlink()
    killed.close()


def test_whatever_a_run_folder_points_to_only_own_folders_are_removed(tmp_path):
    victim = tmp_path / "precious"
    victim.mkdir()
    (victim / "weights").write_text("a month of work")
    pointer = tmp_path / "link"
    pointer.symlink_to(victim)
    link = NodeLink(pointer)
    link.open()
    link.close()
    assert (victim / "weights").read_text() == "a month of work"


def test_a_node_that_does_not_answer_is_named(tmp_path):
    rank = RankLink(f"ipc://{tmp_path}/nobody", "token", lambda _: None)
    with pytest.raises(GroupError, match="did not answer"):
        rank.connect(0.1)
    rank.close(0)
