"""Burn-in, ramp and the steps at which something is due."""

from __future__ import annotations

import pytest

from p2pcodistill.codistill.schedule import (
    agreement_is_due,
    averaging_is_due,
    distillation_weight,
    exchange_is_due,
    teachers_due,
)
from p2pcodistill.config import CodistillationConfig


def test_burn_in_has_exactly_its_steps_without_distillation() -> None:
    config = CodistillationConfig(burn_in_steps=3, weight=0.5)
    assert [distillation_weight(config, step) for step in range(5)] == [0, 0, 0, 0.5, 0.5]


def test_no_burn_in_distils_at_once() -> None:
    assert distillation_weight(CodistillationConfig(burn_in_steps=0), 0) == 1.0


def test_the_ramp_grows_linearly_to_the_weight() -> None:
    config = CodistillationConfig(burn_in_steps=2, ramp_steps=4, weight=2.0)
    weights = [distillation_weight(config, step) for step in range(8)]
    assert weights == pytest.approx([0, 0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0])


def test_exchange_is_due_at_multiples_of_its_interval_but_not_before_the_first_update() -> None:
    config = CodistillationConfig(burn_in_steps=0, exchange_interval_steps=4)
    assert [step for step in range(13) if exchange_is_due(config, step)] == [4, 8, 12]


@pytest.mark.parametrize(("burn_in_steps", "steps"), [(7, [7, 8, 12]), (8, [8, 12]), (9, [9, 12])])
def test_a_student_is_a_teacher_from_the_end_of_its_burn_in_on(burn_in_steps: int, steps: list[int]) -> None:
    config = CodistillationConfig(burn_in_steps=burn_in_steps, exchange_interval_steps=4)
    assert [step for step in range(13) if exchange_is_due(config, step)] == steps


@pytest.mark.parametrize(("burn_in_steps", "first_step"), [(0, 1), (4, 1), (7, 4), (8, 5)])
def test_averaging_begins_an_interval_before_the_end_of_burn_in(burn_in_steps: int, first_step: int) -> None:
    config = CodistillationConfig(
        burn_in_steps=burn_in_steps, exchange_interval_steps=4, teacher_average_decay=0.9
    )
    assert [step for step in range(1, 13) if averaging_is_due(config, step)] == list(range(first_step, 13))


def test_without_a_decay_nothing_is_averaged() -> None:
    assert not any(averaging_is_due(CodistillationConfig(burn_in_steps=0), step) for step in range(100))


def test_tables_of_teachers_are_used_in_turn_an_exchange_interval_each() -> None:
    config = CodistillationConfig(exchange_interval_steps=3)
    tables = [{"a": 1.0}, {"b": 2.0}]
    due = [teachers_due(config, tables, num_steps) for num_steps in range(9)]
    assert due == [{"a": 1.0}] * 3 + [{"b": 2.0}] * 3 + [{"a": 1.0}] * 3
    assert teachers_due(config, [], 5) == {}


def test_agreement_is_due_at_multiples_of_its_interval() -> None:
    config = CodistillationConfig(agreement_interval_steps=3)
    assert [step for step in range(1, 10) if agreement_is_due(config, step)] == [3, 6, 9]
