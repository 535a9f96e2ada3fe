"""Figures over seeds, and whether they bear out what was claimed.

As in the paper, a figure is the mean of repeated runs, with half their range (Anil et al. 2018, Table 1). What two arms
differ by is taken seed by seed: much of what a seed changes, it changes in both.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias, TypeVar

Verdict: TypeAlias = Literal["reproduced", "not at this scale", "contradicted"]
VERDICTS: tuple[Verdict, ...] = ("reproduced", "not at this scale", "contradicted")
"""From the best to the worst."""

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over `num` runs."""

    mean: float
    lowest: float
    highest: float
    num: int

    @property
    def half_range(self) -> float:
        """0 of a single run, which tells nothing of the spread."""
        return (self.highest - self.lowest) / 2


def spread_of(figures: Iterable[float]) -> Spread:
    """Mean and range of `figures`. Raises ValueError if there are none, or one is not finite (of a run that diverged)."""
    values = list(figures)
    if not values or not all(map(math.isfinite, values)):
        raise ValueError(f"the spread of {values}")
    return Spread(math.fsum(values) / len(values), min(values), max(values), len(values))


def paired_differences(figures: Mapping[Key, float], baseline: Mapping[Key, float]) -> dict[Key, float]:
    """Each figure minus that of the baseline under the same seed (or whatever the keys are).

    Raises ValueError where a seed is missing on one side: a mean over other seeds would be no comparison.
    """
    _require_same_keys(figures, baseline)
    return {key: figure - baseline[key] for key, figure in figures.items()}


def paired_ratios(figures: Mapping[Key, float], baseline: Mapping[Key, float]) -> dict[Key, float]:
    """Each figure divided by that of the baseline under the same seed; else as `paired_differences`."""
    _require_same_keys(figures, baseline)
    return {key: figure / baseline[key] for key, figure in figures.items()}


def _require_same_keys(figures: Mapping[Key, float], baseline: Mapping[Key, float]) -> None:
    if lone := sorted(map(str, figures.keys() ^ baseline.keys())):
        raise ValueError(f"without a counterpart: {', '.join(lone)}")


@dataclass(frozen=True, slots=True)
class Claim:
    """What is claimed of a figure, in a form that can be judged."""

    text: str
    """In a few words."""
    bound: float
    """What the figure is claimed to be."""
    side: Literal["at most", "at least"]
    """On which side of the bound."""
    no_effect: float
    """The figure of an arm that does no better than what it is compared with: 1 for a ratio to it, 0 for a difference.
    Of a claim that allows for worse than that ("costs at most 0.02"), the bound counts in its place."""
    beyond_spread: bool = False
    """Whether every seed has to bear it out, and not only their mean."""
    source: str = ""
    """Who claims it, and where."""


def judge(claim: Claim, figure: Spread) -> Verdict:
    """What the figure says of the claim.

    - reproduced: the mean is on the claimed side of the bound (every seed is, where the claim is `beyond_spread`);
    - contradicted: there is nothing of the claimed effect, under any seed: the best is no better than `no_effect`, or
      is beyond a bound that allows for worse;
    - not at this scale: anything else: an effect that is smaller than claimed, or too small for the spread.
    """
    sign = 1.0 if claim.side == "at least" else -1.0
    worst, best = sorted((sign * figure.lowest, sign * figure.highest))
    if (worst if claim.beyond_spread else sign * figure.mean) >= sign * claim.bound:
        return "reproduced"
    nothing, bound = sign * claim.no_effect, sign * claim.bound
    is_without = best <= nothing if nothing < bound else best < bound
    return "contradicted" if is_without else "not at this scale"


def worst_of(verdicts: Iterable[Verdict]) -> Verdict:
    """The verdict on a claim of several parts, each of which has to hold. Raises ValueError if there are none."""
    return max(verdicts, key=VERDICTS.index)
