"""A site through crashes and signals: it resumes completely, and no process outlives its node."""

import signal
import stat
import sys
from datetime import timedelta
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed
from patience import GENEROUS_S

# Guard, torchrun and rank run each other, so each one's command line holds those of the ones below it.
PARTS = ("p2pcodistill.group.train", "torch.distributed.run", "p2pcodistill.group.guard")


def process_of(site, part):
    """The one process of the site's tree that runs this module."""
    found = []
    for process in site.tree():
        modules = [word for word in process.cmdline() if word in PARTS]
        if len(modules) == PARTS.index(part) + 1:
            found.append(process)
    assert len(found) == 1, (part, [p.cmdline() for p in site.tree()])
    return found[0]


def require_no_open_rendezvous(site):
    """Assert that no port of the site but its node's own answers strangers with a rendezvous, and its folder is private.

    torchrun unpickles what its rendezvous holds; over TCP, anyone who reaches the machine could put it there.
    """
    reachable = []
    for process in site.tree():
        for connection in process.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr.port != site.port:
                reachable.append((process.cmdline(), connection.laddr.port))
    for _, port in reachable:
        store = torch.distributed.TCPStore(
            "127.0.0.1", port, is_master=False, timeout=timedelta(seconds=GENEROUS_S)
        )
        assert not [key for key in store.list_keys() if "torch.rendezvous" in key]
    rendezvous = [word for p in site.tree() for word in p.cmdline() if "rendezvous-" in word]
    assert rendezvous and stat.S_IMODE(Path(rendezvous[0]).parent.stat().st_mode) == 0o700


async def test_a_killed_node_resumes_bit_identically_without_peers(sites):
    training = {"num_steps": 800, "checkpoint_interval_steps": 50, "evaluation_interval_steps": 100}
    straight, killed = (
        folder.make("berlin", peers=[], training=training)[0] for folder in (sites, sites.elsewhere("killed"))
    )
    await straight.start()
    assert await straight.wait() == 0, straight.log()

    await killed.start()
    await killed.until("training-checkpointed", lambda record: record["step"] >= 100)
    tree = killed.tree()
    killed.kill()
    await killed.wait()
    _, alive = psutil.wait_procs(tree[1:], timeout=GENEROUS_S)
    assert alive == []
    await killed.start()
    assert await killed.wait() == 0, killed.log()

    first, second = killed.all("training-started")
    assert first["start_step"] == 0
    assert 100 <= second["start_step"] < 800
    assert [record["finished"] for record in killed.all("training-ended")] == [True]
    assert killed.model_bytes() == straight.model_bytes()
    evaluations = {record["step"]: record["val_loss"] for record in killed.all("evaluated")}
    assert evaluations == {record["step"]: record["val_loss"] for record in straight.all("evaluated")}


async def test_the_node_restarts_its_group_whoever_is_killed(sites):
    (site,) = sites.make("berlin", peers=[], training={"num_steps": 10_000_000})
    await site.start()
    await site.until("training-started")
    require_no_open_rendezvous(site)
    for number, part in enumerate(PARTS):
        await site.until("training-checkpointed", count=2 * number + 1)
        tree = site.tree()
        process_of(site, part).send_signal(signal.SIGKILL)
        exited = await site.until("group-exited", count=number + 1)
        assert exited["restart_in_s"] is not None, part
        _, alive = psutil.wait_procs([p for p in tree if p.pid != site.process.pid], timeout=GENEROUS_S)
        assert alive == [], f"after kill -9 of the {part}"
        restarted = await site.until("training-started", count=number + 2)
        assert restarted["start_step"] >= 10, part
    tree = site.tree()
    site.kill()
    await site.wait()
    _, alive = psutil.wait_procs(tree, timeout=GENEROUS_S)
    assert alive == []


async def test_a_group_that_keeps_failing_ends_the_node_with_the_end_of_its_log(sites):
    script = sites.folder / "broken.py"
    script.write_text("raise SystemExit('the corpus is haunted')\n")
    (site,) = sites.make("berlin", peers=[], group={"script": str(script), "max_restarts": 1})
    await site.start()
    assert await site.wait() == 2
    assert [record["restart_in_s"] for record in site.all("group-exited")] == [0.1, None]
    said = (sites.folder / "berlin.log").read_text()
    assert "the corpus is haunted" in said and "torch/distributed" not in said
    assert "failed 2 times" in site.log() and "the corpus is haunted" in site.log()


