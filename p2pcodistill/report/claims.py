"""Claims held against what the arms of a run came to.

How each measure is taken, under every seed (see `claim_config` for what a claim names):

- `final-loss`, `metric`: of the last evaluation, mean over sites. `loss-difference`, `loss-ratio`, `metric-difference`:
  the arm's, minus or divided by the baseline's under the same seed.
- `steps-ratio`, `seconds-ratio`, `bytes-ratio`: what the mean of the arm's sites takes to come down to the best loss of the
  baseline, divided by what that took to get there: two equal curves give 1. Where an arm never gets there, the
  figure is at least what it took in all, and no less than 1: such a seed is told of (`never`), and does not count as
  getting there soon, whatever the mean.
- `gap-closed`: (against - arm) / (against - towards), of final losses. Undefined where there is no gap.
- `churn`, `churn-ratio`: of every two seeds, how far the predictions of the same site are apart, mean over sites; the ratio
  is to the baseline's of the same two seeds.
- `arm-churn`: how far the predictions of the same site are from the baseline's under the same seed, mean over sites.
- `training-loss`: on the labels of training batches, mean over the last tenth of the steps and over sites.
- `calibrated-loss`: of each site's final model, logits divided by the temperature that suits the held-out examples best,
  mean over sites: what is left of `final-loss` when models are no more and no less sure than they are right.
- `calibration-error`: of each site's final model, mean over sites. `diversity`: of an arm's sites, mean over pairs.

Of several baselines, the one counts against which the claim fares worst, of those that did not diverge. Without a bound
there is no worse: then it is the one whose final loss is lowest.

An arm and its baseline are compared over the sites that both have, where they have some in common: sites differ, and the
mean of eight says nothing of a baseline of two.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from p2pcodistill.report.arm_figures import ArmFigures, Point, over_common_sites
from p2pcodistill.report.claim_config import ClaimConfig
from p2pcodistill.report.measures import (
    Labels,
    Probabilities,
    calibrated_log_loss,
    calibration_error,
    churn,
    diversity,
)
from p2pcodistill.report.verdicts import (
    VERDICTS,
    Claim,
    Spread,
    Verdict,
    judge,
    paired_differences,
    paired_ratios,
    spread_of,
)


@dataclass(frozen=True, slots=True)
class Settled:
    """A claim and what was seen. `figure` is None where it cannot be told, and `why` says so."""

    claim: ClaimConfig
    baseline: str | None
    """Of those that the claim names, the one that counts."""
    figures: Mapping[str, float]
    """By seed, or by a pair of seeds."""
    figure: Spread | None
    verdict: Verdict | None
    """None where there is no figure, or no bound to hold it against."""
    never: tuple[str, ...] = ()
    """The seeds under which the arm never came down to the baseline's loss."""
    why: str = ""

    def to_record(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "text": self.claim.text,
            "source": self.claim.source,
            "arm": self.claim.arm,
            "measure": self.claim.measure,
            "metric": self.claim.metric,
            "baseline": self.baseline,
            "at_most": self.claim.at_most,
            "at_least": self.claim.at_least,
            "figures": dict(self.figures),
            "figure": None
            if self.figure is None
            else asdict(self.figure) | {"half_range": self.figure.half_range},
            "verdict": self.verdict,
            "never": list(self.never),
            "why": self.why,
        }


class _Untold(Exception):
    """Why a figure cannot be told."""


_Measure: TypeAlias = Callable[[ClaimConfig, Mapping[str, ArmFigures], ArmFigures | None], dict[str, float]]
"""(claim, arms, baseline) -> figures by seed."""


def settle(claims: Sequence[ClaimConfig], arms: Mapping[str, ArmFigures]) -> list[Settled]:
    """What the arms, by their names, say of each claim."""
    return [_settle(claim, arms) for claim in claims]


