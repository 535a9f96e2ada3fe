"""The gate: a teacher that is worse than the student on the student's own batches does not teach until it recovers.

Whatever a teacher's weights are, valid, signed and finite, they may be ruined: by a diverged run, a mistake or malice. Two
guards, of which the first has no delay and the second is the same on all ranks:

- *In the step.* A teacher whose predictions are not finite, or whose loss on this very batch is above the student's by more
  than twice the margin (and more yet if the batch is small), has no part in the target of this batch on this rank. These are
  operations on tensors that nothing waits for.
- *In a round of agreement.* What was measured in all steps since the last round is summed up over the ranks. A teacher that
  was not finite in any of them is gated, and so is one whose mean loss is above the student's by more than the margin, as
  soon as enough predictions were compared. If its versions follow each other faster than that, they are judged together.

A gated teacher is not run, but for probes: a round's steps in which it is run and measured without teaching, when a newer
version has come, and every few rounds. As soon as a probe is within the margin, it teaches again.

Without targets, losses are not known, and only what is not finite counts. What that means depends on what the student is
compared by. As a distribution, a prediction is its largest logit and how far the others are below it: masked classes may be
as low as they like. As numbers, it must not be too far from the student's.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from p2pcodistill.codistill.losses import DistillationLoss

Criterion: TypeAlias = Callable[[Tensor, Any], Tensor]
"""(logits, targets) -> the mean loss of a batch, a scalar."""

STEP_MARGINS = 2.0
NOISE_MARGINS = 8.0
"""A single batch is noisy: within a step, a teacher may be above the student by `STEP_MARGINS` margins, and by another
`NOISE_MARGINS` / sqrt(number of predictions) of them."""
MIN_PREDICTIONS = 256
"""Mean losses of fewer predictions are not compared."""
PROBE_INTERVAL_ROUNDS = 8
MAX_LOGIT = 1e12
"""A position whose largest logit is beyond this counts as not finite: what a small temperature makes of it might not be."""
MAX_DISTANCE = 1e12
"""So does a batch of numbers that are farther from the student's (by the norm): the square of that might not be."""
_MAX_LOSS = 1e6
_UNITS = 1 << 20
"""Sums travel in whole units, so that they are the same in whatever order the ranks' are added."""
# What is counted of a version of a teacher: steps in which it ran; in which it was not finite; in which losses were
# measured; the predictions in these; the sums of its losses, and of the student's, in these.
_NUM_COUNTS = 6
# Of each teacher: of the version in use, and of those before it that were never judged.
NUM_COLUMNS = 2 * _NUM_COUNTS


def cross_entropy(logits_C: Tensor, targets: Any) -> Tensor:
    """The default criterion: mean cross-entropy, in float32, with integer class targets, one for each position.

    Raises ValueError for targets of another kind.
    """
    fits = isinstance(targets, Tensor) and targets.shape == logits_C.shape[:-1]
    if not fits or targets.is_floating_point() or targets.is_complex():
        raise ValueError("the targets are not one class (an integer) for each position of the logits")
    return functional.cross_entropy(logits_C.float().flatten(0, -2), targets.flatten())


@dataclass(frozen=True, slots=True)
class Watched:
    """A batch of one teacher: logits that make a finite target, and whether it may teach on this batch (a bool, on the
    device)."""

    logits: Tensor
    is_sound: Tensor


@dataclass(frozen=True, slots=True)
class Verdict:
    """A change that a round has brought. Losses are means; None where they were not measured. `why` is for the gated."""

    teacher: str
    is_gated: bool
    loss: float | None
    student_loss: float | None
    why: str = ""


@dataclass(slots=True)
class _Gated:
    """A teacher that does not teach. `rest_rounds` are left until it is probed."""

    for_loss: bool
    rest_rounds: int = PROBE_INTERVAL_ROUNDS


