"""Rate control: how coarse the next delta frame's codes are, as in a video encoder.

Before a frame is coded, a sample of the differences tells for every alphabet and step what would be left over and what it
would cost; the encoder takes the cheapest that reaches the quality, or the best that fits the byte budget or what the links
carry. What frames really cost corrects the estimate of the next.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from p2pcodistill.checkpoint.quantize import ALPHABETS, DEAD_ZONE, Alphabet
from p2pcodistill.config import FramesConfig

MAX_LEFT_SHARE = 0.88
"""Of constant quality, however small the change: what a frame leaves of it for the next ones at most (rms)."""
NUM_SAMPLES = 1 << 14
_RUN_ELEMENTS = 256
_STEP_RATIO = 1.15
# Between two of these, tried around each alphabet's best: what is finer than need be costs bytes.
_FINER_RATIOS = [_STEP_RATIO ** (index / 6) for index in (-5, -4, -3, -2, -1, 1, 2, 3, 4, 5)]
# In units of rms: from where an alphabet sends next to nothing, or a coarser one is as good, to where its levels would no
# longer reach the largest differences.
_COARSEST_STEPS = {1: 16.0, 3: 4.0, 7: 3.0, 127: 0.6}
_FINEST_STEPS = {1: 0.3, 3: 0.7, 7: 0.3, 127: 0.016}
_CORRECTION_WEIGHT = 0.5  # of the newest frame in the running correction
_MAX_CORRECTION = 4.0


@dataclass(frozen=True, slots=True)
class Sample:
    """Some of a tensor's differences, the rms of the weights there, and how many elements it has altogether."""

    values: Tensor
    weights_rms: float
    num_elements: int

    @property
    def rms(self) -> float:
        """Root mean square of the differences."""
        return float(self.values.square().mean().sqrt()) if len(self.values) else 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What to code with: `step` is in units of each tensor's rms. The rest is what the sample promises."""

    alphabet: Alphabet
    step: float
    error: float
    """Rms of what is left over, as a share of the weights' rms."""
    left_share: float
    """The same, as a share of the difference's rms."""
    num_bytes: float


