"""The transformer: causal, within its window, and tied weights that travel once."""

from __future__ import annotations

import torch

from p2pcodistill.checkpoint.snapshot import take_snapshot
from p2pcodistill.task_configs import LanguageModelConfig
from p2pcodistill.tasks.transformer import TransformerModel

CONFIG = LanguageModelConfig(model="transformer", hidden_size=16, num_layers=2, num_heads=2, window_tokens=6)


def model_of(num_tokens: int = 32) -> TransformerModel:
    torch.manual_seed(0)
    return TransformerModel(CONFIG, num_tokens)


def test_a_prediction_sees_what_is_before_it_and_nothing_else() -> None:
    model = model_of()
    tokens_BT = torch.randint(32, (2, 6))
    logits_BTV, state = model(tokens_BT)
    assert state is None
    changed_BT = tokens_BT.clone()
    changed_BT[:, 3] = (changed_BT[:, 3] + 1) % 32
    changed_BTV, _ = model(changed_BT)
    torch.testing.assert_close(changed_BTV[:, :3], logits_BTV[:, :3])
    assert not torch.isclose(changed_BTV[:, 3:], logits_BTV[:, 3:]).all(-1).any()
    torch.testing.assert_close(model(tokens_BT[:, :4])[0], logits_BTV[:, :4])


def test_at_first_it_knows_nothing() -> None:
    probabilities_BTV = model_of()(torch.randint(32, (4, 6)))[0].softmax(-1)
    assert 0.5 / 32 < probabilities_BTV.min() <= probabilities_BTV.max() < 2 / 32


def test_the_embedding_is_the_read_out_and_travels_once() -> None:
    snapshot = take_snapshot(model_of(), 0)
    assert snapshot.aliases == {"readout.weight": "embedding.weight"}


def test_every_parameter_learns() -> None:
    model = model_of()
    logits_BTV, _ = model(torch.randint(32, (2, 6)))
    logits_BTV.log_softmax(-1)[..., 0].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
