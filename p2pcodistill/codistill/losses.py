"""The distillation loss psi: how far the student's prediction is from its teachers' (Anil et al. 2018, section 2).

Axes of tensors, in their order:

    ...   any leading axes (batch, time); the loss is the mean over them
    C     classes, always last
    N     teachers, always first

Everything is computed in float32, whatever precision the logits came in and whatever autocast is on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

DistillationLoss = Literal["soft-cross-entropy", "kl", "squared-error"]
Aggregation = Literal["mean-probabilities", "mean-logits", "mean-losses"]


def distillation_loss(
    logits_C: Tensor,
    teacher_logits_NC: Sequence[Tensor],
    weights_N: Sequence[float],
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

    Raises ValueError for teachers whose logits differ from the student's in shape.
    """
    for teacher_logits_C in teacher_logits_NC:
        if teacher_logits_C.shape != logits_C.shape:
            raise ValueError(
                f"a teacher's logits have the shape {tuple(teacher_logits_C.shape)}, "
                f"the student's {tuple(logits_C.shape)}"
            )
    with torch.autocast(logits_C.device.type, enabled=False):
        student_C = logits_C.float() / temperature
        teachers_NC = (
            torch.stack([teacher_C.detach().float() for teacher_C in teacher_logits_NC]) / temperature
        )
        share_N = torch.tensor(weights_N, dtype=torch.float32, device=logits_C.device)
        share_NC = share_N.view(-1, *[1] * logits_C.ndim)
        if loss == "squared-error":
            psi = _squared_error(student_C, teachers_NC, share_NC, aggregation)
        else:
            psi = _cross_entropy(student_C, teachers_NC, share_NC, aggregation, minus_entropy=loss == "kl")
        return psi * temperature**2


def _squared_error(
    student_C: Tensor, teachers_NC: Tensor, share_NC: Tensor, aggregation: Aggregation
) -> Tensor:
    if aggregation == "mean-losses":
        return (share_NC * (student_C - teachers_NC).square()).sum(0).mean()
    return functional.mse_loss(student_C, (share_NC * teachers_NC).sum(0))


def _cross_entropy(
    student_C: Tensor, teachers_NC: Tensor, share_NC: Tensor, aggregation: Aggregation, *, minus_entropy: bool
) -> Tensor:
    """Cross-entropy with the teachers as soft targets; minus the targets' entropy it is the KL divergence."""
    if aggregation == "mean-logits":
        teachers_NC, share_NC = (share_NC * teachers_NC).sum(0, keepdim=True), torch.ones_like(share_NC[:1])
    target_NC = teachers_NC.softmax(-1)
    # The cross-entropy is linear in the target, so the mean prediction gives the mean of the losses as well.
    target_C = (share_NC * target_NC).sum(0)
    psi = -(target_C * student_C.log_softmax(-1)).sum(-1).mean()
    if minus_entropy and aggregation == "mean-losses":
        psi = psi + (share_NC * torch.special.xlogy(target_NC, target_NC)).sum((0, -1)).mean()
    elif minus_entropy:
        psi = psi + torch.special.xlogy(target_C, target_C).sum(-1).mean()
    return psi
