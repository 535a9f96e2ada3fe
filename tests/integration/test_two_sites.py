"""Two real nodes with CURVE on loopback: they codistil, all ranks agree, and a killed site finds its way back."""

import asyncio
import json
import signal
import time
from pathlib import Path

from faults import TcpProxy
from patience import GENEROUS_S

from p2pcodistill.simulation.shaping import LinkShape, ShapedLink

RECORD_SWAPS = Path(__file__).with_name("record_swaps.py")


async def test_two_sites_codistil_a_language_model_and_leave_together(sites):
    berlin, tokyo = sites.make(
        "berlin",
        "tokyo",
        training={"num_steps": 1000, "report_interval_steps": 50},
        codistillation={"exchange_interval_steps": 50},
    )
    await sites.start_together(berlin, tokyo)
    assert (await berlin.wait(), await tokyo.wait()) == (0, 0), berlin.log() + tokyo.log()
    for site, peer in ((berlin, "tokyo"), (tokyo, "berlin")):
        swaps = site.all("teacher-swapped")
        assert len(swaps) >= 2 and {record["teacher"] for record in swaps} == {peer}
        versions = [(record["incarnation"], record["teacher_step"]) for record in swaps]
        assert versions == sorted(versions) and len(set(versions)) == len(versions)
        assert any(record["distillation_loss"] is not None for record in site.all("step-measured"))
        published = site.all("frame-published")
        assert published[-1]["step"] == 1000
        assert published[0]["kind"] == "keyframe"
        deltas = [record for record in published if record["kind"] == "delta"]
        assert len(deltas) > len(published) / 2
        assert sum(r["num_fp16_bytes"] for r in deltas) > 4 * sum(r["num_bytes"] for r in deltas)
        assert "delta" in {record["kind"] for record in site.all("frame-fetched")}
        assert site.all("training-ended")[-1]["finished"]
        assert site.all("node-stopped")[-1]["reason"] == "finished"
        assert not site.all("refused") and not site.all("teacher-refused")
        traffic = site.all("traffic-measured")[-1]
        num_bytes_fetched = sum(record["num_bytes"] for record in site.all("frame-fetched"))
        assert traffic["num_bytes_received"] > num_bytes_fetched > 0
        assert site.model_bytes()


async def test_all_ranks_of_a_users_own_script_swap_at_the_same_step(sites):
    berlin, tokyo = sites.make("berlin", "tokyo", group={"num_ranks": 2})
    for site in (berlin, tokyo):
        site.set(
            group={"script": str(RECORD_SWAPS), "script_arguments": [str(sites.folder), site.name, "1000"]}
        )
        site.set(codistillation={"exchange_interval_steps": 100, "agreement_interval_steps": 5})
        await site.start()
    assert (await berlin.wait(), await tokyo.wait()) == (0, 0), berlin.log() + tokyo.log()
    for site, peer in ((berlin, "tokyo"), (tokyo, "berlin")):
        ranks = [json.loads((sites.folder / f"{site.name}-rank{rank}.json").read_text()) for rank in (0, 1)]
        assert ranks[0] == ranks[1]
        versions = [tuple(teachers[peer]) for _, teachers, _ in ranks[0] if teachers]
        assert len(set(versions)) >= 2, "the ranks swapped at least twice"
        assert versions == sorted(versions)


async def test_a_dead_peer_costs_nothing_but_age_and_is_welcome_back(sites):
    berlin, tokyo = sites.make("berlin", "tokyo", training={"num_steps": 1_000_000})
    await berlin.start()
    await tokyo.start()
    swapped = await tokyo.until("teacher-swapped", count=2)
    await berlin.until("teacher-swapped", count=2)
    # One from before would know of no teacher to wait for.
    await tokyo.until("training-checkpointed", lambda record: record["step"] > swapped["step"])
    tokyo.kill()
    await tokyo.wait()
    await berlin.until("peer-disconnected")
    step = berlin.all("step-measured")[-1]["step"]
    await berlin.until("step-measured", lambda record: record["step"] >= step + 50)

    await tokyo.start()
    again = await tokyo.until("training-started", count=2)
    assert again["start_step"] > 0
    # The store held berlin's checkpoint: it teaches before the first step.
    assert any(record["step"] == again["start_step"] for record in tokyo.all("teacher-swapped"))
    newer = await berlin.until("teacher-swapped", lambda record: record["incarnation"] == 2)
    assert newer["teacher"] == "tokyo"
    assert not berlin.all("refused")
    for site in (berlin, tokyo):
        site.kill(signal.SIGTERM)
        assert await site.wait() == 128 + signal.SIGTERM


