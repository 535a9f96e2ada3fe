"""The click-through task: its model, its data, and what it is evaluated by."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from p2pcodistill.config import CodistillationConfig, FramesConfig, GroupConfig, GroupSpec, TrainingConfig
from p2pcodistill.errors import DataError
from p2pcodistill.group.task import MAX_PREDICTIONS, load_task
from p2pcodistill.task_configs import ClicksConfig
from p2pcodistill.tasks import clicks as clicks_module
from p2pcodistill.tasks.click_files import NUM_CATEGORIES, NUM_DENSE, NUM_INTEGERS, Clicks
from p2pcodistill.tasks.clicks import ClickNetwork, ClicksTask, SmeLU, load_site_clicks
from p2pcodistill.tasks.preflight import require_data

CPU = torch.device("cpu")


def config(**fields: Any) -> ClicksConfig:
    small = {"num_generated_examples": 800, "num_buckets": 20, "embedding_size": 2, "hidden_sizes": (8, 4)}
    return ClicksConfig(name="clicks", **(small | fields))


def task_of(
    task: ClicksConfig, *, batch_size: int = 32, seed: int = 0, rank: int = 0, num_ranks: int = 1
) -> ClicksTask:
    nowhere = Path("unused")
    spec = GroupSpec(
        site="berlin",
        link_address="ipc://unused",
        link_token="token",
        outbox_folder=nowhere,
        training_folder=nowhere,
        model_path=nowhere,
        error_path=nowhere,
        teachers=({},),
        num_students=1,
        group=GroupConfig(),
        task=task,
        training=TrainingConfig(batch_size=batch_size, seed=seed),
        codistillation=CodistillationConfig(),
        frames=FramesConfig(),
    )
    loaded = load_task(spec, rank=rank, num_ranks=num_ranks, device=CPU)
    assert isinstance(loaded, ClicksTask)
    return loaded


class Fixed(nn.Module):
    """Predicts what it is given: the same logit for every example, or one for each in turn."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.logits_N = torch.tensor(logits, dtype=torch.float64)
        self.position = 0

    def forward(self, dense_BD: Tensor, buckets_BK: Tensor) -> Tensor:
        chosen = (torch.arange(len(dense_BD)) + self.position) % len(self.logits_N)
        self.position += len(dense_BD)
        return functional.pad(self.logits_N[chosen, None], (1, 0))


def logits_of(probabilities_N: Any) -> list[float]:
    return np.log(probabilities_N / (1 - probabilities_N)).tolist()


# --- the model ---------------------------------------------------------------------------------------------------


def test_the_default_model_has_its_documented_size() -> None:
    model = ClickNetwork(ClicksConfig(name="clicks"))
    assert sum(parameter.numel() for parameter in model.parameters()) == 248_449


