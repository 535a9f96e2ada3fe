"""No process outlives the one that is responsible for it.

Linux can do both halves in the kernel: a child asks to be killed when its parent dies, and an ancestor asks to adopt orphans
so that a whole tree stays in reach. Elsewhere (macOS, best effort) both calls do nothing and the guard's own sweep remains.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(option, value, 0, 0, 0)


def die_with_parent(expected_parent_pid: int | None = None) -> None:
    """Have the kernel kill this process (SIGKILL) as soon as its parent dies; exit now if that has happened already.

    Every rank calls this before anything else. `expected_parent_pid` closes the race with a parent that died before the
    call.
    """
    parent_pid = os.getppid() if expected_parent_pid is None else expected_parent_pid
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent_pid:
        os._exit(1)


def adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent dies, instead of init."""
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def kill_descendants() -> int:
    """SIGKILL every descendant of this process and collect the dead; returns how many were killed.

    Complete only after `adopt_orphans`: otherwise a grandchild may have escaped to init. Obligation: nobody else in this
    process waits for one of its children.
    """
    import psutil  # late: the node needs it only when something has gone wrong

    killed: set[int] = set()
    me = psutil.Process()

    def is_alive(process: psutil.Process) -> bool:
        try:
            return process.status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            return False

    while living := [process for process in me.children(recursive=True) if is_alive(process)]:
        for process in living:
            killed.add(process.pid)
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        psutil.wait_procs(living, timeout=1.0)
    while me.children():
        try:
            os.waitpid(-1, 0)
        except ChildProcessError:
            break
    return len(killed)
