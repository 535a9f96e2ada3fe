"""A hostile site, against the production gossip: whatever it says is refused by its right name, and it is quarantined."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest

from p2pcodistill.checkpoint.manifest import (
    MIN_CHUNK_BYTES,
    Manifest,
    SignedManifest,
    Version,
    digest_chunks,
    sign_manifest,
)
from p2pcodistill.errors import (
    ChecksumError,
    FloodedError,
    MalformedError,
    OversizedError,
    ReplayedError,
    SignatureError,
)
from p2pcodistill.gossip import events as gossip
from p2pcodistill.gossip.codec import decode_message
from p2pcodistill.gossip.membership import members_digest
from p2pcodistill.gossip.messages import PROTOCOL_VERSION, Hello, Payload, Refusal
from p2pcodistill.gossip.protocol import Gossip
from p2pcodistill.simulation.hostile import FLOOD_PER_TICK, TICK_S, Deed, HostileSite, Spoken
from p2pcodistill.simulation.virtual.run import seeded_identity
from p2pcodistill.telemetry.node_events import PeerQuarantined, Refused, VersionAnnounced

NAMES = ("berlin", "tokyo", "lima")
IDENTITIES = {name: seeded_identity(0, name) for name in NAMES}
PUBLIC = {name: identity.public for name, identity in IDENTITIES.items()}
DATA = bytes(range(256)) * 100
SCHEMA = bytes(32)


def newest() -> SignedManifest:
    manifest = Manifest(
        run="run",
        origin="tokyo",
        version=Version(3, 50),
        base=None,
        codec="fp16",
        schema_hash=SCHEMA,
        num_fp16_bytes=len(DATA),
        num_bytes=len(DATA),
        chunk_bytes=MIN_CHUNK_BYTES,
        chunk_digests=digest_chunks(DATA, MIN_CHUNK_BYTES),
    )
    return sign_manifest(manifest, IDENTITIES["tokyo"])


class Encounter:
    """Berlin, a student of tokyo and lima, in a session with tokyo, which does as it is told."""

    def __init__(self, does: Deed, *, has_published: bool = True, seed: int = 0) -> None:
        digest = members_digest(PUBLIC)
        self.hostile = HostileSite(
            "tokyo",
            IDENTITIES["tokyo"],
            does,
            hello=Hello(PROTOCOL_VERSION, "run", digest, bytes(32), 3, 0),
            newest=newest() if has_published else None,
            others=["berlin", "lima"],
            seed=seed,
        )
        self.berlin = Gossip(
            "berlin", "run", PUBLIC, ["tokyo", "lima"], ["lima"], digest, bytes(32), 1, {}, [], {},
            max_frame_bytes=1 << 20, sign=IDENTITIES["berlin"].sign,
        )  # fmt: skip
        self.now_s = 0.0
        self.actions: list[gossip.Action] = []
        self.said: list[Payload] = []
        greeting = self.hostile.opened("berlin")
        self.feed(gossip.PeerOpened("tokyo"))
        self.take(greeting)

    def feed(self, event: gossip.Event) -> None:
        for action in self.berlin.handle(event, self.now_s):
            self.actions.append(action)
            match action:
                case gossip.SendPayload("tokyo", _, payload):
                    self.take(self.hostile.received("berlin", payload))
                case gossip.BeginFetch(signed):
                    self.feed(gossip.FetchBegun(signed.frame_id, frozenset()))

    def take(self, spoken: list[Spoken]) -> None:
        for peer, _, payload in spoken:
            assert peer == "berlin"
            self.said.append(payload)
            self.feed(gossip.PayloadReceived("tokyo", payload))

    def tick(self) -> None:
        self.now_s += TICK_S
        self.take(self.hostile.tick())
        self.feed(gossip.Ticked())

    def reports(self, kind: type[Any]) -> list[Any]:
        return [a.event for a in self.actions if isinstance(a, gossip.Report) and isinstance(a.event, kind)]

    @property
    def refusals(self) -> Counter[str]:
        return Counter(refused.reason for refused in self.reports(Refused))


REASONS: dict[Deed, set[str]] = {
    "garbage": {MalformedError.reason, OversizedError.reason},
    "replay": {ReplayedError.reason},
    "forge": {SignatureError.reason},
    "flood": {FloodedError.reason},
}


@pytest.mark.parametrize("has_published", [True, False])
@pytest.mark.parametrize("does", list(REASONS))
def test_every_misdeed_is_refused_by_name_until_its_author_is_quarantined(
    does: Deed, has_published: bool
) -> None:
    encounter = Encounter(does, has_published=has_published)
    for _ in range(30):
        encounter.tick()
    assert encounter.refusals.keys() >= REASONS[does]
    (quarantined,) = encounter.reports(PeerQuarantined)
    assert quarantined.peer == "tokyo"
    assert not [action for action in encounter.actions if isinstance(action, gossip.StoreChunk)]
    assert not encounter.berlin.students_finished, "its student is lima, who has said nothing"
    num_misdeeds = encounter.hostile.num_misdeeds
    encounter.tick()
    assert encounter.hostile.num_misdeeds == num_misdeeds > 20, "to whom does not listen it says nothing"


def test_it_goes_on_when_its_quarantine_is_over() -> None:
    encounter = Encounter("garbage")
    encounter.tick()
    (first,) = encounter.reports(PeerQuarantined)
    encounter.now_s += first.duration_s
    for _ in range(4):
        encounter.tick()
    _, second = encounter.reports(PeerQuarantined)
    assert second.duration_s == 2 * first.duration_s


def test_chunks_that_are_not_those_announced_are_refused() -> None:
    encounter = Encounter("forge")
    announced = encounter.hostile.publish(DATA, 60, "fp16", SCHEMA)
    encounter.take(announced)
    assert ChecksumError.reason in encounter.refusals
    assert not [action for action in encounter.actions if isinstance(action, gossip.StoreChunk)]


def test_what_it_publishes_is_served_to_the_byte_in_the_right_order_of_versions() -> None:
    encounter = Encounter("ruin")
    encounter.take(encounter.hostile.publish(DATA, 75, "fp16", SCHEMA))
    chunks = [action.data for action in encounter.actions if isinstance(action, gossip.StoreChunk)]
    assert b"".join(chunks) == DATA
    (announced,) = encounter.reports(VersionAnnounced)
    assert (announced.origin, announced.incarnation, announced.step) == ("tokyo", 3, 75)
    assert encounter.hostile.last_step == 75
    encounter.tick()
    assert not encounter.refusals


def test_a_flood_is_one_and_the_same_seed_says_the_same() -> None:
    said = []
    for seed in (0, 0, 1):
        encounter = Encounter("flood", seed=seed)
        assert len(encounter.hostile.tick()) >= FLOOD_PER_TICK // 2
        garbage = Encounter("garbage", seed=seed)
        garbage.tick()
        said.append(garbage.said)
    assert said[0] == said[1] != said[2]


def test_it_repeats_what_it_has_heard() -> None:
    encounter = Encounter("replay")
    heard = encounter.said[:0]
    encounter.hostile.received("berlin", marker := (b"\x93\x0d\x01\x02",))
    for _ in range(20):
        heard += [spoken.payload for spoken in encounter.hostile.tick()]
    assert marker in heard
    encounter.hostile.received("berlin", (bytes(1 << 20),))
    assert all(len(spoken.payload[0]) < 1 << 20 for _ in range(50) for spoken in encounter.hostile.tick())


def test_it_says_hello_again_to_who_has_changed_its_mind() -> None:
    encounter = Encounter("garbage")
    refusal = next(
        action.payload
        for _ in range(10)
        for action in [*encounter.actions, encounter.tick()]
        if isinstance(action, gossip.SendPayload) and isinstance(decode_message(action.payload), Refusal)
    )
    assert encounter.hostile.received("berlin", refusal) == []
    hello = next(a.payload for a in encounter.actions if isinstance(a, gossip.SendPayload))
    (answer, *_) = encounter.hostile.received("berlin", hello)
    assert isinstance(decode_message(answer.payload), Hello)
