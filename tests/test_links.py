"""The meter of links: what is reported of them and when, and how frames are cut for the slowest."""

from p2pcodistill.checkpoint.manifest import DEFAULT_CHUNK_BYTES, MAX_CHUNK_BYTES
from p2pcodistill.gossip.window import LinkEstimate
from p2pcodistill.links import (
    LARGEST_WANTED_CHUNK_BYTES,
    LEAST_CHUNK_BYTES,
    MAX_CHUNKS,
    LinkMeter,
    choose_chunk_bytes,
)
from p2pcodistill.telemetry.node_events import LinkMeasured
from p2pcodistill.transport.base import Traffic
from p2pcodistill.transport.shaper import UploadCaps

MBIT = 125_000.0


class Site:
    """A meter, and what it measures."""

    def __init__(self, *students, caps=None):
        self.traffic = {peer: Traffic(0, 0) for peer in ("oslo", "lima")}
        self.downloads, self.waiting = {}, {}
        self.meter = LinkMeter(
            students or ("oslo", "lima"),
            caps or UploadCaps(),
            lambda: self.traffic,
            lambda: self.downloads,
            lambda peer: self.waiting.get(peer, 0),
        )

    def move(self, peer, num_bytes, *, rate_mbit=None, round_trip_s=None, num_under_way=0):
        before = self.traffic[peer]
        self.traffic[peer] = Traffic(
            before.num_bytes_sent + num_bytes,
            before.num_bytes_received,
            num_under_way,
            rate_mbit and rate_mbit * MBIT,
            round_trip_s,
        )


def test_a_link_is_reported_when_something_moved_over_it_or_it_was_lost():
    site = Site()
    assert site.meter.measure() == []
    site.move("oslo", 1 << 20, rate_mbit=20, round_trip_s=0.3, num_under_way=1000)
    site.downloads["oslo"] = LinkEstimate()
    site.downloads["oslo"].observe(0.2, 100_000, 0.2, 1.0)
    site.waiting["oslo"] = 500
    measured = LinkMeasured("oslo", 20.0, 4.0, 200.0, num_connection_losses=0, queued_bytes=1500)
    assert site.meter.measure() == [measured]
    assert site.meter.measure() == []
    site.move("oslo", 1000, rate_mbit=20)
    assert site.meter.measure() == [], "signs of life"
    site.meter.lose("lima")
    assert site.meter.measure() == [LinkMeasured("lima", None, None, None, 1, 0)]


def test_the_slowest_students_come_first_and_caps_are_links_of_their_own():
    site = Site(caps=UploadCaps(10 * MBIT, {"lima": 3 * MBIT}))
    assert site.meter.student_rates_bytes_s() == [3 * MBIT, 5 * MBIT], "the site's cap is shared"
    site.move("oslo", 0, rate_mbit=2)
    site.move("lima", 0, rate_mbit=1000)
    assert site.meter.student_rates_bytes_s() == [2 * MBIT, 3 * MBIT]
    assert Site("oslo").meter.student_rates_bytes_s() == [], "nothing is known"


def test_all_but_the_slowest_quarter_of_the_students_are_the_measure():
    def shared(*rates_mbit):
        traffic = {str(i): Traffic(0, 0, 0, rate * MBIT) for i, rate in enumerate(rates_mbit)}
        meter = LinkMeter(list(traffic), UploadCaps(), lambda: traffic, dict, lambda peer: 0)
        rate_bytes_s = meter.shared_rate_bytes_s()
        return rate_bytes_s and rate_bytes_s / MBIT

    assert shared() is None
    assert shared(7) == 7
    assert shared(100, 1, 50) == 1
    assert shared(100, 1, 50, 60) == 50
    assert shared(*range(1, 9)) == 3


def test_chunks_take_half_a_second_on_the_slowest_link():
    site = Site()
    assert site.meter.chunk_bytes(100 << 20) == DEFAULT_CHUNK_BYTES
    site.move("oslo", 0, rate_mbit=1000)
    assert site.meter.chunk_bytes(100 << 20) == LARGEST_WANTED_CHUNK_BYTES
    site.move("lima", 0, rate_mbit=3)
    assert site.meter.chunk_bytes(100 << 20) == 1 << 17


def test_chunks_stay_within_bounds_and_manifests_small():
    assert choose_chunk_bytes(1 << 20, 1.0) == LEAST_CHUNK_BYTES
    assert choose_chunk_bytes(1, None) == DEFAULT_CHUNK_BYTES
    assert choose_chunk_bytes(1 << 20, 1e9) == DEFAULT_CHUNK_BYTES, "there would be nothing to share"
    assert choose_chunk_bytes(32 << 20, 1e9) == 2 * DEFAULT_CHUNK_BYTES
    for num_frame_bytes in (1 << 28, 1 << 30, 10 << 30):
        chunk_bytes = choose_chunk_bytes(num_frame_bytes, 1.0)
        assert chunk_bytes & (chunk_bytes - 1) == 0
        assert -(-num_frame_bytes // chunk_bytes) <= MAX_CHUNKS
    assert choose_chunk_bytes(64 << 30, 1.0) == MAX_CHUNK_BYTES