def keep_sound(weights: Sequence[float], is_sound: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The weights, 0 for teachers that are not sound and the others raised to add up to 1; and whether any weight is left.

    All on the device, the weights as float32. Where all are sound, they are to the bit what they were.
    """
    soundness = torch.stack(list(is_sound))
    # A sum of tiny weights is one that float32 might not have: all are first made relative to the largest.
    kept = [sound.double() * weight for sound, weight in zip(is_sound, weights, strict=True)]
    most = torch.stack(kept).amax()
    relative = [weight / torch.where(most > 0, most, 1.0) for weight in kept]
    divisor = torch.stack(relative).sum().clamp_min(1.0)
    return [
        torch.where(soundness.all(), weight, share / divisor).float()
        for weight, share in zip(kept, relative, strict=True)
    ], most > 0


class Gate:
    """Watches `teachers`, the same on every rank. `margin` is in the unit of `criterion`; 0: losses are not compared.

    `loss` is what the student is compared by.
    """

    def __init__(
        self,
        teachers: Sequence[str],
        margin: float,
        device: torch.device,
        *,
        criterion: Criterion | None = None,
        loss: DistillationLoss = "soft-cross-entropy",
    ) -> None:
        self._compares_numbers = loss == "squared-error"
        self._rows = {teacher: row for row, teacher in enumerate(teachers)}
        self._margin = margin
        self._criterion = criterion or cross_entropy
        self._gated: dict[str, _Gated] = {}
        self._tally = _Tally(len(self._rows), device)
        # The sums over the ranks since each teacher was judged last; the same on every rank.
        self._evidence = torch.zeros((len(self._rows), NUM_COLUMNS), dtype=torch.int64)

    @property
    def gated(self) -> frozenset[str]:
        """Those who do not teach."""
        return frozenset(self._gated)

    @property
    def probed(self) -> frozenset[str]:
        """Those of the gated who are to be run and measured now."""
        return frozenset(teacher for teacher, gated in self._gated.items() if gated.rest_rounds == 0)

    @torch.no_grad()
    def measure(self, logits: Tensor, targets: Any) -> Tensor | None:
        """The loss of logits on this batch, a float32 scalar; None without targets, or where losses are not compared.

        Raises whatever the criterion does, and ValueError when its result is no scalar.
        """
        if targets is None or not self._margin:
            return None
        loss = self._criterion(logits.detach(), targets)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError("the criterion does not give a scalar tensor")
        return loss.detach().float().reshape(())

    @torch.no_grad()
    def watch(self, logits: Tensor, teacher_logits: Mapping[str, Tensor], targets: Any) -> dict[str, Watched]:
        """Count one batch: the student's logits, and those of each teacher that was run. Waits for nothing."""
        student_loss = self.measure(logits, targets) if teacher_logits else None
        return {
            teacher: self._watch(teacher, theirs, self._is_finite(theirs, logits), student_loss, targets)
            for teacher, theirs in teacher_logits.items()
        }

    def _is_finite(self, logits: Tensor, student_logits: Tensor) -> Tensor:
        """Whether the target that a teacher's logits make is finite, with all that follows from it; a bool, on the device.

        NaN fails either comparison.
        """
        if self._compares_numbers:
            distance: Tensor = torch.linalg.vector_norm(logits.float() - student_logits.detach().float())
            return distance <= MAX_DISTANCE
        return (logits.amax(-1).abs() <= MAX_LOGIT).all()

    def _watch(
        self, teacher: str, logits: Tensor, is_finite: Tensor, student_loss: Tensor | None, targets: Any
    ) -> Watched:
        logits = torch.where(is_finite, logits, 0.0)
        loss = self.measure(logits, targets)
        if loss is None or student_loss is None:
            zero = torch.zeros((), device=logits.device)
            self._tally.add(self._rows[teacher], [zero + 1, ~is_finite, zero, zero, zero, zero])
            return Watched(logits, is_finite)
        num_predictions = logits.shape[: max(1, logits.ndim - 1)].numel()
        margins = STEP_MARGINS + NOISE_MARGINS / max(1, num_predictions) ** 0.5
        # A student that is itself not finite is no measure for anybody.
        can_compare = is_finite & torch.isfinite(student_loss)
        is_finite = is_finite & (torch.isfinite(loss) | ~torch.isfinite(student_loss))
        can_compare = can_compare & is_finite
        own_loss, student_loss = (
            torch.where(can_compare, value, 0.0).clamp(-_MAX_LOSS, _MAX_LOSS)
            for value in (loss, student_loss)
        )
        one, predictions = torch.ones_like(own_loss), can_compare * float(num_predictions)
        self._tally.add(
            self._rows[teacher], [one, ~is_finite, can_compare, predictions, own_loss, student_loss]
        )
        return Watched(logits, is_finite & (own_loss <= student_loss + margins * self._margin))

    # --- rounds of agreement -----------------------------------------------------------------------------------------

    def take_tally(self) -> Tensor:
        """What this rank has counted since the last call: int64, to be summed over the ranks and given to `judge`.

        What a device has not computed yet is told by a later call.
        """
        return self._tally.take()

    def judge(self, tally: Tensor) -> list[Verdict]:
        """Draw the conclusions from the sum of all ranks' tallies: what has changed, the same on every rank."""
        self._evidence += tally
        verdicts = (self._judge(teacher) for teacher in self._rows)
        return [verdict for verdict in verdicts if verdict is not None]

    def _judge(self, teacher: str) -> Verdict | None:
        gated = self._gated.get(teacher)
        if gated is not None and gated.rest_rounds:
            gated.rest_rounds -= 1
            return None
        evidence = self._evidence[self._rows[teacher]]
        counts = self._find_enough(evidence, must_compare=gated is not None and gated.for_loss)
        if counts is None:
            return None
        evidence.zero_()
        _, num_broken, num_measured, _, sum_loss, sum_student_loss = counts
        loss = sum_loss / num_measured if num_measured else None
        student_loss = sum_student_loss / num_measured if num_measured else None
        why = None
        if num_broken:
            why = "its predictions are not finite"
        elif loss is not None and student_loss is not None and loss > student_loss + self._margin:
            why = f"its loss on local batches is {loss:.3f}, the student's {student_loss:.3f}"
        if why is not None:
            self._gated[teacher] = _Gated(for_loss=not num_broken)
            self._forget(teacher)
            return None if gated is not None else Verdict(teacher, True, loss, student_loss, why)
        if gated is None:
            return None
        del self._gated[teacher]
        return Verdict(teacher, False, loss, student_loss)

    def _find_enough(self, evidence: Tensor, *, must_compare: bool) -> list[float] | None:
        """What a teacher is to be judged by: its version in use by itself, or else with those before; None: too little."""
        own, earlier = evidence[:_NUM_COUNTS], evidence[_NUM_COUNTS:]
        for counts in (own, own + earlier):
            values = [value / _UNITS for value in counts.tolist()]
            num_run, num_broken, num_measured, num_predictions = values[:4]
            is_compared = num_measured > 0 or must_compare
            if num_run and (num_broken or not is_compared or num_predictions >= MIN_PREDICTIONS):
                return values
        return None

    def renew(self, teacher: str) -> None:
        """A newer version has taken the place of the last one.

        What was measured of that one and has not been judged counts only while there is too little of its successors.
        """
        row = self._rows[teacher]
        self._tally.renew(row)
        _count_as_earlier(self._evidence, [row])
        if teacher in self._gated:
            self._gated[teacher].rest_rounds = 0

    def _forget(self, teacher: str) -> None:
        row = self._rows[teacher]
        self._tally.clear(row)
        self._evidence[row] = 0

    def state_dict(self) -> dict[str, Any]:
        """Plain data: who is gated. Measurements are left out: a resumed teacher is loaded, and measured, anew."""
        return {
            teacher: {"for_loss": gated.for_loss, "rest_rounds": gated.rest_rounds}
            for teacher, gated in self._gated.items()
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`; those who are teachers no longer are left out."""
        self._gated = {
            teacher: _Gated(saved["for_loss"], saved["rest_rounds"])
            for teacher, saved in state.items()
            if teacher in self._rows
        }


def _count_as_earlier(counts: Tensor, rows: Sequence[int]) -> None:
    """What was counted of the versions in use is of earlier ones from now on."""
    for row in rows:
        counts[row, _NUM_COUNTS:] += counts[row, :_NUM_COUNTS]
        counts[row, :_NUM_COUNTS] = 0


class _Tally:
    """Sums on the device of what was counted of each teacher, and their way to the host, which nobody waits for."""

    def __init__(self, num_teachers: int, device: torch.device) -> None:
        shape = (num_teachers, NUM_COLUMNS)
        self._sums = torch.zeros(shape, device=device)
        # On their way from a GPU: the copy, the event that tells of its arrival, and the rows of it that no longer count, or
        # are of an earlier version by now.
        self._arriving = torch.zeros(shape, pin_memory=True) if device.type == "cuda" else None
        self._arrival: torch.cuda.Event | None = None
        self._cleared: set[int] = set()
        self._renewed: set[int] = set()

    def add(self, row: int, values: Sequence[Tensor]) -> None:
        counts = torch.stack([value.float() for value in values]).to(self._sums.device)
        self._sums[row, :_NUM_COUNTS] += counts

    def clear(self, row: int) -> None:
        self._sums[row] = 0.0
        self._cleared.add(row)

    def renew(self, row: int) -> None:
        _count_as_earlier(self._sums, [row])
        self._renewed.add(row)

    def take(self) -> Tensor:
        if self._arriving is None:
            taken = self._sums.to("cpu", copy=True)
            self._sums.zero_()
        else:
            taken = self._take_arrived(self._arriving)
        return (taken.double() * _UNITS).round_().to(torch.int64)

    def _take_arrived(self, arriving: Tensor) -> Tensor:
        taken = torch.zeros_like(arriving)
        if self._arrival is not None and self._arrival.query():  # type: ignore[no-untyped-call]
            taken.copy_(arriving)
            _count_as_earlier(taken, list(self._renewed))
            taken[list(self._cleared)] = 0.0
            self._arrival = None
        if self._arrival is None:
            arriving.copy_(self._sums, non_blocking=True)
            self._sums.zero_()
            self._arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._arrival.record()
            self._cleared.clear()
            self._renewed.clear()
        return taken
