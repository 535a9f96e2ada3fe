"""Snapshots to frames: a keyframe first, then delta frames against what the receivers hold.

What travels how: buffers, integers, booleans, complex numbers, and tensors of at most one dimension and less than a block
of elements (biases, norms) go exactly as they are, always. The other parameters go in the keyframe's precision, one that
fp16 cannot hold (beyond 65504) in fp32, and one that fp32 cannot hold as it is; delta frames move what was sent by codes of
few bits.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from p2pcodistill.checkpoint.coding import MAX_RAW_BYTES, compress_raw, compress_symbols, split_zeros
from p2pcodistill.checkpoint.frames import CODABLE_DTYPES, EXACT, INT8, LOSSLESS, SAME, FrameWriter
from p2pcodistill.checkpoint.quantize import (
    BLOCK_ELEMENTS,
    SEGMENT_ELEMENTS,
    Quantizer,
    decode_int8,
    encode_int8,
    encode_lossless,
)
from p2pcodistill.checkpoint.rate import NUM_SAMPLES, Plan, RateControl, Sample, sample_difference
from p2pcodistill.checkpoint.reference import Reference, checksum_tensors, raw_bytes
from p2pcodistill.checkpoint.snapshot import Snapshot
from p2pcodistill.config import FramesConfig
from p2pcodistill.errors import NonFiniteError

_KEYFRAME_DTYPES = {
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp32": torch.float32,
    "int8": torch.float16,
}
_LARGEST_CODED = 1e15  # squares of what is larger leave fp32
_LARGEST = {dtype: float(torch.finfo(dtype).max) for dtype in CODABLE_DTYPES}


@dataclass(frozen=True, slots=True)
class EncodedFrame:
    """What was written: `base_step` is None for a keyframe, `codec` is what a manifest says of it."""

    num_bytes: int
    step: int
    base_step: int | None
    codec: str
    schema_hash: bytes
    num_fp16_bytes: int


class FrameEncoder:
    """One chain of frames. It keeps the reference that the receivers of the chain hold, where the snapshots are.

    Snapshots on an accelerator are quantised there, and only codes cross the bus; they must stay on the device that the
    first one was on. Once something was written for a frame, an error leaves the chain to start anew with a keyframe.
    """

    def __init__(self, config: FramesConfig) -> None:
        self._config = config
        self._reference: Reference | None = None
        self._buffers: frozenset[str] = frozenset()
        self._rate = RateControl(config) if config.delta not in ("lossless", "off") else None
        self._quantizers: dict[torch.device, Quantizer] = {}
        self._num_keyframe_bytes = 0
        self._num_delta_bytes = 0

    @property
    def reference(self) -> Reference | None:
        """What the receivers of the newest frame hold; moved in place by the next."""
        return self._reference

    @property
    def wants_final_keyframe(self) -> bool:
        """Whether the deltas since the last keyframe cost more than one: whoever comes now is better off with a new one."""
        return self._num_delta_bytes > self._num_keyframe_bytes

    def restart(self) -> None:
        """Begin a new chain: the next frame is a keyframe."""
        self._reference = None

    def encode(self, snapshot: Snapshot, sink: BinaryIO) -> EncodedFrame:
        """Write the next frame of the chain, and move the reference along.

        Raises NonFiniteError, naming the tensor, when a value is NaN or infinite; MalformedError or OversizedError when the
        snapshot is outside of what a frame can hold (dtypes, number and names of tensors); OSError of the sink.
        """
        _wait_for(snapshot)
        largest = {name: largest_magnitude(name, tensor) for name, tensor in snapshot.tensors.items()}
        reference, self._reference = self._reference, None
        if reference is None or self._config.delta == "off" or not _is_same_model(snapshot, reference):
            del reference  # before there is another one
            frame, self._reference = self._encode_keyframe(snapshot, largest, sink)
            self._num_keyframe_bytes, self._num_delta_bytes = frame.num_bytes, 0
        else:
            frame = self._encode_delta(snapshot, largest, reference, sink)
            self._reference = reference
            self._num_delta_bytes += frame.num_bytes
        return frame

    def encode_keyframe_of_reference(self, sink: BinaryIO) -> EncodedFrame | None:
        """Write what the receivers hold as a keyframe, for whoever lacks the frames before; None before the first frame."""
        if self._reference is None:
            return None
        frame = encode_reference_keyframe(self._reference, sink)
        self._num_keyframe_bytes, self._num_delta_bytes = frame.num_bytes, 0
        return frame

    def _encode_keyframe(
        self, snapshot: Snapshot, largest: dict[str, float], sink: BinaryIO
    ) -> tuple[EncodedFrame, Reference]:
        writer = FrameWriter(sink)
        tensors: dict[str, Tensor] = {}
        for name, tensor in snapshot.tensors.items():
            wire_dtype = self._choose_wire_dtype(snapshot, name, largest[name])
            is_int8 = (
                self._config.keyframe == "int8"
                and is_codable(snapshot, name)
                and wire_dtype == torch.float16
                and tensor.numel() > 0
            )
            tensors[name] = wire = torch.empty(tensor.shape, dtype=wire_dtype, device=tensor.device)
            if is_int8:
                _write_int8(writer, tensor, wire)
            else:
                wire.copy_(tensor)
                _write_exact(writer, wire)
            writer.end_tensor(name, tensor.dtype, wire_dtype, tensor.shape, INT8 if is_int8 else EXACT)
        dtypes = {name: tensor.dtype for name, tensor in snapshot.tensors.items()}
        reference = Reference(
            snapshot.step, tensors, dtypes, snapshot.aliases, checksum_tensors(tensors.values())
        )
        writer.finish(reference.step, None, reference.checksum, reference.aliases)
        return _describe(writer, reference, None, f"{self._config.keyframe}+blosc2"), reference

    def _encode_delta(
        self, snapshot: Snapshot, largest: dict[str, float], reference: Reference, sink: BinaryIO
    ) -> EncodedFrame:
        writer = FrameWriter(sink)
        base = reference.step, reference.checksum
        coded = [
            name for name in snapshot.tensors if self._is_coded(snapshot, reference, name, largest[name])
        ]
        plan, rms = self._plan(snapshot, reference, coded)
        num_coded_bytes = 0
        for name, tensor in snapshot.tensors.items():
            before = writer.num_bytes
            if name not in coded:
                encoding = self._write_whole(writer, snapshot, name, reference, largest[name])
            elif plan is None:
                encoding = LOSSLESS
                _write_lossless(writer, tensor, reference.tensors[name])
            else:
                encoding = plan.alphabet.name
                self._write_codes(writer, tensor, reference.tensors[name], plan, rms[name])
                num_coded_bytes += writer.num_bytes - before
            wire_dtype = reference.tensors[name].dtype
            writer.end_tensor(name, tensor.dtype, wire_dtype, tensor.shape, encoding)
        if plan is not None and self._rate is not None:
            self._rate.learn(plan, num_coded_bytes)
        reference.step = snapshot.step
        reference.checksum = checksum_tensors(reference.tensors.values())
        writer.finish(reference.step, base, reference.checksum, reference.aliases)
        codec = f"{plan.alphabet.name}+pco" if plan else "lossless+pco"
        return _describe(writer, reference, base[0], codec)

    def _plan(
        self, snapshot: Snapshot, reference: Reference, coded: list[str]
    ) -> tuple[Plan | None, dict[str, float]]:
        """How coarse, and the rms of each coded tensor's difference; no plan where nothing is quantised."""
        if self._rate is None or not coded:
            return None, {}
        sizes = {name: snapshot.tensors[name].numel() for name in coded}
        num_elements = sum(sizes.values())
        samples: dict[str, Sample] = {}
        for name in coded:
            num_samples = math.ceil(NUM_SAMPLES * sizes[name] / num_elements)
            weights, held = snapshot.tensors[name].view(-1), reference.tensors[name].view(-1)
            samples[name] = sample_difference(weights, held, num_samples)
        num_other_bytes = sum(
            held.nbytes
            for name, held in reference.tensors.items()
            if name not in samples and not _is_unchanged(held, snapshot.tensors[name])
        )
        plan = self._rate.plan(list(samples.values()), num_other_bytes)
        return plan, {name: sample.rms for name, sample in samples.items()}

    def _is_coded(self, snapshot: Snapshot, reference: Reference, name: str, largest: float) -> bool:
        held = reference.tensors[name]
        return (
            is_codable(snapshot, name)
            and held.dtype in CODABLE_DTYPES
            and largest <= min(_LARGEST[held.dtype], _LARGEST_CODED)
            and held.numel() > 0
        )

    def _write_whole(
        self, writer: FrameWriter, snapshot: Snapshot, name: str, reference: Reference, largest: float
    ) -> str:
        """Write a tensor of a delta frame as it is, if it is not what the receivers have already."""
        wire = snapshot.tensors[name].to(self._choose_wire_dtype(snapshot, name, largest))
        held = reference.tensors[name]
        if _is_unchanged(held, wire):
            return SAME
        if held.dtype == wire.dtype:
            held.copy_(wire)
        else:
            reference.tensors[name] = wire.clone() if wire is snapshot.tensors[name] else wire
        _write_exact(writer, wire)
        return EXACT

    def _write_codes(
        self, writer: FrameWriter, tensor: Tensor, reference: Tensor, plan: Plan, rms: float
    ) -> None:
        weights, held = tensor.view(-1), reference.view(-1)
        quantizer = self._quantizers.setdefault(tensor.device, Quantizer(tensor.device))
        for start in range(0, len(weights), SEGMENT_ELEMENTS):
            segment = slice(start, start + SEGMENT_ELEMENTS)
            scales, symbols = quantizer.encode(
                weights[segment], held[segment], plan.alphabet, plan.step * rms
            )
            mask, others = split_zeros(symbols.cpu().numpy(), plan.alphabet.zero_symbol)
            for array in (_unsigned(scales), mask, others):
                writer.add_piece(compress_symbols(array))

    def _choose_wire_dtype(self, snapshot: Snapshot, name: str, largest: float) -> torch.dtype:
        dtype = snapshot.tensors[name].dtype
        if not is_codable(snapshot, name) or dtype.itemsize <= 2:
            return dtype
        for candidate in (_KEYFRAME_DTYPES[self._config.keyframe], torch.float32):
            if largest <= _LARGEST[candidate]:
                return candidate
        return dtype


