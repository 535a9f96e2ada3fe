"""Label smoothing: a share of the target goes from the label to a prior over the classes (Szegedy et al. 2016).

It is what codistillation is compared with where soft targets might do without a teacher: Anil et al. 2018, figure 2a, smooth
with the uniform and with the unigram distribution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from p2pcodistill.config import TrainingConfig
from p2pcodistill.errors import ConfigError


class LabelSmoothing:
    """Adds the prior's part to a loss on labels; its state dict is how often each class was the label so far.

    The unigram prior begins uniform, as if each class had been seen once, and each rank counts its own batches. Logits have
    the classes C last; of the other axes, the first has as many labelled examples as the targets, and then unlabelled ones.
    """

    def __init__(self, config: TrainingConfig) -> None:
        self._share, self._prior = config.label_smoothing, config.label_smoothing_prior
        self._counts_C: Tensor | None = None

    def smooth(self, loss: Tensor, logits: Tensor, targets: Any) -> Tensor:
        """`loss`, the cross-entropy with the labels, as the one with smoothed labels; a float32 scalar.

        Raises ConfigError where the unigram prior is asked for and `targets` are no class numbers.
        """
        if self._share == 0:
            return loss
        log_probabilities_C = logits[: len(targets)].float().log_softmax(-1)
        if self._prior == "uniform":
            with_prior = -log_probabilities_C.mean()
        else:
            prior_C = self._count(logits, targets)
            with_prior = -(log_probabilities_C * prior_C).sum(-1).mean()
        return (1 - self._share) * loss + self._share * with_prior

    def _count(self, logits: Tensor, targets: Any) -> Tensor:
        """The prior after these targets."""
        is_classes = isinstance(targets, Tensor) and targets.shape[1:] == logits.shape[1:-1]
        if not is_classes or targets.is_floating_point():
            raise ConfigError(
                'label_smoothing_prior = "unigram" needs targets that are class numbers, and these are not: '
                'use "uniform", or set label_smoothing to 0'
            )
        num_classes = logits.shape[-1]
        if self._counts_C is None:
            self._counts_C = torch.ones(num_classes, dtype=torch.float64, device=logits.device)
        self._counts_C += torch.bincount(targets.flatten().long(), minlength=num_classes)
        return (self._counts_C / self._counts_C.sum()).float()

    def state_dict(self) -> dict[str, Any]:
        """The counts, a tensor; None before the first batch and without the unigram prior."""
        return {"counts": self._counts_C}

    def load_state_dict(self, state: Mapping[str, Any], device: torch.device) -> None:
        """Go on from there."""
        counts_C = state["counts"]
        self._counts_C = None if counts_C is None else counts_C.to(device)
