"""The two ways of training that the benchmark of virtual steps compares come to the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks.virtual_steps import Batched, OneByOne, VirtualRun, make_models, make_spec
from p2pcodistill.config import GroupSpec

NUM_STEPS = 4


@pytest.fixture
def specs(tmp_path: Path) -> list[GroupSpec]:
    # SGD: Adam makes a whole step of a gradient that is rounding alone.
    changes = {"optimizer": "sgd", "learning_rate": 0.5, "max_gradient_norm": 0.3}
    specs = [make_spec(index, tmp_path / f"{index}", batch_size=8) for index in range(3)]
    return [spec.model_copy(update={"training": spec.training.model_copy(update=changes)}) for spec in specs]


@pytest.mark.parametrize("has_teachers", [False, True])
def test_models_train_batched_as_one_by_one(specs: list[GroupSpec], has_teachers: bool) -> None:
    teachers = [model.eval().requires_grad_(False) for model in make_models(specs)] if has_teachers else []
    apart, batched = OneByOne(specs, teachers), Batched(specs, teachers)
    for _ in range(NUM_STEPS):
        apart.step()
        batched.step()
    starts = make_models(specs)
    for name, stacked in zip(batched.names, batched.stacked, strict=True):
        for index, (model, start) in enumerate(zip(apart.models, starts, strict=True)):
            own = model.get_parameter(name)
            assert not torch.equal(own, start.get_parameter(name))
            torch.testing.assert_close(stacked[index], own, rtol=1e-4, atol=1e-5)


def test_one_by_one_is_what_a_virtual_run_trains(specs: list[GroupSpec]) -> None:
    apart, run = OneByOne(specs), VirtualRun(specs)
    for _ in range(NUM_STEPS):
        apart.step()
        run.step()
    for model, learner in zip(apart.models, run.learners, strict=True):
        for own, theirs in zip(model.parameters(), learner.model.parameters(), strict=True):
            assert torch.equal(own, theirs)
