"""The images task: what it trains on, what it says of models, and that it resumes."""

from __future__ import annotations

import math
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from p2pcodistill.config import CodistillationConfig, FramesConfig, GroupConfig, GroupSpec, TrainingConfig
from p2pcodistill.errors import ConfigError, DataError
from p2pcodistill.group.task import load_task
from p2pcodistill.task_configs import ImagesConfig
from p2pcodistill.tasks import images as images_module
from p2pcodistill.tasks.image_data import ImagesInMemory
from p2pcodistill.tasks.images import ImagesTask

CPU = torch.device("cpu")
NUM_IMAGES = 60


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Three classes, which the place of a bright column tells."""
    labels_N = np.arange(NUM_IMAGES) % 3
    images_NHW = np.random.default_rng(0).integers(60, size=(NUM_IMAGES, 8, 8))
    images_NHW[np.arange(NUM_IMAGES), :, 2 * labels_N + 1] += 150
    for kind, content in (("images-idx3", images_NHW), ("labels-idx1", labels_N)):
        header = struct.pack(f">HBB{content.ndim}I", 0, 8, content.ndim, *content.shape)
        (tmp_path / f"a-{kind}-ubyte").write_bytes(header + content.astype(np.uint8).tobytes())
    return tmp_path / "a-images-idx3-ubyte"


def spec_of(folder: Path, data: Path, *, batch_size: int = 5, **keys: Any) -> GroupSpec:
    return GroupSpec(
        site="berlin",
        link_address="ipc://unused",
        link_token="token",
        outbox_folder=folder,
        training_folder=folder,
        model_path=folder / "model.safetensors",
        error_path=folder / "error.txt",
        teachers=({},),
        num_students=1,
        group=GroupConfig(),
        task=ImagesConfig(name="images", data=(data,), **keys),
        training=TrainingConfig(batch_size=batch_size),
        codistillation=CodistillationConfig(),
        frames=FramesConfig(),
    )


def task_of(folder: Path, data: Path, *, rank: int = 0, num_ranks: int = 1, **keys: Any) -> ImagesTask:
    return ImagesTask(spec_of(folder, data, **keys), rank=rank, num_ranks=num_ranks, device=CPU)


class Guess(nn.Module):
    """Says the same of every image, and counts images."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits = torch.tensor(logits)
        self.num_images = 0

    def forward(self, images_BCHW: Tensor) -> Tensor:
        self.num_images += len(images_BCHW)
        return self.logits.expand(len(images_BCHW), -1)


def test_the_task_is_loaded_by_its_name(data: Path, tmp_path: Path) -> None:
    task = load_task(spec_of(tmp_path, data), rank=0, num_ranks=1, device=CPU)
    assert isinstance(task, ImagesTask)
    model = task.make_model()
    inputs, targets = task.next_batch()
    logits, state = task.forward(model, inputs, None)
    assert logits.shape == (5, 3) and state is None
    loss = task.loss(logits.bfloat16(), targets)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(functional.cross_entropy(logits, targets).item(), rel=0.02)


@pytest.mark.parametrize("model", ["cnn", "resnet-18", "resnet-50"])
@pytest.mark.parametrize("channels", [1, 3])
def test_the_model_fits_the_images(data: Path, tmp_path: Path, model: str, channels: int) -> None:
    task = task_of(tmp_path, data, model=model, width=4, channels=channels)
    logits, _ = task.forward(task.make_model(), task.next_batch()[0], None)
    assert logits.shape == (5, 3)


def test_inputs_are_normalised_by_the_configured_numbers(data: Path, tmp_path: Path) -> None:
    raw = task_of(tmp_path, data, mean=(0,), std=(1,)).next_batch()[0]
    assert raw.min() >= 0 and 0.5 < raw.max() <= 1
    inputs = task_of(tmp_path, data, channels=3, mean=(0.1, 0.2, 0.3), std=(0.5, 2, 4)).next_batch()[0]
    for channel, (mean, std) in enumerate(((0.1, 0.5), (0.2, 2), (0.3, 4))):
        torch.testing.assert_close(inputs[:, channel], (raw[:, 0] - mean) / std)


def test_augmentations_are_for_training_alone(data: Path, tmp_path: Path) -> None:
    plain, augmented = task_of(tmp_path, data), task_of(tmp_path, data, crop_padding=2, flip=True)
    assert not torch.equal(plain.next_batch()[0], augmented.next_batch()[0])
    model = plain.make_model().eval()
    assert plain.evaluate(model) == augmented.evaluate(model)