def encode_reference_keyframe(reference: Reference, sink: BinaryIO) -> EncodedFrame:
    """Write a reference as a keyframe, bit for bit."""
    writer = FrameWriter(sink)
    for name, tensor in reference.tensors.items():
        _write_exact(writer, tensor)
        writer.end_tensor(name, reference.dtypes[name], tensor.dtype, tensor.shape, EXACT)
    writer.finish(reference.step, None, reference.checksum, reference.aliases)
    return _describe(writer, reference, None, "reference+blosc2")


def is_codable(snapshot: Snapshot, name: str) -> bool:
    """Whether a tensor may travel in less than its own precision."""
    tensor = snapshot.tensors[name]
    is_small = tensor.ndim <= 1 and tensor.numel() < BLOCK_ELEMENTS
    return (
        tensor.is_floating_point()
        and tensor.dtype.itemsize >= 2
        and not is_small
        and name not in snapshot.buffers
    )


def largest_magnitude(name: str, tensor: Tensor) -> float:
    """The largest absolute value (0 for integers and empty tensors). Raises NonFiniteError if it is not finite."""
    if not tensor.numel() or not (tensor.is_floating_point() or tensor.is_complex()):
        return 0.0
    values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    lowest, highest = (values.float() if values.dtype.itemsize == 1 else values).aminmax()
    largest = max(-float(lowest), float(highest))
    if not math.isfinite(largest) or math.isnan(float(lowest)):
        raise NonFiniteError(f"the tensor {name!r} holds NaN or infinite values")
    return largest