def _settle(claim: ClaimConfig, arms: Mapping[str, ArmFigures]) -> Settled:
    try:
        _require_finished(claim, arms)
    except _Untold as reason:
        return Settled(claim, None, {}, None, None, why=str(reason))
    if not claim.against:
        return _settle_against(claim, arms, None)
    baselines = [arms[name] for name in claim.against]
    compared = [arm for arm in baselines if all(map(math.isfinite, arm.final_losses.values()))]
    if not claim.is_judged or not compared:
        compared = [strongest(baselines)]
    return min((_settle_against(claim, arms, baseline) for baseline in compared), key=_how_it_fares)


def _settle_against(
    claim: ClaimConfig, arms: Mapping[str, ArmFigures], baseline: ArmFigures | None
) -> Settled:
    name = None if baseline is None else baseline.name
    if baseline is not None:
        arm, baseline, *towards = over_common_sites(
            arms[claim.arm], baseline, *([arms[claim.towards]] if claim.towards is not None else [])
        )
        arms = {**arms, claim.arm: arm, **{other.name: other for other in towards}}
    try:
        figures = _FIGURES[claim.measure](claim, arms, baseline)
        figure = _spread(figures)
    except (_Untold, ValueError) as reason:  # predictions of other examples, for one, cannot be compared
        return Settled(claim, name, {}, None, None, why=str(reason))
    never = _never(claim, arms[claim.arm], baseline) if claim.measure in _AXES else ()
    verdict = judge(_as_judged(claim), figure) if claim.is_judged else None
    # Where it never got there, the figure is a bound from below: it may be higher.
    if never and verdict == ("contradicted" if claim.at_most is None else "reproduced"):
        verdict = "not at this scale"
    return Settled(claim, name, figures, figure, verdict, never)


def _how_it_fares(settled: Settled) -> tuple[int, float]:
    """The lower, the worse: by the verdict, and then by the figure that decided on it. Worst of all, where there is none."""
    if settled.figure is None or settled.verdict is None:
        return -len(VERDICTS), 0.0
    figure, is_beyond = settled.figure, settled.claim.beyond_spread
    if settled.claim.at_most is None:
        return -VERDICTS.index(settled.verdict), figure.lowest if is_beyond else figure.mean
    return -VERDICTS.index(settled.verdict), -(figure.highest if is_beyond else figure.mean)


def _require_finished(claim: ClaimConfig, arms: Mapping[str, ArmFigures]) -> None:
    for name in claim.arms:
        if name not in arms or not arms[name].is_finished:
            raise _Untold(f"{name} has not finished")
        if arms[name].curves.keys() != arms[claim.arm].curves.keys():
            raise _Untold(f"{name} has finished under other seeds than {claim.arm}")


def strongest(arms: Sequence[ArmFigures]) -> ArmFigures:
    """The arm with the lowest final loss, mean over seeds; those that diverged under one come last."""

    def loss(arm: ArmFigures) -> float:
        losses = list(arm.final_losses.values())
        return math.fsum(losses) / len(losses) if all(map(math.isfinite, losses)) else math.inf

    return min(arms, key=loss)


def _as_judged(claim: ClaimConfig) -> Claim:
    bound = claim.at_least if claim.at_most is None else claim.at_most
    no_effect = claim.needs.no_effect if claim.no_effect is None else claim.no_effect
    assert bound is not None and no_effect is not None, "claims are checked when they are read"
    side = "at least" if claim.at_most is None else "at most"
    return Claim(claim.text, bound, side, no_effect, claim.beyond_spread, claim.source)  # type: ignore[arg-type]


def _spread(figures: Mapping[str, float]) -> Spread:
    diverged = [seed for seed, figure in figures.items() if not math.isfinite(figure)]
    if diverged:
        raise _Untold(
            f"there is no figure under seed {', '.join(diverged)}: it diverged, or was not evaluated"
        )
    if not figures:
        raise _Untold("there is no run to tell it from")
    return spread_of(figures.values())


def _named(figures: Mapping[int, float]) -> dict[str, float]:
    return {str(seed): figure for seed, figure in figures.items()}


# --- measures: (claim, arms, baseline) -> figures by seed ---------------------------------------------------------


