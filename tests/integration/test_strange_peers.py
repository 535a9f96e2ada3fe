"""Peers that break no rule and are trouble: ruined weights that recover, and far too many checkpoints.

New machines, wrong clocks and twins are in `test_fault_processes`.
"""

from __future__ import annotations

import asyncio

from integration.conftest import Site, Sites
from integration.hostile import HostileTokyo, encode, hostile, snapshot_of_tiny_model

from p2pcodistill.checkpoint.manifest import sign_manifest
from p2pcodistill.gossip.messages import Announce
from p2pcodistill.transport.base import Closed

NUM_ANNOUNCEMENTS = 1500


async def test_ruined_weights_do_not_teach_until_they_recover_and_a_flood_of_announcements_is_borne(
    sites: Sites,
) -> None:
    # A model that knows nothing is some 4 nats worse than a trained one: within this margin. Ruined weights are not.
    berlin, tokyo_site = sites.make(
        "berlin", "tokyo", training={"num_steps": 10_000_000}, codistillation={"gate_margin": 6.0}
    )
    await berlin.start()
    await berlin.until("step-measured")
    async with hostile(HostileTokyo(berlin, tokyo_site)) as tokyo:
        await tokyo.greet()
        tokyo.serving = asyncio.create_task(tokyo.next(Closed))
        await ruin_and_recover(berlin, tokyo)
        await flood(berlin, tokyo, from_step=21)
    step = berlin.all("step-measured")[-1]["step"]
    await berlin.until("step-measured", lambda record: record["step"] >= step + 50)
    assert not berlin.all("node-stopped") and not berlin.all("group-exited")


async def ruin_and_recover(berlin: Site, tokyo: HostileTokyo) -> None:
    ruined = snapshot_of_tiny_model(10)
    for tensor in ruined.tensors.values():
        tensor.mul_(30.0)
    tokyo.frame = encode(ruined)
    tokyo.announce(sign_manifest(tokyo.manifest(10, ruined.schema_hash), tokyo.identity))
    gated = await berlin.until("teacher-gated")
    assert (gated["teacher"], gated["teacher_step"]) == ("tokyo", 10)
    assert gated["loss"] > gated["student_loss"] + 6.0
    untrained = snapshot_of_tiny_model(20)
    tokyo.frame = encode(untrained)
    tokyo.announce(sign_manifest(tokyo.manifest(20, untrained.schema_hash), tokyo.identity))
    readmitted = await berlin.until("teacher-readmitted")
    assert readmitted["teacher_step"] == 20


async def flood(berlin: Site, tokyo: HostileTokyo, *, from_step: int) -> None:
    node, num_fetched_before = berlin.tree()[0], len(berlin.all("frame-fetched"))
    snapshot = snapshot_of_tiny_model(1)
    tokyo.frame = encode(snapshot)
    before_bytes = node.memory_info().rss
    manifests = [
        sign_manifest(tokyo.manifest(step, snapshot.schema_hash), tokyo.identity)
        for step in range(from_step, from_step + NUM_ANNOUNCEMENTS)
    ]
    newest_step = from_step + NUM_ANNOUNCEMENTS - 1
    # Each of them is in order, and newer than the one before; what is wanted of them arrives only then.
    tokyo.held = []
    await tokyo.flood(Announce(signed.body, signed.signature) for signed in manifests)
    tokyo.serve_held()
    await berlin.until("frame-fetched", lambda record: record["step"] == newest_step)
    # All but the last once more, which are replays.
    await tokyo.flood(Announce(signed.body, signed.signature) for signed in manifests[:-1])
    quarantined = await berlin.until("peer-quarantined")
    assert (quarantined["peer"], quarantined["reason"]) == ("tokyo", "replayed")
    assert berlin.all("version-announced")[-1]["step"] == newest_step, "the newest is known"
    assert len(berlin.all("frame-fetched")) - num_fetched_before < NUM_ANNOUNCEMENTS / 2, (
        "and not all was fetched that was overtaken"
    )
    assert node.memory_info().rss - before_bytes < 64 << 20
    assert berlin.run_folder.joinpath("events.jsonl").stat().st_size < 4 << 20
