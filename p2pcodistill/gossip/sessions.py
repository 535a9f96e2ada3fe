"""How sessions with peers begin, are refused and end, as actions.

`membership` knows how far each has come, `trust` who is kept out, `health` who answers; here it is put together.
"""

from __future__ import annotations

from collections.abc import Callable

from p2pcodistill.errors import HelloMismatchError, QuarantinedError, RefusedError, RevokedError
from p2pcodistill.gossip.events import Action, Report, send
from p2pcodistill.gossip.health import Health
from p2pcodistill.gossip.membership import Membership, SessionState
from p2pcodistill.gossip.messages import MAX_WHY_CHARS, Hello, Refusal
from p2pcodistill.gossip.trust import MAX_REFUSALS, Trust
from p2pcodistill.telemetry import node_events


class Sessions:
    """The sessions of one site."""

    def __init__(
        self,
        membership: Membership,
        trust: Trust,
        health: Health,
        *,
        known_incarnation: Callable[[str], int],
        begin: Callable[[str, Hello], list[Action]],
        end: Callable[[str, float], list[Action]],
    ) -> None:
        """`begin` is called when a peer becomes ready, `end` when it is so no more; `known_incarnation` is that of one."""
        self._membership, self._trust, self._health = membership, trust, health
        self._known_incarnation, self._begin, self._end = known_incarnation, begin, end

    def open(self, peer: str, now_s: float) -> list[Action]:
        """The transport has a session with `peer`."""
        leaving = self._leave(peer, "a new session took its place", now_s)
        return [*leaving, self._say_hello(peer)]

    def close(self, peer: str, why: str, now_s: float) -> list[Action]:
        """The transport has it no more."""
        leaving = self._leave(peer, why, now_s)
        self._membership.close(peer)
        return leaving

    def greet(self, peer: str, hello: Hello, now_s: float) -> list[Action]:
        """`peer` said hello: it becomes ready, or is refused."""
        try:
            self._trust.check(peer, now_s)
            self._membership.accept(peer, hello)
        except (HelloMismatchError, QuarantinedError, RevokedError) as error:
            return self._shut_out(peer, error, now_s)
        actions: list[Action] = [Report(node_events.PeerConnected(peer))]
        ping = self._health.open(peer, now_s)
        if ping is not None:
            actions.append(send(peer, ping))
        return actions + self._begin(peer, hello)

    def greet_again(self, peer: str) -> list[Action]:
        """One side refused the session, and does so no more: it begins once more."""
        if self._membership.state_of(peer) not in (SessionState.REFUSED, SessionState.REFUSED_BY_PEER):
            return []
        return [self._say_hello(peer)]

    def release(self, now_s: float) -> list[Action]:
        """Time has passed: those whose quarantine is over may come back."""
        return [action for peer in self._trust.take_released(now_s) for action in self.greet_again(peer)]

    def refuse(self, peer: str, error: RefusedError, now_s: float) -> list[Action]:
        """Something that `peer` sent is refused. If that happens all the time, it is not listened to for a while."""
        refused = Report(node_events.Refused(peer, error.reason, str(error)))
        return [refused, *self.count_refusal(peer, error.reason, now_s)]

    def count_refusal(self, peer: str, reason: str, now_s: float) -> list[Action]:
        """The same for what has been reported."""
        duration_s = self._trust.count_refusal(peer, reason, now_s)
        if duration_s is None:
            return []
        actions: list[Action] = [Report(node_events.PeerQuarantined(peer, reason, MAX_REFUSALS, duration_s))]
        try:
            self._trust.check(peer, now_s)
        except QuarantinedError as error:
            actions += self._shut_out(peer, error, now_s)
        return actions

    def revoke(self, member: str, why: str, now_s: float) -> list[Action]:
        """`member` is no longer trusted."""
        self._trust.revoke(member, why)
        actions: list[Action] = [Report(node_events.MemberTrustChanged(member, False, why))]
        if self._membership.state_of(member) in (SessionState.AWAITING_HELLO, SessionState.READY):
            try:
                self._trust.check(member, now_s)
            except RevokedError as error:
                actions += self._shut_out(member, error, now_s)
        return actions

    def be_refused(self, peer: str, reason: str, why: str, now_s: float) -> list[Action]:
        """`peer` refuses the session."""
        why = f"{peer} refuses us: {why}"
        leaving = self._leave(peer, why, now_s)
        self._membership.refuse(peer, by_peer=True)
        return [*leaving, Report(node_events.Refused(peer, reason, why))]

    # --- inside ------------------------------------------------------------------------------------------------------

    def _say_hello(self, peer: str) -> Action:
        return send(peer, self._membership.open(peer, known_incarnation=self._known_incarnation(peer)))

    def _leave(self, peer: str, why: str, now_s: float) -> list[Action]:
        if not self._membership.is_ready(peer):
            return []
        self._health.close(peer)
        return [*self._end(peer, now_s), Report(node_events.PeerDisconnected(peer, why))]

    def _shut_out(self, peer: str, error: RefusedError, now_s: float) -> list[Action]:
        """Refuse the session, and say so."""
        leaving = self._leave(peer, str(error), now_s)
        self._membership.refuse(peer)
        return [
            *leaving,
            send(peer, Refusal(error.reason, str(error)[:MAX_WHY_CHARS])),
            Report(node_events.Refused(peer, error.reason, str(error))),
        ]
