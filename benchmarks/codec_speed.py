"""How fast frames are made and read, on one core, and in how much memory.

`keyframe_encode_ratio`, `keyframe_decode_ratio`: seconds of the bare compressor (Blosc2 on the raw fp16 bytes, in the same
pieces, with the same settings) / of our whole path, in memory. Encoding: check, cast, checksum, compress, hash; decoding:
hash each chunk, decompress, check for NaN, checksum. Both take turns, and the median of the pairs' ratios counts.
`delta_encode_mb_s`, `delta_decode_mb_s`: MB of fp16 a second of ternary delta frames, the reference's update included;
beside them, in turns and on the same weights, the codec of `straightforward`, and how many times as fast ours is.
`codec_extra_memory_ratio`: the highest resident memory while a frame is made or read, beside model, reference and the file
that is mapped, as a share of the fp16 model; each in a process of its own.

The weights are checkpoints of the demo's model 50 steps apart, trained here, tiled to 64 M parameters; every tile is scaled
by another factor, or the compressor would find the last one again.
"""

from __future__ import annotations

import io
import itertools
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import blosc2
import numpy as np
import torch

from benchmarks import straightforward
from benchmarks.figure import print_figure
from benchmarks.training import Run, train_checkpoints
from p2pcodistill.checkpoint.coding import BLOCK_BYTES, MAX_RAW_BYTES
from p2pcodistill.checkpoint.decoder import decode_frame
from p2pcodistill.checkpoint.encoder import FrameEncoder
from p2pcodistill.checkpoint.manifest import DEFAULT_CHUNK_BYTES, digest_chunks
from p2pcodistill.checkpoint.reference import Reference
from p2pcodistill.checkpoint.snapshot import Snapshot
from p2pcodistill.config import FramesConfig

NUM_PARAMETERS = 64_000_000
NUM_PAIRS = 7
NUM_CHECKPOINTS = 7  # the first is a keyframe, the first delta warms up
MIN_ENCODE_RATIO, MIN_DECODE_RATIO = 0.5, 0.6
MIN_ENCODE_MB_S, MIN_DECODE_MB_S = 400, 800
MAX_MEMORY_RATIO = 0.25
MAX_BYTES = 1 << 34


