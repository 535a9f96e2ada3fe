"""The two sides of a link agree on its sessions, however their connections come, break and interleave."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import TypeAlias

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pcodistill.gossip.messages import Lane
from p2pcodistill.transport.base import Closed, Opened, Rejected
from p2pcodistill.transport.channels import Channel, Drop, PeerChannels, Pick, Step

Message: TypeAlias = tuple[str, bytes] | tuple[str, int] | tuple[str]


class Side:
    """One process of a site, and what it has sent and received on each channel."""

    def __init__(self, world: World, name: str, peer: str, *, leads: bool, session: bytes) -> None:
        self.world, self.name, self.peer, self.session = world, name, peer, session
        self.channels = PeerChannels(peer, leads=leads)
        self.known: dict[bytes, Channel] = {}
        self.is_open = False

    def dial(self) -> None:
        """Dial, if the last dial is over."""
        if any(channel.dialled for channel in self.channels.channels):
            return
        channel_id = self.world.new_id()
        channel = self.known[channel_id] = Channel(self.peer, channel_id, dialled=True, heard_s=0.0)
        channel.routes = dict.fromkeys(Lane)
        self.channels.add(channel)
        for lane in Lane:
            self.put(channel, lane, ("greet", self.session))

    def put(self, channel: Channel, lane: Lane, message: Message) -> None:
        if channel.id not in self.world.dead:
            self.world.queues[channel.id, lane, self.name].append(message)

    def send(self, lane: Lane, number: int) -> None:
        channel = self.channels.in_use
        if channel is not None and not channel.broken:
            self.world.sent[channel.id, lane, self.name].append(number)
            self.put(channel, lane, ("data", number))

    def hear(self, channel_id: bytes, lane: Lane, message: Message) -> None:
        channel = self.known.get(channel_id)
        if channel is None:
            channel = self.known[channel_id] = Channel(self.peer, channel_id, dialled=False, heard_s=0.0)
            self.channels.add(channel)
        match message:
            case ("greet", bytes(session)):
                channel.routes[lane] = None
                steps = self.channels.greet(channel, lane, session)
                if not channel.dialled and channel in self.channels.channels:
                    self.put(channel, lane, ("greet", self.session))
                self.take(steps)
            case ("pick",):
                self.take(self.channels.follow(channel))
            case ("bye",) if lane is Lane.CONTROL:
                self.take(self.channels.lose(channel, "bye"))
            case ("data", int(number)):
                if channel is self.channels.in_use:
                    self.world.received[channel_id, lane, self.name].append(number)

    def take(self, steps: list[Step]) -> None:
        for step in steps:
            match step:
                case Opened(peer):
                    assert (peer, self.is_open) == (self.peer, False)
                    self.is_open = True
                case Closed(peer):
                    assert (peer, self.is_open) == (self.peer, True)
                    self.is_open = False
                case Pick(channel):
                    for lane in Lane:
                        self.put(channel, lane, ("pick",))
                case Drop(channel):
                    if not channel.broken:
                        self.put(channel, Lane.CONTROL, ("bye",))
                case Rejected():
                    raise AssertionError(step)

    def notice(self) -> None:
        """See which connections are gone, as the keep-alive does."""
        for channel in self.channels.channels:
            if channel.id in self.world.dead:
                channel.broken = "the cable was pulled"
        for _ in range(2):
            self.take(self.channels.expire(0.0, 1.0))


class World:
    """Two sites and every message on its way."""

    def __init__(self) -> None:
        self.queues: defaultdict[tuple[bytes, Lane, str], deque[Message]] = defaultdict(deque)
        self.sent: defaultdict[tuple[bytes, Lane, str], list[int]] = defaultdict(list)
        self.received: defaultdict[tuple[bytes, Lane, str], list[int]] = defaultdict(list)
        self.dead: set[bytes] = set()
        self.num_ids = 0
        self.sides = {name: self.start(name) for name in "ab"}

    def new_id(self) -> bytes:
        self.num_ids += 1
        return self.num_ids.to_bytes(8)

    def start(self, name: str) -> Side:
        return Side(self, name, "ba"["ab".index(name)], leads=name == "a", session=self.new_id())

    def restart(self, name: str) -> None:
        for channel_id in self.sides[name].known:
            self.cut(channel_id)
        self.sides[name] = self.start(name)

    def cut(self, channel_id: bytes) -> None:
        self.dead.add(channel_id)
        for key in self.queues:
            if key[0] == channel_id:
                self.queues[key].clear()

    def deliver(self, key: tuple[bytes, Lane, str]) -> None:
        channel_id, lane, sender = key
        receiver = self.sides["ba"["ab".index(sender)]]
        receiver.hear(channel_id, lane, self.queues[key].popleft())

    def waiting(self) -> list[tuple[bytes, Lane, str]]:
        return [key for key, queue in self.queues.items() if queue]

    def settle(self) -> None:
        while self.waiting():
            self.deliver(self.waiting()[0])

    def act(self, choice: int, where: int) -> None:
        """One of the things that can happen next."""
        name = "ab"[where % 2]
        if choice < 50 and (waiting := self.waiting()):
            self.deliver(waiting[where % len(waiting)])
        elif choice < 60:
            self.sides[name].dial()
        elif choice < 85:
            self.sides[name].send(Lane(where // 2 % 2), where)
        elif choice < 90 and (known := list(self.sides[name].known)):
            self.cut(known[where % len(known)])
        elif choice < 97:
            self.sides[name].notice()
        elif choice < 98:
            self.restart(name)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 99), st.integers(0, 63)), max_size=120))
def test_both_sides_see_the_same_sessions_and_miss_nothing_within_one(actions: list[tuple[int, int]]) -> None:
    world = World()
    for choice, where in actions:
        world.act(choice, where)
    world.settle()
    for _ in range(2):  # what one side lets go, the other notices
        for side in world.sides.values():
            side.notice()
        world.settle()
    world.sides["b"].dial()
    world.settle()
    in_use = [side.channels.in_use for side in world.sides.values()]
    assert all(in_use)
    assert len({channel.id for channel in in_use if channel}) == 1
    for (channel_id, lane, receiver), numbers in world.received.items():
        sent = world.sent[channel_id, lane, "ba"["ab".index(receiver)]]
        assert numbers == sent[: len(numbers)]


def open_channel(
    channels: PeerChannels, name: bytes, session: bytes, *, dialled: bool
) -> tuple[Channel, list[Step]]:
    channel = Channel(channels.peer, name, dialled=dialled, heard_s=0.0)
    channel.routes = dict.fromkeys(Lane)
    channels.add(channel)
    return channel, [step for lane in Lane for step in channels.greet(channel, lane, session)]


def test_the_leader_keeps_what_it_picked_until_it_is_lost() -> None:
    channels = PeerChannels("tokyo", leads=True)
    first, steps = open_channel(channels, b"1", b"s", dialled=True)
    assert steps == [Opened("tokyo"), Pick(first)]
    second, steps = open_channel(channels, b"2", b"s", dialled=False)
    assert steps == []
    assert channels.in_use is first
    assert channels.lose(first, "gone") == [
        Drop(first, "gone"),
        Closed("tokyo", "gone"),
        Opened("tokyo"),
        Pick(second),
    ]
    assert channels.lose(first, "gone") == []


def test_the_follower_waits_to_be_told() -> None:
    channels = PeerChannels("tokyo", leads=False)
    first, steps = open_channel(channels, b"1", b"s", dialled=True)
    assert steps == []
    second, steps = open_channel(channels, b"2", b"s", dialled=False)
    assert steps == []
    assert channels.follow(second) == [Opened("tokyo")]
    assert channels.follow(second) == []
    moved = "tokyo has moved to another connection"
    assert channels.follow(first) == [Drop(second, moved), Closed("tokyo", moved), Opened("tokyo")]


def test_a_peer_that_connects_again_has_given_up_its_old_connection() -> None:
    channels = PeerChannels("tokyo", leads=True)
    ours, _ = open_channel(channels, b"1", b"s", dialled=True)
    first, _ = open_channel(channels, b"2", b"s", dialled=False)
    second, steps = open_channel(channels, b"3", b"s", dialled=False)
    assert steps == [Drop(first, "tokyo has connected again")]
    assert channels.channels == [ours, second]


def test_a_new_process_ends_every_channel_of_the_old_one() -> None:
    channels = PeerChannels("tokyo", leads=True)
    first, _ = open_channel(channels, b"1", b"old", dialled=True)
    second, _ = open_channel(channels, b"2", b"old", dialled=False)
    third, steps = open_channel(channels, b"3", b"new", dialled=False)
    why = "the process of tokyo was replaced"
    assert steps == [
        Drop(first, why),
        Closed("tokyo", why),
        Drop(second, why),
        Opened("tokyo"),
        Pick(third),
    ]
    fourth, steps = open_channel(channels, b"4", b"old", dialled=False)
    assert isinstance(steps[0], Rejected)
    assert steps[0].reason == "replayed"
    assert isinstance(steps[1], Drop)
    assert steps[1].channel is fourth
    assert channels.in_use is third


@pytest.mark.parametrize("leads", [True, False])
def test_silence_and_breaks_are_noticed_together(leads: bool) -> None:
    channels = PeerChannels("tokyo", leads=leads)
    first, _ = open_channel(channels, b"1", b"s", dialled=True)
    second, _ = open_channel(channels, b"2", b"s", dialled=False)
    channels.follow(first)
    second.heard_s = 5.0
    assert channels.expire(9.0, 10.0) == []
    second.broken = "pulled"
    assert channels.expire(9.0, 10.0) == [], "what it has still to say gets until the next time"
    silent = "tokyo was silent for 10 s"
    assert channels.expire(11.0, 10.0) == [
        Drop(first, silent),
        Closed("tokyo", silent),
        Drop(second, "pulled"),
    ]
    third, _ = open_channel(channels, b"3", b"s", dialled=True)
    channels.forgive(30.0)
    assert channels.expire(40.0, 10.0) == []
    assert third in channels.channels
