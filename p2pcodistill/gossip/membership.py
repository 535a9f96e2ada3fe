"""Who is there: sessions with peers, what both sides must agree on before anything else, and incarnations.

A session begins when the transport opens it and is *ready* once the peer's hello was accepted. A session that one
side refused stays silent until the transport opens a new one: nothing is sent in it and nothing in it is listened to. Only
the side that refused may end that, with another hello, which the other side answers with its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum, auto

import msgpack

from p2pcodistill.errors import HelloMismatchError
from p2pcodistill.gossip.messages import PROTOCOL_VERSION, Hello
from p2pcodistill.identity import PublicIdentity

MAX_CREDIBLE_INCARNATION = 2**62
"""Above this nobody's claim raises an incarnation: one wrong neighbour must not use up all that there are."""


def members_digest(members: Mapping[str, PublicIdentity]) -> bytes:
    """SHA-256 of names and public identities in their order: equal exactly when two sites list the same members."""
    listed = [[name, public.signing_key, public.curve_key] for name, public in members.items()]
    return hashlib.sha256(msgpack.packb(["p2pcodistill-members-1", listed])).digest()


class SessionState(Enum):
    """How far a session has come."""

    AWAITING_HELLO = auto()
    READY = auto()
    REFUSED = auto()
    REFUSED_BY_PEER = auto()


@dataclass(slots=True)
class _Session:
    state: SessionState = SessionState.AWAITING_HELLO
    known_incarnation_of_us: int = 0


class Membership:
    """The sessions of one site, and its incarnation."""

    def __init__(
        self,
        *,
        run: str,
        members: tuple[str, ...],
        members_digest: bytes,
        topology_digest: bytes,
        incarnation: int,
    ) -> None:
        self.run = run
        self.members = members
        self.incarnation = incarnation
        self._members_digest = members_digest
        self._topology_digest = topology_digest
        self._sessions: dict[str, _Session] = {}
        self._ready: dict[str, None] = {}

    @property
    def ready_peers(self) -> tuple[str, ...]:
        """The peers whose hello was accepted in the current session, in the order of their hellos."""
        return tuple(self._ready)

    def is_ready(self, peer: str) -> bool:
        """Whether the peer's hello was accepted in the current session."""
        return peer in self._ready

    def state_of(self, peer: str) -> SessionState | None:
        """How far the session with `peer` has come; None when there is none."""
        session = self._sessions.get(peer)
        return session.state if session else None

    def open(self, peer: str, *, known_incarnation: int) -> Hello:
        """Begin a session; returns the hello to send. `known_incarnation` is the peer's, 0 for none."""
        self._sessions[peer] = _Session()
        self._ready.pop(peer, None)
        return Hello(
            PROTOCOL_VERSION,
            self.run,
            self._members_digest,
            self._topology_digest,
            self.incarnation,
            known_incarnation,
        )

    def close(self, peer: str) -> None:
        """End the session, if there is one."""
        self._sessions.pop(peer, None)
        self._ready.pop(peer, None)

    def accept(self, peer: str, hello: Hello) -> None:
        """Make the session ready. Raises HelloMismatchError, which names every difference and what to do."""
        differences = self._differences(peer, hello)
        if differences:
            raise HelloMismatchError("; ".join(differences))
        self._sessions[peer] = _Session(SessionState.READY, hello.known_incarnation_of_you)
        self._ready[peer] = None

    def refuse(self, peer: str, *, by_peer: bool = False) -> None:
        """Fall silent until a new session, or another hello of the side that refused."""
        state = SessionState.REFUSED_BY_PEER if by_peer else SessionState.REFUSED
        self._sessions[peer].state = state
        self._ready.pop(peer, None)

    def know(self, peer: str, known_incarnation: int) -> None:
        """A ready peer, or those it speaks for, have seen a checkpoint of this site under this incarnation."""
        session = self._sessions[peer]
        session.known_incarnation_of_us = max(session.known_incarnation_of_us, known_incarnation)

    def known_incarnation_of_us(self, peer: str) -> int:
        """The highest incarnation of this site that a ready peer has seen a checkpoint of, 0 for none."""
        return self._sessions[peer].known_incarnation_of_us

    def raise_incarnation(self, incarnation: int) -> None:
        """Publish under at least this incarnation from now on."""
        self.incarnation = max(self.incarnation, incarnation)

    def _differences(self, peer: str, hello: Hello) -> list[str]:
        if hello.protocol_version != PROTOCOL_VERSION:
            return [
                f"{peer} speaks version {hello.protocol_version} of the protocol, this site version "
                f"{PROTOCOL_VERSION}: install the same release of p2pcodistill on both"
            ]
        differences = []
        if hello.run != self.run:
            differences.append(
                f"{peer} belongs to run {hello.run!r}, this site to run {self.run!r}: give both the same run name"
            )
        if hello.members_digest != self._members_digest:
            differences.append(
                f"{peer} lists other members: both sites must list the same names with the same public "
                "identities in the same order"
            )
        elif hello.topology_digest != self._topology_digest:  # of other members it would differ anyway
            differences.append(
                f"{peer} has another topology: use the same topology, with the same weights, on both sites"
            )
        if hello.known_incarnation_of_you > max(MAX_CREDIBLE_INCARNATION, self.incarnation):
            differences.append(
                f"{peer} claims to know incarnation {hello.known_incarnation_of_you} of this site, which cannot be: "
                "check that site, and begin a new run"
            )
        return differences
