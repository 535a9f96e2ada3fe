"""Announcements: the newest version wins; everything else is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from p2pcodistill.checkpoint.manifest import MAX_FRAME_BYTES, MIN_CHUNK_BYTES, sign_manifest
from p2pcodistill.errors import (
    MalformedError,
    OversizedError,
    RefusedError,
    ReplayedError,
    SchemaMismatchError,
    SignatureError,
    UnknownPeerError,
)
from p2pcodistill.gossip.announce import Accepted, Announcements
from p2pcodistill.gossip.messages import Announce

CAP_BYTES = 8 * MIN_CHUNK_BYTES


def announcements_of(sites: Any, **changes: Any) -> Announcements:
    settings = {
        "site": "berlin",
        "run": "run",
        "teachers": {"tokyo": sites.members["tokyo"], "lima": sites.members["lima"]},
        "newest": {},
        "pinned_schemas": {},
        "max_chunk_bytes": 4 * MIN_CHUNK_BYTES,
        "max_frame_bytes": CAP_BYTES,
    }
    return Announcements(**(settings | changes))


def announce(frame: Any) -> Announce:
    return Announce(frame.signed.body, frame.signed.signature)


def test_the_newest_version_wins(sites: Any) -> None:
    announcements = announcements_of(sites)
    first = announcements.accept("tokyo", announce(sites.frame("tokyo", 50)))
    second = announcements.accept("tokyo", announce(sites.frame("tokyo", 10, incarnation=2)))

    assert (first.is_new, first.pins_schema) == (True, True)
    assert (second.is_new, second.pins_schema) == (True, False)
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

    assert announcements.known_incarnation("berlin") == announcements.known_incarnation("tokyo") == 3
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
    ("tokyo", {"schema": "wider"}, SchemaMismatchError, "other tensors .* than before in incarnation 1"),
    ("tokyo", {"num_chunks": 9}, OversizedError, "a frame of 132072 bytes, over this site's cap of 131072"),
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

    assert not announcements.accept("tokyo", announce(first)).is_new
    assert announcements.accept("tokyo", announce(sites.frame("tokyo", 51))) == Accepted(
        sites.frame("tokyo", 51).signed, is_new=True, pins_schema=False
    )


def test_a_refused_first_announcement_pins_nothing(sites: Any) -> None:
    announcements = announcements_of(sites)
    with pytest.raises(ReplayedError):
        announcements.accept("tokyo", announce(sites.frame("tokyo", 1, run="other", schema="other")))

    assert announcements.accept("tokyo", announce(sites.frame("tokyo", 1))).pins_schema


def test_a_higher_incarnation_may_bring_another_schema_which_is_pinned_from_then_on(sites: Any) -> None:
    first = sites.frame("tokyo", 50, incarnation=2)
    announcements = announcements_of(
        sites, newest={"tokyo": first.signed}, pinned_schemas={"tokyo": first.signed.manifest.schema_hash}
    )

    mended = announcements.accept("tokyo", announce(sites.frame("tokyo", 1, incarnation=3, schema="wider")))
    again = announcements.accept("tokyo", announce(sites.frame("tokyo", 2, incarnation=3, schema="wider")))

    assert (mended.is_new, mended.pins_schema) == (True, True)
    assert (again.is_new, again.pins_schema) == (True, False)
    with pytest.raises(SchemaMismatchError, match="incarnation 3"):
        announcements.accept("tokyo", announce(sites.frame("tokyo", 3, incarnation=3)))
    with pytest.raises(ReplayedError):
        announcements.accept("tokyo", announce(sites.frame("tokyo", 60, incarnation=2)))


def test_a_pin_without_a_known_version_gives_way(sites: Any) -> None:
    """It was pinned for a frame that never arrived whole; under which incarnation is not remembered."""
    announcements = announcements_of(sites, pinned_schemas={"tokyo": bytes(32)})

    assert announcements.accept("tokyo", announce(sites.frame("tokyo", 50))).pins_schema


def test_the_largest_frame_that_anyone_may_sign_is_refused_and_pins_nothing(sites: Any) -> None:
    announcements = announcements_of(sites, max_chunk_bytes=1 << 20)
    manifest = replace(
        sites.frame("tokyo", 50).signed.manifest,
        schema_hash=bytes(32),
        num_bytes=MAX_FRAME_BYTES,
        chunk_bytes=1 << 20,
        chunk_digests=(bytes(32),) * (MAX_FRAME_BYTES >> 20),
    )
    signed = sign_manifest(manifest, sites.identities["tokyo"])

    with pytest.raises(OversizedError, match="over this site's cap"):
        announcements.accept("tokyo", Announce(signed.body, signed.signature))

    assert announcements.known_incarnation("tokyo") == 0
    largest = sites.frame("tokyo", 40, num_chunks=8)
    assert announcements.accept("tokyo", announce(largest)).pins_schema


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
