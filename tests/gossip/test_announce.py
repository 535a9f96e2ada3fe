"""Announcements: the newest version wins; everything else is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from p2pcodistill.checkpoint.manifest import MIN_CHUNK_BYTES, Version
from p2pcodistill.errors import (
    MalformedError,
    OversizedError,
    RefusedError,
    ReplayedError,
    SchemaMismatchError,
    SignatureError,
    UnknownPeerError,
)
from p2pcodistill.gossip.announce import Announcements
from p2pcodistill.gossip.messages import Announce


def announcements_of(sites: Any, **changes: Any) -> Announcements:
    settings = {
        "site": "berlin",
        "run": "run",
        "teachers": {"tokyo": sites.members["tokyo"], "lima": sites.members["lima"]},
        "newest": {},
        "pinned_schemas": {},
        "max_chunk_bytes": 4 * MIN_CHUNK_BYTES,
    }
    return Announcements(**(settings | changes))


def announce(frame: Any) -> Announce:
    return Announce(frame.signed.body, frame.signed.signature)


def test_the_newest_version_wins(sites: Any) -> None:
    announcements = announcements_of(sites)
    assert announcements.newest_announced == {}

    first = announcements.accept("tokyo", announce(sites.frame("tokyo", 50)))
    second = announcements.accept("tokyo", announce(sites.frame("tokyo", 10, incarnation=2)))

    assert (first.is_new, first.pins_schema) == (True, True)
    assert (second.is_new, second.pins_schema) == (True, False)
    assert announcements.newest_announced == {"tokyo": Version(2, 10)}
    assert announcements.known_incarnation("tokyo") == 2
    assert announcements.known_incarnation("lima") == 0


def test_the_same_announcement_again_is_accepted_but_not_new(sites: Any) -> None:
    frame = sites.frame("tokyo", 50)
    announcements = announcements_of(sites, newest={"tokyo": frame.signed})

    accepted = announcements.accept("tokyo", announce(frame))

    assert not accepted.is_new
    assert accepted.signed == frame.signed


def test_what_the_store_holds_is_known(sites: Any) -> None:
    stored = {site: sites.frame(site, 50, incarnation=3).signed for site in ("berlin", "tokyo")}
    announcements = announcements_of(sites, newest=stored)

    assert announcements.newest_announced == {"tokyo": Version(3, 50)}
    assert announcements.known_incarnation("berlin") == 3
    with pytest.raises(ReplayedError):
        announcements.accept("tokyo", announce(sites.frame("tokyo", 49, incarnation=3)))


REFUSALS: list[tuple[str, dict[str, Any], type[RefusedError], str]] = [
    ("stranger", {"origin": "stranger"}, UnknownPeerError, "no teacher of this site"),
    ("tokyo", {"signer": "lima"}, SignatureError, "does not verify"),
    ("tokyo", {"origin": "lima", "signer": "tokyo"}, SignatureError, "tokyo signed .* in the name of 'lima'"),
    ("tokyo", {"run": "last week"}, ReplayedError, "belongs to run 'last week', not 'run'"),
    ("tokyo", {"step": 49}, ReplayedError, "step 49 of incarnation 1 again, after step 50"),
    (
        "tokyo",
        {"step": 50, "content": "other"},
        ReplayedError,
        "two different checkpoints of tokyo claim to be step 50",
    ),
    ("tokyo", {"schema": "wider"}, SchemaMismatchError, "other tensors"),
    ("tokyo", {"chunk_bytes": 4 * MIN_CHUNK_BYTES + 32}, OversizedError, "over this site's window"),
]


@pytest.mark.parametrize(("peer", "change", "error", "words"), REFUSALS)
def test_refusals(
    sites: Any, peer: str, change: dict[str, Any], error: type[RefusedError], words: str
) -> None:
    first = sites.frame("tokyo", 50)
    announcements = announcements_of(
        sites, newest={"tokyo": first.signed}, pinned_schemas={"tokyo": first.signed.manifest.schema_hash}
    )

    with pytest.raises(error, match=words):
        announcements.accept(peer, announce(sites.frame(**({"origin": "tokyo", "step": 51} | change))))

    assert announcements.newest_announced == {"tokyo": Version(1, 50)}
    assert announcements.accept("tokyo", announce(sites.frame("tokyo", 51))).is_new


def test_a_refused_first_announcement_pins_nothing(sites: Any) -> None:
    announcements = announcements_of(sites)
    with pytest.raises(ReplayedError):
        announcements.accept("tokyo", announce(sites.frame("tokyo", 1, run="other", schema="other")))

    assert announcements.accept("tokyo", announce(sites.frame("tokyo", 1))).pins_schema


def test_signed_nonsense_is_malformed(sites: Any) -> None:
    from p2pcodistill.checkpoint.manifest import SIGNATURE_DOMAIN

    body = b"nonsense"
    signature = sites.identities["tokyo"].sign(SIGNATURE_DOMAIN + body)

    with pytest.raises(MalformedError):
        announcements_of(sites).accept("tokyo", Announce(body, signature))


def test_only_the_newest_own_frame_is_announced(sites: Any) -> None:
    announcements = announcements_of(sites)
    assert announcements.announce_to("lima", known_incarnation=0) is None

    newer, older = sites.frame("berlin", 50), sites.frame("berlin", 40)
    assert announcements.publish(newer.signed)
    assert not announcements.publish(older.signed)

    assert announcements.announce_to("lima", known_incarnation=1) == announce(newer)


def test_nothing_is_announced_under_an_incarnation_that_the_student_has_left_behind(sites: Any) -> None:
    announcements = announcements_of(
        sites, newest={"berlin": sites.frame("berlin", 50, incarnation=2).signed}
    )
    assert announcements.announce_to("lima", known_incarnation=2) is not None
    assert announcements.announce_to("lima", known_incarnation=3) is None

    announcements.publish(sites.frame("berlin", 50, incarnation=4).signed)

    assert announcements.announce_to("lima", known_incarnation=3) is not None


def test_a_past_life_is_what_was_neither_remembered_nor_told(sites: Any) -> None:
    announcements = announcements_of(
        sites, newest={"berlin": sites.frame("berlin", 50, incarnation=2).signed}
    )
    assert not announcements.is_from_past_life("lima", 2)
    assert announcements.is_from_past_life("lima", 3)

    announcements.publish(sites.frame("berlin", 50, incarnation=4).signed)
    announcements.announce_to("lima", known_incarnation=2)

    assert not announcements.is_from_past_life("lima", 4)
    assert announcements.is_from_past_life("tokyo", 4)
