"""Recurrent language models: a plain LSTM, and the paper's with layer normalisation (Anil et al. 2018, section 3.1).

Both are called as `model(tokens_BT, state)` and return the logits of each next token and the state behind the window, from
which the next window goes on.

Axes of tensors: B documents (streams), T tokens of a window, V tokens of the vocabulary, L layers, E inputs,
H hidden units.
"""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor, nn

from p2pcodistill.task_configs import LanguageModelConfig

NUM_BYTE_VALUES = 256

Hidden: TypeAlias = tuple[Tensor, Tensor]
"""An LSTM's (h, c): of all layers (h_LBH, c_LBH), of one layer (h_BH, c_BH)."""


class LSTMModel(nn.Module):
    """Embedding, LSTM, linear read-out. 938,240 parameters as configured by default, over bytes."""

    def __init__(self, config: LanguageModelConfig, num_tokens: int = NUM_BYTE_VALUES) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, config.embedding_size)
        self.lstm = nn.LSTM(config.embedding_size, config.hidden_size, config.num_layers, batch_first=True)
        self.readout = nn.Linear(config.hidden_size, num_tokens)

    def forward(self, tokens_BT: Tensor, hidden: Hidden | None = None) -> tuple[Tensor, Hidden]:
        """(logits_BTV, hidden) after the tokens, from `hidden` before them (None: zeros)."""
        features_BTH, hidden = self.lstm(self.embedding(tokens_BT), hidden)
        logits_BTV: Tensor = self.readout(features_BTH)
        return logits_BTV, hidden


class LayerNormLSTMModel(nn.Module):
    """The same with layer normalisation inside the cell.

    PyTorch has no such LSTM, and this one is a loop over time. On a CPU core a training step takes 1.5 times as long as with
    `nn.LSTM` at the default size, 1.2 times with the paper's 1024 units. On a GPU, where `nn.LSTM` is one cuDNN call, it was
    not measured.
    """

    def __init__(self, config: LanguageModelConfig, num_tokens: int = NUM_BYTE_VALUES) -> None:
        super().__init__()
        self.embedding = nn.Embedding(num_tokens, config.embedding_size)
        widths = [config.embedding_size, *[config.hidden_size] * (config.num_layers - 1)]
        self.layers = nn.ModuleList(_LayerNormLSTMLayer(width, config.hidden_size) for width in widths)
        self.readout = nn.Linear(config.hidden_size, num_tokens)

    def forward(self, tokens_BT: Tensor, hidden: Hidden | None = None) -> tuple[Tensor, Hidden]:
        """(logits_BTV, hidden) after the tokens, from `hidden` before them (None: zeros)."""
        features = self.embedding(tokens_BT)
        before = [None] * len(self.layers) if hidden is None else list(zip(*hidden, strict=True))
        after: list[Hidden] = []
        for layer, state in zip(self.layers, before, strict=True):
            features, state = layer(features, state)
            after.append(state)
        logits_BTV: Tensor = self.readout(features)
        h_LBH, c_LBH = (torch.stack(parts) for parts in zip(*after, strict=True))
        return logits_BTV, (h_LBH, c_LBH)


class _LayerNormLSTMLayer(nn.Module):
    """One layer, after Ba et al. 2016 (equations 20 to 22): both parts of the gates' input and the cell are normalised."""

    def __init__(self, input_size: int, hidden_size: int) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.from_input = nn.Linear(input_size, 4 * hidden_size, bias=False)
        self.from_hidden = nn.Linear(hidden_size, 4 * hidden_size, bias=False)
        self.norm_input = nn.LayerNorm(4 * hidden_size)
        self.norm_hidden = nn.LayerNorm(4 * hidden_size, bias=False)  # the other norm's bias is added to it
        self.norm_cell = nn.LayerNorm(hidden_size)
        with torch.no_grad():  # at first, a cell remembers
            self.norm_input.bias[hidden_size : 2 * hidden_size] = 1.0

    def forward(self, features_BTE: Tensor, hidden: Hidden | None) -> tuple[Tensor, Hidden]:
        inputs_BTG = self.norm_input(self.from_input(features_BTE))  # G: the four gates of each unit
        if hidden is None:
            zeros_BH = inputs_BTG.new_zeros(len(inputs_BTG), self.hidden_size)
            hidden = (zeros_BH, zeros_BH)
        h_BH, c_BH = hidden
        outputs: list[Tensor] = []
        for inputs_BG in inputs_BTG.unbind(1):
            gates_BG = inputs_BG + self.norm_hidden(self.from_hidden(h_BH))
            enter_BH, keep_BH, leave_BH, new_BH = gates_BG.chunk(4, -1)
            c_BH = keep_BH.sigmoid() * c_BH + enter_BH.sigmoid() * new_BH.tanh()
            h_BH = leave_BH.sigmoid() * self.norm_cell(c_BH).tanh()
            outputs.append(h_BH)
        return torch.stack(outputs, 1), (h_BH, c_BH)
