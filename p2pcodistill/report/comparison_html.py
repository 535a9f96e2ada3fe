"""The part of a report that compares arms and settles claims: its rows, and its pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.figure import Figure

from p2pcodistill.report.claim_config import ClaimConfig, MeasureName
from p2pcodistill.report.claims import settle
from p2pcodistill.report.comparison import (
    UNFINISHED,
    Comparison,
    arm_cells,
    arm_headings,
    bound_in_words,
    measure_in_words,
    outcome_in_words,
    with_spread,
)
from p2pcodistill.report.comparison_figures import CurveAxis, Look, bars, looks_of_arms, loss_curves
from p2pcodistill.report.figures import save_png, to_svg

_UNITS: dict[MeasureName, tuple[str, str]] = {
    "final-loss": ("Held-out loss in the end", ""),
    "churn": ("Churn between retrains", "mean difference of predictions"),
    "calibration-error": ("Calibration error", "ECE"),
    "diversity": ("Diversity of an arm's sites", "mean difference of predictions"),
}


def draw_comparison(
    comparison: Comparison,
    curves: Sequence[CurveAxis],
    measures: Sequence[MeasureName],
    *,
    loss_unit: str,
    looks: Mapping[str, Look] | None = None,
) -> dict[str, Figure]:
    """The pictures that were asked for, by name; without those that there is nothing to draw for."""
    looks = looks or looks_of_arms(list(comparison.arms))
    drawn = {
        f"loss-over-{axis}": loss_curves(comparison.arms, axis, loss_unit=loss_unit, looks=looks)
        for axis in curves
    }
    for measure in measures:
        told = {
            settled.claim.arm: settled.figure
            for settled in settle(
                [ClaimConfig(text=measure, arm=name, measure=measure) for name in comparison.arms],
                comparison.arms,
            )
            if settled.figure is not None
        }
        title, unit = _UNITS[measure]
        drawn[measure] = bars(told, title=title, unit=unit or loss_unit, looks=looks) if told else None
    return {name: figure for name, figure in drawn.items() if figure is not None}


def save_pictures(pictures: dict[str, Figure], folder: Path) -> list[Path]:
    """Each as a PNG in `folder`; their paths."""
    paths = []
    for name, figure in pictures.items():
        paths.append(folder / f"{name}.png")
        save_png(figure, paths[-1])
    return paths


def comparison_section(comparison: Comparison, pictures: dict[str, Figure]) -> dict[str, Any]:
    """What the template shows."""
    return {
        "claims": [
            {
                "text": settled.claim.text,
                "source": settled.claim.source,
                "measure": measure_in_words(settled),
                "seen": with_spread(settled.figure),
                "claimed": bound_in_words(settled.claim),
                "outcome": outcome_in_words(settled),
            }
            for settled in comparison.settled
        ],
        "headings": arm_headings(comparison),
        "arms": [arm_cells(row, comparison) for row in comparison.rows],
        "footnote": "" if all(row.is_finished for row in comparison.rows) else UNFINISHED,
        "pictures": [Markup(to_svg(figure, name)) for name, figure in pictures.items()],
    }
