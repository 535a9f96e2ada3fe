"""The signed description of a frame: who published which version, its encoding, and the hash of every chunk.

A manifest's *body* is one msgpack array in fixed order, its first element the format version:

    [2, run, origin, incarnation, step, base_incarnation, base_step, codec,
     schema_hash, num_fp16_bytes, num_bytes, chunk_bytes, digests]

The base is the version that a delta frame is applied to; both its fields are nil for a keyframe. `schema_hash`
is 32 bytes, `digests` the concatenated BLAKE3 of the chunks in order. The origin signs
`SIGNATURE_DOMAIN + body` with its Ed25519 key; the SHA-256 of the body names the frame everywhere. What is
verified, kept and passed on is the body as it was received, never a re-encoding of it.

This module is part of the byte plane: it does not know what is inside a frame, and imports neither torch nor
numpy.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import msgpack
from blake3 import blake3

from p2pcodistill.errors import MalformedError, OversizedError
from p2pcodistill.identity import Identity, PublicIdentity

FORMAT_VERSION = 2
SIGNATURE_DOMAIN = b"p2pcodistill manifest 2\0"

DIGEST_BYTES = 32
MAX_NAME_CHARS = 64
MAX_COUNTER = 2**63 - 1

DEFAULT_CHUNK_BYTES = 256 * 1024
MIN_CHUNK_BYTES = 16 * 1024
MAX_CHUNK_BYTES = 4 * 1024 * 1024
MAX_FRAME_BYTES = 64 * 1024**3
MAX_MANIFEST_BYTES = 2 * 1024**2 + 4096
"""Room for 65,536 digests and everything else: frames of 16 GiB in chunks of DEFAULT_CHUNK_BYTES, of 64 GiB in chunks of
1 MiB or more."""

_NUM_FIELDS = 13
_MAX_NAMES_BYTES = 8 * MAX_NAME_CHARS + 32


class Version(NamedTuple):
    """Orders the checkpoints of one origin: newest wins, and no wall clock takes part.

    `incarnation` is one launch of the origin's workers (the first is 1, each later one is higher), `step` counts the
    updates of the model that it published.
    """

    incarnation: int
    step: int


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a frame is. Every instance is consistent: types, ranges and the number of digests are checked.

    Constructing one raises MalformedError, or OversizedError where a number is over its cap.
    """

    run: str
    origin: str
    version: Version
    base: Version | None
    """What a delta frame is applied to: a lower version, perhaps of an earlier incarnation. None: this is a keyframe."""
    codec: str
    schema_hash: bytes
    num_fp16_bytes: int
    """Bytes that the same tensors would take as raw fp16; for reporting."""
    num_bytes: int
    chunk_bytes: int
    chunk_digests: tuple[bytes, ...]

    def __post_init__(self) -> None:
        for name, text in (("run", self.run), ("origin", self.origin), ("codec", self.codec)):
            _check_name(name, text)
        _check_int("incarnation", self.version.incarnation, 0, MAX_COUNTER)
        _check_int("step", self.version.step, 0, MAX_COUNTER)
        if self.base is not None:
            _check_int("base incarnation", self.base.incarnation, 0, MAX_COUNTER)
            _check_int("base step", self.base.step, 0, MAX_COUNTER)
            if self.base >= self.version:
                raise MalformedError("a manifest's base must be a lower version than its own")
        _check_digest("schema_hash", self.schema_hash)
        _check_int("num_fp16_bytes", self.num_fp16_bytes, 0, MAX_COUNTER)
        _check_int("num_bytes", self.num_bytes, 1, MAX_FRAME_BYTES)
        _check_int("chunk_bytes", self.chunk_bytes, MIN_CHUNK_BYTES, MAX_CHUNK_BYTES)
        num_expected = -(-self.num_bytes // self.chunk_bytes)
        if len(self.chunk_digests) != num_expected:
            raise MalformedError(
                f"a manifest of {self.num_bytes} bytes in chunks of {self.chunk_bytes} needs {num_expected} "
                f"digests, it has {len(self.chunk_digests)}"
            )
        for digest in self.chunk_digests:
            _check_digest("a chunk's digest", digest)

    @property
    def kind(self) -> Literal["keyframe", "delta"]:
        """What sort of frame it is."""
        return "keyframe" if self.base is None else "delta"

    @property
    def num_chunks(self) -> int:
        """How many chunks the frame has; at least one."""
        return len(self.chunk_digests)

    def chunk_range(self, index: int) -> tuple[int, int]:
        """(offset, length) in bytes of chunk `index` within the frame. Raises IndexError if there is none."""
        if not 0 <= index < len(self.chunk_digests):
            raise IndexError(f"chunk {index} of a frame with {len(self.chunk_digests)}")
        offset = index * self.chunk_bytes
        return offset, min(self.chunk_bytes, self.num_bytes - offset)

    def to_bytes(self) -> bytes:
        """The canonical body. Raises OversizedError when its digests do not fit into MAX_MANIFEST_BYTES."""
        fields = (
            FORMAT_VERSION,
            self.run,
            self.origin,
            self.version.incarnation,
            self.version.step,
            None if self.base is None else self.base.incarnation,
            None if self.base is None else self.base.step,
            self.codec,
            self.schema_hash,
            self.num_fp16_bytes,
            self.num_bytes,
            self.chunk_bytes,
            b"".join(self.chunk_digests),
        )
        body: bytes = msgpack.packb(fields, use_bin_type=True)
        _check_body_size(body)
        return body

    @classmethod
    def from_bytes(cls, body: bytes) -> Manifest:
        """Parse a body that somebody else wrote. Raises MalformedError or OversizedError, nothing else.

        Says nothing about who wrote it: see `verify_manifest`.
        """
        _check_body_size(body)
        try:
            fields = msgpack.unpackb(
                body,
                raw=False,
                use_list=False,
                max_array_len=_NUM_FIELDS,
                max_map_len=0,
                max_ext_len=0,
                max_str_len=4 * MAX_NAME_CHARS,
            )
        except (ValueError, msgpack.UnpackException) as error:
            raise MalformedError(f"a manifest does not parse: {str(error) or type(error).__name__}") from None
        if type(fields) is not tuple or not fields or type(fields[0]) is not int:
            raise MalformedError("a manifest must be an array that starts with its format version")
        if fields[0] != FORMAT_VERSION:
            raise MalformedError(
                f"a manifest has format version {fields[0]}; this version reads {FORMAT_VERSION}"
            )
        if len(fields) != _NUM_FIELDS:
            raise MalformedError(f"a manifest has {len(fields)} fields instead of {_NUM_FIELDS}")
        _, run, origin, incarnation, step, base_incarnation, base_step, codec, *sizes_and_hashes = fields
        schema, num_fp16, num_bytes, chunk_bytes, digests = sizes_and_hashes
        is_keyframe = base_incarnation is None and base_step is None
        if type(digests) is not bytes or len(digests) % DIGEST_BYTES:
            raise MalformedError(f"a manifest's digests must be bytes, {DIGEST_BYTES} for each chunk")
        return cls(
            run=run,
            origin=origin,
            version=Version(incarnation, step),
            base=None if is_keyframe else Version(base_incarnation, base_step),
            codec=codec,
            schema_hash=schema,
            num_fp16_bytes=num_fp16,
            num_bytes=num_bytes,
            chunk_bytes=chunk_bytes,
            chunk_digests=tuple(
                digests[start : start + DIGEST_BYTES] for start in range(0, len(digests), DIGEST_BYTES)
            ),
        )


@dataclass(frozen=True, slots=True)
class SignedManifest:
    """A manifest with the exact bytes that were signed. Only `sign_manifest`, `verify_manifest` make one.

    `frame_id` is the hex SHA-256 of the body: the frame's name in files, wants and chunks.
    """

    manifest: Manifest
    body: bytes
    signature: bytes
    frame_id: str = field(init=False, repr=False, compare=False)
    version: Version = field(init=False, repr=False, compare=False)
    """The manifest's version."""
    base: Version | None = field(init=False, repr=False, compare=False)
    """The manifest's base."""
    num_bytes: int = field(init=False, repr=False, compare=False)
    """The frame's size."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "frame_id", hashlib.sha256(self.body).hexdigest())
        for name in ("version", "base", "num_bytes"):
            object.__setattr__(self, name, getattr(self.manifest, name))


def sign_manifest(manifest: Manifest, identity: Identity) -> SignedManifest:
    """Sign `manifest` as its origin. Raises OversizedError when its body is over MAX_MANIFEST_BYTES."""
    body = manifest.to_bytes()
    return SignedManifest(manifest, body, identity.sign(SIGNATURE_DOMAIN + body))


def claimed_origin(body: bytes) -> str:
    """The member in whose name `body` speaks, which tells the key to verify it with. Nothing is verified yet.

    Raises MalformedError.
    """
    unpacker = msgpack.Unpacker(max_array_len=_NUM_FIELDS, max_str_len=4 * MAX_NAME_CHARS)
    unpacker.feed(body[:_MAX_NAMES_BYTES])
    try:
        if unpacker.read_array_header() == _NUM_FIELDS and unpacker.unpack() == FORMAT_VERSION:
            unpacker.skip()
            origin = unpacker.unpack()
            _check_name("origin", origin)
            return str(origin)
    except (ValueError, TypeError, msgpack.UnpackException, msgpack.OutOfData) as error:
        raise MalformedError(f"a manifest does not parse: {str(error) or type(error).__name__}") from None
    raise MalformedError(f"a manifest must have {_NUM_FIELDS} fields and format version {FORMAT_VERSION}")


def verify_manifest(body: bytes, signature: bytes, public: PublicIdentity) -> SignedManifest:
    """Check the body's size, its signature under `public`, and only then parse it.

    Obligation: the caller takes `public` from the member list, and checks that the manifest's `origin` is the
    member whose key it is. Raises OversizedError, SignatureError or MalformedError.
    """
    _check_body_size(body)
    public.verify(signature, SIGNATURE_DOMAIN + body)
    return SignedManifest(Manifest.from_bytes(body), body, signature)


def digest_chunks(source: Path | bytes | memoryview, chunk_bytes: int) -> tuple[bytes, ...]:
    """`digest_chunk` of each chunk of a file (read chunk by chunk) or of bytes, in order. Raises OSError."""
    if not isinstance(source, Path):
        view = memoryview(source)
        return tuple(
            digest_chunk(view[start : start + chunk_bytes]) for start in range(0, len(view), chunk_bytes)
        )
    with source.open("rb") as file:
        return tuple(digest_chunk(chunk) for chunk in iter(lambda: file.read(chunk_bytes), b""))


def digest_chunk(data: bytes | memoryview) -> bytes:
    """BLAKE3 of a chunk: every checkpoint is hashed at both ends, and this is several times as fast as SHA-256."""
    return blake3(data).digest()


def _check_body_size(body: bytes) -> None:
    if len(body) > MAX_MANIFEST_BYTES:
        raise OversizedError(f"a manifest of {len(body)} bytes is over the cap of {MAX_MANIFEST_BYTES}")


def _check_name(field: str, text: object) -> None:
    if type(text) is not str or not text or len(text) > MAX_NAME_CHARS or not text.isprintable():
        raise MalformedError(f"a manifest's {field} must be 1 to {MAX_NAME_CHARS} printable characters")


def _check_int(field: str, value: object, low: int, high: int) -> None:
    if type(value) is not int or value < low:
        raise MalformedError(f"a manifest's {field} must be a whole number of at least {low}")
    if value > high:
        raise OversizedError(f"a manifest's {field} is {value}, over the cap of {high}")


def _check_digest(field: str, digest: object) -> None:
    if type(digest) is not bytes or len(digest) != DIGEST_BYTES:
        raise MalformedError(f"a manifest's {field} must be {DIGEST_BYTES} bytes")