def test_the_papers_model_is_a_matter_of_configuration() -> None:
    model = ClickNetwork(config(hidden_sizes=(2560, 1024, 256)))
    widths = [layer.out_features for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert widths == [2560, 1024, 256, 1]
    assert sum(isinstance(layer, nn.ReLU) for layer in model.modules()) == 3


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_logits_are_two_columns_in_float32_of_which_the_first_is_zero(precision: torch.dtype) -> None:
    task = task_of(config())
    model = task.make_model()
    inputs, labels_B = task.next_batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
        logits_B2, state = task.forward(model, inputs, None)
    assert state is None
    assert logits_B2.shape == (32, 2) and logits_B2.dtype == torch.float32
    assert not logits_B2[:, 0].any() and logits_B2[:, 1].unique().numel() > 1
    expected = functional.binary_cross_entropy_with_logits(logits_B2[:, 1], labels_B.float())
    torch.testing.assert_close(task.loss(logits_B2, labels_B), expected)


@pytest.mark.parametrize("activation", ["relu", "gelu", "smelu"])
def test_every_parameter_learns_under_each_activation(activation: str) -> None:
    task = task_of(config(activation=activation))
    model = task.make_model()
    inputs, labels_B = task.next_batch()
    task.loss(task.forward(model, inputs, None)[0], labels_B).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_smelu_is_a_relu_with_a_round_corner() -> None:
    inputs = torch.tensor([-3.0, -1.0, -0.5, 0.0, 1.0, 2.5], requires_grad=True)
    outputs = SmeLU()(inputs)
    torch.testing.assert_close(outputs, torch.tensor([0, 0, 0.0625, 0.25, 1, 2.5]))
    outputs.sum().backward()
    torch.testing.assert_close(inputs.grad, torch.tensor([0, 0, 0.25, 0.5, 1, 1]))


def test_categories_of_different_columns_do_not_share_an_embedding() -> None:
    model = ClickNetwork(config())
    clicks = load_site_clicks(config()).train
    assert clicks.buckets_NK.max() < model.embedding.num_embeddings == NUM_CATEGORIES * 20


# --- data --------------------------------------------------------------------------------------------------------


def keys_of(clicks: Clicks) -> set[float]:
    """Generated examples by their true probability, which no two share."""
    assert clicks.truth_N is not None
    return set(clicks.truth_N.tolist())


def test_sites_share_generated_examples_without_overlap_and_are_evaluated_alike() -> None:
    sites = [load_site_clicks(config(shards=(shard,), num_shards=3)) for shard in range(3)]
    held_out = keys_of(sites[0].held_out)
    assert all(keys_of(site.held_out) == held_out for site in sites)
    parts = [held_out, *(keys_of(site.train) for site in sites)]
    assert [len(part) for part in parts] == [100, 234, 233, 233]
    assert len(set().union(*parts)) == 800
    pooled = load_site_clicks(config(shards=(0, 1, 2), num_shards=3))
    assert keys_of(pooled.train) == set().union(*parts[1:]) and keys_of(pooled.held_out) == held_out


def test_examples_can_be_fewer() -> None:
    clicks = load_site_clicks(config(shards=(0, 1), num_shards=4, max_examples=50, max_held_out_examples=20))
    assert (len(clicks.train), len(clicks.held_out)) == (100, 20)


def test_the_training_seed_changes_the_order_alone() -> None:
    first, second = task_of(config(), seed=1, batch_size=700), task_of(config(), seed=2, batch_size=700)
    (dense_BD, _), _ = first.next_batch()
    (other_dense_BD, _), _ = second.next_batch()
    assert not torch.equal(dense_BD, other_dense_BD)
    assert torch.equal(dense_BD.sum(1).sort().values, other_dense_BD.sum(1).sort().values)
    assert torch.equal(first.predict(Fixed(0.0)).labels_N, second.predict(Fixed(0.0)).labels_N)


def write_rows(path: Path, num_rows: int, *, start: int = 0) -> Path:
    """Row i clicks if i is odd, and has i as its first integer."""
    rows = []
    for index in range(start, start + num_rows):
        integers = [index, *[1] * (NUM_INTEGERS - 1)]
        rows.append("\t".join(map(str, [index % 2, *integers, *["x"] * NUM_CATEGORIES])))
    path.write_text("\n".join(rows))
    return path


def indices_of(clicks: Clicks) -> set[int]:
    return set(np.expm1(clicks.dense_ND[:, 0].astype(np.float64)).round().astype(int).tolist())


def test_files_are_split_like_generated_examples(tmp_path: Path) -> None:
    files = (write_rows(tmp_path / "a", 50), write_rows(tmp_path / "b", 30, start=50))
    sites = [load_site_clicks(config(data=files, shards=(shard,), num_shards=2)) for shard in range(2)]
    parts = [indices_of(sites[0].held_out), *(indices_of(site.train) for site in sites)]
    assert [len(part) for part in parts] == [10, 35, 35]
    assert set().union(*parts) == set(range(80))
    assert all(
        (site.train.labels_N == 1).sum() == sum(i % 2 for i in indices_of(site.train)) for site in sites
    )


def test_held_out_files_are_evaluated_on_and_all_else_is_trained_on(tmp_path: Path) -> None:
    data, held_out = write_rows(tmp_path / "a", 50), write_rows(tmp_path / "b", 30, start=50)
    clicks = load_site_clicks(config(data=(data,), held_out=(held_out,)))
    assert indices_of(clicks.train) == set(range(50)) and indices_of(clicks.held_out) == set(range(50, 80))
    fewer = load_site_clicks(config(data=(data,), held_out=(held_out,), max_held_out_examples=5))
    assert len(fewer.held_out) == 5 and indices_of(fewer.held_out) < set(range(50, 80))


def test_held_out_rows_that_are_all_malformed_are_refused(tmp_path: Path) -> None:
    data, held_out = write_rows(tmp_path / "a", 80), tmp_path / "b"
    held_out.write_text("no row of clicks\n" * 5)
    with pytest.raises(DataError, match=r"b: all rows to evaluate on are malformed: mend them, or list"):
        load_site_clicks(config(data=(data,), held_out=(held_out,), malformed_rows="skip"))


def test_predictions_are_spread_over_files_that_are_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, held_out = write_rows(tmp_path / "a", 80), tmp_path / "b"
    rows = write_rows(held_out, 40).read_text().split("\n")
    held_out.write_text("\n".join(sorted(rows)))  # all clicks behind
    monkeypatch.setattr(clicks_module, "MAX_PREDICTIONS", 6)
    predictions = task_of(config(data=(data,), held_out=(held_out,))).predict(Fixed(0.0))
    assert predictions.labels_N.tolist() == [0, 0, 0, 1, 1, 1]


def test_too_little_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"700 example.* batch of 701: give more data"):
        task_of(config(), batch_size=701)
    with pytest.raises(DataError, match=r"a, line 1: 1 columns instead of 40"):
        (tmp_path / "a").write_text("no clicks")
        require_data(config(data=(tmp_path / "a",)), batch_size=1, num_ranks=1)
    with pytest.raises(DataError, match=r"5 example.* too few for 2 parts"):
        task_of(config(data=(write_rows(tmp_path / "a", 5),)))


