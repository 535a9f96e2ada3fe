"""The distillation losses against their definitions, written out."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from p2pcodistill.codistill.losses import Aggregation, DistillationLoss, distillation_loss

LOSSES: tuple[DistillationLoss, ...] = ("soft-cross-entropy", "kl", "squared-error")
AGGREGATIONS: tuple[Aggregation, ...] = ("mean-probabilities", "mean-logits", "mean-losses")


@pytest.fixture
def logits() -> tuple[Tensor, list[Tensor]]:
    """A student's and two teachers', of axes (batch, time, classes)."""
    generator = torch.Generator().manual_seed(0)
    return (
        torch.randn(2, 3, 5, generator=generator, requires_grad=True),
        [torch.randn(2, 3, 5, generator=generator, requires_grad=True) for _ in range(2)],
    )


def expected(
    student: Tensor, teachers: list[Tensor], loss: str, aggregation: str, temperature: float
) -> Tensor:
    """psi with weights (0.25, 0.75), one position and class at a time."""
    weights = (0.25, 0.75)
    student, teachers = student.double() / temperature, [t.double() / temperature for t in teachers]
    total = torch.zeros((), dtype=torch.float64)
    positions = list(itertools.product(range(2), range(3)))
    for b, t in positions:
        log_q = student[b, t].log_softmax(-1)
        ps = [teacher[b, t].softmax(-1) for teacher in teachers]
        zs = [teacher[b, t] for teacher in teachers]

        def compare(p: Tensor, z: Tensor, log_q: Tensor = log_q, student_z: Tensor = student[b, t]) -> Tensor:
            if loss == "squared-error":
                return ((student_z - z) ** 2).sum() / 5
            cross_entropy = -(p * log_q).sum()
            return cross_entropy + (p * p.log()).sum() if loss == "kl" else cross_entropy

        mean_z = weights[0] * zs[0] + weights[1] * zs[1]
        if aggregation == "mean-losses":
            psi = sum(w * compare(p, z) for w, p, z in zip(weights, ps, zs, strict=True))
        elif aggregation == "mean-logits":
            psi = compare(mean_z.softmax(-1), mean_z)
        else:
            psi = compare(weights[0] * ps[0] + weights[1] * ps[1], mean_z)
        total = total + psi
    return total / len(positions) * temperature**2


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_equals_its_definition(
    logits: tuple[Tensor, list[Tensor]],
    loss: DistillationLoss,
    aggregation: Aggregation,
    temperature: float,
) -> None:
    student, teachers = logits
    psi = distillation_loss(
        student, teachers, [0.25, 0.75], loss=loss, aggregation=aggregation, temperature=temperature
    )
    definition = expected(student, teachers, loss, aggregation, temperature).float()
    torch.testing.assert_close(psi, definition, rtol=1e-5, atol=1e-6)
    assert psi.dtype == torch.float32
    psi.backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert all(teacher.grad is None for teacher in teachers)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_kl_has_the_gradient_of_the_cross_entropy(
    logits: tuple[Tensor, list[Tensor]], aggregation: Aggregation
) -> None:
    student, teachers = logits
    gradients = [
        torch.autograd.grad(
            distillation_loss(student, teachers, [0.5, 0.5], loss=loss, aggregation=aggregation), student
        )[0]
        for loss in ("soft-cross-entropy", "kl")
    ]
    torch.testing.assert_close(gradients[0], gradients[1])


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", ["kl", "squared-error"])
def test_is_zero_where_all_agree(loss: DistillationLoss, aggregation: Aggregation) -> None:
    logits = torch.randn(4, 6)
    psi = distillation_loss(logits, [logits, logits], [0.4, 0.6], loss=loss, aggregation=aggregation)
    assert abs(psi.item()) < 1e-6


@given(
    st.sampled_from(LOSSES),
    st.sampled_from(AGGREGATIONS),
    st.integers(1, 3),
    st.floats(0.1, 10.0),
    st.floats(0.0, 200.0),
)
def test_is_finite_and_not_negative(
    loss: DistillationLoss, aggregation: Aggregation, num_teachers: int, temperature: float, scale: float
) -> None:
    generator = torch.Generator().manual_seed(1)
    student, *teachers = (scale * torch.randn(3, 7, generator=generator) for _ in range(num_teachers + 1))
    student.requires_grad_()
    psi = distillation_loss(
        student,
        teachers,
        [1 / num_teachers] * num_teachers,
        loss=loss,
        aggregation=aggregation,
        temperature=temperature,
    )
    psi.backward()
    assert torch.isfinite(psi) and psi.item() > -1e-3 * temperature**2
    assert student.grad is not None and torch.isfinite(student.grad).all()


def test_certain_teachers_have_a_finite_divergence() -> None:
    student = torch.zeros(1, 3, requires_grad=True)
    teacher = torch.tensor([[200.0, -200.0, -200.0]])  # probabilities of exactly 0
    psi = distillation_loss(student, [teacher], [1.0], loss="kl")
    torch.testing.assert_close(psi, torch.log(torch.tensor(3.0)))


def test_computes_in_float32_under_autocast() -> None:
    student, teacher = torch.randn(8, 50), torch.randn(8, 50)
    exact = distillation_loss(student, [teacher], [1.0], loss="squared-error")
    with torch.autocast("cpu", torch.bfloat16):
        psi = distillation_loss(student, [teacher], [1.0], loss="squared-error")
        low = distillation_loss(student.bfloat16(), [teacher.bfloat16()], [1.0])
    assert torch.equal(psi, exact)
    assert low.dtype == torch.float32


@pytest.mark.parametrize("loss", ["soft-cross-entropy", "kl"])
@pytest.mark.parametrize("shape", [(), (5,), (5, 1), (0,)])
def test_logits_that_are_no_distributions_are_refused(loss: DistillationLoss, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="two or more classes"):
        distillation_loss(torch.zeros(shape), [torch.zeros(shape)], [1.0], loss=loss)


@pytest.mark.parametrize("shape", [(), (5,), (5, 1)])
def test_squared_error_compares_any_numbers(shape: tuple[int, ...]) -> None:
    psi = distillation_loss(torch.zeros(shape), [torch.full(shape, 2.0)], [1.0], loss="squared-error")
    assert psi.item() == 4.0


class Operations(TorchDispatchMode):
    """Records the names of all operations on tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("loss", LOSSES)
def test_nothing_waits_for_the_device(
    logits: tuple[Tensor, list[Tensor]], loss: DistillationLoss, aggregation: Aggregation
) -> None:
    student, teachers = logits
    with Operations() as operations:
        distillation_loss(student, teachers, [0.25, 0.75], loss=loss, aggregation=aggregation)
    # A tensor made from Python numbers is copied to the device, a number taken from a tensor is copied from it.
    assert operations.names
    assert not {"aten::lift_fresh", "aten::_to_copy", "aten::_local_scalar_dense"} & set(operations.names)


def test_names_the_shapes_that_differ() -> None:
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 5\)"):
        distillation_loss(torch.zeros(2, 5), [torch.zeros(2, 4)], [1.0])
