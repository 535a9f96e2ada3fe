"""The distillation loss psi: how far the student's prediction is from its teachers' (Anil et al. 2018, section 2).

Axes of tensors, in their order:

    ...   any leading axes (batch, time); the loss is the mean over them
    C     classes, always last
    N     teachers, always first

Everything is computed in float32, whatever precision the logits came in and whatever autocast is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

DistillationLoss = Literal["soft-cross-entropy", "kl", "squared-error"]
Aggregation = Literal["mean-probabilities", "mean-logits", "mean-losses"]
Weight: TypeAlias = float | Tensor
"""A number, or a scalar on the logits' device."""

_LOWEST_LOGIT = -1e30
"""No class at this or below has any probability beside one that is not."""


def distillation_loss(
    logits_C: Tensor,
    teacher_logits_NC: Sequence[Tensor],
    weights_N: Sequence[Weight],
    *,
    loss: DistillationLoss = "soft-cross-entropy",
    aggregation: Aggregation = "mean-probabilities",
    temperature: float = 1.0,
) -> Tensor:
    """psi(teachers, student): a float32 scalar whose gradient flows into `logits_C` only.

    `loss` is what the student is compared by:

    - `soft-cross-entropy`: cross-entropy with the teachers' prediction as soft target, the paper's choice;
    - `kl`: KL(teachers || student), which has the same gradient and is 0 where they agree;
    - `squared-error`: mean squared difference of the logits, over the classes too. A model's prediction is then its
      logits themselves: `mean-probabilities` means `mean-logits`, and the temperature cancels out.

    `aggregation` is how N teachers, weighted by `weights_N` (which add up to 1), become one target:

    - `mean-probabilities`: their mean predictive distribution (Anil et al., Algorithm 1);
    - `mean-logits`: the distribution of their mean logits;
    - `mean-losses`: the mean of the losses against each (Sodhani et al. 2020, section 3).

    Logits are divided by `temperature`, and the loss is multiplied by its square, which keeps the gradient's
    magnitude (Hinton et al. 2015, section 2).

    All positions count alike: there is no mask for padding. Nothing waits for the device.

    Raises ValueError for teachers whose logits differ from the student's in shape, and for logits that are no
    distribution per position: fewer than two axes or classes (`squared-error` compares any).
    """
    if loss != "squared-error" and (logits_C.ndim < 2 or logits_C.shape[-1] < 2):
        raise ValueError(
            f"logits of the shape {tuple(logits_C.shape)}: {loss} needs positions and, on the last axis, two or more classes"
        )
    for teacher_logits_C in teacher_logits_NC:
        if teacher_logits_C.shape != logits_C.shape:
            raise ValueError(
                f"a teacher's logits have the shape {tuple(teacher_logits_C.shape)}, "
                f"the student's {tuple(logits_C.shape)}"
            )
    with torch.autocast(logits_C.device.type, enabled=False):
        student_C = logits_C.float() / temperature
        teachers_NC = [teacher_C.detach().float() / temperature for teacher_C in teacher_logits_NC]
        if loss == "squared-error":
            psi = _squared_error(student_C, teachers_NC, weights_N, aggregation)
        else:
            psi = _cross_entropy(student_C, teachers_NC, weights_N, aggregation, minus_entropy=loss == "kl")
        return psi * temperature**2


def _squared_error(
    student_C: Tensor, teachers_NC: Sequence[Tensor], weights_N: Sequence[Weight], aggregation: Aggregation
) -> Tensor:
    if aggregation == "mean-losses":
        losses_N = [functional.mse_loss(student_C, teacher_C) for teacher_C in teachers_NC]
        return _weighted_sum(losses_N, weights_N)
    return functional.mse_loss(student_C, _weighted_sum(teachers_NC, weights_N))


def _cross_entropy(
    student_C: Tensor,
    teachers_NC: Sequence[Tensor],
    weights_N: Sequence[Weight],
    aggregation: Aggregation,
    *,
    minus_entropy: bool,
) -> Tensor:
    """Cross-entropy with the teachers as soft targets; minus the targets' entropy it is the KL divergence.

    Works on the logits in place.
    """
    with torch.no_grad():
        # Masked classes may be at minus infinity, of which a probability, or a weight, of 0 would make NaN.
        for logits_C in (student_C, *(teachers_NC if aggregation == "mean-logits" else ())):
            logits_C.clamp_min_(_LOWEST_LOGIT)
    if aggregation == "mean-logits":
        teachers_NC, weights_N = [_weighted_sum(teachers_NC, weights_N)], [1.0]
    targets_NC = [teacher_C.softmax(-1) for teacher_C in teachers_NC]
    # The cross-entropy is linear in the target, so the mean prediction gives the mean of the losses as well.
    target_C = _weighted_sum(targets_NC, weights_N)
    psi = -(target_C * student_C.log_softmax(-1)).sum(-1).mean()
    if minus_entropy and aggregation == "mean-losses":
        psi = psi - _weighted_sum([_mean_entropy(other_C) for other_C in targets_NC], weights_N)
    elif minus_entropy:
        psi = psi - _mean_entropy(target_C)
    return psi


def _mean_entropy(target_C: Tensor) -> Tensor:
    entropy: Tensor = -torch.special.xlogy(target_C, target_C).sum(-1).mean()
    return entropy


def _weighted_sum(tensors_N: Sequence[Tensor], weights_N: Sequence[Weight]) -> Tensor:
    total = tensors_N[0] * weights_N[0]
    for tensor, weight in zip(tensors_N[1:], weights_N[1:], strict=True):
        total = total + tensor * weight
    return total
