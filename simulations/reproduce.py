"""Run every claim's scenario, one after the other: `make reproduce`, or `make reproduce ARGS="two_phase topologies"`.

Each leaves a run folder in runs/reproduced. What has ended there is not run again, what was stopped goes on where it was:
delete a folder to have its scenario run anew. In the end, runs/reproduced/RESULTS.md has the tables of all.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

FOLDER = Path(__file__).parent
RUNS = Path("runs", "reproduced")
RESULT_FILE = "result.md"
CLAIMS = (
    "private_data",
    "private_data_alone",
    "private_data_shrunk",
    "private_data_unlike",
    "versus_averaging",
    "versus_averaging_unlike",
    "fig1_scaling",
    "fig2a_baselines",
    "fig2b_same_data",
    "fig3_images",
    "fig4_intervals",
    "table1_churn",
    "minor_changes",
    "two_phase",
    "overfit_teacher",
    "topologies",
    "teacher_precision",
    "teacher_quality",
    "regularisation",
    "unlabelled",
    "weak_links",
)
"""In the order in which they are run."""


def main(arguments: Sequence[str]) -> int:
    """Exit status 0, or that of the first scenario that failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(CLAIMS)}; default: all")
    names = parser.parse_args(arguments).names or list(CLAIMS)
    for name in names:
        if name not in CLAIMS:
            parser.error(f"no such scenario: {name}")
    folders = []
    for number, name in enumerate(names, start=1):
        print(f"\n[{number}/{len(names)}] {name}", flush=True)
        status = run(name)
        folder = latest_run(name)
        if status != 0 or folder is None:
            print(f"{name} ended with status {status}; `make reproduce` goes on with it", file=sys.stderr)
            return status or 1
        folders.append(folder)
    all_results = RUNS / "RESULTS.md"
    all_results.write_text("\n".join((folder / RESULT_FILE).read_text() for folder in folders))
    print(f"\nall tables: {all_results}")
    return 0


def run(name: str) -> int:
    """Run the scenario, or go on with the run of it that there is; of a complete one, only the report is written again."""
    folder = latest_run(name)
    if folder is None:
        what = [str(FOLDER / f"{name}.toml"), "--runs", str(RUNS)]
    else:
        what = ["--resume", str(folder)]
    return subprocess.call([sys.executable, "-m", "p2pcodistill", "simulate", *what])


def latest_run(name: str) -> Path | None:
    """The newest run folder of the scenario, complete or not; their names end with date and time.

    One that was stopped before it had a scenario does not count: there is nothing to go on with.
    """
    return max((file.parent for file in RUNS.glob(f"{name}-[0-9]*/scenario.toml")), default=None)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
