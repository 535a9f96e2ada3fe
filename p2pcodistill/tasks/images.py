"""The images task: a classifier with batch norm, on digits, MNIST's format, folders of pictures or data sets of the hub.

Axes of tensors: B images of a batch, N of the held-out ones, C channels, H and W pixels, K classes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from p2pcodistill.config import GroupSpec
from p2pcodistill.errors import ConfigError
from p2pcodistill.group.task import MAX_PREDICTIONS, Evaluation, Predictions
from p2pcodistill.task_configs import ImagesConfig
from p2pcodistill.tasks.examples import spread_evenly
from p2pcodistill.tasks.image_batches import ImageBatches
from p2pcodistill.tasks.image_data import load_site_images
from p2pcodistill.tasks.image_models import make_image_model

_EVALUATION_BATCH_SIZE = 256


class ImagesTask:
    """What the reference loop trains: implements `group.task.Task`."""

    def __init__(self, spec: GroupSpec, *, rank: int, num_ranks: int, device: torch.device) -> None:
        """Read the site's images. Raises DataError for what is wrong with them, ConfigError for batches of one."""
        assert isinstance(spec.task, ImagesConfig)
        self._config, self._device = spec.task, device
        if spec.training.batch_size < 2:
            raise ConfigError("training.batch_size is 1: batch norm needs at least 2 images")
        self._images = load_site_images(spec.task)
        self._batches = ImageBatches(
            self._images.train,
            batch_size=spec.training.batch_size,
            crop_padding=spec.task.crop_padding,
            flip=spec.task.flip,
            seed=spec.training.seed,
            rank=rank,
            num_ranks=num_ranks,
        )
        self._mean, self._std = (
            torch.tensor(values, device=device)[:, None, None] for values in (spec.task.mean, spec.task.std)
        )

    def make_model(self) -> nn.Module:
        """A new model, from torch's random state, on the task's device."""
        images = self._images.format
        model = make_image_model(
            self._config,
            num_channels=images.num_channels,
            num_classes=len(self._images.class_names),
            edge_pixels=max(images.height, images.width),
        )
        return model.to(self._device)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """(normalised images_BCHW, labels_B) on the task's device."""
        images_BCHW, labels_B = self._batches.next_batch()
        return self._normalised(images_BCHW), labels_B.to(self._device)

    def forward(self, model: nn.Module, inputs: Any, state: Any) -> tuple[Tensor, Any]:
        """(logits_BK, state as it was) of `model`; a `codistill.teachers.Forward`."""
        return model(inputs), state

    def loss(self, logits_BK: Tensor, labels_B: Tensor) -> Tensor:
        """Mean nats per image, a float32 scalar."""
        return functional.cross_entropy(logits_BK.float(), labels_B)

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Evaluation:
        """Mean nats per held-out image, and the accuracy: the share that is told right."""
        num_images = len(self._images.held_out.labels_N)
        sum_nats = torch.zeros((), dtype=torch.float64, device=self._device)
        num_right = torch.zeros((), dtype=torch.int64, device=self._device)
        for images_BCHW, labels_B in self._held_out_batches(torch.arange(num_images)):
            logits_BK = model(images_BCHW)
            sum_nats += self.loss(logits_BK, labels_B).double() * len(labels_B)
            num_right += (logits_BK.argmax(1) == labels_B).sum()
        return Evaluation(float(sum_nats) / num_images, {"accuracy": int(num_right) / num_images})

    @torch.no_grad()
    def predict(self, model: nn.Module) -> Predictions:
        """Class probabilities of held-out images that are spread evenly over them, at most `MAX_PREDICTIONS`."""
        chosen_N = spread_evenly(MAX_PREDICTIONS, len(self._images.held_out.labels_N))
        batches = self._held_out_batches(chosen_N)
        probabilities = [model(images_BCHW).float().softmax(1).cpu() for images_BCHW, _ in batches]
        return Predictions(torch.cat(probabilities), self._images.held_out.labels_N[chosen_N])

    def state_dict(self) -> dict[str, Any]:
        """This rank's position in its data."""
        return self._batches.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._batches.load_state_dict(state)

    def _held_out_batches(self, indices_N: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(normalised images_BCHW, labels_B) of the held-out images with these indices, on the task's device."""
        held_out = self._images.held_out
        for start in range(0, len(indices_N), _EVALUATION_BATCH_SIZE):
            indices_B = indices_N[start : start + _EVALUATION_BATCH_SIZE]
            images_BCHW = self._normalised(held_out.images.read(indices_B))
            yield images_BCHW, held_out.labels_N[indices_B].to(self._device)

    def _normalised(self, images_BCHW: Tensor) -> Tensor:
        """uint8 images on any device -> float32 images on the task's, of about zero mean and unit variance."""
        return (images_BCHW.to(self._device).float() / 255 - self._mean) / self._std
