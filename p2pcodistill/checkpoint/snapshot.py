"""The named tensors of one step, copied to the CPU: where a checkpoint's way to the peers begins.

Names are exact: those of the user's own module, without what DDP (`module.`) or `torch.compile` (`_orig_mod.`) put in
front, so that sites may wrap the same model differently. Persistent buffers belong to the snapshot, because a teacher
runs in eval mode, on the statistics that it was trained with. Tied tensors are found by identity and travel once.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import msgpack
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

from p2pcodistill.errors import SchemaMismatchError

_SCHEMA_DOMAIN = b"p2pcodistill schema 1\0"

TensorSpec: TypeAlias = tuple[str, str, tuple[int, ...]]
"""A tensor's name, dtype (as in `dtype_name`) and shape."""


@dataclass(frozen=True, slots=True)
class Schema:
    """What two models must have in common for the one's weights to be the other's."""

    tensors: Mapping[str, tuple[str, tuple[int, ...]]]
    """The dtype (as in `dtype_name`) and the shape of each tensor, by its name."""
    aliases: Mapping[str, str]
    """As in `Snapshot`."""

    def check(self, theirs: Schema) -> None:
        """Raise SchemaMismatchError, naming the first tensor that differs, unless `theirs` is the same."""
        if theirs == self:
            return
        for name in sorted(theirs.tensors.keys() | self.tensors.keys()):
            there, here = (_describe_shape(schema.tensors.get(name)) for schema in (theirs, self))
            if there != here:
                raise SchemaMismatchError(f"the tensor {name!r} is {there} there and {here} here")
        raise SchemaMismatchError("dtypes or ties of the tensors differ from this site's model")


@dataclass(frozen=True)
class Snapshot:
    """A model after `step` updates.

    `tensors` are contiguous copies of their own, on the CPU unless asked otherwise, in the order of the model's state dict;
    `aliases` maps the name of a tied tensor to the name under which its values travel; `buffers` are those names in
    `tensors` that are no parameters.
    """

    step: int
    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    buffers: frozenset[str] = frozenset()

    @property
    def schema_hash(self) -> bytes:
        """32 bytes, equal for equal names, shapes, dtypes and ties: see `schema_hash`."""
        return schema_hash(self.tensors, self.aliases)

    @property
    def num_fp16_bytes(self) -> int:
        """Bytes of the same tensors with every floating number as raw fp16: the yardstick for compression."""
        return sum(map(num_fp16_bytes, self.tensors.values()))


def take_snapshot(model: nn.Module, step: int, *, on_device: bool = False) -> Snapshot:
    """Copy `model`'s parameters and persistent buffers, once each, after `step` updates.

    `model` may be plain, wrapped in DDP, compiled, or on an accelerator, where the copies stay if they are to be
    `on_device`: they may still be under way then on the current stream. Later updates do not alter the snapshot. Raises
    TypeError when its state holds anything but tensors (`get_extra_state`): that could only travel as a pickle.
    """
    state = _read_state(model)
    tensors = {
        name: tensor.to(
            tensor.device if on_device else "cpu", copy=True, memory_format=torch.contiguous_format
        )
        for name, tensor in state.tensors.items()
    }
    return Snapshot(step, tensors, state.aliases, state.buffers)


def schema_of(model: nn.Module) -> Schema:
    """That of `model`'s snapshots, without taking one. Raises TypeError like `take_snapshot`."""
    state = _read_state(model)
    specs = {name: (dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in state.tensors.items()}
    return Schema(specs, state.aliases)


@dataclass(frozen=True, slots=True)
class _State:
    """The model's own tensors, once each, and what a snapshot says beside them."""

    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    buffers: frozenset[str]


def _read_state(model: nn.Module) -> _State:
    parameters = {_identity(parameter) for parameter in model.parameters()}
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    buffers: set[str] = set()
    first_name: dict[_Identity, str] = {}
    for name, value in get_model_state_dict(model).items():
        if not isinstance(value, Tensor):
            raise TypeError(
                f"the model's state {name!r} is a {type(value).__name__}: only tensors can travel"
            )
        identity = _identity(value)
        if value.numel() and identity in first_name:
            aliases[name] = first_name[identity]
            continue
        first_name[identity] = name
        if identity not in parameters:
            buffers.add(name)
        tensors[name] = value.detach()
    return _State(tensors, aliases, frozenset(buffers))


def _describe_shape(spec: tuple[str, tuple[int, ...]] | None) -> str:
    return "missing" if spec is None else str(spec[1])


def schema_hash(tensors: Mapping[str, Tensor], aliases: Mapping[str, str]) -> bytes:
    """SHA-256 of names, dtypes and shapes of `tensors`, and of `aliases`; their order does not matter."""
    specs = ((name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items())
    return hash_schema(specs, aliases)


def hash_schema(specs: Iterable[TensorSpec], aliases: Mapping[str, str]) -> bytes:
    """`schema_hash` of tensors that are known by description only (a frame's header)."""
    canonical: bytes = msgpack.packb((sorted(specs), sorted(aliases.items())))
    return hashlib.sha256(_SCHEMA_DOMAIN + canonical).digest()


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for `torch.float32`: the name in schemas and frames."""
    return str(dtype).removeprefix("torch.")


_Identity: TypeAlias = tuple[int, int, torch.dtype, torch.Size, tuple[int, ...]]


def _identity(tensor: Tensor) -> _Identity:
    """Equal for tensors that are the same memory seen in the same way; `state_dict` makes new tensor objects."""
    storage = tensor.untyped_storage().data_ptr()
    return storage, int(tensor.storage_offset()), tensor.dtype, tensor.shape, tensor.stride()


def num_fp16_bytes(tensor: Tensor) -> int:
    """Bytes of a tensor with floating numbers as raw fp16: the yardstick for compression."""
    if tensor.is_complex():
        return 4 * tensor.numel()
    return tensor.numel() * (2 if tensor.is_floating_point() else tensor.element_size())
