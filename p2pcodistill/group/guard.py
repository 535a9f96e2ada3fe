"""The guard: runs one command and sees to it that nothing of its process tree outlives the node.

    python -m p2pcodistill.group.guard COMMAND [ARGUMENT ...]

The node holds the other end of the guard's standard input. When that pipe closes, because the node closed it or because the
node is gone (kill -9 included), the guard kills the whole tree below it and exits. When the command ends by itself, the
guard ends what the command left behind and exits with the command's status (128 + signal if a signal ended it).
"""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys

from p2pcodistill.group.lifeline import adopt_orphans, die_with_parent, kill_descendants

KILLED_STATUS = 128 + signal.SIGKILL


def main(command: list[str]) -> int:
    """Run `command` until it ends or standard input closes; the exit status."""
    adopt_orphans()
    # Interrupts from a terminal are the node's to handle: it asks the ranks to stop at a step boundary.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    guard_pid = os.getpid()

    def in_child() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        die_with_parent(guard_pid)

    child = subprocess.Popen(command, stdin=subprocess.DEVNULL, preexec_fn=in_child)
    while True:
        readable, _, _ = select.select([sys.stdin.fileno(), wake_read], [], [])
        if sys.stdin.fileno() in readable and not os.read(sys.stdin.fileno(), 1):
            kill_descendants()
            return KILLED_STATUS
        if wake_read in readable:
            os.read(wake_read, 4096)
            status = _reap(child.pid)
            if status is not None:
                kill_descendants()
                return status if status >= 0 else 128 - status


def _reap(child_pid: int) -> int | None:
    """Collect every dead child, adopted orphans included; the exit code of `child_pid` if it was among them."""
    result = None
    while True:
        try:
            pid, wait_status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return result
        if pid == 0:
            return result
        if pid == child_pid:
            result = os.waitstatus_to_exitcode(wait_status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
