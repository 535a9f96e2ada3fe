"""What a rank measures of its steps, between two events that tell it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from p2pcodistill.telemetry.training_events import StepMeasured


class Meter:
    """Means over the steps since the last measurement; sums stay on the device until then."""

    def __init__(self, clock: Callable[[], float], exchange_s: float) -> None:
        self._clock = clock
        self._since_s, self._since_exchange_s = clock(), exchange_s
        self._losses: list[Tensor] = []
        self._distillation_losses: list[Tensor] = []

    def add(self, loss: Tensor, distillation_loss: Tensor | None) -> None:
        """Count one step."""
        self._losses.append(loss)
        if distillation_loss is not None:
            self._distillation_losses.append(distillation_loss)

    def measure(self, step: int, rate: float, exchange_s: float) -> StepMeasured:
        """The event of the steps since the last call, given the exchange's seconds so far."""
        now_s = self._clock()
        duration_s = now_s - self._since_s
        event = StepMeasured(
            step,
            float(torch.stack(self._losses).mean()),
            float(torch.stack(self._distillation_losses).mean()) if self._distillation_losses else None,
            rate,
            len(self._losses) / duration_s,
            exchange_s - self._since_exchange_s,
            duration_s,
        )
        self._since_s, self._since_exchange_s = now_s, exchange_s
        self._losses, self._distillation_losses = [], []
        return event
