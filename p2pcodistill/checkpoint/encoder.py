"""Snapshots to frames: a keyframe first, then delta frames against what the receivers hold.

What travels how: buffers, integers, booleans, complex numbers, and tensors of at most one dimension and less than a block
of elements (biases, norms) stay exactly as they are, always. The other parameters go in the keyframe's precision, one that
fp16 cannot hold (beyond 65504) in fp32, and one that fp32 cannot hold as it is; delta frames move what was sent by codes of
few bits. What they keep exact is sent as a lossless difference where it is small, else as it is; small tensors are joined.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import BinaryIO

import torch
from torch import Tensor

from p2pcodistill.checkpoint.entries import (
    CODABLE_DTYPES,
    EXACT,
    INT8,
    LOSSLESS,
    SAME,
    Bundle,
    TensorEntry,
    is_small,
    join_entries,
)
from p2pcodistill.checkpoint.frames import FrameWriter
from p2pcodistill.checkpoint.pieces import CodeWriter, join_flat, write_exact, write_int8, write_lossless
from p2pcodistill.checkpoint.quantize import BLOCK_ELEMENTS
from p2pcodistill.checkpoint.rate import NUM_SAMPLES, Plan, RateControl, Sample, sample_difference
from p2pcodistill.checkpoint.reference import Reference, checksum_tensors, combine_checksums, raw_bytes
from p2pcodistill.checkpoint.scan import (
    checksum_tensor,
    empty_tensor,
    find_largest,
    largest_magnitude,
    scan_tensor,
)
from p2pcodistill.checkpoint.snapshot import Snapshot
from p2pcodistill.config import FramesConfig

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
        self._codes = CodeWriter()
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

    def limit(self, num_bytes: int) -> None:
        """Keep delta frames to about this from now on, where possible, if need be at the cost of their quality.

        It is an estimate that is kept to it: what travels exactly is counted uncompressed, the footer not at all.
        """
        if self._rate is not None:
            self._rate.limit_bytes = num_bytes

    def restart(self) -> None:
        """Begin a new chain: the next frame is a keyframe."""
        self._reference = None

    def encode(self, snapshot: Snapshot, sink: BinaryIO) -> EncodedFrame:
        """Write the next frame of the chain, and move the reference along.

        Raises NonFiniteError, naming the tensor, when a value is NaN or infinite; MalformedError or OversizedError when the
        snapshot is outside of what a frame can hold (dtypes, number and names of tensors); OSError of the sink.
        """
        _wait_for(snapshot)
        reference = self._reference
        if reference is None or self._config.delta == "off" or not _is_same_model(snapshot, reference):
            reference = self._reference = None  # before there is another one
            frame, self._reference = self._encode_keyframe(snapshot, sink)
            self._num_keyframe_bytes, self._num_delta_bytes = frame.num_bytes, 0
        else:
            # A value that is not finite shows here, before anything has moved.
            largest = {name: largest_magnitude(name, tensor) for name, tensor in snapshot.tensors.items()}
            self._reference = None
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

    def _encode_keyframe(self, snapshot: Snapshot, sink: BinaryIO) -> tuple[EncodedFrame, Reference]:
        tensors: dict[str, Tensor] = {}
        checksums: dict[str, int] = {}
        for (
            name,
            tensor,
        ) in snapshot.tensors.items():  # all, before anything is written: one may not be finite
            if self._fits_int8(snapshot, name):
                tensors[name] = empty_tensor(tensor.shape, torch.float16, tensor.device)
            else:
                tensors[name], checksums[name] = self._cast_for_keyframe(snapshot, name)
        writer = FrameWriter(sink)
        for name, tensor in snapshot.tensors.items():
            wire = tensors[name]
            encoding = EXACT if name in checksums else INT8
            if encoding == INT8:
                write_int8(writer, tensor, wire)
                checksums[name] = checksum_tensor(wire)
            else:
                write_exact(writer, wire)
            writer.end_tensor(name, tensor.dtype, wire.dtype, tensor.shape, encoding)
        dtypes = {name: tensor.dtype for name, tensor in snapshot.tensors.items()}
        checksum = combine_checksums(checksums[name] for name in tensors)
        reference = Reference(snapshot.step, tensors, dtypes, snapshot.aliases, checksum)
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
        kinds = {
            name: self._choose_whole(snapshot, name, reference, largest[name])
            for name in snapshot.tensors.keys() - coded
        }
        num_whole_bytes = sum(
            reference.tensors[name].nbytes for name, (encoding, _) in kinds.items() if encoding != SAME
        )
        plan, rms = self._plan(snapshot, reference, coded, num_whole_bytes)
        encoding = plan.alphabet.name if plan else LOSSLESS
        kinds |= {name: (encoding, reference.tensors[name].dtype) for name in coded}
        entries = [
            TensorEntry(name, tensor.dtype, kinds[name][1], tuple(tensor.shape), kinds[name][0], ())
            for name, tensor in snapshot.tensors.items()
        ]
        bundles = {bundle.members[-1].name: bundle for bundle in join_entries(entries, is_joining=True)}
        num_coded_bytes = 0
        for entry in entries:
            before = writer.num_bytes
            if entry.name in bundles:
                self._write_bundle(writer, bundles[entry.name], snapshot, largest, reference, plan, rms)
            if entry.encoding == encoding:
                num_coded_bytes += writer.num_bytes - before
            writer.end_tensor(entry.name, entry.dtype, entry.wire_dtype, entry.shape, entry.encoding)
        if plan is not None and self._rate is not None:
            self._rate.learn(plan, num_coded_bytes)
        reference.step = snapshot.step
        reference.checksum = checksum_tensors(reference.tensors.values())
        writer.finish(reference.step, base, reference.checksum, reference.aliases)
        codec = f"{plan.alphabet.name}+pco" if plan else "lossless+pco"
        return _describe(writer, reference, base[0], codec)

    def _plan(
        self, snapshot: Snapshot, reference: Reference, coded: list[str], num_whole_bytes: int
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
        plan = self._rate.plan(list(samples.values()), num_whole_bytes)
        return plan, {name: sample.rms for name, sample in samples.items()}

    def _is_coded(self, snapshot: Snapshot, reference: Reference, name: str, largest: float) -> bool:
        held = reference.tensors[name]
        if not is_codable(snapshot, name) or held.dtype not in CODABLE_DTYPES or not held.numel():
            return False
        largest_coded = min(_LARGEST[held.dtype], _LARGEST_CODED)
        # The way back from what is too large to be squared is no difference that could be measured, either.
        is_held_far = _LARGEST[held.dtype] > _LARGEST_CODED and find_largest(held) > _LARGEST_CODED
        return largest <= largest_coded and not is_held_far

    def _choose_whole(
        self, snapshot: Snapshot, name: str, reference: Reference, largest: float
    ) -> tuple[str, torch.dtype]:
        """The encoding and wire dtype, in a delta frame, of a tensor that is not coded."""
        tensor, held = snapshot.tensors[name], reference.tensors[name]
        wire_dtype = self._choose_wire_dtype(snapshot, name, largest)
        if _is_unchanged(held, tensor.to(wire_dtype)):
            return SAME, wire_dtype
        entry = TensorEntry(name, tensor.dtype, wire_dtype, tuple(tensor.shape), LOSSLESS, ())
        is_moved = held.dtype == wire_dtype and wire_dtype in CODABLE_DTYPES and is_small(entry)
        return LOSSLESS if is_moved else EXACT, wire_dtype

    def _write_bundle(
        self,
        writer: FrameWriter,
        bundle: Bundle,
        snapshot: Snapshot,
        largest: dict[str, float],
        reference: Reference,
        plan: Plan | None,
        rms: dict[str, float],
    ) -> None:
        """Write the pieces of one tensor, or of joined ones, and move the reference along."""
        names = [entry.name for entry in bundle.members]
        wire_dtype = bundle.whole.wire_dtype
        if bundle.encoding == SAME:
            return
        if bundle.encoding == EXACT:
            wires = [snapshot.tensors[name].to(wire_dtype) for name in names]
            for name, wire in zip(names, wires, strict=True):
                if reference.tensors[name].dtype == wire_dtype:
                    reference.tensors[name].copy_(wire)
                else:
                    reference.tensors[name] = wire.clone() if wire is snapshot.tensors[name] else wire
            write_exact(writer, join_flat(wires))
        elif bundle.encoding == LOSSLESS:
            held = [reference.tensors[name].view(-1) for name in names]
            if len(names) == 1:
                write_lossless(writer, snapshot.tensors[names[0]], held[0])
                return
            joined = join_flat(held)
            write_lossless(
                writer, join_flat([snapshot.tensors[name].to(wire_dtype) for name in names]), joined
            )
            for tensor, part in zip(held, joined.split_with_sizes([*map(len, held)]), strict=True):
                tensor.copy_(part)
        elif plan is not None:
            runs = []
            for name in names:
                weights, moved = snapshot.tensors[name].view(-1), reference.tensors[name].view(-1)
                runs.append((weights, moved, plan.step * rms[name], largest[name]))
            self._codes.write(writer, runs, plan.alphabet)

    def _fits_int8(self, snapshot: Snapshot, name: str) -> bool:
        """Whether a tensor travels as 8-bit codes in a keyframe. Raises NonFiniteError for one that would."""
        tensor = snapshot.tensors[name]
        return (
            self._config.keyframe == "int8"
            and is_codable(snapshot, name)
            and tensor.numel() > 0
            and self._choose_wire_dtype(snapshot, name, 0.0) == torch.float16
            and self._choose_wire_dtype(snapshot, name, largest_magnitude(name, tensor)) == torch.float16
        )

    def _cast_for_keyframe(self, snapshot: Snapshot, name: str) -> tuple[Tensor, int]:
        """A tensor as it travels, in new memory, and its checksum. Raises NonFiniteError.

        What it is cast from is only looked at where the outcome reaches the dtype's edge: something was beyond, perhaps.
        """
        tensor = snapshot.tensors[name]
        dtype = self._choose_wire_dtype(snapshot, name, 0.0)
        wire = empty_tensor(tensor.shape, dtype, tensor.device)
        scan = scan_tensor(wire, tensor)
        if not scan.largest < _LARGEST.get(dtype, math.inf):
            wider = self._choose_wire_dtype(snapshot, name, largest_magnitude(name, tensor))
            if wider != dtype:
                wire = empty_tensor(tensor.shape, wider, tensor.device)
                scan = scan_tensor(wire, tensor)
        return wire, scan.checksum

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
        write_exact(writer, tensor)
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
