"""The guard: nothing of a process tree outlives the node, whoever is killed."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from patience import GENEROUS_S

from p2pcodistill.group.guard import KILLED_STATUS

# A tree that resists: a child in a session of its own that ignores polite signals, whose parent exits at once, and a leader.
TREE = """
import os, signal, subprocess, sys, time
child = subprocess.Popen(
    [sys.executable, "-c", "import os, signal, sys; signal.signal(signal.SIGTERM, signal.SIG_IGN);"
     "print('child', os.getpid(), flush=True); signal.pause()"],
    stdout=subprocess.PIPE, text=True, start_new_session=True)
print(child.stdout.readline(), end="", flush=True)  # it is there before the leader goes on
print("leader", os.getpid(), flush=True)
{then}
"""


def start(then: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", TREE.format(then=then)]
    return subprocess.Popen(
        [sys.executable, "-m", "p2pcodistill.group.guard", *command],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def pids_of(process: subprocess.Popen[str]) -> dict[str, int]:
    assert process.stdout is not None
    lines = [process.stdout.readline().split() for _ in range(2)]
    return {name: int(pid) for name, pid in lines}


def assert_gone(pids: dict[str, int]) -> None:
    living = [psutil.Process(pid) for pid in pids.values() if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(living, timeout=GENEROUS_S)
    assert [p for p in alive if p.status() != psutil.STATUS_ZOMBIE] == []


def test_closing_the_pipe_kills_the_whole_tree():
    with start("signal.pause()") as guard:
        tree = pids_of(guard)
        guard.stdin.close()
        assert guard.wait(GENEROUS_S) == KILLED_STATUS
        assert_gone(tree)


def test_a_command_that_ends_leaves_nothing_and_passes_its_status_on():
    with start("sys.exit(7)") as guard:
        tree = pids_of(guard)
        assert guard.wait(GENEROUS_S) == 7
        assert_gone(tree)


def test_a_command_ended_by_a_signal_is_128_plus_it():
    with start("os.kill(os.getpid(), signal.SIGSEGV)") as guard:
        tree = pids_of(guard)
        assert guard.wait(GENEROUS_S) == 128 + signal.SIGSEGV
        assert_gone(tree)


def test_interrupts_are_left_to_the_node():
    with start("signal.pause()") as guard:
        tree = pids_of(guard)
        os.kill(guard.pid, signal.SIGINT)
        os.kill(guard.pid, signal.SIGTERM)
        assert psutil.pid_exists(tree["leader"]) and guard.poll() is None
        guard.stdin.close()
        guard.wait(GENEROUS_S)
        assert_gone(tree)


NODE = """
import subprocess, sys
guard = subprocess.Popen([sys.executable, "-m", "p2pcodistill.group.guard", *sys.argv[1:]], stdin=subprocess.PIPE)
print("guard", guard.pid, flush=True)
guard.wait()
"""


@pytest.mark.parametrize("victim", ["node", "guard"])
def test_kill_9_of_node_or_guard_ends_the_leader(victim):
    leader = "import os, signal; print('leader', os.getpid(), flush=True); signal.pause()"
    node = subprocess.Popen(
        [sys.executable, "-c", NODE, sys.executable, "-c", leader],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parent,
    )
    with node:
        pids = pids_of(node) | {"node": node.pid}
        os.kill(pids[victim], signal.SIGKILL)
        assert_gone({name: pid for name, pid in pids.items() if name != "node"})
        node.wait(GENEROUS_S)
