"""Manifests: canonical bytes, signatures, and a parser that accepts or refuses but never breaks."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgpack
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.checkpoint.manifest import (
    DEFAULT_CHUNK_BYTES,
    MAX_CHUNK_BYTES,
    MAX_COUNTER,
    MAX_FRAME_BYTES,
    MAX_MANIFEST_BYTES,
    MIN_CHUNK_BYTES,
    SIGNATURE_DOMAIN,
    Manifest,
    Version,
    digest_chunks,
    sign_manifest,
    verify_manifest,
)
from p2pcodistill.errors import MalformedError, OversizedError, RefusedError, SignatureError
from p2pcodistill.identity import Identity

BERLIN = Identity.from_secrets(bytes(32), bytes(32))
TOKYO = Identity.from_secrets(b"\1" * 32, b"\1" * 32)
CONTENT = bytes(range(256)) * 200  # 51200 bytes: three full chunks and a short one


def make_manifest(**changes: Any) -> Manifest:
    manifest = Manifest(
        run="demo",
        origin="berlin",
        version=Version(1, 50),
        base=None,
        codec="fp16+blosc2",
        schema_hash=hashlib.sha256(b"schema").digest(),
        num_fp16_bytes=60_000,
        num_bytes=len(CONTENT),
        chunk_bytes=MIN_CHUNK_BYTES,
        chunk_digests=digest_chunks(CONTENT, MIN_CHUNK_BYTES),
    )
    return replace(manifest, **changes)


def test_kind_follows_from_the_base() -> None:
    assert make_manifest().kind == "keyframe"
    assert make_manifest(base=Version(1, 49)).kind == "delta"
    assert make_manifest(version=Version(2, 0), base=Version(1, 900)).kind == "delta"


@pytest.mark.parametrize("base", [Version(1, 50), Version(1, 51), Version(2, 0)])
def test_a_base_is_lower_than_the_version(base: Version) -> None:
    with pytest.raises(MalformedError, match="lower"):
        make_manifest(base=base)


names = st.text(st.characters(categories=("L", "N", "P")), min_size=1, max_size=64)
counters = st.integers(0, MAX_COUNTER)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    chunk_bytes = draw(st.integers(MIN_CHUNK_BYTES, MAX_CHUNK_BYTES))
    num_bytes = draw(st.integers(1, 20 * chunk_bytes))
    num_chunks = -(-num_bytes // chunk_bytes)
    versions = draw(st.lists(st.builds(Version, counters, counters), min_size=1, max_size=2, unique=True))
    return Manifest(
        run=draw(names),
        origin=draw(names),
        version=max(versions),
        base=min(versions) if len(versions) == 2 else None,
        codec=draw(names),
        schema_hash=draw(st.binary(min_size=32, max_size=32)),
        num_fp16_bytes=draw(counters),
        num_bytes=num_bytes,
        chunk_bytes=chunk_bytes,
        chunk_digests=tuple(hashlib.sha256(bytes([index])).digest() for index in range(num_chunks)),
    )


@given(manifests())
def test_bytes_round_trip_and_are_canonical(manifest: Manifest) -> None:
    body = manifest.to_bytes()
    assert Manifest.from_bytes(body) == manifest
    assert Manifest.from_bytes(body).to_bytes() == body


def test_the_body_is_an_array_in_fixed_order_that_starts_with_the_format_version() -> None:
    manifest = make_manifest()
    assert msgpack.unpackb(manifest.to_bytes()) == [
        2, "demo", "berlin", 1, 50, None, None, "fp16+blosc2", manifest.schema_hash, 60_000, len(CONTENT),
        MIN_CHUNK_BYTES, b"".join(manifest.chunk_digests),
    ]  # fmt: skip
    delta = make_manifest(version=Version(2, 50), base=Version(1, 40))
    assert msgpack.unpackb(delta.to_bytes())[3:7] == [2, 50, 1, 40]


@given(manifests())
def test_chunk_ranges_cover_the_frame_once(manifest: Manifest) -> None:
    covered = 0
    for index in range(manifest.num_chunks):
        offset, length = manifest.chunk_range(index)
        assert offset == covered and 0 < length <= manifest.chunk_bytes
        covered += length
    assert covered == manifest.num_bytes
    for index in (-1, manifest.num_chunks):
        with pytest.raises(IndexError):
            manifest.chunk_range(index)


def test_versions_order_by_incarnation_then_step() -> None:
    assert max(Version(1, 900), Version(2, 10), Version(2, 9)) == Version(2, 10)


def test_digests_of_a_file_and_of_its_bytes_are_equal(tmp_path: Path) -> None:
    path = tmp_path / "content"
    path.write_bytes(CONTENT)
    expected = tuple(blake3(CONTENT[start : start + 20_000]).digest() for start in range(0, 51_200, 20_000))
    assert digest_chunks(path, 20_000) == digest_chunks(CONTENT, 20_000) == expected


# --- signatures ------------------------------------------------------------------------------------------------------


def test_a_signed_manifest_verifies_and_keeps_the_bytes_that_were_signed() -> None:
    signed = sign_manifest(make_manifest(), BERLIN)
    received = verify_manifest(signed.body, signed.signature, BERLIN.public)
    assert received == signed
    assert received.body is signed.body
    assert received.frame_id == hashlib.sha256(signed.body).hexdigest()


def test_a_re_encoding_is_irrelevant() -> None:
    fields = msgpack.unpackb(make_manifest().to_bytes())
    wasteful = b"\xdc\x00\x0d" + b"".join(msgpack.packb(field) for field in fields)  # array 16, not fixarray
    received = verify_manifest(wasteful, BERLIN.sign(SIGNATURE_DOMAIN + wasteful), BERLIN.public)
    assert received.manifest == make_manifest()
    assert received.body == wasteful != received.manifest.to_bytes()


def test_another_key_another_body_and_another_domain_are_refused() -> None:
    signed = sign_manifest(make_manifest(), BERLIN)
    other = sign_manifest(make_manifest(version=Version(1, 100)), BERLIN)
    for body, signature, public in (
        (signed.body, signed.signature, TOKYO.public),
        (other.body, signed.signature, BERLIN.public),
        (signed.body, BERLIN.sign(signed.body), BERLIN.public),
        (signed.body, b"", BERLIN.public),
        (signed.body, signed.signature + b"\0", BERLIN.public),
    ):
        with pytest.raises(SignatureError):
            verify_manifest(body, signature, public)


def test_the_size_is_checked_before_the_signature_and_the_signature_before_the_content() -> None:
    with pytest.raises(OversizedError):
        verify_manifest(bytes(MAX_MANIFEST_BYTES + 1), b"", BERLIN.public)
    with pytest.raises(SignatureError):
        verify_manifest(b"garbage", bytes(64), BERLIN.public)
    with pytest.raises(MalformedError):
        verify_manifest(b"garbage", BERLIN.sign(SIGNATURE_DOMAIN + b"garbage"), BERLIN.public)


# --- refusals --------------------------------------------------------------------------------------------------------

FIELDS = msgpack.unpackb(make_manifest().to_bytes())
DIGESTS = FIELDS[12]
REFUSED_FIELDS = [
    (0, 1, MalformedError),
    (0, True, MalformedError),
    (0, "1", MalformedError),
    (1, "", MalformedError),
    (1, "x" * 65, MalformedError),
    (1, "x" * 300, MalformedError),
    (1, b"demo", MalformedError),
    (2, "berlin\x1b[2J", MalformedError),
    (2, None, MalformedError),
    (3, -1, MalformedError),
    (3, 2**63, OversizedError),
    (3, 1.0, MalformedError),
    (4, True, MalformedError),
    (4, [1], MalformedError),
    (5, 1, MalformedError),
    (5, "keyframe", MalformedError),
    (6, 49, MalformedError),
    (7, {}, MalformedError),
    (8, b"short", MalformedError),
    (8, "x" * 32, MalformedError),
    (9, -1, MalformedError),
    (10, 0, MalformedError),
    (10, MAX_FRAME_BYTES + 1, OversizedError),
    (10, len(CONTENT) + MIN_CHUNK_BYTES, MalformedError),
    (11, 0, MalformedError),
    (11, MIN_CHUNK_BYTES - 1, MalformedError),
    (11, MAX_CHUNK_BYTES + 1, OversizedError),
    (11, MAX_CHUNK_BYTES, MalformedError),
    (12, b"", MalformedError),
    (12, DIGESTS[:-1], MalformedError),
    (12, DIGESTS[:-32], MalformedError),
    (12, DIGESTS + bytes(32), MalformedError),
    (12, [DIGESTS], MalformedError),
]


@pytest.mark.parametrize(("index", "value", "error"), REFUSED_FIELDS)
def test_a_field_that_is_wrong_is_refused(index: int, value: Any, error: type[RefusedError]) -> None:
    fields = list(FIELDS)
    fields[index] = value
    with pytest.raises(error):
        Manifest.from_bytes(msgpack.packb(fields))


@pytest.mark.parametrize(
    ("base", "error"),
    [
        ([1, 50], MalformedError),
        ([1, 51], MalformedError),
        ([2, 0], MalformedError),
        ([1, -1], MalformedError),
        ([True, 1], MalformedError),
        ([1, 2.0], MalformedError),
        ([0, 2**63], OversizedError),
        ([None, 1], MalformedError),
    ],
)
def test_a_base_that_is_wrong_is_refused(base: list[Any], error: type[RefusedError]) -> None:
    assert Manifest.from_bytes(msgpack.packb([*FIELDS[:5], 1, 49, *FIELDS[7:]])).base == Version(1, 49)
    with pytest.raises(error):
        Manifest.from_bytes(msgpack.packb([*FIELDS[:5], *base, *FIELDS[7:]]))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"\xdd\xff\xff\xff\xff",
        b"\xdf\xff\xff\xff\xff",
        b"\xc6\xff\xff\xff\xff",
        b"\x91" * 100_000,
        msgpack.packb({"run": "demo"}),
        msgpack.packb(FIELDS[:-1]),
        msgpack.packb([*FIELDS, 0]),
        msgpack.packb(FIELDS) + b"\0",
        msgpack.packb([2, "\ud800", *FIELDS[2:]], unicode_errors="surrogatepass"),
        msgpack.packb([2, msgpack.Timestamp(1), *FIELDS[2:]]),
    ],
)
def test_bytes_that_are_no_manifest_are_refused(body: bytes) -> None:
    with pytest.raises(MalformedError):
        Manifest.from_bytes(body)


def test_a_manifest_that_is_inconsistent_cannot_be_made_here_either() -> None:
    with pytest.raises(MalformedError):
        make_manifest(chunk_digests=())
    with pytest.raises(MalformedError):
        make_manifest(chunk_digests=(*make_manifest().chunk_digests[:3], b"short"))


@pytest.mark.parametrize(
    ("num_bytes", "chunk_bytes"), [(MAX_FRAME_BYTES, 1024**2), (16 * 1024**3, DEFAULT_CHUNK_BYTES)]
)
def test_the_digests_of_the_largest_frames_fit_and_no_more(num_bytes: int, chunk_bytes: int) -> None:
    def describe(num_bytes: int, chunk_bytes: int) -> Manifest:
        digests = (bytes(32),) * (num_bytes // chunk_bytes)
        return make_manifest(num_bytes=num_bytes, chunk_bytes=chunk_bytes, chunk_digests=digests)

    body = describe(num_bytes, chunk_bytes).to_bytes()
    assert len(body) <= MAX_MANIFEST_BYTES
    assert Manifest.from_bytes(body).num_bytes == num_bytes
    with pytest.raises(OversizedError):
        describe(num_bytes, chunk_bytes // 2).to_bytes()


json_like = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=14) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=30,
)


@given(
    st.binary(max_size=300)
    | json_like.map(msgpack.packb)
    | st.lists(json_like, max_size=14).map(msgpack.packb)
)
def test_arbitrary_bytes_are_refused_or_parsed_in_full(body: bytes) -> None:
    try:
        manifest = Manifest.from_bytes(body)
    except RefusedError:
        return
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest


@given(st.data())
def test_a_damaged_manifest_never_verifies(data: st.DataObject) -> None:
    signed = sign_manifest(make_manifest(), BERLIN)
    damaged = bytearray(signed.body)
    position = data.draw(st.integers(0, len(damaged) - 1))
    damaged[position] ^= data.draw(st.integers(1, 255))
    cut = data.draw(st.integers(0, len(damaged)))
    for body in (bytes(damaged), signed.body[:cut] + signed.body[cut + 1 :] if cut < len(damaged) else b""):
        with pytest.raises(SignatureError):
            verify_manifest(body, signed.signature, BERLIN.public)
        try:  # and if its origin had signed it
            resigned = verify_manifest(body, BERLIN.sign(SIGNATURE_DOMAIN + body), BERLIN.public)
        except RefusedError:
            continue
        assert resigned.body == body and resigned.manifest.num_chunks == len(resigned.manifest.chunk_digests)


def test_the_byte_plane_s_checkpoint_modules_load_neither_torch_nor_numpy() -> None:
    code = (
        "import sys, p2pcodistill.checkpoint.chain, p2pcodistill.checkpoint.store\n"
        "print(sorted({'torch', 'numpy', 'blosc2'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
