"""The publisher: frames are stored and announced in order and answered; a chain has no gaps, and is renewed as a whole."""

import asyncio
import contextlib
import errno

import pytest
from patience import GENEROUS_S

from p2pcodistill.checkpoint.manifest import MIN_CHUNK_BYTES, Version
from p2pcodistill.checkpoint.store import FrameStore
from p2pcodistill.group.link_messages import FrameReady, ReferenceReady
from p2pcodistill.identity import Identity
from p2pcodistill.publisher import Publisher
from p2pcodistill.telemetry.log import EventLog

IDENTITY = Identity.from_secrets(b"\1" * 32, b"\2" * 32)
TOKYO = Identity.from_secrets(b"\3" * 32, b"\4" * 32)
SCHEMA = b"s" * 32


class Desk:
    """A publisher over a real store; what it announces, answers and reports is kept."""

    def __init__(self, folder, **store_options):
        self.chunk_bytes = MIN_CHUNK_BYTES
        self.outbox = folder / "outbox"
        self.outbox.mkdir(exist_ok=True)
        keys = {"berlin": IDENTITY.public, "tokyo": TOKYO.public}
        self.store = FrameStore(folder / "store", site="berlin", keys=keys, **store_options)
        if self.store.incarnation == 0:
            self.store.save_incarnation(1)
        self.announced, self.answers, self.records = [], [], []
        self.events = EventLog(folder / "events.jsonl", self.records.append)
        self.lock = asyncio.Lock()
        self.publisher = self.publisher_of("berlin", IDENTITY)

    def publisher_of(self, site, identity):
        return Publisher(
            site,
            "run",
            identity=identity,
            store=self.store,
            outbox=self.outbox,
            events=self.events,
            gossip_lock=self.lock,
            announce=self.announce,
            answer=self.answer,
            chunk_bytes=lambda num_bytes: self.chunk_bytes,
        )

    async def announce(self, signed):
        assert self.lock.locked(), "gossip hears of a frame before its incarnation can change"
        self.announced.append(signed.manifest)

    async def answer(self, taken):
        self.answers.append((taken.step, taken.base_step, taken.accepted))

    def ready(self, step, base_step=None, *, num_bytes=1000):
        kind = "keyframe" if base_step is None else "delta"
        path = self.outbox / f"{step}.{kind}"
        path.write_bytes(bytes([step]) * num_bytes)
        return FrameReady(str(path), step, base_step, kind, SCHEMA, 2 * num_bytes)

    def reference(self, step, *, incarnation=1, num_bytes=1500):
        path = self.outbox / f"tokyo-{step}.reference"
        path.write_bytes(bytes([step]) * num_bytes)
        return ReferenceReady(str(path), "tokyo", incarnation, step, "reference", SCHEMA, num_bytes)

    async def publish(self, *ready):
        for frame in ready:
            self.publisher.submit(frame)
        await asyncio.wait_for(self.publisher.drained(), GENEROUS_S)

    def names(self, event):
        return [record for record in self.records if record["event"] == event]


@contextlib.asynccontextmanager
async def running(desk):
    task = asyncio.create_task(desk.publisher.run())
    try:
        yield desk
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        desk.store.close()
        desk.events.close()


async def test_frames_are_announced_in_order_and_each_is_answered(tmp_path):
    async with running(Desk(tmp_path)) as desk:
        await desk.publish(
            desk.ready(50), desk.ready(100, 50, num_bytes=10), desk.ready(150, 100, num_bytes=10)
        )
        versions = [Version(1, 50), Version(1, 100), Version(1, 150)]
        assert [manifest.version for manifest in desk.announced] == versions
        assert [manifest.base for manifest in desk.announced] == [None, *versions[:2]]
        assert desk.answers == [(50, None, True), (100, 50, True), (150, 100, True)]
        published = desk.names("frame-published")
        assert [(r["step"], r["kind"], r["num_bytes"]) for r in published] == [
            (50, "keyframe", 1000),
            (100, "delta", 10),
            (150, "delta", 10),
        ]
        chain = desk.store.chain("berlin")
        assert [stored.signed.manifest.version for stored in chain] == versions
        assert list(desk.outbox.iterdir()) == []