# --- training ----------------------------------------------------------------------------------------------------


def train(task: ClicksTask, model: nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
    for _ in range(num_steps):
        inputs, labels_B = task.next_batch()
        optimizer.zero_grad()
        task.loss(task.forward(model, inputs, None)[0], labels_B).backward()
        optimizer.step()


def test_a_resumed_training_goes_on_to_the_last_bit() -> None:
    models, snapshot = [], None
    for num_steps in (30, 12):  # an epoch has 21
        torch.manual_seed(0)
        task = task_of(config())
        model = task.make_model()
        optimizer = torch.optim.Adagrad(model.parameters(), 0.01)
        train(task, model, optimizer, num_steps)
        models.append(model)
        snapshot = (task.state_dict(), model.state_dict(), optimizer.state_dict())
    assert snapshot is not None
    resumed = task_of(config())
    model = resumed.make_model()
    optimizer = torch.optim.Adagrad(model.parameters(), 0.01)
    for target, state in zip((resumed, model, optimizer), snapshot, strict=True):
        target.load_state_dict(state)
    train(resumed, model, optimizer, 18)
    for parameter, expected in zip(model.parameters(), models[0].parameters(), strict=True):
        assert torch.equal(parameter, expected)


def test_ranks_draw_different_examples() -> None:
    tasks = [task_of(config(), rank=rank, num_ranks=2) for rank in range(2)]
    rows = torch.cat([task.next_batch()[0][0] for task in tasks for _ in range(10)])
    assert rows.shape == (2 * 10 * 32, NUM_DENSE)
    batches = [task.next_batch()[0][1] for task in tasks]
    assert not torch.equal(*batches)


def test_it_learns_what_a_constant_cannot_say() -> None:
    torch.manual_seed(0)
    task = task_of(config(num_generated_examples=8000, hidden_sizes=(16,)), batch_size=64)
    rate = float(task.predict(Fixed(0.0)).labels_N.float().mean())
    constant = task.evaluate(Fixed(*logits_of(np.array([rate]))))
    model = task.make_model()
    train(task, model, torch.optim.Adam(model.parameters(), 5e-3), 200)
    learnt = task.evaluate(model)
    assert learnt.loss < constant.loss - 0.02
    assert learnt.metrics["excess_log_loss"] < 0.85 * constant.metrics["excess_log_loss"]
    assert learnt.metrics["auc"] > 0.6


# --- evaluation --------------------------------------------------------------------------------------------------


def test_the_truth_has_no_excess_log_loss_and_anything_else_has() -> None:
    task = task_of(config())
    truth_N = load_site_clicks(config()).held_out.truth_N
    assert truth_N is not None
    perfect = task.evaluate(Fixed(*logits_of(truth_N)))
    assert perfect.metrics["excess_log_loss"] == pytest.approx(0, abs=1e-12)
    shifted = task.evaluate(Fixed(*[logit + 0.5 for logit in logits_of(truth_N)]))
    off_N = 1 / (1 + np.exp(-np.array(logits_of(truth_N)) - 0.5))
    expected = truth_N * np.log(truth_N / off_N) + (1 - truth_N) * np.log((1 - truth_N) / (1 - off_N))
    assert shifted.metrics["excess_log_loss"] == pytest.approx(expected.mean())
    assert expected.mean() > 0.01


def test_the_log_loss_is_that_of_the_labels() -> None:
    task = task_of(config())
    evaluation = task.evaluate(Fixed(1.0))
    labels_N = load_site_clicks(config()).held_out.labels_N
    expected = np.where(labels_N == 1, math.log1p(math.exp(-1)), math.log1p(math.exp(1))).mean()
    assert evaluation.loss == evaluation.metrics["log_loss"] == pytest.approx(expected)
    assert evaluation.metrics["auc"] == 0.5, "ties count half"


def test_the_area_under_the_curve_is_the_share_of_pairs_in_order(tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "held-out", 6)  # labels 0 1 0 1 0 1
    task = task_of(config(held_out=(held_out,)))
    # Of nine pairs of a click and another: 4 > 1, 4 > 3, 4 = 4, 2 > 1, 5 > all.
    evaluation = task.evaluate(Fixed(1.0, 4.0, 3.0, 2.0, 4.0, 5.0))
    assert evaluation.metrics["auc"] == pytest.approx((1 + 1 + 0.5 + 1 + 3) / 9)
    assert "excess_log_loss" not in evaluation.metrics, "of files nobody knows the truth"


def test_there_is_no_area_where_all_labels_are_alike(tmp_path: Path) -> None:
    held_out = write_rows(tmp_path / "held-out", 1)
    evaluation = task_of(config(held_out=(held_out,))).evaluate(Fixed(0.0))
    assert evaluation.metrics == {"log_loss": pytest.approx(math.log(2))}


def test_a_model_that_diverged_has_no_finite_loss_and_no_metrics() -> None:
    evaluation = task_of(config()).evaluate(Fixed(math.nan))
    assert math.isnan(evaluation.loss) and evaluation.metrics == {}


def test_predictions_are_of_the_same_examples_for_every_model_and_every_site() -> None:
    tasks = [task_of(config(shards=(shard,), num_shards=2), seed=shard) for shard in range(2)]
    model = tasks[0].make_model()
    first, second = (task.predict(model) for task in tasks)
    assert torch.equal(first.probabilities_NC, second.probabilities_NC)
    assert torch.equal(first.labels_N, second.labels_N)
    assert first.probabilities_NC.dtype == torch.float32 and first.labels_N.dtype == torch.int64
    torch.testing.assert_close(first.probabilities_NC.sum(1), torch.ones(100))


def test_predictions_are_capped() -> None:
    task = task_of(config(num_generated_examples=8 * (MAX_PREDICTIONS + 1)))
    model = Fixed(0.3)
    assert task.predict(model).probabilities_NC.shape == (MAX_PREDICTIONS, 2)
    assert task.predict(model).labels_N.shape == (MAX_PREDICTIONS,)
    # All of the held-out examples are evaluated on.
    model.position = 0
    task.evaluate(model)
    assert model.position == MAX_PREDICTIONS + 1
