"""Prints the extra memory of one case of `codec_speed` / fp16 model: `python -m benchmarks.codec_memory CASE`.

The kernel keeps a process's resident high-water mark, and forgets it when asked to (Linux only). Model, reference and the
pages of the mapped frame are in memory before that; a reference that is made meanwhile is taken off.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.large_model import LargeModel
from p2pcodistill.checkpoint.decoder import decode_frame
from p2pcodistill.checkpoint.encoder import FrameEncoder
from p2pcodistill.checkpoint.reference import Reference
from p2pcodistill.checkpoint.snapshot import Snapshot, take_snapshot
from p2pcodistill.config import FramesConfig

MAX_BYTES = 1 << 34


def main(case: str) -> None:
    """Measure `keyframe encode`, `keyframe decode`, `delta encode` or `delta decode`."""
    torch.set_num_threads(1)
    kind, direction = case.split()
    model = LargeModel()
    with tempfile.TemporaryDirectory() as name:
        measure = _encode_memory if direction == "encode" else _decode_memory
        print(measure(model, kind, Path(name)))


def _encode_memory(model: LargeModel, kind: str, folder: Path) -> float:
    encoder = FrameEncoder(FramesConfig(delta="ternary"))
    if kind == "delta":
        _encode(encoder, take_snapshot(model, 1), folder / "keyframe")
        model.change()
    snapshot = take_snapshot(model, 2)
    before = _reset_peak()
    num_fp16_bytes = _encode(encoder, snapshot, folder / kind)
    made = encoder.reference if kind == "keyframe" else None
    return _extra(before, made) / num_fp16_bytes


def _decode_memory(model: LargeModel, kind: str, folder: Path) -> float:
    encoder = FrameEncoder(FramesConfig(delta="ternary"))
    num_fp16_bytes = _encode(encoder, take_snapshot(model, 1), folder / "keyframe")
    reference = None
    if kind == "delta":
        model.change()
        _encode(encoder, take_snapshot(model, 2), folder / "delta")
        reference = decode_frame((folder / "keyframe").read_bytes(), None, max_bytes=MAX_BYTES)
    del encoder, model
    with (
        (folder / kind).open("rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        sum(mapped[offset] for offset in range(0, len(mapped), mmap.PAGESIZE))  # into memory
        view = memoryview(mapped)
        before = _reset_peak()
        decoded = decode_frame(view, reference, max_bytes=MAX_BYTES)
        extra = _extra(before, None if kind == "delta" else decoded)
        view.release()
    return extra / num_fp16_bytes


def _encode(encoder: FrameEncoder, snapshot: Snapshot, path: Path) -> int:
    with path.open("wb") as file:
        return encoder.encode(snapshot, file).num_fp16_bytes


def _reset_peak() -> int:
    """Set the high-water mark back; resident bytes now. What the allocator kept of freed memory is given back first."""
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _extra(before: int, made: Reference | None) -> int:
    return _status_bytes("VmHWM") - before - (made.num_bytes if made is not None else 0)


def _status_bytes(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


if __name__ == "__main__":
    main(" ".join(sys.argv[1:]))
