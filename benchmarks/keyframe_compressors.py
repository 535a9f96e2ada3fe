"""Libraries that could compress keyframes, on trained weights in fp16 and bf16: ratio and speed on one core.

Those that are not installed are passed over by name. `efficiency` is the order-0 entropy of the byte planes / bytes made.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.chains import entropy_bytes
from benchmarks.figure import print_figure
from p2pcodistill.checkpoint.coding import compress_raw, decompress_raw
from p2pcodistill.checkpoint.snapshot import Snapshot

MIN_BYTES = 16_000_000
_PIECE_BYTES = 8 * 1024**2

Compressor = tuple[Callable[[], Any], Callable[[Any], object], Callable[[Any], int]]
"""Compress; decompress what came out; its size in bytes."""


def print_compressors(checkpoint: Snapshot, on: str) -> None:
    """One line a precision."""
    weights = torch.cat(
        [tensor.flatten().float() for tensor in checkpoint.tensors.values() if tensor.ndim > 1]
    )
    num_repeats = -(-MIN_BYTES // (2 * len(weights)))
    # Each repeat by another factor, or a compressor with a large window would find the last one again.
    factors = torch.rand(num_repeats, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.75
    weights = (weights * factors[:, None]).flatten()
    for precision, dtype in (("fp16", torch.float16), ("bf16", torch.bfloat16)):
        rows = compare(weights.to(dtype))
        print_figure(
            "keyframe_compressors",
            rows["blosc2"]["ratio"],
            "raw bytes / compressed, with what is used here",
            "none: a comparison",
            holds=None,
            why="shown beside",
            on=f"{on}; the weights in {precision}, tiled to {2 * len(weights) / 1e6:.0f} MB, one core, the best of 3",
            rows=rows,
        )


def compare(weights: Tensor) -> dict[str, dict[str, Any]]:
    """Ratio, efficiency and MB/s of each."""
    raw = weights.view(torch.uint8).numpy()
    ideal = sum(
        entropy_bytes(torch.bincount(torch.from_numpy(raw[plane::2]), minlength=256)) for plane in (0, 1)
    )
    rows: dict[str, dict[str, Any]] = {}
    for name, make in (
        ("blosc2", _blosc2),
        ("zstandard", _zstandard),
        ("zstandard of byte planes", _zstandard_planes),
        ("zipnn", _zipnn),
        ("pcodec", _pcodec),
    ):
        try:
            compress, decompress, size = make(weights, raw)
        except ImportError as error:
            rows[name] = {"why": f"not installed: {error.name}"}
            continue
        encode_s, compressed = _best_of_three(compress)
        decode_s, _ = _best_of_three(lambda decompress=decompress, made=compressed: decompress(made))
        rows[name] = {
            "ratio": round(raw.nbytes / size(compressed), 4),
            "efficiency": round(ideal / size(compressed), 4),
            "encode_mb_s": round(raw.nbytes / 1e6 / encode_s),
            "decode_mb_s": round(raw.nbytes / 1e6 / decode_s),
        }
    return rows


def _best_of_three(call: Callable[[], Any]) -> tuple[float, Any]:
    seconds = []
    for _ in range(3):
        start_s = time.perf_counter()
        made = call()
        seconds.append(time.perf_counter() - start_s)
    return min(seconds), made


def _blosc2(weights: Tensor, raw: np.ndarray) -> Compressor:
    pieces = [raw[start : start + _PIECE_BYTES] for start in range(0, raw.nbytes, _PIECE_BYTES)]
    into = [np.empty_like(piece) for piece in pieces]

    def decompress(made: list[bytes]) -> None:
        for chunk, out in zip(made, into, strict=True):
            decompress_raw(memoryview(chunk), out, 2)

    return lambda: [compress_raw(piece, 2) for piece in pieces], decompress, _sum_sizes


def _zstandard(weights: Tensor, raw: np.ndarray) -> Compressor:
    import zstandard

    compressor, decompressor = zstandard.ZstdCompressor(level=3), zstandard.ZstdDecompressor()
    return lambda: compressor.compress(raw), decompressor.decompress, len


def _zstandard_planes(weights: Tensor, raw: np.ndarray) -> Compressor:
    import zstandard

    compressor, decompressor = zstandard.ZstdCompressor(level=1), zstandard.ZstdDecompressor()

    def decompress(made: list[bytes]) -> np.ndarray:
        out = np.empty_like(raw)
        for plane, chunk in enumerate(made):
            out[plane::2] = np.frombuffer(decompressor.decompress(chunk), np.uint8)
        return out

    return (
        lambda: [compressor.compress(np.ascontiguousarray(raw[plane::2])) for plane in (0, 1)],
        decompress,
        _sum_sizes,
    )


def _zipnn(weights: Tensor, raw: np.ndarray) -> Compressor:
    import zipnn

    dtype = "float16" if weights.dtype == torch.float16 else "bfloat16"
    codec = zipnn.ZipNN(input_format="torch", bytearray_dtype=dtype, threads=1)
    # It may work in place.
    return lambda: codec.compress(weights.clone()), codec.decompress, len


def _pcodec(weights: Tensor, raw: np.ndarray) -> Compressor:
    from pcodec import ChunkConfig, DeltaSpec, ModeSpec, standalone

    config = ChunkConfig(compression_level=8, mode_spec=ModeSpec.classic(), delta_spec=DeltaSpec.no_op())
    numbers = raw.view(np.float16 if weights.dtype == torch.float16 else np.uint16)
    out = np.empty_like(numbers)
    return (
        lambda: standalone.simple_compress(numbers, config),
        lambda made: standalone.simple_decompress_into(made, out),
        len,
    )


def _sum_sizes(made: list[bytes]) -> int:
    return sum(len(chunk) for chunk in made)
