"""The report of a run: one HTML file that needs nothing else, neither network nor script.

Everything that comes from a file or a peer is escaped; the pictures are inline SVG made here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from p2pcodistill.report import figures
from p2pcodistill.report.ages import MAX_PANELS, staleness_and_lag
from p2pcodistill.report.edges import EdgeResults, edge_rows
from p2pcodistill.report.learning_curves import learning_curves
from p2pcodistill.report.links import link_rows
from p2pcodistill.report.page import render
from p2pcodistill.report.staleness_figures import staleness_picture
from p2pcodistill.report.states import state_rows, states_picture
from p2pcodistill.report.summary import ArmResult, Summary
from p2pcodistill.report.table import ABSENT, byte_count, headline, number, percent, times
from p2pcodistill.report.traffic import traffic
from p2pcodistill.topology.graph import Topology


def write_report(
    path: Path,
    *,
    title: str,
    summary: Summary,
    arms: Sequence[ArmResult],
    configuration_text: str,
    versions: Mapping[str, str],
    edges: EdgeResults | None = None,
    topology: Topology | None = None,
    comparison: Mapping[str, Any] | None = None,
) -> None:
    """Write the report of `arms`, with their `summary` (from `summarise`), to `path`.

    `configuration_text` is shown as it is; `versions` maps software to version. `edges` and
    `topology` are those of the first codistilled arm under the first seed. `comparison` is what `comparison_section` makes.
    """
    codistilled = next((arm for arm in arms if arm.kind == "codistilled"), None)
    has_timeline = codistilled is not None and _timeline_adds_something(codistilled)
    versions_picture = (
        staleness_picture(edges, figures.site_colours(arms), with_timeline=has_timeline) if edges else None
    )
    states = states_picture(topology, codistilled.sites) if topology and codistilled else None
    page = render(
        "template.html",
        title=title,
        headline=headline(summary),
        tiles=_tiles(summary),
        notes=summary["notes"],
        comparison=comparison,
        loss_unit=summary["loss_unit"],
        num_seeds=len(summary["seeds"]),
        first_seed=summary["seeds"][0] if summary["seeds"] else None,
        rows=_rows(summary),
        models=_models(summary),
        pictures=_pictures(arms, summary)
        | {
            "versions": Markup(figures.to_svg(versions_picture, "versions") if versions_picture else ""),
            "states": Markup(figures.to_svg(states, "states") if states else ""),
        },
        state_rows=state_rows(codistilled.sites) if states and codistilled else [],
        has_timeline=has_timeline,
        num_sites=len(codistilled.sites) if codistilled else 0,
        edge_rows=edge_rows(edges.rows) if edges else [],
        link_rows=link_rows(codistilled.sites) if codistilled else [],
        num_edges_left_out=len(edges.edges) - len(edges.rows) if edges else 0,
        configurations={"The scenario file": configuration_text},
        versions=dict(versions),
    )
    path.write_text(page, encoding="utf-8")


def _tiles(summary: Summary) -> list[dict[str, str]]:
    ratio = summary["bytes_vs_all_reduce_ratio"]
    num_seeds = len(summary["seeds"])
    over_seeds = f", mean of {num_seeds} seeds" if num_seeds > 1 else ""
    return [
        {
            "value": percent(summary["gap_closed_ratio"]),
            "meaning": f"of the gap between alone and pooled closed{over_seeds}",
        },
        {
            "value": number(summary["steps_to_baseline_loss_ratio"], 2),
            "meaning": f"of the steps to reach the lone sites' final loss{over_seeds}",
        },
        {
            "value": ABSENT if ratio is None else f"{ratio:.0f}×",
            "meaning": "fewer bytes sent than all-reduce would have",
        },
        {
            "value": times(summary["bytes_vs_fp16_ratio"]),
            "meaning": "smaller than as raw fp16 did checkpoints travel",
        },
        {
            "value": percent(summary["worst_exchange_stall_ratio"], 2),
            "meaning": "of training time spent in exchange, at the worst site",
        },
    ]


def _rows(summary: Summary) -> list[dict[str, Any]]:
    return [
        {
            "arm": arm["name"],
            "seed": arm["seed"],
            "site": site,
            "is_first": index == 0,
            "numbers": [
                number(values["final_val_loss"], 3),
                str(values["num_steps"]) + ("" if values["finished"] else " (not finished)"),
                percent(values["steps_to_baseline_loss_ratio"]),
                str(values["num_teacher_swaps"] or ABSENT),
                number(values["mean_staleness_steps"], 1),
                number(values["mean_lag_steps"], 1),
                percent(values["exchange_stall_ratio"], 2) if values["num_teacher_swaps"] else ABSENT,
                byte_count(values["bytes_sent"]),
                byte_count(values["bytes_received"]),
                times(values["bytes_vs_fp16_ratio"]),
                number(values["steps_per_s"], 1),
            ],
        }
        for arm in summary["arms"]
        for index, (site, values) in enumerate(arm["sites"].items())
    ]


def _timeline_adds_something(arm: ArmResult) -> bool:
    """Of few sites that nothing befell, the picture of the teachers' age tells the same."""
    return len(arm.sites) > MAX_PANELS or any(history.faults for history in arm.sites.values())


def _models(summary: Summary) -> str:
    """What was trained and on what; one phrase where all sites are alike."""
    phrases = dict.fromkeys(
        f"{values['num_parameters']:,} parameters, {values['precision']} on {values['device']}"
        for arm in summary["arms"]
        for values in arm["sites"].values()
        if values["num_parameters"] is not None
    )
    return f"Every site: {'; or '.join(phrases)}." if phrases else ""


def _pictures(arms: Sequence[ArmResult], summary: Summary) -> dict[str, Markup]:
    drawn = {"learning_curves": learning_curves(arms, summary), "ages": None, "traffic": None}
    if any(arm.kind == "codistilled" for arm in arms):
        drawn |= {"ages": staleness_and_lag(arms), "traffic": traffic(arms, summary)}
    # matplotlib escapes the text that it writes into SVG.
    return {name: Markup(figures.to_svg(figure, name) if figure else "") for name, figure in drawn.items()}
