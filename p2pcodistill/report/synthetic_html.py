"""The report of a run without training: who had which version when, who knew of whom when, what the links carried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

from p2pcodistill.report import figures
from p2pcodistill.report.edges import edge_rows, table_rows
from p2pcodistill.report.page import render
from p2pcodistill.report.staleness_figures import draw_histogram, draw_timeline
from p2pcodistill.report.states import state_rows, states_picture
from p2pcodistill.report.summary import Summary
from p2pcodistill.report.synthetic import (
    SyntheticResult,
    seconds,
    share,
    states_of,
    synthetic_headline,
)
from p2pcodistill.report.table import ABSENT, byte_count, number, percent
from p2pcodistill.topology.graph import Topology

_MAX_BARS = 16
"""Links or sites that are drawn one by one; of more, how many carried how much."""


def write_synthetic_report(
    path: Path,
    *,
    title: str,
    summary: Summary,
    result: SyntheticResult,
    topology: Topology,
    configuration_text: str,
    versions: Mapping[str, str],
) -> None:
    """Write the report of a run without training, with its `summary` (from `summarise_synthetic`), to `path`.

    `result` is that of the first seed.
    """
    histories = states_of(result.sites)
    drawn = {
        "staleness": staleness_picture(result),
        "spread": spread_picture(result),
        "arrivals": arrivals_picture(result),
        "traffic": traffic_picture(result),
        "states": states_picture(topology, histories),
    }
    shown_edges = table_rows(result.edges)
    shown_states = state_rows(histories)
    path.write_text(
        render(
            "synthetic.html",
            title=title,
            headline=synthetic_headline(summary),
            tiles=_tiles(summary),
            num_seeds=len(summary["seeds"]),
            first_seed=result.seed,
            pictures={name: Markup(figures.to_svg(f, name) if f else "") for name, f in drawn.items()},
            rows=[_row(figures_of_seed) for figures_of_seed in summary["by_seed"]],
            edge_rows=edge_rows(shown_edges),
            num_edges_left_out=len(result.edges) - len(shown_edges),
            state_rows=shown_states,
            num_states_left_out=len(result.sites) - len(shown_states),
            configurations={"The scenario file": configuration_text},
            versions=dict(versions),
        ),
        encoding="utf-8",
    )


def _tiles(summary: Summary) -> list[dict[str, str]]:
    known_s, per_link = summary["everyone_knows_everyone_s"], summary["by_seed"][0]["bytes_per_link"]
    return [
        {"value": str(summary["num_sites"]), "meaning": f"sites, {summary['topology']}"},
        {
            "value": number(summary["mean_staleness_steps"], 1),
            "meaning": "steps were teachers stale, mean over time and edges",
        },
        {
            "value": percent(summary["up_to_date_ratio"]),
            "meaning": "of the time, teachers were less than an exchange behind",
        },
        {"value": seconds(known_s), "meaning": "until something of everyone had reached everyone"}
        if known_s is not None
        else {"value": share(summary["known_ratio"]), "meaning": "of all pairs of sites knew of each other"},
        {"value": byte_count(per_link["median"]), "meaning": "did a link carry one way, median"},
    ]


def _row(figures_of_seed: Mapping[str, Any]) -> list[str]:
    known_s = figures_of_seed["everyone_knows_everyone_s"]
    return [
        str(figures_of_seed["seed"]),
        number(figures_of_seed["mean_staleness_steps"], 1),
        percent(figures_of_seed["up_to_date_ratio"]),
        share(figures_of_seed["known_ratio"]),
        ABSENT if known_s is None else seconds(known_s),
        str(figures_of_seed["max_hops"]),
        f"{figures_of_seed['num_deliveries']:,}",
        percent(figures_of_seed["delivered_ratio"]),
        byte_count(figures_of_seed["bytes_sent"]),
        byte_count(figures_of_seed["bytes_resent"]),
        seconds(figures_of_seed["virtual_s"]),
        seconds(figures_of_seed["processor_s"]),
    ]


def staleness_picture(result: SyntheticResult) -> Figure | None:
    """How far students were behind, over time and for which share of it. None where nobody learnt from anybody."""
    if not result.staleness or not result.seconds_at_staleness:
        return None
    with figures.style():
        figure, (over_time, histogram) = figures.new_figure(9.0, 3.4, num_columns=2, width_ratios=(1.7, 1))
        draw_timeline(over_time, [(s, mean, most) for s, mean, most in result.staleness])
        draw_histogram(histogram, dict(result.seconds_at_staleness))
        return figure


def spread_picture(result: SyntheticResult) -> Figure | None:
    """Who knew of whom: the share over time, and when first knowledge came over how many sites. None if nobody did."""
    if not result.by_hops:
        return None
    with figures.style():
        figure, (over_time, over_hops) = figures.new_figure(9.0, 3.4, num_columns=2)
        times_s, means, slowest, quickest = zip(*result.known, strict=True)
        over_time.fill_between(
            times_s, slowest, quickest, color=figures.SITE_COLOURS[5], alpha=0.35, linewidth=0, step="post",
            label="from the slowest origin to the quickest",
        )  # fmt: skip
        over_time.plot(times_s, means, color=figures.INK, drawstyle="steps-post", label="mean of all origins")
        over_time.set_title("Share of the sites that know of an origin")
        over_time.set_xlabel("seconds")
        complete_s = result.everyone_knows_everyone_s
        over_time.set_xlim(0, times_s[-1] if complete_s is None else min(times_s[-1], 1.15 * complete_s))
        over_time.set_ylim(0, 1.02)
        over_time.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        over_time.legend(loc="lower right")
        hops, _, first_s, mean_s, last_s = zip(*result.by_hops, strict=True)
        over_hops.fill_between(
            hops, first_s, last_s, color=figures.SITE_COLOURS[5], alpha=0.35, linewidth=0, label="from the first to the last"
        )  # fmt: skip
        over_hops.plot(
            hops,
            mean_s,
            color=figures.INK,
            marker="o" if len(hops) <= 40 else "",
            markersize=4,
            label="mean of all pairs",
        )
        over_hops.set_title("When it came, by the sites that it came over")
        over_hops.set_xlabel("sites on the way")
        over_hops.set_ylabel("seconds")
        over_hops.set_xlim(0, max(hops) * 1.03)
        over_hops.set_ylim(bottom=0)
        over_hops.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
        over_hops.legend(loc="upper left")
        return figure


def arrivals_picture(result: SyntheticResult) -> Figure | None:
    """When each site first knew of each other. None for many sites, of which the result does not say it."""
    if not result.arrivals_s or not result.by_hops:
        return None
    names = [site.name for site in result.sites]
    count = len(names)
    with figures.style():
        side = min(7.5, 2.6 + 0.22 * count)
        figure, (axes,) = figures.new_figure(side + 1.2, side)
        values = [[float("nan") if s is None else s for s in row] for row in result.arrivals_s]
        mesh = axes.pcolormesh(values, cmap="viridis_r", edgecolors="white", linewidth=0.4)
        bar = figure.colorbar(mesh, ax=axes, shrink=0.8)
        bar.set_label("seconds; blank: never")
        bar.outline.set_visible(False)
        size = 9 if count <= 20 else 6.5
        middles = [index + 0.5 for index in range(count)]
        is_long = max(map(len, names)) > 2
        axes.set_xticks(middles, names, fontsize=size, rotation=90 if is_long else 0)
        axes.set_yticks(middles, names, fontsize=size)
        axes.tick_params(length=0)
        axes.invert_yaxis()
        axes.set_aspect("equal")
        axes.grid(False)
        axes.set_xlabel("origin")
        axes.set_ylabel("site that learnt of it")
        axes.set_title("When each site first knew of each other")
        for spine in axes.spines.values():
            spine.set_visible(False)
        return figure


def traffic_picture(result: SyntheticResult) -> Figure:
    """What links and sites sent in the whole run: one by one where they are few, else how many sent how much."""
    of_links = [(f"{edge.teacher} → {edge.student}", edge.num_bytes) for edge in result.edges]
    of_sites = [(site.name, site.num_bytes_sent) for site in result.sites]
    num_rows = max(len(rows) if len(rows) <= _MAX_BARS else 0 for rows in (of_links, of_sites))
    with figures.style():
        figure, (links, sites) = figures.new_figure(9.0, max(3.2, 0.9 + 0.22 * num_rows), num_columns=2)
        _draw_bytes(links, of_links, "links, one way")
        links.set_title("Sent over each link, one way")
        _draw_bytes(sites, of_sites, "sites")
        sites.set_title("Sent by each site")
        return figure


def _draw_bytes(axes: Axes, rows: Sequence[tuple[str, int]], what: str) -> None:
    amounts = [num_bytes for _, num_bytes in rows]
    if len(rows) <= _MAX_BARS:
        axes.barh([name for name, _ in rows], amounts, height=0.7, color=figures.SITE_COLOURS[0])
        axes.invert_yaxis()
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    else:
        spread = max(amounts) - min(amounts)
        # Of amounts that are all but the same, the differences say nothing.
        is_even = spread < 0.02 * max(amounts)
        limits = (0.9 * min(amounts), 1.1 * max(amounts) + 1) if is_even else (min(amounts), max(amounts))
        axes.hist(amounts, bins=24, range=limits, color=figures.SITE_COLOURS[0], edgecolor="white")
        axes.set_ylabel(what)
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(EngFormatter("B"))