async def test_chunks_are_as_large_as_the_links_make_them(tmp_path):
    async with running(Desk(tmp_path)) as desk:
        await desk.publish(desk.ready(1, num_bytes=100_000))
        desk.chunk_bytes = 1 << 16
        await desk.publish(desk.ready(2, 1, num_bytes=100_000))
        assert [(m.chunk_bytes, m.num_chunks) for m in desk.announced] == [(MIN_CHUNK_BYTES, 7), (1 << 16, 2)]
        stored = desk.store.frames("berlin")[-1]
        assert desk.store.read_chunk(stored.signed.frame_id, 1) == b"\x02" * (100_000 - (1 << 16))


async def test_a_keyframe_of_the_same_step_may_follow_a_delta(tmp_path):
    async with running(Desk(tmp_path)) as desk:
        await desk.publish(desk.ready(50), desk.ready(100, 50), desk.ready(100), desk.ready(150, 100))
        assert [answer[2] for answer in desk.answers] == [True] * 4
        assert [(m.version.step, m.kind) for m in desk.announced] == [
            (50, "keyframe"),
            (100, "delta"),
            (100, "keyframe"),
            (150, "delta"),
        ]


@pytest.mark.parametrize("base_step", [40, 100, 101])
async def test_a_delta_on_an_unknown_base_is_refused(tmp_path, base_step):
    async with running(Desk(tmp_path)) as desk:
        await desk.publish(desk.ready(50), desk.ready(100, base_step), desk.ready(150))
        assert desk.answers == [(50, None, True), (100, base_step, False), (150, None, True)]
        assert [manifest.version.step for manifest in desk.announced] == [50, 150]
        [refused] = desk.names("refused")
        assert refused["reason"] == "malformed" and f"step {base_step}" in refused["why"]
        assert list(desk.outbox.iterdir()) == []


async def test_a_file_that_is_not_there_is_refused(tmp_path):
    async with running(Desk(tmp_path)) as desk:
        await desk.publish(FrameReady("/elsewhere/50.keyframe", 50, None, "x", SCHEMA, 1))
        assert desk.answers == [(50, None, False)]


async def test_another_launch_starts_with_a_keyframe_and_an_empty_outbox(tmp_path):
    async with running(Desk(tmp_path)) as desk:
        await desk.publish(desk.ready(50))
        (desk.outbox / "step-00000100.frame.part").write_bytes(b"torn")
        desk.publisher.submit(desk.ready(75, 50))  # not begun when the launch is over
        desk.publisher.begin_launch()
        assert list(desk.outbox.iterdir()) == []
        await desk.publish(desk.ready(100, 50), desk.ready(100))
        assert desk.answers == [(50, None, True), (100, 50, False), (100, None, True)]


async def test_no_room_under_the_stores_cap_refuses_a_frame_and_later_ones_fit(tmp_path):
    async with running(Desk(tmp_path, max_bytes=2500)) as desk:
        await desk.publish(desk.ready(50), desk.ready(100, 50, num_bytes=2000), desk.ready(150, 100))
        assert [answer[2] for answer in desk.answers] == [True, False, False], "a chain has no gaps"
        assert {record["reason"] for record in desk.names("refused")} == {"oversized", "malformed"}
        await desk.publish(desk.ready(200))
        assert desk.answers[-1] == (200, None, True)


async def test_a_keyframe_takes_the_room_of_older_frames(tmp_path):
    async with running(Desk(tmp_path, max_bytes=2500)) as desk:
        steps = (50, 100, 150, 200)
        await desk.publish(*(desk.ready(step) for step in steps))
        assert desk.answers == [(step, None, True) for step in steps]
        assert [stored.version.step for stored in desk.store.frames("berlin")] == [150, 200]
        assert len(desk.store.prune(keep_frame_ids=())) == 2, "what gave way is told"


async def test_a_full_disk_stops_the_publisher_and_is_not_answered(tmp_path, monkeypatch):
    desk = Desk(tmp_path)

    def adopt(signed, source):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(desk.store, "adopt", adopt)
    desk.publisher.submit(desk.ready(50))
    with pytest.raises(OSError, match="No space left"):
        await asyncio.wait_for(desk.publisher.run(), GENEROUS_S)
    assert desk.answers == []
    desk.store.close()
    desk.events.close()


