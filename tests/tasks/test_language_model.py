"""The language-model task: its model, where its data goes, and what it is evaluated on."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from p2pcodistill.config import (
    CodistillationConfig,
    FramesConfig,
    GroupConfig,
    GroupSpec,
    LanguageModelConfig,
    TrainingConfig,
)
from p2pcodistill.errors import DataError
from p2pcodistill.group.task import load_task
from p2pcodistill.tasks.language_model import ByteLSTM, ByteStreams, LanguageModelTask

CPU = torch.device("cpu")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "data.txt"
    path.write_text("".join(f"line {index} of the text\n" for index in range(400)))
    return path


def spec_of(folder: Path, task: LanguageModelConfig, *, batch_size: int = 4) -> GroupSpec:
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
        shard_index=0,
        num_shards=1,
        group=GroupConfig(),
        task=task,
        training=TrainingConfig(batch_size=batch_size),
        codistillation=CodistillationConfig(),
        frames=FramesConfig(),
    )


# --- the model -----------------------------------------------------------------------------------------------


def test_the_default_model_has_its_documented_size() -> None:
    model = ByteLSTM(LanguageModelConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 938_240


def test_windows_with_a_carried_state_equal_one_long_window() -> None:
    model = ByteLSTM(LanguageModelConfig(embedding_size=4, hidden_size=8))
    text_BT = torch.randint(256, (3, 12))
    whole, _ = model(text_BT)
    first, hidden = model(text_BT[:, :5])
    second, _ = model(text_BT[:, 5:], hidden)
    torch.testing.assert_close(torch.cat([first, second], 1), whole)


# --- streams -------------------------------------------------------------------------------------------------

TEXT = bytes(range(200))


def streams(*, seed: int = 0, rank: int = 0, num_ranks: int = 1) -> ByteStreams:
    return ByteStreams(TEXT, batch_size=4, window_bytes=6, seed=seed, rank=rank, num_ranks=num_ranks)


def starts(batch: tuple[Tensor, Tensor]) -> list[int]:
    return [int(row[0]) for row in batch[0]]


def test_targets_are_the_next_bytes_and_windows_follow_one_another() -> None:
    source = streams()
    end = None
    for _ in range(8):  # an epoch: (200 / 4 - 1) // 6
        inputs_BT, targets_BT = source.next_batch()
        assert inputs_BT.shape == targets_BT.shape == (4, 6)
        assert torch.equal(targets_BT, (inputs_BT + 1) % 200)
        if end is not None:
            assert torch.equal(inputs_BT[:, 0], end)
        end = targets_BT[:, -1]


def test_an_epoch_visits_nearly_every_byte_once_and_the_next_one_in_another_order() -> None:
    source = streams()
    epochs = [torch.cat([source.next_batch()[0].flatten() for _ in range(8)]) for _ in range(3)]
    for epoch in epochs:
        assert len(epoch) == len(epoch.unique()) == 4 * 8 * 6
    assert not torch.equal(epochs[0], epochs[1])


def test_sites_with_different_seeds_read_in_different_orders() -> None:
    assert starts(streams(seed=1).next_batch()) != starts(streams(seed=2).next_batch())
    assert starts(streams(seed=1).next_batch()) == starts(streams(seed=1).next_batch())


def test_ranks_share_an_epoch_without_overlap() -> None:
    sources = [streams(rank=rank, num_ranks=2) for rank in range(2)]
    seen = torch.cat([source.next_batch()[0].flatten() for source in sources for _ in range(4)])
    assert len(seen) == len(seen.unique()) == 2 * 4 * 4 * 6


@pytest.mark.parametrize("num_batches", [0, 3, 8, 11])
def test_a_position_is_resumed_exactly(num_batches: int) -> None:
    source, resumed = streams(seed=3), streams(seed=3)
    for _ in range(num_batches):
        source.next_batch()
    resumed.load_state_dict(source.state_dict())
    for _ in range(10):
        assert torch.equal(source.next_batch()[0], resumed.next_batch()[0])


def test_the_shortest_text_is_one_window_a_stream() -> None:
    source = ByteStreams(b"0123456" * 4, batch_size=4, window_bytes=6, seed=0, rank=0, num_ranks=1)
    batches = [source.next_batch() for _ in range(5)]
    assert all(inputs_BT.shape == (4, 6) for inputs_BT, _ in batches)


# --- the task ------------------------------------------------------------------------------------------------


def test_the_task_is_loaded_by_its_name(data: Path, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, LanguageModelConfig(data=(data,)))
    task = load_task(spec, rank=0, num_ranks=1, device=CPU)
    assert isinstance(task, LanguageModelTask)
    model = task.make_model()
    inputs, targets = task.next_batch()
    logits, state = task.forward(model, inputs, None)
    assert logits.shape == (4, 32, 256)
    assert task.forward(model, inputs, state)[0].shape == logits.shape
    expected = functional.cross_entropy(logits.reshape(-1, 256), targets.reshape(-1))
    assert task.loss(logits, targets).item() == pytest.approx(expected.item())


def test_too_little_data_is_refused(data: Path, tmp_path: Path) -> None:
    spec = spec_of(tmp_path, LanguageModelConfig(data=(data,)), batch_size=400)
    with pytest.raises(DataError, match="give more text"):
        load_task(spec, rank=0, num_ranks=1, device=CPU)


class Uniform(nn.Module):
    """Predicts every byte alike, and counts what it was asked to predict."""

    def __init__(self) -> None:
        super().__init__()
        self.num_predictions = 0
        self.states: list[object] = []

    def forward(self, bytes_BT: Tensor, state: object) -> tuple[Tensor, object]:
        self.num_predictions += bytes_BT.numel()
        self.states.append(state)
        return torch.zeros(*bytes_BT.shape, 256), len(self.states)


@pytest.mark.parametrize("held_out_bytes", [2, 33, 100, 500, 5000, 8001])
def test_the_held_out_loss_is_the_mean_over_its_bytes(
    data: Path, tmp_path: Path, held_out_bytes: int
) -> None:
    held_out = tmp_path / "held-out.txt"
    held_out.write_bytes(b"a" * (held_out_bytes - 1) + b"\n")
    spec = spec_of(tmp_path, LanguageModelConfig(data=(data,), held_out=(held_out,)))
    task = LanguageModelTask(spec, rank=0, num_ranks=1, device=CPU)
    model = Uniform()
    assert task.evaluate(model) == pytest.approx(math.log(256))
    assert held_out_bytes - 32 <= model.num_predictions < held_out_bytes
    assert model.states == [None, *range(1, len(model.states))], "the state is carried"


def test_evaluation_leaves_the_training_position_alone(data: Path, tmp_path: Path) -> None:
    task = LanguageModelTask(
        spec_of(tmp_path, LanguageModelConfig(data=(data,))), rank=0, num_ranks=1, device=CPU
    )
    before = task.state_dict()
    losses = [task.evaluate(ByteLSTM(LanguageModelConfig())) for _ in range(2)]
    assert task.state_dict() == before
    assert all(4 < loss < 7 for loss in losses)


def test_a_model_that_diverged_has_no_finite_loss(data: Path, tmp_path: Path) -> None:
    task = LanguageModelTask(
        spec_of(tmp_path, LanguageModelConfig(data=(data,))), rank=0, num_ranks=1, device=CPU
    )
    model = ByteLSTM(LanguageModelConfig())
    nn.init.constant_(model.readout.bias, math.inf)
    assert math.isnan(task.evaluate(model))


def test_it_learns(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LanguageModelConfig(data=(data,), embedding_size=16, hidden_size=32, num_layers=1)
    task = LanguageModelTask(spec_of(tmp_path, config), rank=0, num_ranks=1, device=CPU)
    model = task.make_model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    before, state = task.evaluate(model), None
    for _ in range(60):
        inputs, targets = task.next_batch()
        logits, state = task.forward(model, inputs, state)
        state = tuple(tensor.detach() for tensor in state)
        optimizer.zero_grad()
        task.loss(logits, targets).backward()
        optimizer.step()
    assert task.evaluate(model) < 0.5 * before
