"""What an arm came to, under each seed: the figures that claims and comparisons are made of.

An arm of several sites has the curve of their mean, without sites that did not finish: every point is the mean over sites of
what was measured at that step.
Seconds are those of the slowest site, bytes those that all sites sent together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from p2pcodistill.report.history import SiteHistory
from p2pcodistill.report.measures import Labels, Probabilities
from p2pcodistill.report.summary import ArmResult
from p2pcodistill.runfolder import PREDICTIONS_FILE

MAX_PREDICTIONS_BYTES = 1 << 30

Axis: TypeAlias = str
"""Over what a loss is shown: `steps`, `seconds` or `bytes`."""


@dataclass(frozen=True, slots=True)
class Point:
    """The mean of an arm's sites at one of their evaluations."""

    step: int
    loss: float
    seconds: float
    """Since the start of the arm; virtual ones in virtual time."""
    num_bytes: int
    """Sent so far by all sites."""
    metrics: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Predicted:
    """What one final model says of held-out examples, the same ones for all models of a run."""

    probabilities_NC: Probabilities
    labels_N: Labels


@dataclass(frozen=True, slots=True)
class ArmFigures:
    """One arm under all seeds."""

    name: str
    kind: str
    curves: Mapping[int, Sequence[Point]]
    """By seed."""
    predictions: Mapping[int, Mapping[str, Predicted]]
    """By seed and site; of sites that have left some."""
    training_losses: Mapping[int, float] = field(default_factory=dict)
    """By seed: on the labels of training batches, mean over the last tenth of the steps and over sites; NaN of none."""
    is_finished: bool = True
    """Else no seed has got to the end yet, and the last points are none that can be compared."""
    histories: Mapping[int, Mapping[str, SiteHistory]] = field(default_factory=dict)
    """By seed and site, of which all the rest is the mean; of sites that finished, if any did."""

    def final(self, of: Callable[[Point], float]) -> dict[int, float]:
        """A figure of the last point, by seed; NaN where there is none."""
        return {seed: of(curve[-1]) if curve else math.nan for seed, curve in self.curves.items()}

    @property
    def final_losses(self) -> dict[int, float]:
        """By seed."""
        return self.final(lambda point: point.loss)

    def of_sites(self, names: Mapping[int, Collection[str]]) -> ArmFigures:
        """The same of the sites with these names under each seed; seconds and bytes stay those of all sites."""
        histories = {
            seed: {name: history for name, history in of.items() if name in names[seed]}
            for seed, of in self.histories.items()
        }
        return replace(
            self,
            curves={seed: self._curve_of(seed, list(of.values())) for seed, of in histories.items()},
            predictions={
                seed: {name: predicted for name, predicted in of.items() if name in names[seed]}
                for seed, of in self.predictions.items()
            },
            training_losses={seed: _training_loss(list(of.values())) for seed, of in histories.items()},
            histories=histories,
        )

    def _curve_of(self, seed: int, histories: Sequence[SiteHistory]) -> list[Point]:
        whole = {point.step: point for point in self.curves[seed]}
        return [
            replace(point, seconds=whole[point.step].seconds, num_bytes=whole[point.step].num_bytes)
            for point in _mean_curve(histories)
            if point.step in whole
        ]


def over_common_sites(arm: ArmFigures, *others: ArmFigures) -> list[ArmFigures]:
    """`arm` and the others, each over the sites that all of them have, but for those that share none with `arm`: a pooled
    arm stays as it is.
    """
    names = _names_of(arm)
    related = [other for other in others if names & _names_of(other)]
    common = {
        seed: set.intersection(set(of), *(set(o.histories[seed]) for o in related if seed in o.histories))
        for seed, of in arm.histories.items()
    }
    if not related or not all(common.values()):
        return [arm, *others]
    return [
        arm.of_sites(common),
        *(other.of_sites(common) if other in related else other for other in others),
    ]


def _names_of(arm: ArmFigures) -> set[str]:
    return {name for of in arm.histories.values() for name in of}


def arm_figures(
    results: Sequence[ArmResult], folders: Mapping[tuple[str, int], Path]
) -> dict[str, ArmFigures]:
    """The figures of each arm by its name, in the order of `results`.

    Seeds that have not finished are left out of an arm that has finished under others. `folders` has where the sites of
    (arm, seed) left their predictions, each in a folder of its name.
    """
    figures: dict[str, ArmFigures] = {}
    for name in dict.fromkeys(result.name for result in results):
        started = [result for result in results if result.name == name]
        own = [result for result in started if result.is_finished] or started
        figures[name] = ArmFigures(
            name,
            own[0].kind,
            {result.seed: _mean_curve(list(_finished(result).values())) for result in own},
            {result.seed: _read_predictions(result, folders.get((name, result.seed))) for result in own},
            {result.seed: _training_loss(list(_finished(result).values())) for result in own},
            own[0].is_finished,
            {result.seed: _finished(result) for result in own},
        )
    return figures


def _finished(result: ArmResult) -> Mapping[str, SiteHistory]:
    """The sites that finished; one that a fault took away would end the curve of all."""
    finished = {name: history for name, history in result.sites.items() if history.finished}
    return finished or result.sites


def _training_loss(histories: Sequence[SiteHistory]) -> float:
    means = []
    for history in histories:
        late = [loss for step, loss in history.losses if step > 0.9 * history.num_steps]
        means.append(math.fsum(late) / len(late) if late else math.nan)
    return math.fsum(means) / len(means)


def _mean_curve(histories: Sequence[SiteHistory]) -> list[Point]:
    steps = set.intersection(*({step for step, _ in history.evaluations} for history in histories))
    losses = [dict(history.evaluations) for history in histories]
    points = []
    for step in sorted(steps):
        details = [history.evaluation_details[step] for history in histories]
        names = set.intersection(*(set(detail.metrics) for detail in details))
        points.append(
            Point(
                step,
                math.fsum(of[step] for of in losses) / len(losses),
                max(detail.time_s for detail in details),
                sum(detail.num_bytes_sent for detail in details),
                {name: math.fsum(d.metrics[name] for d in details) / len(details) for name in sorted(names)},
            )
        )
    return points


def _read_predictions(result: ArmResult, folder: Path | None) -> dict[str, Predicted]:
    if folder is None:
        return {}
    paths = {site: folder / site / PREDICTIONS_FILE for site in result.sites}
    return {site: read_predictions(path) for site, path in paths.items() if path.exists()}


def read_predictions(path: Path) -> Predicted:
    """The predictions that a site has left in `path`. Raises ValueError for a file that holds something else."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    if path.stat().st_size > MAX_PREDICTIONS_BYTES:
        raise ValueError(f"{path} is too large for predictions")
    try:
        arrays = load(path.read_bytes())
        probabilities_NC, labels_N = arrays["probabilities_NC"], arrays["labels_N"]
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} holds no predictions: {error}") from None
    if probabilities_NC.ndim != 2 or labels_N.shape != probabilities_NC.shape[:1]:
        raise ValueError(f"{path} holds predictions of other shapes than its labels")
    return Predicted(probabilities_NC.astype(np.float64), labels_N.astype(np.int64))
