"""Packed weights: any model computes as before, from fewer bytes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from p2pcodistill.codistill.precision import PackedTensor, Precision, pack_weights
from p2pcodistill.task_configs import LanguageModelConfig
from p2pcodistill.tasks.recurrent import LSTMModel

LOW: tuple[Precision, ...] = ("float16", "bfloat16", "int8")
LARGEST_ERROR: dict[str, float] = {"float16": 2**-11, "bfloat16": 2**-8, "int8": 0.5 / 127}
"""Of a weight, as a share of the largest one of its row."""


def frozen(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model).eval().requires_grad_(False)


def packed(model: nn.Module, precision: Precision) -> nn.Module:
    module = frozen(model)
    pack_weights(module, precision)
    return module


# --- one tensor ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("shape", [(256, 256), (5, 3), (1, 7, 96), (8, 4, 3, 3), (64, 1)])
def test_a_tensor_comes_back_as_exact_as_its_precision(shape: tuple[int, ...], precision: Precision) -> None:
    torch.manual_seed(0)
    weight = torch.randn(shape)
    result = PackedTensor(weight, getattr(torch, precision)).unpack()
    assert result.shape == weight.shape and result.dtype == weight.dtype
    error = (result - weight).abs().max() / weight.abs().max()
    assert error <= LARGEST_ERROR[precision]


def test_rows_have_scales_of_their_own() -> None:
    weight = torch.ones(1, 3, 64) * torch.tensor([1e-6, 1.0, 1e6])[:, None]
    weight[0, :, 0] = 0
    torch.testing.assert_close(PackedTensor(weight, torch.int8).unpack(), weight, rtol=1e-6, atol=0)


def test_rows_of_zeros_stay_zeros() -> None:
    weight = torch.zeros(2, 64)
    weight[1] = 1
    assert torch.equal(PackedTensor(weight, torch.int8).unpack(), weight)


@pytest.mark.parametrize("precision", LOW)
def test_large_weights_do_not_become_infinite(precision: Precision) -> None:
    weight = torch.tensor([[3.4e38, 1e30], [-1e38, 1.0]])
    result = PackedTensor(weight, getattr(torch, precision)).unpack()
    assert result.isfinite().all()
    torch.testing.assert_close(result[:, 0], weight[:, 0], rtol=1e-2, atol=0)


def test_fp16_is_exact_for_what_travelled_as_fp16() -> None:
    weight = torch.randn(8, 8).half()
    kept = PackedTensor(torch.zeros(8, 8), torch.float16)
    kept.copy_(weight)
    assert torch.equal(kept.unpack(), weight.float())


# --- models --------------------------------------------------------------------------------------------------


def language_model() -> tuple[nn.Module, Tensor]:
    return LSTMModel(LanguageModelConfig()), torch.randint(0, 256, (4, 16))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(("precision", "share"), [("float16", 0.51), ("bfloat16", 0.51), ("int8", 0.26)])
def test_the_language_model_predicts_alike_with_its_state_carried(
    precision: Precision, share: float, autocast: bool
) -> None:
    torch.manual_seed(0)
    model, tokens_BT = language_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter *= 3  # as sure of its predictions as a trained one
    exact, kept = frozen(model), frozen(model)
    tensors = set(pack_weights(kept, precision).values())
    num_bytes = sum(tensor.num_bytes for tensor in tensors) + sum(p.nbytes for p in kept.parameters())
    assert num_bytes < share * sum(parameter.nbytes for parameter in exact.parameters())
    states: list[Any] = [None, None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for _ in range(3):
            expected, states[0] = exact(tokens_BT, states[0])
            logits, states[1] = kept(tokens_BT, states[1])
    assert logits.dtype == (torch.bfloat16 if autocast else torch.float32)
    log_p, log_q = expected.float().log_softmax(-1), logits.float().log_softmax(-1)
    assert (log_p.exp() * (log_p - log_q)).sum(-1).mean() < 1e-4, "nats"
    assert autocast or not torch.equal(logits, expected)


class Tied(nn.Module):
    """Its readout takes another layer's weight without calling that."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 64)
        self.position = nn.Parameter(torch.randn(1, 5, 64))
        self.attention = nn.MultiheadAttention(64, 4, batch_first=True)
        self.norm = nn.LayerNorm(64)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        features = self.embedding(tokens_BT) + self.position
        features = self.norm(self.attention(features, features, features)[0])
        return features @ self.embedding.weight.T


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gru = nn.GRU(6, 8, 2, bidirectional=True, batch_first=True)
        self.cell = nn.LSTMCell(16, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden, _ = self.cell(self.gru(inputs)[0][:, -1])
        return hidden


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(6, 6)) for _ in range(2)])
        self.named = nn.ParameterDict({"table": nn.Parameter(torch.randn(6, 6))})

    def forward(self, inputs: Tensor) -> Tensor:
        for weight in self.weights:
            inputs = inputs @ weight
        return inputs @ self.named["table"]


