"""What a final model says of held-out examples, kept in the run folder: models are compared by it when they are gone."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save

from p2pcodistill.checkpoint.durable import write_durably
from p2pcodistill.group.task import Predictions


def save_predictions(predictions: Predictions, path: Path) -> None:
    """Write them as safetensors, at once or not at all: `probabilities_NC` (float32), `labels_N` (int64)."""
    tensors = {
        "probabilities_NC": predictions.probabilities_NC.float().contiguous(),
        "labels_N": predictions.labels_N.long().contiguous(),
    }
    write_durably(path, save(tensors))
