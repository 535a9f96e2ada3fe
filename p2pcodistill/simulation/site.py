"""The node process of one site, through one life after another: started, killed, stopped, slowed, never left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress

import psutil

from p2pcodistill.errors import GroupError
from p2pcodistill.simulation.files import NodeFiles

OUTLIVED_TIMEOUT_S = 20.0
"""What the processes of a site have to end after its node was killed."""
_SLICE_S = 0.02
"""How long a slowed site runs at a time."""
_LOOK_INTERVAL_S = 0.5


class SiteProcess:
    """One site's node, one life at a time. `is_expected_to_end`: the present or last life was ended from here."""

    def __init__(
        self,
        place: NodeFiles,
        *,
        node_command: Sequence[str],
        stop_timeout_s: float,
        environment: Mapping[str, str] | None = None,
        command_prefix: Sequence[str] = (),
    ) -> None:
        """`environment` is added to this process's own; `command_prefix` goes before every command and becomes it."""
        self.place = place
        self._node_command = tuple(node_command)
        self._stop_timeout_s = stop_timeout_s
        self._command_prefix = tuple(command_prefix)
        self._environment = dict(environment or {})
        self._process: asyncio.subprocess.Process | None = None
        self.is_expected_to_end = False

    @property
    def is_running(self) -> bool:
        """Whether its node lives."""
        return self._process is not None and self._process.returncode is None

    async def start(self, command: Sequence[str] | None = None) -> None:
        """Begin a life: with `command`, if it is given, in the place of the node's own."""
        self.is_expected_to_end = False
        with self.place.log.open("ab") as log:
            # Forked in this thread, which lives as long as the process does: Linux ties a child's parent-death signal to
            # the thread that made it.
            self._process = await asyncio.create_subprocess_exec(
                *self._command_prefix,
                *(command or self._node_command),
                "--die-with-parent",
                str(os.getpid()),
                str(self.place.node_file.absolute()),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ | self._environment | {"PYTHONUNBUFFERED": "1"},
                start_new_session=True,  # the terminal's Ctrl-C is for this process, which passes it on in order
            )

    async def wait(self) -> int:
        """Wait for the end of this life; its exit status, negative after a signal."""
        assert self._process is not None
        return await self._process.wait()

    async def kill(self) -> None:
        """kill -9 of the node; returns when its workers are gone, too. Raises GroupError where they outlive it."""
        self.is_expected_to_end = True
        workers = self._descendants()
        self.kill_now()
        await self.wait()
        _, outlived = await asyncio.to_thread(psutil.wait_procs, workers, timeout=OUTLIVED_TIMEOUT_S)
        if outlived:
            raise GroupError(f"processes of the site {self.place.site} outlived its node: {outlived}")

    def kill_now(self) -> None:
        """kill -9 of the node alone: its workers are below a guard that ends them when the node is gone."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                self._process.kill()

    async def end(self) -> None:
        """See to it that this life has ended: SIGTERM, a bounded wait, SIGKILL."""
        if not self.is_running:
            return
        assert self._process is not None
        self.is_expected_to_end = True
        with suppress(ProcessLookupError):
            self._process.terminate()
        try:
            await asyncio.wait_for(self._process.wait(), self._stop_timeout_s)
        except TimeoutError:
            self.kill_now()
            await self._process.wait()

    async def crawl(self, factor: float) -> None:
        """Run the site's workers at 1 / `factor` of their speed until cancelled: they are stopped most of the time.

        Only processes without children of their own are: whoever watches over the workers is as quick as ever.
        """
        ran_s = stopped_s = 0.0
        looked_s = float("-inf")
        while True:
            begun_s = time.monotonic()
            await asyncio.sleep(_SLICE_S)
            if begun_s - looked_s >= _LOOK_INTERVAL_S:  # a look at all processes of the machine is not free
                workers, looked_s = self._workers(), begun_s
            stopped = [worker for worker in workers if _send(worker, signal.SIGSTOP)]
            now_s = time.monotonic()
            ran_s += now_s - begun_s
            try:
                # What was missed or overshot before is made up for now, so that the share of time is right.
                await asyncio.sleep(max(0.0, ran_s * (factor - 1) - stopped_s))
            finally:
                for worker in stopped:
                    _send(worker, signal.SIGCONT)
            stopped_s += time.monotonic() - now_s

    def _workers(self) -> list[psutil.Process]:
        below = self._descendants()
        with_children = set()
        for process in below:
            with suppress(psutil.NoSuchProcess):
                with_children.add(process.ppid())
        return [process for process in below if process.pid not in with_children]

    def _descendants(self) -> list[psutil.Process]:
        if self._process is None:
            return []
        try:
            return psutil.Process(self._process.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []


def _send(process: psutil.Process, number: signal.Signals) -> bool:
    try:
        process.send_signal(number)  # not to another that got its number
    except psutil.NoSuchProcess:
        return False
    return True


def describe_exit(status: int) -> str:
    """In words, how a process ended."""
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"exited with status {status}"
