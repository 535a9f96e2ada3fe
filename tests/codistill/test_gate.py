"""The gate by itself: what is sound on a batch, and what follows from what was counted."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from p2pcodistill.codistill.gate import (
    MAX_DISTANCE,
    MAX_LOGIT,
    MIN_PREDICTIONS,
    NUM_COLUMNS,
    PROBE_INTERVAL_ROUNDS,
    Gate,
    Verdict,
    cross_entropy,
    keep_sound,
)
from p2pcodistill.codistill.losses import distillation_loss
from tests.codistill.test_losses import AGGREGATIONS, LOSSES, Operations

CPU = torch.device("cpu")
MARGIN = 1.0
TARGETS = (torch.arange(256) % 4).view(16, 16)


def logits_with_loss(loss: float) -> Tensor:
    """Logits (16, 16, 4) whose cross-entropy with `TARGETS` is `loss` at every position."""
    probability = torch.tensor(-loss).exp()
    others = ((1 - probability) / 3).log().expand(16, 16, 4).clone()
    return others.scatter_(-1, TARGETS[..., None], probability.log().expand(16, 16, 1))


def ruined(value: float) -> Tensor:
    logits = logits_with_loss(0.5)
    logits[0, 0, 0] = value
    return logits


def gate_of(*teachers: str, margin: float = MARGIN, criterion: Any = None, loss: Any = "kl") -> Gate:
    return Gate(teachers, margin, CPU, criterion=criterion, loss=loss)


def one_round(
    gate: Gate, teachers: dict[str, Tensor], *, student: float = 0.5, targets: Any = TARGETS
) -> list[Verdict]:
    gate.watch(logits_with_loss(student), teachers, targets)
    return gate.judge(gate.take_tally())


# --- in the step ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        *itertools.product(LOSSES, [float("nan"), float("inf"), 2 * MAX_LOGIT]),
        ("squared-error", -float("inf")),
        ("squared-error", -2 * MAX_DISTANCE),
    ],
)
@pytest.mark.parametrize("targets", [TARGETS, None])
def test_what_is_not_finite_is_not_sound_and_is_kept_out(
    loss: Any, value: float, targets: Tensor | None
) -> None:
    good, gate = logits_with_loss(0.7), gate_of("a", "b", loss=loss)
    watched = gate.watch(logits_with_loss(0.5), {"a": ruined(value), "b": good}, targets)
    assert not watched["a"].is_sound and torch.equal(watched["a"].logits, torch.zeros_like(good))
    assert watched["b"].is_sound and torch.equal(watched["b"].logits, good)


@pytest.mark.parametrize("value", [-float("inf"), -2 * MAX_LOGIT])
def test_a_position_without_any_class_is_not_finite(value: float) -> None:
    logits = logits_with_loss(0.5)
    logits[3, 5] = value
    watched = gate_of("a").watch(logits_with_loss(0.5), {"a": logits}, None)
    assert not watched["a"].is_sound


MASKS = [-1e9, torch.finfo(torch.float32).min, -float("inf")]


@pytest.mark.parametrize(
    ("loss", "mask"), [*itertools.product(["kl", "soft-cross-entropy"], MASKS), ("squared-error", -1e9)]
)
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_masked_classes_are_healthy_and_teach_as_without_a_gate(
    loss: Any, aggregation: Any, mask: float
) -> None:
    torch.manual_seed(0)
    gate = gate_of("a", "b", loss=loss)
    results = []
    for is_gated in (False, True):
        student = torch.randn(16, 16, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        masked = torch.arange(8) >= 4
        logits = [torch.randn(16, 16, 8, generator=torch.Generator().manual_seed(2 + n)) for n in range(2)]
        predictions = [values.masked_fill(masked, mask) for values in (student, *logits)]
        teachers: list[Tensor] = predictions[1:]
        weights: list[Any] = [0.3, 0.7]
        factor: Any = 1.0
        if is_gated:
            watched = gate.watch(predictions[0], dict(zip("ab", teachers, strict=True)), TARGETS)
            assert all(one.is_sound for one in watched.values()) and gate.judge(gate.take_tally()) == []
            weights, factor = keep_sound(weights, [one.is_sound for one in watched.values()])
            teachers = [one.logits for one in watched.values()]
        psi = (
            distillation_loss(predictions[0], teachers, weights, loss=loss, aggregation=aggregation) * factor
        )
        [gradient] = torch.autograd.grad(psi, student)
        assert torch.isfinite(psi) and torch.isfinite(gradient).all() and gradient.any()
        results.append((psi.detach(), gradient))
    assert all(torch.equal(off, on) for off, on in zip(*results, strict=True))


def test_numbers_may_be_large_where_the_students_are() -> None:
    student = torch.zeros(4, 3)
    student[:, 2] = torch.finfo(torch.float32).min
    watched = gate_of("a", loss="squared-error").watch(student, {"a": student + 1}, None)
    assert watched["a"].is_sound


@pytest.mark.parametrize(("loss", "is_sound"), [(0.1, True), (2.9, True), (3.1, False), (30.0, False)])
def test_on_one_batch_a_teacher_may_be_two_margins_worse(loss: float, is_sound: bool) -> None:
    watched = gate_of("a").watch(logits_with_loss(0.5), {"a": logits_with_loss(loss)}, TARGETS)
    assert bool(watched["a"].is_sound) is is_sound
    without = gate_of("a").watch(logits_with_loss(0.5), {"a": logits_with_loss(loss)}, None)
    off = gate_of("a", margin=0.0).watch(logits_with_loss(0.5), {"a": logits_with_loss(loss)}, TARGETS)
    assert without["a"].is_sound and off["a"].is_sound


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
def test_logits_of_any_precision_are_watched(dtype: torch.dtype, autocast: bool) -> None:
    gate, student = gate_of("a", "b"), logits_with_loss(0.5).to(dtype)
    teachers = {"a": logits_with_loss(0.6).to(dtype), "b": ruined(float("inf")).to(dtype)}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        watched = gate.watch(student, teachers, TARGETS)
    assert watched["a"].is_sound and torch.equal(watched["a"].logits, teachers["a"])
    assert not watched["b"].is_sound and watched["b"].logits.dtype == dtype
    assert [verdict.teacher for verdict in gate.judge(gate.take_tally())] == ["b"]


def test_a_student_that_is_not_finite_is_no_measure() -> None:
    gate = gate_of("a")
    watched = gate.watch(ruined(float("nan")), {"a": logits_with_loss(30.0)}, TARGETS)
    assert watched["a"].is_sound and gate.judge(gate.take_tally()) == []


def test_weights_of_the_sound_add_up_to_one_and_are_untouched_where_all_are() -> None:
    weights = [0.1, 0.2, 0.7]
    yes, no = torch.tensor(True), torch.tensor(False)
    kept, is_any = keep_sound(weights, [yes, yes, yes])
    assert [weight.item() for weight in kept] == torch.tensor(weights).tolist() and is_any
    kept, is_any = keep_sound(weights, [yes, no, yes])
    assert torch.stack(kept).tolist() == pytest.approx([0.125, 0, 0.875]) and is_any
    kept, is_any = keep_sound(weights, [no, no, no])
    assert torch.stack(kept).tolist() == [0, 0, 0] and not is_any


@pytest.mark.parametrize("tiny", [1e-310, 1e-60, 1e-9])
def test_what_is_left_of_the_weights_adds_up_to_one_however_little_it_is(tiny: float) -> None:
    yes, no = torch.tensor(True), torch.tensor(False)
    kept, is_any = keep_sound([1.0, tiny, 3 * tiny], [no, yes, yes])
    assert torch.stack(kept).tolist() == pytest.approx([0, 0.25, 0.75]) and is_any


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_one_without_weight_does_not_teach_in_place_of_the_unsound(loss: Any, aggregation: Any) -> None:
    student = torch.tensor([[1.0, 2.0], [3.0, 5.0]], requires_grad=True)
    teachers = {"a": torch.full((2, 2), torch.nan), "b": torch.tensor([[2.0, -1.0], [0.0, 1.0]])}
    watched = gate_of("a", "b", loss=loss).watch(student, teachers, None).values()
    weights, is_any = keep_sound([1.0, 0.0], [one.is_sound for one in watched])
    logits = [one.logits for one in watched]
    psi = distillation_loss(student, logits, weights, loss=loss, aggregation=aggregation) * is_any
    [gradient] = torch.autograd.grad(psi, student)
    assert psi.item() == 0 and not gradient.any()


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_the_others_teach_as_if_the_ruined_were_not_there(loss: Any, aggregation: Any, value: float) -> None:
    torch.manual_seed(0)
    student = torch.randn(2, 3, 4, requires_grad=True)
    good = [torch.randn(2, 3, 4) for _ in range(2)]
    bad = torch.full((2, 3, 4), value)

    def psi(teachers: list[Tensor]) -> Tensor:
        gate = gate_of("a", "b", "c", loss=loss)
        watched = gate.watch(student, dict(zip("abc", teachers, strict=False)), None).values()
        weights, is_any = keep_sound([1 / len(teachers)] * len(teachers), [w.is_sound for w in watched])
        logits = [w.logits for w in watched]
        return distillation_loss(student, logits, weights, loss=loss, aggregation=aggregation) * is_any

    expected, actual, none = psi(good), psi([good[0], bad, good[1]]), psi([bad, bad])
    gradients = [torch.autograd.grad(value, student)[0] for value in (expected, actual, none)]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(gradients[1], gradients[0])
    assert none.item() == 0 and torch.equal(gradients[2], torch.zeros_like(student))


@given(
    st.sampled_from(LOSSES),
    st.sampled_from(AGGREGATIONS),
    st.floats(1e-3, 100.0),
    st.lists(st.lists(st.floats(width=32), min_size=6, max_size=6), min_size=1, max_size=3),
    st.booleans(),
)
def test_whatever_teachers_predict_the_students_gradients_are_finite(
    loss: Any, aggregation: Any, temperature: float, predictions: list[list[float]], has_targets: bool
) -> None:
    student = torch.tensor([[0.5, -1.0, 2.0], [0.0, 3.0, 1.0]], requires_grad=True)
    teachers = {str(index): torch.tensor(values).view(2, 3) for index, values in enumerate(predictions)}
    targets = torch.tensor([0, 2]) if has_targets else None
    watched = gate_of(*teachers, loss=loss).watch(student, teachers, targets).values()
    weights, is_any = keep_sound([1 / len(teachers)] * len(teachers), [w.is_sound for w in watched])
    logits = [w.logits for w in watched]
    psi = distillation_loss(
        student, logits, weights, loss=loss, aggregation=aggregation, temperature=temperature
    )
    (psi * is_any).backward()
    assert torch.isfinite(psi * is_any)
    assert student.grad is not None and torch.isfinite(student.grad).all()


@pytest.mark.parametrize("loss", ["kl", "squared-error"])
@pytest.mark.parametrize("targets", [TARGETS, None])
def test_nothing_waits_for_the_device(targets: Tensor | None, loss: Any) -> None:
    gate = gate_of("a", "b", loss=loss)
    student, teachers = logits_with_loss(0.5), {"a": logits_with_loss(0.7), "b": ruined(float("nan"))}
    with Operations() as operations:
        watched = gate.watch(student, teachers, targets)
        keep_sound([0.5, 0.5], [teacher.is_sound for teacher in watched.values()])
    assert operations.names
    assert not {"aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh"} & set(operations.names)


# --- the criterion -------------------------------------------------------------------------------------------------


def test_classes_are_compared_by_their_cross_entropy() -> None:
    logits = torch.randn(16, 16, 4)
    expected = functional.cross_entropy(logits.flatten(0, 1), TARGETS.flatten())
    assert cross_entropy(logits, TARGETS).item() == pytest.approx(expected.item())


@pytest.mark.parametrize("targets", [torch.zeros(2, 3), torch.zeros(6, dtype=torch.int64), [0, 1], "labels"])
def test_other_targets_need_a_criterion(targets: Any) -> None:
    with pytest.raises(ValueError, match="one class"):
        gate_of("a").measure(torch.zeros(2, 3, 4), targets)


def test_a_criterion_of_ones_own_gives_a_scalar() -> None:
    gate = gate_of("a", criterion=lambda logits, targets: (logits.sum(-1) - targets).square())
    with pytest.raises(ValueError, match="does not give a scalar"):
        gate.measure(torch.zeros(2, 3, 4), torch.zeros(2, 3))
    gate = gate_of("a", criterion=lambda logits, targets: (logits.sum(-1) - targets).square().mean())
    loss = gate.measure(torch.zeros(2, 3, 4, dtype=torch.float64), torch.full((2, 3), 2.0))
    assert loss is not None and loss.item() == 4 and loss.dtype == torch.float32


def test_a_loss_that_is_not_finite_counts_as_the_teachers_not_being_so() -> None:
    def criterion(logits: Tensor, targets: Tensor) -> Tensor:
        return torch.where(logits.amax() > 5, torch.inf, 1.0)

    gate = gate_of("a", criterion=criterion)
    watched = gate.watch(torch.zeros(16, 16, 4), {"a": torch.full((16, 16, 4), 9.0)}, TARGETS)
    assert not watched["a"].is_sound
    assert [verdict.why for verdict in gate.judge(gate.take_tally())] == ["its predictions are not finite"]


# --- over rounds ---------------------------------------------------------------------------------------------------


def test_a_teacher_within_the_margin_is_left_alone() -> None:
    gate = gate_of("a")
    for _ in range(3):
        assert one_round(gate, {"a": logits_with_loss(1.49)}) == []
    assert gate.gated == gate.probed == frozenset()


def test_the_mean_over_steps_and_ranks_decides() -> None:
    gate, other_rank = gate_of("a", "b"), gate_of("a", "b")
    for mine, theirs in [(1.0, 3.0), (1.2, 3.2)]:
        gate.watch(logits_with_loss(0.5), {"a": logits_with_loss(mine), "b": logits_with_loss(1.4)}, TARGETS)
        other_rank.watch(
            logits_with_loss(0.7), {"a": logits_with_loss(theirs), "b": logits_with_loss(1.6)}, TARGETS
        )
    tally = gate.take_tally() + other_rank.take_tally()
    [verdict] = gate.judge(tally)
    assert other_rank.judge(tally) == [verdict]
    assert (verdict.teacher, verdict.is_gated) == ("a", True)
    assert (verdict.loss, verdict.student_loss) == (
        pytest.approx(2.1, rel=1e-5),
        pytest.approx(0.6, rel=1e-5),
    )
    assert verdict.why == "its loss on local batches is 2.100, the student's 0.600"
    assert gate.gated == other_rank.gated == {"a"}


def test_few_predictions_are_no_evidence_and_are_gathered_over_rounds() -> None:
    gate, rows = gate_of("a"), slice(0, 5)  # 80 predictions
    bad, targets = logits_with_loss(5.0)[rows], TARGETS[rows]
    for num_rounds in range(1, 5):
        gate.watch(logits_with_loss(0.5)[rows], {"a": bad}, targets)
        verdicts = gate.judge(gate.take_tally())
        assert bool(verdicts) is (80 * num_rounds >= MIN_PREDICTIONS)
    assert verdicts[0].loss == pytest.approx(5.0, rel=1e-5)


def test_the_smaller_the_batch_the_wider_the_bound_within_a_step() -> None:
    bad = logits_with_loss(5.0)
    soundness = [
        bool(
            gate_of("a")
            .watch(logits_with_loss(0.5)[:n, :1], {"a": bad[:n, :1]}, TARGETS[:n, :1])["a"]
            .is_sound
        )
        for n in (1, 4, 16)
    ]
    assert soundness == [True, True, False], "bounds of 0.5 + 10, 6 and 4 nats"


@pytest.mark.parametrize("shape", [(MIN_PREDICTIONS,), (MIN_PREDICTIONS, 1), (MIN_PREDICTIONS // 2, 2, 3)])
def test_predictions_are_positions_or_numbers_without_classes(shape: tuple[int, ...]) -> None:
    gate = gate_of("a", criterion=lambda logits, targets: (logits - targets).square().mean())
    gate.watch(torch.zeros(shape), {"a": torch.full(shape, 1.1)}, torch.zeros(shape))
    [verdict] = gate.judge(gate.take_tally())
    assert verdict.is_gated and verdict.loss == pytest.approx(1.21, rel=1e-5)


def test_one_batch_that_is_not_finite_on_one_rank_gates() -> None:
    gate, other_rank = gate_of("a"), gate_of("a")
    for _ in range(4):
        gate.watch(logits_with_loss(0.5), {"a": logits_with_loss(0.5)}, None)
        other_rank.watch(logits_with_loss(0.5), {"a": logits_with_loss(0.5)}, None)
    other_rank.watch(logits_with_loss(0.5), {"a": ruined(float("nan"))}, None)
    [verdict] = gate.judge(gate.take_tally() + other_rank.take_tally())
    assert verdict == Verdict("a", True, None, None, "its predictions are not finite")


def test_sums_are_the_same_in_whatever_order_the_ranks_are_added() -> None:
    tallies = []
    for rank in range(5):
        gate = gate_of("a")
        gate.watch(logits_with_loss(0.1 * rank + 0.1), {"a": logits_with_loss(1.1**rank)}, TARGETS)
        tallies.append(gate.take_tally())
    assert torch.equal(sum(tallies[1:], tallies[0]), sum(tallies[-2::-1], tallies[-1]))
    assert all(tally.dtype == torch.int64 for tally in tallies)


def rounds_until_probe(gate: Gate) -> int:
    """Conclude rounds in which nobody ran until somebody is probed."""
    for num_rounds in range(100):
        if gate.probed:
            return num_rounds
        assert one_round(gate, {}) == []
    raise AssertionError("never probed")


def test_a_gated_teacher_rests_and_is_probed_until_it_recovers() -> None:
    gate = gate_of("a")
    assert len(one_round(gate, {"a": logits_with_loss(5.0)})) == 1
    assert not gate.probed
    assert rounds_until_probe(gate) == PROBE_INTERVAL_ROUNDS
    assert one_round(gate, {}) == [] and gate.probed, "it was not its turn in the schedule"
    assert one_round(gate, {"a": logits_with_loss(4.0)}) == [], "still bad, which is no news"
    assert rounds_until_probe(gate) == PROBE_INTERVAL_ROUNDS
    [verdict] = one_round(gate, {"a": logits_with_loss(1.2)})
    assert (verdict.is_gated, verdict.loss) == (False, pytest.approx(1.2, rel=1e-5))
    assert gate.gated == gate.probed == frozenset()


def test_a_newer_version_is_probed_at_once_and_the_old_ones_losses_do_not_count() -> None:
    gate = gate_of("a")
    one_round(gate, {"a": logits_with_loss(5.0)})
    gate.renew("a")
    assert gate.gated == gate.probed == {"a"}
    gate.watch(logits_with_loss(0.5), {"a": logits_with_loss(9.0)}, TARGETS)
    gate.renew("a")  # a yet newer one, in the middle of a round
    [verdict] = one_round(gate, {"a": logits_with_loss(0.6)})
    assert not verdict.is_gated


def test_a_newer_version_of_a_good_teacher_is_judged_by_itself() -> None:
    gate = gate_of("a")
    for _ in range(9):
        gate.watch(logits_with_loss(0.5), {"a": logits_with_loss(0.5)}, TARGETS)
    gate.renew("a")
    assert not gate.gated
    [verdict] = one_round(gate, {"a": logits_with_loss(2.0)})
    assert verdict.is_gated


SMALL = slice(0, 1)
"""16 predictions: a batch of which no version alone gives enough to be judged by."""


def small_rounds(gate: Gate, loss: float, num: int) -> list[tuple[str, bool]]:
    """Rounds of one small step each, every one with a new version swapped in; the verdicts."""
    verdicts = []
    for _ in range(num):
        if "a" not in gate.gated - gate.probed:
            student, teacher = logits_with_loss(0.5)[SMALL], logits_with_loss(loss)[SMALL]
            gate.watch(student, {"a": teacher}, TARGETS[SMALL])
        verdicts += [(verdict.teacher, verdict.is_gated) for verdict in gate.judge(gate.take_tally())]
        gate.renew("a")
    return verdicts


def test_versions_that_follow_each_other_quickly_are_judged_together() -> None:
    gate, num_needed = gate_of("a"), MIN_PREDICTIONS // 16
    assert small_rounds(gate, 2.4, num_needed - 1) == []
    assert small_rounds(gate, 2.4, 1) == [("a", True)]
    assert small_rounds(gate, 2.4, 2 * num_needed) == [] and gate.gated, "it has not become any better"
    assert small_rounds(gate, 0.6, num_needed) == [("a", False)]
    assert small_rounds(gate, 0.6, 3 * num_needed) == []


def test_a_version_of_which_enough_is_known_is_not_judged_by_those_before() -> None:
    gate = gate_of("a")
    assert small_rounds(gate, 9.0, 10) == []
    assert one_round(gate, {"a": logits_with_loss(0.6)}) == []
    assert small_rounds(gate, 0.6, 100) == [], "and those before are done with"


def test_one_that_was_not_finite_recovers_without_targets_but_one_that_was_worse_does_not() -> None:
    gate = gate_of("a", "b")
    verdicts = one_round(gate, {"a": ruined(float("inf")), "b": logits_with_loss(5.0)})
    assert [verdict.teacher for verdict in verdicts] == ["a", "b"]
    for name in "ab":
        gate.renew(name)
    good = logits_with_loss(0.5)
    [verdict] = one_round(gate, {"a": good, "b": good}, targets=None)
    assert verdict == Verdict("a", False, None, None)
    assert gate.gated == gate.probed == {"b"}


def test_a_resumed_gate_keeps_out_whom_it_kept_out() -> None:
    gate = gate_of("a", "b")
    one_round(gate, {"a": logits_with_loss(5.0), "b": logits_with_loss(0.5)})
    one_round(gate, {})
    resumed = gate_of("a", "b")
    resumed.load_state_dict(gate.state_dict() | {"gone": {"for_loss": True, "rest_rounds": 1}})
    assert resumed.gated == {"a"}
    assert rounds_until_probe(resumed) == rounds_until_probe(gate) == PROBE_INTERVAL_ROUNDS - 1


# --- on a GPU ------------------------------------------------------------------------------------------------------


class Arrival:
    """A CUDA event that the test makes happen."""

    has_happened = False

    def record(self) -> None:
        Arrival.has_happened = False

    def query(self) -> bool:
        return Arrival.has_happened


def test_what_has_not_arrived_from_the_device_is_told_by_a_later_tally(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "Event", Arrival)
    gate = gate_of("a", "b")
    gate._tally._arriving = torch.zeros(2, NUM_COLUMNS)

    def num_run() -> list[float]:
        return [row[0].item() / (1 << 20) for row in gate.take_tally()]

    def run(num_steps: int) -> None:
        good = logits_with_loss(0.5)
        for _ in range(num_steps):
            gate.watch(good, {"a": good, "b": good}, TARGETS)

    run(1)
    assert num_run() == [0, 0], "on its way"
    run(2)
    assert num_run() == [0, 0], "not there yet, and the next one waits for it"
    Arrival.has_happened = True
    run(3)
    assert num_run() == [1, 1]
    gate.renew("a")  # what is on its way tells of the version before
    Arrival.has_happened = True
    tally = gate.take_tally()[:, [0, NUM_COLUMNS // 2]] / (1 << 20)
    assert tally.tolist() == [[0, 5], [5, 0]]
    run(1)
    Arrival.has_happened = True
    assert num_run() == [0, 0] and Arrival.has_happened is False
    Arrival.has_happened = True
    assert num_run() == [1, 1]
    run(3)
    Arrival.has_happened = True
    assert num_run() == [0, 0]
    gate._forget("a")  # what is on its way has led to a verdict on it
    Arrival.has_happened = True
    assert num_run() == [0, 3]
