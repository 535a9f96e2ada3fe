"""What only the memory transport has: delay, bandwidth, loss, cuts and a virtual clock."""

from __future__ import annotations

import heapq
import itertools
from collections import Counter
from collections.abc import Callable

import pytest

from p2pcodistill.gossip.messages import Lane
from p2pcodistill.transport.base import Closed, Opened, Received, TransportEvent
from p2pcodistill.transport.memory import (
    MAX_INBOX_BYTES,
    MAX_QUEUE_BYTES,
    LinkConditions,
    MemoryNetwork,
    MemoryTransport,
)


class VirtualClock:
    """Time that passes when it is told to. Timers of the same moment run last first: nobody may rely on their order."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()

    def now_s(self) -> float:
        return self._now_s

    def call_later(self, delay_s: float, callback: Callable[[], None]) -> None:
        heapq.heappush(self._timers, (self._now_s + delay_s, -next(self._numbers), callback))

    def run_until(self, time_s: float) -> None:
        while self._timers and self._timers[0][0] <= time_s:
            self._now_s, _, callback = heapq.heappop(self._timers)
            callback()
        self._now_s = time_s

    @property
    def num_timers(self) -> int:
        return len(self._timers)


class Pair:
    """`a` and `b`, linked and open, under a virtual clock."""

    def __init__(self, conditions: LinkConditions | None = None, *, seed: int = 0) -> None:
        self.clock = VirtualClock()
        self.network = MemoryNetwork(clock=self.clock, seed=seed)
        self.network.link("a", "b", conditions)
        self.a, self.b = MemoryTransport(self.network, "a"), MemoryTransport(self.network, "b")

    async def open(self) -> Pair:
        await self.a.open()
        await self.b.open()
        assert await self.a.receive() == Opened("b")
        assert await self.b.receive() == Opened("a")
        return self

    async def close(self) -> None:
        await self.a.close()
        await self.b.close()


async def arrived(transport: MemoryTransport) -> list[TransportEvent]:
    """The events that are there now."""
    events = []
    while transport.inbox._first or transport.inbox._bulk:
        events.append(await transport.receive())
    return events


async def test_without_conditions_nothing_waits_for_a_timer() -> None:
    pair = await Pair().open()
    assert pair.a.send("b", Lane.CONTROL, [b"now"])
    assert await pair.b.receive() == Received("a", Lane.CONTROL, (b"now",))
    assert pair.clock.num_timers == 0
    await pair.close()


async def test_delay_and_bandwidth_add_up() -> None:
    pair = await Pair(LinkConditions(delay_s=1.0, bandwidth_bytes_s=100.0)).open()
    for index in range(3):
        assert pair.a.send("b", Lane.BULK, [bytes([index]) * 50])
    assert pair.a.send("b", Lane.CONTROL, [b"x"])
    num_arrived = []
    for time_s in (0.99, 1.02, 1.51, 2.01, 2.51):
        pair.clock.run_until(time_s)
        num_arrived.append(len(await arrived(pair.b)))
    assert num_arrived == [0, 1, 1, 1, 1], "control has its own connection; bulk takes half a second each"
    await pair.close()


async def test_nothing_overtakes_on_a_lane_when_the_link_becomes_faster() -> None:
    pair = await Pair(LinkConditions(delay_s=5.0)).open()
    assert pair.a.send("b", Lane.CONTROL, [b"slow"])
    pair.network.link("a", "b", LinkConditions(delay_s=0.0))
    assert pair.a.send("b", Lane.CONTROL, [b"fast"])
    pair.clock.run_until(5.0)
    assert [e.payload for e in await arrived(pair.b) if isinstance(e, Received)] == [(b"slow",), (b"fast",)]
    await pair.close()


async def test_a_cut_ends_the_session_and_healing_begins_another() -> None:
    pair = await Pair(LinkConditions(delay_s=1.0)).open()
    for lane in Lane:
        assert pair.a.send("b", lane, [b"never arrives"])
    pair.network.cut("a", "b")
    why = "the link between a and b was cut"
    assert (await arrived(pair.a), await arrived(pair.b)) == ([Closed("b", why)], [Closed("a", why)])
    assert not pair.a.send("b", Lane.CONTROL, [b"x"])
    pair.network.heal("a", "b")
    assert (await arrived(pair.a), await arrived(pair.b)) == ([Opened("b")], [Opened("a")])
    assert pair.a.send("b", Lane.CONTROL, [b"arrives"])
    pair.clock.run_until(1.0)
    assert await arrived(pair.b) == [Received("a", Lane.CONTROL, (b"arrives",))]
    faults = pair.network.faults
    assert (faults.num_cuts, faults.num_payloads_cut_off, faults.num_payloads_lost) == (1, 2, 0)
    await pair.close()


async def test_a_site_behind_a_cut_can_restart() -> None:
    pair = await Pair().open()
    pair.network.cut("a", "b")
    await pair.b.close()
    pair.b = MemoryTransport(pair.network, "b")
    await pair.b.open()
    assert [type(event) for event in await arrived(pair.a)] == [Closed]
    assert await arrived(pair.b) == []
    pair.network.heal("a", "b")
    assert (await arrived(pair.a), await arrived(pair.b)) == ([Opened("b")], [Opened("a")])
    assert pair.network.faults.num_cuts == 1
    await pair.close()


async def test_lost_bulk_is_missing_and_the_seed_decides_which() -> None:
    outcomes = []
    for seed in (1, 1, 2):
        pair = await Pair(LinkConditions(loss_probability=0.3), seed=seed).open()
        for index in range(100):
            assert pair.a.send("b", Lane.BULK, [bytes([index])])
        received = [e.payload[0][0] for e in await arrived(pair.b) if isinstance(e, Received)]
        assert len(received) == 100 - pair.network.faults.num_payloads_lost
        assert 10 < pair.network.faults.num_payloads_lost < 60
        assert received == sorted(received)
        outcomes.append(received)
        await pair.close()
    assert outcomes[0] == outcomes[1] != outcomes[2]


async def test_lost_control_ends_the_session() -> None:
    pair = await Pair(LinkConditions(loss_probability=0.2), seed=3).open()
    for index in range(50):
        assert pair.a.send("b", Lane.CONTROL, [bytes([index])])
        await arrived(pair.a)  # word of the session that follows: until then, nothing is sent in it
    kinds = Counter(type(event) for event in await arrived(pair.b))
    num_lost = pair.network.faults.num_payloads_lost
    assert num_lost > 0
    assert kinds == {Received: 50 - num_lost, Closed: num_lost, Opened: num_lost}
    await pair.close()


async def test_a_full_control_lane_ends_the_session() -> None:
    pair = await Pair(LinkConditions(delay_s=1.0)).open()
    num_sent = 0
    while pair.a.send("b", Lane.CONTROL, [bytes(1 << 20)]):
        num_sent += 1
    assert num_sent == MAX_QUEUE_BYTES >> 20
    assert await arrived(pair.b) == [Closed("a", "b does not take what it is sent"), Opened("a")]
    assert pair.network.faults.num_payloads_cut_off == num_sent
    await pair.close()


async def test_bulk_waits_for_a_reader_and_control_does_not() -> None:
    pair = await Pair().open()
    num_sent = 0
    while pair.a.send("b", Lane.BULK, [num_sent.to_bytes(2), bytes(1 << 18)]):
        num_sent += 1
    assert num_sent << 18 <= MAX_QUEUE_BYTES + MAX_INBOX_BYTES + (1 << 18)
    assert pair.a.send("b", Lane.CONTROL, [b"urgent"])
    first, *rest = await arrived(pair.b)
    assert first == Received("a", Lane.CONTROL, (b"urgent",))
    assert [e.payload[0] for e in rest if isinstance(e, Received)] == [i.to_bytes(2) for i in range(num_sent)]
    await pair.close()


async def test_last_words_arrive_and_bulk_on_its_way_is_cut_off() -> None:
    pair = await Pair(LinkConditions(delay_s=1.0)).open()
    assert pair.a.send("b", Lane.BULK, [b"too long on its way"])
    assert pair.a.send("b", Lane.CONTROL, [b"farewell"])
    await pair.a.close()
    assert await arrived(pair.b) == [
        Received("a", Lane.CONTROL, (b"farewell",)),
        Closed("a", "a closed the connection"),
    ]
    pair.clock.run_until(10.0)
    assert await arrived(pair.b) == []
    assert pair.network.faults.num_payloads_cut_off == 1
    await pair.b.close()


async def test_only_links_make_peers() -> None:
    network = MemoryNetwork()
    network.link("a", "b")
    network.link("b", "c")
    b = MemoryTransport(network, "b")
    await b.open()
    assert list(b.traffic()) == ["a", "c"]
    a = MemoryTransport(network, "a")
    with pytest.raises(KeyError):
        a.send("c", Lane.CONTROL, [b"x"])
    with pytest.raises(KeyError):
        network.cut("a", "c")
    assert network.faults.num_cuts == 0
    await b.close()
