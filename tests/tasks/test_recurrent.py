"""The recurrent models: their sizes, and that a carried state is all there is to know of what was read."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from p2pcodistill.task_configs import LanguageModelConfig
from p2pcodistill.tasks.recurrent import LayerNormLSTMModel, LSTMModel

SMALL = LanguageModelConfig(embedding_size=4, hidden_size=8)
MODELS = pytest.mark.parametrize("make", [LSTMModel, LayerNormLSTMModel])


def test_the_default_model_has_its_documented_size_and_draws() -> None:
    torch.manual_seed(7)
    model = LSTMModel(LanguageModelConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 938_240
    torch.manual_seed(7)
    plain = [nn.Embedding(256, 64), nn.LSTM(64, 256, 2, batch_first=True), nn.Linear(256, 256)]
    expected = [parameter for part in plain for parameter in part.parameters()]
    assert all(map(torch.equal, model.parameters(), expected)), "runs of old seeds can be repeated"


def test_the_papers_model_has_the_papers_size() -> None:
    config = LanguageModelConfig(
        model="layer-norm-lstm", embedding_size=256, hidden_size=1024, num_layers=2, window_tokens=32
    )
    with torch.device("meta"):
        model = LayerNormLSTMModel(config, 24_006)
    weights = {name: parameter for name, parameter in model.named_parameters() if parameter.ndim == 2}
    assert sum(parameter.numel() for parameter in weights.values()) == (
        24_006 * 256 + 4 * 1024 * (256 + 3 * 1024) + 1024 * 24_006
    )


@MODELS
def test_windows_with_a_carried_state_equal_one_long_window(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = make(SMALL)
    text_BT = torch.randint(256, (3, 12))
    whole, _ = model(text_BT)
    first, hidden = model(text_BT[:, :5])
    second, _ = model(text_BT[:, 5:], hidden)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)
    assert [tuple(tensor.shape) for tensor in hidden] == [(2, 3, 8)] * 2


def test_the_layer_normalised_cell_is_the_one_of_ba_et_al() -> None:
    torch.manual_seed(0)
    model = LayerNormLSTMModel(LanguageModelConfig(embedding_size=4, hidden_size=8, num_layers=1), 16)
    layer = model.layers[0]
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    inputs_BT = torch.randint(16, (2, 3))
    logits_BTV, (h_LBH, c_LBH) = model(inputs_BT)

    def normalise(values: torch.Tensor, gain: torch.Tensor) -> torch.Tensor:
        centred = values - values.mean(-1, keepdim=True)
        return gain * centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    h = c = torch.zeros(2, 8)
    for step in range(3):
        x = model.embedding.weight[inputs_BT[:, step]]
        gates = (
            normalise(x @ layer.from_input.weight.T, layer.norm_input.weight)
            + normalise(h @ layer.from_hidden.weight.T, layer.norm_hidden.weight)
            + layer.norm_input.bias
        )
        i, f, o, g = gates.split(8, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(normalise(c, layer.norm_cell.weight) + layer.norm_cell.bias)
        torch.testing.assert_close(
            logits_BTV[:, step], h @ model.readout.weight.T + model.readout.bias, rtol=1e-4, atol=1e-4
        )
    torch.testing.assert_close((h_LBH[0], c_LBH[0]), (h, c), rtol=1e-4, atol=1e-4)


@MODELS
def test_every_parameter_learns(make: type[nn.Module]) -> None:
    torch.manual_seed(0)
    model = make(SMALL)
    logits_BTV, _ = model(torch.randint(256, (2, 5)))
    logits_BTV.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
