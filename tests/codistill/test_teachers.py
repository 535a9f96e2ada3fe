"""The teacher bank: frozen copies that hold exactly what was checkpointed."""

from __future__ import annotations

import io
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from p2pcodistill.checkpoint.decoder import decode_frame
from p2pcodistill.checkpoint.encoder import FrameEncoder
from p2pcodistill.checkpoint.reference import Reference
from p2pcodistill.checkpoint.snapshot import take_snapshot
from p2pcodistill.codistill.precision import Precision
from p2pcodistill.codistill.teachers import TeacherBank, forward_stateless, map_tensors, unwrap
from p2pcodistill.config import FramesConfig
from p2pcodistill.errors import SchemaMismatchError


class Tied(nn.Module):
    """Tied embeddings and batch statistics: what goes wrong when a checkpoint is only its parameters."""

    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, size)
        self.norm = nn.BatchNorm1d(size)
        self.dropout = nn.Dropout(0.5)
        self.readout = nn.Linear(size, 10, bias=False)
        self.readout.weight = self.embedding.weight

    def forward(self, tokens_B: Tensor) -> Tensor:
        logits: Tensor = self.readout(self.dropout(self.norm(self.embedding(tokens_B))))
        return logits


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, 6, 2, batch_first=True)

    def forward(self, inputs: Tensor, hidden: Any = None) -> tuple[Tensor, Any]:
        logits, hidden = self.lstm(inputs, hidden)
        return logits, hidden


def run_recurrent(model: nn.Module, inputs: Any, state: Any) -> tuple[Tensor, Any]:
    logits, state = model(inputs, state)
    return logits, state


def reference_of(model: nn.Module, step: int = 1) -> Reference:
    """`model` as its students get it."""
    frame = io.BytesIO()
    FrameEncoder(FramesConfig()).encode(take_snapshot(model, step), frame)
    return decode_frame(frame.getvalue(), None, max_bytes=1 << 20)


def test_a_teacher_predicts_like_the_checkpointed_model_in_eval_mode() -> None:
    student, peer = Tied(), Tied()
    peer(torch.arange(10))  # moves its running statistics
    bank = TeacherBank(student, ["tokyo"], forward_stateless)
    bank.load("tokyo", reference_of(peer), (1, 5))
    logits = bank.predict(torch.arange(10), ["tokyo"])["tokyo"]
    peer.eval()
    torch.testing.assert_close(logits, peer(torch.arange(10)), rtol=1e-2, atol=1e-2)
    module = bank.teachers["tokyo"].module
    assert torch.equal(module.get_buffer("norm.running_mean"), peer.norm.running_mean), "buffers are exact"
    assert module.get_parameter("readout.weight") is module.get_parameter("embedding.weight"), "ties stay"


@pytest.mark.parametrize(
    ("precision", "matrix_bytes"),
    [("float32", 10_240), ("float16", 5_124), ("bfloat16", 5_124), ("int8", 2_600)],
)
def test_a_bank_in_lower_precision_is_smaller_and_loads_in_place(
    precision: Precision, matrix_bytes: int
) -> None:
    student, peers = Tied(256), [Tied(256), Tied(256)]
    bank = TeacherBank(student, ["a", "b"], forward_stateless, precision=precision)
    num_bytes = 2 * (matrix_bytes + 4 * 256 * 4 + 8)  # the batch norm stays as it is
    assert bank.num_bytes == num_bytes
    for step, peer in enumerate(peers):
        peer(torch.arange(10))
        reference = reference_of(peer)
        bank.check(reference)
        bank.load("b", reference, (0, step))
        for tensor in reference.tensors.values():
            tensor.zero_()  # the next delta frame moves it on
        logits = bank.predict(torch.arange(10), ["b"])["b"]
        expected = peer.eval()(torch.arange(10))
        assert logits.dtype == torch.float32
        assert (logits - expected).norm() < 0.02 * expected.norm()
        assert torch.equal(bank.teachers["b"].module.get_buffer("norm.running_mean"), peer.norm.running_mean)
    assert bank.num_bytes == num_bytes


def test_teachers_neither_learn_nor_share_memory_with_the_student() -> None:
    student = Tied()
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    bank = TeacherBank(student, ["tokyo"], forward_stateless)
    bank.load("tokyo", reference_of(Tied()), (0, 1))
    module = bank.teachers["tokyo"].module
    statistics = module.get_buffer("norm.running_mean").clone()
    logits = bank.predict(torch.arange(10), ["tokyo"])["tokyo"]
    assert not logits.requires_grad
    assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())
    assert torch.equal(module.get_buffer("norm.running_mean"), statistics)
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())


def test_only_those_who_are_asked_run_and_have_a_version_once_loaded() -> None:
    bank = TeacherBank(Tied(), ["a", "b", "c"], forward_stateless)
    assert bank.versions == {}
    bank.load("a", reference_of(Tied()), (0, 1))
    bank.load("c", reference_of(Tied()), (0, 2))
    assert bank.versions == {"a": (0, 1), "c": (0, 2)}
    assert bank.predict(torch.arange(10), ["c", "a"]).keys() == {"a", "c"}
    assert bank.predict(torch.arange(10), ["c"]).keys() == {"c"}
    assert bank.predict(torch.arange(10), []) == {}


