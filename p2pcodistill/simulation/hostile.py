"""A member gone bad: it speaks the protocol with its real key, and says what no honest site would.

Pure, like the protocol that it abuses: sessions, payloads and ticks in, payloads out, and what it draws comes from a seed.
So real nodes meet it over ZeroMQ (`hostile_node`), and sites in virtual time over their links (`virtual.hostile`).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Literal, NamedTuple, TypeAlias

from p2pcodistill.checkpoint.manifest import (
    DIGEST_BYTES,
    MIN_CHUNK_BYTES,
    Manifest,
    SignedManifest,
    Version,
    digest_chunks,
    sign_manifest,
)
from p2pcodistill.errors import RefusedError
from p2pcodistill.gossip.codec import MAX_HEADER_BYTES, decode_message, encode_message
from p2pcodistill.gossip.finishing import finished_text
from p2pcodistill.gossip.messages import (
    Announce,
    Chunk,
    Finished,
    Gone,
    Hello,
    Lane,
    Message,
    Payload,
    Ping,
    Pong,
    Refusal,
    Want,
    lane_of,
)
from p2pcodistill.identity import Identity
from p2pcodistill.simulation.fault_config import Misdeed

TICK_S = 0.5
"""How often `tick` is to be called."""
FLOOD_PER_TICK = 2000
_MISDEEDS_PER_TICK = 10
_MAX_HEARD = 200
_MAX_HEARD_BYTES = 64 << 10
_MAX_SAID = 3
_MAX_GARBAGE_BYTES = 300

Deed: TypeAlias = Misdeed | Literal["ruin"]
"""What a scenario may order, and `ruin`: nothing is wrong but the weights in the frames that it is given to publish."""


class Spoken(NamedTuple):
    """Something to send within the present session with `peer`."""

    peer: str
    lane: Lane
    payload: Payload


class HostileSite:
    """What `site` says from now on. `num_misdeeds` counts what an honest site would not have said, per peer and payload.

    `hello` is what its members, run and topology are known by, `newest` the last manifest that it signed when it was honest
    (None: it had not published yet), `others` are the members that it can speak in the name of.
    """

    def __init__(
        self,
        site: str,
        identity: Identity,
        does: Deed,
        *,
        hello: Hello,
        newest: SignedManifest | None,
        others: Sequence[str],
        seed: int = 0,
    ) -> None:
        self.num_misdeeds = 0
        self._site, self._identity, self._does, self._hello = site, identity, does, hello
        self._others = tuple(others)
        self._rng = random.Random(f"hostile/{seed}/{site}")
        self._stranger = Identity.from_secrets(self._rng.randbytes(32), self._rng.randbytes(32))
        self._peers: dict[str, None] = {}
        self._heard: deque[Payload] = deque(maxlen=_MAX_HEARD)
        self._frames: dict[str, tuple[SignedManifest, bytes]] = {}  # that it can serve, by id
        self._last = self._made_up() if newest is None else newest.manifest
        self._said = deque([] if newest is None else [newest], maxlen=_MAX_SAID)

    # --- what happens to it ------------------------------------------------------------------------------------------

    def opened(self, peer: str) -> list[Spoken]:
        """A session with `peer` begins."""
        self._peers[peer] = None
        newest = [self._say(peer, self._announce(signed)) for signed, _ in self._frames.values()]
        return [self._say(peer, self._hello), *newest]

    def closed(self, peer: str) -> None:
        """It is over."""
        self._peers.pop(peer, None)

    def received(self, peer: str, payload: Payload) -> list[Spoken]:
        """`peer` said something: wants are answered, in this site's own way, and all but bulk is remembered."""
        if sum(map(len, payload)) <= _MAX_HEARD_BYTES:
            self._heard.append(payload)
        try:
            message = decode_message(payload)
        except RefusedError:
            return []
        match message:
            case Refusal():
                self.closed(peer)  # until it says hello again
            case Hello() if peer not in self._peers:
                return self.opened(peer)
            case Ping(nonce):
                return [self._say(peer, Pong(nonce))]  # it is alive, after all
            case Want():
                return [self._say(peer, answer) for answer in self._serve(message)]
        return []

    def tick(self) -> list[Spoken]:
        """`TICK_S` have passed: what it says of its own accord."""
        deeds: Mapping[Deed, Callable[[], Iterator[Payload]]] = {
            "garbage": self._garbage,
            "replay": self._replays,
            "forge": self._forgeries,
            "flood": self._floods,
            "ruin": lambda: iter(()),
        }
        payloads = list(deeds[self._does]()) if self._peers else []
        self.num_misdeeds += len(payloads) * len(self._peers)
        return [Spoken(peer, Lane.CONTROL, payload) for peer in self._peers for payload in payloads]

    def publish(self, data: bytes, step: int, codec: str, schema_hash: bytes) -> list[Spoken]:
        """Announce a keyframe and serve it when asked: well-formed, well signed, whatever is in it."""
        self._frames.clear()
        self._last = replace(
            self._last,
            base=None,
            codec=codec,
            schema_hash=schema_hash,
            num_bytes=len(data),
            chunk_digests=digest_chunks(data, self._last.chunk_bytes),
        )
        signed = self._sign(step=step)
        self._frames[signed.frame_id] = signed, data
        self.num_misdeeds += len(self._peers)
        return [self._say(peer, self._announce(signed)) for peer in self._peers]

    @property
    def last_step(self) -> int:
        """That of what it signed last."""
        return self._last.version.step

    # --- misdeeds, as payloads ---------------------------------------------------------------------------------------

    def _garbage(self) -> Iterator[Payload]:
        rng = self._rng
        honest = encode_message(self._announce(self._sign()))
        yield (bytes(MAX_HEADER_BYTES + 1),)
        for _ in range(_MISDEEDS_PER_TICK):
            yield (rng.randbytes(rng.randrange(_MAX_GARBAGE_BYTES)),)
            flipped = bytearray(honest[0])
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
            yield bytes(flipped), honest[1]

    def _replays(self) -> Iterator[Payload]:
        self._sign()
        self._sign()
        for signed in reversed(self._said):
            yield encode_message(self._announce(signed))
        yield encode_message(self._hello)
        yield encode_message(self._announce(self._sign(run=f"{self._hello.run}-of-yesterday")))
        for _ in range(min(_MISDEEDS_PER_TICK, len(self._heard))):
            yield self._rng.choice(self._heard)

    def _forgeries(self) -> Iterator[Payload]:
        yield encode_message(self._announce(self._sign()))  # whose chunks are not those that it names
        for _ in range(_MISDEEDS_PER_TICK):
            manifest = replace(self._last, version=self._next_version())
            yield encode_message(self._announce(sign_manifest(manifest, self._stranger)))
            other, incarnation = self._rng.choice(self._others), manifest.version.incarnation
            stolen = replace(manifest, origin=other)
            yield encode_message(self._announce(sign_manifest(stolen, self._identity)))
            end = self._identity.sign(finished_text(self._hello.run, other, incarnation))
            yield encode_message(Finished(other, incarnation, end))

    def _floods(self) -> Iterator[Payload]:
        for _ in range(2):  # what is new costs its receiver a verification, what is not should cost nothing
            announced = encode_message(self._announce(self._sign()))
            for nonce in range(FLOOD_PER_TICK // 4):
                yield announced
                yield encode_message(Ping(nonce))

    # --- inside ------------------------------------------------------------------------------------------------------

    def _serve(self, want: Want) -> Iterator[Message]:
        if self._does == "forge":
            for index in want.indices:
                self.num_misdeeds += 1
                yield Chunk(want.frame_id, index, self._rng.randbytes(MIN_CHUNK_BYTES))
        elif want.frame_id in self._frames:
            signed, data = self._frames[want.frame_id]
            for index in want.indices:
                if index < signed.manifest.num_chunks:
                    offset, length = signed.manifest.chunk_range(index)
                    yield Chunk(want.frame_id, index, data[offset : offset + length])
        else:
            yield Gone(want.frame_id)

    def _sign(self, *, run: str | None = None, step: int | None = None) -> SignedManifest:
        """A keyframe's manifest, newer than all before; of the next step, if none is given."""
        version = self._next_version() if step is None else Version(self._last.version.incarnation, step)
        self._last = replace(self._last, version=version, base=None)
        signed = sign_manifest(replace(self._last, run=run or self._hello.run), self._identity)
        self._said.append(signed)
        return signed

    def _next_version(self) -> Version:
        return Version(self._last.version.incarnation, self._last.version.step + 1)

    def _made_up(self) -> Manifest:
        """As good as any for a site that never published."""
        return Manifest(
            run=self._hello.run,
            origin=self._site,
            version=Version(self._hello.incarnation, 0),
            base=None,
            codec="none",
            schema_hash=bytes(DIGEST_BYTES),
            num_fp16_bytes=1,
            num_bytes=1,
            chunk_bytes=MIN_CHUNK_BYTES,
            chunk_digests=digest_chunks(b"?", MIN_CHUNK_BYTES),
        )

    @staticmethod
    def _announce(signed: SignedManifest) -> Announce:
        return Announce(signed.body, signed.signature)

    @staticmethod
    def _say(peer: str, message: Message) -> Spoken:
        return Spoken(peer, lane_of(message), encode_message(message))
