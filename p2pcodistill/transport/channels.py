"""Which connections there are with one peer, and which of them carries the session: decisions only, no sockets.

A *channel* is one dial: two connections, a lane each, under an id that lives once. Both sides may dial at the same time,
so there may be two channels; one carries payloads, the other stands by. Were each side to choose for itself, payloads
would overtake each other and one side could lose what the other believes delivered. So the side with the lower key
*leads*: of the channels that are complete it picks one, says so on both lanes ahead of any payload, and keeps it until it
is lost. The other side follows. Hence both see the same sessions, one for each time that a channel was picked.

Each process that runs a transport draws a session id. A greeting with a new one means that the peer's process was
replaced; its old channels are dropped at once, and never heard again: two processes that hold one key do not take turns.

Methods return steps for the caller to take, in their order.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from p2pcodistill.errors import MalformedError, ReplayedError
from p2pcodistill.gossip.messages import Lane
from p2pcodistill.gossip.window import LinkEstimate
from p2pcodistill.transport.base import Closed, Opened, Rejected
from p2pcodistill.transport.receipts import Deliveries, Receipts

_MAX_RETIRED_SESSIONS = 64


@dataclass(eq=False, slots=True)
class Channel:
    """One dial, by either side.

    `routes` is how the caller reaches each lane, `greeted` are the lanes on which the peer has greeted. `heard_s` is when
    the peer was last heard on either: a large payload may keep one busy for longer than anybody should stay silent.
    `broken` says why nothing can be sent any more; what is still on its way in, a peer's last words perhaps, gets from one
    `expire` to the next. `deliveries` and `receipts` count bulk, out and in; a timer runs for the next receipt
    while `receipt_is_due`.
    """

    peer: str
    id: bytes
    dialled: bool
    heard_s: float
    session: bytes | None = None
    routes: dict[Lane, Any] = field(default_factory=dict)
    greeted: set[Lane] = field(default_factory=set)
    broken: str | None = None
    was_broken: bool = False
    deliveries: Deliveries = field(default_factory=lambda: Deliveries(LinkEstimate()))
    receipts: Receipts = field(default_factory=Receipts)
    receipt_is_due: bool = False

    @property
    def complete(self) -> bool:
        """Whether both lanes have exchanged greetings."""
        return len(self.greeted) == len(Lane)


@dataclass(frozen=True, slots=True)
class Pick:
    """Tell the peer, on both lanes of `channel`, that the session runs there."""

    channel: Channel


@dataclass(frozen=True, slots=True)
class Drop:
    """`channel` is out of use: tell the peer if that is still possible, and let go of its connections."""

    channel: Channel
    why: str


Step: TypeAlias = Opened | Closed | Rejected | Pick | Drop


class PeerChannels:
    """The channels with one peer. `leads`: this side's key is the lower one."""

    def __init__(self, peer: str, *, leads: bool) -> None:
        self.peer = peer
        self.leads = leads
        self.channels: list[Channel] = []
        self.in_use: Channel | None = None
        self._session: bytes | None = None
        self._retired: deque[bytes] = deque(maxlen=_MAX_RETIRED_SESSIONS)

    def add(self, channel: Channel) -> None:
        """A dial begins, here or there."""
        self.channels.append(channel)

    def greet(self, channel: Channel, lane: Lane, session: bytes) -> list[Step]:
        """The peer greeted on `lane` of `channel`, in the name of the process `session`."""
        if channel not in self.channels:
            return []
        if session in self._retired:
            why = f"{self.peer} was replaced by a newer process: do two processes hold its key?"
            return [Rejected(self.peer, ReplayedError.reason, why), *self.lose(channel, why)]
        steps: list[Step] = []
        if self._session not in (None, session):
            self._retired.append(self._session)
            old = [c for c in self.channels if c.session is not None]
            steps += self._lose_all(old, f"the process of {self.peer} was replaced")
        self._session = session
        if not channel.dialled:
            others = [c for c in self.channels if c is not channel and not c.dialled]
            steps += self._lose_all(others, f"{self.peer} has connected again")
        if channel in self.channels:  # its other lane may have reached the process that was replaced
            channel.session = session
            channel.greeted.add(lane)
            steps += self._pick()
        return steps

    def follow(self, channel: Channel) -> list[Step]:
        """The peer says that the session runs on `channel`."""
        if channel is self.in_use or channel not in self.channels:
            return []
        if self.leads or len(channel.routes) < len(Lane):
            why = f"{self.peer} picks a connection that is not its to pick"
            return [Rejected(self.peer, MalformedError.reason, why)]
        steps = self.lose(self.in_use, f"{self.peer} has moved to another connection") if self.in_use else []
        self.in_use = channel
        return [*steps, Opened(self.peer)]

    def lose(self, channel: Channel, why: str) -> list[Step]:
        """`channel` is gone or given up."""
        if channel not in self.channels:
            return []
        self.channels.remove(channel)
        steps: list[Step] = [Drop(channel, why)]
        if channel is self.in_use:
            self.in_use = None
            steps += [Closed(self.peer, why), *self._pick()]
        return steps

    def expire(self, now_s: float, silence_timeout_s: float) -> list[Step]:
        """Give up the channels that were broken at the last call already, or have been silent for too long."""
        over = [c for c in self.channels if c.was_broken or now_s - c.heard_s > silence_timeout_s]
        for channel in self.channels:
            channel.was_broken = channel.broken is not None
        return self._lose_all(over, f"{self.peer} was silent for {silence_timeout_s:g} s")

    def forgive(self, now_s: float) -> None:
        """Count all silence from now on only."""
        for channel in self.channels:
            channel.heard_s = now_s

    def abandon(self) -> None:
        """Forget every channel, because this side is closing."""
        self.channels.clear()
        self.in_use = None

    def _lose_all(self, channels: list[Channel], why: str) -> list[Step]:
        for channel in channels:  # before the first is lost, so that none of the others is picked
            channel.broken = channel.broken or why
        return [step for channel in channels for step in self.lose(channel, channel.broken or why)]

    def _pick(self) -> list[Step]:
        if not self.leads or self.in_use is not None:
            return []
        self.in_use = next((c for c in self.channels if c.complete and c.broken is None), None)
        return [Opened(self.peer), Pick(self.in_use)] if self.in_use is not None else []
