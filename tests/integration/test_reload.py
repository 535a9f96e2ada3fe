"""The allow-list changes while nodes run: a member that is revoked is gone at once, refused by name, and taken back."""

import signal


async def test_a_member_is_revoked_and_taken_back_without_a_restart(sites):
    berlin, tokyo = sites.make("berlin", "tokyo", training={"num_steps": 1_000_000})
    await berlin.start()
    await tokyo.start()
    await berlin.until("teacher-swapped")

    berlin.set(revoked=["tokyo"])
    berlin.kill(signal.SIGHUP)
    reloaded = await berlin.until("config-reloaded")
    assert (reloaded["changed"], reloaded["needs_restart"]) == (["revoked"], [])
    assert berlin.all("member-trust-changed")[-1]["is_trusted"] is False
    await berlin.until("peer-disconnected")
    refused = await berlin.until("refused")
    assert (refused["peer"], refused["reason"]) == ("tokyo", "revoked") and "tokyo" in refused["why"]
    told = await tokyo.until("refused")
    assert (told["peer"], told["reason"]) == ("berlin", "revoked")
    expired = await berlin.until("teacher-expired")
    assert expired["teacher"] == "tokyo" and "revoked" in expired["why"]
    await berlin.until(
        "step-measured", lambda r: r["step"] > expired["step"] and r["distillation_loss"] is None
    )
    assert len(berlin.all("peer-connected")) == 1
    num_swaps = len(berlin.all("teacher-swapped"))

    berlin.set(revoked=[])
    berlin.kill(signal.SIGHUP)
    await berlin.until("config-reloaded", count=2)
    await berlin.until("peer-connected", count=2)
    again = await berlin.until("teacher-swapped", count=num_swaps + 1)
    assert again["step"] > expired["step"]
    await berlin.until(
        "step-measured", lambda r: r["step"] > again["step"] and r["distillation_loss"] is not None
    )
    assert len(berlin.all("training-started")) == 1


async def test_a_file_that_cannot_be_is_told_of_and_the_node_goes_on(sites):
    berlin, _ = sites.make("berlin", "tokyo", training={"num_steps": 1_000_000})
    berlin.set(revoked=["tokyo"])
    text = berlin.file.read_text()
    await berlin.start()
    assert (await berlin.until("member-trust-changed"))["is_trusted"] is False
    await berlin.until("step-measured")

    berlin.file.write_text("revoked = [")
    berlin.kill(signal.SIGHUP)
    refused = await berlin.until("refused")
    assert refused["peer"] is None and "not reloaded" in refused["why"] and berlin.file.name in refused["why"]

    berlin.file.write_text(text)
    berlin.set(max_frame_bytes=1 << 20)
    berlin.kill(signal.SIGHUP)
    assert (await berlin.until("config-reloaded"))["needs_restart"] == ["max_frame_bytes"]
    ignored = await berlin.until("refused", count=2)
    assert "max_frame_bytes" in ignored["why"]
    berlin.kill(signal.SIGTERM)
    assert await berlin.wait() == 128 + signal.SIGTERM
