"""The image models: of their published sizes, beginning as they should, and able to learn."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from p2pcodistill.task_configs import ImagesConfig
from p2pcodistill.tasks.image_models import ResNet, make_image_model

MODELS = ("cnn", "resnet-18", "resnet-50")


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


def narrow(name: str, *, num_classes: int = 3, edge_pixels: int = 8) -> nn.Module:
    config = ImagesConfig.model_validate({"name": "images", "model": name, "width": 4})
    return make_image_model(config, num_channels=3, num_classes=num_classes, edge_pixels=edge_pixels)


@pytest.mark.parametrize(
    ("name", "num_channels", "num_classes", "edge_pixels", "size"),
    [
        ("cnn", 1, 10, 8, 94_186),
        ("resnet-18", 3, 1000, 224, 11_689_512),
        ("resnet-50", 3, 1000, 224, 25_557_032),
        ("resnet-18", 3, 10, 32, 11_173_962),
        ("resnet-50", 3, 10, 64, 23_520_842),
    ],
)
def test_models_have_their_published_sizes(
    name: str, num_channels: int, num_classes: int, edge_pixels: int, size: int
) -> None:
    config = ImagesConfig.model_validate({"name": "images", "model": name})
    with torch.device("meta"):
        model = make_image_model(
            config, num_channels=num_channels, num_classes=num_classes, edge_pixels=edge_pixels
        )
    assert num_parameters(model) == size


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (2, 3, 4, 5), (3, 3, 80, 72)])
def test_any_size_of_images_has_a_prediction(name: str, shape: tuple[int, ...]) -> None:
    model = narrow(name, num_classes=7, edge_pixels=max(shape))
    assert model(torch.randn(shape)).shape == (shape[0], 7)


@pytest.mark.parametrize(("edge_pixels", "feature_pixels"), [(32, 32), (64, 64), (72, 18), (224, 56)])
def test_resnets_keep_the_size_of_small_images(edge_pixels: int, feature_pixels: int) -> None:
    model = narrow("resnet-18", edge_pixels=edge_pixels)
    assert isinstance(model, ResNet)
    features = model.stem(torch.zeros(1, 3, edge_pixels, edge_pixels))
    assert features.shape[2:] == (feature_pixels, feature_pixels)
    last = model.blocks(features)
    assert last.shape[2] == -(-feature_pixels // 8)


@pytest.mark.parametrize("name", ["resnet-18", "resnet-50"])
def test_blocks_of_one_shape_begin_as_the_identity(name: str) -> None:
    model = narrow(name)
    assert isinstance(model, ResNet)
    for block in model.blocks:
        num_in = block.branch[0].in_channels
        features = torch.rand(2, num_in, 6, 6)  # not negative, as behind a ReLU
        is_identity = len(block.shortcut) == 0
        assert torch.equal(block(features), features) == is_identity
    assert sum(len(block.shortcut) == 0 for block in model.blocks) == {"resnet-18": 5, "resnet-50": 12}[name]


def test_strides_of_bottlenecks_are_in_their_wide_convolutions() -> None:
    model = narrow("resnet-50")
    strided = {
        module.kernel_size
        for block in model.blocks
        for module in block.branch
        if isinstance(module, nn.Conv2d) and module.stride == (2, 2)
    }
    assert strided == {(3, 3)}


@pytest.mark.parametrize("name", MODELS)
def test_models_learn_and_their_norms_gather_statistics(name: str) -> None:
    torch.manual_seed(0)
    model = narrow(name)
    images, labels = torch.randn(12, 3, 8, 8), torch.arange(12) % 3
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    for _ in range(30):
        loss = functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.3
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and all(norm.running_var.min() >= 0 and norm.running_mean.any() for norm in norms)
