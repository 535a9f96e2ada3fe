"""The performer: gossip's actions on a real store, and what the ranks are offered."""

import asyncio
import errno
import threading

import pytest
from patience import GENEROUS_S

from p2pcodistill import actions
from p2pcodistill.actions import Performer
from p2pcodistill.checkpoint.manifest import Manifest, Version, digest_chunks, sign_manifest
from p2pcodistill.checkpoint.store import FrameStore
from p2pcodistill.gossip import events as gossip
from p2pcodistill.group.link_messages import ChainBroken, FrameOffered, KeyframeWanted, VersionKnown
from p2pcodistill.identity import Identity
from p2pcodistill.telemetry.log import EventLog
from p2pcodistill.telemetry.node_events import PeerConnected, PeerDisconnected, Refused, VersionAnnounced
from p2pcodistill.transport.refusals import RefusalLog

BERLIN = Identity.from_secrets(b"\1" * 32, b"\2" * 32)
TOKYO = Identity.from_secrets(b"\3" * 32, b"\4" * 32)
CHUNK_BYTES = 16 * 1024


class Outlet:
    """A transport and a link: keeps what is sent."""

    def __init__(self):
        self.payloads, self.messages = [], []
        self.joined = True

    def send(self, peer, lane, payload):
        self.payloads.append((peer, lane, payload))
        return True

    @property
    def link(self):
        class Link:
            @property
            def joined(_):
                return self.joined

            async def send(_, message):
                self.messages.append(message)

        return Link()


class Renewer:
    """A publisher that renews these frames."""

    has_chain = True

    def __init__(self, *signed):
        self.signed = list(signed)

    async def renew(self, incarnation):
        assert all(signed.version.incarnation == incarnation for signed in self.signed)
        return self.signed


def frame(step, base_step=None, *, incarnation=1):
    data = bytes([step]) * 100
    manifest = Manifest(
        run="run",
        origin="tokyo",
        version=Version(incarnation, step),
        base=None if base_step is None else Version(incarnation, base_step),
        codec="x",
        schema_hash=b"s" * 32,
        num_fp16_bytes=200,
        num_bytes=len(data),
        chunk_bytes=CHUNK_BYTES,
        chunk_digests=digest_chunks(data, CHUNK_BYTES),
    )
    return sign_manifest(manifest, TOKYO), data


class Site:
    def __init__(self, folder, *, renewed=()):
        self.folder = folder
        self.store = FrameStore(
            folder / "store", site="berlin", keys={"berlin": BERLIN.public, "tokyo": TOKYO.public}
        )
        self.outlet = Outlet()
        self.records = []
        self.events = EventLog(folder / "events.jsonl", self.records.append)
        self.refusals = []
        self.served = []
        self.forgotten = []
        self.renewed = renewed
        self.now_s = 1000.0
        self.performer = self.open()

    def open(self):
        return Performer(
            ["tokyo"],
            store=self.store,
            transport=self.outlet,
            link=self.outlet.link,
            publisher=Renewer(*self.renewed),
            events=self.events,
            refusals=RefusalLog(self.refusals.append, 1.0),
            serve=lambda *wanted: self.served.append(wanted),
            forget=self.forgotten.append,
            clock=lambda: self.now_s,
        )

    async def fetch(self, step, base_step=None, *, incarnation=1):
        """Do with a frame of tokyo's what gossip does; what it is told in the end."""
        signed, data = frame(step, base_step, incarnation=incarnation)
        [begun] = await self.performer.perform(gossip.BeginFetch(signed))
        assert begun == gossip.FetchBegun(signed.frame_id, frozenset())
        assert await self.performer.perform(gossip.StoreChunk(signed.frame_id, 0, data)) == []
        [stored] = await self.performer.perform(gossip.CompleteFrame(signed.frame_id))
        return signed, stored

    async def offer(self, *arguments, **options):
        signed, _ = await self.fetch(*arguments, **options)
        assert await self.performer.perform(gossip.OfferFrame(signed)) == []
        return signed


@pytest.fixture
def site(tmp_path):
    site = Site(tmp_path)
    yield site
    site.store.close()
    site.events.close()


