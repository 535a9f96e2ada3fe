"""A member gone bad, against a real node that trains: everything wrong is refused, counted and shown, and nothing stops."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest
from integration.hostile import HostileTokyo, encode, encode_ruined, hostile, snapshot_of_tiny_model
from patience import GENEROUS_S

from p2pcodistill.checkpoint.manifest import SignedManifest, Version, sign_manifest
from p2pcodistill.gossip.messages import CatchUp, Lane
from p2pcodistill.identity import Identity
from p2pcodistill.transport.base import Closed, Rejected


@pytest.fixture
async def berlin_and_tokyo(sites):
    berlin, tokyo = sites.make("berlin", "tokyo", training={"num_steps": 10_000_000})
    await berlin.start()
    await berlin.until("training-started")
    return berlin, tokyo


async def refusal(berlin, reason: str, *words: str, event: str = "refused"):
    record = await berlin.until(
        event, lambda r: r["reason"] == reason and all(word in r["why"] for word in words)
    )
    return record


async def test_everything_wrong_from_a_member_is_refused_and_a_good_checkpoint_still_teaches(
    berlin_and_tokyo,
):
    berlin, tokyo_site = berlin_and_tokyo
    snapshot = snapshot_of_tiny_model(10)
    async with hostile(HostileTokyo(berlin, tokyo_site)) as tokyo:
        await tokyo.greet()
        await berlin.until("peer-connected")
        tokyo.serving = asyncio.create_task(tokyo.next(Closed))

        tokyo.transport.send("berlin", Lane.CONTROL, [b"\xc1"])
        await refusal(berlin, "malformed")
        tokyo.transport.send("berlin", Lane.CONTROL, [bytes(1 << 20)])
        await refusal(berlin, "oversized")

        tokyo.frame = encode(snapshot)
        manifest = tokyo.manifest(10, snapshot.schema_hash)
        tokyo.announce(sign_manifest(manifest, Identity.generate()))
        await refusal(berlin, "bad-signature")
        tokyo.announce(sign_manifest(replace(manifest, origin="berlin"), tokyo.identity))
        await refusal(berlin, "bad-signature", "in the name of 'berlin'")
        tokyo.announce(sign_manifest(replace(manifest, run="yesterday"), tokyo.identity))
        await refusal(berlin, "replayed", "yesterday")

        tokyo.corrupt_chunks = 1
        tokyo.announce(sign_manifest(manifest, tokyo.identity))
        await refusal(berlin, "bad-checksum")
        assert tokyo.corrupt_chunks == 0
        await berlin.until("teacher-swapped", lambda r: r["teacher_step"] == 10)

        tokyo.announce(sign_manifest(replace(manifest, version=Version(1, 9)), tokyo.identity))
        await refusal(berlin, "replayed", "step 9", "after step 10")
        tokyo.announce(sign_manifest(replace(manifest, num_fp16_bytes=1), tokyo.identity))
        await refusal(berlin, "replayed", "two different")
        tokyo.announce(sign_manifest(tokyo.manifest(11, bytes(32)), tokyo.identity))
        await refusal(berlin, "wrong-schema")

        tokyo.frame = encode_ruined(snapshot_of_tiny_model(20))
        tokyo.announce(sign_manifest(tokyo.manifest(20, snapshot.schema_hash), tokyo.identity))
        await refusal(berlin, "non-finite", "readout.weight", event="teacher-refused")

        assert await asyncio.wait_for(tokyo.asked.get(), GENEROUS_S) == CatchUp(None, afresh=True), (
            "berlin has nothing to build on"
        )

        good = snapshot_of_tiny_model(30)
        tokyo.frame = encode(good)
        tokyo.announce(sign_manifest(tokyo.manifest(30, good.schema_hash), tokyo.identity))
        swap = await berlin.until("teacher-swapped", lambda r: r["teacher_step"] == 30)
        await berlin.until("step-measured", lambda r: r["step"] > swap["step"])
        assert tokyo.num_chunks_served >= 4
    assert not berlin.all("node-stopped") and not berlin.all("group-exited")


async def test_chains_that_lead_nowhere_are_refused_or_replaced(berlin_and_tokyo):
    berlin, tokyo_site = berlin_and_tokyo
    async with hostile(HostileTokyo(berlin, tokyo_site)) as tokyo:
        await tokyo.greet()
        await berlin.until("peer-connected")
        tokyo.serving = asyncio.create_task(tokyo.next(Closed))
        snapshot = snapshot_of_tiny_model(10)
        schema_hash = snapshot.schema_hash

        def signed(step: int, base_step: int | None) -> SignedManifest:
            base = None if base_step is None else Version(1, base_step)
            return sign_manifest(tokyo.manifest(step, schema_hash, base), tokyo.identity)

        # A delta frame on nothing that berlin has: it asks for a path, and one with a gap is no path.
        tokyo.frame = encode(snapshot)
        tokyo.announce(signed(9, 8))
        assert await asyncio.wait_for(tokyo.asked.get(), GENEROUS_S) == CatchUp(None)
        tokyo.announce(signed(9, 8), num_more=0)
        await refusal(berlin, "malformed", "path")
        tokyo.announce(signed(10, None))
        await berlin.until("teacher-swapped", lambda r: r["teacher_step"] == 10)

        # A delta frame that is something else: the ranks refuse it, and the chain is given up.
        tokyo.announce(signed(20, 10))
        await refusal(berlin, "malformed", "step 20", event="teacher-refused")
        assert await asyncio.wait_for(tokyo.asked.get(), GENEROUS_S) == CatchUp(None, afresh=True)
        tokyo.frame = encode(snapshot_of_tiny_model(30))
        tokyo.announce(signed(30, None))
        await berlin.until("teacher-swapped", lambda r: r["teacher_step"] == 30)
    assert not berlin.all("node-stopped") and not berlin.all("group-exited")


async def test_a_stranger_never_gets_a_message_through_and_who_means_another_run_is_refused_by_name(
    berlin_and_tokyo,
):
    berlin, tokyo_site = berlin_and_tokyo
    async with hostile(HostileTokyo(berlin, tokyo_site, Identity.generate())) as stranger:
        record = await refusal(berlin, "unknown-peer", "not on this site's list")
        assert record["peer"] is None
        rejected = await stranger.next(Rejected)
        assert rejected.reason == "unknown-peer" and "does not know our key" in rejected.why
    assert not berlin.all("peer-connected")
    tokyo = HostileTokyo(berlin, tokyo_site)
    tokyo.hello = replace(tokyo.hello, topology_digest=bytes(32))
    async with hostile(tokyo):
        await tokyo.greet()
        record = await refusal(berlin, "hello-mismatch", "topology")
        assert record["peer"] == "tokyo"
    assert not berlin.all("peer-connected")
