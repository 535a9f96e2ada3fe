"""A small transformer language model: causal, pre-norm, learned positions, tied embeddings. It carries no state.

What it predicts from is the window alone: longer windows than an LSTM's are in order.

Axes of tensors: B documents (streams), T tokens of a window, V tokens of the vocabulary, N heads, D features of a head,
H features of all heads.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from p2pcodistill.task_configs import LanguageModelConfig

_INITIAL_STD = 0.02
_MLP_FACTOR = 4


class TransformerModel(nn.Module):
    """Called as `model(tokens_BT, state)`, like a recurrent model; the state is None."""

    def __init__(self, config: LanguageModelConfig, num_tokens: int) -> None:
        super().__init__()
        width = config.hidden_size
        self.embedding = nn.Embedding(num_tokens, width)
        self.positions = nn.Embedding(config.window_tokens, width)
        self.blocks = nn.ModuleList(_Block(width, config.num_heads) for _ in range(config.num_layers))
        self.norm = nn.LayerNorm(width)
        self.readout = nn.Linear(width, num_tokens, bias=False)
        self.readout.weight = self.embedding.weight
        self._initialise(config.num_layers)

    def _initialise(self, num_layers: int) -> None:
        """As GPT-2: small normal weights, smaller ones where a block adds to the residual stream."""
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            adds = name.endswith(("attention.output.weight", "shrink.weight"))
            nn.init.normal_(parameter, std=_INITIAL_STD / math.sqrt(2 * num_layers) if adds else _INITIAL_STD)

    def forward(self, tokens_BT: Tensor, state: None = None) -> tuple[Tensor, None]:
        """(logits_BTV, None): at most a window of tokens, each predicted from those before it in the window."""
        positions_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        features_BTH = self.embedding(tokens_BT) + self.positions(positions_T)
        for block in self.blocks:
            features_BTH = block(features_BTH)
        logits_BTV: Tensor = self.readout(self.norm(features_BTH))
        return logits_BTV, None


class _Block(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = _CausalAttention(width, num_heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.grow = nn.Linear(width, _MLP_FACTOR * width)
        self.shrink = nn.Linear(_MLP_FACTOR * width, width)

    def forward(self, features_BTH: Tensor) -> Tensor:
        features_BTH = features_BTH + self.attention(self.norm_attention(features_BTH))
        hidden = functional.gelu(self.grow(self.norm_mlp(features_BTH)))
        added_BTH: Tensor = self.shrink(hidden)
        return features_BTH + added_BTH


class _CausalAttention(nn.Module):
    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self._num_heads = num_heads
        self.query_key_value = nn.Linear(width, 3 * width)
        self.output = nn.Linear(width, width)

    def forward(self, features_BTH: Tensor) -> Tensor:
        batch_size, num_tokens, width = features_BTH.shape
        query_BNTD, key_BNTD, value_BNTD = (
            part.view(batch_size, num_tokens, self._num_heads, -1).transpose(1, 2)
            for part in self.query_key_value(features_BTH).chunk(3, -1)
        )
        mixed_BNTD = functional.scaled_dot_product_attention(query_BNTD, key_BNTD, value_BNTD, is_causal=True)
        mixed_BTH = mixed_BNTD.transpose(1, 2).reshape(batch_size, num_tokens, width)
        output_BTH: Tensor = self.output(mixed_BTH)
        return output_BTH
