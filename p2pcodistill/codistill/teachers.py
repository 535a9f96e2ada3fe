"""The teacher bank: one frozen, stale copy of the model for each neighbour.

A slot is a copy of the student's module that is loaded in place from a neighbour's checkpoint, buffers included, and runs
in eval mode without gradients: a teacher that trains its batch statistics, or keeps its own, is another model than the one
that was checkpointed. Its weights may be kept in fewer bytes than the student's (see `precision`).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.nn.parallel import DistributedDataParallel

from p2pcodistill.checkpoint.manifest import Version
from p2pcodistill.checkpoint.reference import Reference
from p2pcodistill.checkpoint.snapshot import take_snapshot
from p2pcodistill.codistill.precision import PackedTensor, Precision, pack_weights
from p2pcodistill.errors import SchemaMismatchError

State: TypeAlias = Any
"""What a model carries from one batch to the next: tensors in (named) tuples, lists and dicts, or None."""

Forward: TypeAlias = Callable[[nn.Module, Any, State], tuple[Tensor, State]]
"""(model, inputs, state) -> (logits, next state); the state is None at first."""


_HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


def forward_stateless(model: nn.Module, inputs: Any, state: State) -> tuple[Tensor, State]:
    """The default `Forward`: the logits of `model(*inputs)` for a tuple, else of `model(inputs)`; no state."""
    logits: Tensor = model(*inputs) if isinstance(inputs, tuple) else model(inputs)
    return logits, None


def map_tensors(function: Callable[[Tensor], Tensor], state: State) -> State:
    """`state` with `function` applied to every tensor in it."""
    if isinstance(state, Tensor):
        return function(state)
    if isinstance(state, Mapping):
        return {key: map_tensors(function, value) for key, value in state.items()}
    if isinstance(state, tuple | list):
        values = [map_tensors(function, value) for value in state]
        return type(state)(*values) if hasattr(state, "_fields") else type(state)(values)
    return state


def unwrap(model: nn.Module) -> nn.Module:
    """The user's own module inside of DDP and `torch.compile`."""
    while True:
        if isinstance(model, DistributedDataParallel):
            model = model.module
        elif isinstance(inner := getattr(model, "_orig_mod", None), nn.Module):
            model = inner
        else:
            return model


@dataclass(slots=True)
class Teacher:
    """One slot of the bank. `version` is None while nothing was loaded."""

    module: nn.Module
    packed: Mapping[str, PackedTensor] = field(repr=False)
    version: Version | None = None
    state: State = field(default=None, repr=False)


