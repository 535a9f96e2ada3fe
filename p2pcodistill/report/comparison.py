"""What the arms of a scenario came to, side by side, and what that says of its claims: data, terminal tables, Markdown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from p2pcodistill.report.arm_figures import ArmFigures
from p2pcodistill.report.claim_config import ClaimConfig
from p2pcodistill.report.claims import Settled, settle, strongest
from p2pcodistill.report.table import ABSENT, byte_count
from p2pcodistill.report.verdicts import Spread, paired_differences, spread_of


@dataclass(frozen=True, slots=True)
class ArmRow:
    """An arm over its seeds; None what cannot be told."""

    name: str
    final_loss: Spread | None
    difference: Spread | None
    """Of the final loss, minus the baseline's under the same seed."""
    num_steps: int
    seconds: float
    """Mean over seeds."""
    num_bytes: float
    """Sent by all sites, mean over seeds."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The arms and the claims of a scenario."""

    arms: Mapping[str, ArmFigures]
    rows: Sequence[ArmRow]
    baseline: str | None
    """What differences are to: the strongest of the arms that claims compare with."""
    settled: Sequence[Settled]

    def to_record(self) -> dict[str, Any]:
        """For `summary.json`."""
        return {
            "baseline": self.baseline,
            "arms": [asdict(row) for row in self.rows],
            "claims": [settled.to_record() for settled in self.settled],
        }


def compare(arms: Mapping[str, ArmFigures], claims: Sequence[ClaimConfig]) -> Comparison:
    """Settle `claims`, and put the arms side by side."""
    named = dict.fromkeys(name for claim in claims for name in claim.against)
    baseline = strongest([arms[name] for name in named]) if named else None
    return Comparison(
        arms,
        [_row(arm, baseline) for arm in arms.values()],
        baseline.name if baseline is not None else None,
        settle(claims, arms),
    )


def _row(arm: ArmFigures, baseline: ArmFigures | None) -> ArmRow:
    lasts = [curve[-1] for curve in arm.curves.values() if curve]
    difference = None
    if baseline is not None and baseline is not arm:
        difference = _spread(paired_differences(arm.final_losses, baseline.final_losses))
    num_seeds = max(1, len(lasts))
    return ArmRow(
        arm.name,
        _spread(arm.final_losses),
        difference,
        max((point.step for point in lasts), default=0),
        sum(point.seconds for point in lasts) / num_seeds,
        sum(point.num_bytes for point in lasts) / num_seeds,
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


def arms_table(comparison: Comparison) -> Table:
    """The arms, for a terminal."""
    table = Table(box=box.SIMPLE_HEAD, title="Arms", title_justify="left", title_style="bold")
    table.add_column("arm")
    for heading in ("final loss", difference_heading(comparison), "steps", "seconds", "sent"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in comparison.rows:
        table.add_row(*map(Text, arm_cells(row)))
    return table


def difference_heading(comparison: Comparison) -> str:
    """Of the column with `ArmRow.difference`."""
    return f"minus {comparison.baseline}" if comparison.baseline is not None else "difference"


def arm_cells(row: ArmRow) -> list[str]:
    """Name, final loss, difference to the baseline, steps, seconds, bytes."""
    return [
        row.name,
        with_spread(row.final_loss),
        with_spread(row.difference, signed=True),
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
    lines += [
        f"| arm | final held-out loss | {difference_heading(comparison)} | steps | seconds | sent |",
        "|---|---|---|---|---|---|",
    ]
    lines += [f"| {' | '.join(map(_cell, arm_cells(row)))} |" for row in comparison.rows]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
