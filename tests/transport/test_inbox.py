"""Control before bulk, bounded, and nothing of a session after its end."""

from __future__ import annotations

import asyncio

import pytest

from p2pcodistill.gossip.messages import Lane
from p2pcodistill.transport.base import Closed, Opened, Received
from p2pcodistill.transport.inbox import EVENT_OVERHEAD_BYTES, Inbox


def bulk(peer: str, payload: bytes) -> Received:
    return Received(peer, Lane.BULK, (payload,))


def control(peer: str, payload: bytes) -> Received:
    return Received(peer, Lane.CONTROL, (payload,))


async def test_control_comes_before_bulk_and_each_in_order() -> None:
    inbox = Inbox(1 << 20)
    events = [Opened("a"), bulk("a", b"1"), control("a", b"2"), bulk("a", b"3"), control("a", b"4")]
    for event in events:
        inbox.put(event)
    received = [await inbox.get() for _ in events]
    assert received == [events[i] for i in (0, 2, 4, 1, 3)]


async def test_the_end_of_a_session_drops_its_bulk_only() -> None:
    inbox = Inbox(100)
    for event in (bulk("a", b"1"), bulk("b", b"2"), control("a", b"3"), Closed("a", "gone")):
        inbox.put(event)
    assert [await inbox.get() for _ in range(3)] == [control("a", b"3"), Closed("a", "gone"), bulk("b", b"2")]
    assert not inbox.full, "what was dropped takes no room"


async def test_there_is_room_until_it_is_full_and_again_once_it_is_read() -> None:
    inbox = Inbox(2 * EVENT_OVERHEAD_BYTES + 10)
    inbox.put(bulk("a", bytes(10)))
    await inbox.room()
    inbox.put(bulk("a", b""))
    assert inbox.full
    waiting = asyncio.create_task(inbox.room())
    await asyncio.sleep(0)
    assert not waiting.done()
    await inbox.get()
    await waiting
    assert not inbox.full


async def test_a_failure_wakes_who_waits_and_the_first_stays() -> None:
    inbox = Inbox(100)
    waiting = asyncio.create_task(inbox.get())
    await asyncio.sleep(0)
    inbox.fail(ZeroDivisionError())
    inbox.fail(RuntimeError())
    with pytest.raises(ZeroDivisionError):
        await waiting
    inbox.put(Opened("a"))
    with pytest.raises(ZeroDivisionError):
        await inbox.get()