class TeacherBank:
    """The teachers of one student, by name.

    `precision` is how a teacher's weights are kept: `float32` stands for the student's own dtypes.
    """

    def __init__(
        self,
        student: nn.Module,
        names: Collection[str],
        forward: Forward,
        *,
        precision: Precision = "float32",
    ) -> None:
        self._forward = forward
        student = unwrap(student)
        self._device = next((parameter.device for parameter in student.parameters()), torch.device("cpu"))
        snapshot = take_snapshot(student, 0) if names else None
        self._schema_hash = snapshot.schema_hash if snapshot else b""
        self._shapes = {name: t.shape for name, t in snapshot.tensors.items()} if snapshot else {}
        self.teachers: dict[str, Teacher] = {}
        for name in names:
            module = _frozen_copy(student)
            self.teachers[name] = Teacher(module, pack_weights(module, precision))

    @property
    def device(self) -> torch.device:
        """Where the student was when the bank was made, and the teachers are."""
        return self._device

    @property
    def versions(self) -> dict[str, Version]:
        """The version of each teacher that has a checkpoint."""
        return {
            name: teacher.version for name, teacher in self.teachers.items() if teacher.version is not None
        }

    @property
    def num_bytes(self) -> int:
        """Memory of all teachers' weights and buffers."""
        return sum(_num_bytes(teacher) for teacher in self.teachers.values())

    def check(self, reference: Reference) -> None:
        """Raise SchemaMismatchError unless names, shapes, dtypes and ties are the student's."""
        if reference.schema_hash == self._schema_hash:
            return
        shapes = {name: tensor.shape for name, tensor in reference.tensors.items()}
        for name in sorted(shapes.keys() | self._shapes.keys()):
            theirs, ours = shapes.get(name), self._shapes.get(name)
            if theirs != ours:
                raise SchemaMismatchError(
                    f"the tensor {name!r} is {_shape(theirs)} there and {_shape(ours)} here"
                )
        raise SchemaMismatchError("dtypes or ties of the tensors differ from this site's model")

    def load(self, name: str, reference: Reference, version: Version) -> None:
        """Make a checked reference the weights of the teacher `name`, in its own precision; its carried state stays.

        Everything has been copied when this returns: the reference may then move on.
        """
        teacher = self.teachers[name]
        # A model all of whose weights are packed has no state of its own left.
        is_packed = reference.tensors.keys() <= teacher.packed.keys()
        targets = {} if is_packed else cast(Mapping[str, Tensor], get_model_state_dict(teacher.module))
        with torch.no_grad():
            for tensor_name, tensor in reference.tensors.items():
                packed = teacher.packed.get(tensor_name)
                target = targets[tensor_name] if packed is None else packed
                # What travels is mostly fp16: it crosses to the device as it is and is cast there. The copy is one that
                # waits: behind one that does not, the next delta frame might change what is still being read.
                target.copy_(tensor.to(target.device))
        teacher.version = version

    @torch.no_grad()
    def rehearse(self, inputs: Any) -> Tensor:
        """Logits of one slot, whatever its weights are, from no state; its own carried state stays."""
        logits, _ = self._forward(next(iter(self.teachers.values())).module, inputs, None)
        return logits

    @torch.no_grad()
    def predict(self, inputs: Any, names: Collection[str]) -> dict[str, Tensor]:
        """Logits of the teachers of these names, which have a checkpoint. Advances their carried states.

        The others' states are let go of: they would not follow from what comes next.
        """
        logits = {}
        for name, teacher in self.teachers.items():
            if name in names:
                logits[name], teacher.state = self._forward(teacher.module, inputs, teacher.state)
            else:
                teacher.state = None
        return logits

    def forget_state(self, name: str) -> None:
        """Let go of a teacher's carried state, which may be as ruined as its weights were."""
        self.teachers[name].state = None

    def state_dict(self) -> dict[str, Any]:
        """Versions and carried states; the weights themselves are in the node's store."""
        return {
            name: {"version": list(teacher.version), "state": teacher.state}
            for name, teacher in self.teachers.items()
            if teacher.version is not None
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Take over the carried states of teachers that are still neighbours; the weights have to be loaded anew."""
        for name, teacher in self.teachers.items():
            if name in saved:
                teacher.state = map_tensors(lambda tensor: tensor.to(self._device), saved[name]["state"])


def _frozen_copy(student: nn.Module) -> nn.Module:
    module = copy.deepcopy(student).eval().requires_grad_(False)
    for part in module.modules():
        _drop_hooks(part)
        if isinstance(part, nn.RNNBase):  # a copy's weights are not the one chunk that cuDNN asks for
            part.flatten_parameters()
    return module


def _drop_hooks(module: nn.Module) -> None:
    """Remove what the user's script hangs on the student's passes: a teacher is not to be logged, steered or clipped.

    PyTorch's own stay: its older weight and spectral norms compute the weight in one before the pass.
    """
    for name in _HOOKS:
        hooks: dict[int, Any] = getattr(module, name)
        for key in [key for key, hook in hooks.items() if not type(hook).__module__.startswith("torch.")]:
            del hooks[key]


def _num_bytes(teacher: Teacher) -> int:
    plain = [*teacher.module.parameters(), *teacher.module.buffers()]
    packed = {id(packed): packed for packed in teacher.packed.values()}  # tied weights are there once
    return sum(tensor.nbytes for tensor in plain) + sum(tensor.num_bytes for tensor in packed.values())


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else str(tuple(shape))
