"""Announcements: the newest version wins; everything else is refused by name."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from p2pcodistill.checkpoint.manifest import MAX_FRAME_BYTES, MIN_CHUNK_BYTES, claimed_origin, sign_manifest
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
from p2pcodistill.gossip.messages import Announce, CatchUp

CAP_BYTES = 8 * MIN_CHUNK_BYTES


def announcements_of(sites: Any, **changes: Any) -> Announcements:
    settings = {
        "run": "run",
        "teachers": {"tokyo": sites.members["tokyo"], "lima": sites.members["lima"]},
        "held": {},
        "pinned_schemas": {},
        "max_chunk_bytes": 4 * MIN_CHUNK_BYTES,
        "max_frame_bytes": CAP_BYTES,
    }
    return Announcements(**(settings | changes))


def announce(frame: Any) -> Announce:
    return Announce(frame.signed.body, frame.signed.signature)


def told(sites: Any, *frames: Any) -> Announcements:
    """What knows these frames from announcements."""
    announcements = announcements_of(sites)
    for frame in frames:
        accept(announcements, frame.signed.manifest.origin, announce(frame))
    return announcements


def accept(announcements: Announcements, peer: str, announced: Announce) -> Accepted | None:
    return announcements.accept(peer, claimed_origin(announced.body), announced)


def collect(
    announcements: Announcements, peer: str, announced: Announce, asked: CatchUp | None
) -> Accepted | None:
    return announcements.collect(peer, claimed_origin(announced.body), announced, asked)


def path_of(*frames: Any) -> list[Announce]:
    last = len(frames) - 1
    return [Announce(f.signed.body, f.signed.signature, last - index) for index, f in enumerate(frames)]


def test_the_newest_version_wins(sites: Any) -> None:
    announcements = announcements_of(sites)
    first = accept(announcements, "tokyo", announce(sites.frame("tokyo", 50)))
    second = accept(announcements, "tokyo", announce(sites.frame("tokyo", 10, incarnation=2)))

    assert (first.is_new, first.pins_schema) == (True, True)
    assert (second.is_new, second.pins_schema) == (True, False)
    assert announcements.known_incarnation("tokyo") == 2
    assert announcements.known_incarnation("lima") == 0


def test_the_same_announcement_again_is_accepted_but_not_new(sites: Any) -> None:
    frame = sites.frame("tokyo", 50)
    announcements = told(sites, frame)

    assert accept(announcements, "tokyo", announce(frame)) == Accepted((frame.signed,), False, False)


def test_what_the_store_holds_is_known(sites: Any) -> None:
    frame = sites.frame("tokyo", 50, incarnation=3)
    announcements = announcements_of(
        sites, held={"tokyo": frame.version}, pinned_schemas={"tokyo": frame.signed.manifest.schema_hash}
    )

    assert announcements.known_incarnation("tokyo") == 3
    assert not accept(announcements, "tokyo", announce(frame)).is_new
    with pytest.raises(ReplayedError):
        accept(announcements, "tokyo", announce(sites.frame("tokyo", 49, incarnation=3)))


REFUSALS: list[tuple[str, dict[str, Any], type[RefusedError], str]] = [
    ("stranger", {"origin": "stranger"}, UnknownPeerError, "no teacher of this site"),
    ("tokyo", {"signer": "lima"}, SignatureError, "does not verify"),
    (
        "tokyo",
        {"origin": "lima", "signer": "tokyo"},
        SignatureError,
        "tokyo announced a checkpoint in the name of 'lima': .*not verify",
    ),
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
    announcements = told(sites, first)

    with pytest.raises(error, match=words):
        accept(announcements, peer, announce(sites.frame(**({"origin": "tokyo", "step": 51} | change))))

    assert not accept(announcements, "tokyo", announce(first)).is_new
    assert accept(announcements, "tokyo", announce(sites.frame("tokyo", 51))) == Accepted(
        (sites.frame("tokyo", 51).signed,), is_new=True, pins_schema=False
    )


def test_a_refused_first_announcement_pins_nothing(sites: Any) -> None:
    announcements = announcements_of(sites)
    with pytest.raises(ReplayedError):
        accept(announcements, "tokyo", announce(sites.frame("tokyo", 1, run="other", schema="other")))

    assert accept(announcements, "tokyo", announce(sites.frame("tokyo", 1))).pins_schema


def test_a_higher_incarnation_may_bring_another_schema_which_is_pinned_from_then_on(sites: Any) -> None:
    first = sites.frame("tokyo", 50, incarnation=2)
    announcements = told(sites, first)

    mended = accept(announcements, "tokyo", announce(sites.frame("tokyo", 1, incarnation=3, schema="wider")))
    again = accept(announcements, "tokyo", announce(sites.frame("tokyo", 2, incarnation=3, schema="wider")))

    assert (mended.is_new, mended.pins_schema) == (True, True)
    assert (again.is_new, again.pins_schema) == (True, False)
    with pytest.raises(SchemaMismatchError, match="incarnation 3"):
        accept(announcements, "tokyo", announce(sites.frame("tokyo", 3, incarnation=3)))
    with pytest.raises(ReplayedError):
        accept(announcements, "tokyo", announce(sites.frame("tokyo", 60, incarnation=2)))


def test_a_pin_without_a_known_version_gives_way(sites: Any) -> None:
    """It was pinned for a frame that never arrived whole; under which incarnation is not remembered."""
    announcements = announcements_of(sites, pinned_schemas={"tokyo": bytes(32)})

    assert accept(announcements, "tokyo", announce(sites.frame("tokyo", 50))).pins_schema


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
        accept(announcements, "tokyo", Announce(signed.body, signed.signature))

    assert announcements.known_incarnation("tokyo") == 0
    largest = sites.frame("tokyo", 40, num_chunks=8)
    assert accept(announcements, "tokyo", announce(largest)).pins_schema


def test_signed_nonsense_is_malformed(sites: Any) -> None:
    from p2pcodistill.checkpoint.manifest import SIGNATURE_DOMAIN

    body = b"nonsense"
    signature = sites.identities["tokyo"].sign(SIGNATURE_DOMAIN + body)

    with pytest.raises(MalformedError):
        accept(announcements_of(sites), "tokyo", Announce(body, signature))


# --- chains --------------------------------------------------------------------------------------------------


def test_a_delta_frame_and_a_keyframe_of_one_version_are_the_same_checkpoint(sites: Any) -> None:
    delta, keyframe = sites.frame("tokyo", 50, base=49), sites.frame("tokyo", 50)
    announcements = told(sites, delta)

    assert not accept(announcements, "tokyo", announce(keyframe)).is_new
    assert not accept(announcements, "tokyo", announce(delta)).is_new
    with pytest.raises(ReplayedError, match="two different checkpoints"):
        accept(announcements, "tokyo", announce(sites.frame("tokyo", 50, base=48)))


def test_a_path_counts_when_it_is_complete(sites: Any) -> None:
    frames = sites.chain("tokyo", 2)
    announcements = announcements_of(sites, max_frame_bytes=1 << 20)
    first, second, third = path_of(*frames)

    assert collect(announcements, "tokyo", first, CatchUp(None)) is None
    assert collect(announcements, "tokyo", second, CatchUp(None)) is None
    assert announcements.known_incarnation("tokyo") == 0
    accepted = collect(announcements, "tokyo", third, CatchUp(None))

    signed = tuple(frame.signed for frame in frames)
    assert accepted == Accepted(signed, is_new=True, pins_schema=True)
    again = [collect(announcements, "tokyo", part, CatchUp(None)) for part in (first, second, third)]
    assert again == [None, None, Accepted(signed, is_new=False, pins_schema=False)]


def refused_in_a_path(sites: Any, case: str) -> list[Announce]:
    """A path from step 10 to 13 in which something is wrong."""
    frames = [sites.frame("tokyo", step, base=step - 1, num_chunks=1) for step in (11, 12, 13)]
    first, _, third = path_of(*frames)
    return {
        "starts elsewhere": path_of(*frames[1:]),
        "has a gap": path_of(frames[0], frames[2]),
        "lacks a part": [first, third],
        "changes tensors": path_of(*frames[:2], sites.frame("tokyo", 13, base=12, schema="other")),
        "is forged": path_of(frames[0], sites.frame("tokyo", 12, base=11, signer="lima"), frames[2]),
        "goes back": path_of(*frames[:1]),
    }[case]


@pytest.mark.parametrize(
    ("case", "error"),
    [
        ("starts elsewhere", MalformedError),
        ("has a gap", MalformedError),
        ("lacks a part", MalformedError),
        ("changes tensors", SchemaMismatchError),
        ("is forged", SignatureError),
        ("goes back", ReplayedError),
    ],
)
def test_a_path_that_is_wrong_anywhere_is_refused_once_and_as_a_whole(
    sites: Any, case: str, error: type[RefusedError]
) -> None:
    announcements = told(sites, sites.frame("tokyo", 12))
    asked = CatchUp(sites.frame("tokyo", 10).version)
    errors = []
    for part in refused_in_a_path(sites, case):
        try:
            assert collect(announcements, "tokyo", part, asked) is None
        except RefusedError as refusal:
            errors.append(type(refusal))
    assert errors == [error]

    whole = path_of(*(sites.frame("tokyo", step, base=step - 1, num_chunks=1) for step in (11, 12, 13)))
    assert [collect(announcements, "tokyo", part, asked) for part in whole][-1] is not None


def test_a_path_that_nobody_asked_for_is_refused_once(sites: Any) -> None:
    announcements = announcements_of(sites)
    parts = path_of(*(sites.frame("tokyo", step, base=step - 1 or None, num_chunks=1) for step in (1, 2, 3)))

    with pytest.raises(MalformedError, match="nobody asked"):
        collect(announcements, "tokyo", parts[0], None)
    assert [collect(announcements, "tokyo", part, None) for part in parts[1:]] == [None, None]
    assert announcements.known_incarnation("tokyo") == 0


def test_a_path_ends_with_its_session(sites: Any) -> None:
    first, second = path_of(
        *(sites.frame("tokyo", step, base=step - 1 or None, num_chunks=1) for step in (1, 2))
    )
    announcements = announcements_of(sites)
    collect(announcements, "tokyo", first, CatchUp(None))
    announcements.close("tokyo")

    with pytest.raises(MalformedError):
        collect(announcements, "tokyo", second, CatchUp(None))