async def test_a_signal_stops_at_a_step_boundary_and_the_same_command_goes_on(sites):
    training = {"checkpoint_interval_steps": 10_000_000, "num_steps": 10_000_000}
    (site,) = sites.make("berlin", peers=[], training=training)
    await site.start()
    stopped_at_step = 0
    for number, unlike_before in (
        (signal.SIGINT, ["--set", "group.restart_delay_s=0.2"]),  # what does not touch training may change
        (
            signal.SIGTERM,
            ["--set", "frames.delta=off"],
        ),  # a chain of frames is not continued by another codec
    ):
        await site.until("training-started", lambda r, step=stopped_at_step: r["start_step"] == step)
        await site.until("step-measured", lambda r, step=stopped_at_step: r["step"] >= step + 20)
        site.kill(number)
        assert await site.wait() == 128 + number, site.log()
        ended = site.all("training-ended")[-1]
        assert not ended["finished"] and ended["step"] > stopped_at_step
        stopped_at_step = ended["step"]
        assert site.all("training-checkpointed")[-1]["step"] == stopped_at_step
        assert site.all("node-stopped")[-1]["reason"] == "stopped"
        await site.start(*unlike_before)
    assert len(site.all("training-checkpointed")) == 2
    assert await site.wait() == 2
    assert "frames.delta was 'adaptive' and is now 'off'" in site.log()


STUBBORN = """
import signal, torch, p2pcodistill
from p2pcodistill.telemetry.node_events import PeerConnected
p2pcodistill.join(torch.nn.Linear(1, 1)).report(PeerConnected("the script itself"))
signal.pause()
"""


async def test_a_second_signal_stops_at_once(sites):
    script = sites.folder / "stubborn.py"
    script.write_text(STUBBORN)
    (site,) = sites.make("berlin", peers=[], group={"script": str(script), "stop_grace_s": 3600.0})
    await site.start()
    await site.until("peer-connected")
    tree = site.tree()
    site.kill(signal.SIGINT)
    await site.until("node-stopping")
    site.kill(signal.SIGINT)
    assert await site.wait() == 128 + signal.SIGINT
    _, alive = psutil.wait_procs(tree, timeout=GENEROUS_S)
    assert alive == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
async def test_what_only_the_user_can_mend_is_one_line_and_not_tried_again(sites):
    (site,) = sites.make("berlin", peers=[], group={"device": "cuda"})
    await site.start()
    assert await site.wait() == 2
    assert [record["restart_in_s"] for record in site.all("group-exited")] == [None]
    last_line = (sites.folder / "berlin.log").read_text().splitlines()[-1]
    assert last_line.startswith("p2pcodistill: ") and 'group.device to "cpu"' in last_line


async def test_a_full_disk_ends_the_node_with_one_line_and_keeps_what_was_complete(sites):
    script = sites.folder / "hoard.py"
    script.write_text(HOARD)
    (site,) = sites.make("berlin", peers=[], group={"script": str(script)})
    # The largest file that the node may write stands in for the disk; SIGXFSZ is ignored, so that writing fails.
    limit = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)); "
    limit += "from p2pcodistill.cli import main; sys.exit(main(sys.argv[1:]))"
    await site.start(command=(sys.executable, "-c", limit, "node", str(site.file)))
    assert await site.wait() == 2
    lines = (sites.folder / "berlin.log").read_text().splitlines()
    assert "is full" in lines[-1] and not [line for line in lines if "Traceback" in line]
    assert all(record["event"] for record in site.read()), "the log is readable up to its last whole line"


HOARD = """
import torch, p2pcodistill
from p2pcodistill.telemetry.training_events import SnapshotSkipped
codistiller = p2pcodistill.join(torch.nn.Linear(1, 1))
for step in range(10_000):
    codistiller.report(SnapshotSkipped(step, "x" * 100))
codistiller.close()
import signal
signal.pause()
"""
