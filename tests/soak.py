"""`make soak`: every fault scenario in real processes, a hundred kill -9 at random moments in a ring of four, and an hour of
a hundred exchanges a minute.

    python tests/soak.py [--kills 100] [--scenarios 1] [--minutes 60] [--seed 0]

Exit status 0: training went on, no stored version was lost or damaged, no process was left, nothing grew without end.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from integration.conftest import Sites
from integration.endurance import exchange_for_long, survive_kills
from integration.fault_runs import FAULT_SCENARIOS, FaultRun

from p2pcodistill.group.lifeline import adopt_orphans

EXCHANGES_PER_S = 100 / 60
NUM_SCENARIO_STEPS = 1000


async def soak(num_kills: int, minutes: float, seed: int) -> None:
    """Kills and exchanges, each in a folder of its own. Raises AssertionError, which says what was not borne."""
    with tempfile.TemporaryDirectory() as folder:
        for name in ("kills", "exchanges"):
            sites = Sites(Path(folder)).elsewhere(name)
            try:
                if name == "kills" and num_kills:
                    kills = await survive_kills(sites, num_kills, seed=seed, tell=tell)
                    print(f"survived: {dict(kills)}")
                elif name == "exchanges" and minutes:
                    num_exchanges = round(60 * minutes * EXCHANGES_PER_S)
                    await exchange_for_long(sites, num_exchanges, exchanges_per_s=EXCHANGES_PER_S, tell=tell)
                    print(f"level after {num_exchanges} exchanges")
            finally:
                leftover = await sites.clean()
            assert leftover == [], f"processes outlived their node: {leftover}"


def run_scenarios() -> None:
    """Every fault scenario with a tiny model. Raises AssertionError, or what a simulation raises."""
    for name in FAULT_SCENARIOS:
        with tempfile.TemporaryDirectory() as folder:
            run = FaultRun(Path(folder), name, num_steps=NUM_SCENARIO_STEPS, mode="processes")
            run.require_healthy(*run.expected_absent)
            run.require_whole_stores()
            tell(f"{name}: borne; {dict(run.faults)}")


def tell(line: str) -> None:
    """One line of progress."""
    print(f"[{time.strftime('%H:%M:%S')}] {line}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--scenarios", type=int, choices=(0, 1), default=1, help="0: without them")
    parser.add_argument("--minutes", type=float, default=60.0)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    adopt_orphans()
    if options.scenarios:
        run_scenarios()
    asyncio.run(soak(options.kills, options.minutes, options.seed))
    return 0


if __name__ == "__main__":
    sys.exit(main())
