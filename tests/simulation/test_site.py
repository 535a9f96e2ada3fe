"""A site's processes are slowed and killed as a whole: checked on a process with a busy child."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from patience import GENEROUS_S

from p2pcodistill.simulation.files import NodeFiles
from p2pcodistill.simulation.site import SiteProcess

# The node waits; below it a guard waits for a worker, which works. All end with the one above them.
NODE = """
import subprocess, sys
from p2pcodistill.group.lifeline import die_with_parent
depth = int(sys.argv[1])
die_with_parent()
if depth == 0:
    print("busy", flush=True)
    while True:
        sum(range(10_000))
subprocess.run([sys.executable, __file__, str(depth - 1)])
"""


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SiteProcess:
    (tmp_path / "run").mkdir()
    script = tmp_path / "node.py"
    script.write_text(NODE)
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    place = NodeFiles("berlin", tmp_path / "berlin.toml", tmp_path / "run")
    return SiteProcess(place, node_command=[sys.executable, str(script), "2"], stop_timeout_s=5.0)


async def start(site: SiteProcess) -> list[psutil.Process]:
    """Start it; its processes, the worker last, when that is at work."""
    await site.start()
    await until(lambda: "busy" in site.place.log.read_text())
    # Other tests have this process adopt orphans: the dead that it has yet to collect have no command line.
    found = psutil.Process().children(recursive=True)
    living = [process for process in found if process.status() != psutil.STATUS_ZOMBIE]
    return [process for process in living if str(site.place.log.parents[1]) in " ".join(process.cmdline())]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(GENEROUS_S):
        while True:
            if condition():
                return
            await asyncio.sleep(0.01)


async def require_gone(processes: list[psutil.Process]) -> None:
    _, alive = await asyncio.to_thread(psutil.wait_procs, processes, timeout=GENEROUS_S)
    assert alive == []


async def test_a_slowed_site_works_a_tenth_of_the_time_and_is_as_quick_as_ever_afterwards(
    site: SiteProcess,
) -> None:
    *others, worker = await start(site)
    crawl = asyncio.create_task(site.crawl(10.0))
    begun_s, used_s = time.monotonic(), worker.cpu_times().user
    states = set()
    while time.monotonic() - begun_s < 1.0:
        await asyncio.sleep(0.02)
        states.add(worker.status())
        assert all(process.status() != psutil.STATUS_STOPPED for process in others)
    assert psutil.STATUS_STOPPED in states
    assert worker.cpu_times().user - used_s < 0.3 * (time.monotonic() - begun_s)
    crawl.cancel()
    await asyncio.wait([crawl])
    assert worker.status() != psutil.STATUS_STOPPED
    await site.kill()
    await require_gone([*others, worker])
    assert (site.is_running, site.is_expected_to_end) == (False, True)


async def test_a_site_that_is_killed_while_it_is_slowed_leaves_nothing(site: SiteProcess) -> None:
    processes = await start(site)
    crawl = asyncio.create_task(site.crawl(1000.0))
    await until(lambda: processes[-1].status() == psutil.STATUS_STOPPED)
    await site.kill()
    await require_gone(processes)
    crawl.cancel()
    await asyncio.wait([crawl])
    assert not site.is_running
