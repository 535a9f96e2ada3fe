"""The click-through task: a dense network after the paper's for Criteo's data (Anil et al. 2018, section 3.1).

Integers come in as logarithms, categories through embeddings of the buckets that they are hashed into. The network predicts
one logit; it is handed on as the second of two, of which the first is 0, so that losses and teachers see two classes.

Axes of tensors: B examples of a batch, N of a data set, D dense features, K categories.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from p2pcodistill.config import GroupSpec
from p2pcodistill.errors import DataError
from p2pcodistill.group.task import MAX_PREDICTIONS, Evaluation, Predictions
from p2pcodistill.task_configs import ClicksConfig
from p2pcodistill.tasks.click_files import (
    NUM_CATEGORIES,
    NUM_DENSE,
    Clicks,
    click_files,
    count_rows,
    read_clicks,
)
from p2pcodistill.tasks.click_generator import generate_clicks
from p2pcodistill.tasks.examples import ExampleOrder, split_examples, spread_evenly

_EVALUATION_BATCH_SIZE = 4096

Inputs: TypeAlias = tuple[Tensor, Tensor]
"""(dense_BD, buckets_BK), as in `click_files.Clicks`."""


class SmeLU(nn.Module):
    """A ReLU whose corner is rounded by a parabola between -1 and 1 (Shamir et al. 2020, arXiv 2010.09931)."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Of any shape."""
        return (inputs + 1).clamp(0, 2).square() / 4 + functional.relu(inputs - 1)


_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "smelu": SmeLU}


class ClickNetwork(nn.Module):
    """Dense features and embeddings of categories, hidden layers, one logit. 248,449 parameters as configured by default."""

    def __init__(self, config: ClicksConfig) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_CATEGORIES * config.num_buckets, config.embedding_size)
        # Small, so that a category says little before anything is known of it (as in DLRM, Naumov et al. 2019).
        nn.init.uniform_(self.embedding.weight, -(config.num_buckets**-0.5), config.num_buckets**-0.5)
        num_inputs = NUM_DENSE + NUM_CATEGORIES * config.embedding_size
        layers: list[nn.Module] = []
        for num_outputs in config.hidden_sizes:
            layers += [nn.Linear(num_inputs, num_outputs), _ACTIVATIONS[config.activation]()]
            num_inputs = num_outputs
        self.hidden = nn.Sequential(*layers)
        self.readout = nn.Linear(num_inputs, 1)

    def forward(self, dense_BD: Tensor, buckets_BK: Tensor) -> Tensor:
        """logits_B2 in float32: 0, and the log odds of a click."""
        features = torch.cat([dense_BD, self.embedding(buckets_BK).flatten(1)], dim=1)
        features = self.hidden(features)
        # In bfloat16 a probability would have two digits; churn is about the third.
        with torch.autocast(features.device.type, enabled=False):
            logit_B1 = self.readout(features.float())
        return functional.pad(logit_B1, (1, 0))


@dataclass(frozen=True)
class SiteClicks:
    """What one site trains on and what it evaluates on."""

    train: Clicks
    held_out: Clicks


def load_site_clicks(task: ClicksConfig) -> SiteClicks:
    """The examples of one site as its task's configuration says: those of its shards, and held-out ones, the same for all.

    Raises DataError for files that are missing, unreadable or malformed, and where there are too few examples to split.
    """
    split = functools.partial(
        split_examples,
        shards=task.shards,
        num_shards=task.num_shards,
        max_shard_examples=task.max_examples,
        max_held_out_examples=task.max_held_out_examples,
        keeps_held_out=not task.held_out,
    )
    read = functools.partial(read_clicks, num_buckets=task.num_buckets, malformed_rows=task.malformed_rows)
    if task.data:
        files = click_files(task.data)
        parts = split(count_rows(files))
        train, held_out = read(files, parts.train), read(files, parts.held_out)
    else:
        generated = generate_clicks(
            task.num_generated_examples, seed=task.generator_seed, num_buckets=task.num_buckets
        )
        parts = split(len(generated))
        train, held_out = generated.take(parts.train), generated.take(parts.held_out)
    if task.held_out:
        files = click_files(task.held_out)
        chosen = split_examples(
            count_rows(files),
            shards=(),
            num_shards=1,
            max_shard_examples=task.max_held_out_examples,
            max_held_out_examples=None,
            keeps_held_out=False,
        )
        held_out = read(files, chosen.train)
    if not len(held_out):  # of the rows that were chosen, malformed ones are skipped
        where = ", ".join(map(str, task.held_out or task.data))
        raise DataError(f"{where}: all rows to evaluate on are malformed: mend them, or list other files")
    return SiteClicks(train, held_out)


