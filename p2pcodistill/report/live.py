"""What the sites are doing right now, on a terminal or in a log.

`LiveView` redraws a table of all sites in place (see `screen`), `PlainView` prints a line a site now and then (see `plain`).
What they show of each site is its `Progress`. Neither matplotlib nor torch is imported here: the node command shows this.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self, TextIO

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live

from p2pcodistill.report.plain import PlainView
from p2pcodistill.report.progress import Progress
from p2pcodistill.report.run_progress import RunProgress
from p2pcodistill.report.screen import Groups, screen
from p2pcodistill.telemetry.records import Record

REDRAW_INTERVAL_S = 0.25


class View(Protocol):
    """Shows records as they come; a context manager that leaves the terminal as it found it."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def update(self, group: str, site: str, record: Record) -> None:
        """Show what `record` of `site` tells. Sites of one `group` (an arm, a run) stand together."""
        ...

    def show_jobs(self, jobs: RunProgress) -> None:
        """Show from now on how far the jobs are that the sites belong to; again whenever one begins or ends."""
        ...


def make_view(title: str, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> View:
    """The view that suits `stream`: redrawn in place on a terminal, plain lines elsewhere."""
    if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return LiveView(title, Console(file=stream))
    return PlainView(title, stream, clock)


class LiveView:
    """A table with a line per site, redrawn a few times a second from a thread of its own."""

    def __init__(self, title: str, console: Console) -> None:
        self._title = title
        self._groups: Groups = {}
        self._jobs: RunProgress | None = None
        self._lock = threading.Lock()  # records come from one thread, another draws
        self._live = Live(self, console=console, auto_refresh=False)
        # Not rich's own thread: that one is never joined.
        self._thread = threading.Thread(target=self._redraw, name="live-view", daemon=True)
        self._left = threading.Event()

    def __enter__(self) -> Self:
        self._live.start(refresh=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._left.set()
        self._thread.join()
        self._live.stop()  # draws the last state, which stays on the screen

    def _redraw(self) -> None:
        while not self._left.wait(REDRAW_INTERVAL_S):
            self._live.refresh()

    def update(self, group: str, site: str, record: Record) -> None:
        """See `View.update`."""
        with self._lock:
            self._groups.setdefault(group, {}).setdefault(site, Progress()).update(record)

    def show_jobs(self, jobs: RunProgress) -> None:
        """See `View.show_jobs`."""
        self._jobs = jobs

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self._lock:
            lines = screen(self._title, self._groups, options.max_width, console.size.height, jobs=self._jobs)
        yield from lines
