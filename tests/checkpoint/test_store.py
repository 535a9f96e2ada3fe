"""The store: what it promises in peace, with a full disk, after a crash between any two writes, and after damage."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import msgpack
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patience import GENEROUS_S

from p2pcodistill.checkpoint.manifest import (
    MIN_CHUNK_BYTES,
    Manifest,
    SignedManifest,
    Version,
    digest_chunk,
    digest_chunks,
    sign_manifest,
)
from p2pcodistill.checkpoint.store import FrameStore, StoredFrame
from p2pcodistill.errors import ChecksumError, OversizedError, RunFolderError
from p2pcodistill.identity import Identity

BERLIN = Identity.from_secrets(b"\1" * 32, b"\1" * 32)
TOKYO = Identity.from_secrets(b"\2" * 32, b"\2" * 32)
STRANGER = Identity.from_secrets(b"\3" * 32, b"\3" * 32)
KEYS = {"berlin": BERLIN.public, "tokyo": TOKYO.public}
FRAME_BYTES = 3 * MIN_CHUNK_BYTES + 100
ALL = frozenset(range(4))


def make_frame(
    step: int,
    *,
    origin: str = "tokyo",
    identity: Identity = TOKYO,
    incarnation: int = 1,
    base: int | None = None,
    num_bytes: int = FRAME_BYTES,
) -> tuple[SignedManifest, bytes]:
    """A frame with content of its own; by default a keyframe of four chunks, the last one short."""
    content = random.Random(f"{origin} {incarnation} {step} {base}").randbytes(num_bytes)
    manifest = Manifest(
        run="demo",
        origin=origin,
        version=Version(incarnation, step),
        base=None if base is None else Version(incarnation, base),
        codec="fp16+blosc2",
        schema_hash=bytes(32),
        num_fp16_bytes=FRAME_BYTES,
        num_bytes=num_bytes,
        chunk_bytes=MIN_CHUNK_BYTES,
        chunk_digests=digest_chunks(content, MIN_CHUNK_BYTES),
    )
    return sign_manifest(manifest, identity), content


def put_chunks(
    store: FrameStore, signed: SignedManifest, content: bytes, indices: frozenset[int] = ALL
) -> None:
    for index in sorted(indices):
        offset, length = signed.manifest.chunk_range(index)
        store.put_chunk(signed.frame_id, index, content[offset : offset + length])


def fetch(store: FrameStore, step: int, **changes: Any) -> StoredFrame:
    signed, content = make_frame(step, **changes)
    put_chunks(store, signed, content, frozenset(range(signed.manifest.num_chunks)) - store.begin(signed))
    return store.complete(signed.frame_id)


def fetch_delta(store: FrameStore, step: int, *, base: int | None = None, **changes: Any) -> StoredFrame:
    """A delta frame of 1000 bytes, on top of the version 50 steps before it."""
    return fetch(store, step, base=step - 50 if base is None else base, num_bytes=1000, **changes)


def adopt(
    store: FrameStore, step: int, outbox: Path, *, may_evict: bool = True, **changes: Any
) -> StoredFrame:
    signed, content = make_frame(step, **({"origin": "berlin", "identity": BERLIN} | changes))
    outbox.write_bytes(content)
    return store.adopt(signed, outbox, may_evict=may_evict)


def adopt_local_keyframe(store: FrameStore, step: int, outbox: Path, **changes: Any) -> StoredFrame:
    """A reference of tokyo's that berlin's ranks encoded anew."""
    return adopt(store, step, outbox, **({"origin": "tokyo", "num_bytes": 3000} | changes))


def newest_of(store: FrameStore, origin: str) -> StoredFrame | None:
    return max(store.frames(origin), key=lambda stored: stored.version, default=None)


def steps_of(frames: Iterable[StoredFrame]) -> list[tuple[str, int]]:
    """Kind and step of each."""
    return [(stored.signed.manifest.kind, stored.version.step) for stored in frames]


def read_frame(store: FrameStore, stored: StoredFrame) -> bytes | None:
    chunks = [
        store.read_chunk(stored.signed.frame_id, index) for index in range(stored.signed.manifest.num_chunks)
    ]
    return None if None in chunks else b"".join(chunk for chunk in chunks if chunk is not None)


def files_of(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


def count_open_files() -> int:
    return sum(1 for _ in Path("/dev/fd").iterdir())


def expected_files(*signed: SignedManifest, suffix: str = "frame") -> set[str]:
    return {f"{one.frame_id}.{end}" for one in signed for end in (suffix, "manifest")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> Iterator[FrameStore]:
    with closing(FrameStore(folder, site="berlin", keys=KEYS)) as store:
        yield store


# --- in peace --------------------------------------------------------------------------------------------------------


def test_a_fetched_frame_is_complete_readable_and_found_again(folder: Path, store: FrameStore) -> None:
    signed, content = make_frame(50)
    assert store.begin(signed) == frozenset()
    put_chunks(store, signed, content, frozenset({3, 1}))
    assert store.begin(signed) == {1, 3}
    assert newest_of(store, "tokyo") is None
    assert store.read_chunk(signed.frame_id, 1) == content[MIN_CHUNK_BYTES : 2 * MIN_CHUNK_BYTES]
    assert store.read_chunk(signed.frame_id, 2) is None
    put_chunks(store, signed, content, frozenset({0, 2}))
    stored = store.complete(signed.frame_id)
    assert stored.path.read_bytes() == content
    assert store.complete(signed.frame_id) == newest_of(store, "tokyo") == stored
    assert store.begin(signed) == ALL
    assert read_frame(store, stored) == content
    assert newest_of(store, "berlin") is None
    assert files_of(folder) == expected_files(signed)
    with closing(FrameStore(folder, site="berlin", keys=KEYS)) as reopened:
        assert newest_of(reopened, "tokyo") == stored
        assert read_frame(reopened, stored) == content


def test_the_newest_is_the_highest_incarnation_then_step(store: FrameStore) -> None:
    for incarnation, step in ((1, 900), (2, 50), (2, 10)):
        fetch(store, step, incarnation=incarnation)
    newest = newest_of(store, "tokyo")
    assert newest is not None
    assert newest.signed.manifest.version == Version(2, 50)


def test_an_own_frame_is_moved_in(folder: Path, store: FrameStore, tmp_path: Path) -> None:
    stored = adopt(store, 50, tmp_path / "outbox")
    assert not (tmp_path / "outbox").exists()
    assert newest_of(store, "berlin") == stored
    assert read_frame(store, stored) == make_frame(50, origin="berlin", identity=BERLIN)[1]
    assert adopt(store, 50, tmp_path / "outbox") == stored, "the same frame again"
    assert not (tmp_path / "outbox").exists()
    assert files_of(folder) == expected_files(stored.signed)


def test_an_own_frame_is_copied_in_from_another_file_system(
    store: FrameStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    outbox, num_refused = tmp_path / "outbox", 0
    replace_file = os.replace

    def refuse_outbox(source: Any, target: Any) -> None:
        nonlocal num_refused
        if Path(source) == outbox:
            num_refused += 1
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV))
        replace_file(source, target)

    monkeypatch.setattr(os, "replace", refuse_outbox)
    stored = adopt(store, 50, outbox)
    assert num_refused == 1
    assert not outbox.exists()
    assert read_frame(store, stored) is not None


def test_an_own_frame_of_another_size_than_its_manifest_says_is_refused(
    store: FrameStore, tmp_path: Path
) -> None:
    signed, content = make_frame(50, origin="berlin", identity=BERLIN)
    (tmp_path / "outbox").write_bytes(content[:-1])
    with pytest.raises(ChecksumError):
        store.adopt(signed, tmp_path / "outbox")
    assert newest_of(store, "berlin") is None


def test_what_is_not_there_reads_as_none(store: FrameStore) -> None:
    stored = fetch(store, 50)
    assert store.read_chunk("0" * 64, 0) is None
    assert store.read_chunk(stored.signed.frame_id, 4) is None
    assert store.read_chunk(stored.signed.frame_id, -1) is None
    assert store.read_chunk(stored.signed.frame_id, 3) is not None


def test_obligations_of_the_caller_are_checked(store: FrameStore) -> None:
    signed, content = make_frame(50)
    with pytest.raises(KeyError):
        store.put_chunk(signed.frame_id, 0, b"")
    with pytest.raises(KeyError):
        store.complete(signed.frame_id)
    store.begin(signed)
    with pytest.raises(ValueError, match="lacks 4 chunks"):
        store.complete(signed.frame_id)
    with pytest.raises(ValueError, match="16384 bytes, got 100"):
        store.put_chunk(signed.frame_id, 0, content[:100])
    for index in (-1, 4):
        with pytest.raises(IndexError):
            store.put_chunk(signed.frame_id, index, content[:MIN_CHUNK_BYTES])
    assert store.begin(signed) == frozenset()


def test_abandon_removes_a_partial_frame_and_only_that(folder: Path, store: FrameStore) -> None:
    stored = fetch(store, 50)
    signed, content = make_frame(100)
    store.begin(signed)
    put_chunks(store, signed, content, frozenset({0}))
    for frame_id in (signed.frame_id, signed.frame_id, stored.signed.frame_id, "0" * 64):
        store.abandon(frame_id)
    assert files_of(folder) == expected_files(stored.signed)
    assert store.begin(signed) == frozenset()


def test_prune_keeps_the_chain_of_each_origin_what_it_is_told_and_what_is_being_fetched(
    folder: Path, store: FrameStore, tmp_path: Path
) -> None:
    steps = {step: fetch(store, step).signed for step in (50, 100, 150)}
    own = adopt(store, 50, tmp_path / "outbox").signed
    being_fetched, _ = make_frame(120)
    store.begin(being_fetched)
    mapped = newest_of(store, "tokyo")
    assert mapped is not None
    store.prune(keep_frame_ids=[steps[50].frame_id, "0" * 64])
    assert files_of(folder) == (
        expected_files(steps[50], steps[150], own) | expected_files(being_fetched, suffix="part")
    )
    assert store.read_chunk(steps[100].frame_id, 0) is None
    with mapped.path.open("rb") as reader:
        fetch(store, 200)
        store.prune(keep_frame_ids=())
        assert len(reader.read()) == FRAME_BYTES, "a reader keeps what it has open"
    assert not mapped.path.exists()


def test_incarnation_and_pins_last(folder: Path, store: FrameStore) -> None:
    assert (store.incarnation, store.pinned_schema("tokyo")) == (0, None)
    store.save_incarnation(3)
    store.pin_schema("tokyo", b"\7" * 32)
    store.pin_schema("tokyo", b"\7" * 32)
    store.pin_schema("zürich", b"\x08" * 32)
    with pytest.raises(ValueError, match="below"):
        store.save_incarnation(2)
    store.pin_schema("zürich", b"\x09" * 32)
    for opened in (store, FrameStore(folder, site="berlin", keys=KEYS)):
        assert opened.incarnation == 3
        assert opened.pinned_schema("tokyo") == b"\7" * 32
        assert opened.pinned_schema("zürich") == b"\x09" * 32


def test_closing_twice_leaks_no_file_and_keeps_partial_frames(folder: Path) -> None:
    num_open = count_open_files()
    store = FrameStore(folder, site="berlin", keys=KEYS)
    store.begin(make_frame(50)[0])
    assert count_open_files() == num_open + 1
    store.close()
    store.close()
    assert count_open_files() == num_open
    assert files_of(folder) == expected_files(make_frame(50)[0], suffix="part")


def test_threads_share_a_store(store: FrameStore) -> None:
    with ThreadPoolExecutor(4) as pool:
        stored = list(pool.map(lambda step: fetch(store, step), range(16)))
        contents = list(pool.map(lambda one: read_frame(store, one), stored))
    assert contents == [make_frame(step)[1] for step in range(16)]
    assert newest_of(store, "tokyo") == stored[-1]


# --- chains ----------------------------------------------------------------------------------------------------------


def test_a_chain_leads_from_nothing_to_the_highest_version_that_can_be_reached(store: FrameStore) -> None:
    assert store.chain("tokyo") == store.frames("tokyo") == ()
    for step in (50, 100, 250):
        fetch_delta(store, step)
    assert store.chain("tokyo") == ()

    fetch(store, 0)
    assert steps_of(store.chain("tokyo")) == [("keyframe", 0), ("delta", 50), ("delta", 100)]

    fetch_delta(store, 150)
    fetch_delta(store, 200)
    assert steps_of(store.chain("tokyo")) == [
        ("keyframe", 0),
        *(("delta", step) for step in range(50, 300, 50)),
    ]
    assert store.chain("berlin") == ()


def test_frames_are_listed_by_version_the_delta_first(store: FrameStore, tmp_path: Path) -> None:
    fetch(store, 50)
    adopt_local_keyframe(store, 100, tmp_path / "outbox")
    fetch_delta(store, 100)
    fetch(store, 0)

    assert steps_of(store.frames("tokyo")) == [
        ("keyframe", 0),
        ("keyframe", 50),
        ("delta", 100),
        ("keyframe", 100),
    ]


def test_prune_keeps_of_a_teacher_its_chain_and_what_is_newer(store: FrameStore) -> None:
    fetch(store, 0)
    for step in (50, 100, 200, 250):
        fetch_delta(store, step)
    store.prune(keep_frame_ids=())
    assert [step for _, step in steps_of(store.frames("tokyo"))] == [0, 50, 100, 200, 250]

    newer = fetch(store, 200)
    store.prune(keep_frame_ids=())

    assert steps_of(store.frames("tokyo")) == [("keyframe", 200), ("delta", 250)]
    assert store.chain("tokyo")[0] == newer


def test_prune_keeps_of_this_site_what_it_is_told_and_what_came_after_it(
    store: FrameStore, tmp_path: Path
) -> None:
    own = [adopt(store, 0, tmp_path / "outbox")]
    own += [adopt(store, step, tmp_path / "outbox", base=step - 50) for step in (50, 100, 150)]
    own += [adopt(store, 150, tmp_path / "outbox", num_bytes=2000)]
    store.prune(keep_frame_ids=())
    assert len(store.frames("berlin")) == 5, "nobody has been told of them yet"

    store.prune(keep_frame_ids=[own[1].signed.frame_id, own[3].signed.frame_id])

    assert steps_of(store.frames("berlin")) == [("delta", 50), ("delta", 150), ("keyframe", 150)]


def test_a_local_keyframe_stands_in_for_a_long_chain_and_is_found_again(
    folder: Path, store: FrameStore, tmp_path: Path
) -> None:
    fetch(store, 0)
    for step in (50, 100):
        fetch_delta(store, step)
    local = adopt_local_keyframe(store, 100, tmp_path / "outbox")
    store.prune(keep_frame_ids=())
    later = fetch_delta(store, 150)
    assert store.chain("tokyo") == (local, later)
    assert files_of(folder) == expected_files(local.signed, later.signed)

    with closing(FrameStore(folder, site="berlin", keys=KEYS)) as reopened:
        assert reopened.chain("tokyo") == (local, later)
        assert read_frame(reopened, local) is not None


@pytest.mark.parametrize(
    ("site", "base"), [("lima", None), ("berlin", 50)], ids=["another site's", "a delta frame"]
)
def test_nothing_else_counts_under_this_site_s_key(
    folder: Path, tmp_path: Path, site: str, base: int | None
) -> None:
    with closing(FrameStore(folder, site="berlin", keys=KEYS)) as store:
        kept = fetch(store, 50)
        adopt_local_keyframe(store, 100, tmp_path / "outbox", base=base)
        assert len(store.frames("tokyo")) == 2
    with closing(FrameStore(folder, site=site, keys=KEYS | {"lima": STRANGER.public})) as reopened:
        assert reopened.frames("tokyo") == (kept,)
        assert files_of(folder) == expected_files(kept.signed)


def test_a_dropped_chain_is_gone_and_can_be_fetched_again(
    folder: Path, store: FrameStore, tmp_path: Path
) -> None:
    own = adopt(store, 50, tmp_path / "outbox")
    fetch(store, 0)
    fetch_delta(store, 50)
    being_fetched = make_frame(100)[0]
    store.begin(being_fetched)

    store.drop("tokyo")
    store.drop("tokyo")

    assert store.frames("tokyo") == ()
    assert files_of(folder) == expected_files(own.signed) | expected_files(being_fetched, suffix="part")
    again = fetch(store, 0)
    assert store.chain("tokyo") == (again,)


def test_a_chain_ends_before_a_frame_that_is_found_damaged(store: FrameStore) -> None:
    fetch(store, 0)
    damaged, _ = (fetch_delta(store, step) for step in (50, 100))
    damaged.path.write_bytes(b"rot")

    assert store.read_chunk(damaged.signed.frame_id, 0) is None

    assert steps_of(store.chain("tokyo")) == [("keyframe", 0)]
    fetch_delta(store, 50)
    assert [step for _, step in steps_of(store.chain("tokyo"))] == [0, 50, 100]


# --- bounded ---------------------------------------------------------------------------------------------------------


def test_the_store_is_bounded(folder: Path, tmp_path: Path) -> None:
    with closing(FrameStore(folder, site="berlin", keys=KEYS, max_bytes=2 * FRAME_BYTES)) as store:
        fetch(store, 50)
        partial, content = make_frame(100)
        store.begin(partial)
        no_room = f"is {FRAME_BYTES} bytes too many .* cap is {2 * FRAME_BYTES} .* holds {2 * FRAME_BYTES}"
        with pytest.raises(OversizedError, match=no_room):
            store.begin(make_frame(150, base=100)[0])
        with pytest.raises(OversizedError, match=no_room):
            adopt(store, 50, tmp_path / "outbox")
        assert (tmp_path / "outbox").exists()
        assert files_of(folder) == expected_files(make_frame(50)[0]) | expected_files(partial, suffix="part")
        put_chunks(store, partial, content)
        store.complete(partial.frame_id)
        store.prune(keep_frame_ids=())
        fetch(store, 150)
        assert files_of(folder) == expected_files(partial, make_frame(150)[0])
    tiny = FrameStore(tmp_path / "tiny", site="berlin", keys=KEYS, max_bytes=FRAME_BYTES - 1)
    with closing(tiny), pytest.raises(OversizedError, match="is 1 bytes too many"):
        tiny.begin(make_frame(50)[0])


def test_a_keyframe_takes_the_room_of_what_it_supersedes_where_there_is_none(
    folder: Path, tmp_path: Path
) -> None:
    max_bytes = 2 * FRAME_BYTES + 2000
    with closing(FrameStore(folder, site="berlin", keys=KEYS, max_bytes=max_bytes)) as store:
        own = adopt(store, 50, tmp_path / "outbox")
        chain = [fetch(store, 0).signed, *(fetch_delta(store, step).signed for step in (50, 100))]
        with pytest.raises(OversizedError):
            fetch_delta(store, 150)
        assert steps_of(store.chain("tokyo")) == [("keyframe", 0), ("delta", 50), ("delta", 100)]

        newer = fetch(store, 150)  # the keyframe it supersedes is enough

        assert store.chain("tokyo") == (newer,)
        assert store.frames("berlin") == (own,), "nobody else pays for it"
        assert store.prune(keep_frame_ids=()) == tuple(signed.frame_id for signed in chain)
        assert store.prune(keep_frame_ids=()) == ()
        with pytest.raises(OversizedError):
            adopt(store, 100, tmp_path / "outbox", may_evict=False)
        with pytest.raises(OversizedError):
            adopt(store, 100, tmp_path / "outbox", num_bytes=max_bytes)
        assert store.frames("berlin") == (own,)
        newer_own = adopt(store, 100, tmp_path / "outbox")
        assert store.frames("berlin") == (newer_own,)
        older, _ = make_frame(140)
        with pytest.raises(OversizedError):
            store.begin(older)
    with closing(FrameStore(folder, site="berlin", keys=KEYS)) as reopened:
        assert reopened.chain("tokyo") == (newer,)
        assert reopened.chain("berlin") == (newer_own,)


def test_what_a_keyframe_supersedes_stays_when_the_disk_does_not_take_it(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Path) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with closing(FrameStore(folder, site="berlin", keys=KEYS, max_bytes=FRAME_BYTES)) as store:
        older = adopt(store, 50, tmp_path / "outbox")
        with monkeypatch.context() as patch:
            patch.setattr("p2pcodistill.checkpoint.store.move", fail)
            with pytest.raises(OSError, match="No space left"):
                adopt(store, 100, tmp_path / "outbox")
        assert store.frames("berlin") == (older,) and read_frame(store, older) is not None
        newer = adopt(store, 100, tmp_path / "outbox")
        assert store.frames("berlin") == (newer,)
        assert store.prune(keep_frame_ids=[newer.signed.frame_id]) == (older.signed.frame_id,)


# --- durable ---------------------------------------------------------------------------------------------------------


def test_what_waits_for_the_disk_holds_up_no_reader(
    store: FrameStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    older, (partial, content) = fetch(store, 50), make_frame(100)
    store.begin(partial)
    put_chunks(store, partial, content)
    is_syncing, is_synced = threading.Event(), threading.Event()
    fsync = os.fsync

    def sync_slowly(descriptor: int) -> None:
        is_syncing.set()
        assert is_synced.wait(GENEROUS_S)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", sync_slowly)
    with ThreadPoolExecutor(1) as pool:
        completed = pool.submit(store.complete, partial.frame_id)
        assert is_syncing.wait(GENEROUS_S)
        assert read_frame(store, older) is not None
        assert store.chain("tokyo") == (older,)
        assert store.read_chunk(partial.frame_id, 0) == content[:MIN_CHUNK_BYTES]
        assert store.prune(keep_frame_ids=[older.signed.frame_id]) == ()
        is_synced.set()
        assert completed.result() == store.chain("tokyo")[-1]


def test_what_was_flushed_meets_its_error_again_on_completion(
    store: FrameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed, content = make_frame(50)
    store.begin(signed)
    put_chunks(store, signed, content)
    synced: list[int] = []

    def fail(descriptor: int) -> None:
        synced.append(descriptor)
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail)
        store.flush(signed.frame_id)
        with pytest.raises(OSError, match="Input/output error"):
            store.complete(signed.frame_id)
    assert len(synced) == 2
    store.flush(signed.frame_id)
    assert store.complete(signed.frame_id).path.read_bytes() == content
    store.flush(signed.frame_id)  # too late, and no harm


def test_trouble_with_a_manifest_that_is_told_only_once_is_told_on_completion(
    folder: Path, store: FrameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    signed, content = make_frame(50)
    store.begin(signed)
    put_chunks(store, signed, content)
    manifest = next(folder.rglob(f"{signed.frame_id}.manifest")).stat().st_ino
    fsync = os.fsync
    failed: list[int] = []

    def fail_once(descriptor: int) -> None:
        if os.fstat(descriptor).st_ino == manifest and not failed:
            failed.append(descriptor)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fail_once)
    store.flush(signed.frame_id)
    with pytest.raises(OSError, match="Input/output error"):
        store.complete(signed.frame_id)


# --- a life after a crash --------------------------------------------------------------------------------------------


def test_a_transfer_resumes_after_a_restart_with_what_is_really_on_disk(
    folder: Path, store: FrameStore
) -> None:
    signed, content = make_frame(50)
    store.begin(signed)
    put_chunks(store, signed, content, frozenset({0, 1, 3}))
    store.close()
    part = folder / "frames" / f"{signed.frame_id}.part"
    with part.open("r+b") as file:
        file.seek(MIN_CHUNK_BYTES + 5)
        file.write(b"torn")
    with closing(FrameStore(folder, site="berlin", keys=KEYS)) as reopened:
        assert newest_of(reopened, "tokyo") is None
        reopened.prune(keep_frame_ids=())
        assert reopened.begin(signed) == {0, 3}
        put_chunks(reopened, signed, content, frozenset({1, 2}))
        stored = reopened.complete(signed.frame_id)
        assert stored.path.read_bytes() == content


def test_a_partial_frame_left_over_goes_when_it_is_superseded_or_abandoned(
    folder: Path, store: FrameStore
) -> None:
    for step in (50, 100, 200):
        store.begin(make_frame(step)[0])
    store.close()
    with closing(FrameStore(folder, site="berlin", keys=KEYS)) as reopened:
        newer = fetch(reopened, 150).signed
        reopened.prune(keep_frame_ids=[make_frame(50)[0].frame_id])
        left = make_frame(50)[0], make_frame(200)[0]
        assert files_of(folder) == expected_files(newer) | expected_files(*left, suffix="part")
        for signed in left:
            reopened.abandon(signed.frame_id)
        assert files_of(folder) == expected_files(newer)


@pytest.mark.parametrize("size", [0, 10, FRAME_BYTES + 10])
def test_a_partial_frame_of_any_size_is_continued(folder: Path, store: FrameStore, size: int) -> None:
    signed, content = make_frame(50)
    store.begin(signed)
    store.close()
    (folder / "frames" / f"{signed.frame_id}.part").write_bytes(bytes(size))
    with closing(FrameStore(folder, site="berlin", keys=KEYS)) as reopened:
        assert reopened.begin(signed) == frozenset()
        put_chunks(reopened, signed, content)
        assert reopened.complete(signed.frame_id).path.read_bytes() == content


def test_what_belongs_to_nothing_is_removed_on_opening(folder: Path, store: FrameStore) -> None:
    kept = fetch(store, 200).signed
    damaged, cut, unsigned, lost, bare = (fetch(store, step).signed for step in (50, 60, 70, 80, 90))
    partial, _ = make_frame(250)
    store.begin(partial)
    store.close()
    frames, manifests = folder / "frames", folder / "manifests"
    with (frames / f"{damaged.frame_id}.frame").open("r+b") as file:
        file.write(b"rot")
    os.truncate(frames / f"{cut.frame_id}.frame", 100)
    (manifests / f"{unsigned.frame_id}.manifest").write_bytes(msgpack.packb((unsigned.body, bytes(64))))
    (frames / f"{lost.frame_id}.frame").unlink()
    (manifests / f"{bare.frame_id}.manifest").unlink()
    stranger, content = make_frame(50, origin="stranger", identity=STRANGER)
    (frames / f"{stranger.frame_id}.frame").write_bytes(content)
    (manifests / f"{stranger.frame_id}.manifest").write_bytes(
        msgpack.packb((stranger.body, stranger.signature))
    )
    (manifests / f"{'0' * 64}.manifest").write_bytes(msgpack.packb((kept.body, kept.signature)))
    (frames / f"{kept.frame_id}.part").write_bytes(b"")
    (frames / f"{'0' * 64}.part").write_bytes(b"")
    (folder / "site.json.tmp").write_bytes(b"")
    (frames / "a.tmp").write_bytes(b"")
    (manifests / "b.manifest.tmp").write_bytes(b"")
    with closing(FrameStore(folder, site="berlin", keys=KEYS)) as reopened:
        assert files_of(folder) == expected_files(kept) | expected_files(partial, suffix="part")
        newest = newest_of(reopened, "tokyo")
        assert newest is not None and newest.signed == kept


@pytest.mark.parametrize("harm", ["change", "truncate", "unlink"])
def test_a_frame_found_damaged_on_reading_is_dropped(folder: Path, store: FrameStore, harm: str) -> None:
    older, newer = fetch(store, 50), fetch(store, 100)
    if harm == "change":
        with newer.path.open("r+b") as file:
            file.write(b"rot")
    elif harm == "truncate":
        os.truncate(newer.path, 10)
    else:
        newer.path.unlink()
    assert store.read_chunk(newer.signed.frame_id, 0) is None
    assert newest_of(store, "tokyo") == older
    assert files_of(folder) == expected_files(older.signed)
    assert fetch(store, 100) == newer, "it can be fetched again"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"format_version": 2, "incarnation": 1, "pinned_schemas": {}}',
        '{"format_version": 1, "incarnation": -1, "pinned_schemas": {}}',
        '{"format_version": 1, "incarnation": "1", "pinned_schemas": {}}',
        '{"format_version": 1, "incarnation": 1, "pinned_schemas": []}',
        '{"format_version": 1, "incarnation": 1, "pinned_schemas": {"tokyo": "00"}}',
        '{"format_version": 1, "incarnation": 1, "pinned_schemas": {"tokyo": 7}}',
        "\udcff",
    ],
)
def test_a_damaged_site_file_is_named_and_nothing_is_touched(
    folder: Path, store: FrameStore, text: str
) -> None:
    fetch(store, 50)
    path = folder / "site.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    before = files_of(folder)
    with pytest.raises(RunFolderError, match=r"site\.json"):
        FrameStore(folder, site="berlin", keys=KEYS)
    assert files_of(folder) == before


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=60)
@given(st.data())
def test_a_damaged_manifest_file_costs_at_most_its_frame(tmp_path: Path, data: st.DataObject) -> None:
    folder = tmp_path / "store"
    with closing(FrameStore(folder, site="berlin", keys=KEYS)) as store:
        stored = fetch(store, 50)
    path = folder / "manifests" / f"{stored.signed.frame_id}.manifest"
    raw = bytearray(path.read_bytes())
    start = data.draw(st.integers(0, len(raw) - 1))
    raw[start : start + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    path.write_bytes(raw)
    with closing(FrameStore(folder, site="berlin", keys=KEYS)) as reopened:
        assert newest_of(reopened, "tokyo") in (None, stored)
        assert fetch(reopened, 50) == stored


# --- injected faults -------------------------------------------------------------------------------------------------


class Crash(BaseException):
    """The machine stops: nothing after it runs, so no handler for Exception may see it."""


class FaultyDisk:
    """Counts the calls that alter the disk, and lets the `nth` one fail: once (`error`), or for good (Crash)."""

    CALLS = ("replace", "fsync", "pwrite", "unlink", "ftruncate", "open")

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, nth: int | None, error: Callable[[], BaseException]
    ) -> None:
        self.num_calls = 0
        self.num_faults = 0
        self._nth = nth
        self._error = error
        for name in self.CALLS:
            monkeypatch.setattr(os, name, self._wrap(getattr(os, name)))

    def _wrap(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.num_calls += 1
            if self._nth is not None and self.num_calls >= self._nth:
                error = self._error()
                if isinstance(error, Crash) or self.num_calls == self._nth:
                    self.num_faults += 1
                    raise error
            return call(*args, **kwargs)

        return counted


def full_disk() -> OSError:
    return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def own_delta() -> SignedManifest:
    return make_frame(100, origin="berlin", identity=BERLIN, base=50)[0]


def work(store: FrameStore, outbox: Path) -> None:
    """All that a store does to the disk, on from version 50 of berlin and 100 of tokyo."""
    adopt(store, 100, outbox, base=50)
    store.pin_schema("tokyo", b"\7" * 32)
    store.save_incarnation(2)
    abandoned, content = make_frame(75)
    put_chunks(store, abandoned, content, frozenset({0}) - store.begin(abandoned))
    store.abandon(abandoned.frame_id)
    fetch_delta(store, 150)
    adopt_local_keyframe(store, 150, outbox)
    own = make_frame(50, origin="berlin", identity=BERLIN)[0]
    store.prune(keep_frame_ids=[own.frame_id, own_delta().frame_id])


def prepare(folder: Path, outbox: Path) -> FrameStore:
    store = FrameStore(folder, site="berlin", keys=KEYS)
    adopt(store, 0, outbox)
    adopt(store, 50, outbox)
    fetch(store, 50)
    fetch_delta(store, 100)
    store.save_incarnation(1)
    return store


def chain_step(store: FrameStore, origin: str) -> int | None:
    """Where the chain of `origin` leads to, every frame of it read in full."""
    chain = store.chain(origin)
    assert all(read_frame(store, stored) == stored.path.read_bytes() for stored in chain)
    return chain[-1].version.step if chain else None


def assert_done(store: FrameStore, folder: Path) -> None:
    assert (chain_step(store, "berlin"), chain_step(store, "tokyo")) == (100, 150)
    assert steps_of(store.frames("berlin")) == [("keyframe", 50), ("delta", 100)]
    assert steps_of(store.frames("tokyo")) == [("keyframe", 150)]
    assert (store.incarnation, store.pinned_schema("tokyo")) == (2, b"\7" * 32)
    left = (stored.signed for origin in KEYS for stored in store.frames(origin))
    assert files_of(folder) == expected_files(*left) | {"site.json"}


def count_calls(folder: Path, outbox: Path) -> int:
    with closing(prepare(folder, outbox)) as store, pytest.MonkeyPatch.context() as monkeypatch:
        disk = FaultyDisk(monkeypatch, None, Crash)
        work(store, outbox)
        return disk.num_calls


def test_a_crash_between_any_two_writes_leaves_the_last_complete_chain(tmp_path: Path) -> None:
    outbox = tmp_path / "outbox"
    num_calls = count_calls(tmp_path / "counting", outbox)
    assert num_calls > 30
    for nth in range(1, num_calls + 1):
        folder = tmp_path / f"crash-{nth}"
        with closing(prepare(folder, outbox)) as store, pytest.MonkeyPatch.context() as monkeypatch:
            disk = FaultyDisk(monkeypatch, nth, Crash)
            with pytest.raises(Crash):
                work(store, outbox)
            assert disk.num_faults >= 1
        with closing(FrameStore(folder, site="berlin", keys=KEYS)) as reopened:
            assert chain_step(reopened, "berlin") in (50, 100)
            assert chain_step(reopened, "tokyo") in (100, 150)
            assert reopened.incarnation in (1, 2)
            assert not any(name.endswith(".tmp") for name in files_of(folder))
            work(reopened, outbox)
            assert_done(reopened, folder)


def test_a_crash_while_a_chain_is_dropped_leaves_all_of_it_or_none(tmp_path: Path) -> None:
    left = set()
    for nth in range(1, 10):
        folder = tmp_path / f"crash-{nth}"
        with (
            closing(prepare(folder, tmp_path / "outbox")) as store,
            pytest.MonkeyPatch.context() as monkeypatch,
        ):
            FaultyDisk(monkeypatch, nth, Crash)
            with contextlib.suppress(Crash):
                store.drop("tokyo")
        with closing(FrameStore(folder, site="berlin", keys=KEYS)) as reopened:
            left.add(chain_step(reopened, "tokyo"))
            assert chain_step(reopened, "berlin") == 50
    assert left == {100, None}


def test_a_disk_that_is_full_at_any_write_leaves_the_store_usable(tmp_path: Path) -> None:
    outbox = tmp_path / "outbox"
    num_calls = count_calls(tmp_path / "counting", outbox)
    for nth in range(1, num_calls + 1):
        folder = tmp_path / f"full-{nth}"
        with closing(prepare(folder, outbox)) as store:
            with pytest.MonkeyPatch.context() as monkeypatch:
                disk = FaultyDisk(monkeypatch, nth, full_disk)
                with pytest.raises(OSError, match="No space left"):
                    work(store, outbox)
                assert disk.num_faults == 1
            assert chain_step(store, "berlin") in (50, 100)
            assert chain_step(store, "tokyo") in (100, 150)
            work(store, outbox)
            assert_done(store, folder)
        with closing(FrameStore(folder, site="berlin", keys=KEYS)) as reopened:
            assert_done(reopened, folder)


def test_a_write_that_the_disk_takes_in_parts_is_whole(
    store: FrameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    num_short = 0
    pwrite = os.pwrite

    def write_at_most_5000(descriptor: int, data: memoryview, offset: int) -> int:
        nonlocal num_short
        num_short += len(data) > 5000
        return pwrite(descriptor, data[:5000], offset)

    monkeypatch.setattr(os, "pwrite", write_at_most_5000)
    stored = fetch(store, 50)
    assert num_short == 9
    assert stored.path.read_bytes() == make_frame(50)[1]


def test_a_read_error_that_is_no_damage_is_not_taken_for_damage(
    store: FrameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = fetch(store, 50)
    num_faults = 0

    def fail(*_: Any) -> bytes:
        nonlocal num_faults
        num_faults += 1
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", fail)
        with pytest.raises(OSError, match="Too many open files"):
            store.read_chunk(stored.signed.frame_id, 0)
    assert num_faults == 1
    assert read_frame(store, stored) is not None


def test_a_frame_of_this_life_is_not_hashed_again_on_reading_unless_it_was_touched(
    store: FrameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = fetch(store, 50)
    num_hashed = 0

    def count(data: bytes) -> bytes:
        nonlocal num_hashed
        num_hashed += 1
        return digest_chunk(data)

    monkeypatch.setattr("p2pcodistill.checkpoint.store.digest_chunk", count)
    before = read_frame(store, fetched)
    assert before is not None and num_hashed == 0
    os.utime(fetched.path)  # somebody touched it
    assert read_frame(store, fetched) == before
    assert num_hashed == fetched.signed.manifest.num_chunks


def test_a_frame_of_an_earlier_life_is_hashed_on_opening_only_if_it_was_touched(
    folder: Path, store: FrameStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    frames = [fetch(store, step) for step in (50, 100)]
    store.close()
    os.utime(frames[1].path)  # somebody touched it
    hashed: list[Path] = []

    def count(path: Path, chunk_bytes: int) -> tuple[bytes, ...]:
        hashed.append(path)
        return digest_chunks(path, chunk_bytes)

    monkeypatch.setattr("p2pcodistill.checkpoint.frame_files.digest_chunks", count)
    with closing(FrameStore(folder, site="berlin", keys=KEYS)) as reopened:
        assert reopened.frames("tokyo") == tuple(frames)
        assert hashed == [frames[1].path]
        frames[0].path.write_bytes(b"rot")
        assert reopened.read_chunk(frames[0].signed.frame_id, 0) is None, "what was not hashed in this life"
