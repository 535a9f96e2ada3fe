"""What a site must bear for long: kill -9 of any of its processes at random moments, and exchanges without end.

Used by `make soak` (tests/soak.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil
from integration.conftest import Site, Sites
from integration.stores import require_whole_store
from patience import GENEROUS_S

RING = ("berlin", "tokyo", "lima", "accra")
PARTS = ("node", "p2pcodistill.group.guard", "torch.distributed.run", "p2pcodistill.group.train")
PACED_TRAINING = Path(__file__).with_name("paced_training.py")
ALLOWED_GROWTH = 0.1
"""Between the second and the last third of a soak: what has levelled off still wobbles."""
SLACK = {"memory_bytes": 8 << 20, "num_files": 4, "store_bytes": 64 << 10}


# --- kills ---------------------------------------------------------------------------------------------------------


async def survive_kills(
    sites: Sites, num_kills: int, *, seed: int, tell: Callable[[str], None] = lambda _: None
) -> Counter[str]:
    """kill -9 random processes of a ring of four, which trains on; the kills by what was killed.

    A killed node is started again; of the others its own node takes care. In the end all sites go on from where they were,
    learn from each other and stop in order, their stores are whole, and no process is left.
    """
    rng = random.Random(seed)
    made = sites.make(
        *RING,
        topology="ring",
        training={"num_steps": 10**9, "checkpoint_interval_steps": 50, "evaluation_interval_steps": 10**6},
        codistillation={"exchange_interval_steps": 50, "agreement_interval_steps": 5},
        group={"max_restarts": 10**6},
    )
    kills: Counter[str] = Counter()
    for site in made:
        await site.start()
    for site in made:
        await site.until("training-checkpointed")
    for number in range(num_kills):
        site = made[number % len(made)]
        part = PARTS[(number + number // len(made)) % len(PARTS)]  # each of each site, in turn
        await asyncio.sleep(rng.uniform(0, 2))  # the random moment, within start-ups too
        tree = site.tree()[1:]  # before: a dead node has no children any more
        if not kill_part(site, part):
            part = PARTS[0]
            site.kill()
        kills[part] += 1
        tell(f"kill {number + 1} of {num_kills}: {part} of {site.name}")
        if part == PARTS[0]:
            await site.wait()
            await asyncio.to_thread(psutil.wait_procs, tree, timeout=GENEROUS_S)
            assert not [process for process in tree if process.is_running()], "workers outlived their node"
            await site.start()
    for site in made:
        num_before = len(site.all("teacher-swapped"))
        await site.until("teacher-swapped", count=num_before + 3)
        assert not site.all("teacher-refused"), site.all("teacher-refused")
        steps = [record["start_step"] for record in site.all("training-started")]
        assert steps[0] == 0 and steps == sorted(steps), "every life went on from the last checkpoint"
    await stop(made)
    return kills


def kill_part(site: Site, part: str) -> bool:
    """kill -9 of the site's process that runs this module; False when there is none at this moment."""
    if part == PARTS[0]:
        return False
    depth = PARTS.index(part)
    for process in site.tree()[1:]:
        with contextlib.suppress(psutil.NoSuchProcess):
            # Guard, torchrun and rank run each other, so each one's command line holds those of the ones below it.
            if sum(word in PARTS for word in process.cmdline()) == len(PARTS) - depth:
                process.kill()
                return True
    return False


async def stop(made: list[Site]) -> None:
    """SIGTERM; every node ends in order, with all its processes, and leaves a whole store."""
    trees = [process for site in made for process in site.tree()]
    for site in made:
        site.kill(signal.SIGTERM)
    for site in made:
        assert await site.wait() == 128 + signal.SIGTERM, site.log()
        require_whole_store(site.file, site.run_folder)
    await asyncio.to_thread(psutil.wait_procs, trees, timeout=GENEROUS_S)
    assert not [process for process in trees if process.is_running()], "processes outlived their node"


# --- resources -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """What one site takes at one moment: its node and ranks together."""

    memory_bytes: int
    num_files: int
    store_bytes: int

    @classmethod
    def take(cls, site: Site) -> Sample:
        memory_bytes = num_files = 0
        for process in site.tree():
            memory_bytes += process.memory_info().rss
            num_files += process.num_fds()
        stored = [path.stat().st_size for path in (site.run_folder / "store").rglob("*") if path.is_file()]
        return cls(memory_bytes, num_files, sum(stored))


async def exchange_for_long(
    sites: Sites, num_exchanges: int, *, exchanges_per_s: float, tell: Callable[[str], None] = lambda _: None
) -> None:
    """Two sites make so many exchanges, at that rate if the machine can; what they take levels off."""
    script = {"script": str(PACED_TRAINING), "script_arguments": [str(exchanges_per_s)]}
    made = sites.make(
        "berlin",
        "tokyo",
        group=script,
        codistillation={"burn_in_steps": 0, "exchange_interval_steps": 10, "agreement_interval_steps": 5},
    )
    for site in made:
        await site.start()
    for site in made:
        await site.until("teacher-swapped")
    samples: dict[str, list[Sample]] = {site.name: [] for site in made}
    num_samples = min(num_exchanges, max(60, num_exchanges // 50))
    for number in range(1, num_samples + 1):
        for site in made:
            await site.until("frame-published", count=number * num_exchanges // num_samples)
            with contextlib.suppress(psutil.NoSuchProcess, FileNotFoundError):  # it changed under our eyes
                samples[site.name].append(Sample.take(site))
        newest = {site.name: samples[site.name][-1] for site in made if samples[site.name]}
        tell(f"{number * num_exchanges // num_samples} exchanges: {newest}")
    await stop(made)
    for name, taken in samples.items():
        require_level(name, taken)


def require_level(name: str, samples: list[Sample]) -> None:
    """Assert that nothing grows any more in the last third of the samples."""
    third = len(samples) // 3
    assert third >= 5, "too few samples"
    for what, slack in SLACK.items():
        middle = max(getattr(sample, what) for sample in samples[third : 2 * third])
        last = max(getattr(sample, what) for sample in samples[2 * third :])
        assert last <= middle * (1 + ALLOWED_GROWTH) + slack, f"{what} of {name} grows: {middle}, then {last}"