async def test_who_is_ready_no_more_is_served_no_more_though_it_is_connected(site):
    await site.performer.perform(gossip.Report(PeerConnected("tokyo")))
    assert site.forgotten == []
    await site.performer.perform(gossip.Report(PeerDisconnected("tokyo", "quarantined")))
    assert site.forgotten == ["tokyo"]
    assert site.records[-1]["event"] == "peer-disconnected", "and it is told"


async def test_gossip_is_told_how_far_the_stored_chain_leads(site):
    _, stored = await site.fetch(100, 50)
    assert stored.held is None, "there is no keyframe"
    _, stored = await site.fetch(50)
    assert stored.held == Version(1, 100)


async def test_what_arrives_is_flushed_while_the_rest_is_on_its_way(site, monkeypatch):
    loop, flushed = asyncio.get_running_loop(), asyncio.Queue()
    monkeypatch.setattr(actions, "_FLUSH_BYTES", 150)
    monkeypatch.setattr(
        site.store, "flush", lambda frame_id: loop.call_soon_threadsafe(flushed.put_nowait, frame_id)
    )
    await site.fetch(50)
    assert flushed.empty()
    signed, _ = await site.fetch(100)
    async with asyncio.timeout(GENEROUS_S):
        assert await flushed.get() == signed.frame_id
    assert flushed.empty()


async def test_the_ranks_are_offered_the_whole_chain_now_and_when_they_join(site):
    first = await site.offer(50)
    second = await site.offer(100, 50)
    offers = [message.offer for message in site.outlet.messages]
    assert all(isinstance(message, FrameOffered) for message in site.outlet.messages)
    assert [(offer.origin, offer.incarnation, offer.step) for offer in offers] == [
        ("tokyo", 1, 50),
        ("tokyo", 1, 100),
    ]
    folder = site.folder / "store" / "frames"
    assert offers[1].folder == str(folder)
    names = [(1, 50, f"{first.frame_id}.frame"), (1, 100, f"{second.frame_id}.frame")]
    assert list(offers[1].frames) == names
    assert all((folder / name).exists() for _, _, name in names)
    assert site.performer.offers() == (offers[1],)
    assert site.open().offers() == (offers[1],), "a node that was started anew offers what is stored"


async def test_frames_stay_until_two_newer_offers_were_made(site):
    keyframes = [await site.offer(step) for step in (50, 100, 150)]
    assert site.performer.frames_on_offer() == {signed.frame_id for signed in keyframes[1:]}
    site.store.prune(keep_frame_ids=site.performer.frames_on_offer())
    assert [stored.version.step for stored in site.store.frames("tokyo")] == [100, 150]


async def test_a_dropped_chain_is_neither_stored_nor_offered(site):
    await site.offer(50)
    await site.offer(100, 50)
    assert await site.performer.perform(gossip.DropChain("tokyo")) == []
    assert site.store.frames("tokyo") == ()
    assert site.performer.offers() == () and site.performer.frames_on_offer() == set()


async def test_only_trouble_with_what_is_stored_now_breaks_the_chain(site):
    assert not site.performer.breaks(ChainBroken("tokyo", 1, 50)), "nothing is stored"
    await site.offer(50)
    await site.offer(100, 50)
    assert site.performer.breaks(ChainBroken("tokyo", 1, 50))
    assert site.performer.breaks(ChainBroken("tokyo", 1, 100))
    assert not site.performer.breaks(ChainBroken("tokyo", 1, 49))
    assert not site.performer.breaks(ChainBroken("oslo", 1, 100)), "not a teacher"
    await site.offer(10, incarnation=2)
    site.store.prune(keep_frame_ids=())
    assert not site.performer.breaks(ChainBroken("tokyo", 1, 100)), "a new chain has taken its place"


