"""Rates, weight decay and the optimizers that take them: against formulas and against torch's own, step by step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from p2pcodistill.config import NodeConfig, TrainingConfig
from p2pcodistill.errors import ConfigError
from p2pcodistill.group.optimizer import learning_rate, make_optimizer, set_step, weight_decay
from p2pcodistill.strict import parse_model

# --- schedules ---------------------------------------------------------------------------------------------------


def test_the_cosine_starts_at_the_peak_and_ends_near_zero() -> None:
    config = TrainingConfig(num_steps=100, learning_rate=2.0)
    rates = [learning_rate(config, step) for step in range(100)]
    assert rates[0] == 2.0
    assert rates == sorted(rates, reverse=True)
    assert rates[50] == pytest.approx(1.0)
    assert 0 < rates[-1] < 1e-3


def test_a_linear_schedule_falls_by_the_same_amount_in_every_step() -> None:
    config = TrainingConfig(num_steps=100, learning_rate=2.0, learning_rate_schedule="linear")
    rates = [learning_rate(config, step) for step in range(101)]
    assert (rates[0], rates[-1]) == (2.0, 0.0)
    assert [a - b for a, b in itertools.pairwise(rates)] == pytest.approx([0.02] * 100)


def test_warm_up_and_constant_rate() -> None:
    config = TrainingConfig(
        num_steps=100, learning_rate=2.0, learning_rate_schedule="constant", warmup_steps=4
    )
    assert [learning_rate(config, step) for step in (0, 1, 3, 4, 99)] == [0.5, 1.0, 2.0, 2.0, 2.0]


def test_drops_multiply_the_rate_from_their_step_on() -> None:
    config = TrainingConfig(
        learning_rate=2.0, learning_rate_schedule="constant", learning_rate_drops=((10, 0.1), (20, 0.5))
    )
    rates = [learning_rate(config, step) for step in (0, 9, 10, 19, 20, 1000)]
    assert rates == pytest.approx([2.0, 2.0, 0.2, 0.2, 0.1, 0.1])


def test_the_rate_grows_with_the_batch_and_warms_up_from_what_it_is_for_the_reference() -> None:
    # Goyal et al. 2017: 0.1 for 256 examples; with 8 workers of 32 x 32 it is 3.2, reached from 0.1 in 5 steps.
    config = TrainingConfig(
        batch_size=1024,
        learning_rate=0.1,
        reference_batch_size=256,
        learning_rate_schedule="constant",
        warmup_steps=5,
    )
    rates = [learning_rate(config, step, num_workers=8) for step in range(7)]
    assert rates == pytest.approx([0.1 + 3.1 * share for share in (0.2, 0.4, 0.6, 0.8, 1, 1, 1)])
    alone = config.model_copy(update={"batch_size": 256, "warmup_steps": 0})
    assert learning_rate(alone, 0) == 0.1


def test_weight_decay_is_what_the_last_change_made_it() -> None:
    # Sodhani et al. 2020, section 4.
    config = TrainingConfig(weight_decay=1e-4, weight_decay_changes=((18, 1e-5), (38, 0.0)))
    assert [weight_decay(config, step) for step in (0, 17, 18, 37, 38, 90)] == [
        *(1e-4, 1e-4, 1e-5, 1e-5, 0.0, 0.0)
    ]


# --- optimizers --------------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A matrix, a norm's scale and biases, always the same."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 4), nn.LayerNorm(4), nn.Linear(4, 3))


def train(config: TrainingConfig, num_steps: int = 5) -> Small:
    model = Small()
    optimizer = make_optimizer(config, model)
    for step in range(num_steps):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        set_step(optimizer, config, step)
        optimizer.step()
    return model


def loss_of(model: Small, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    inputs, targets = torch.randn(6, 5, generator=generator), torch.randint(3, (6,), generator=generator)
    return nn.functional.cross_entropy(model.layers(inputs), targets)


CONSTANT: dict[str, Any] = {"learning_rate": 0.05, "learning_rate_schedule": "constant"}


@pytest.mark.parametrize(
    ("options", "reference"),
    [
        ({}, lambda p: torch.optim.Adam(p, lr=0.05, fused=True)),
        ({"weight_decay": 0.1}, lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1, fused=True)),
        ({"optimizer": "sgd"}, lambda p: torch.optim.SGD(p, lr=0.05)),
        (
            {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
            lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.1),
        ),
        ({"optimizer": "adagrad"}, lambda p: torch.optim.Adagrad(p, lr=0.05)),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_optimizers_are_those_of_torch(options: dict[str, Any], reference: Any) -> None:
    expected = Small()
    optimizer = reference(expected.parameters())
    for step in range(5):
        optimizer.zero_grad()
        loss_of(expected, step).backward()
        optimizer.step()
    model = train(TrainingConfig(**CONSTANT, **options))
    for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "adagrad"])
def test_biases_and_norms_can_be_spared_from_decay(optimizer: Any) -> None:
    common = TrainingConfig(**CONSTANT, optimizer=optimizer)
    plain = train(common, 1)
    decayed = train(common.model_copy(update={"weight_decay": 50.0}), 1)
    spared = train(common.model_copy(update={"weight_decay": 50.0, "decay_norms_and_biases": False}), 1)
    for name, of_spared in spared.named_parameters():
        same_as = decayed if of_spared.ndim >= 2 else plain
        assert torch.equal(of_spared, same_as.get_parameter(name)), name
    assert not torch.equal(plain.get_parameter("layers.0.weight"), spared.get_parameter("layers.0.weight"))
    assert not torch.equal(plain.get_parameter("layers.1.weight"), decayed.get_parameter("layers.1.weight"))


def test_decay_that_drops_to_zero_pulls_no_more() -> None:
    config = TrainingConfig(**CONSTANT, optimizer="sgd", weight_decay=0.5, weight_decay_changes=((1, 0.0),))
    model = Small()
    optimizer = make_optimizer(config, model)
    sizes = []
    for step in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        set_step(optimizer, config, step)
        optimizer.step()
        sizes.append(float(model.layers[0].weight.detach().norm()))
    assert sizes[0] == pytest.approx(float(Small().layers[0].weight.detach().norm()) * (1 - 0.05 * 0.5))
    assert sizes[1] == sizes[2] == sizes[0]


# --- what is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"momentum": 0.9}, "momentum and nesterov are for optimizer = \"sgd\", not 'adam'"),
        ({"optimizer": "sgd", "nesterov": True}, "set momentum, or remove nesterov"),
        ({"optimizer": "lamb"}, "training.optimizer: .*'adagrad', got 'lamb'"),
        ({"momentum": 1.0}, "training.momentum: .*less than 1"),
        ({"learning_rate_drops": [[20, 0.1], [10, 0.1]]}, r"in the order of their steps.*\[20, 10\]"),
        ({"weight_decay_changes": [[20, 0.1], [20, 0.1]]}, r"each once.*\[20, 20\]"),
        ({"learning_rate_drops": [[20, 0.0]]}, "learning_rate_drops.0.1: .*greater than 0"),
        ({"learning_rate_drops": [20, 0.1]}, "learning_rate_drops.0: .*array"),
        ({"label_smoothing": 1.0}, "training.label_smoothing: .*less than 1"),
        ({"label_smoothing_prior": "bigram"}, "label_smoothing_prior: .*'unigram', got 'bigram'"),
        ({"average_decay": 1.0}, "training.average_decay: .*less than 1"),
        ({"reference_batch_size": 0}, "training.reference_batch_size: .*equal to 1"),
    ],
)
def test_options_that_mean_nothing_are_refused_in_one_line(training: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        parse_model(NodeConfig, {"name": "berlin", "training": training}, source="berlin.toml")
    assert str(caught.value).startswith("berlin.toml: ") and "\n" not in str(caught.value)
