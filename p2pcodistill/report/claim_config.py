"""A claim in a scenario file: what somebody says of an arm, in a form that a run can settle."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pydantic import FiniteFloat, model_validator

from p2pcodistill.errors import ConfigError
from p2pcodistill.strict import StrictModel

MeasureName: TypeAlias = Literal[
    "final-loss",
    "loss-difference",
    "loss-ratio",
    "steps-ratio",
    "seconds-ratio",
    "bytes-ratio",
    "gap-closed",
    "churn",
    "churn-ratio",
    "arm-churn",
    "training-loss",
    "calibrated-loss",
    "calibration-error",
    "diversity",
    "metric",
    "metric-difference",
]


@dataclass(frozen=True, slots=True)
class MeasureNeeds:
    """What a claim about a measure has to name, and what the figure is where there is no effect."""

    is_compared: bool
    no_effect: float | None
    """None: the claim says it, or there is no such thing."""
    num_seeds: int = 1


MEASURES: Mapping[MeasureName, MeasureNeeds] = {
    "final-loss": MeasureNeeds(False, None),
    "loss-difference": MeasureNeeds(True, 0.0),
    "loss-ratio": MeasureNeeds(True, 1.0),
    "steps-ratio": MeasureNeeds(True, 1.0),
    "seconds-ratio": MeasureNeeds(True, 1.0),
    "bytes-ratio": MeasureNeeds(True, 1.0),
    "gap-closed": MeasureNeeds(True, 0.0),
    "churn": MeasureNeeds(False, None, num_seeds=2),
    "churn-ratio": MeasureNeeds(True, 1.0, num_seeds=2),
    "arm-churn": MeasureNeeds(True, None),
    "training-loss": MeasureNeeds(False, None),
    "calibrated-loss": MeasureNeeds(False, None),
    "calibration-error": MeasureNeeds(False, None),
    "diversity": MeasureNeeds(False, None),
    "metric": MeasureNeeds(False, None),
    "metric-difference": MeasureNeeds(True, 0.0),
}


class ClaimConfig(StrictModel):
    """One of the `[[claims]]` of a scenario. How each measure is taken: `report/claims.py`."""

    text: str
    """What is claimed, in a sentence."""
    source: str = ""
    """Who claims it, and where: "Anil et al. 2018, Figure 2a"."""
    arm: str
    """Of which arm."""
    measure: MeasureName
    """`final-loss`: the held-out loss in the end, mean over sites. `loss-difference`, `loss-ratio`: to that of `against`.
    `steps-ratio`, `seconds-ratio`, `bytes-ratio`: what it takes to come down to the best loss of `against`, as a share of
    what that took. `gap-closed`: of the gap from `against` to `towards`. `churn`, `churn-ratio`: how far predictions of
    retrains (seeds) are apart. `arm-churn`: how far they are from those of `against`, with a change, under the same seed.
    `training-loss`: on the labels of the last batches. `calibrated-loss`: `final-loss` at the best temperature.
    `calibration-error`: ECE. `diversity`: how far predictions of an arm's sites are apart.
    `metric`, `metric-difference`: `metric` of the task in the end."""
    against: tuple[str, ...] = ()
    """Arms to compare with, of which the one counts against which the claim fares worst; without a bound, the one whose
    final loss is lowest."""
    towards: str | None = None
    """The arm on the other side of the gap, where the measure is `gap-closed`."""
    metric: str | None = None
    """What the task calls it, where the measure is of one."""
    at_most: FiniteFloat | None = None
    """What the figure is claimed to be at most. Neither this nor `at_least`: it is only measured."""
    at_least: FiniteFloat | None = None
    """What it is claimed to be at least."""
    no_effect: FiniteFloat | None = None
    """The figure of an arm that is no better than `against`; by default 1 for ratios, 0 for differences and gaps. Not
    needed where the bound allows for worse than that: then the claim is contradicted where no seed keeps to the bound."""
    beyond_spread: bool = False
    """Whether every seed has to bear it out, and not only the mean."""

    @property
    def needs(self) -> MeasureNeeds:
        """What is particular to its measure."""
        return MEASURES[self.measure]

    @model_validator(mode="after")
    def _check(self) -> ClaimConfig:
        what = f"the claim {self.text!r}"
        if self.needs.is_compared != bool(self.against):
            raise ConfigError(
                f"{what}: {self.measure} {'needs' if self.needs.is_compared else 'has no'} against: "
                f"{'name the arms to compare with' if self.needs.is_compared else 'remove it'}"
            )
        if (self.measure == "gap-closed") != (self.towards is not None):
            raise ConfigError(
                f"{what}: towards is for the measure gap-closed, which needs it, and for no other"
            )
        if self.measure.startswith("metric") != (self.metric is not None):
            raise ConfigError(
                f"{what}: metric is for the measures metric and metric-difference, which need it"
            )
        if self.at_most is not None and self.at_least is not None:
            raise ConfigError(
                f"{what}: a figure is claimed to be at_most or at_least something: remove one of them"
            )
        if self.is_judged and self.no_effect is None and self.needs.no_effect is None:
            raise ConfigError(
                f"{what}: say what the figure is where there is no effect (no_effect), or leave out at_most and at_least"
            )
        return self

    @property
    def arms(self) -> tuple[str, ...]:
        """All that it speaks of, its own first."""
        return (self.arm, *self.against, *((self.towards,) if self.towards is not None else ()))

    @property
    def is_judged(self) -> bool:
        """Whether there is a bound to hold the figure against."""
        return self.at_most is not None or self.at_least is not None


def check_claims(
    claims: tuple[ClaimConfig, ...], num_sites_of_arms: Mapping[str, int], num_seeds: int
) -> None:
    """Raise ConfigError for claims that no run could settle in which arms have so many models, under so many seeds."""
    for claim in claims:
        for name in claim.arms:
            if name not in num_sites_of_arms:
                raise ConfigError(
                    f"the claim {claim.text!r} speaks of {name!r}, which is none of the arms {', '.join(num_sites_of_arms)}"
                )
        if claim.arm in claim.arms[1:]:
            raise ConfigError(
                f"the claim {claim.text!r} compares {claim.arm!r} with itself: remove it from against"
            )
        if claim.towards in claim.against:
            raise ConfigError(
                f"the claim {claim.text!r} has {claim.towards!r} on both sides of the gap: remove one"
            )
        if claim.measure == "diversity" and num_sites_of_arms[claim.arm] < 2:
            raise ConfigError(
                f"the claim {claim.text!r} is of an arm with a single model: choose one of several sites"
            )
        if claim.beyond_spread and num_seeds < 2:
            raise ConfigError(
                f"the claim {claim.text!r} is beyond_spread, and one seed has none: list several seeds"
            )
        if num_seeds < claim.needs.num_seeds:
            raise ConfigError(
                f"the claim {claim.text!r} needs retrains: list at least {claim.needs.num_seeds} seeds"
            )