def convolutional() -> nn.Module:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, groups=16), nn.Flatten()
    )
    return model.to(memory_format=torch.channels_last)


def normalised() -> nn.Module:
    from torch.nn.utils import parametrizations, spectral_norm

    return nn.Sequential(parametrizations.weight_norm(nn.Linear(8, 8)), spectral_norm(nn.Linear(8, 8)))


def with_a_compiled_part() -> nn.Module:
    return nn.Sequential(torch.compile(nn.Linear(8, 8), backend="eager"), nn.Linear(8, 8))


MODELS: list[tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = [
    (Tied, lambda: torch.arange(10).view(2, 5)),
    (Recurrent, lambda: torch.randn(2, 5, 6)),
    (Several, lambda: torch.randn(2, 6)),
    (convolutional, lambda: torch.randn(2, 3, 8, 8)),
    (normalised, lambda: torch.randn(2, 8)),
    (with_a_compiled_part, lambda: torch.randn(2, 8)),
    (lambda: nn.TransformerEncoderLayer(64, 2, 64, batch_first=True), lambda: torch.randn(2, 5, 64)),
    (lambda: nn.Linear(8, 8).double(), lambda: torch.randn(2, 8).double()),
]


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize(("make", "make_inputs"), MODELS)
def test_models_of_all_kinds_run_as_before(
    make: Callable[[], nn.Module], make_inputs: Callable[[], Tensor], precision: Precision
) -> None:
    torch.manual_seed(0)
    model, inputs = make(), make_inputs()
    with torch.no_grad():
        if precision == "int8":
            expected = frozen(model)(inputs)
        else:  # as a model whose weights were rounded
            rounded = frozen(model)
            for parameter in rounded.parameters():
                if parameter.ndim > 1:
                    parameter.copy_(parameter.to(getattr(torch, precision)))
            expected = rounded(inputs)
        kept = packed(model, precision)
        for _ in range(2):
            logits = kept(inputs)
    assert logits.dtype == expected.dtype
    error = (logits - expected).norm() / expected.norm()
    assert error < (0.02 if precision == "int8" else 1e-6)
    for part in kept.modules():
        unpacked = [value for value in vars(part).values() if isinstance(value, Tensor) and value.ndim > 1]
        assert unpacked == [] or isinstance(model, nn.Sequential), "spectral_norm keeps what it computes"
        assert getattr(part, "_flat_weights", []) == []


def test_a_pass_that_fails_lets_go_of_the_weights() -> None:
    kept = packed(nn.Linear(8, 8), "int8")
    with pytest.raises(RuntimeError, match="mat1 and mat2"):
        kept(torch.zeros(2, 7))
    assert "weight" not in vars(kept)


def test_weights_that_are_not_larger_stay_as_they_are() -> None:
    module = packed(nn.Linear(8, 8).half(), "bfloat16")
    assert [name for name, _ in module.named_parameters()] == ["weight", "bias"]
    module = packed(nn.Linear(8, 8), "int8")
    assert [name for name, _ in module.named_parameters()] == ["bias"]
    assert pack_weights(nn.Linear(8, 8), "float32") == {}
