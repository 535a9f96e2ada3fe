"""A teacher's weights in fewer bytes: packed where they rest, unpacked where they are used.

Matrices and kernels are packed; biases, norms and buffers are small and stay as they are. What computes gets weights in the
student's own dtype, so any model runs as before, with or without autocast, and predicts in that dtype: in `float16`, exactly
as from what travelled as fp16.

PyTorch's own quantisation does not fit: `torch.ao.quantization` is deprecated and its dynamic kernels run on CPUs only,
torchao is a further dependency that knows no LSTM, and neither loads new weights in place. `nn.utils.parametrize` would show
packed tensors as parameters, for which many a model's forward asks to learn its dtype.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict

Precision: TypeAlias = Literal["float32", "float16", "bfloat16", "int8"]

_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}
_MIN_ROW_LENGTH = 64
_PACKED = "_p2pcodistill_packed"


class PackedTensor:
    """A weight as `rows * scale`. int8 has a scale for each row; others have one, 1 unless the weight would overflow."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self._shape, self._dtype = weight.shape, weight.dtype
        rows = weight.detach().reshape(-1, _row_length(weight.shape))
        self._rows = torch.empty_like(rows, dtype=dtype)
        self._scale = rows.new_ones(len(rows) if dtype == torch.int8 else 1, 1, dtype=torch.float32)
        self.copy_(weight.detach())

    @property
    def num_bytes(self) -> int:
        """Memory."""
        return self._rows.nbytes + self._scale.nbytes

    @property
    def device(self) -> torch.device:
        """Where it is."""
        return self._rows.device

    def copy_(self, weight: Tensor) -> None:
        """Take the values of a tensor of the same shape on the same device, as `Tensor.copy_`."""
        rows = weight.reshape(self._rows.shape).float()
        if self._rows.dtype == torch.int8:
            scale = rows.abs().amax(1, keepdim=True).div_(127)
            # A row of zeros has the scale 0.
            self._rows.copy_((rows / scale.clamp_min(torch.finfo(torch.float32).tiny)).round_())
        else:
            # What a delta has moved beyond fp16's range, or was sent wider for that reason, must not become inf.
            scale = (rows.abs().amax() / torch.finfo(self._rows.dtype).max).clamp_min_(1).view(1, 1)
            self._rows.copy_(rows / scale)
        self._scale.copy_(scale)

    def unpack(self) -> Tensor:
        """The weight in its own shape and dtype, in memory of its own."""
        wide = torch.promote_types(self._dtype, torch.float32)
        return self._rows.to(wide).mul_(self._scale).to(self._dtype).view(self._shape)


class _Weight:
    """Stands in a class where a parameter was. An attribute of the instance goes first: see `_hold`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __get__(self, module: nn.Module, owner: type) -> Tensor:
        packed: dict[str, PackedTensor] = module.__dict__[_PACKED]
        return packed[self._name].unpack()


def pack_weights(module: nn.Module, precision: Precision) -> dict[str, PackedTensor]:
    """Replace the weights of `module` by packed ones where that is smaller; by their names in a checkpoint.

    Tied weights stay tied. The module is for inference from now on, on the device where it is.
    """
    if precision == "float32":
        return {}
    names: dict[_Place, list[str]] = {}
    for name, tensor in get_model_state_dict(module).items():
        if isinstance(tensor, Tensor):
            names.setdefault(_place(tensor), []).append(name)
    by_place: dict[_Place, PackedTensor] = {}
    for part in list(module.modules()):
        own: dict[str, PackedTensor] = {}
        for name, parameter in part._parameters.items():
            if parameter is not None and _is_smaller(parameter, _DTYPES[precision]):
                place = _place(parameter)
                if place not in by_place:
                    by_place[place] = PackedTensor(parameter, _DTYPES[precision])
                own[name] = by_place[place]
        if own:
            _stand_in(part, own)
    return {name: packed for place, packed in by_place.items() for name in names.get(place, [])}


def _stand_in(part: nn.Module, packed: dict[str, PackedTensor]) -> None:
    for name in packed:
        del part._parameters[name]
    part.__dict__[_PACKED] = packed
    stand_ins = {name: _Weight(name) for name in packed}
    part.__class__ = type(
        type(part).__name__, (type(part),), {"__module__": type(part).__module__, **stand_ins}
    )
    # A layer's weights are unpacked once a pass and let go behind it. Whoever takes a layer's weight without calling it
    # (tied embeddings, attention's projections) has it unpacked then.
    part.register_forward_pre_hook(_hold)
    part.register_forward_hook(_let_go, always_call=True)
    _let_go(part)


def _hold(part: nn.Module, *_arguments: Any) -> None:
    for name, packed in part.__dict__[_PACKED].items():
        part.__dict__[name] = packed.unpack()


def _let_go(part: nn.Module, *_arguments: Any) -> None:
    for name in part.__dict__[_PACKED]:
        part.__dict__.pop(name, None)
    if isinstance(part, nn.RNNBase):  # keeps a list of its weights, which it renews when they have changed
        part._flat_weights = []


def _is_smaller(parameter: Tensor, dtype: torch.dtype) -> bool:
    if parameter.ndim < 2 or not parameter.is_floating_point() or parameter.numel() == 0:
        return False
    num_scales = parameter.numel() // _row_length(parameter.shape) if dtype == torch.int8 else 1
    return parameter.numel() * dtype.itemsize + 4 * num_scales < parameter.nbytes


def _row_length(shape: torch.Size) -> int:
    """Numbers that share a scale: as many whole trailing axes as have 64 or more, but never the first axis."""
    length = 1
    for size in reversed(shape[1:]):
        length *= size
        if length >= _MIN_ROW_LENGTH:
            break
    return length


_Place: TypeAlias = tuple[int, torch.Size, tuple[int, ...], torch.dtype]


def _place(tensor: Tensor) -> _Place:
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype
