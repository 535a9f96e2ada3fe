"""The reference loop: what it tells, what it keeps, and that a resumed run is the one that was never stopped."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from patience import GENEROUS_S
from safetensors.torch import load_file, load_model
from torch import Tensor

from p2pcodistill.checkpoint.decoder import decode_frame
from p2pcodistill.checkpoint.encoder import FrameEncoder
from p2pcodistill.checkpoint.snapshot import take_snapshot
from p2pcodistill.config import GROUP_SPEC_VARIABLE, FramesConfig, GroupConfig, GroupSpec, TrainingConfig
from p2pcodistill.errors import GroupError
from p2pcodistill.group import exchange as exchange_module
from p2pcodistill.group import train as train_module
from p2pcodistill.group.link import RankLink
from p2pcodistill.group.link_messages import FrameOffer, Left, StopRequested, VersionKnown
from p2pcodistill.group.train import choose_device, choose_precision, main, train
from p2pcodistill.tasks.language_model import LanguageModelTask
from p2pcodistill.tasks.recurrent import LSTMModel
from p2pcodistill.telemetry.training_events import (
    Evaluated,
    SnapshotSkipped,
    StepMeasured,
    TeacherExpired,
    TeacherGated,
    TeacherSwapped,
    TrainingCheckpointed,
    TrainingEnded,
    TrainingStarted,
)

Launch = Callable[[GroupSpec], Path]


def write_frame(
    folder: Path, spec: GroupSpec, origin: str = "tokyo", *, is_ruined: bool = False
) -> FrameOffer:
    """A keyframe of step 100 of a teacher, offered; a ruined one is sure of whatever it says."""
    model = LSTMModel(spec.task)
    if is_ruined:
        with torch.no_grad():
            model.readout.weight.mul_(1000)
    with (folder / f"{origin}.frame").open("wb") as file:
        FrameEncoder(FramesConfig()).encode(take_snapshot(model, 100), file)
    return FrameOffer(origin, 1, 100, str(folder), ((1, 100, f"{origin}.frame"),))


def with_training(spec: GroupSpec, **changes: Any) -> GroupSpec:
    return spec.model_copy(update={"training": spec.training.model_copy(update=changes)})


def in_folder(spec: GroupSpec, folder: Path) -> GroupSpec:
    folder.mkdir(exist_ok=True)
    return spec.model_copy(
        update={"training_folder": folder / "training", "model_path": folder / "model.safetensors"}
    )


@pytest.fixture
def run(launch: Launch, stub_node) -> Callable[[GroupSpec], dict[str, Tensor]]:
    """Train as a freshly started rank would; the final model, if it got that far."""

    def run_rank(spec: GroupSpec) -> dict[str, Tensor]:
        launch(spec)
        torch.manual_seed(12345)  # a new process has random states of its own
        train(spec)
        stub_node.wait_for(lambda: stub_node.messages[-1] == Left())
        return load_file(spec.model_path) if spec.model_path.exists() else {}

    return run_rank


class Crash(Exception):
    """An injected crash of the training script."""


def crash_at(monkeypatch: pytest.MonkeyPatch, num_batches: int) -> list[int]:
    """Let the task fail at its batch `num_batches` (0-based); the returned list has one entry for each crash."""
    crashes: list[int] = []
    next_batch = LanguageModelTask.next_batch
    calls = iter(range(10**6))

    def failing(self: LanguageModelTask) -> tuple[Tensor, Tensor]:
        if next(calls) == num_batches:
            crashes.append(num_batches)
            raise Crash
        return next_batch(self)

    monkeypatch.setattr(LanguageModelTask, "next_batch", failing)
    return crashes


def assert_same_model(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys() and one
    assert all(torch.equal(one[name], other[name]) for name in one)


# --- a run ---------------------------------------------------------------------------------------------------


def test_a_run_tells_its_story_and_leaves_a_model(spec: GroupSpec, run: Any, stub_node) -> None:
    model_tensors = run(spec)
    events = stub_node.events
    assert isinstance(events[0], TrainingStarted)
    assert (events[0].start_step, events[0].num_steps, events[0].num_ranks) == (0, 12, 1)
    assert events[0].num_parameters == sum(tensor.numel() for tensor in model_tensors.values())
    assert (events[0].device, events[0].precision) == ("cpu", "float32")
    assert [event.step for event in events if isinstance(event, StepMeasured)] == [4, 8, 12]
    assert [event.step for event in events if isinstance(event, Evaluated)] == [5, 10, 12]
    assert [event.step for event in events if isinstance(event, TrainingCheckpointed)] == [6, 12]
    last = events[-1]
    assert isinstance(last, TrainingEnded) and last.finished and last.step == 12
    measured = [event for event in events if isinstance(event, StepMeasured)]
    assert 0 < sum(event.duration_s for event in measured) <= last.duration_s
    assert 0 < sum(event.exchange_s for event in measured) <= last.exchange_s < last.duration_s
    assert all(event.distillation_loss is None for event in measured)
    published = [frame.step for frame in stub_node.frames]
    skipped = [event.step for event in events if isinstance(event, SnapshotSkipped)]
    assert sorted(published + skipped) == [2, 5, 10, 12] and published[-1] == 12, "the last step is published"
    assert isinstance(stub_node.messages[-1], Left), "everything was handed over before the end"
    load_model(LSTMModel(spec.task), spec.model_path)


def test_the_loss_falls(spec: GroupSpec, run: Any, stub_node) -> None:
    run(with_training(spec, num_steps=60, learning_rate=2e-2, evaluation_interval_steps=30))
    losses = [event.val_loss for event in stub_node.events if isinstance(event, Evaluated)]
    assert losses[-1] < losses[0] < 5.6


def test_a_teacher_teaches(spec: GroupSpec, run: Any, stub_node, tmp_path: Path) -> None:
    stub_node.offers = (write_frame(tmp_path, spec),)
    alone = run(in_folder(spec, tmp_path / "alone"))
    taught = run(in_folder(spec.model_copy(update={"teachers": ({"tokyo": 1.0},)}), tmp_path / "taught"))
    events = stub_node.events
    [swap] = [event for event in events if isinstance(event, TeacherSwapped)]
    assert (swap.teacher, swap.incarnation, swap.teacher_step) == ("tokyo", 1, 100)
    assert any(event.distillation_loss for event in events if isinstance(event, StepMeasured))
    assert not torch.equal(alone["readout.weight"], taught["readout.weight"])


def test_training_goes_on_when_a_teachers_weights_are_ruined(
    spec: GroupSpec, run: Any, stub_node, tmp_path: Path
) -> None:
    stub_node.offers = (write_frame(tmp_path, spec), write_frame(tmp_path, spec, "oslo", is_ruined=True))
    spec = with_training(spec, num_steps=60, learning_rate=1e-3, evaluation_interval_steps=30)
    run(spec.model_copy(update={"teachers": ({"tokyo": 1.0, "oslo": 1.0},)}))
    events = stub_node.events
    [gated] = [event for event in events if isinstance(event, TeacherGated)]
    assert (gated.teacher, gated.incarnation, gated.teacher_step) == ("oslo", 1, 100)
    assert gated.loss is not None and gated.student_loss is not None
    assert gated.loss > 20 > 6 > gated.student_loss
    measured = [event for event in events if isinstance(event, StepMeasured)]
    assert any(event.distillation_loss for event in measured if event.step > gated.step), (
        "tokyo goes on teaching"
    )
    losses = [event.val_loss for event in events if isinstance(event, Evaluated)]
    assert losses[-1] < losses[0] < 5.6


def test_a_teacher_whose_news_do_not_arrive_is_over_the_limit_on_staleness(
    spec: GroupSpec, run: Any, stub_node, tmp_path: Path
) -> None:
    stub_node.offers = (write_frame(tmp_path, spec),)
    stub_node.known = (VersionKnown("tokyo", 1, 350),)
    spec = with_training(spec, num_steps=60)
    codistillation = spec.codistillation.model_copy(update={"max_staleness_steps": 249})
    run(spec.model_copy(update={"teachers": ({"tokyo": 1.0},), "codistillation": codistillation}))
    [expired] = [event for event in stub_node.events if isinstance(event, TeacherExpired)]
    assert (expired.teacher, expired.teacher_step, expired.staleness_steps) == ("tokyo", 100, 250)
    measured = [event for event in stub_node.events if isinstance(event, StepMeasured)]
    assert all(event.distillation_loss is None for event in measured)


def test_the_average_is_evaluated_and_kept_beside_the_last_weights(
    spec: GroupSpec, run: Any, stub_node, tmp_path: Path
) -> None:
    spec = with_training(spec, learning_rate=5e-2, learning_rate_schedule="constant")
    last = run(in_folder(spec, tmp_path / "last"))
    without = [event for event in stub_node.events if isinstance(event, Evaluated)]
    average = run(in_folder(with_training(spec, average_decay=0.9), tmp_path / "average"))
    beside = [event for event in stub_node.events if isinstance(event, Evaluated)]
    assert not torch.equal(average["readout.weight"], last["readout.weight"])
    assert [event.metrics["unaveraged_loss"] for event in beside] == [event.val_loss for event in without]
    assert all(event.val_loss != event.metrics["unaveraged_loss"] for event in beside)
    model = LSTMModel(spec.task)
    model.load_state_dict(average)
    assert LanguageModelTask(spec, rank=0, num_ranks=1, device=torch.device("cpu")).evaluate(
        model
    ).loss == pytest.approx(beside[-1].val_loss)


def test_smoothed_labels_change_what_is_learnt_but_not_how_it_is_measured(
    spec: GroupSpec, run: Any, stub_node, tmp_path: Path
) -> None:
    def first_loss() -> float:
        return next(event.loss for event in stub_node.events if isinstance(event, StepMeasured))

    spec = with_training(spec, report_interval_steps=1)
    plain = run(in_folder(spec, tmp_path / "plain"))
    loss = first_loss()
    smoothed = run(in_folder(with_training(spec, label_smoothing=0.2), tmp_path / "smoothed"))
    assert first_loss() == loss
    assert not torch.equal(plain["readout.weight"], smoothed["readout.weight"])


def test_sites_that_share_a_seed_of_initialisation_start_from_the_same_model(
    spec: GroupSpec, launch: Launch
) -> None:
    def begin(**changes: Any) -> train_module.Training:
        launch(with_training(spec, **changes))
        return train_module.Training(with_training(spec, **changes), torch.device("cpu"), None)

    one, other = begin(seed=1, initialisation_seed=7), begin(seed=2, initialisation_seed=7)
    third = begin(seed=2)
    assert_same_model(one.model.state_dict(), other.model.state_dict())
    assert not torch.equal(
        other.model.state_dict()["readout.weight"], third.model.state_dict()["readout.weight"]
    )
    assert not torch.equal(one._task.next_batch()[0], other._task.next_batch()[0]), "in another order"


# --- stopping and resuming -----------------------------------------------------------------------------------


OPTIONS: list[dict[str, Any]] = [
    {},
    {"precision": "bfloat16"},
    {"average_decay": 0.9, "label_smoothing": 0.1, "label_smoothing_prior": "unigram"},
    {"optimizer": "sgd", "momentum": 0.9, "nesterov": True, "learning_rate_drops": ((12, 0.1),)},
    {"optimizer": "adagrad", "weight_decay": 1e-2, "weight_decay_changes": ((12, 1e-3),)},
    {"weight_decay": 1e-2, "decay_norms_and_biases": False, "learning_rate_schedule": "linear"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ", ".join(options) or "defaults")
def test_a_crashed_run_resumes_bit_for_bit(
    spec: GroupSpec,
    run: Any,
    stub_node,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
) -> None:
    spec = with_training(spec, num_steps=20, checkpoint_interval_steps=10, **options)
    straight = run(in_folder(spec, tmp_path / "straight"))
    crashed = in_folder(spec, tmp_path / "crashed")
    with monkeypatch.context() as patch:
        crashes = crash_at(patch, 13)
        with pytest.raises(Crash):
            run(crashed)
    assert crashes == [13] and not crashed.model_path.exists()
    assert_same_model(run(crashed), straight)
    started = stub_node.events[0]
    assert isinstance(started, TrainingStarted) and started.start_step == 10
    ended = stub_node.events[-1]
    assert isinstance(ended, TrainingEnded) and ended.finished


def test_a_resumed_run_publishes_the_average_of_the_one_that_never_stopped(
    spec: GroupSpec, run: Any, stub_node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = with_training(spec, num_steps=20, checkpoint_interval_steps=10)
    spec = spec.model_copy(
        update={
            "codistillation": spec.codistillation.model_copy(update={"teacher_average_decay": 0.9}),
            "frames": FramesConfig(delta="off", keyframe="fp32"),
        }
    )

    def last_published() -> dict[str, Tensor]:
        frame = stub_node.frames[-1]
        assert frame.step == 20
        return decode_frame(Path(frame.path).read_bytes(), None, max_bytes=1 << 20).tensors

    model_tensors = run(in_folder(spec, tmp_path / "straight"))
    average = last_published()
    assert not torch.equal(average["readout.weight"], model_tensors["readout.weight"])
    crashed = in_folder(spec, tmp_path / "crashed")
    with monkeypatch.context() as patch:
        crashes = crash_at(patch, 13)
        with pytest.raises(Crash):
            run(crashed)
    assert crashes == [13]
    run(crashed)
    assert_same_model(last_published(), average)


def test_a_resume_passes_over_a_torn_checkpoint(
    spec: GroupSpec, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = with_training(spec, num_steps=20, checkpoint_interval_steps=5)
    straight = run(in_folder(spec, tmp_path / "straight"))
    crashed = in_folder(spec, tmp_path / "crashed")
    with monkeypatch.context() as patch:
        crashes = crash_at(patch, 13)
        with pytest.raises(Crash):
            run(crashed)
    assert crashes == [13]
    torn = crashed.training_folder / "step-00000010" / "shared.pt"
    torn.write_bytes(torn.read_bytes()[:1000])
    assert_same_model(run(crashed), straight)


def test_a_stopped_run_checkpoints_and_goes_on_bit_for_bit(
    spec: GroupSpec, run: Any, stub_node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = with_training(spec, checkpoint_interval_steps=1000)
    straight = run(in_folder(spec, tmp_path / "straight"))
    stopped = in_folder(spec, tmp_path / "stopped")
    received = threading.Event()

    class SignallingLink(RankLink):
        def __init__(self, address: str, token: str, on_message: Callable[[Any], None]) -> None:
            super().__init__(address, token, lambda message: (on_message(message), received.set()))

    next_batch = LanguageModelTask.next_batch
    calls = iter(range(10**6))

    def stop_in_step_4(self: LanguageModelTask) -> tuple[Tensor, Tensor]:
        if next(calls) == 3:
            stub_node.send(StopRequested())
            assert received.wait(GENEROUS_S)
        return next_batch(self)

    with monkeypatch.context() as patch:
        patch.setattr(exchange_module, "RankLink", SignallingLink)
        patch.setattr(LanguageModelTask, "next_batch", stop_in_step_4)
        assert run(stopped) == {}
    ended = stub_node.events[-1]
    assert isinstance(ended, TrainingEnded) and (ended.step, ended.finished) == (5, False)
    assert_same_model(run(stopped), straight)


def test_a_resumed_run_has_the_teachers_of_the_store_at_its_first_step(
    spec: GroupSpec, run: Any, stub_node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stub_node.offers = (write_frame(tmp_path, spec),)
    spec = with_training(
        spec.model_copy(update={"teachers": ({"tokyo": 1.0},)}), num_steps=20, checkpoint_interval_steps=10
    )
    with monkeypatch.context() as patch:
        crashes = crash_at(patch, 12)
        with pytest.raises(Crash):
            run(spec)
    assert crashes == [12]
    stub_node.wait_for_event(TeacherSwapped)
    first_swap = next(event for event in stub_node.events if isinstance(event, TeacherSwapped))
    assert first_swap.step <= 10, "otherwise there was nothing to resume"
    run(spec)
    [swap] = [event for event in stub_node.events if isinstance(event, TeacherSwapped)]
    assert (swap.step, swap.teacher_step) == (10, 100)


def test_a_finished_run_that_is_started_again_evaluates_and_publishes_once_more(
    spec: GroupSpec, run: Any, stub_node, monkeypatch: pytest.MonkeyPatch
) -> None:
    model_tensors = run(spec)
    val_loss = [event.val_loss for event in stub_node.events if isinstance(event, Evaluated)][-1]
    crashes = crash_at(monkeypatch, 0)
    assert_same_model(run(spec), model_tensors)
    evaluated, ended = stub_node.events
    assert isinstance(evaluated, Evaluated) and (evaluated.step, evaluated.val_loss) == (12, val_loss)
    assert isinstance(ended, TrainingEnded) and ended.finished and ended.step == 12
    assert [frame.step for frame in stub_node.frames] == [12]
    assert crashes == []


def test_only_the_rank_that_reports_collects_measurements(spec: GroupSpec, launch: Launch) -> None:
    launch(with_training(spec, report_interval_steps=1000))
    training = train_module.Training(spec, torch.device("cpu"), None)
    training._rank = 1
    training.run()
    assert training._step == spec.training.num_steps
    assert training._meter._losses == []


def test_a_crash_after_the_model_was_written_is_repaired(
    spec: GroupSpec, run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    straight = run(in_folder(spec, tmp_path / "straight"))
    crashed = in_folder(spec, tmp_path / "crashed")
    num_crashes = 0

    def crash(*_arguments: object) -> None:
        nonlocal num_crashes
        num_crashes += 1
        raise Crash

    with monkeypatch.context() as patch, pytest.raises(Crash):
        patch.setattr(train_module, "save_model_file", crash)
        run(crashed)
    assert num_crashes == 1
    assert_same_model(run(crashed), straight)


# --- as a process --------------------------------------------------------------------------------------------


def test_two_ranks_train_as_one_group_and_resume(
    spec: GroupSpec, launch: Launch, stub_node, tmp_path: Path
) -> None:
    half = with_training(spec, num_steps=6, learning_rate_schedule="constant")
    whole = with_training(half, num_steps=12)
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"),
        *("--nproc-per-node", "2", "-m", "p2pcodistill.group.train"),
    ]

    def run_group(spec: GroupSpec) -> TrainingStarted:
        environment = os.environ | {
            GROUP_SPEC_VARIABLE: str(launch(spec)),
            "GLOO_SOCKET_IFNAME": "lo",
            "OMP_NUM_THREADS": "1",
        }
        result = subprocess.run(
            command,
            env=environment,
            cwd=Path(__file__).parents[2],
            timeout=GENEROUS_S,
            capture_output=True,
            text=True,
            check=False,
        )
        assert result.returncode == 0, result.stderr
        stub_node.wait_for_event(TrainingEnded)
        started = stub_node.events[0]
        assert isinstance(started, TrainingStarted)
        return started

    starts = [run_group(in_folder(part, tmp_path / "parts")) for part in (half, whole)]
    assert [(event.start_step, event.num_ranks) for event in starts] == [(0, 2), (6, 2)]
    run_group(in_folder(whole, tmp_path / "whole"))
    models = [load_file(tmp_path / name / "model.safetensors") for name in ("parts", "whole")]
    assert_same_model(*models)


def test_main_says_what_to_mend_in_one_line(
    spec: GroupSpec, launch: Launch, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(train_module, "die_with_parent", lambda: None)
    launch(with_training(spec, batch_size=100_000))
    assert main() == 2
    error = capsys.readouterr().err
    assert error.startswith("p2pcodistill: ") and error.count("\n") == 1 and "give more text" in error
    monkeypatch.delenv(GROUP_SPEC_VARIABLE)
    assert main() == 2
    assert "p2pcodistill node" in capsys.readouterr().err


def test_main_trains(spec: GroupSpec, launch: Launch, stub_node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train_module, "die_with_parent", lambda: None)
    launch(spec)
    assert main() == 0
    assert spec.model_path.exists()


# --- choices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("device", "num_gpus", "num_local_ranks", "expected"),
    [
        ("auto", 0, 1, "cpu"),
        ("auto", 1, 2, "cpu"),
        ("auto", 2, 2, "cuda:1"),
        ("cpu", 2, 2, "cpu"),
        ("cuda", 2, 2, "cuda:1"),
    ],
)
def test_each_rank_has_a_gpu_of_its_own_or_none_has(
    monkeypatch: pytest.MonkeyPatch, device: Any, num_gpus: int, num_local_ranks: int, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    chosen = choose_device(GroupConfig(device=device), num_local_ranks=num_local_ranks, local_rank=1)
    assert str(chosen) == expected


def test_missing_gpus_are_an_error_that_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(GroupError, match=r"1 GPUs for 2 rank\(s\)"):
        choose_device(GroupConfig(device="cuda"), num_local_ranks=2, local_rank=0)


@pytest.mark.parametrize(
    ("precision", "capabilities", "expected"),
    [
        ("auto", {"avx512_bf16": True}, torch.bfloat16),
        ("auto", {"avx512_bf16": False, "amx_bf16": True}, torch.bfloat16),
        ("auto", {"avx2": True}, torch.float32),
        ("float32", {"avx512_bf16": True}, torch.float32),
        ("bfloat16", {}, torch.bfloat16),
    ],
)
def test_precision_follows_the_processor(
    monkeypatch: pytest.MonkeyPatch, precision: Any, capabilities: dict[str, bool], expected: torch.dtype
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    assert choose_precision(TrainingConfig(precision=precision), torch.device("cpu")) == expected
