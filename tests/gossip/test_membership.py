"""Who may speak: what a hello must agree on, and what a refused session is worth."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from p2pcodistill.errors import HelloMismatchError
from p2pcodistill.gossip.membership import (
    MAX_CREDIBLE_INCARNATION,
    Membership,
    SessionState,
    members_digest,
)
from p2pcodistill.gossip.messages import PROTOCOL_VERSION, Hello


@pytest.fixture
def membership() -> Membership:
    return Membership(
        run="run",
        members=("berlin", "tokyo", "lima"),
        members_digest=b"m" * 32,
        topology_digest=b"t" * 32,
        incarnation=3,
    )


HELLO = Hello(PROTOCOL_VERSION, "run", b"m" * 32, b"t" * 32, incarnation=5, known_incarnation_of_you=2)


def test_a_session_goes_from_hello_to_ready_to_gone(membership: Membership) -> None:
    assert membership.state_of("tokyo") is None

    sent = membership.open("tokyo", known_incarnation=4)
    assert sent == Hello(PROTOCOL_VERSION, "run", b"m" * 32, b"t" * 32, 3, 4)
    assert membership.state_of("tokyo") is SessionState.AWAITING_HELLO
    assert membership.ready_peers == ()

    membership.accept("tokyo", HELLO)
    assert membership.state_of("tokyo") is SessionState.READY
    assert membership.known_incarnation_of_us("tokyo") == 2

    membership.close("tokyo")
    assert membership.state_of("tokyo") is None
    membership.close("tokyo")


def test_ready_peers_are_in_the_order_of_their_hellos(membership: Membership) -> None:
    for peer in ("lima", "tokyo", "berlin"):
        membership.open(peer, known_incarnation=0)
        membership.accept(peer, HELLO)
    membership.refuse("tokyo")

    assert membership.ready_peers == ("lima", "berlin")
    assert membership.is_ready("lima") and not membership.is_ready("tokyo")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"protocol_version": 1},
            "tokyo speaks version 1 of the protocol, this site version 5: install the same",
        ),
        ({"run": "other\x1b"}, r"run 'other\\x1b', this site to run 'run': give both the same run name"),
        ({"members_digest": bytes(32), "topology_digest": bytes(32)}, "tokyo lists other members: [^;]*$"),
        ({"topology_digest": bytes(32)}, "tokyo has another topology: use the same"),
        ({"run": "other", "topology_digest": bytes(32)}, "run 'other'.*; tokyo has another topology"),
        ({"known_incarnation_of_you": MAX_CREDIBLE_INCARNATION + 1}, "claims to know incarnation"),
    ],
)
def test_a_mismatch_is_named(membership: Membership, change: dict[str, Any], words: str) -> None:
    membership.open("tokyo", known_incarnation=0)

    with pytest.raises(HelloMismatchError, match=words):
        membership.accept("tokyo", replace(HELLO, **change))
    assert membership.ready_peers == ()


def test_incarnations_only_rise(membership: Membership) -> None:
    membership.raise_incarnation(7)
    membership.raise_incarnation(5)

    assert membership.incarnation == 7


def test_the_members_digest_sees_names_keys_and_order(sites: Any) -> None:
    members = dict(sites.members)
    digest = members_digest(members)

    assert members_digest(dict(members)) == digest
    others = [
        dict(reversed(members.items())),
        {name: public for name, public in members.items() if name != "lima"},
        members | {"lima": sites.identities["stranger"].public},
        {("rome" if name == "lima" else name): public for name, public in members.items()},
    ]
    assert len({digest, *map(members_digest, others)}) == 5