def _wait_for(snapshot: Snapshot) -> None:
    """The copies of a snapshot may still be under way on the stream that the model trains on."""
    for device in {tensor.device for tensor in snapshot.tensors.values()} - {torch.device("cpu")}:
        torch.accelerator.synchronize(device)


def _is_unchanged(held: Tensor, wire: Tensor) -> bool:
    return held.dtype == wire.dtype and torch.equal(raw_bytes(held), raw_bytes(wire))


def _is_same_model(snapshot: Snapshot, reference: Reference) -> bool:
    return snapshot.aliases == reference.aliases and {
        name: (tensor.dtype, tensor.shape) for name, tensor in snapshot.tensors.items()
    } == {name: (reference.dtypes[name], tensor.shape) for name, tensor in reference.tensors.items()}


def _describe(writer: FrameWriter, reference: Reference, base_step: int | None, codec: str) -> EncodedFrame:
    return EncodedFrame(
        writer.num_bytes, reference.step, base_step, codec, reference.schema_hash, reference.num_fp16_bytes
    )


def _write_exact(writer: FrameWriter, wire: Tensor) -> None:
    raw = raw_bytes(wire)
    for start in range(0, len(raw), MAX_RAW_BYTES):
        piece = raw[start : start + MAX_RAW_BYTES].cpu().numpy()
        writer.add_piece(compress_raw(piece, wire.dtype.itemsize))


def _write_int8(writer: FrameWriter, tensor: Tensor, wire: Tensor) -> None:
    weights, decoded = tensor.view(-1), wire.view(-1)
    for start in range(0, len(weights), SEGMENT_ELEMENTS):
        segment = slice(start, start + SEGMENT_ELEMENTS)
        codes, scales = encode_int8(weights[segment])
        decode_int8(codes, scales, decoded[segment])
        writer.add_piece(compress_symbols(_unsigned(scales)))
        writer.add_piece(compress_raw(codes.cpu().numpy().view(np.uint8), 1))


def _write_lossless(writer: FrameWriter, tensor: Tensor, reference: Tensor) -> None:
    weights, held = tensor.view(-1), reference.view(-1)
    for start in range(0, len(weights), SEGMENT_ELEMENTS):
        segment = slice(start, start + SEGMENT_ELEMENTS)
        target = weights[segment].to(held.dtype)
        writer.add_piece(compress_symbols(_unsigned(encode_lossless(target, held[segment]))))
        held[segment] = target


def _unsigned(tensor: Tensor) -> np.ndarray[tuple[int, ...], np.dtype[np.unsignedinteger[np._NBit]]]:
    """The bits of a tensor of 2- or 4-byte elements, as unsigned integers."""
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.view(torch.int16)
    return tensor.cpu().numpy().view(np.uint16 if tensor.element_size() == 2 else np.uint32)
