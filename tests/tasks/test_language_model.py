"""The language-model task: its models, where its data goes, what it is evaluated on, and what it predicts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from p2pcodistill.checkpoint.snapshot import schema_of
from p2pcodistill.config import CodistillationConfig, FramesConfig, GroupConfig, GroupSpec, TrainingConfig
from p2pcodistill.errors import ConfigError, DataError, SchemaMismatchError
from p2pcodistill.group.task import MAX_PREDICTIONS, load_task
from p2pcodistill.strict import parse_model
from p2pcodistill.task_configs import LanguageModelConfig
from p2pcodistill.tasks import language_model as language_model_module
from p2pcodistill.tasks.language_model import LanguageModelTask
from p2pcodistill.tasks.recurrent import LSTMModel
from p2pcodistill.tasks.vocabulary_training import train_word_pieces

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
        group=GroupConfig(),
        task=task,
        training=TrainingConfig(batch_size=batch_size),
        codistillation=CodistillationConfig(),
        frames=FramesConfig(),
    )


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
    assert task.evaluate(model).loss == pytest.approx(math.log(256))
    assert held_out_bytes - 32 <= model.num_predictions < held_out_bytes
    assert model.states == [None, *range(1, len(model.states))], "the state is carried"


def test_evaluation_leaves_the_training_position_alone(data: Path, tmp_path: Path) -> None:
    task = LanguageModelTask(
        spec_of(tmp_path, LanguageModelConfig(data=(data,))), rank=0, num_ranks=1, device=CPU
    )
    before = task.state_dict()
    losses = [task.evaluate(LSTMModel(LanguageModelConfig())).loss for _ in range(2)]
    assert task.state_dict() == before
    assert all(4 < loss < 7 for loss in losses)


def test_a_model_that_diverged_has_no_finite_loss(data: Path, tmp_path: Path) -> None:
    task = LanguageModelTask(
        spec_of(tmp_path, LanguageModelConfig(data=(data,))), rank=0, num_ranks=1, device=CPU
    )
    model = LSTMModel(LanguageModelConfig())
    nn.init.constant_(model.readout.bias, math.inf)
    assert math.isnan(task.evaluate(model).loss)


def test_it_learns(data: Path, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = LanguageModelConfig(data=(data,), embedding_size=16, hidden_size=32, num_layers=1)
    task = LanguageModelTask(spec_of(tmp_path, config), rank=0, num_ranks=1, device=CPU)
    model = task.make_model()
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    before, state = task.evaluate(model).loss, None
    for _ in range(60):
        inputs, targets = task.next_batch()
        logits, state = task.forward(model, inputs, state)
        state = tuple(tensor.detach() for tensor in state)
        optimizer.zero_grad()
        task.loss(logits, targets).backward()
        optimizer.step()
    assert task.evaluate(model).loss < 0.5 * before


def task_of(folder: Path, config: LanguageModelConfig, **more: Any) -> LanguageModelTask:
    return LanguageModelTask(spec_of(folder, config, **more), rank=0, num_ranks=1, device=CPU)


# --- models ------------------------------------------------------------------------------------------------------

SMALL = {"embedding_size": 8, "hidden_size": 16, "num_layers": 1, "num_heads": 2, "window_tokens": 8}
MODELS = [
    {"model": "lstm"},
    {"model": "layer-norm-lstm"},
    {"model": "transformer"},
    {
        "model": "hugging-face",
        "architecture": "gpt2",
        "architecture_options": {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 8},
    },
]


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["model"])
def test_every_model_trains_is_evaluated_and_predicts(
    data: Path, tmp_path: Path, model: dict[str, Any]
) -> None:
    torch.manual_seed(0)
    config = LanguageModelConfig(data=(data,), max_held_out_bytes=600, **SMALL, **model)
    task = task_of(tmp_path, config)
    network = task.make_model()
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    network.eval()
    before, state = task.evaluate(network).loss, None
    network.train()
    for _ in range(20):
        inputs, targets = task.next_batch()
        logits, state = task.forward(network, inputs, state)
        state = state and tuple(tensor.detach() for tensor in state)
        optimizer.zero_grad()
        task.loss(logits, targets).backward()
        optimizer.step()
    network.eval()
    evaluation = task.evaluate(network)
    assert evaluation.loss < 0.8 * before
    assert evaluation.metrics["bits_per_byte"] == pytest.approx(evaluation.loss / math.log(2))
    assert evaluation.metrics["data_passes"] > 0
    predictions = task.predict(network)
    own_loss = -predictions.probabilities_NC.gather(1, predictions.labels_N[:, None]).log().mean()
    assert float(own_loss) == pytest.approx(evaluation.loss, rel=1e-4), "here, all positions are predicted"


@pytest.mark.parametrize(
    ("table", "message"),
    [
        ({"model": "gru"}, "model: .*'hugging-face', got 'gru'"),
        ({"model": "hugging-face"}, "architecture belongs to model = 'hugging-face', which needs it"),
        ({"architecture": "gpt2"}, "architecture belongs to model = 'hugging-face'"),
        ({"architecture_options": {"n_layer": 2}}, "architecture_options are those of an architecture"),
        (
            {"model": "transformer", "num_heads": 3},
            r"hidden_size \(256\) is not a multiple of num_heads \(3\)",
        ),
        ({"window_bytes": 16}, "unknown key 'window_bytes': did you mean 'window_tokens'"),
    ],
)
def test_models_that_make_no_sense_are_refused(table: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as refusal:
        parse_model(LanguageModelConfig, table, source="site.toml")
    assert "\n" not in str(refusal.value)


# --- vocabularies ------------------------------------------------------------------------------------------------


@pytest.fixture
def pieces(data: Path, tmp_path: Path) -> Path:
    path = tmp_path / "pieces.json"
    path.write_bytes(train_word_pieces([data.read_bytes()], 280))
    return path


def test_word_pieces_are_what_is_predicted(data: Path, pieces: Path, tmp_path: Path) -> None:
    config = LanguageModelConfig(data=(data,), vocabulary=pieces, max_held_out_bytes=600, **SMALL)
    task = task_of(tmp_path, config)
    model = task.make_model()
    inputs_BT, _ = task.next_batch()
    logits_BTV, _ = task.forward(model, inputs_BT, None)
    assert logits_BTV.shape == (4, 8, 280)
    evaluation = task.evaluate(model)
    assert evaluation.loss == pytest.approx(math.log(280), rel=0.1)
    assert 0 < evaluation.metrics["bits_per_byte"] < evaluation.loss / math.log(2), "pieces are longer"
    assert (tmp_path / "vocabulary.json").read_bytes() == pieces.read_bytes(), "kept beside the run"


def test_a_run_goes_on_with_its_own_vocabulary_only(data: Path, pieces: Path, tmp_path: Path) -> None:
    config = LanguageModelConfig(data=(data,), vocabulary=pieces)
    task_of(tmp_path, config)
    pieces.write_bytes(train_word_pieces([data.read_bytes()], 281))
    with pytest.raises(DataError, match="not the vocabulary that this run began with"):
        task_of(tmp_path, config)


def test_sites_with_different_vocabularies_refuse_each_other_by_name(
    data: Path, pieces: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.json"
    other.write_bytes(train_word_pieces([b"other words make other pieces, of the same number\n" * 3], 280))
    schemas = []
    for site, vocabulary in (("berlin", pieces), ("tokyo", other), ("lima", pieces)):
        (tmp_path / site).mkdir()
        task = task_of(tmp_path / site, LanguageModelConfig(data=(data,), vocabulary=vocabulary, **SMALL))
        schemas.append(schema_of(task.make_model()))
    schemas[0].check(schemas[2])
    with pytest.raises(SchemaMismatchError, match=r"'vocabulary_[0-9a-f]{16}' is .*missing"):
        schemas[0].check(schemas[1])


# --- unlabelled text ---------------------------------------------------------------------------------------------


def test_unlabelled_rows_have_inputs_and_no_targets(data: Path, tmp_path: Path) -> None:
    unlabelled = tmp_path / "unlabelled.txt"
    unlabelled.write_text("".join(f"UNLABELLED {index}\n" for index in range(200)))
    config = LanguageModelConfig(data=(data,), unlabelled=(unlabelled,), unlabelled_batch_size=3)
    task, resumed = task_of(tmp_path, config), task_of(tmp_path, config)
    alone = task_of(tmp_path, LanguageModelConfig(data=(data,)))
    for _ in range(5):
        inputs_BT, targets_BT = task.next_batch()
        expected_BT, expected_targets_BT = alone.next_batch()
        assert (inputs_BT.shape, targets_BT.shape) == ((7, 32), (4, 32))
        assert torch.equal(inputs_BT[:4], expected_BT) and torch.equal(targets_BT, expected_targets_BT)
        assert b"UNLABELLED" in bytes(inputs_BT[4:].flatten().tolist())
    logits_BTV = torch.randn(7, 32, 256)
    assert task.loss(logits_BTV, targets_BT) == task.loss(logits_BTV[:4], targets_BT)
    resumed.load_state_dict(task.state_dict())
    assert torch.equal(resumed.next_batch()[0], task.next_batch()[0])


# --- predictions -------------------------------------------------------------------------------------------------


def test_predictions_are_spread_over_the_held_out_text_and_capped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held_out = tmp_path / "held-out.txt"
    held_out.write_bytes(bytes(65 + index // 200 for index in range(5000)) + b"\n")
    config = LanguageModelConfig(data=(data,), held_out=(held_out,))
    task = task_of(tmp_path, config)
    model = LSTMModel(config)
    first, second = task.predict(model), task.predict(model)
    assert first.probabilities_NC.shape == (MAX_PREDICTIONS, 256)
    assert first.probabilities_NC.dtype == torch.float32
    torch.testing.assert_close(first.probabilities_NC.sum(1), torch.ones(MAX_PREDICTIONS))
    assert set(first.labels_N.tolist()) == set(range(65, 90)), "from all parts of the text"
    assert torch.equal(first.probabilities_NC, second.probabilities_NC)
    assert torch.equal(first.labels_N, second.labels_N)
    monkeypatch.setattr(language_model_module, "MAX_PREDICTION_BYTES", 100 * 4 * 256)
    few = task.predict(model)
    assert few.probabilities_NC.shape == (100, 256)
    assert len(set(few.labels_N.tolist())) > 20
