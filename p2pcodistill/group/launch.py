"""Starting, watching and ending the site's workers: torchrun, below a guard process, below the node.

torchrun restarts nothing on its own: a crash ends the whole group, and only the node decides whether and when to start it
again, from the last training checkpoint.
"""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

from p2pcodistill.config import GROUP_SPEC_VARIABLE, GroupSpec
from p2pcodistill.errors import GroupError

MAX_RESTART_DELAY_S = 60.0
_LOG_TAIL_BYTES = 16_384
_TORCHRUN_EPITAPH = "failed (exitcode"
"""Begins torchrun's own report on a rank that failed, which is longer than what the rank had to say, and says less."""


class Group:
    """One launch of the workers."""

    def __init__(self, process: asyncio.subprocess.Process, log_path: Path, log_offset_bytes: int) -> None:
        self._process = process
        self._log_path = log_path
        self._log_offset_bytes = log_offset_bytes

    @classmethod
    async def start(cls, spec: GroupSpec, spec_path: Path, log_path: Path) -> Group:
        """Write `spec` to `spec_path` and launch the workers, output appended to `log_path`.

        Raises GroupError if the user's script does not exist.
        """
        if spec.group.script is not None and not spec.group.script.is_file():
            raise GroupError(f"no training script {spec.group.script}: correct group.script")
        spec_path.write_text(spec.model_dump_json(indent=2))
        spec.error_path.unlink(missing_ok=True)
        environment = {
            # Threads that spin for long while they wait steal the cores that others need (0.7 instead of 14 steps/s were
            # seen on two busy cores); spinning briefly is as fast where the cores are idle.
            "GOMP_SPINCOUNT": "1000",
            **os.environ,
            GROUP_SPEC_VARIABLE: str(spec_path),
            "OMP_NUM_THREADS": str(spec.group.num_threads),
            "PYTHONUNBUFFERED": "1",
        }
        if sys.platform == "linux":  # the ranks share a machine: keep their sockets off the network
            environment |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        with log_path.open("ab") as log:
            log_offset_bytes = log.tell()
            process = await asyncio.create_subprocess_exec(
                *command_of(spec),
                stdin=asyncio.subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
        return cls(process, log_path, log_offset_bytes)

    @property
    def pid(self) -> int:
        """Process id of the guard."""
        return self._process.pid

    @property
    def guard_was_killed(self) -> bool:
        """Whether a signal ended the guard itself, so that it could not end its tree."""
        return (self._process.returncode or 0) < 0

    async def wait(self) -> int:
        """Wait for the workers to end; their exit status."""
        status = await self._process.wait()
        return status if status >= 0 else 128 - status

    async def kill(self) -> int:
        """End the whole process tree at once: the guard does it when its pipe closes. Returns the exit status."""
        if self._process.stdin is not None:
            self._process.stdin.close()
        return await self.wait()

    def last_words(self) -> str:
        """The last lines that this launch's ranks wrote, for the message about a group that failed."""
        return log_tail(self._log_path, from_bytes=self._log_offset_bytes)


def command_of(spec: GroupSpec) -> list[str]:
    """The command line of the guard and, below it, torchrun and the training script."""
    if spec.group.script is None:
        training = ["-m", "p2pcodistill.group.train"]
    else:
        training = [str(spec.group.script), *spec.group.script_arguments]
    # torchrun unpickles what its rendezvous store holds, and a TCP store listens on every interface for anyone: the
    # rendezvous of a group is a file in a folder that only this user can enter.
    rendezvous = Path(spec.link_address.removeprefix("ipc://")).with_name(f"rendezvous-{spec.link_token}")
    torchrun = ["-m", "torch.distributed.run", "--max-restarts", "0"]
    torchrun += ["--nproc-per-node", str(spec.group.num_ranks), "--local-addr", "127.0.0.1"]
    torchrun += ["--rdzv-backend", "c10d", "--rdzv-conf", "store_type=file"]
    torchrun += ["--rdzv-endpoint", str(rendezvous), "--rdzv-id", spec.link_token]
    return [sys.executable, "-m", "p2pcodistill.group.guard", sys.executable, *torchrun, *training]


def restart_delay_s(initial_s: float, num_restarts: int) -> float:
    """Back-off before restart number `num_restarts` (from 0): doubles each time, up to a minute."""
    return float(min(initial_s * 2**num_restarts, MAX_RESTART_DELAY_S))


def log_tail(path: Path, *, max_lines: int = 12, from_bytes: int = 0) -> str:
    """The last lines of a log behind `from_bytes`, without torchrun's report; empty if there is no log."""
    if not path.exists():
        return ""
    with path.open("rb") as log:
        end_bytes = log.seek(0, os.SEEK_END)
        log.seek(max(from_bytes, end_bytes - _LOG_TAIL_BYTES))
        lines = log.read().decode(errors="replace").splitlines()
    epitaphs = [index for index, line in enumerate(lines) if _TORCHRUN_EPITAPH in line]
    return "\n".join(lines[: epitaphs[-1] if epitaphs else None][-max_lines:])
