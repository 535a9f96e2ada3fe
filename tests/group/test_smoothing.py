"""Label smoothing: against torch's own for the uniform prior, against counting for the unigram."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional

from p2pcodistill.config import TrainingConfig
from p2pcodistill.errors import ConfigError
from p2pcodistill.group.smoothing import LabelSmoothing

CPU = torch.device("cpu")


def smoothing(prior: str = "uniform", share: float = 0.3) -> LabelSmoothing:
    return LabelSmoothing(
        TrainingConfig.model_validate({"label_smoothing": share, "label_smoothing_prior": prior})
    )


def test_uniform_smoothing_is_that_of_torch() -> None:
    logits, targets = torch.randn(6, 4, 5), torch.randint(5, (6, 4))
    loss = functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
    expected = functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), label_smoothing=0.3)
    torch.testing.assert_close(smoothing().smooth(loss, logits, targets), expected)


def test_the_unigram_prior_is_how_often_each_label_came() -> None:
    unigram = smoothing("unigram")
    logits = torch.zeros(4, 3)
    loss = torch.tensor(0.0)
    unigram.smooth(loss, logits, torch.tensor([0, 0, 0, 1]))
    # One of each to begin with, then 0, 0, 0, 1 and 0, 0, 2, 2: 6, 2 and 3 of 11.
    for label, probability in ((0, 6 / 11), (1, 2 / 11), (2, 3 / 11)):
        certain = torch.zeros(4, 3)
        certain[:, label] = -50.0
        counting = smoothing("unigram")
        counting.load_state_dict({"counts": unigram.state_dict()["counts"].clone()}, CPU)
        counted = counting.smooth(loss, certain, torch.tensor([0, 0, 2, 2]))
        others = float(torch.log(torch.tensor(2.0)))
        assert float(counted) == pytest.approx(0.3 * (probability * 50.0 + others), rel=1e-4)


def test_its_counts_are_state() -> None:
    unigram = smoothing("unigram")
    logits, targets = torch.randn(8, 5), torch.tensor([1, 1, 1, 1, 2, 2, 3, 4])
    assert unigram.state_dict() == {"counts": None}
    unigram.smooth(torch.tensor(1.0), logits, targets)
    resumed = smoothing("unigram")
    resumed.load_state_dict({"counts": unigram.state_dict()["counts"].clone()}, CPU)
    both = [s.smooth(torch.tensor(1.0), logits, targets) for s in (unigram, resumed)]
    assert torch.equal(*both)
    assert not torch.equal(both[0], smoothing("unigram").smooth(torch.tensor(1.0), logits, targets))


def test_without_a_share_the_loss_is_the_loss() -> None:
    loss = torch.tensor(1.5)
    assert smoothing(share=0.0).smooth(loss, torch.randn(2, 3), "anything") is loss


@pytest.mark.parametrize("prior", ["uniform", "unigram"])
def test_examples_without_labels_are_left_out(prior: str) -> None:
    logits, targets = torch.randn(6, 4, 5), torch.randint(5, (3, 4))
    loss = torch.tensor(1.0)
    labelled = smoothing(prior).smooth(loss, logits[:3], targets)
    assert torch.equal(smoothing(prior).smooth(loss, logits, targets), labelled)


@pytest.mark.parametrize("targets", [torch.rand(6), torch.rand(6, 5), torch.zeros(6, 5, dtype=torch.long)])
def test_targets_that_are_no_classes_have_no_unigram(targets: torch.Tensor) -> None:
    with pytest.raises(ConfigError, match=r'"unigram" needs targets that are class numbers.*use "uniform"'):
        smoothing("unigram").smooth(torch.tensor(1.0), torch.randn(6, 5), targets)
