"""Snapshots: exact names, private copies, tied tensors once, and one schema hash however the model is wrapped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from p2pcodistill.checkpoint.snapshot import dtype_name, schema_hash, schema_of, take_snapshot


class TiedModel(nn.Module):
    """Embedding and head share a weight; normalisation has buffers; one submodule is named like a wrapper's prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.module = nn.Linear(6, 6)
        self.norm = nn.BatchNorm1d(6)
        self.head = nn.Linear(6, 11, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.ones(3, dtype=torch.bool))
        self.register_buffer("scratch", torch.ones(3), persistent=False)

    def forward(self, tokens_B: torch.Tensor) -> torch.Tensor:
        return self.head(self.norm(self.module(self.embed(tokens_B))))


NAMES = {
    "embed.weight",
    "module.weight",
    "module.bias",
    "norm.weight",
    "norm.bias",
    "norm.running_mean",
    "norm.running_var",
    "norm.num_batches_tracked",
    "mask",
}
BUFFERS = {"norm.running_mean", "norm.running_var", "norm.num_batches_tracked", "mask"}


@pytest.fixture
def single_process_group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "group"), 1), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_names_are_exact_and_tied_tensors_travel_once() -> None:
    snapshot = take_snapshot(TiedModel(), step=7)
    assert snapshot.step == 7
    assert set(snapshot.tensors) == NAMES
    assert snapshot.aliases == {"head.weight": "embed.weight"}
    assert snapshot.buffers == BUFFERS


def test_wrapping_the_model_changes_nothing(single_process_group: None) -> None:
    model = TiedModel()
    plain = take_snapshot(model, step=1)
    compiled = torch.compile(model, backend="eager")
    for wrapped in (
        compiled,
        DistributedDataParallel(model),
        DistributedDataParallel(compiled),
        torch.compile(DistributedDataParallel(model), backend="eager"),
    ):
        snapshot = take_snapshot(wrapped, step=1)  # type: ignore[arg-type]
        assert list(snapshot.tensors) == list(plain.tensors)
        assert (snapshot.aliases, snapshot.buffers) == (plain.aliases, plain.buffers)
        assert snapshot.schema_hash == plain.schema_hash
        assert all(torch.equal(snapshot.tensors[name], tensor) for name, tensor in plain.tensors.items())


def test_copies_are_private_contiguous_and_without_gradients() -> None:
    model = TiedModel()
    model.strided = nn.Parameter(torch.arange(12.0).reshape(3, 4).t())
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    snapshot = take_snapshot(model, step=1)
    before = {name: tensor.clone() for name, tensor in snapshot.tensors.items()}
    model.train()
    loss = model(torch.arange(8)).square().mean() + model.strided.sum()
    loss.backward()
    optimizer.step()
    assert not torch.equal(model.embed.weight, before["embed.weight"])
    assert not torch.equal(model.norm.running_mean, before["norm.running_mean"])
    assert torch.equal(snapshot.tensors["strided"], torch.arange(12.0).reshape(3, 4).t())
    for name, tensor in snapshot.tensors.items():
        assert torch.equal(tensor, before[name])
        assert tensor.is_contiguous() and not tensor.requires_grad and tensor.device.type == "cpu"


def test_only_the_same_view_of_the_same_memory_is_tied() -> None:
    storage = torch.randn(12)
    model = nn.Module()
    model.whole = nn.Parameter(storage.view(3, 4))
    model.reshaped = nn.Parameter(storage.view(4, 3))
    model.shifted = nn.Parameter(storage[6:].view(2, 3))
    model.start = nn.Parameter(storage[:6].view(2, 3))
    model.equal = nn.Parameter(storage.clone().view(3, 4))
    model.same = nn.Parameter(storage.view(3, 4))
    model.empty, model.other_empty = nn.Parameter(torch.empty(0, 3)), nn.Parameter(torch.empty(0, 3))
    snapshot = take_snapshot(model, step=1)
    assert snapshot.aliases == {"same": "whole"}
    assert len(snapshot.tensors) == 7


def test_a_snapshot_loads_into_a_model_of_the_same_make() -> None:
    snapshot = take_snapshot(TiedModel(), step=1)
    state = snapshot.tensors | {name: snapshot.tensors[target] for name, target in snapshot.aliases.items()}
    twin = TiedModel()
    twin.load_state_dict(state, strict=True)
    assert all(torch.equal(twin.state_dict()[name], tensor) for name, tensor in state.items())


def test_fp16_bytes_count_floating_numbers_as_two_bytes() -> None:
    snapshot = take_snapshot(TiedModel(), step=1)
    num_floats = 11 * 6 + 6 * 6 + 6 + 2 * 6 + 2 * 6
    assert snapshot.num_fp16_bytes == 2 * num_floats + 8 + 3
    model = nn.Module()
    model.weights = nn.Parameter(torch.zeros(5, dtype=torch.float64))
    model.phases = nn.Parameter(torch.zeros(5, dtype=torch.complex128))
    assert take_snapshot(model, step=1).num_fp16_bytes == 5 * 2 + 5 * 4


def test_the_schema_hash_covers_names_shapes_dtypes_and_ties_but_neither_values_nor_order() -> None:
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(4, dtype=torch.int64)}
    aliases = {"c": "a"}
    schema = schema_hash(tensors, aliases)
    assert len(schema) == 32
    assert schema == schema_hash({"b": torch.ones(4, dtype=torch.int64), "a": torch.ones(2, 3)}, aliases)
    others: list[tuple[dict[str, Any], dict[str, str]]] = [
        ({"A": tensors["a"], "b": tensors["b"]}, {"c": "A"}),
        (tensors | {"a": torch.zeros(3, 2)}, aliases),
        (tensors | {"a": torch.zeros(6)}, aliases),
        (tensors | {"a": torch.zeros(2, 3, dtype=torch.float16)}, aliases),
        (tensors | {"c": torch.zeros(2, 3)}, {}),
        (tensors, {"c": "b"}),
        (tensors, {}),
    ]
    assert len({schema, *(schema_hash(*other) for other in others)}) == 1 + len(others)


class ExtraState(nn.Linear):
    def get_extra_state(self) -> dict[str, int]:
        return {"calls": 1}

    def set_extra_state(self, state: dict[str, int]) -> None:
        raise AssertionError("never reached")


def test_state_that_is_no_tensor_is_refused_by_name() -> None:
    with pytest.raises(TypeError, match="_extra_state"):
        take_snapshot(nn.Sequential(ExtraState(2, 2)), step=1)


def test_the_schema_of_a_model_is_that_of_its_snapshots() -> None:
    model = TiedModel()
    snapshot, schema = take_snapshot(model, 0), schema_of(model)
    assert schema.aliases == snapshot.aliases == {"head.weight": "embed.weight"}
    assert schema.tensors == {
        name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in snapshot.tensors.items()
    }
    schema.check(schema_of(TiedModel()))