def test_inputs_may_be_a_tuple() -> None:
    model = nn.Bilinear(2, 3, 4)
    bank = TeacherBank(model, ["a"], forward_stateless)
    bank.load("a", reference_of(model), (0, 1))
    logits = bank.predict((torch.ones(5, 2), torch.ones(5, 3)), ["a"])["a"]
    assert logits.shape == (5, 4)


@pytest.mark.parametrize("autocast", [False, True])
def test_a_carried_state_survives_swaps_and_resumes(autocast: bool) -> None:
    torch.manual_seed(0)
    student = Recurrent()
    windows = torch.randn(3, 2, 5, 4)  # windows, batch, time, features

    def bank_of(reference: Reference) -> TeacherBank:
        bank = TeacherBank(student, ["a"], run_recurrent)
        bank.load("a", reference, (0, 1))
        return bank

    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        bank = bank_of(reference_of(student))
        bank.predict(windows[0], ["a"])
        saved = bank.state_dict()
        bank.load("a", reference_of(student, step=2), (0, 2))
        carried = bank.predict(windows[1], ["a"])["a"]
        resumed = bank_of(reference_of(student))
        resumed.load_state_dict(saved)
        again = resumed.predict(windows[1], ["a"])["a"]
        fresh = bank_of(reference_of(student)).predict(windows[1], ["a"])["a"]
    assert saved["a"]["version"] == [0, 1]
    assert torch.equal(carried, again)
    assert not torch.equal(carried, fresh)
    assert carried.dtype == (torch.bfloat16 if autocast else torch.float32)


def test_a_teacher_that_does_not_run_starts_from_no_state_again() -> None:
    torch.manual_seed(0)
    student = Recurrent()
    windows = torch.randn(2, 2, 5, 4)
    bank = TeacherBank(student, ["a", "b"], run_recurrent)
    for name in "ab":
        bank.load(name, reference_of(student), (0, 1))
    bank.predict(windows[0], ["a", "b"])
    bank.predict(windows[0], ["a"])
    logits = bank.predict(windows[1], ["a", "b"])
    fresh = TeacherBank(student, ["a"], run_recurrent)
    fresh.load("a", reference_of(student), (0, 1))
    assert torch.equal(logits["b"], fresh.predict(windows[1], ["a"])["a"])
    assert not torch.equal(logits["a"], logits["b"])
    bank.forget_state("a")
    assert torch.equal(bank.predict(windows[1], ["a"])["a"], logits["b"])


def test_a_state_of_a_former_teacher_is_left_out() -> None:
    bank = TeacherBank(Recurrent(), ["a"], run_recurrent)
    bank.load_state_dict({"gone": {"version": [0, 1], "state": None}})
    assert bank.state_dict() == {}


@pytest.mark.parametrize(
    ("peer", "sentence"),
    [
        (Tied(size=4), r"'embedding.weight' is \(10, 4\) there and \(10, 8\) here"),
        (Recurrent(), "'embedding.weight' is missing there"),
        (Tied().double(), "dtypes or ties"),
    ],
)
def test_another_model_is_refused_and_the_difference_named(peer: nn.Module, sentence: str) -> None:
    bank = TeacherBank(Tied(), ["a"], forward_stateless)
    with pytest.raises(SchemaMismatchError, match=sentence):
        bank.check(reference_of(peer))
    bank.check(reference_of(Tied()))


def test_the_student_may_be_compiled() -> None:
    model = Tied()
    compiled = torch.compile(model, backend="eager")
    assert unwrap(compiled) is model
    TeacherBank(compiled, ["a"], forward_stateless).check(reference_of(model))


def test_hooks_of_the_students_stay_with_the_student() -> None:
    num_calls = 0

    def hook(*_arguments: object) -> None:
        nonlocal num_calls
        num_calls += 1

    student = nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 5))
    for part in student.modules():
        part.register_forward_pre_hook(hook)
        part.register_forward_hook(hook)
        part.register_forward_hook(hook, with_kwargs=False, always_call=True)
        part.register_full_backward_pre_hook(hook)
        part.register_full_backward_hook(hook)
    bank = TeacherBank(student, ["a"], forward_stateless)
    peer = nn.Sequential(nn.utils.spectral_norm(nn.Linear(3, 4)), nn.Linear(4, 5))
    bank.load("a", reference_of(peer), (0, 1))
    inputs = torch.ones(2, 3)
    logits = bank.predict(inputs, ["a"])["a"]
    assert num_calls == 0
    peer.eval()
    torch.testing.assert_close(logits, peer(inputs), rtol=1e-2, atol=1e-2)
    student(inputs.requires_grad_()).sum().backward()
    assert num_calls == 3 * 5, "five kinds of hooks on three modules"


class Carried(NamedTuple):
    """A state with names."""

    hidden: Tensor
    cell: Tensor


def test_states_are_mapped_through_their_containers() -> None:
    named = map_tensors(lambda tensor: tensor * 2, Carried(torch.ones(2), torch.zeros(1)))
    assert isinstance(named, Carried) and torch.equal(named.hidden, torch.full((2,), 2.0))
    state = {"h": (torch.ones(2), [torch.zeros(1)]), "n": 3, "none": None}
    doubled = map_tensors(lambda tensor: tensor * 2, state)
    assert torch.equal(doubled["h"][0], torch.full((2,), 2.0))
    assert isinstance(doubled["h"], tuple) and isinstance(doubled["h"][1], list)
    assert doubled["n"] == 3 and doubled["none"] is None