class ClicksTask:
    """What the reference loop trains: implements `group.task.Task`."""

    def __init__(self, spec: GroupSpec, *, rank: int, num_ranks: int, device: torch.device) -> None:
        """Read or generate the site's examples. Raises DataError when there are too few."""
        assert isinstance(spec.task, ClicksConfig)
        self._config, self._device = spec.task, device
        clicks = load_site_clicks(spec.task)
        self._order = ExampleOrder(
            len(clicks.train),
            batch_size=spec.training.batch_size,
            seed=spec.training.seed,
            rank=rank,
            num_ranks=num_ranks,
        )
        self._dense_ND = torch.from_numpy(clicks.train.dense_ND)
        self._buckets_NK = torch.from_numpy(clicks.train.buckets_NK)
        self._labels_N = torch.from_numpy(clicks.train.labels_N)
        self._held_out = clicks.held_out

    def make_model(self) -> nn.Module:
        """A new model, from torch's random state, on the task's device."""
        return ClickNetwork(self._config).to(self._device)

    def next_batch(self) -> tuple[Inputs, Tensor]:
        """((dense_BD, buckets_BK), labels_B) on the task's device."""
        chosen_B = self._order.next_indices()
        inputs = self._dense_ND[chosen_B].to(self._device), self._buckets_NK[chosen_B].to(self._device)
        return inputs, self._labels_N[chosen_B].to(self._device).long()

    def forward(self, model: nn.Module, inputs: Any, state: Any) -> tuple[Tensor, Any]:
        """(logits_B2, state) of `model`; a `codistill.teachers.Forward`."""
        return model(*inputs), state

    def loss(self, logits_B2: Tensor, labels_B: Tensor) -> Tensor:
        """The log loss: mean nats per example, a float32 scalar."""
        return functional.cross_entropy(logits_B2.float(), labels_B)

    def evaluate(self, model: nn.Module) -> Evaluation:
        """The log loss on all held-out examples, with the metrics `log_loss`, `auc` and, where the truth is known,
        `excess_log_loss`.

        The last is the expected log loss under the true probabilities, minus their entropy: 0 at the truth, and no chance in
        it. `auc` is the probability that a click gets a higher prediction than an example without one.
        """
        log_probabilities_N2 = self._log_probabilities(model, self._held_out)
        labels_N = self._held_out.labels_N
        loss = functional.nll_loss(log_probabilities_N2, torch.from_numpy(labels_N).long()).item()
        if not math.isfinite(loss):
            return Evaluation(loss)
        metrics = {"log_loss": loss}
        if 0 < labels_N.sum() < len(labels_N):
            metrics["auc"] = _area_under_curve(log_probabilities_N2[:, 1].numpy(), labels_N)
        if self._held_out.truth_N is not None:
            click_N = torch.from_numpy(self._held_out.truth_N)
            truth_N2 = torch.stack([1 - click_N, click_N], dim=1)
            excess = functional.kl_div(log_probabilities_N2, truth_N2, reduction="batchmean")
            metrics["excess_log_loss"] = excess.item()
        return Evaluation(loss, metrics)

    def predict(self, model: nn.Module) -> Predictions:
        """What `model` says of held-out examples that are spread evenly over them, at most `MAX_PREDICTIONS`."""
        chosen = self._held_out.take(spread_evenly(MAX_PREDICTIONS, len(self._held_out)).numpy())
        probabilities_N2 = self._log_probabilities(model, chosen).exp().float()
        return Predictions(probabilities_N2, torch.from_numpy(chosen.labels_N).long())

    def state_dict(self) -> dict[str, Any]:
        """This rank's position in its data."""
        return self._order.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._order.load_state_dict(state)

    @torch.no_grad()
    def _log_probabilities(self, model: nn.Module, clicks: Clicks) -> Tensor:
        """Of these examples: float64 on the CPU, N x 2."""
        parts = []
        for start in range(0, len(clicks), _EVALUATION_BATCH_SIZE):
            chosen = slice(start, start + _EVALUATION_BATCH_SIZE)
            dense_BD = torch.from_numpy(clicks.dense_ND[chosen]).to(self._device)
            buckets_BK = torch.from_numpy(clicks.buckets_NK[chosen]).to(self._device)
            parts.append(model(dense_BD, buckets_BK).double().log_softmax(dim=1).cpu())
        return torch.cat(parts)


def _area_under_curve(scores_N: NDArray[np.float64], labels_N: NDArray[np.uint8]) -> float:
    """Of the receiver operating characteristic, by ranks; equal scores share the mean of theirs (Mann and Whitney 1947)."""
    _, places_N, counts = np.unique(scores_N, return_inverse=True, return_counts=True)
    ranks_N = (np.cumsum(counts) - (counts - 1) / 2)[places_N]
    num_clicks = int(labels_N.sum())
    num_pairs_in_order = float(ranks_N[labels_N == 1].sum()) - num_clicks * (num_clicks + 1) / 2
    return num_pairs_in_order / (num_clicks * (len(labels_N) - num_clicks))
