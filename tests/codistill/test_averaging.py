"""The average of the student: what is in it, and what is published of it."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from p2pcodistill.checkpoint.snapshot import take_snapshot
from p2pcodistill.codistill.averaging import WeightAverage


def set_weight(model: nn.Module, value: float) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(value)


def averaged(model: nn.Module, decay: float, values: list[float]) -> WeightAverage:
    average = WeightAverage(model, decay)
    for value in values:
        set_weight(model, value)
        average.update()
    return average


def published(average: WeightAverage, name: str = "weight") -> float:
    tensor = average.take_snapshot(1).tensors[name]
    assert (tensor == tensor.flatten()[0]).all()
    return float(tensor.flatten()[0])


def test_the_first_steps_count_alike_and_older_ones_fade() -> None:
    model = nn.Linear(2, 2)
    assert published(averaged(model, 0.9, [5.0])) == 5.0
    assert published(averaged(model, 0.9, [1.0, 2.0, 6.0])) == pytest.approx(3.0)
    expected = sum(range(10)) / 10
    for value in (20.0, 30.0):
        expected = 0.9 * expected + 0.1 * value
    assert published(averaged(model, 0.9, [*map(float, range(10)), 20.0, 30.0])) == pytest.approx(expected)


def test_what_is_published_has_the_students_schema() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.BatchNorm1d(3), nn.Linear(3, 4, bias=False))
    model[2].weight = model[0].weight
    average = averaged(model, 0.5, [1.0, 2.0])
    model(torch.arange(4))  # moves the running statistics
    snapshot, plain = average.take_snapshot(7), take_snapshot(model, 7)
    assert snapshot.schema_hash == plain.schema_hash and snapshot.step == 7
    assert (snapshot.aliases, snapshot.buffers) == (plain.aliases, plain.buffers)
    assert set(plain.aliases) == {"2.weight"}
    assert snapshot.tensors["1.num_batches_tracked"] == 1, "counters are the model's"
    assert (snapshot.tensors["0.weight"] == 1.5).all() and (plain.tensors["0.weight"] == 2).all()


def statistics(*means: float) -> tuple[nn.BatchNorm1d, WeightAverage]:
    """A norm whose mean took these values, step by step, and its average."""
    model = nn.BatchNorm1d(3)
    average = WeightAverage(model, 0.5)
    for mean in means:
        model.running_mean = torch.full((3,), mean)  # another tensor, as some modules do
        average.update()
    return model, average


def test_statistics_are_averaged_with_the_weights_that_they_belong_to() -> None:
    model, average = statistics(1.0, 2.0, 4.0)
    assert published(average, "running_mean") == 0.5 * 1.5 + 0.5 * 4
    norm = average.model()
    assert isinstance(norm, nn.BatchNorm1d) and norm.running_mean is not None
    assert norm.running_mean.tolist() == [2.75] * 3
    assert model.running_mean is not None and model.running_mean.tolist() == [4.0] * 3


def test_averaged_statistics_resume_to_the_last_bit() -> None:
    means = [0.1, 0.7, 0.3, 1.9]
    _, straight = statistics(*means)
    model, begun = statistics(*means[:2])
    resumed = WeightAverage(model, 0.5)
    resumed.load_state_dict(copy.deepcopy(begun.state_dict()))
    for mean in means[2:]:
        model.running_mean = torch.full((3,), mean)
        resumed.update()
    assert published(resumed, "running_mean") == published(straight, "running_mean")


def test_masks_stay_masks_and_what_is_not_persistent_is_the_models() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("mask", torch.tensor([0.0, -torch.inf]))
    model.register_buffer("cache", torch.zeros(1), persistent=False)
    average = averaged(model, 0.5, [1.0, 2.0, 3.0])
    model.cache = torch.ones(5)
    assert average.take_snapshot(1).tensors["mask"].tolist() == [0.0, -torch.inf]
    assert average.model().cache is model.cache


def test_the_student_does_not_notice() -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 3)
    before = copy.deepcopy(model.state_dict())
    average = WeightAverage(model, 0.9)
    average.update()
    average.take_snapshot(1)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_parameters_that_were_given_other_memory_are_followed() -> None:
    model = nn.Linear(2, 2)
    average = WeightAverage(model, 0.9)
    model.weight.data = torch.full((2, 2), 3.0)  # as Module.to does
    average.update()
    assert published(average) == 3.0


def test_small_steps_are_not_lost_in_half_precision() -> None:
    model = nn.Linear(2, 2).bfloat16()
    average = averaged(model, 0.99, [1.0] * 100 + [1.0078125] * 400)  # the next number in bfloat16
    snapshot = average.take_snapshot(1)
    assert snapshot.tensors["weight"].dtype == torch.bfloat16
    assert published(average) == 1.0078125


def test_parameters_that_are_no_floats_are_published_as_they_are() -> None:
    model = nn.Linear(2, 2)
    model.table = nn.Parameter(torch.tensor([1, 2]), requires_grad=False)
    average = WeightAverage(model, 0.9)
    average.update()
    with torch.no_grad():
        model.table += 1
    assert average.take_snapshot(1).tensors["table"].tolist() == [2, 3]


def test_it_goes_on_from_a_saved_state() -> None:
    model = nn.Linear(2, 2)
    straight = averaged(model, 0.7, [1.0, 2.0, 3.0, 4.0])
    resumed = WeightAverage(model, 0.7)
    resumed.load_state_dict(copy.deepcopy(averaged(model, 0.7, [1.0, 2.0]).state_dict()))
    for value in (3.0, 4.0):
        set_weight(model, value)
        resumed.update()
    assert published(resumed) == published(straight)


def test_nothing_is_saved_before_it_has_begun() -> None:
    model = nn.Linear(2, 2)
    state = WeightAverage(model, 0.9).state_dict()
    assert state == {"num_steps": 0, "tensors": {}}
    average = WeightAverage(model, 0.9)
    average.load_state_dict(state)
    assert not average.has_begun
