"""The picture of all sites on a terminal: pure functions from their progress to lines of text."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeAlias

from rich.text import Text

from p2pcodistill.report.links import link_sentence, rate_mbit
from p2pcodistill.report.progress import (
    ENDED,
    Progress,
    State,
    describe_synthetic,
    duration,
    printable,
    refusals_in_words,
    synthetic_staleness,
)
from p2pcodistill.report.run_progress import RunProgress
from p2pcodistill.report.table import ABSENT, byte_count, number, times

Groups: TypeAlias = dict[str, dict[str, Progress]]
"""The sites' progress, by group and site, in the order in which they were first heard of."""

_STATE_STYLES: dict[State, str] = {
    "training": "green",
    "serving": "green",
    "simulating": "green",
    "finished": "bold green",
    "restarting": "bold yellow",
    "stopping": "yellow",
    "stopped": "yellow",
    "killed": "bold red",
    "failed": "bold red",
}
MAX_SITE_CHARACTERS = 16
MAX_BAR_CHARACTERS = 24
MIN_BAR_CHARACTERS = 10
MAX_REFUSAL_LINES = 4
MAX_FAULT_LINES = 4
MAX_RESTING_LINES = 4
MAX_PEER_LINES = 4
MAX_LINK_LINES = 6


def screen(
    title: str, groups: Groups, num_columns: int, num_rows: int, *, jobs: RunProgress | None = None
) -> list[Text]:
    """The picture of all sites: lines of at most `num_columns`, at most `num_rows - 1` of them (the cursor has the last).

    Where the height does not do, groups that have ended fold into one line each, then those that wait, then the rest.
    `jobs` are those that the sites belong to.
    """
    lines = [Text(printable(title), style="bold")]
    if jobs is not None:
        lines.append(Text(jobs.describe()))
        if waiting := jobs.waiting():
            lines.append(Text(f"waiting: {', '.join(waiting)}", style="dim"))
    notices = [
        line
        for lines_of in (_synthetic_lines, _fault_lines, _resting_lines, _peer_lines, _refusal_lines)
        for line in lines_of(groups)
    ]
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
    lines += _link_lines(groups)[: max(0, max_body_lines - len(body))]
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
_WITHOUT_TRAINING = ("site", "state", "step", "stale", "sent")
"""All that there is to show where nothing is trained."""


def _lay_out(sites: Sequence[tuple[str, Progress]], num_columns: int) -> tuple[list[Text], list[Text]]:
    """The two lines of headings and a line per site, in columns as wide as what they hold."""
    rows = [_cells(site, progress) for site, progress in sites]
    widths = {
        name: max([len(word) for word in heading] + [len(row[name]) for row in rows])
        for name, heading in _HEADINGS.items()
        if name in _WITHOUT_TRAINING or not sites or any(progress.synthetic is None for _, progress in sites)
    }
    gap = 2
    if _total(widths, gap) + MIN_BAR_CHARACTERS - widths["state"] > num_columns:
        gap = 1
    for name in _DISPENSABLE:
        if name in widths and _total(widths, gap) > num_columns:
            del widths[name]
    # What is left over draws the bars.
    room = num_columns - _total(widths, gap) + widths["state"]
    if room >= MIN_BAR_CHARACTERS:
        widths["state"] = max(widths["state"], min(room, MAX_BAR_CHARACTERS))
        for row, (_, progress) in zip(rows, sites, strict=True):
            if progress.state in ("training", "simulating") and progress.num_steps:
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
        "stale": Text(_stale(progress), style="yellow" if is_cut_off else ""),
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


def _stale(progress: Progress) -> str:
    if progress.synthetic is not None:
        return synthetic_staleness(progress.synthetic)
    return _staleness(progress.staleness_steps)


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


def _peer_lines(groups: Groups) -> list[Text]:
    lines = []
    for group, sites in groups.items():
        for site, progress in sites.items():
            if progress.state not in ENDED:
                lines += [
                    f"! {site} ({group}) does not listen to {peer} {why}"
                    for peer, why in progress.quarantined_peers.items()
                ]
                lines += [
                    f"! {site} ({group}) gets no answer from {peer}: others are asked before it"
                    for peer in progress.suspected_peers
                ]
    return [Text(printable(line), style="yellow") for line in lines[-MAX_PEER_LINES:]]


def _synthetic_lines(groups: Groups) -> list[Text]:
    return [
        Text(f"{group}: {', '.join(describe_synthetic(progress.synthetic))}")
        for group, sites in groups.items()
        for progress in sites.values()
        if progress.synthetic is not None
    ]


def _link_lines(groups: Groups) -> list[Text]:
    """The thinnest links, where there is room for them."""
    links = [
        (link, f"{site} ({group}) to {link.peer}: {link_sentence(link)}")
        for group, sites in groups.items()
        for site, progress in sites.items()
        if progress.state not in ENDED
        for link in progress.links.values()
    ]
    shown = sorted(links, key=lambda told: rate_mbit(told[0]))[:MAX_LINK_LINES]
    return [Text(printable(f"~ {line}"), style="dim") for _, line in shown]


def _refusal_lines(groups: Groups) -> list[Text]:
    lines = [
        f"! {site} ({group}) refused {refusals_in_words(progress.refusals)}, the last: {progress.last_refusal}"
        for group, sites in groups.items()
        for site, progress in sites.items()
        if progress.num_refusals
    ]
    return [Text(line, style="red") for line in lines[-MAX_REFUSAL_LINES:]]
