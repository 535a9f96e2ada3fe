"""Claims are settled by what the runs say, whatever that is."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from p2pcodistill.errors import ConfigError
from p2pcodistill.report.arm_figures import ArmFigures, Point, Predicted, arm_figures, read_predictions
from p2pcodistill.report.claim_config import MEASURES, ClaimConfig, check_claims
from p2pcodistill.report.claims import Settled, settle, strongest
from p2pcodistill.report.comparison import compare
from p2pcodistill.report.history import SiteHistory
from p2pcodistill.report.summary import ArmResult
from p2pcodistill.strict import parse_model
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.node_events import TrafficMeasured
from p2pcodistill.telemetry.records import to_record
from p2pcodistill.telemetry.training_events import Evaluated, StepMeasured, TrainingEnded


def arm(
    name: str,
    losses: Mapping[int, Sequence[float]],
    *,
    seconds_per_step: float = 1.0,
    bytes_per_step: int = 0,
    metrics: Mapping[str, float] | None = None,
    predictions: Mapping[int, Mapping[str, Predicted]] | None = None,
    training_losses: Mapping[int, float] | None = None,
) -> ArmFigures:
    """An arm that was evaluated every 10 steps."""
    curves = {
        seed: [
            Point(step, loss, seconds_per_step * step, bytes_per_step * step, metrics or {})
            for step, loss in zip(range(10, 10 * len(curve) + 1, 10), curve, strict=True)
        ]
        for seed, curve in losses.items()
    }
    return ArmFigures(
        name, "alone", curves, predictions or {seed: {} for seed in losses}, training_losses or {}
    )


def told(claim: dict[str, Any], *arms: ArmFigures) -> Settled:
    config = ClaimConfig(**({"text": "it is so", "arm": arms[0].name} | claim))
    (settled,) = settle([config], {of.name: of for of in arms})
    return settled


OURS = arm("ours", {0: [4.0, 3.0, 2.0], 1: [4.0, 2.0, 1.0]}, bytes_per_step=2)
THEIRS = arm("theirs", {0: [5.0, 4.0, 3.0], 1: [5.0, 4.0, 3.5]}, seconds_per_step=2.0, bytes_per_step=1)
WORSE = arm("worse", {0: [5.0, 5.0, 2.5], 1: [6.0, 6.0, 6.0]})


def test_the_strongest_baseline_is_the_one_with_the_lowest_mean() -> None:
    assert strongest([WORSE, THEIRS]) is THEIRS
    assert strongest([arm("diverged", {0: [1.0], 1: [math.nan]}), WORSE]) is WORSE


@pytest.mark.parametrize(
    ("measure", "figures"),
    [
        ("loss-difference", {"0": -1.0, "1": -2.5}),
        ("loss-ratio", {"0": 2 / 3, "1": 1 / 3.5}),
        # Down to 3.0 at step 20; from 4.0 at 10 down to 2.0 at 20, 3.5 is at 12.5.
        ("steps-ratio", {"0": 20 / 30, "1": 12.5 / 30}),
        ("seconds-ratio", {"0": 20 / 60, "1": 12.5 / 60}),
        ("bytes-ratio", {"0": 40 / 30, "1": 25 / 30}),
    ],
)
def test_an_arm_is_compared_under_the_same_seed(measure: str, figures: dict[str, float]) -> None:
    settled = told({"measure": measure, "against": ("worse", "theirs")}, OURS, THEIRS, WORSE)
    assert settled.baseline == "theirs"
    assert settled.figures == pytest.approx(figures)
    assert settled.figure is not None
    assert settled.figure.mean == pytest.approx(sum(figures.values()) / 2)
    assert settled.verdict is None, "nothing was claimed"
    assert settled.never == ()


def test_an_arm_that_never_gets_there_counts_as_all_that_it_took() -> None:
    settled = told({"measure": "steps-ratio", "against": ("ours",), "at_most": 0.9}, THEIRS, OURS)
    assert settled.figures == {"0": 1.0, "1": 1.0}
    assert settled.never == ("0", "1")
    assert settled.verdict == "contradicted"


@pytest.mark.parametrize(
    ("bound", "verdict"),
    [
        ({"at_most": -1.5}, "reproduced"),
        ({"at_most": -1.5, "beyond_spread": True}, "not at this scale"),
        ({"at_most": -1.0, "beyond_spread": True}, "reproduced"),
        ({"at_most": -2.0}, "not at this scale"),
        ({"at_least": 0.5}, "contradicted"),
    ],
)
def test_verdicts_are_on_the_mean_or_on_every_seed(bound: dict[str, Any], verdict: str) -> None:
    claim = {"measure": "loss-difference", "against": ("theirs",)} | bound
    assert told(claim, OURS, THEIRS).verdict == verdict


def test_the_gap_that_is_closed() -> None:
    claim = {"measure": "gap-closed", "against": ("theirs",), "towards": "ours", "at_least": 0.4}
    between = arm("between", {0: [2.5], 1: [3.0]})
    settled = told(claim, between, THEIRS, OURS)
    assert settled.figures == pytest.approx({"0": 0.5, "1": 0.2})
    assert settled.verdict == "not at this scale"
    settled = told(claim | {"against": ("ours",), "towards": "theirs"}, between, THEIRS, OURS)
    assert (settled.figure, settled.verdict) == (None, None)
    assert settled.why == "theirs is no better than ours under seed 0, 1: no gap"


def predicted(*rows: float, labels: Sequence[int] = (0, 1)) -> Predicted:
    positive_N = np.array(rows)
    return Predicted(np.stack([1 - positive_N, positive_N], axis=1), np.array(labels))


def test_churn_is_between_retrains_of_the_same_site() -> None:
    ours = arm(
        "ours",
        {0: [1.0], 1: [1.0], 2: [1.0]},
        predictions={
            0: {"a": predicted(0.5, 0.5), "b": predicted(0.1, 0.1)},
            1: {"a": predicted(0.6, 0.5), "b": predicted(0.1, 0.3)},
            2: {"a": predicted(0.5, 0.5), "b": predicted(0.1, 0.1)},
        },
    )
    theirs = arm(
        "theirs",
        {0: [1.0], 1: [1.0], 2: [1.0]},
        predictions={
            0: {"pooled": predicted(0.2, 0.2)},
            1: {"pooled": predicted(0.4, 0.2)},
            2: {"pooled": predicted(0.2, 0.4)},
        },
    )
    assert told({"measure": "churn"}, ours).figures == pytest.approx({"0-1": 0.075, "0-2": 0.0, "1-2": 0.075})
    ratio = told({"measure": "churn-ratio", "against": ("theirs",)}, ours, theirs)
    assert ratio.figures == pytest.approx({"0-1": 0.75, "0-2": 0.0, "1-2": 0.375})
    assert told({"measure": "diversity"}, ours).figures["0"] == pytest.approx(0.4)
    assert told({"measure": "calibration-error"}, theirs).figures["0"] == pytest.approx(0.3)


def test_churn_after_a_change_is_between_arms_under_the_same_seed() -> None:
    def retrained(name: str, *rows: tuple[float, float]) -> ArmFigures:
        return arm(
            name,
            {seed: [1.0] for seed in range(len(rows))},
            predictions={
                seed: {"a": predicted(first, 0.5), "b": predicted(0.5, second)}
                for seed, (first, second) in enumerate(rows)
            },
        )

    changed, before = (
        retrained("changed", (0.5, 0.5), (0.9, 0.7)),
        retrained("before", (0.5, 0.5), (0.5, 0.5)),
    )
    settled = told({"measure": "arm-churn", "against": ("before",)}, changed, before)
    assert settled.figures == pytest.approx({"0": 0.0, "1": 0.15})
    pooled = arm("pooled", {0: [1.0], 1: [1.0]}, predictions={0: {"pooled": predicted(0.5, 0.5)}, 1: {}})
    settled = told({"measure": "arm-churn", "against": ("pooled",)}, changed, pooled)
    assert settled.why == "changed and pooled have left no predictions of the same site"


def test_a_loss_that_only_lacks_confidence_comes_down_at_another_temperature() -> None:
    unsure = predicted(*[0.4] * 9, 0.6, labels=[0] * 9 + [0])  # right nine times in ten
    ours = arm("ours", {0: [0.6]}, predictions={0: {"a": unsure}})
    figure = told({"measure": "calibrated-loss"}, ours).figures["0"]
    assert figure == pytest.approx(-0.9 * math.log(0.9) - 0.1 * math.log(0.1), abs=1e-3)


def test_the_training_loss_is_that_of_the_last_batches() -> None:
    ours = arm("ours", {0: [1.0], 1: [1.0]}, training_losses={0: 0.5, 1: 0.7})
    assert told({"measure": "training-loss"}, ours).figures == {"0": 0.5, "1": 0.7}
    unmeasured = arm("ours", {0: [1.0]}, training_losses={0: math.nan})
    assert told({"measure": "training-loss"}, unmeasured).figure is None


@pytest.mark.parametrize("measure", ["churn", "calibration-error", "calibrated-loss", "diversity"])
def test_without_predictions_there_is_no_figure(measure: str) -> None:
    settled = told({"measure": measure}, OURS)
    assert settled.figure is None
    assert settled.why.startswith("ours has")


def test_metrics_of_the_task() -> None:
    ours, theirs = (
        arm("ours", {0: [1.0]}, metrics={"accuracy": 0.9}),
        arm("theirs", {0: [1.0]}, metrics={"accuracy": 0.7}),
    )
    assert told({"measure": "metric", "metric": "accuracy"}, ours).figures == {"0": 0.9}
    settled = told(
        {"measure": "metric-difference", "metric": "accuracy", "against": ("theirs",)}, ours, theirs
    )
    assert settled.figures == pytest.approx({"0": 0.2})
    assert (
        told({"measure": "metric", "metric": "auc"}, ours).why
        == "ours has no metric 'auc'; there are accuracy"
    )


def test_a_run_that_diverged_is_no_figure() -> None:
    settled = told(
        {"measure": "loss-difference", "against": ("theirs",)}, arm("ours", {0: [math.nan], 1: [1.0]}), THEIRS
    )
    assert settled.figure is None
    assert settled.why == "there is no figure under seed 0: it diverged, or was not evaluated"


def test_every_measure_is_taken_by_something() -> None:
    predictions = {seed: {"a": predicted(0.5, 0.5), "b": predicted(0.1 + 0.2 * seed, 0.1)} for seed in (0, 1)}
    ours, theirs, third = (
        arm(
            name,
            {0: [3.0, loss], 1: [3.0, loss]},
            bytes_per_step=1,
            metrics={"m": 1.0},
            predictions=predictions,
            training_losses={0: 1.0, 1: 1.0},
        )
        for name, loss in (("ours", 1.0), ("theirs", 2.0), ("third", 0.5))
    )
    for measure, needs in MEASURES.items():
        claim: dict[str, Any] = {"measure": measure}
        claim |= {"against": ("theirs",)} if needs.is_compared else {}
        claim |= {"metric": "m"} if measure.startswith("metric") else {}
        claim |= {"towards": "third"} if measure == "gap-closed" else {}
        assert told(claim, ours, theirs, third).figure is not None, measure


def test_two_equal_curves_are_no_effect_even_if_they_overfit() -> None:
    losses = {seed: [3.0, 2.6, 2.4, 2.6, 2.8] for seed in (0, 1)}
    claim = {"measure": "steps-ratio", "against": ("theirs",), "at_most": 0.85}
    settled = told(claim, arm("ours", losses), arm("theirs", losses))
    assert settled.figures == {"0": 1.0, "1": 1.0}
    assert settled.verdict == "contradicted"


def test_a_seed_that_never_gets_there_keeps_a_claim_from_being_reproduced() -> None:
    theirs = arm("theirs", {key: [5.0, 4.0, 3.0, 2.0] for key in range(3)})
    ours = arm("ours", {0: [1.0] * 4, 1: [1.0] * 4, 2: [9.0] * 4})
    settled = told({"measure": "steps-ratio", "against": ("theirs",), "at_most": 0.55}, ours, theirs)
    assert settled.figure is not None and settled.figure.mean == pytest.approx(0.5)
    assert (settled.never, settled.verdict) == (("2",), "not at this scale")


def test_what_cannot_be_compared_is_told_and_stops_nothing() -> None:
    diverged = arm("theirs", {0: [math.nan], 1: [1.0]})
    claim = {"measure": "steps-ratio", "against": ("theirs",)}
    assert told(claim, OURS, diverged).why.startswith(
        "theirs was never evaluated under seed 0, or diverged at once"
    )
    same = arm("same", {0: [1.0], 1: [1.0]}, predictions={key: {"a": predicted(0.5, 0.5)} for key in (0, 1)})
    assert (
        "nothing to be a share of"
        in told({"measure": "churn-ratio", "against": ("same",)}, same_as(same), same).why
    )
    unlike = {0: {"a": predicted(0.5, 0.5), "b": predicted(0.5, labels=(1,))}}
    assert "shapes" in told({"measure": "diversity"}, arm("unlike", {0: [1.0]}, predictions=unlike)).why
    broken = {0: {"a": predicted(math.nan, 0.5)}}
    assert (
        "diverged"
        in told({"measure": "calibration-error"}, arm("broken", {0: [1.0]}, predictions=broken)).why
    )


def same_as(other: ArmFigures) -> ArmFigures:
    return arm("ours", {0: [1.0], 1: [1.0]}, predictions=other.predictions)


# --- from the logs -------------------------------------------------------------------------------------------------


def history(*told: tuple[float, Event]) -> SiteHistory:
    return SiteHistory.of(to_record(event, time_unix_s=time_s) for time_s, event in told)


def test_an_arm_of_several_sites_has_the_curve_of_their_mean(tmp_path: Path) -> None:
    sites = {
        "a": history(
            (100.0, Evaluated(10, 3.0, 0.1, {"accuracy": 0.5, "own": 1.0})),
            (103.0, TrafficMeasured(500, 0, {}, {})),
            (104.0, Evaluated(20, 2.0, 0.1, {"accuracy": 0.6})),
        ),
        "b": history(
            (100.0, Evaluated(10, 5.0, 0.1, {"accuracy": 0.7})),
            (101.0, TrafficMeasured(100, 0, {}, {})),
            (106.0, Evaluated(20, 4.0, 0.1, {"accuracy": 0.8})),
            (107.0, Evaluated(30, 3.0, 0.1, {"accuracy": 0.8})),
        ),
    }
    for site in sites:
        (tmp_path / site).mkdir()
    save_file(
        {"probabilities_NC": np.full((3, 2), 0.5, np.float32), "labels_N": np.array([0, 1, 1])},
        tmp_path / "a" / "predictions.safetensors",
    )
    figures = arm_figures([ArmResult("ours", "codistilled", 7, sites)], {("ours", 7): tmp_path})["ours"]
    first, last = figures.curves[7]
    assert (first.step, first.loss, first.num_bytes) == (10, 4.0, 0)
    assert (last.step, last.loss, last.seconds, last.num_bytes) == (20, 3.0, 6.0, 600)
    assert first.metrics == pytest.approx({"accuracy": 0.6})
    assert list(figures.predictions[7]) == ["a"]
    assert figures.predictions[7]["a"].labels_N.tolist() == [0, 1, 1]


def test_the_training_loss_is_taken_of_the_last_tenth_of_the_steps() -> None:
    def measured(*losses: tuple[int, float]) -> SiteHistory:
        events = [StepMeasured(step, loss, None, 0.1, 1.0, 0.0, 1.0) for step, loss in losses]
        return history(*((100.0, event) for event in events))

    sites = {"a": measured((80, 9.0), (90, 9.0), (95, 1.0), (100, 2.0)), "b": measured((100, 3.0))}
    ended = {
        "c": history((100.0, Evaluated(10, 3.0, 0.1))),
    }
    results = [ArmResult("ours", "codistilled", 0, sites), ArmResult("ours", "codistilled", 1, ended)]
    losses = arm_figures(results, {})["ours"].training_losses
    assert losses[0] == pytest.approx(2.25)
    assert math.isnan(losses[1])


def test_a_site_that_a_fault_took_away_does_not_end_the_curve_of_all() -> None:
    sites = {
        "lost": history((1.0, Evaluated(10, 9.0, 0.1))),
        "whole": history(
            (1.0, Evaluated(10, 3.0, 0.1)),
            (2.0, Evaluated(20, 2.0, 0.1)),
            (2.0, TrainingEnded(20, True, 0.0, 2.0)),
        ),
    }
    curve = arm_figures([ArmResult("ours", "codistilled", 0, sites)], {})["ours"].curves[0]
    assert [(point.step, point.loss) for point in curve] == [(10, 3.0), (20, 2.0)]


def test_a_file_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "predictions.safetensors"
    path.write_bytes(b"nonsense")
    with pytest.raises(ValueError, match="holds no predictions"):
        read_predictions(path)
    save_file({"probabilities_NC": np.zeros((3, 2)), "labels_N": np.zeros(4)}, path)
    with pytest.raises(ValueError, match="other shapes"):
        read_predictions(path)


# --- bad claims ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"measure": "loss-ratio"}, "needs against: name the arms"),
        ({"measure": "churn", "against": ("theirs",)}, "has no against: remove it"),
        ({"measure": "gap-closed", "against": ("theirs",)}, "towards is for the measure gap-closed"),
        ({"measure": "churn", "towards": "theirs"}, "towards is for the measure gap-closed"),
        ({"measure": "metric"}, "metric is for the measures"),
        ({"measure": "loss-ratio", "against": ("a",), "at_most": 1.0, "at_least": 1.0}, "remove one of them"),
        ({"measure": "loss-ratio", "against": ("a",), "at_most": math.inf}, "finite number"),
        ({"measure": "churn", "at_most": 0.1}, r"say what the figure is where there is no effect"),
    ],
)
def test_a_claim_that_cannot_be_settled_is_one_line(claim: dict[str, Any], message: str) -> None:
    table = {"text": "it is so", "arm": "ours"} | claim
    with pytest.raises(ConfigError, match=message):
        parse_model(
            ClaimConfig, {k: list(v) if isinstance(v, tuple) else v for k, v in table.items()}, source="file"
        )


@pytest.mark.parametrize(
    ("claim", "message"),
    [
        ({"arm": "our", "measure": "final-loss"}, "speaks of 'our', which is none of the arms ours, theirs"),
        ({"measure": "loss-ratio", "against": ("thiers",)}, "speaks of 'thiers'"),
        ({"measure": "loss-ratio", "against": ("theirs", "ours")}, "compares 'ours' with itself"),
        ({"measure": "churn"}, "list at least 2 seeds"),
        ({"measure": "final-loss", "beyond_spread": True}, "one seed has none: list several seeds"),
        ({"measure": "diversity", "arm": "theirs"}, "single model"),
        ({"measure": "gap-closed", "against": ("theirs",), "towards": "theirs"}, "on both sides of the gap"),
    ],
)
def test_claims_fit_the_arms_and_seeds(claim: dict[str, Any], message: str) -> None:
    config = ClaimConfig(**({"text": "it is so", "arm": "ours"} | claim))
    with pytest.raises(ConfigError, match=message):
        check_claims((config,), {"ours": 2, "theirs": 1}, num_seeds=1)


def test_of_several_baselines_the_one_counts_against_which_the_claim_fares_worst() -> None:
    # Lower in the end, but slow to come down; and quick to come down, but to a higher loss.
    slow = arm("slow", {0: [9.0, 8.0, 1.0]})
    quick = arm("quick", {0: [3.0, 2.5, 2.4]})
    ours = arm("ours", {0: [9.0, 2.0, 1.0]})
    claim = {"measure": "steps-ratio", "against": ("slow", "quick"), "at_most": 0.5}
    assert told(claim, ours, slow, quick).baseline == "slow"
    at_least = told(
        {"measure": "steps-ratio", "against": ("slow", "quick"), "at_least": 0.1}, ours, slow, quick
    )
    assert at_least.baseline == "quick"
    assert told(claim | {"at_most": None}, ours, slow, quick).baseline == "slow", (
        "the lowest, where nothing is claimed"
    )


def test_what_never_gets_there_bears_out_that_it_takes_long() -> None:
    claim = {"measure": "steps-ratio", "against": ("theirs",), "at_least": 0.9}
    settled = told(claim, arm("ours", {0: [9.0, 9.0, 9.0], 1: [9.0, 9.0, 9.0]}), THEIRS)
    assert settled.never == ("0", "1")
    assert settled.verdict == "reproduced"


def test_an_arm_is_compared_over_the_sites_that_its_baseline_has_too() -> None:
    def result(name: str, **final_losses: float) -> ArmResult:
        sites = {
            site: history((1.0, Evaluated(10, loss, 0.1)), (1.0, TrainingEnded(10, True, 0.0, 1.0)))
            for site, loss in final_losses.items()
        }
        return ArmResult(name, "codistilled", 0, sites)

    results = [
        result("all", a=1.0, b=2.0, c=9.0),
        result("two", a=2.0, b=4.0),
        result("best", a=0.0, b=1.0, c=1.0),
    ]
    figures = arm_figures([*results, result("pooled", pooled=3.0)], {})
    arms = list(figures.values())
    assert told({"measure": "final-loss"}, *arms).figures == {"0": 4.0}
    assert told({"measure": "loss-difference", "against": ("two",)}, *arms).figures == {"0": -1.5}
    assert told({"measure": "loss-difference", "against": ("pooled",)}, *arms).figures == {"0": 1.0}
    gap = {"measure": "gap-closed", "against": ("two",), "towards": "best"}
    assert told(gap, *arms).figures == pytest.approx({"0": 1.5 / 2.5})
    (row,) = [row for row in compare(figures, baseline="two").rows if row.name == "all"]
    assert row.difference is not None and row.difference.mean == -1.5


def test_the_baseline_that_counts_is_the_one_of_the_worst_verdict() -> None:
    ours = arm("ours", {0: [1.0], 1: [1.0]})
    near, noisy = arm("near", {0: [1.1], 1: [1.1]}), arm("noisy", {0: [1.7], 1: [0.9]})
    settled = told(
        {"measure": "loss-difference", "against": ("near", "noisy"), "at_most": 0.0, "beyond_spread": True},
        ours,
        near,
        noisy,
    )
    assert (settled.baseline, settled.verdict) == ("noisy", "not at this scale")
    slow = arm("slow", {0: [9.0, 9.0, 1.0], 1: [9.0, 9.0, 1.0]})
    others = (
        arm("quick", {0: [1.0, 1.0, 1.0], 1: [1.0, 1.0, 1.0]}),
        arm("never", {0: [0.5, 2.0, 2.0], 1: [9.0, 9.0, 1.0]}),
    )
    claim = {"measure": "steps-ratio", "against": ("quick", "never"), "at_most": 0.5}
    assert told(claim, slow, *others).baseline == "quick", (
        "contradicted, where the other is never reached under one seed"
    )


def test_costs_are_those_of_all_sites_even_where_losses_are_compared_over_some() -> None:
    def site(num_bytes: int) -> SiteHistory:
        return history(
            (1.0, TrafficMeasured(num_bytes, 0, {}, {})),
            (2.0, Evaluated(10, 1.0, 0.1)),
            (3.0, TrainingEnded(10, True, 0.0, 2.0)),
        )

    results = [
        ArmResult("all", "codistilled", 0, {name: site(100) for name in "abcd"}),
        ArmResult("two", "codistilled", 0, {name: site(100) for name in "ab"}),
    ]
    figures = arm_figures(results, {})
    settled = told({"measure": "bytes-ratio", "against": ("two",)}, *figures.values())
    assert settled.figures == pytest.approx({"0": 2.0})
