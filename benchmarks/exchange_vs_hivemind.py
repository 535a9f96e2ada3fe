"""`exchange_vs_hivemind`: seconds that hivemind takes for 100 M parameters / seconds that we take, in the same run.

Both go between two processes on loopback, encrypted, from fp32 weights as fp16: ours as in `exchange_100m` (a keyframe),
theirs by `load_state_from_peers` (`hivemind_peer`). hivemind has a venv of its own, which `make bench-peers` makes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.exchange_100m import measure
from benchmarks.figure import print_figure

MIN_RATIO = 2
PEERS_PYTHON = Path(__file__).parent.parent / ".venv-peers" / "bin" / "python"
_TIMEOUT_S = 600


def main() -> None:
    """Measure both; print the ratio."""
    bound = f"at least {MIN_RATIO}"
    unit = "seconds of hivemind / ours"
    if not PEERS_PYTHON.exists():
        why = "hivemind is not installed: make bench-peers puts it into a venv of its own"
        print_figure("exchange_vs_hivemind", None, unit, bound, holds=None, why=why, on="nothing")
        return
    theirs = measure_hivemind()
    ours = measure("off")
    assert theirs["num_parameters"] == ours["num_parameters"]
    theirs_s, ours_s = statistics.median(theirs["seconds"]), statistics.median(ours["exchanges_s"])
    value = theirs_s / ours_s
    print_figure(
        "exchange_vs_hivemind",
        round(value, 2),
        unit,
        bound,
        holds=value >= MIN_RATIO,
        on=f"{ours['num_parameters']} fp32 parameters as fp16, two processes on loopback, medians of "
        f"{len(theirs['seconds'])} and {len(ours['exchanges_s'])}; hivemind {theirs['version']}, torch {theirs['torch']}",
        hivemind_s=[round(seconds, 3) for seconds in theirs["seconds"]],
        ours_s=[round(seconds, 3) for seconds in ours["exchanges_s"]],
    )


def measure_hivemind() -> dict[str, Any]:
    """What `hivemind_peer` prints, run by the other venv's Python."""
    root = Path(__file__).parent.parent
    command = [str(PEERS_PYTHON), "-m", "benchmarks.hivemind_peer", "fetch"]
    run = subprocess.run(
        command, cwd=root, env=os.environ | {"PYTHONPATH": str(root)}, capture_output=True, text=True,
        timeout=_TIMEOUT_S,
    )  # fmt: skip
    if run.returncode:
        raise RuntimeError(f"hivemind's side failed:\n{run.stderr}")
    return json.loads(run.stdout.splitlines()[-1])


if __name__ == "__main__":
    main()