def sample_difference(weights: Tensor, reference: Tensor, num_samples: int) -> Sample:
    """About `num_samples` of `weights` - `reference` (flat), in short runs all over the tensor; the same ones every time."""
    num_runs = max(1, num_samples // _RUN_ELEMENTS)
    num_elements = len(weights)
    if num_elements <= max(num_samples, _RUN_ELEMENTS):
        return _sample(weights, reference, num_elements)
    starts = torch.arange(num_runs, device=weights.device) * ((num_elements - _RUN_ELEMENTS) // num_runs)
    indices = (starts[:, None] + torch.arange(_RUN_ELEMENTS, device=weights.device)).flatten()
    return _sample(weights[indices], reference[indices], num_elements)


def _sample(weights: Tensor, reference: Tensor, num_elements: int) -> Sample:
    # As they would be held: what is only rounded away has not moved.
    weights = weights.to(reference.dtype).float()
    weights_rms = float(weights.square().mean().sqrt()) if len(weights) else 0.0
    return Sample(weights - reference.float(), weights_rms, num_elements)


class RateControl:
    """Plans one delta frame after the other. `config` says which alphabets there are, and quality or budget."""

    def __init__(self, config: FramesConfig) -> None:
        names = tuple(ALPHABETS) if config.delta == "adaptive" else (config.delta,)
        self._alphabets = [ALPHABETS[name] for name in names]
        self._target_error = config.target_error
        self._budget_bytes = config.exchange_budget_bytes
        self.limit_bytes: int | None = None
        """What the links carry for a frame: the quality gives way where it would need more."""
        self._correction = 1.0

    def plan(self, samples: Sequence[Sample], num_other_bytes: int) -> Plan:
        """What to code the sampled tensors with; about `num_other_bytes` of the frame are not theirs.

        A budget or limit is kept to as far as the estimates go; of the other bytes nothing is learnt.
        """
        pool = _Pool(samples)
        plans = []
        for alphabet in self._alphabets:
            coarse = [pool.predict(alphabet, step) for step in _steps(alphabet)]
            best = self._choose(coarse, num_other_bytes)
            plans += [best, *(pool.predict(alphabet, best.step * ratio) for ratio in _FINER_RATIOS)]
        return self._choose(plans, num_other_bytes)

    def _choose(self, plans: Sequence[Plan], num_other_bytes: int) -> Plan:
        limit = math.inf if self.limit_bytes is None else self.limit_bytes
        if self._budget_bytes is None:
            good = [plan for plan in plans if self._is_good(plan)]
            best = min(good, key=_cost) if good else min(plans, key=_error)
            if best.num_bytes * self._correction + num_other_bytes <= limit:
                return best
        else:
            limit = min(limit, self._budget_bytes)
        budget = (limit - num_other_bytes) / self._correction
        good = [plan for plan in plans if plan.num_bytes <= budget]
        if good:
            return min(good, key=_error)
        # What travels exactly is over the budget by itself: at least the rest is not left behind for ever. Levels that do
        # not reach what a few elements have moved by follow as fast as they can.
        following = [plan for plan in plans if plan.left_share <= MAX_LEFT_SHARE]
        return min(following, key=_cost) if following else min(plans, key=_error)

    def learn(self, plan: Plan, num_bytes: int) -> None:
        """The codes and scales of `plan` came to so many bytes."""
        if plan.num_bytes > 0:
            seen = min(max(num_bytes / plan.num_bytes, 1 / _MAX_CORRECTION), _MAX_CORRECTION)
            self._correction += _CORRECTION_WEIGHT * (seen - self._correction)

    def _is_good(self, plan: Plan) -> bool:
        return plan.error <= self._target_error and plan.left_share <= MAX_LEFT_SHARE


def _steps(alphabet: Alphabet) -> list[float]:
    """The steps to choose from, coarse to fine."""
    coarsest, finest = _COARSEST_STEPS[alphabet.num_levels], _FINEST_STEPS[alphabet.num_levels]
    num_steps = math.ceil(math.log(coarsest / finest) / math.log(_STEP_RATIO)) + 1
    return [coarsest / _STEP_RATIO**index for index in range(num_steps)]


def _cost(plan: Plan) -> tuple[float, float]:
    return plan.num_bytes, plan.error


def _error(plan: Plan) -> tuple[float, float]:
    return plan.error, plan.num_bytes


class _Pool:
    """The samples of all tensors, each divided by its tensor's rms, and weighted by what it stands for."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        magnitudes, elements, energies = [], [], []
        self._weights_energy = sum(sample.num_elements * sample.weights_rms**2 for sample in samples)
        for sample in samples:
            rms = sample.rms
            if rms > 0:
                share = sample.num_elements / len(sample.values)
                magnitudes.append(sample.values.abs().cpu() / rms)
                elements.append(torch.full((len(sample.values),), share))
                energies.append(torch.full((len(sample.values),), share * rms**2))
        self._magnitudes = torch.cat(magnitudes) if magnitudes else torch.zeros(0)
        self._elements = torch.cat(elements) if elements else torch.zeros(0)
        self._energies = torch.cat(energies) if energies else torch.zeros(0)
        self._total_energy = float((self._energies * self._magnitudes.square()).sum())

    def predict(self, alphabet: Alphabet, step: float) -> Plan:
        """What a step (in units of each tensor's rms) would leave over, and cost."""
        if not self._total_energy:
            return Plan(alphabet, step, 0.0, 0.0, 0.0)
        if alphabet.num_levels == 1:
            levels = (self._magnitudes > step).float()
            kept = self._energies * levels
            value = float((kept * self._magnitudes).sum() / kept.sum().clamp(min=1e-30))
            decoded = levels * value
        else:
            levels = (self._magnitudes / step + (1 - DEAD_ZONE)).floor().clamp_(max=alphabet.num_levels)
            decoded = levels * step
        left = float((self._energies * (self._magnitudes - decoded).square()).sum())
        counts = torch.bincount(
            levels.long(), weights=self._elements, minlength=alphabet.num_levels + 1
        ).double()
        shares = counts / counts.sum()
        num_bits = float(
            -(shares * shares.clamp(min=1e-30).log2()).sum() + shares[1:].sum()
        )  # and a sign each
        error = math.sqrt(left / max(self._weights_energy, 1e-30))
        left_share = math.sqrt(left / self._total_energy)
        return Plan(alphabet, step, error, left_share, num_bits / 8 * float(counts.sum()))
