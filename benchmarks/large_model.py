"""A model of 100 M parameters, which the timings of whole exchanges share. It needs torch alone: other venvs use it, too."""

from __future__ import annotations

import torch
from torch import nn

EMBEDDING_SIZE = 1024
NUM_LAYERS = 10
WEIGHT_RMS = 0.02
RELATIVE_CHANGE = 0.065
"""Of the weights (rms) in 50 steps of the demo's model, in the middle of its training."""


class LargeModel(nn.Module):
    """The weights of a small language model in fp32, normally distributed: 100,716,544 parameters in 43 tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.utils.skip_init(nn.Embedding, 16_384, EMBEDDING_SIZE)
        self.layers = nn.ModuleList()
        for _ in range(NUM_LAYERS):
            self.layers.append(nn.utils.skip_init(nn.Linear, EMBEDDING_SIZE, 4 * EMBEDDING_SIZE))
            self.layers.append(nn.utils.skip_init(nn.Linear, 4 * EMBEDDING_SIZE, EMBEDDING_SIZE))
        self.norm = nn.LayerNorm(EMBEDDING_SIZE)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, WEIGHT_RMS, generator=generator)

    @torch.no_grad()
    def change(self, generator: torch.Generator | None = None) -> None:
        """Move the weights about as far as training does between two exchanges."""
        for parameter in self.parameters():
            noise = torch.empty_like(parameter).normal_(0, RELATIVE_CHANGE * WEIGHT_RMS, generator=generator)
            parameter.add_(noise)


def num_parameters(model: nn.Module) -> int:
    """Of the whole model."""
    return sum(parameter.numel() for parameter in model.parameters())
