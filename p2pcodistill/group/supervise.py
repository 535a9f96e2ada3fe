"""Keeping a site's workers alive: launch, restart with back-off, stop at a step boundary, leave nothing behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

from p2pcodistill.config import GroupConfig, GroupSpec
from p2pcodistill.errors import GroupError
from p2pcodistill.group.launch import Group, restart_delay_s
from p2pcodistill.group.lifeline import kill_descendants
from p2pcodistill.telemetry.log import EventLog
from p2pcodistill.telemetry.node_events import GroupExited, GroupStarted, NodeStopping


class StopSwitch:
    """Who wants the node to stop: the first SIGINT, SIGTERM or SIGHUP sets `requested`, a second one `at_once`.

    SIGHUP does only when the terminal has gone, where it has another meaning.
    """

    def __init__(self, events: EventLog) -> None:
        self._events = events
        self.requested = asyncio.Event()
        self.at_once = asyncio.Event()
        self.signal = signal.SIGTERM

    def press(self, number: signal.Signals) -> None:
        """Take note of one signal."""
        if self.requested.is_set():
            self.at_once.set()
            return
        self.signal = number
        self.requested.set()
        self._events.write(NodeStopping(number.name))

    @contextlib.contextmanager
    def on_signals(self, reload: Callable[[], None] | None = None) -> Iterator[None]:
        """Within this context these signals press the switch, but for a SIGHUP that means to call `reload`."""
        loop = asyncio.get_running_loop()
        had_terminal = _has_terminal()

        def hang_up() -> None:
            if reload is None or (had_terminal and not _has_terminal()):
                self.press(signal.SIGHUP)
            else:
                reload()

        handled = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        for number in handled:
            if number is signal.SIGHUP:
                loop.add_signal_handler(number, hang_up)
            else:
                loop.add_signal_handler(number, self.press, number)
        try:
            yield
        finally:
            for number in handled:
                loop.remove_signal_handler(number)


def _has_terminal() -> bool:
    try:
        os.close(os.open(os.ctermid(), os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


class Supervisor:
    """Runs the workers until they finish, until the switch is pressed, or until they failed too often."""

    def __init__(
        self, config: GroupConfig, events: EventLog, spec_path: Path, log_path: Path, stop: StopSwitch
    ) -> None:
        self._config, self._events, self._stop = config, events, stop
        self._spec_path, self._log_path = spec_path, log_path

    async def run(
        self,
        prepare: Callable[[], Awaitable[GroupSpec]],
        ask_to_stop: Callable[[], Awaitable[bool]],
    ) -> bool:
        """True when the workers finished, False when they were stopped.

        `prepare` gives the specification of each launch; `ask_to_stop` asks the ranks to stop and says whether there is
        anyone to wait for. Raises GroupError when a rank met what only the user can mend, and after `max_restarts`
        restarts, with the end of the workers' log.
        """
        num_restarts = 0
        while True:
            spec = await prepare()
            status, last_words = await self._run_once(spec, num_restarts, ask_to_stop)
            if self._stop.requested.is_set() or status == 0:
                self._events.write(GroupExited(exit_status=status, restart_in_s=None))
                return not self._stop.requested.is_set()
            if spec.error_path.exists():  # another launch would meet it again
                self._events.write(GroupExited(exit_status=status, restart_in_s=None))
                raise GroupError(spec.error_path.read_text().strip())
            if num_restarts >= self._config.max_restarts:
                self._events.write(GroupExited(exit_status=status, restart_in_s=None))
                raise GroupError(
                    f"the workers failed {num_restarts + 1} times, last with status {status}; their log is "
                    f"{self._log_path} and ends with:\n{last_words}"
                )
            delay_s = restart_delay_s(self._config.restart_delay_s, num_restarts)
            self._events.write(GroupExited(exit_status=status, restart_in_s=delay_s))
            await first_of(self._stop.requested, timeout_s=delay_s)
            if self._stop.requested.is_set():
                return False
            num_restarts += 1

    async def _run_once(
        self, spec: GroupSpec, attempt: int, ask_to_stop: Callable[[], Awaitable[bool]]
    ) -> tuple[int, str]:
        group = await Group.start(spec, self._spec_path, self._log_path)
        self._events.write(GroupStarted(attempt=attempt, num_ranks=spec.group.num_ranks, pid=group.pid))
        ended = asyncio.create_task(group.wait(), name="group")
        try:
            await first_of(ended, self._stop.requested)
            if not ended.done() and await ask_to_stop():
                await first_of(ended, self._stop.at_once, timeout_s=self._config.stop_grace_s)
            return await group.kill(), group.last_words()
        finally:
            await group.kill()
            await ended
            if group.guard_was_killed:  # its tree hangs below this process now
                await asyncio.to_thread(kill_descendants)


async def first_of(*things: asyncio.Task[Any] | asyncio.Event, timeout_s: float | None = None) -> None:
    """Wait until a task is done, an event is set, or `timeout_s` is over. The tasks go on."""
    waits = [
        thing if isinstance(thing, asyncio.Task) else asyncio.create_task(thing.wait()) for thing in things
    ]
    try:
        await asyncio.wait(waits, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for wait, thing in zip(waits, things, strict=True):
            if wait is not thing:
                wait.cancel()