def _final_loss(claim: ClaimConfig, arms: Mapping[str, ArmFigures], _: ArmFigures | None) -> dict[str, float]:
    return _named(arms[claim.arm].final_losses)


def _loss_difference(
    claim: ClaimConfig, arms: Mapping[str, ArmFigures], baseline: ArmFigures | None
) -> dict[str, float]:
    assert baseline is not None
    return _named(paired_differences(arms[claim.arm].final_losses, baseline.final_losses))


def _loss_ratio(
    claim: ClaimConfig, arms: Mapping[str, ArmFigures], baseline: ArmFigures | None
) -> dict[str, float]:
    assert baseline is not None
    return _named(paired_ratios(arms[claim.arm].final_losses, baseline.final_losses))


_AXES: Mapping[str, Callable[[Point], float]] = {
    "steps-ratio": lambda point: float(point.step),
    "seconds-ratio": lambda point: point.seconds,
    "bytes-ratio": lambda point: float(point.num_bytes),
}


def amount_to_loss(curve: Sequence[Point], loss: float, axis: Callable[[Point], float]) -> float | None:
    """Where a curve first comes down to `loss`, between two evaluations on a straight line; None if it never does."""
    for before, point in itertools.pairwise([None, *curve]):
        assert point is not None
        if point.loss <= loss:
            if before is None or not math.isfinite(before.loss):
                return axis(point)
            share = (before.loss - loss) / (before.loss - point.loss)
            return axis(before) + share * (axis(point) - axis(before))
    return None


def _amount_ratio(
    claim: ClaimConfig, arms: Mapping[str, ArmFigures], baseline: ArmFigures | None
) -> dict[str, float]:
    assert baseline is not None
    axis, figures = _AXES[claim.measure], {}
    for seed, curve in arms[claim.arm].curves.items():
        best = _best_loss(baseline, seed)
        whole = amount_to_loss(baseline.curves[seed], best, axis)
        if not curve or not whole:
            raise _Untold(f"{baseline.name} has taken nothing that it could be a share of")
        amount = amount_to_loss(curve, best, axis)
        figures[str(seed)] = amount / whole if amount is not None else max(1.0, axis(curve[-1]) / whole)
    return figures


def _never(claim: ClaimConfig, arm: ArmFigures, baseline: ArmFigures | None) -> tuple[str, ...]:
    assert baseline is not None
    axis = _AXES[claim.measure]
    return tuple(
        str(seed)
        for seed, curve in arm.curves.items()
        if amount_to_loss(curve, _best_loss(baseline, seed), axis) is None
    )


def _best_loss(baseline: ArmFigures, seed: int) -> float:
    losses = [point.loss for point in baseline.curves[seed] if math.isfinite(point.loss)]
    if not losses:
        raise _Untold(f"{baseline.name} was never evaluated under seed {seed}, or diverged at once")
    return min(losses)


def _gap_closed(
    claim: ClaimConfig, arms: Mapping[str, ArmFigures], baseline: ArmFigures | None
) -> dict[str, float]:
    assert baseline is not None and claim.towards is not None
    gained = paired_differences(baseline.final_losses, arms[claim.arm].final_losses)
    gaps = paired_differences(baseline.final_losses, arms[claim.towards].final_losses)
    without = [str(seed) for seed, gap in gaps.items() if not gap > 0]
    if without:
        raise _Untold(
            f"{claim.towards} is no better than {baseline.name} under seed {', '.join(without)}: no gap"
        )
    return _named(paired_ratios(gained, gaps))


def _churn(claim: ClaimConfig, arms: Mapping[str, ArmFigures], _: ArmFigures | None) -> dict[str, float]:
    return _churn_of(arms[claim.arm])


def _churn_of(arm: ArmFigures) -> dict[str, float]:
    figures = {}
    for first, second in itertools.combinations(arm.predictions, 2):
        one, other = arm.predictions[first], arm.predictions[second]
        sites = [site for site in one if site in other]
        if not sites:
            raise _Untold(f"{arm.name} has left no predictions to compare")
        apart = [churn(one[site].probabilities_NC, other[site].probabilities_NC) for site in sites]
        figures[f"{first}-{second}"] = math.fsum(apart) / len(apart)
    return figures


