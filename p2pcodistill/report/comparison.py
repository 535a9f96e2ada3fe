"""What the arms of a scenario came to, side by side, and what that says of its claims: data, terminal tables, Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from p2pcodistill.report.arm_figures import ArmFigures, over_common_sites
from p2pcodistill.report.claim_config import ClaimConfig
from p2pcodistill.report.claims import Settled, settle, strongest
from p2pcodistill.report.table import ABSENT, byte_count
from p2pcodistill.report.verdicts import Spread, paired_differences, spread_of

_MAX_HEADING_CHARS = 24


@dataclass(frozen=True, slots=True)
class ArmRow:
    """An arm over its seeds; None what cannot be told."""

    name: str
    seeds: tuple[int, ...]
    is_finished: bool
    """Else `final_loss` is that of the newest evaluation."""
    final_loss: Spread | None
    difference: Spread | None
    """Of the final loss, minus the baseline's under the same seed; over the seeds that both have finished."""
    num_steps: int
    seconds: float
    """Mean over seeds."""
    num_bytes: float
    """Sent by all sites, mean over seeds."""
    num_compared_sites: int | None = None
    """Over how many of its sites the difference is taken: those that the baseline has, too. None: over all."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The arms and the claims of a scenario."""

    arms: Mapping[str, ArmFigures]
    rows: Sequence[ArmRow]
    baseline: str | None
    """What differences are to."""
    settled: Sequence[Settled]

    @property
    def has_unlike_seeds(self) -> bool:
        """Whether the arms have not all run under the same seeds."""
        return len({row.seeds for row in self.rows}) > 1

    def to_record(self) -> dict[str, Any]:
        """For `summary.json`."""
        return {
            "baseline": self.baseline,
            "arms": [asdict(row) for row in self.rows],
            "claims": [settled.to_record() for settled in self.settled],
        }


def compare(
    arms: Mapping[str, ArmFigures], claims: Sequence[ClaimConfig] = (), *, baseline: str | None = None
) -> Comparison:
    """Settle `claims`, and put the arms side by side.

    Differences are to the arm `baseline`, by default to the strongest of the arms that claims compare with.
    """
    named = dict.fromkeys(name for claim in claims for name in claim.against)
    finished = [arms[name] for name in named if name in arms and arms[name].is_finished]
    compared = strongest(finished) if finished else None
    if baseline is not None:
        compared = arms[baseline]
    return Comparison(
        arms,
        [_row(arm, compared) for arm in arms.values()],
        compared.name if compared is not None else None,
        settle(claims, arms),
    )


def _row(arm: ArmFigures, baseline: ArmFigures | None) -> ArmRow:
    lasts = [curve[-1] for curve in arm.curves.values() if curve]
    difference = num_compared = None
    if baseline is not None and baseline is not arm and baseline.is_finished and arm.is_finished:
        ours, baseline = over_common_sites(arm, baseline)
        counts = [max(map(len, of.histories.values()), default=0) for of in (ours, arm)]
        num_compared = counts[0] if counts[0] < counts[1] else None
        theirs = baseline.final_losses
        common = {seed: loss for seed, loss in ours.final_losses.items() if seed in theirs}
        difference = _spread(paired_differences(common, {seed: theirs[seed] for seed in common}))
    num_seeds = max(1, len(lasts))
    return ArmRow(
        arm.name,
        tuple(arm.curves),
        arm.is_finished,
        _spread(arm.final_losses),
        difference,
        max((point.step for point in lasts), default=0),
        sum(point.seconds for point in lasts) / num_seeds,
        sum(point.num_bytes for point in lasts) / num_seeds,
        num_compared,
    )


def _spread(figures: Mapping[int, float]) -> Spread | None:
    try:
        return spread_of(figures.values())
    except ValueError:
        return None


# --- in words ----------------------------------------------------------------------------------------------------


def with_spread(figure: Spread | None, digits: int = 3, *, signed: bool = False) -> str:
    """Mean and half the range over the seeds."""
    if figure is None:
        return ABSENT
    mean = f"{figure.mean:+.{digits}f}" if signed else f"{figure.mean:.{digits}f}"
    return f"{mean} ± {figure.half_range:.{digits}f}" if figure.num > 1 else mean


def bound_in_words(claim: ClaimConfig) -> str:
    """What the figure is held against."""
    if claim.at_most is not None:
        words = f"at most {claim.at_most:g}"
    elif claim.at_least is not None:
        words = f"at least {claim.at_least:g}"
    else:
        return "measured"
    return f"{words}, every seed" if claim.beyond_spread else words


