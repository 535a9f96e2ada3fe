"""The language-model task, after the paper's (Anil et al. 2018, section 3.1): its model, its batches, its evaluation.

As there, a batch is one window from each of B documents, the hidden state is carried from window to window and never reset,
and back-propagation is truncated at the window. A document is a contiguous part of the site's text. A transformer carries no
state: it sees the window alone.

Axes of tensors: B documents (streams), T tokens of a window, V tokens of the vocabulary, N predictions, C = V.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from p2pcodistill.config import GroupSpec
from p2pcodistill.errors import ConfigError
from p2pcodistill.group.task import MAX_PREDICTIONS, Evaluation, Predictions
from p2pcodistill.task_configs import LanguageModelConfig
from p2pcodistill.tasks.hugging_face import make_hugging_face_model
from p2pcodistill.tasks.language_data import LanguageData
from p2pcodistill.tasks.recurrent import LayerNormLSTMModel, LSTMModel
from p2pcodistill.tasks.transformer import TransformerModel
from p2pcodistill.tasks.vocabulary import Vocabulary, keep_vocabulary, load_vocabulary

MAX_EVALUATION_STREAMS = 16
MAX_PREDICTION_BYTES = 64 << 20
"""Of the probabilities that `predict` returns: over a large vocabulary, these are fewer than `MAX_PREDICTIONS` rows."""
_MIN_WINDOWS_PER_EVALUATION_STREAM = 8
_VOCABULARY_FILE = "vocabulary.json"


def make_language_model(config: LanguageModelConfig, vocabulary: Vocabulary) -> nn.Module:
    """The model that `config` describes, from torch's random state; called as `model(tokens_BT, state)`.

    Over word pieces it carries the vocabulary's digest, in the name of a buffer, which belongs to its schema: a teacher with
    another vocabulary is refused by name, and a file of its weights tells what its tokens mean. Raises ConfigError.
    """
    model: nn.Module
    match config.model:
        case "lstm":
            model = LSTMModel(config, vocabulary.size)
        case "layer-norm-lstm":
            model = LayerNormLSTMModel(config, vocabulary.size)
        case "transformer":
            model = TransformerModel(config, vocabulary.size)
        case "hugging-face":
            model = make_hugging_face_model(config, vocabulary.size)
    if vocabulary.digest is not None:
        digest = torch.tensor(list(bytes.fromhex(vocabulary.digest)), dtype=torch.uint8)
        model.register_buffer(f"vocabulary_{vocabulary.digest[:16]}", digest)
    return model


class LanguageModelTask:
    """What the reference loop trains: implements `group.task.Task`.

    With `unlabelled` text, a batch has further rows behind the labelled ones, which have inputs and no targets: the student
    agrees with its teachers on all rows, and learns from the labels of those that have some.
    """

    def __init__(self, spec: GroupSpec, *, rank: int, num_ranks: int, device: torch.device) -> None:
        """Read the site's text. Raises DataError when there is too little, ConfigError for a task of another name."""
        config = spec.task
        if not isinstance(config, LanguageModelConfig):
            raise ConfigError(f"task.name is {config.name!r}: no language model")
        self._config, self._device = config, device
        self._vocabulary = load_vocabulary(config.vocabulary)
        if config.vocabulary is not None and rank == 0:
            keep_vocabulary(config.vocabulary, spec.model_path.with_name(_VOCABULARY_FILE))
        self._data = LanguageData(config, spec.training, self._vocabulary, rank=rank, num_ranks=num_ranks)

    def make_model(self) -> nn.Module:
        """A new model, from torch's random state, on the task's device."""
        return make_language_model(self._config, self._vocabulary).to(self._device)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """(inputs_BT, targets_BT) on the task's device. Unlabelled rows are the last ones, and have no targets."""
        inputs_BT, targets_BT = self._data.streams.next_batch()
        if self._data.unlabelled is not None:
            inputs_BT = torch.cat([inputs_BT, self._data.unlabelled.next_batch()[0]])
        return inputs_BT.to(self._device), targets_BT.to(self._device)

    def forward(self, model: nn.Module, inputs: Any, state: Any) -> tuple[Tensor, Any]:
        """(logits_BTV, hidden) of `model`; a `codistill.teachers.Forward`."""
        logits_BTV, hidden = model(inputs, state)
        return logits_BTV, hidden

    def loss(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean nats per token of the labelled rows, a float32 scalar."""
        labelled_BTV = logits_BTV[: len(targets_BT)]
        return functional.cross_entropy(labelled_BTV.float().flatten(0, 1), targets_BT.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> Evaluation:
        """Mean nats per token on the held-out text, read as parallel streams in windows of the training length.

        Metrics: `bits_per_byte`, which does not depend on the vocabulary, and how much of its data the site has visited.
        """
        sum_nats = torch.zeros((), dtype=torch.float64, device=self._device)
        num_predictions = 0
        for logits_BTV, targets_BT in self._read_held_out(model):
            sum_nats += self.loss(logits_BTV, targets_BT).double() * targets_BT.numel()
            num_predictions += targets_BT.numel()
        loss = float(sum_nats) / num_predictions
        tokens_per_byte = len(self._data.held_out) / self._data.num_held_out_bytes
        metrics = {"bits_per_byte": loss / math.log(2) * tokens_per_byte}
        return Evaluation(loss, metrics | self._data.streams.progress())

    @torch.no_grad()
    def predict(self, model: nn.Module) -> Predictions:
        """The next token's probabilities at positions of the held-out text that are spread evenly over it.

        They are at most `MAX_PREDICTIONS`, and fewer where the probabilities would take more than `MAX_PREDICTION_BYTES`.
        """
        stream_tokens = self._held_out_BT.shape[1]
        num_positions = self._held_out_BT.shape[0] * (stream_tokens - 1)
        max_rows = max(1, min(MAX_PREDICTIONS, MAX_PREDICTION_BYTES // (4 * self._vocabulary.size)))
        num_rows = min(max_rows, num_positions)
        chosen_BT = torch.zeros(num_positions, dtype=torch.bool)
        chosen_BT[torch.arange(num_rows) * num_positions // num_rows] = True
        chosen_BT = chosen_BT.view(-1, stream_tokens - 1)
        probabilities_NC: list[Tensor] = []
        labels_N: list[Tensor] = []
        start = 0
        for logits_BTV, targets_BT in self._read_held_out(model):
            end = start + targets_BT.shape[1]
            in_window_BT = chosen_BT[:, start:end].to(self._device)
            probabilities_NC.append(logits_BTV[in_window_BT].float().softmax(-1).cpu())
            labels_N.append(targets_BT[in_window_BT].cpu())
            start = end
        return Predictions(torch.cat(probabilities_NC), torch.cat(labels_N))

    @property
    def _held_out_BT(self) -> Tensor:
        """The held-out text as parallel streams, each of several windows where there is enough."""
        held_out = self._data.held_out
        num_streams = len(held_out) // (_MIN_WINDOWS_PER_EVALUATION_STREAM * self._config.window_tokens)
        num_streams = max(1, min(MAX_EVALUATION_STREAMS, num_streams))
        stream_tokens = len(held_out) // num_streams
        return held_out[: num_streams * stream_tokens].view(num_streams, stream_tokens)

    def _read_held_out(self, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
        """(logits_BTV, targets_BT) of one window of the held-out text after the other."""
        window_tokens = self._config.window_tokens
        text_BT = self._held_out_BT.to(self._device).long()
        state = None
        for start in range(0, text_BT.shape[1] - 1, window_tokens):
            targets_BT = text_BT[:, start + 1 : start + 1 + window_tokens]
            inputs_BT = text_BT[:, start : start + targets_BT.shape[1]]
            logits_BTV, state = model(inputs_BT, state)
            yield logits_BTV, targets_BT

    def state_dict(self) -> dict[str, Any]:
        """This rank's position in its data."""
        state = self._data.streams.state_dict()
        if self._data.unlabelled is not None:
            state = state | {"unlabelled": self._data.unlabelled.state_dict()}
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._data.streams.load_state_dict(state)
        if self._data.unlabelled is not None:
            self._data.unlabelled.load_state_dict(state["unlabelled"])
