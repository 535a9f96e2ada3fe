"""Two real nodes and a chain of delta frames: whoever is late, was away or lost a file finds its way back, cheaply."""

import contextlib
import os
import signal
from pathlib import Path

import msgpack
import pytest

from p2pcodistill.checkpoint.chain import MAX_CHAIN_FRAMES
from p2pcodistill.checkpoint.manifest import Manifest

SCRIPT = Path(__file__).with_name("step_on_command.py")


class Teacher:
    """berlin, one step and so one frame at a time."""

    def __init__(self, site, commands):
        self.site, self._commands = site, commands
        self._num_launches = 0
        self.begin_launch()

    def begin_launch(self):
        """A new launch of the script starts at step 0."""
        self._step = 0
        self._num_launches += 1

    async def publish(self, num_frames):
        """Take that many steps, each when the last one's snapshot is published; the last one's event."""
        for _ in range(num_frames):
            self._commands.write(b".")
            self._step += 1
            published = await self.site.until(
                "frame-published",
                lambda r: (r["incarnation"], r["step"]) == (self._num_launches, self._step),
            )
        return published


@pytest.fixture
async def berlin_and_tokyo(sites):
    """berlin, which has published nothing yet, and tokyo, which was not started yet and only learns."""
    berlin, tokyo = sites.make("berlin", "tokyo")
    for site in (berlin, tokyo):
        site.set(group={"script": str(SCRIPT), "script_arguments": [str(sites.folder), site.name]})
        site.set(codistillation={"burn_in_steps": 0, "exchange_interval_steps": 1})
    tokyo.set(codistillation={"burn_in_steps": 1_000_000_000})
    os.mkfifo(sites.folder / "commands")
    await berlin.start()
    await berlin.until("group-started")
    # For reading, too: opening does not wait for the script then.
    with (sites.folder / "commands").open("r+b", buffering=0) as commands:
        yield Teacher(berlin, commands), tokyo


def kinds(records):
    return [record["kind"] for record in records]


async def join(tokyo, berlin):
    """Start tokyo, and go on when it hears of every frame that berlin publishes from now on."""
    await tokyo.start()
    await berlin.site.until("peer-connected")


async def is_taught(tokyo, published):
    """Wait until tokyo's ranks learn from that frame's version."""
    version = published["incarnation"], published["step"]
    await tokyo.until("teacher-swapped", lambda r: (r["incarnation"], r["teacher_step"]) == version)


async def test_whoever_is_late_was_away_or_lost_a_file_finds_its_way_back(berlin_and_tokyo, sites):
    berlin, tokyo = berlin_and_tokyo
    await who_joins_late_gets_a_keyframe_that_was_made_for_it_and_then_deltas(berlin, tokyo)
    await who_was_away_catches_up_by_deltas(berlin, tokyo)
    assert not tokyo.all("refused") and not tokyo.all("teacher-refused")
    await a_stored_chain_that_was_damaged_is_fetched_again(berlin, tokyo, sites.folder)
    await a_teacher_that_comes_back_starts_a_chain_anew(berlin, tokyo, sites.folder)


async def who_joins_late_gets_a_keyframe_that_was_made_for_it_and_then_deltas(berlin, tokyo):
    published = await berlin.publish(5)
    assert kinds(berlin.site.all("frame-published")) == ["keyframe", *["delta"] * 4]
    await tokyo.start()
    await is_taught(tokyo, published)
    assert kinds(tokyo.all("frame-fetched")) == ["keyframe"]
    assert kinds(berlin.site.all("frame-published", step=published["step"])) == ["delta", "keyframe"]
    for _ in range(3):
        await is_taught(tokyo, await berlin.publish(1))
    later = tokyo.all("frame-fetched")[1:]
    assert kinds(later) == ["delta"] * 3
    assert all(record["num_bytes"] * 4 < published["num_fp16_bytes"] for record in later)


async def who_was_away_catches_up_by_deltas(berlin, tokyo):
    tokyo.kill()
    await tokyo.wait()
    await berlin.site.until("peer-disconnected")
    num_fetched, num_published = len(tokyo.all("frame-fetched")), len(berlin.site.all("frame-published"))
    published = await berlin.publish(3)
    await tokyo.start()
    await is_taught(tokyo, published)
    caught_up = tokyo.all("frame-fetched")[num_fetched:]
    assert [(r["kind"], r["step"]) for r in caught_up] == [
        ("delta", published["step"] - n) for n in (2, 1, 0)
    ]
    assert kinds(berlin.site.all("frame-published")[num_published:]) == ["delta"] * 3


async def a_stored_chain_that_was_damaged_is_fetched_again(berlin, tokyo, folder):
    num_fetched = len(tokyo.all("frame-fetched"))
    frames = list((tokyo.run_folder / "store" / "frames").glob("*.frame"))
    assert len(frames) >= 3
    for path in frames:
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    # The ranks of the next launch read the chain again.
    os.kill(int((folder / "tokyo.pid").read_text()), signal.SIGKILL)
    await tokyo.until("teacher-refused")
    await tokyo.until("frame-fetched", count=num_fetched + 1)
    again = tokyo.all("frame-fetched")[num_fetched]
    assert again["kind"] == "keyframe"
    await is_taught(tokyo, await berlin.publish(1))
    assert len(tokyo.all("teacher-refused")) == 1


async def a_teacher_that_comes_back_starts_a_chain_anew(berlin, tokyo, folder):
    os.kill(int((folder / "berlin.pid").read_text()), signal.SIGKILL)
    await berlin.site.until("group-started", count=2)
    berlin.begin_launch()
    again = await berlin.publish(1)
    assert (again["kind"], again["incarnation"]) == ("keyframe", 2)
    await is_taught(tokyo, again)
    await is_taught(tokyo, await berlin.publish(1))
    assert tokyo.all("frame-fetched")[-1]["kind"] == "delta"


async def test_a_long_chain_is_kept_as_one_keyframe_that_teaches_after_a_restart(berlin_and_tokyo):
    berlin, tokyo = berlin_and_tokyo
    await join(tokyo, berlin)
    await is_taught(tokyo, await berlin.publish(1))
    published = await berlin.publish(MAX_CHAIN_FRAMES // 2 + 2)
    await is_taught(tokyo, published)
    while min(stored := stored_frames(tokyo))[0] == 1:  # the store is pruned about once a second
        published = await berlin.publish(1)
        await is_taught(tokyo, published)
    assert min(stored)[1] == "keyframe", "made here, of what the ranks have"
    assert kinds(berlin.site.all("frame-published")).count("keyframe") == 1
    tokyo.kill()
    await tokyo.wait()
    num_swaps, num_fetched = len(tokyo.all("teacher-swapped")), len(tokyo.all("frame-fetched"))
    await tokyo.start()
    again = await tokyo.until("teacher-swapped", count=num_swaps + 1)
    assert again["teacher_step"] == published["step"]
    assert len(tokyo.all("frame-fetched")) == num_fetched
    assert not tokyo.all("refused") and not tokyo.all("teacher-refused")


def stored_frames(site):
    """(step, kind) of berlin's frames in a site's store, while its node may be at work on it."""
    found = []
    for path in (site.run_folder / "store" / "manifests").glob("*.manifest"):
        with contextlib.suppress(FileNotFoundError):
            found.append(Manifest.from_bytes(msgpack.unpackb(path.read_bytes())[0]))
    return [(manifest.version.step, manifest.kind) for manifest in found if manifest.origin == "berlin"]
