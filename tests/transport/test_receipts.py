"""Receipts: what is under way, how much may be, and what they show of the link."""

from __future__ import annotations

import pytest

from p2pcodistill.errors import MalformedError
from p2pcodistill.gossip.window import LinkEstimate
from p2pcodistill.transport.receipts import (
    MAX_UNDER_WAY_BYTES,
    MIN_UNDER_WAY_BYTES,
    RECEIPT_INTERVAL_BYTES,
    RECEIPT_INTERVAL_S,
    Deliveries,
    Receipts,
)

CHUNK = 1 << 18


def test_what_is_under_way_is_bounded_until_receipts_come() -> None:
    deliveries = Deliveries(LinkEstimate())
    assert deliveries.has_room(10 * MIN_UNDER_WAY_BYTES), "one payload always fits"
    num_sent = 0
    while deliveries.has_room(CHUNK):
        deliveries.send(CHUNK, 0.0)
        num_sent += 1
    assert num_sent * CHUNK == deliveries.num_under_way_bytes == MIN_UNDER_WAY_BYTES
    deliveries.acknowledge(3 * CHUNK, 1.0)
    assert deliveries.num_under_way_bytes == (num_sent - 3) * CHUNK
    assert deliveries.has_room(3 * CHUNK) and not deliveries.has_room(4 * CHUNK)


def test_a_long_fat_link_gets_more_room_and_a_bound_nevertheless() -> None:
    link = LinkEstimate()
    link.observe(0.2, 2 << 20, 0.2, 0.0)
    deliveries = Deliveries(link)
    deliveries.send(CHUNK, 0.0)
    assert deliveries.has_room(7 << 20) and not deliveries.has_room(8 << 20)
    link.observe(0.2, 1 << 30, 0.2, 0.0)
    assert not deliveries.has_room(MAX_UNDER_WAY_BYTES)


def test_receipts_show_rate_and_round_trip() -> None:
    link = LinkEstimate()
    deliveries = Deliveries(link)
    for index in range(8):  # handed over at once, delivered one a second
        deliveries.send(CHUNK, 0.01 * index)
    for index in range(1, 9):
        deliveries.acknowledge(index * CHUNK, 1.0 * index)
    assert link.rate_bytes_s == pytest.approx(CHUNK, rel=0.05)
    assert link.round_trip_s == 1.0


def test_a_receipt_for_many_payloads_is_no_burst() -> None:
    link = LinkEstimate()
    deliveries = Deliveries(link)
    for index in range(1, 101):  # one a millisecond, and a receipt for every ten of them, at once
        deliveries.send(CHUNK, 0.001 * index)
        if index % 10 == 0:
            deliveries.acknowledge(index * CHUNK, 0.001 * index + 0.0001)
    assert link.rate_bytes_s == pytest.approx(CHUNK / 0.001, rel=0.15)


def test_a_receipt_for_what_was_not_sent_is_refused() -> None:
    deliveries = Deliveries(LinkEstimate())
    deliveries.send(CHUNK, 0.0)
    with pytest.raises(MalformedError, match="receipt"):
        deliveries.acknowledge(CHUNK + 1, 1.0)
    deliveries.acknowledge(CHUNK, 1.0)
    with pytest.raises(MalformedError, match="receipt"):
        deliveries.acknowledge(0, 1.0)
    assert deliveries.num_under_way_bytes == 0


def test_receipts_are_few_and_soon() -> None:
    receipts = Receipts()
    assert receipts.wait_s(0.0) is None
    receipts.receive(1000)
    assert receipts.wait_s(0.0) == 0.0, "the first at once"
    assert receipts.num_bytes == 1000
    assert receipts.wait_s(0.0) == 0.0, "it is not told before it is"
    receipts.tell(0.0)
    assert receipts.wait_s(0.0) is None
    receipts.receive(500)
    assert receipts.wait_s(0.005) == pytest.approx(RECEIPT_INTERVAL_S - 0.005)
    assert receipts.wait_s(RECEIPT_INTERVAL_S) == 0.0
    receipts.receive(RECEIPT_INTERVAL_BYTES)
    assert receipts.wait_s(0.005) == 0.0, "and at once where there is much to tell"
    assert receipts.num_bytes == 1500 + RECEIPT_INTERVAL_BYTES