@pytest.mark.parametrize("method", ["begin", "put_chunk", "complete"])
async def test_a_full_disk_refuses_a_teachers_frame_and_other_trouble_is_this_sites_own(
    site, monkeypatch, method
):
    num_faults = 0

    def fail(*_):
        nonlocal num_faults
        num_faults += 1
        raise OSError(number, "trouble")

    monkeypatch.setattr(site.store, method, fail)
    signed, data = frame(50)
    action = {
        "begin": gossip.BeginFetch(signed),
        "put_chunk": gossip.StoreChunk(signed.frame_id, 0, data),
        "complete": gossip.CompleteFrame(signed.frame_id),
    }[method]
    number = errno.ENOSPC
    [refused] = await site.performer.perform(action)
    assert isinstance(refused, gossip.FetchRefused)
    assert (refused.frame_id, refused.reason) == (signed.frame_id, "oversized")
    number = errno.EIO
    with pytest.raises(OSError, match="trouble"):
        await site.performer.perform(action)
    assert num_faults == 2


async def test_a_frame_is_abandoned_beside_the_loop_because_that_may_wait_for_the_disk(site, monkeypatch):
    threads = []
    monkeypatch.setattr(site.store, "abandon", lambda _: threads.append(threading.current_thread()))
    assert await site.performer.perform(gossip.AbandonFrame("f" * 64)) == []
    [thread] = threads
    assert thread is not threading.current_thread()


async def test_a_full_disk_for_this_sites_own_state_is_not_a_teachers_matter(site, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(site.store, "pin_schema", fail)
    with pytest.raises(OSError, match="No space left"):
        await site.performer.perform(gossip.PinSchema("tokyo", b"s" * 32))


async def test_own_frames_are_renewed_and_keyframes_asked_of_the_ranks(tmp_path):
    renewed = [frame(50, incarnation=8)[0], frame(100, 50, incarnation=8)[0]]
    site = Site(tmp_path, renewed=renewed)
    published = await site.performer.perform(gossip.RaiseIncarnation(8))
    assert published == [gossip.FramePublished(signed) for signed in renewed]
    assert site.store.incarnation == 8
    assert await site.performer.perform(gossip.RequestKeyframe()) == []
    assert site.outlet.messages == [KeyframeWanted()]
    site.outlet.joined = False
    assert await site.performer.perform(gossip.RequestKeyframe()) == [gossip.KeyframeUnavailable()]
    site.store.close()
    site.events.close()


async def test_what_a_peer_wants_is_left_to_the_uploads(site):
    signed = await site.offer(50)
    assert await site.performer.perform(gossip.ServeChunk("oslo", signed.frame_id, 0)) == []
    assert site.served == [("oslo", signed.frame_id, 0)]


async def test_the_ranks_are_told_of_what_teachers_announced_now_and_when_they_join(site):
    announced = [VersionAnnounced("tokyo", 1, 50, 10), VersionAnnounced("tokyo", 1, 100, 10)]
    for event in [*announced, VersionAnnounced("oslo", 1, 70, 10)]:  # who is no teacher
        await site.performer.perform(gossip.Report(event))
        site.now_s += 7
    assert [record["origin"] for record in site.records] == ["tokyo", "tokyo", "oslo"]
    assert site.outlet.messages == [VersionKnown("tokyo", 1, 50), VersionKnown("tokyo", 1, 100)]
    both = VersionKnown("tokyo", 1, 50, 21.0), VersionKnown("tokyo", 1, 100, 14.0)
    assert site.performer.known() == both
    await site.offer(100)
    site.now_s += 3
    assert site.performer.known() == (VersionKnown("tokyo", 1, 100, 17.0),), "what is older is not offered"
    reopened = site.open()
    site.now_s += 1
    assert reopened.known() == (VersionKnown("tokyo", 1, 100, 1.0),)


async def test_what_the_ranks_are_told_of_one_teacher_is_bounded(site):
    for step in range(500):
        site.now_s += 1
        await site.performer.perform(gossip.Report(VersionAnnounced("tokyo", 1, step, 10)))
    known = site.performer.known()
    assert len(known) <= 32
    assert (known[0], known[-1]) == (VersionKnown("tokyo", 1, 0, 499.0), VersionKnown("tokyo", 1, 499, 0.0))


async def test_reports_go_to_the_log_and_refusals_are_counted_first(site):
    await site.performer.perform(gossip.Report(PeerConnected("tokyo")))
    await site.performer.perform(gossip.Report(Refused("tokyo", "malformed", "no")))
    assert [record["event"] for record in site.records] == ["peer-connected"]
    [refused] = site.refusals
    assert (refused.peer, refused.reason) == ("tokyo", "malformed")
