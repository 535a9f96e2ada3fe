"""The store in memory keeps the contract of the one on disk: the same calls, the same answers."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from p2pcodistill.checkpoint.manifest import (
    MIN_CHUNK_BYTES,
    Manifest,
    SignedManifest,
    Version,
    digest_chunks,
    sign_manifest,
)
from p2pcodistill.checkpoint.store import FrameStore
from p2pcodistill.simulation.virtual.run import seeded_identity
from p2pcodistill.simulation.virtual.store import MemoryStore

IDENTITIES = {name: seeded_identity(0, name) for name in ("berlin", "tokyo")}
KEYS = {name: identity.public for name, identity in IDENTITIES.items()}


def make_frame(origin: str, step: int, base: int | None) -> tuple[SignedManifest, tuple[bytes, ...]]:
    """A frame of two chunks."""
    seed = hashlib.sha256(f"{origin} {step} {base}".encode()).digest()
    data = seed * (MIN_CHUNK_BYTES // 32) + seed
    manifest = Manifest(
        run="run",
        origin=origin,
        version=Version(1, step),
        base=None if base is None else Version(1, base),
        codec="test",
        schema_hash=bytes(32),
        num_fp16_bytes=len(data),
        num_bytes=len(data),
        chunk_bytes=MIN_CHUNK_BYTES,
        chunk_digests=digest_chunks(data, MIN_CHUNK_BYTES),
    )
    return sign_manifest(manifest, IDENTITIES[origin]), (data[:MIN_CHUNK_BYTES], data[MIN_CHUNK_BYTES:])


class Both:
    """Two stores of berlin that are told the same."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.disk = FrameStore(folder / "store", site="berlin", keys=KEYS)
        self.memory = MemoryStore("berlin")

    def adopt(self, signed: SignedManifest, chunks: tuple[bytes, ...]) -> None:
        source = self.folder / "source"
        source.write_bytes(b"".join(chunks))
        self.disk.adopt(signed, source)
        self.memory.adopt(signed, chunks)

    def fetch(self, signed: SignedManifest, chunks: tuple[bytes, ...]) -> None:
        frame_id = signed.frame_id
        present = self.disk.begin(signed)
        assert self.memory.begin(signed, frame_id) == present
        if len(present) == len(chunks):
            return
        for index in set(range(len(chunks))) - present:
            self.disk.put_chunk(frame_id, index, chunks[index])
            self.memory.put_chunk(frame_id, index, chunks[index])
        assert self.disk.complete(frame_id).version == self.memory.complete(frame_id).version

    def fetch_some(self, signed: SignedManifest, chunks: tuple[bytes, ...]) -> None:
        frame_id = signed.frame_id
        if not self.disk.begin(signed) | self.memory.begin(signed, frame_id):
            self.disk.put_chunk(frame_id, 0, chunks[0])
            self.memory.put_chunk(frame_id, 0, chunks[0])
        for index in range(3):  # what is there can be passed on
            assert self.disk.read_chunk(frame_id, index) == self.memory.read_chunk(frame_id, index)

    def restart(self) -> None:
        self.disk.close()
        self.disk = FrameStore(self.folder / "store", site="berlin", keys=KEYS)
        self.memory.restart()

    def prune(self, keep: set[str], relayed: Sequence[str] = ()) -> None:
        gone = self.disk.prune(keep_frame_ids=keep, relayed_origins=relayed)
        assert sorted(self.memory.prune(keep, relayed_origins=relayed)) == sorted(gone)

    def check(self) -> None:
        for origin in KEYS:
            assert [f.signed.frame_id for f in self.disk.frames(origin)] == [
                f.frame_id for f in self.memory.frames(origin)
            ]
            assert [f.signed.frame_id for f in self.disk.chain(origin)] == [
                f.frame_id for f in self.memory.chain(origin)
            ]
            assert [f.is_local for f in self.disk.frames(origin)] == [
                f.is_local for f in self.memory.frames(origin)
            ]
            for frame in self.memory.frames(origin):
                assert all(
                    self.disk.read_chunk(frame.frame_id, index)
                    == self.memory.read_chunk(frame.frame_id, index)
                    for index in range(3)
                )


frames = st.builds(
    lambda origin, step, back: make_frame(origin, step, step - back if 0 < back <= step else None),
    st.sampled_from(sorted(KEYS)),
    st.integers(0, 8),
    st.integers(0, 2),
)
operations = st.one_of(
    st.tuples(st.just("fetch"), frames),
    st.tuples(st.just("fetch some"), frames),
    st.tuples(st.just("abandon"), frames),
    st.tuples(st.sampled_from(["prune", "prune what is relayed"]), frames),
    st.tuples(st.sampled_from(["drop", "restart"]), st.sampled_from(sorted(KEYS))),
)


@settings(
    max_examples=40,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=st.lists(operations, max_size=25))
def test_it_answers_as_the_store_on_disk(tmp_path: Path, steps: list[tuple[str, object]]) -> None:
    folder = tmp_path / str(len(list(tmp_path.iterdir())))
    folder.mkdir()
    both = Both(folder)
    for what, subject in steps:
        match what:
            case "fetch":
                signed, chunks = subject
                if signed.manifest.origin == "berlin":
                    both.adopt(signed, chunks)
                else:
                    both.fetch(signed, chunks)
            case "fetch some":
                both.fetch_some(*subject)
            case "abandon":
                both.disk.abandon(subject[0].frame_id)
                both.memory.abandon(subject[0].frame_id)
            case "prune":
                both.prune({subject[0].frame_id})
            case "prune what is relayed":
                both.prune({subject[0].frame_id}, ["tokyo"])
            case "drop":
                both.disk.drop(subject)
                both.memory.drop(subject)
            case "restart":
                both.restart()
        both.check()
    both.disk.close()
