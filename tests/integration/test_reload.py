"""The allow-list changes while nodes run: a member that is revoked is gone at once, refused by name, and taken back."""

import signal


async def test_a_member_is_revoked_and_taken_back_without_a_restart(sites):
    berlin, tokyo = sites.make("berlin", "tokyo", training={"num_steps": 10_000_000})
    berlin.set(revoked=["tokyo"])  # from the start
    await berlin.start()
    assert (await berlin.until("member-trust-changed"))["is_trusted"] is False
    await tokyo.start()
    refused = await berlin.until("refused")
    assert (refused["peer"], refused["reason"]) == ("tokyo", "revoked") and "tokyo" in refused["why"]

    await reload(berlin, revoked=[])
    await berlin.until("teacher-swapped")
    await reload(berlin, revoked=["tokyo"])
    assert berlin.all("member-trust-changed")[-1]["is_trusted"] is False
    await berlin.until("peer-disconnected")
    told = await tokyo.until("refused", lambda r: r["reason"] == "revoked")
    assert told["peer"] == "berlin"
    expired = await berlin.until("teacher-expired")
    assert expired["teacher"] == "tokyo" and "revoked" in expired["why"]
    await berlin.until(
        "step-measured", lambda r: r["step"] > expired["step"] and r["distillation_loss"] is None
    )
    assert len(berlin.all("peer-connected")) == 1
    num_swaps = len(berlin.all("teacher-swapped"))

    await reload(berlin, revoked=[])
    await berlin.until("peer-connected", count=2)
    again = await berlin.until("teacher-swapped", count=num_swaps + 1)
    assert again["step"] > expired["step"]
    await berlin.until(
        "step-measured", lambda r: r["step"] > again["step"] and r["distillation_loss"] is not None
    )

    await a_file_that_cannot_be_is_told_of_and_the_node_goes_on(berlin)
    assert len(berlin.all("training-started")) == 1
    berlin.kill(signal.SIGTERM)
    assert await berlin.wait() == 128 + signal.SIGTERM


async def reload(site, *, revoked):
    """Have the node read its file again, with nothing changed but who is revoked."""
    num_before = len(site.all("config-reloaded"))
    site.set(revoked=revoked)
    site.kill(signal.SIGHUP)
    reloaded = await site.until("config-reloaded", count=num_before + 1)
    assert (reloaded["changed"], reloaded["needs_restart"]) == (["revoked"], [])


async def a_file_that_cannot_be_is_told_of_and_the_node_goes_on(berlin):
    text, num_reloads = berlin.file.read_text(), len(berlin.all("config-reloaded"))
    berlin.file.write_text("revoked = [")
    berlin.kill(signal.SIGHUP)
    refused = await berlin.until("refused", lambda r: "not reloaded" in r["why"])
    assert refused["peer"] is None and berlin.file.name in refused["why"]

    berlin.file.write_text(text)
    berlin.set(max_frame_bytes=1 << 20)
    berlin.kill(signal.SIGHUP)
    reloaded = await berlin.until("config-reloaded", count=num_reloads + 1)
    assert reloaded["needs_restart"] == ["max_frame_bytes"]
    await berlin.until("refused", lambda r: "max_frame_bytes" in r["why"])
