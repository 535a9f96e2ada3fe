"""Arms side by side: every arm is there, over each axis, whatever it took of it."""

from __future__ import annotations

import math

import pytest

from p2pcodistill.report.arm_figures import ArmFigures, Point
from p2pcodistill.report.comparison_figures import bars, looks_of_arms, loss_curves
from p2pcodistill.report.figures import SITE_COLOURS, to_svg
from p2pcodistill.report.verdicts import spread_of


def arm(name: str, final_loss: float, bytes_per_step: int = 0, *, num_seeds: int = 2) -> ArmFigures:
    curves = {
        seed: [
            Point(step, final_loss + 100 / step + 0.01 * seed, 2.0 * step, bytes_per_step * step, {})
            for step in range(10, 101, 10)
        ]
        for seed in range(num_seeds)
    }
    return ArmFigures(name, "alone", curves, {seed: {} for seed in curves})


ARMS = {of.name: of for of in (arm("lone", 2.0), arm("thin", 1.5, 10), arm("thick", 1.0, 100_000))}


@pytest.mark.parametrize("axis", ["steps", "seconds", "bytes"])
def test_every_arm_is_drawn_and_named(axis: str) -> None:
    figure = loss_curves(ARMS, axis, loss_unit="nats/byte")  # type: ignore[arg-type]
    assert figure is not None
    text = to_svg(figure, "curves")
    for name in ARMS:
        assert name in text
    (axes,) = figure.axes
    assert len(axes.lines) >= len(ARMS)
    left, right = axes.get_xlim()
    assert (left, right) == {"steps": (0, 100), "seconds": (0, 200), "bytes": (200, 1e7)}[axis]


def test_labels_tell_lines_of_one_colour_apart() -> None:
    arms = {f"arm-{index}": arm(f"arm-{index}", 1.0 + index) for index in range(len(SITE_COLOURS) + 1)}
    figure = loss_curves(arms, "steps", loss_unit="nats")
    assert figure is not None
    labels = [text.get_text() for text in figure.axes[0].texts]
    (dashed,) = [label for label in labels if label.startswith("– –  ")]
    assert dashed.split()[2] == f"arm-{len(SITE_COLOURS)}"


def test_an_arm_that_sends_nothing_is_drawn_across_at_its_final_loss() -> None:
    figure = loss_curves(ARMS, "bytes", loss_unit="nats/byte")
    assert figure is not None
    lone = figure.axes[0].lines[0]
    assert list(lone.get_xdata()) == [200, 1e7], "from where curves are past their steep start"
    assert list(lone.get_ydata()) == pytest.approx([3.005, 3.005])


def test_without_any_bytes_there_is_no_picture_over_them() -> None:
    assert loss_curves({"lone": ARMS["lone"]}, "bytes", loss_unit="nats/byte") is None


def test_steps_at_which_a_seed_diverged_are_left_out() -> None:
    curves = {
        0: [Point(10, 1.0, 1.0, 0, {}), Point(20, math.nan, 2.0, 0, {})],
        1: [Point(10, 3.0, 1.0, 0, {})],
    }
    figure = loss_curves({"a": ArmFigures("a", "alone", curves, {})}, "steps", loss_unit="nats")
    assert figure is not None
    assert list(figure.axes[0].lines[0].get_ydata()) == [2.0]


def test_bars_have_mean_and_half_the_range_written_at_them() -> None:
    figure = bars({"ours": spread_of([0.1, 0.3]), "theirs": spread_of([-0.5])}, title="Churn", unit="share")
    text = to_svg(figure, "bars")
    assert "0.20 ± 0.10" in text
    assert "-0.50" in text and "-0.50 ±" not in text
    assert figure.axes[0].get_xlabel() == "share"
    assert len(figure.axes[0].patches) == 2


def test_bars_that_would_look_alike_are_dots_on_an_axis_that_shows_what_differs() -> None:
    close = {"ours": spread_of([1.736, 1.744]), "theirs": spread_of([1.92])}
    (axes,) = bars(close, title="Loss", unit="nats").axes
    assert not axes.patches
    dots = [line for line in axes.lines if line.get_marker() == "o"]
    assert [list(dot.get_xdata()) for dot in dots] == [[pytest.approx(1.74)], [pytest.approx(1.92)]]
    left, right = axes.get_xlim()
    assert 1.6 < left < 1.736 and 1.92 < right < 2.1
    assert [text.get_text() for text in axes.texts] == ["1.740 ± 0.004", "1.920"]


def test_more_arms_than_colours_get_them_again() -> None:
    names = [f"arm-{index}" for index in range(len(SITE_COLOURS) + 1)]
    looks = looks_of_arms(names)
    assert looks[names[0]].colour == looks[names[-1]].colour
    assert len({look.colour for look in looks.values()}) == len(SITE_COLOURS)
    assert len(set(looks.values())) == len(names)
