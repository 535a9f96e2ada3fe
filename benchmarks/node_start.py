"""`node_start`: how long from exec until a node listens, what it weighs, and that it got there without torch.

The clock starts before the process is created and stops when a TCP connection to its port succeeds. The memory is the
node's alone (its workers are other processes), the highest of when it listens and two seconds into the life of its group.
"""

from __future__ import annotations

import socket
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from benchmarks.figure import print_figure
from p2pcodistill.identity import Identity

NUM_STARTS = 9
MAX_START_S = 0.6
MAX_RESIDENT_MIB = 80
DEADLINE_S = 30.0


def main() -> None:
    """Start a node several times; print the medians."""
    starts_s, resident_mib, torch_seen = [], [], False
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        Identity.generate().save(folder / "berlin.key")
        for index in range(NUM_STARTS + 1):
            start_s, mib, with_torch = start_once(folder, index)
            if index > 0:  # the first one warms the file cache
                starts_s.append(start_s)
                resident_mib.append(mib)
                torch_seen = torch_seen or with_torch
    on = f"`p2pcodistill node`, one peer, {NUM_STARTS} starts, median (worst)"
    start_s, mib = statistics.median(starts_s), max(resident_mib)
    print_figure(
        "node_start",
        round(start_s, 3),
        "s from exec to listening",
        f"at most {MAX_START_S}, no torch, at most {MAX_RESIDENT_MIB} MiB",
        holds=start_s <= MAX_START_S and mib <= MAX_RESIDENT_MIB and not torch_seen,
        on=on,
        worst_s=round(max(starts_s), 3),
        resident_mib=round(mib, 1),
        torch_loaded=torch_seen,
    )


def start_once(folder: Path, index: int) -> tuple[float, float, bool]:
    """(seconds to listening, highest resident MiB, whether torch was loaded) of one start."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    peer = f"tokyo=tcp://127.0.0.1:1#{Identity.generate().public}"
    command = [sys.executable, "-m", "p2pcodistill", "node", "--name", "berlin", "--peers", peer]
    command += ["--listen", f"tcp://127.0.0.1:{port}", "--run-folder", f"run-{index}"]
    started_s = time.perf_counter()
    node = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL)
    try:
        while not connects(port):
            if node.poll() is not None or time.perf_counter() - started_s > DEADLINE_S:
                raise RuntimeError("the node did not start")
        start_s = time.perf_counter() - started_s
        process = psutil.Process(node.pid)
        resident = process.memory_info().rss
        time.sleep(2.0)
        resident = max(resident, process.memory_info().rss)
        # A module that was imported has its libraries mapped.
        with_torch = any("torch" in mapped.path for mapped in process.memory_maps())
    finally:
        node.kill()
        node.wait()
    return start_s, resident / 2**20, with_torch


def connects(port: int) -> bool:
    """Whether somebody listens on the port of loopback now."""
    try:
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
    except OSError:
        return False
    return True


if __name__ == "__main__":
    main()