async def test_a_peer_killed_within_a_transfer_goes_on_where_it_was(sites):
    # A frame of many chunks: the script hands over random bytes, which the nodes move without knowing what they are.
    num_bytes, chunk_bytes, window_bytes = 24 << 20, 256 << 10, 4 << 20
    berlin, tokyo = sites.make("berlin", "tokyo")
    for site in (berlin, tokyo):
        script = Path(__file__).with_name("publish_bytes.py")
        site.set(group={"script": str(script), "script_arguments": [site.name, str(num_bytes)]})
    async with TcpProxy(berlin.port, hold_after_bytes=num_bytes // 2) as proxy:
        # tokyo dials berlin through the proxy, and berlin does not know where tokyo is.
        tokyo.set_peer("berlin", address=f"tcp://127.0.0.1:{proxy.port}")
        berlin.set_peer("tokyo", address=None)
        await berlin.start()
        await tokyo.start()
        await proxy.held.wait()
        berlin.kill()
        await berlin.wait()
        assert proxy.num_held >= 1
        num_bytes_before = proxy.num_bytes_from_server
        proxy.hold_after_bytes = None
        await proxy.cut()
        await berlin.start()
        fetched = await tokyo.until("frame-fetched")
        assert proxy.num_cut >= 1
    assert fetched["num_bytes"] == num_bytes
    assert fetched["num_resent_bytes"] <= window_bytes
    num_bytes_after = proxy.num_bytes_from_server - num_bytes_before
    assert num_bytes_before + num_bytes_after < num_bytes + window_bytes + 4 * chunk_bytes
    assert num_bytes_after < 0.75 * num_bytes, "only missing chunks travelled again"


async def test_a_student_killed_within_a_transfer_goes_on_where_it_was(sites):
    num_bytes = 24 << 20
    berlin, tokyo = sites.make("berlin", "tokyo")
    for site in (berlin, tokyo):
        script = Path(__file__).with_name("publish_bytes.py")
        site.set(group={"script": str(script), "script_arguments": [site.name, str(num_bytes)]})
    # Thin enough that the window is what the link holds, and no more.
    shape = LinkShape(bandwidth_mbit=80.0, latency_ms=20.0)
    link = ShapedLink(f"tcp://127.0.0.1:{berlin.port}", shape)
    try:
        tokyo.set_peer("berlin", address=await link.open())
        berlin.set_peer("tokyo", address=None)
        await berlin.start()
        await tokyo.start()
        await until_forwarded(link, num_bytes // 8)
        begun_s, num_bytes_before = time.monotonic(), link.num_bytes_forwarded
        await until_forwarded(link, num_bytes // 2)
        num_bytes_meanwhile, taken_s = link.num_bytes_forwarded - num_bytes_before, time.monotonic() - begun_s
        tokyo.kill()
        assert await tokyo.wait() == -signal.SIGKILL
        assert not tokyo.all("frame-fetched"), "the kill struck within the transfer"
        await tokyo.start()
        fetched = await tokyo.until("frame-fetched")
        num_bytes_sent = link.num_bytes_forwarded
    finally:
        await link.close()
    assert fetched["num_bytes"] == num_bytes
    # What the relay carried beyond the frame was sent twice, but for envelopes and control: half, from the start.
    assert num_bytes <= num_bytes_sent <= num_bytes + num_bytes / 4
    berlin.kill(signal.SIGTERM)  # what was measured last is told in the end
    await berlin.wait()
    measured = [record for record in berlin.all("link-measured") if record["upload_mbit"] is not None]
    assert measured and all(record["peer"] == "tokyo" for record in measured)
    assert measured[-1]["num_connection_losses"] >= 1
    mean_mbit = num_bytes_meanwhile * 8 / 1e6 / taken_s
    assert mean_mbit / 2 < max(record["upload_mbit"] for record in measured) < 1.5 * shape.bandwidth_mbit


async def until_forwarded(link: ShapedLink, num_bytes: int) -> None:
    async with asyncio.timeout(GENEROUS_S):
        while link.num_bytes_forwarded < num_bytes:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
