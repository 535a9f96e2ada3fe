"""What the sites are doing right now, on a terminal or in a log.

`LiveView` redraws a table of all sites in place; `PlainView` prints a line per site now and then, for pipes and log files.
What they show of each site is its `Progress`. Neither matplotlib nor torch is imported here: the node command shows this.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Protocol, Self, TextIO, TypeAlias

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.text import Text

from p2pcodistill.report.progress import ENDED, Progress, State, describe, duration, printable
from p2pcodistill.report.table import ABSENT, byte_count, number, times
from p2pcodistill.telemetry import (
    Evaluated,
    FaultInjected,
    Record,
    StepMeasured,
    TeacherExpired,
    TeacherGated,
    TeacherReadmitted,
)

Groups: TypeAlias = dict[str, dict[str, Progress]]
"""The sites' progress, by group and site, in the order in which they were first heard of."""


class View(Protocol):
    """Shows records as they come; a context manager that leaves the terminal as it found it."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None: ...

    def update(self, group: str, site: str, record: Record) -> None:
        """Show what `record` of `site` tells. Sites of one `group` (an arm, a run) stand together."""
        ...


def make_view(title: str, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> View:
    """The view that suits `stream`: redrawn in place on a terminal, plain lines elsewhere."""
    if stream.isatty() and os.environ.get("TERM", "dumb") != "dumb":
        return LiveView(title, Console(file=stream))
    return PlainView(title, stream, clock)


# --- plain lines ---------------------------------------------------------------------------------------------------


class PlainView:
    """A line when a site's state changes, and after an evaluation if its last line is `interval_s` ago or more.

    A site that evaluates more rarely is heard of after `4 * interval_s`. Teachers that are kept from teaching are told of at
    once. Refusals are told at once, but no more often than
    every `interval_s` a site: the line says how many there were.
    """

    def __init__(
        self,
        title: str,
        stream: TextIO,
        clock: Callable[[], float] = time.monotonic,
        *,
        interval_s: float = 10.0,
    ) -> None:
        self._title = title
        self._stream = stream
        self._clock = clock
        self._interval_s = interval_s
        self._sites: dict[tuple[str, str], _PlainSite] = {}

    def __enter__(self) -> Self:
        self._print(self._title)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for (group, site), shown in self._sites.items():
            self._print_refusals(group, site, shown)

    def update(self, group: str, site: str, record: Record) -> None:
        """See `View.update`."""
        shown = self._sites.setdefault((group, site), _PlainSite())
        state_before = shown.progress.state
        event = shown.progress.update(record)
        now_s = self._clock()
        if isinstance(event, FaultInjected):
            self._print(f"{group} {site}: fault: {shown.progress.last_fault}")
        if isinstance(event, TeacherGated | TeacherExpired):
            why = shown.progress.resting_teachers[event.teacher]
            self._print(f"{group} {site}: does not learn from {event.teacher} for now: {why}")
        if isinstance(event, TeacherReadmitted):
            self._print(f"{group} {site}: learns from {event.teacher} again")
        silent_s = now_s - shown.line_s
        if (
            shown.progress.state != state_before
            or (isinstance(event, Evaluated) and silent_s >= self._interval_s)
            or (isinstance(event, StepMeasured) and silent_s >= 4 * self._interval_s)
        ):
            shown.line_s = now_s
            self._print(f"{group} {site}: {describe(shown.progress)}")
        if now_s - shown.refusal_s >= self._interval_s:
            shown.refusal_s = now_s if self._print_refusals(group, site, shown) else shown.refusal_s

    def _print_refusals(self, group: str, site: str, shown: _PlainSite) -> bool:
        count = shown.progress.num_refusals
        if count == shown.num_told_refusals:
            return False
        shown.num_told_refusals = count
        self._print(f"{group} {site}: {count} refused so far; the last: {shown.progress.last_refusal}")
        return True

    def _print(self, line: str) -> None:
        self._stream.write(line + "\n")
        self._stream.flush()


@dataclass(slots=True)
class _PlainSite:
    progress: Progress = field(default_factory=Progress)
    line_s: float = float("-inf")
    refusal_s: float = float("-inf")
    num_told_refusals: int = 0


# --- redrawn in place ----------------------------------------------------------------------------------------------

_STATE_STYLES: dict[State, str] = {
    "training": "green",
    "serving": "green",
    "finished": "bold green",
    "restarting": "bold yellow",
    "stopping": "yellow",
    "stopped": "yellow",
    "killed": "bold red",
    "failed": "bold red",
}
REDRAW_INTERVAL_S = 0.25
MAX_SITE_CHARACTERS = 16
MAX_BAR_CHARACTERS = 24
MIN_BAR_CHARACTERS = 10
MAX_REFUSAL_LINES = 4
MAX_FAULT_LINES = 4
MAX_RESTING_LINES = 4


class LiveView:
    """A table with a line per site, redrawn a few times a second from a thread of its own."""

    def __init__(self, title: str, console: Console) -> None:
        self._title = title
        self._groups: Groups = {}
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

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        with self._lock:
            lines = screen(self._title, self._groups, options.max_width, console.size.height)
        yield from lines


def screen(title: str, groups: Groups, num_columns: int, num_rows: int) -> list[Text]:
    """The picture of all sites: lines of at most `num_columns`, at most `num_rows - 1` of them (the cursor has the last).

    Where the height does not do, groups that have ended fold into one line each, then those that wait, then the rest.
    """
    lines = [Text(printable(title), style="bold")]
    notices = _fault_lines(groups) + _resting_lines(groups) + _refusal_lines(groups)
    max_body_lines = num_rows - 1 - len(lines) - NUM_HEADING_LINES - len(notices)
    folded = _groups_to_fold(groups, max_body_lines)
    shown = [(site, p) for group, sites in groups.items() if group not in folded for site, p in sites.items()]
    headings, rows = _lay_out(shown, num_columns)
    lines += headings
    body: list[Text] = []
    for group, sites in groups.items():
        if group in folded:
            body.append(Text(f"{group}  ", style="bold cyan").append(_fold(sites), style="not bold default"))
        else:
            body.append(Text(group, style="bold cyan"))
            body += [rows.pop(0) for _ in sites]
    # The last groups are the ones at work: what does not fit leaves at the top.
    lines += body[max(0, len(body) - max_body_lines) :] + notices
    for line in lines:
        line.no_wrap = True
        line.truncate(num_columns, overflow="ellipsis")
    return lines


NUM_HEADING_LINES = 2
_HEADINGS = {
    "site": ("", "site"),
    "state": ("", "state"),
    "step": ("", "step"),
    "loss": ("", "loss"),
    "val_loss": ("held-", "out"),
    "stale": ("stale", "steps"),
    "peers": ("", "peers"),
    "sent": ("", "sent"),
    "received": ("", "received"),
    "frame_ratio": ("vs", "fp16"),
    "speed": ("steps", "/s"),
    "time_left": ("time", "left"),
}
_LEFT_ALIGNED = frozenset({"site", "state"})
_DISPENSABLE = ("peers", "loss", "received", "frame_ratio", "speed")
"""What a narrow screen goes without, the most dispensable first."""


def _lay_out(sites: Sequence[tuple[str, Progress]], num_columns: int) -> tuple[list[Text], list[Text]]:
    """The two lines of headings and a line per site, in columns as wide as what they hold."""
    rows = [_cells(site, progress) for site, progress in sites]
    widths = {
        name: max([len(word) for word in heading] + [len(row[name]) for row in rows])
        for name, heading in _HEADINGS.items()
    }
    gap = 2
    if _total(widths, gap) + MIN_BAR_CHARACTERS - widths["state"] > num_columns:
        gap = 1
    for name in _DISPENSABLE:
        if _total(widths, gap) > num_columns:
            del widths[name]
    # What is left over draws the bars.
    room = num_columns - _total(widths, gap) + widths["state"]
    if room >= MIN_BAR_CHARACTERS:
        widths["state"] = max(widths["state"], min(room, MAX_BAR_CHARACTERS))
        for row, (_, progress) in zip(rows, sites, strict=True):
            if progress.state == "training" and progress.num_steps:
                row["state"] = _bar(progress.step / progress.num_steps, widths["state"])
    headings = [
        _line({name: Text(_HEADINGS[name][index], style="dim") for name in widths}, widths, gap)
        for index in range(NUM_HEADING_LINES)
    ]
    return headings, [_line(row, widths, gap) for row in rows]


def _total(widths: Mapping[str, int], gap: int) -> int:
    return sum(widths.values()) + gap * (len(widths) - 1)


def _line(cells: Mapping[str, Text], widths: Mapping[str, int], gap: int) -> Text:
    line = Text()
    for name, width in widths.items():
        cell = cells[name].copy()
        cell.align("left" if name in _LEFT_ALIGNED else "right", width)
        line.append(cell).append(" " * gap)
    line.rstrip()
    return line


def _cells(site: str, progress: Progress) -> dict[str, Text]:
    is_cut_off = len(progress.connected_peers) < len(progress.neighbours) and progress.state not in ENDED
    name = Text("  " + site, style="bold red" if progress.num_refusals else "")
    name.truncate(MAX_SITE_CHARACTERS, overflow="ellipsis")
    peers = f"{len(progress.connected_peers)}/{len(progress.neighbours)}" if progress.neighbours else ABSENT
    is_training = progress.state == "training"
    return {
        "site": name,
        "state": Text(progress.state, style=_STATE_STYLES.get(progress.state, "")),
        "step": Text(ABSENT if progress.num_steps is None else _of(progress.step, progress.num_steps)),
        "loss": Text(number(progress.loss, 3)),
        "val_loss": Text(number(progress.val_loss, 3), style="bold"),
        "stale": Text(_staleness(progress.staleness_steps), style="yellow" if is_cut_off else ""),
        "peers": Text(peers, style="bold yellow" if is_cut_off else ""),
        "sent": Text(byte_count(progress.num_bytes_sent)),
        "received": Text(byte_count(progress.num_bytes_received)),
        "frame_ratio": Text(times(progress.frame_ratio)),
        "speed": Text(number(progress.steps_per_s, 1) if is_training else ABSENT),
        "time_left": Text(ABSENT if progress.time_left_s is None else duration(progress.time_left_s)),
    }


def _of(step: int, num_steps: int) -> str:
    return f"{step:>{len(str(num_steps))}}/{num_steps}"  # as wide at the start as at the end


def _bar(share: float, width: int) -> Text:
    num_done = min(width, max(0, int(share * width)))
    return Text("━" * num_done, style="green").append("─" * (width - num_done), style="bright_black")


MAX_STALENESS_CHARACTERS = 20


def _staleness(staleness_steps: Mapping[str, int]) -> str:
    """Each teacher with its steps where there is room; of many teachers only the steps, in their order."""
    if not staleness_steps:
        return ABSENT
    named = " ".join(f"{teacher} {steps}" for teacher, steps in staleness_steps.items())
    if len(named) <= MAX_STALENESS_CHARACTERS:
        return named
    steps_only = " ".join(str(steps) for steps in staleness_steps.values())
    if len(steps_only) <= MAX_STALENESS_CHARACTERS:
        return steps_only
    return f"0 to {max(staleness_steps.values())}"


def _groups_to_fold(groups: Groups, num_lines: int) -> set[str]:
    folded: set[str] = set()
    num_needed = sum(1 + len(sites) for sites in groups.values())
    for group in sorted(groups, key=lambda name: _fold_rank(groups[name].values())):
        if num_needed <= num_lines:
            break
        folded.add(group)
        num_needed -= len(groups[group])
    return folded


def _fold_rank(sites: Iterable[Progress]) -> int:
    states = {progress.state for progress in sites}
    return 0 if states <= ENDED else 1 if states <= {"waiting"} else 2


def _fold(sites: Mapping[str, Progress]) -> str:
    states = " and ".join(dict.fromkeys(progress.state for progress in sites.values()))
    losses = [progress.val_loss for progress in sites.values() if progress.val_loss is not None]
    mean = f", held-out {sum(losses) / len(losses):.3f}" if losses else ""
    return f"{len(sites)} {'site' if len(sites) == 1 else 'sites'} {states}{mean}"


def _fault_lines(groups: Groups) -> list[Text]:
    lines = [
        f"* {site} ({group}) had {progress.num_faults} fault(s), the last: {progress.last_fault}"
        for group, sites in groups.items()
        for site, progress in sites.items()
        if progress.num_faults
    ]
    return [Text(line, style="yellow") for line in lines[-MAX_FAULT_LINES:]]


def _resting_lines(groups: Groups) -> list[Text]:
    lines = [
        f"! {site} ({group}) does not learn from {teacher}: {why}"
        for group, sites in groups.items()
        for site, progress in sites.items()
        if progress.state not in ENDED
        for teacher, why in progress.resting_teachers.items()
    ]
    return [Text(line, style="yellow") for line in lines[-MAX_RESTING_LINES:]]


def _refusal_lines(groups: Groups) -> list[Text]:
    lines = [
        f"! {site} ({group}) refused {progress.num_refusals}, the last: {progress.last_refusal}"
        for group, sites in groups.items()
        for site, progress in sites.items()
        if progress.num_refusals
    ]
    return [Text(line, style="red") for line in lines[-MAX_REFUSAL_LINES:]]