@pytest.mark.parametrize("batch_size", [1, 4, 256])
def test_the_held_out_loss_and_accuracy_are_means_over_images(
    data: Path, tmp_path: Path, batch_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "_EVALUATION_BATCH_SIZE", batch_size)
    task = task_of(tmp_path, data)
    labels = task.predict(Guess(0, 0, 0)).labels_N
    guess = Guess(math.log(0.7), math.log(0.2), math.log(0.1))
    evaluation = task.evaluate(guess)
    assert guess.num_images == len(labels) == NUM_IMAGES // 4
    counts = torch.bincount(labels, minlength=3)
    expected = -(counts * torch.tensor([0.7, 0.2, 0.1]).log()).sum() / len(labels)
    assert evaluation.loss == pytest.approx(expected.item())
    assert evaluation.metrics == {"accuracy": pytest.approx(counts[0].item() / len(labels))}


def test_predictions_are_probabilities_of_always_the_same_images(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "MAX_PREDICTIONS", 9)
    task = task_of(tmp_path, data)
    model = task.make_model().eval()
    first = task.predict(model)
    task.next_batch()
    second = task.predict(model)
    assert first.probabilities_NC.shape == (9, 3) and first.probabilities_NC.dtype == torch.float32
    torch.testing.assert_close(first.probabilities_NC.sum(1), torch.ones(9))
    assert torch.equal(first.probabilities_NC, second.probabilities_NC)
    assert first.labels_N.dtype == torch.int64 and torch.equal(first.labels_N, second.labels_N)


def test_predictions_are_spread_over_images_that_are_in_order(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(images_module, "MAX_PREDICTIONS", 6)
    task = task_of(tmp_path, data)
    held_out = task._images.held_out
    labels = held_out.labels_N
    in_order = labels.argsort(stable=True)
    sorted_labels = labels[in_order]
    images = type(held_out)(ImagesInMemory(held_out.images.read(in_order)), sorted_labels)
    monkeypatch.setattr(task, "_images", replace(task._images, held_out=images))
    predictions = task.predict(Guess(0, 0, 0))
    assert predictions.labels_N.unique().tolist() == [0, 1, 2]
    assert task.evaluate(Guess(0, 0, 0)).metrics["accuracy"] == int((labels == 0).sum()) / len(labels)


def test_a_model_that_diverged_has_no_finite_loss(data: Path, tmp_path: Path) -> None:
    evaluation = task_of(tmp_path, data).evaluate(Guess(math.nan, 0, 0))
    assert math.isnan(evaluation.loss)


def test_training_is_resumed_to_the_bit(data: Path, tmp_path: Path) -> None:
    keys: dict[str, Any] = {"crop_padding": 1, "flip": True, "batch_size": 7}
    task, resumed = task_of(tmp_path, data, **keys), task_of(tmp_path, data, **keys)
    for _ in range(9):
        task.next_batch()
    resumed.load_state_dict(task.state_dict())
    for _ in range(9):
        for one, other in zip(task.next_batch(), resumed.next_batch(), strict=True):
            assert torch.equal(one, other)


def test_evaluation_leaves_the_training_position_alone(data: Path, tmp_path: Path) -> None:
    task, other = task_of(tmp_path, data, crop_padding=1), task_of(tmp_path, data, crop_padding=1)
    task.evaluate(Guess(0, 0, 0))
    task.predict(Guess(0, 0, 0))
    assert torch.equal(task.next_batch()[0], other.next_batch()[0])


def test_ranks_train_on_different_images(data: Path, tmp_path: Path) -> None:
    ranks = [task_of(tmp_path, data, rank=rank, num_ranks=3) for rank in range(3)]
    images = torch.cat([rank.next_batch()[0] for rank in ranks for _ in range(3)]).flatten(1)
    assert len(images) == len(images.unique(dim=0)) == NUM_IMAGES * 3 // 4


def test_batches_of_one_and_too_large_ones_are_refused(data: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="batch norm needs at least 2 images"):
        task_of(tmp_path, data, batch_size=1)
    with pytest.raises(DataError, match=r"lower training\.batch_size"):
        task_of(tmp_path, data, batch_size=46)


def test_it_learns(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    task = task_of(tmp_path, data, batch_size=16, width=8)
    model = task.make_model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(40):
        inputs, targets = task.next_batch()
        optimizer.zero_grad()
        task.loss(task.forward(model, inputs, None)[0], targets).backward()
        optimizer.step()
    evaluation = task.evaluate(model.eval())
    assert evaluation.metrics["accuracy"] == 1 and evaluation.loss < 0.2
