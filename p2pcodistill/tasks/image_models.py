"""Classifiers of images with batch norm: a small convolutional network, and residual networks.

ResNet-18 and ResNet-50 are those of He et al. 2015 (arXiv 1512.03385), initialised and strided as Goyal et al. 2017
(arXiv 1706.02677, section 5.1) train them: the last batch norm of each block starts at zero, so that blocks start as the
identity; strides are in the 3 x 3 convolutions.

Axes of tensors: B images, C channels, H and W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

from torch import Tensor, nn

from p2pcodistill.task_configs import ImagesConfig

MAX_SMALL_EDGE_PIXELS = 64
"""Up to this size of images, ResNets begin with one 3 x 3 convolution, as for CIFAR; else as for ImageNet."""
_CNN_WIDTH, _RESNET_WIDTH = 32, 64


def make_image_model(
    config: ImagesConfig, *, num_channels: int, num_classes: int, edge_pixels: int
) -> nn.Module:
    """The model that `config` names, from torch's random state: images_BCHW -> logits_BK.

    `edge_pixels` is the longer edge of the images; any size will do, the model is made for about that.
    """
    match config.model:
        case "cnn":
            return SmallCNN(num_channels, num_classes, width=config.width or _CNN_WIDTH)
        case "resnet-18":
            branch, blocks_per_stage = _basic_branch, (2, 2, 2, 2)
        case "resnet-50":
            branch, blocks_per_stage = _bottleneck_branch, (3, 4, 6, 3)
    return ResNet(
        num_channels,
        num_classes,
        branch=branch,
        blocks_per_stage=blocks_per_stage,
        width=config.width or _RESNET_WIDTH,
        is_for_small_images=edge_pixels <= MAX_SMALL_EDGE_PIXELS,
    )


class SmallCNN(nn.Module):
    """Three 3 x 3 convolutions of `width`, twice and four times as many channels, their mean, and a linear read-out.

    94,186 parameters as configured by default for ten classes of grey images.
    """

    def __init__(self, num_channels: int, num_classes: int, *, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(
            *_convolution(num_channels, width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            *_convolution(width, 2 * width),
            nn.ReLU(),
            nn.MaxPool2d(2),
            *_convolution(2 * width, 4 * width),
            nn.ReLU(),
        )
        self.readout = nn.Linear(4 * width, num_classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """logits_BK."""
        features_BC = self.features(images_BCHW).mean((2, 3))
        logits_BK: Tensor = self.readout(features_BC)
        return logits_BK


_Branch: TypeAlias = Callable[[int, int, int], tuple[list[nn.Module], int]]
"""(channels in, width, stride) -> the layers that a block adds to its input, and how many channels they end with."""


class ResNet(nn.Module):
    """Four stages of residual blocks, each of twice the width and half the size of the one before."""

    def __init__(
        self,
        num_channels: int,
        num_classes: int,
        *,
        branch: _Branch,
        blocks_per_stage: tuple[int, ...],
        width: int,
        is_for_small_images: bool,
    ) -> None:
        super().__init__()
        if is_for_small_images:
            stem = [*_convolution(num_channels, width), nn.ReLU()]
        else:
            stem = [
                *_convolution(num_channels, width, kernel=7, stride=2),
                nn.ReLU(),
                nn.MaxPool2d(3, stride=2, padding=1),
            ]
        blocks: list[nn.Module] = []
        num_in = width
        for stage, num_blocks in enumerate(blocks_per_stage):
            for block in range(num_blocks):
                stride = 2 if stage > 0 and block == 0 else 1
                layers, num_out = branch(num_in, width << stage, stride)
                blocks.append(_Block(layers, num_in, num_out, stride))
                num_in = num_out
        self.stem = nn.Sequential(*stem)
        self.blocks = nn.Sequential(*blocks)
        self.readout = nn.Linear(num_in, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, _Block):
                nn.init.zeros_(module.last_norm.weight)
        nn.init.normal_(self.readout.weight, std=0.01)
        nn.init.zeros_(self.readout.bias)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        """logits_BK."""
        features_BC = self.blocks(self.stem(images_BCHW)).mean((2, 3))
        logits_BK: Tensor = self.readout(features_BC)
        return logits_BK


class _Block(nn.Module):
    """Its input, projected where the shape changes, plus a branch that ends with batch norm; then ReLU."""

    def __init__(self, layers: list[nn.Module], num_in: int, num_out: int, stride: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(*layers)
        is_same_shape = num_in == num_out and stride == 1
        self.shortcut = nn.Sequential(
            *([] if is_same_shape else _convolution(num_in, num_out, kernel=1, stride=stride))
        )
        self.relu = nn.ReLU()

    @property
    def last_norm(self) -> nn.BatchNorm2d:
        """The branch's last layer."""
        norm = self.branch[-1]
        assert isinstance(norm, nn.BatchNorm2d)
        return norm

    def forward(self, features_BCHW: Tensor) -> Tensor:
        out_BCHW: Tensor = self.relu(self.branch(features_BCHW) + self.shortcut(features_BCHW))
        return out_BCHW


def _basic_branch(num_in: int, width: int, stride: int) -> tuple[list[nn.Module], int]:
    return [*_convolution(num_in, width, stride=stride), nn.ReLU(), *_convolution(width, width)], width


def _bottleneck_branch(num_in: int, width: int, stride: int) -> tuple[list[nn.Module], int]:
    layers = [
        *_convolution(num_in, width, kernel=1),
        nn.ReLU(),
        *_convolution(width, width, stride=stride),
        nn.ReLU(),
        *_convolution(width, 4 * width, kernel=1),
    ]
    return layers, 4 * width


def _convolution(num_in: int, num_out: int, *, kernel: int = 3, stride: int = 1) -> list[nn.Module]:
    """A convolution that keeps the size (but for its stride), and batch norm."""
    convolution = nn.Conv2d(num_in, num_out, kernel, stride=stride, padding=kernel // 2, bias=False)
    return [convolution, nn.BatchNorm2d(num_out)]