async def test_the_whole_chain_is_renewed_and_goes_on_under_the_new_incarnation(tmp_path):
    async with running(Desk(tmp_path)) as desk:
        await desk.publish(
            desk.ready(50), desk.ready(100, 50, num_bytes=10), desk.ready(150, 100, num_bytes=10)
        )
        desk.store.save_incarnation(8)
        async with desk.lock:
            renewed = await desk.publisher.renew(8)
        versions = [Version(8, 50), Version(8, 100), Version(8, 150)]
        assert [signed.manifest.version for signed in renewed] == versions
        assert [signed.manifest.base for signed in renewed] == [None, *versions[:2]]
        await desk.publish(desk.ready(200, 150, num_bytes=10))
        assert desk.answers[-1] == (200, 150, True)
        assert desk.announced[-1].base == Version(8, 150)
        chain = [stored.signed.manifest.version for stored in desk.store.chain("berlin")]
        assert chain == [*versions, Version(8, 200)]
        assert list(desk.outbox.iterdir()) == []


async def test_a_chain_for_which_there_is_no_room_twice_starts_anew(tmp_path):
    async with running(Desk(tmp_path, max_bytes=2050)) as desk:
        await desk.publish(desk.ready(50), desk.ready(100, 50, num_bytes=100))
        desk.store.save_incarnation(8)
        async with desk.lock:
            assert await desk.publisher.renew(8) == []
        await desk.publish(desk.ready(150, 100, num_bytes=100))
        assert desk.answers[-1] == (150, 100, False), "nobody could apply it"
        assert list(desk.outbox.iterdir()) == []


# --- keyframes of teachers' references -------------------------------------------------------------------------


async def fetch_chain(desk):
    """Put a chain of tokyo's into the store."""
    berlin, desk.publisher = desk.publisher, desk.publisher_of("tokyo", TOKYO)
    async with asyncio.TaskGroup() as tasks:
        run = tasks.create_task(desk.publisher.run())
        await desk.publish(desk.ready(50), desk.ready(100, 50), desk.ready(150, 100))
        run.cancel()
    desk.publisher = berlin
    desk.announced.clear()
    desk.answers.clear()
    desk.records.clear()


def chain_of(desk):
    return [(s.signed.manifest.version.step, s.signed.manifest.kind) for s in desk.store.chain("tokyo")]


async def test_a_reference_takes_the_place_of_the_chain_that_led_there(tmp_path):
    async with running(Desk(tmp_path)) as desk:
        await fetch_chain(desk)
        await desk.publish(desk.reference(100))
        assert chain_of(desk) == [(100, "keyframe"), (150, "delta")]
        assert desk.announced == [] and desk.answers == [] and desk.records == []
        assert list(desk.outbox.iterdir()) == []
    again = Desk(tmp_path)
    assert chain_of(again) == [(100, "keyframe"), (150, "delta")], "it is found again under this site's key"
    again.store.close()
    again.events.close()


@pytest.mark.parametrize("version", [{"step": 120}, {"step": 200}, {"step": 100, "incarnation": 2}])
async def test_a_reference_that_is_not_on_the_chain_is_forgotten(tmp_path, version):
    async with running(Desk(tmp_path)) as desk:
        await fetch_chain(desk)
        await desk.publish(desk.reference(**version))
        assert chain_of(desk) == [(50, "keyframe"), (100, "delta"), (150, "delta")]
        assert desk.records == [] and list(desk.outbox.iterdir()) == []


async def test_a_reference_takes_no_room_of_what_the_ranks_may_be_reading(tmp_path):
    async with running(Desk(tmp_path, max_bytes=3500)) as desk:
        await fetch_chain(desk)
        await desk.publish(desk.reference(100))
        assert chain_of(desk) == [(50, "keyframe"), (100, "delta"), (150, "delta")]
        assert desk.records == [] and list(desk.outbox.iterdir()) == []


async def test_a_reference_that_a_full_disk_does_not_take_stops_nothing(tmp_path, monkeypatch):
    async with running(Desk(tmp_path)) as desk:
        await fetch_chain(desk)
        num_faults = 0

        def adopt(signed, source, *, may_evict):
            nonlocal num_faults
            num_faults += 1
            raise OSError(errno.ENOSPC, "No space left on device")

        with monkeypatch.context() as patch:
            patch.setattr(desk.store, "adopt", adopt)
            await desk.publish(desk.reference(100))
        assert num_faults == 1
        assert chain_of(desk) == [(50, "keyframe"), (100, "delta"), (150, "delta")]
        await desk.publish(desk.ready(50))
        assert desk.answers == [(50, None, True)] and list(desk.outbox.iterdir()) == []
