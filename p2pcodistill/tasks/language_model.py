"""The language-model task: a byte-level LSTM after the paper's language model (Anil et al. 2018, section 3.1).

As there, a batch is one window from each of B documents, the hidden state is carried from window to window and never reset,
and back-propagation is truncated at the window. A document is a contiguous part of the site's text.

Axes of tensors: B documents (streams), T bytes of a window, V byte values, L layers, H hidden units.
"""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from p2pcodistill.config import GroupSpec, LanguageModelConfig
from p2pcodistill.tasks.text import load_site_text, require_enough_text

NUM_BYTE_VALUES = 256
MAX_EVALUATION_STREAMS = 16
_MIN_WINDOWS_PER_EVALUATION_STREAM = 8

Hidden: TypeAlias = tuple[Tensor, Tensor]
"""The LSTM's (h_LBH, c_LBH)."""


class ByteLSTM(nn.Module):
    """Embedding, LSTM, linear read-out: predicts each next byte. 938,240 parameters as configured by default."""

    def __init__(self, config: LanguageModelConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_BYTE_VALUES, config.embedding_size)
        self.lstm = nn.LSTM(config.embedding_size, config.hidden_size, config.num_layers, batch_first=True)
        self.readout = nn.Linear(config.hidden_size, NUM_BYTE_VALUES)

    def forward(self, bytes_BT: Tensor, hidden: Hidden | None = None) -> tuple[Tensor, Hidden]:
        """(logits_BTV, hidden) after the bytes, from `hidden` before them (None: zeros)."""
        features_BTH, hidden = self.lstm(self.embedding(bytes_BT), hidden)
        logits_BTV: Tensor = self.readout(features_BTH)
        return logits_BTV, hidden


class ByteStreams:
    """Endless windows of B contiguous streams, which are rank `rank`'s share of `num_ranks` x B streams over a text.

    In each epoch the text, seen as a ring, is cut into equal parts from a random origin, and the parts are dealt to the
    streams in random order; both depend on the seed alone. What is left of a part behind its last whole window is
    left out of that epoch.
    """

    def __init__(
        self, text: bytes, *, batch_size: int, window_bytes: int, seed: int, rank: int, num_ranks: int
    ) -> None:
        self._text = torch.frombuffer(bytearray(text), dtype=torch.uint8)
        self._num_streams = batch_size * num_ranks
        self._own_streams = slice(rank * batch_size, (rank + 1) * batch_size)
        self._part_bytes = len(text) // self._num_streams
        self._num_windows = (self._part_bytes - 1) // window_bytes
        self._offsets = torch.arange(window_bytes + 1)
        self._seed = seed
        self._epoch, self._window = 0, 0
        self._starts_B = self._deal(0)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """(inputs_BT, targets_BT): the targets are the inputs' next bytes."""
        if self._window == self._num_windows:
            self._epoch, self._window = self._epoch + 1, 0
            self._starts_B = self._deal(self._epoch)
        position = self._window * (len(self._offsets) - 1)
        self._window += 1
        windows = self._text[(self._starts_B[:, None] + position + self._offsets) % len(self._text)].long()
        return windows[:, :-1], windows[:, 1:]

    def state_dict(self) -> dict[str, int]:
        """The position in the data."""
        return {"epoch": self._epoch, "window": self._window}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on from there."""
        self._epoch, self._window = state["epoch"], state["window"]
        self._starts_B = self._deal(self._epoch)

    def _deal(self, epoch: int) -> Tensor:
        """Where each of this rank's streams starts in the text."""
        generator = torch.Generator().manual_seed((self._seed * 1_000_003 + epoch) % 2**63)
        origin = torch.randint(len(self._text), (1,), generator=generator)
        parts = torch.randperm(self._num_streams, generator=generator)[self._own_streams]
        return (origin + parts * self._part_bytes) % len(self._text)


class LanguageModelTask:
    """What the reference loop trains: implements `group.task.Task`."""

    def __init__(self, spec: GroupSpec, *, rank: int, num_ranks: int, device: torch.device) -> None:
        """Read the site's text. Raises DataError when there is too little."""
        self._config, self._device = spec.task, device
        text = load_site_text(spec.task, shard_index=spec.shard_index, num_shards=spec.num_shards)
        batch_size = spec.training.batch_size
        require_enough_text(text, spec.task, batch_size=batch_size, num_ranks=num_ranks)
        self._streams = ByteStreams(
            text.train,
            batch_size=batch_size,
            window_bytes=spec.task.window_bytes,
            seed=spec.training.seed,
            rank=rank,
            num_ranks=num_ranks,
        )
        self._held_out = torch.frombuffer(bytearray(text.held_out), dtype=torch.uint8)

    def make_model(self) -> nn.Module:
        """A new model, from torch's random state, on the task's device."""
        return ByteLSTM(self._config).to(self._device)

    def next_batch(self) -> tuple[Tensor, Tensor]:
        """(inputs_BT, targets_BT) on the task's device."""
        inputs_BT, targets_BT = self._streams.next_batch()
        return inputs_BT.to(self._device), targets_BT.to(self._device)

    def forward(self, model: nn.Module, inputs: Any, state: Any) -> tuple[Tensor, Any]:
        """(logits_BTV, hidden) of `model`; a `codistill.teachers.Forward`."""
        logits_BTV, hidden = model(inputs, state)
        return logits_BTV, hidden

    def loss(self, logits_BTV: Tensor, targets_BT: Tensor) -> Tensor:
        """Mean nats per byte, a float32 scalar."""
        return functional.cross_entropy(logits_BTV.float().flatten(0, 1), targets_BT.flatten())

    @torch.no_grad()
    def evaluate(self, model: nn.Module) -> float:
        """Mean nats per byte on the held-out text, read as parallel streams in windows of the training length."""
        window_bytes = self._config.window_bytes
        num_streams = len(self._held_out) // (_MIN_WINDOWS_PER_EVALUATION_STREAM * window_bytes)
        num_streams = max(1, min(MAX_EVALUATION_STREAMS, num_streams))
        stream_bytes = len(self._held_out) // num_streams
        text_BT = self._held_out[: num_streams * stream_bytes].view(num_streams, stream_bytes)
        text_BT = text_BT.to(self._device).long()
        sum_nats = torch.zeros((), dtype=torch.float64, device=self._device)
        hidden = None
        for start in range(0, stream_bytes - 1, window_bytes):
            targets_BT = text_BT[:, start + 1 : start + 1 + window_bytes]
            inputs_BT = text_BT[:, start : start + targets_BT.shape[1]]
            logits_BTV, hidden = model(inputs_BT, hidden)
            sum_nats += self.loss(logits_BTV, targets_BT).double() * targets_BT.numel()
        return float(sum_nats) / (num_streams * (stream_bytes - 1))

    def state_dict(self) -> dict[str, Any]:
        """This rank's position in its data."""
        return self._streams.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._streams.load_state_dict(state)
