"""Runs the benchmarks one after the other, each in a process of its own. A figure that misses its bound is no failure."""

import subprocess
import sys

BENCHMARKS = (
    "node_start",
    "goodput",
    "wan_goodput",
    "resent",
    "cap",
    "idle",
    "exchange_overhead",
    "virtual_1000",
    "virtual_steps",
    "faults",
    "codec_speed",
    "exchange_100m",
    "exchange_vs_hivemind",
    "codec_quality",
)


def main(names: list[str]) -> int:
    """Run the named benchmarks, or all; status 2 for a name that is none, 1 if one broke."""
    unknown = [name for name in names if name not in BENCHMARKS]
    if unknown:
        print(f"no benchmark {unknown[0]!r}: choose from {', '.join(BENCHMARKS)}", file=sys.stderr)
        return 2
    runs = [subprocess.run([sys.executable, "-m", f"benchmarks.{name}"]) for name in names or BENCHMARKS]
    return int(any(run.returncode for run in runs))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
