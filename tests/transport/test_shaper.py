"""Caps and turns: rates are met whatever the sizes, nobody starves, and control is paid for by bulk."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from p2pcodistill.config import NodeConfig, PeerConfig
from p2pcodistill.identity import Identity
from p2pcodistill.transport.shaper import Shaper, TokenBucket, UploadCaps

CHUNK = 1 << 18


class Site:
    """Serves requests of `chunk_bytes` as a shaper says, in simulated time; everybody listed always asks for more."""

    def __init__(self, caps: UploadCaps, chunk_bytes: dict[str, int], *, lateness_s: float = 0.0) -> None:
        self.shaper: Shaper[int] = Shaper(caps, max_requests=4)
        self.chunk_bytes, self.lateness_s = chunk_bytes, lateness_s
        self.now_s = 0.0
        self.served: Counter[str] = Counter()
        self.control_bytes_s = 0.0
        self._num_requests = 0
        self._rng = random.Random(3)

    def run(self, seconds: float, *, control_peer: str = "") -> None:
        until_s, controlled_s = self.now_s + seconds, self.now_s
        while self.now_s < until_s:
            for peer in self.chunk_bytes:
                self._num_requests += 1
                self.shaper.add(peer, self._num_requests)
            if control_peer:
                num_bytes = int((self.now_s - controlled_s) * self.control_bytes_s)
                controlled_s = self.now_s
                self.shaper.spend(control_peer, num_bytes, self.now_s)
            found = self.shaper.next(self.now_s)
            if found is None:
                wait_s = self.shaper.wait_s(self.now_s)
                assert wait_s is not None and wait_s > 0
                self.now_s += wait_s + self._rng.uniform(0, self.lateness_s)
            else:
                self.shaper.finish(*found)
                peer, _ = found
                self.served[peer] += self.chunk_bytes[peer]
                self.shaper.spend(peer, self.chunk_bytes[peer], self.now_s)


@pytest.mark.parametrize("lateness_s", [0.0, 0.02])
@pytest.mark.parametrize("rate_bytes_s", [2.5e5, 1e6, 1e8])
def test_a_cap_is_met_within_a_chunk_and_a_burst(rate_bytes_s: float, lateness_s: float) -> None:
    site = Site(UploadCaps(rate_bytes_s), {"oslo": CHUNK, "lima": CHUNK // 4}, lateness_s=lateness_s)
    site.run(30.0)
    achieved = sum(site.served.values()) / (30.0 * rate_bytes_s)
    assert 0.97 <= achieved <= 1.02 + CHUNK / (30.0 * rate_bytes_s)


def test_a_bucket_saves_up_a_quarter_of_a_second_at_most() -> None:
    bucket = TokenBucket(1000.0)
    assert bucket.wait_s(0.0) == 0.0
    bucket.spend(250, 3600.0)  # an hour later
    assert bucket.wait_s(3600.0) == 0.0
    bucket.spend(500, 3600.0)
    assert bucket.wait_s(3600.0) == pytest.approx(0.5)
    assert bucket.wait_s(3600.4) == pytest.approx(0.1)
    assert bucket.wait_s(3600.6) == 0.0


def test_peers_share_a_cap_in_bytes_however_large_their_chunks_and_however_much_they_ask() -> None:
    site = Site(UploadCaps(1e6), {"greedy": 4 * CHUNK, "modest": CHUNK // 4, "other": CHUNK})
    site.run(100.0)
    assert {round(num_bytes / 1e8, 1) for num_bytes in site.served.values()} == {0.3}


def test_who_comes_late_gets_an_equal_share_from_then_on_and_nothing_for_the_past() -> None:
    site = Site(UploadCaps(1e6), {"early": CHUNK})
    site.run(100.0)
    site.served.clear()
    site.chunk_bytes["late"] = CHUNK
    site.run(100.0)
    assert site.served["late"] == pytest.approx(site.served["early"], rel=0.1)


def test_who_was_away_gets_nothing_for_the_past_though_nobody_asks_at_that_instant() -> None:
    shaper: Shaper[int] = Shaper(UploadCaps(), max_requests=4)

    def serve(*, further: int | None = None) -> str:
        found = shaper.next(0.0)
        assert found is not None
        if further is not None:
            shaper.add(found[0], further)
        shaper.finish(*found)
        shaper.spend(found[0], CHUNK, 0.0)
        return found[0]

    for number in range(1000):
        shaper.add("early", number)  # when it has been served the last one: its wants have to travel
        assert serve() == "early"
    shaper.add("late", 0)
    shaper.add("early", 1000)
    served: Counter[str] = Counter()
    for number in range(1001, 1101):
        served[serve(further=number)] += 1
    assert served["late"] == pytest.approx(served["early"], abs=2)


def test_a_capped_link_leaves_the_rest_to_others() -> None:
    site = Site(UploadCaps(1e6, {"thin": 1e5}), {"thin": CHUNK // 4, "fat": CHUNK})
    site.run(100.0)
    assert site.served["thin"] == pytest.approx(1e7, rel=0.03)
    assert site.served["fat"] == pytest.approx(9e7, rel=0.03)


def test_control_is_never_asked_to_wait_and_counts_nevertheless() -> None:
    site = Site(UploadCaps(1e6), {"oslo": CHUNK})
    site.control_bytes_s = 4e5
    site.run(100.0, control_peer="oslo")
    assert site.served["oslo"] == pytest.approx(6e7, rel=0.03)


def test_a_request_is_queued_once_and_only_so_many_of_them() -> None:
    shaper: Shaper[str] = Shaper(UploadCaps(), max_requests=2)
    assert [shaper.add("oslo", request) for request in ("a", "b", "a", "c")] == [True, True, True, False]
    assert shaper.num_waiting("oslo") == 2
    assert shaper.add("lima", "c")
    served = []
    while (found := shaper.next(0.0)) is not None:
        served.append(found)
        shaper.finish(*found)
        shaper.spend(found[0], 1, 0.0)
    assert served == [("oslo", "a"), ("lima", "c"), ("oslo", "b")]
    assert shaper.wait_s(0.0) is None


def test_who_is_blocked_or_gone_holds_up_nobody() -> None:
    shaper: Shaper[str] = Shaper(UploadCaps(), max_requests=2)
    shaper.add("oslo", "a")
    shaper.add("lima", "b")
    assert shaper.next(0.0, blocked={"oslo"}) == ("lima", "b")
    shaper.drop("lima")
    assert shaper.next(0.0, blocked={"oslo"}) is None
    assert shaper.wait_s(0.0, blocked={"oslo"}) is None
    assert shaper.next(0.0) == ("oslo", "a")


def test_caps_are_read_from_a_sites_file() -> None:
    line = str(Identity.generate().public)
    peers = (
        PeerConfig(name="oslo", public_identity=line, max_upload_mbit=2.0),
        PeerConfig(name="lima", public_identity=line),
    )
    config = NodeConfig(name="berlin", peers=peers, max_upload_mbit=8.0)
    assert UploadCaps.of(config) == UploadCaps(1e6, {"oslo": 2.5e5})
    assert UploadCaps.of(NodeConfig(name="berlin")) == UploadCaps()
