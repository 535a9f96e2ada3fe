"""Several runs side by side: the page, its pictures, and the files beside it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from p2pcodistill.report.comparison_figures import CURVE_AXES, looks_of_runs, tell_lines
from p2pcodistill.report.comparison_html import comparison_section, draw_comparison, save_pictures
from p2pcodistill.report.page import render
from p2pcodistill.report.results import REPORT_FILE, RESULT_FILE, write_summary
from p2pcodistill.report.run_comparison import (
    RUN_HEADINGS,
    RunComparison,
    RunGroup,
    group_headline,
    run_cells,
    runs_markdown,
)


def write_run_comparison(comparison: RunComparison, folder: Path, *, title: str) -> None:
    """Write report, figures, tables and summary into `folder`."""
    pictures = [_draw(group, index) for index, group in enumerate(comparison.groups)]
    for of_group in pictures:
        save_pictures(of_group, folder)
    write_summary(comparison.to_record(), folder)
    (folder / RESULT_FILE).write_text(runs_markdown(comparison, heading=title))
    page = render(
        "runs.html",
        title=title,
        headline=" ".join(map(group_headline, comparison.groups)),
        tiles=[],
        notes=comparison.notes,
        run_headings=RUN_HEADINGS,
        run_rows=[run_cells(run) for run in comparison.runs],
        groups=[
            {
                "title": group.title,
                "comparison": comparison_section(group.comparison, of_group),
                "baseline": group.comparison.baseline,
                "loss_unit": group.loss_unit,
                "has_lines_of_runs": bool(_lines_of_runs(group)),
            }
            for group, of_group in zip(comparison.groups, pictures, strict=True)
        ],
        run_names=[run.name for run in comparison.runs],
        differing=dict(comparison.differing),
        configurations={run.name: run.configuration_text for run in comparison.runs},
        versions={},
    )
    (folder / REPORT_FILE).write_text(page, encoding="utf-8")


def _draw(group: RunGroup, index: int) -> dict[str, Figure]:
    """The pictures of a group by name; those of further groups have a number."""
    looks = looks_of_runs(group.labels)
    pictures = draw_comparison(group.comparison, CURVE_AXES, (), loss_unit=group.loss_unit, looks=looks)
    if lines := _lines_of_runs(group):
        for figure in pictures.values():
            tell_lines(figure, lines)
    return {f"{name}-{index + 1}" if index else name: figure for name, figure in pictures.items()}


def _lines_of_runs(group: RunGroup) -> dict[str, Any]:
    """The line of each run, by its name, where lines tell runs apart."""
    looks = looks_of_runs(group.labels)
    lines = {run: looks[next(iter(labels.values()))].line for run, labels in group.labels.items()}
    return lines if len(set(map(str, lines.values()))) > 1 else {}
