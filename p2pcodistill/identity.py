"""Who a site is: one Ed25519 key that signs checkpoints and one X25519 key that authenticates its connections.

An *identity* (both secret keys) stays on its machine in a file of mode 0600. The *public identity* is one line that is
handed to the peers; it carries a checksum, so that a truncated paste is noticed where it was made. What a peer signs is
verified under its signing key; who a peer *is* on the wire is the X25519 key that ZeroMQ's CURVE authenticated.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import os
import re
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from p2pcodistill.errors import IdentityError, SignatureError

SIGNATURE_BYTES = 64
KEY_BYTES = 32
MAX_IDENTITY_FILE_BYTES = 4096
_PUBLIC_PREFIX = "p2p1-"
_SECRET_PREFIX = "p2p1-secret-"
_CHECKSUM_BYTES = 4
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def check_site_name(name: str) -> str:
    """Return `name` if it can name a site (letters, digits, `_`, `.`, `-`; at most 63), else raise IdentityError."""
    if not _NAME.fullmatch(name):
        raise IdentityError(
            f"{name!r} cannot name a site: use at most 63 letters, digits, '.', '_' or '-', starting with a letter or digit"
        )
    return name


def _pack(prefix: str, payload: bytes) -> str:
    checksum = hashlib.sha256(prefix.encode() + payload).digest()[:_CHECKSUM_BYTES]
    return prefix + base64.urlsafe_b64encode(payload + checksum).decode().rstrip("=")


def _unpack(prefix: str, text: str, what: str) -> bytes:
    body = text.strip()
    if not body.startswith(prefix):
        raise IdentityError(f"{what} must start with {prefix!r}, got {body[:12]!r}")
    encoded = body.removeprefix(prefix)
    try:
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise IdentityError(
            f"{what} holds characters that do not belong there: copy it again, whole"
        ) from None
    payload, checksum = raw[:-_CHECKSUM_BYTES], raw[-_CHECKSUM_BYTES:]
    expected = hashlib.sha256(prefix.encode() + payload).digest()[:_CHECKSUM_BYTES]
    if len(payload) != 2 * KEY_BYTES or checksum != expected:
        raise IdentityError(
            f"{what} is incomplete or mistyped (its checksum does not match): copy it again, whole"
        )
    return payload


@dataclass(frozen=True, slots=True)
class PublicIdentity:
    """What peers know of a site: `signing_key` (Ed25519) and `curve_key` (X25519), 32 bytes each."""

    signing_key: bytes
    curve_key: bytes

    def __str__(self) -> str:
        return _pack(_PUBLIC_PREFIX, self.signing_key + self.curve_key)

    @classmethod
    def parse(cls, text: str) -> PublicIdentity:
        """The inverse of `str`. Raises IdentityError with what to do."""
        payload = _unpack(_PUBLIC_PREFIX, text, "a public identity")
        return cls(payload[:KEY_BYTES], payload[KEY_BYTES:])

    def verify(self, signature: bytes, message: bytes) -> None:
        """Raise SignatureError unless `signature` is this identity's over `message`."""
        try:
            Ed25519PublicKey.from_public_bytes(self.signing_key).verify(signature, message)
        except (InvalidSignature, ValueError):
            raise SignatureError("the signature does not verify under the origin's key") from None


@dataclass(frozen=True, slots=True)
class Identity:
    """A site's secret keys, 32 raw bytes each. `repr` does not show them."""

    signing_secret: bytes = field(repr=False)
    curve_secret: bytes = field(repr=False)
    public: PublicIdentity
    _signing_key: Ed25519PrivateKey = field(init=False, repr=False, compare=False)

    MODE: ClassVar[int] = 0o600

    def __post_init__(self) -> None:
        object.__setattr__(self, "_signing_key", Ed25519PrivateKey.from_private_bytes(self.signing_secret))

    @classmethod
    def generate(cls) -> Identity:
        """A new identity from the system's random source."""
        return cls.from_secrets(os.urandom(KEY_BYTES), os.urandom(KEY_BYTES))

    @classmethod
    def from_secrets(cls, signing_secret: bytes, curve_secret: bytes) -> Identity:
        """The identity of two 32-byte secrets (seeded simulations make theirs this way)."""
        raw = (serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        signing_key = Ed25519PrivateKey.from_private_bytes(signing_secret).public_key().public_bytes(*raw)
        curve_key = X25519PrivateKey.from_private_bytes(curve_secret).public_key().public_bytes(*raw)
        return cls(signing_secret, curve_secret, PublicIdentity(signing_key, curve_key))

    def sign(self, message: bytes) -> bytes:
        """The 64-byte Ed25519 signature of `message`."""
        return self._signing_key.sign(message)

    def save(self, path: Path) -> None:
        """Write the identity file, mode 0600. Never overwrites: raises IdentityError if `path` exists."""
        text = _pack(_SECRET_PREFIX, self.signing_secret + self.curve_secret) + "\n"
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, self.MODE)
        except FileExistsError:
            raise IdentityError(
                f"{path} exists already: an identity is never overwritten; choose another name or move it away"
            ) from None
        except OSError as error:
            raise IdentityError(f"cannot write the identity file {path}: {error.strerror}") from None
        with os.fdopen(descriptor, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    @classmethod
    def load(cls, path: Path) -> Identity:
        """Read an identity file. Raises IdentityError if it is missing, malformed or readable by anyone else."""
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
            text = path.read_bytes()[:MAX_IDENTITY_FILE_BYTES].decode("ascii", errors="replace")
        except FileNotFoundError:
            raise IdentityError(
                f"no identity file {path}: make one with 'p2pcodistill keygen {path.stem}'"
            ) from None
        except OSError as error:
            raise IdentityError(f"cannot read the identity file {path}: {error.strerror}") from None
        if mode & 0o077:
            raise IdentityError(
                f"others can read the identity file {path} (mode {mode:04o}): run 'chmod 600 {path}', "
                "and make a new identity if somebody may have copied it"
            )
        try:
            payload = _unpack(_SECRET_PREFIX, text, "an identity file")
        except IdentityError as error:
            raise IdentityError(f"{path}: {error}") from None
        return cls.from_secrets(payload[:KEY_BYTES], payload[KEY_BYTES:])
