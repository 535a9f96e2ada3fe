from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace
from itertools import combinations
from xml.etree import ElementTree

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Annotation, Text

from p2pcodistill.report.ages import staleness_and_lag
from p2pcodistill.report.figures import save_png, site_colours, to_svg
from p2pcodistill.report.history import SiteHistory
from p2pcodistill.report.learning_curves import learning_curves
from p2pcodistill.report.summary import ArmResult, summarise
from p2pcodistill.report.traffic import traffic

SITES = ("berlin", "tokyo", "paris", "oslo")


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def curves(arms, num_steps: int = 2000) -> Figure:
    return learning_curves(arms, summarise("pair", arms, num_steps))


def test_every_line_has_its_label_and_a_site_its_colour(make_arms):
    arms = make_arms()
    figure = curves(arms)
    labels = " | ".join(texts(figure)).replace("\n", " ")
    for label in ("berlin, codistilled  1.473", "tokyo, alone  1.613", "all data pooled  1.479"):
        assert label in labels
    assert "lone sites' mean final loss, 1.601" in labels
    assert "reached at step 1250 (berlin) 1350 (tokyo)" in labels
    assert "burn-in: no distillation yet" in labels
    colours = site_colours(arms)
    by_colour = [line.get_color() for line in figure.axes[0].lines]
    assert all(
        by_colour.count(colours[site]) == 3 for site in ("berlin", "tokyo")
    )  # two curves and a mark each


def test_arms_of_one_kind_have_lines_and_names_of_their_own(make_arms):
    first, other = make_arms(), make_arms(kinds=("codistilled",))[0]
    for history in other.sites.values():
        history.evaluations = [(step, loss + 0.05) for step, loss in history.evaluations]
    arms = [*first, replace(other, name="ternary")]
    figure = curves(arms)
    labels = " | ".join(texts(figure))
    for label in ("berlin, codistilled  1.473", "berlin, ternary  1.523", "berlin, alone  1.589"):
        assert label in labels
    one, both = curves(first).axes[0], figure.axes[0]
    assert len(both.lines) == len(one.lines) + 2, "a line a site, and no more marks"


def test_the_steep_start_does_not_flatten_the_picture(make_arms):
    low, high = curves(make_arms()).axes[0].get_ylim()
    assert low < 1.473
    assert high < 2.5  # the first evaluation is above 3.5


@pytest.mark.parametrize("seeds", [(0,), (0, 1, 2)])
def test_labels_do_not_overlap_and_stay_in_the_picture(make_arms, seeds):
    figure = curves(make_arms(sites=SITES, seeds=seeds))
    figure.draw_without_rendering()
    labels = [text for text in figure.axes[0].texts if isinstance(text, Annotation) and text.arrow_patch]
    assert len(labels) == 9
    boxes = [Text.get_window_extent(label) for label in labels]
    assert not any(a.overlaps(b) for a, b in combinations(boxes, 2))
    assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)


def test_a_diverged_site_and_missing_arms_still_make_a_picture(make_arms):
    arms = make_arms(kinds=("codistilled",))
    history = arms[0].sites["berlin"]
    history.evaluations[5:] = [(step, math.nan) for step, _ in history.evaluations[5:]]
    labels = texts(curves(arms))
    assert any(label.startswith("tokyo, codistilled") for label in labels)
    assert not any(label.startswith("berlin") for label in labels)


def test_a_curve_that_ends_early_says_so(make_arms):
    arms = make_arms()
    history = arms[2].sites["pooled"]
    history.evaluations = [point for point in history.evaluations if point[0] <= 1200]
    assert any(
        label.startswith("all data pooled") and label.endswith(" at step 1200")
        for label in texts(curves(arms))
    )


def test_nothing_makes_an_empty_picture():
    arms = [ArmResult("codistilled", "codistilled", 0, {"berlin": SiteHistory(), "tokyo": SiteHistory()})]
    summary = summarise("pair", arms, 100)
    for figure in (learning_curves(arms, summary), staleness_and_lag(arms), traffic(arms, summary)):
        assert to_svg(figure, "empty").startswith("<svg")


def test_each_student_has_a_panel_of_its_teachers(make_arms):
    figure = staleness_and_lag(make_arms(sites=SITES))
    assert [axes.get_title("left") for axes in figure.axes][:2] == [
        "berlin learns from tokyo, paris, oslo",
        "tokyo learns from berlin, paris, oslo",
    ]
    assert all(
        len(axes.lines) == 3 + 1 and len(axes.collections) == 3 for axes in figure.axes
    )  # and the zero line


def test_a_negative_lag_stays_in_sight(make_arms):
    arms = make_arms(kinds=("codistilled",))
    arms[0].sites["berlin"].lag[3] = (arms[0].sites["berlin"].lag[3][0], {"tokyo": -40})
    assert staleness_and_lag(arms).axes[0].get_ylim()[0] < -40


def test_traffic_is_drawn_against_all_reduce(make_arms):
    arms = make_arms()
    figure = traffic(arms, summarise("pair", arms, 2000))
    over_steps, totals = figure.axes
    assert over_steps.get_yscale() == "log"
    assert [label.get_text() for label in totals.get_yticklabels()] == ["all-reduce", "berlin", "tokyo"]
    assert [round(bar.get_width()) for bar in totals.patches] == [940_000 * 4 * 2000, 64_480_000, 64_480_000]
    assert "64.5 MB  (117x less)" in texts(figure)
    low, high = over_steps.get_ylim()
    assert 100_000 < low < 64_480_000 and high > 940_000 * 4 * 2000


def test_svg_is_text_with_ids_of_its_own(make_arms):
    arms = make_arms()
    figure = curves(arms)
    svg = to_svg(figure, "curves")
    root = ElementTree.fromstring(svg)
    ids = [element.get("id") for element in root.iter() if element.get("id")]
    assert ids and all(name.startswith("curves-") for name in ids)
    assert len(ids) == len(set(ids))
    references = re.findall(r'(?:href="#|url\(#)([^")]+)', svg)
    assert references and set(references) <= set(ids)
    assert "berlin, codistilled" in " ".join(
        "".join(e.itertext()) for e in root.iter() if e.tag.endswith("}text")
    )
    assert "<metadata" not in svg
    assert svg == to_svg(curves(arms), "curves")


def test_png_has_two_pixels_a_point(make_arms, tmp_path):
    save_png(curves(make_arms()), tmp_path / "curves.png")
    assert imread(tmp_path / "curves.png").shape[:2] == (980, 1800)


def test_no_window_system_is_touched():
    code = "import sys, p2pcodistill.report.html; sys.exit(bool({'matplotlib.pyplot', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