def main() -> None:
    """Measure all; print the figures."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = Run("language-model", "cosine", seed=0, num_steps=2000, frames=None)
        checkpoints = list(train_checkpoints(run, folder, NUM_CHECKPOINTS))
        print_keyframe_ratios(tile(checkpoints[0]))
        print_delta_rates(checkpoints)
    print_memory()
    if torch.cuda.is_available():
        from benchmarks.codec_gpu import print_gpu_figures

        print_gpu_figures()


def tile(checkpoint: Snapshot, num_parameters: int = NUM_PARAMETERS) -> Snapshot:
    """A model of so many parameters: each tensor repeated along its first axis, scaled by a factor for each tile."""
    num_tiles = -(-num_parameters // sum(tensor.numel() for tensor in checkpoint.tensors.values()))
    factors = torch.rand(num_tiles, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.75
    tensors = {}
    for name, tensor in checkpoint.tensors.items():
        tiles = tensor[None] * factors.view(-1, *[1] * tensor.ndim)
        tensors[name] = tiles.flatten(0, 1) if tensor.ndim else tiles
    return Snapshot(checkpoint.step, tensors, {})


# --- keyframes --------------------------------------------------------------------------------------------------


def print_keyframe_ratios(snapshot: Snapshot) -> None:
    """Our whole path against the bare compressor, encoding and decoding."""
    raw = [tensor.half().view(-1).view(torch.uint8).numpy() for tensor in snapshot.tensors.values()]
    pieces = [piece for array in raw for piece in _cut(array)]
    chunks = [_bare_compress(piece) for piece in pieces]
    sink = io.BytesIO()  # used again and again: its memory is there already, as a file's would be
    _encode(snapshot, sink)
    frame = sink.getvalue()

    def encode() -> None:
        sink.seek(0)
        _encode(snapshot, sink)
        with sink.getbuffer() as written:
            digest_chunks(written, DEFAULT_CHUNK_BYTES)

    def bare_encode() -> None:
        for piece in pieces:
            _bare_compress(piece)

    def decode() -> None:
        digest_chunks(frame, DEFAULT_CHUNK_BYTES)
        decode_frame(frame, None, max_bytes=MAX_BYTES)

    def bare_decode() -> None:
        # Into new memory that is all there at the end, as ours.
        into = [np.empty_like(array) for array in raw]
        parts = (part for array in into for part in _cut(array))
        for chunk, part in zip(chunks, parts, strict=True):
            blosc2.decompress2(chunk, dst=part, nthreads=1)

    num_mb = sum(array.nbytes for array in raw) / 1e6
    on = f"demo's model tiled to {num_mb / 2:.0f} M fp32 parameters, fp16 keyframe in memory, one thread, {NUM_PAIRS} pairs"
    for name, ours, bare, bound in (
        ("keyframe_encode_ratio", encode, bare_encode, MIN_ENCODE_RATIO),
        ("keyframe_decode_ratio", decode, bare_decode, MIN_DECODE_RATIO),
    ):
        seconds = take_turns(bare, ours, lambda: digest_chunks(frame, DEFAULT_CHUNK_BYTES))
        value = statistics.median(bare_s / ours_s for bare_s, ours_s, _ in seconds)
        bare_s, ours_s, hash_s = (statistics.median(column) for column in zip(*seconds, strict=True))
        print_figure(
            name,
            round(value, 3),
            "seconds of the bare compressor / of the whole path",
            f"at least {bound}",
            holds=value >= bound,
            on=on,
            bare_mb_s=round(num_mb / bare_s),
            mb_s=round(num_mb / ours_s),
            chunk_hashes_share=round(hash_s / ours_s, 3),
            without_chunk_hashes=round(bare_s / (ours_s - hash_s), 3),
        )


def take_turns(*calls: Callable[[], object]) -> list[tuple[float, ...]]:
    """Seconds of each, in turns, after one turn that does not count."""
    turns = [tuple(map(_seconds, calls)) for _ in range(NUM_PAIRS + 1)]
    return turns[1:]


def _seconds(call: Callable[[], object]) -> float:
    start_s = time.perf_counter()
    call()
    return time.perf_counter() - start_s


def _cut(array: np.ndarray) -> Iterator[np.ndarray]:
    return (array[start : start + MAX_RAW_BYTES] for start in range(0, array.nbytes, MAX_RAW_BYTES))


def _bare_compress(piece: np.ndarray) -> bytes:
    return blosc2.compress2(
        piece, typesize=2, codec=blosc2.Codec.ZSTD, clevel=1, filters=[blosc2.Filter.SHUFFLE],
        filters_meta=[0], blocksize=BLOCK_BYTES, nthreads=1,
    )  # fmt: skip


def _encode(snapshot: Snapshot, sink: io.BytesIO) -> None:
    FrameEncoder(FramesConfig(keyframe="fp16")).encode(snapshot, sink)


# --- delta frames -----------------------------------------------------------------------------------------------


def print_delta_rates(checkpoints: list[Snapshot]) -> None:
    """Ternary delta frames of consecutive checkpoints, by our codec and by the straightforward one."""
    encoder = FrameEncoder(FramesConfig(delta="ternary"))
    reference: Reference | None = None
    plain_sender = straightforward.flatten(tile(checkpoints[0])).half()
    plain_receiver = plain_sender.clone()
    turns, sizes = [], []
    for checkpoint in checkpoints:
        snapshot, sink = tile(checkpoint), io.BytesIO()
        flat = straightforward.flatten(snapshot)
        start_s = time.perf_counter()
        frame = encoder.encode(snapshot, sink)
        encoded_s = time.perf_counter()
        plain_frame = straightforward.encode(flat, plain_sender)
        plain_encoded_s = time.perf_counter()
        reference = decode_frame(sink.getbuffer(), reference, max_bytes=MAX_BYTES)
        decoded_s = time.perf_counter()
        straightforward.decode(plain_frame, plain_receiver)
        marks_s = [start_s, encoded_s, plain_encoded_s, decoded_s, time.perf_counter()]
        turns.append([end_s - begin_s for begin_s, end_s in itertools.pairwise(marks_s)])
        sizes.append(frame.num_bytes)
    assert torch.equal(plain_sender, plain_receiver), "it is a codec"
    encode_s, plain_encode_s, decode_s, plain_decode_s = zip(*turns[2:], strict=True)
    num_plain_mb = plain_sender.nbytes / 1e6
    num_mb = frame.num_fp16_bytes / 1e6
    on = (
        f"demo's model tiled to {num_mb / 2:.0f} M parameters, ternary, {len(checkpoints) - 2} checkpoints "
        f"{checkpoints[1].step - checkpoints[0].step} steps apart, median, one thread"
    )
    for name, seconds, plain_s, bound in (
        ("delta_encode_mb_s", encode_s, plain_encode_s, MIN_ENCODE_MB_S),
        ("delta_decode_mb_s", decode_s, plain_decode_s, MIN_DECODE_MB_S),
    ):
        value = num_mb / statistics.median(seconds)
        plain_mb_s = num_plain_mb / statistics.median(plain_s)
        print_figure(
            name,
            round(value),
            "MB of fp16 a second and core",
            f"at least {bound}",
            holds=value >= bound,
            on=on,
            best=round(num_mb / min(seconds)),
            straightforward_mb_s=round(plain_mb_s),
            times_as_fast=round(value / plain_mb_s, 2),
            frame_ratio=round(num_mb * 1e6 / statistics.mean(sizes[1:]), 1),
        )


# --- memory -----------------------------------------------------------------------------------------------------


def print_memory() -> None:
    """Peak memory of each of the four; the worst is the figure."""
    ratios = {}
    for case in ("keyframe encode", "keyframe decode", "delta encode", "delta decode"):
        command = [sys.executable, "-m", "benchmarks.codec_memory", case]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        ratios[case] = float(output)
    value = max(ratios.values())
    print_figure(
        "codec_extra_memory_ratio",
        round(value, 3),
        "peak memory beside model, reference and mapped file / fp16 model",
        f"at most {MAX_MEMORY_RATIO}",
        holds=value <= MAX_MEMORY_RATIO,
        on="a process each, its resident high-water mark; 100 M parameters",
        cases={case: round(ratio, 3) for case, ratio in ratios.items()},
    )


if __name__ == "__main__":
    main()
