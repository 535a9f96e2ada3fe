"""A chain of frames made of checkpoints after training, and what its bytes could have been at best."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from p2pcodistill.checkpoint.decoder import decode_frame, read_codes
from p2pcodistill.checkpoint.encoder import FrameEncoder
from p2pcodistill.checkpoint.entries import CODE_PIECES, EXACT, LOSSLESS
from p2pcodistill.checkpoint.frames import read_header
from p2pcodistill.checkpoint.quantize import ALPHABETS
from p2pcodistill.checkpoint.reference import Reference
from p2pcodistill.checkpoint.snapshot import Snapshot
from p2pcodistill.config import FramesConfig

MAX_BYTES = 1 << 34


@dataclass(frozen=True)
class Sent:
    """One frame of a chain. `reference` is what its receivers hold then: moved by the next one."""

    step: int
    is_keyframe: bool
    codec: str
    data: bytes
    num_fp16_bytes: int
    reference: Reference


def send(checkpoints: Iterable[Snapshot], config: FramesConfig) -> Iterator[Sent]:
    """Encode and decode the checkpoints in turn."""
    encoder, reference = FrameEncoder(config), None
    for checkpoint in checkpoints:
        sink = io.BytesIO()
        frame = encoder.encode(checkpoint, sink)
        data = sink.getvalue()
        reference = decode_frame(data, reference, max_bytes=MAX_BYTES)
        is_keyframe = frame.base_step is None
        yield Sent(frame.step, is_keyframe, frame.codec, data, frame.num_fp16_bytes, reference)


# --- bounds ---------------------------------------------------------------------------------------------------


def entropy_bytes(counts: Tensor) -> float:
    """Bytes of so many symbols of each kind, at their order-0 entropy."""
    total = counts.sum()
    shares = counts[counts > 0].double() / total
    return float(-(shares * shares.log2()).sum() * total / 8)


def num_exact_bytes(frame: bytes) -> int:
    """What of a frame's bytes is tensors that arrive as they are (biases, running statistics)."""
    header = read_header(memoryview(frame), max_bytes=MAX_BYTES)
    return sum(entry.num_wire_bytes for entry in header.entries if entry.encoding in (EXACT, LOSSLESS))


def ideal_delta_bytes(frame: bytes) -> float:
    """Order-0 entropy of the codes, tensor by tensor, plus the scales as they were sent.

    The codes are what the decoder reads, one for every element; those of a block without a scale are zeros.
    """
    header = read_header(memoryview(frame), max_bytes=MAX_BYTES)
    ideal = 0.0
    for entry in header.entries:
        if entry.encoding in ALPHABETS:  # its own pieces, or those of the tensors that are joined up to it
            ideal += sum(entry.pieces[::CODE_PIECES])  # the first of each segment: the scales
    for entry, symbols, _ in read_codes(frame, max_bytes=MAX_BYTES):
        alphabet = ALPHABETS[entry.encoding]
        by_symbol = torch.bincount(symbols.long(), minlength=alphabet.num_symbols)
        counts = torch.zeros(alphabet.base, dtype=torch.int64)
        for digit in range(alphabet.num_digits):
            codes = torch.arange(alphabet.num_symbols) // alphabet.base**digit % alphabet.base
            counts += torch.zeros_like(counts).index_add_(0, codes, by_symbol)
        # Elements of empty blocks are zeros, too; what fills up the last block is none.
        counts[alphabet.num_levels] += entry.num_elements - int(counts.sum())
        ideal += entropy_bytes(counts)
    return ideal


def plane_entropy_bytes(tensors: Iterable[Tensor]) -> float:
    """Order-0 entropy of the byte planes of the tensors, those of one dtype taken together."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor.flatten())
    total = 0.0
    for dtype, parts in by_dtype.items():
        planes = torch.cat(parts).view(torch.uint8).view(-1, dtype.itemsize)
        total += sum(entropy_bytes(torch.bincount(plane, minlength=256)) for plane in planes.unbind(1))
    return total


# --- checkpoints on disk, within one run of the benchmark ----------------------------------------------------


def save_checkpoint(path: Path, snapshot: Snapshot) -> None:
    """Keep a snapshot without ties."""
    assert not snapshot.aliases
    metadata = {"buffers": json.dumps(sorted(snapshot.buffers)), "order": json.dumps(list(snapshot.tensors))}
    save_file(snapshot.tensors, path, metadata=metadata)


def load_checkpoint(path: Path) -> Snapshot:
    """The inverse; the step is the file's name behind its last hyphen."""
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
        tensors = {name: file.get_tensor(name) for name in json.loads(metadata["order"])}
    step = int(path.stem.rpartition("-")[2])
    return Snapshot(step, tensors, {}, frozenset(json.loads(metadata["buffers"])))


def list_checkpoints(folder: Path, site: str) -> list[Path]:
    """The checkpoints of a site, by step."""
    return sorted(folder.glob(f"{site}-*.safetensors"))


def checkpoint_path(folder: Path, site: str, step: int) -> Path:
    """Where a site's checkpoint is kept."""
    return folder / f"{site}-{step:08d}.safetensors"