def _churn_ratio(
    claim: ClaimConfig, arms: Mapping[str, ArmFigures], baseline: ArmFigures | None
) -> dict[str, float]:
    assert baseline is not None
    theirs = _churn_of(baseline)
    if not all(theirs.values()):
        raise _Untold(f"retrains of {baseline.name} do not differ: there is nothing to be a share of")
    return paired_ratios(_churn_of(arms[claim.arm]), theirs)


def _arm_churn(
    claim: ClaimConfig, arms: Mapping[str, ArmFigures], baseline: ArmFigures | None
) -> dict[str, float]:
    assert baseline is not None
    figures = {}
    for seed, predicted in arms[claim.arm].predictions.items():
        theirs = baseline.predictions.get(seed, {})
        if not (sites := [site for site in predicted if site in theirs]):
            raise _Untold(f"{claim.arm} and {baseline.name} have left no predictions of the same site")
        apart = [churn(predicted[site].probabilities_NC, theirs[site].probabilities_NC) for site in sites]
        figures[str(seed)] = math.fsum(apart) / len(apart)
    return figures


def _training_loss(
    claim: ClaimConfig, arms: Mapping[str, ArmFigures], _: ArmFigures | None
) -> dict[str, float]:
    return _named(dict(arms[claim.arm].training_losses))


def _of_predictions(measure: Callable[[Probabilities, Labels], float]) -> _Measure:
    """A measure of each site's final predictions, mean over sites."""

    def figures_of(
        claim: ClaimConfig, arms: Mapping[str, ArmFigures], _: ArmFigures | None
    ) -> dict[str, float]:
        figures = {}
        for seed, predicted in arms[claim.arm].predictions.items():
            values = [measure(of.probabilities_NC, of.labels_N) for of in predicted.values()]
            if not values:
                raise _Untold(f"{claim.arm} has left no predictions")
            figures[str(seed)] = math.fsum(values) / len(values)
        return figures

    return figures_of


def _diversity(claim: ClaimConfig, arms: Mapping[str, ArmFigures], _: ArmFigures | None) -> dict[str, float]:
    figures = {}
    for seed, predicted in arms[claim.arm].predictions.items():
        if len(predicted) < 2:
            raise _Untold(f"{claim.arm} has not left the predictions of two sites")
        figures[str(seed)] = diversity([of.probabilities_NC for of in predicted.values()])
    return figures


def _metric(claim: ClaimConfig, arms: Mapping[str, ArmFigures], _: ArmFigures | None) -> dict[str, float]:
    return _named(_metric_of(arms[claim.arm], claim))


def _metric_of(arm: ArmFigures, claim: ClaimConfig) -> dict[int, float]:
    assert claim.metric is not None
    for curve in arm.curves.values():
        if curve and claim.metric not in curve[-1].metrics:
            known = ", ".join(curve[-1].metrics) or "none"
            raise _Untold(f"{arm.name} has no metric {claim.metric!r}; there are {known}")
    return arm.final(lambda point: point.metrics[str(claim.metric)])


def _metric_difference(
    claim: ClaimConfig, arms: Mapping[str, ArmFigures], baseline: ArmFigures | None
) -> dict[str, float]:
    assert baseline is not None
    return _named(paired_differences(_metric_of(arms[claim.arm], claim), _metric_of(baseline, claim)))


_FIGURES: Mapping[str, _Measure] = {
    "final-loss": _final_loss,
    "loss-difference": _loss_difference,
    "loss-ratio": _loss_ratio,
    **dict.fromkeys(_AXES, _amount_ratio),
    "gap-closed": _gap_closed,
    "churn": _churn,
    "churn-ratio": _churn_ratio,
    "arm-churn": _arm_churn,
    "training-loss": _training_loss,
    "calibrated-loss": _of_predictions(calibrated_log_loss),
    "calibration-error": _of_predictions(calibration_error),
    "diversity": _diversity,
    "metric": _metric,
    "metric-difference": _metric_difference,
}
