"""The second model of the benchmarks: a small convolutional network with batch norm, which tells letters in images apart.

The images are made here, from fonts that matplotlib brings along: a random character in a random font, turned, sheared,
scaled and moved at random, with noise. Axes: B images, H and W pixels, C channels.
"""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torch.nn import functional

CHARACTERS = "ABCDEFGHJKLMNPQRSTUVWXYZabdefghnqrt23456789"
_FONTS = ("DejaVuSans", "DejaVuSans-Bold", "DejaVuSansMono", "DejaVuSerif", "STIXGeneral", "STIXGeneralBol",
          "DejaVuSans-Oblique", "DejaVuSerif-Italic", "STIXGeneralItalic", "cmr10", "cmss10", "cmtt10")  # fmt: skip
_GLYPH_PIXELS = 24
_NOISE = 0.25
_NUM_HELD_OUT = 1024
_HELD_OUT_SEED = 7


class LetterNet(nn.Module):
    """Four convolutions with batch norm and two linear layers: 326,043 parameters."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        widths = (1, 16, 32, 64, 256)
        for num_in, num_out in itertools.pairwise(widths):
            layers += [
                nn.Conv2d(num_in, num_out, 3, padding=1, bias=False),
                nn.BatchNorm2d(num_out),
                nn.ReLU(),
                nn.MaxPool2d(2),
            ]
        self.features = nn.Sequential(*layers)
        self.hidden = nn.Linear(widths[-1], 512)
        self.norm = nn.BatchNorm1d(512)
        self.readout = nn.Linear(512, len(CHARACTERS))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """Logits of each character."""
        features = self.features(images_BCHW).flatten(1)
        return self.readout(functional.relu(self.norm(self.hidden(features))))


class LettersTask:
    """What `training` needs of a `group.task.Task`. The seed is the site's; images are never repeated."""

    def __init__(self, *, batch_size: int, seed: int) -> None:
        self._glyphs = torch.from_numpy(_draw_glyphs())
        self._batch_size = batch_size
        self._generator = torch.Generator().manual_seed(seed)
        held_out = torch.Generator().manual_seed(_HELD_OUT_SEED)
        self._held_out = self._make_images(_NUM_HELD_OUT, held_out)

    def make_model(self) -> nn.Module:
        """A new model, from torch's random state."""
        return LetterNet()

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """(images_BCHW, labels_B)."""
        return self._make_images(self._batch_size, self._generator)

    def forward(self, model: nn.Module, inputs: Any, state: Any) -> tuple[Tensor, Any]:
        """A `codistill.teachers.Forward`, without state."""
        return model(inputs), state

    def loss(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Mean nats per image."""
        return functional.cross_entropy(logits.float(), targets)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Mean nats per held-out image."""
        images, labels = self._held_out
        losses = [
            float(self.loss(model(images[start : start + 256]), labels[start : start + 256]))
            for start in range(0, len(images), 256)
        ]
        return math.fsum(losses) / len(losses)

    def _make_images(self, num_images: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        labels = torch.randint(len(CHARACTERS), (num_images,), generator=generator)
        fonts = torch.randint(len(_FONTS), (num_images,), generator=generator)
        # Angle, shear, scale, shift in x and y, brightness, each in -1..1.
        random = torch.rand((6, num_images), generator=generator) * 2 - 1
        angle, shear, scale = 0.35 * random[0], 0.3 * random[1], 1.1 + 0.3 * random[2]
        cos, sin = angle.cos() * scale, angle.sin() * scale
        rows = [torch.stack([cos, sin + shear, 0.2 * random[3]]), torch.stack([-sin, cos, 0.2 * random[4]])]
        affine = torch.stack(rows).permute(2, 0, 1)
        glyphs = self._glyphs[labels, fonts][:, None]
        grid = functional.affine_grid(affine, list(glyphs.shape), align_corners=False)
        images = functional.grid_sample(glyphs, grid, align_corners=False)
        noise = torch.randn(images.shape, generator=generator)
        return images * (0.75 + 0.25 * random[5])[:, None, None, None] + _NOISE * noise, labels


def _draw_glyphs() -> np.ndarray[Any, np.dtype[np.float32]]:
    """Every character in every font, its middle in the image's middle."""
    folder = Path(matplotlib.get_data_path(), "fonts", "ttf")
    glyphs = np.zeros((len(CHARACTERS), len(_FONTS), _GLYPH_PIXELS, _GLYPH_PIXELS), np.float32)
    for column, name in enumerate(_FONTS):
        font = ImageFont.truetype(str(folder / f"{name}.ttf"), size=18)
        for row, character in enumerate(CHARACTERS):
            image = Image.new("L", (_GLYPH_PIXELS, _GLYPH_PIXELS))
            middle = _GLYPH_PIXELS / 2
            ImageDraw.Draw(image).text((middle, middle), character, fill=255, font=font, anchor="mm")
            glyphs[row, column] = np.asarray(image, np.float32) / 255
    return glyphs