def measure_in_words(settled: Settled) -> str:
    """What was taken of which arm."""
    claim = settled.claim
    what = (
        claim.metric
        if claim.metric is not None and claim.measure == "metric"
        else claim.measure.replace("-", " ")
    )
    if claim.measure == "metric-difference":
        what = f"difference of {claim.metric}"
    against = f" against {settled.baseline}" if settled.baseline is not None else ""
    return f"{what} of {claim.arm}{against}"


def outcome_in_words(settled: Settled) -> str:
    """The verdict, and what has to be said with it."""
    if settled.figure is None:
        return f"cannot be told: {settled.why}"
    words: str = settled.verdict or "measured"
    if settled.verdict is not None and settled.figure.num == 1:
        words += " (one seed)"
    if settled.never:
        words += f"; never got there under seed {', '.join(settled.never)}"
    return words


def claims_table(comparison: Comparison) -> Table:
    """The claims and what was seen, for a terminal."""
    table = Table(
        box=box.SIMPLE_HEAD,
        title="What was claimed, and what was seen",
        title_justify="left",
        title_style="bold",
    )
    table.add_column("claim")
    for heading in ("seen", "claimed"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict")
    for settled in comparison.settled:
        table.add_row(
            Text(f"{settled.claim.text} ({measure_in_words(settled)})"),
            Text(with_spread(settled.figure)),
            Text(bound_in_words(settled.claim)),
            Text(outcome_in_words(settled)),
        )
    return table


def arms_table(comparison: Comparison, *, title: str = "Arms") -> Table:
    """The arms, for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold")
    name, loss, *others = arm_headings(comparison)
    table.add_column(name, overflow="fold")
    table.add_column(loss.replace(" held-out ", "\nheld-out "), justify="right", no_wrap=True)
    for heading in others:
        is_long = len(heading) > _MAX_HEADING_CHARS // 2
        table.add_column(
            heading.replace("minus ", "minus\n") if is_long else heading, justify="right", no_wrap=True
        )
    for row in comparison.rows:
        table.add_row(*map(Text, arm_cells(row, comparison)))
    if any(not row.is_finished for row in comparison.rows):
        table.caption, table.caption_justify = Text(UNFINISHED), "left"
    return table


UNFINISHED = "* not finished: the newest loss, which is compared with nothing."
"""What there is to be said to a mark in `arm_cells`."""


def arm_headings(comparison: Comparison) -> list[str]:
    """Of `arm_cells`."""
    baseline = comparison.baseline
    if baseline is None:
        minus = "difference"
    else:
        minus = f"minus {baseline}" if len(baseline) <= _MAX_HEADING_CHARS else "minus baseline"
    seeds = ["seeds"] if comparison.has_unlike_seeds else []
    return ["arm", "final held-out loss", minus, *seeds, "steps", "seconds", "sent"]


def arm_cells(row: ArmRow, comparison: Comparison) -> list[str]:
    """Name, final loss, difference to the baseline, seeds where arms have others, steps, seconds, bytes."""
    difference = with_spread(row.difference, signed=True)
    if row.name == comparison.baseline:
        difference = "baseline"
    elif row.difference is not None and row.difference.num < len(row.seeds):
        difference += f" ({row.difference.num} of {len(row.seeds)} seeds)"
    if row.num_compared_sites is not None:
        difference += f" ({row.num_compared_sites} of its sites)"
    return [
        row.name,
        with_spread(row.final_loss) + ("" if row.is_finished else "*"),
        difference,
        *([", ".join(map(str, row.seeds))] if comparison.has_unlike_seeds else []),
        f"{row.num_steps:,}",
        f"{row.seconds:,.0f}",
        byte_count(round(row.num_bytes)),
    ]


def markdown(comparison: Comparison, *, heading: str, facts: Sequence[str]) -> str:
    """The result as a section of a Markdown file, so that nobody has to copy figures by hand."""
    lines = [f"## {heading}", "", *[f"- {fact}" for fact in facts], ""]
    if comparison.settled:
        lines += ["| claim | source | seen | claimed | verdict |", "|---|---|---|---|---|"]
        for settled in comparison.settled:
            cells = (
                f"{settled.claim.text} ({measure_in_words(settled)})",
                settled.claim.source or ABSENT,
                with_spread(settled.figure),
                bound_in_words(settled.claim),
                outcome_in_words(settled),
            )
            lines.append(f"| {' | '.join(map(_cell, cells))} |")
        lines.append("")
    headings = arm_headings(comparison)
    lines += [f"| {' | '.join(map(_cell, headings))} |", "|---" * len(headings) + "|"]
    lines += [f"| {' | '.join(map(_cell, arm_cells(row, comparison)))} |" for row in comparison.rows]
    if any(not row.is_finished for row in comparison.rows):
        lines += ["", UNFINISHED.replace("*", "\\*", 1)]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
