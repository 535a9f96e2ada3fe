"""Part of `codec_speed` where there is a GPU: `gpu_encode_mb_s`, `gpu_decode_mb_s`, `gpu_exchange_stall_s`.

Encoding starts from a snapshot on the GPU and ends with the frame in a file; decoding starts from the frame and ends with
the weights on the GPU. The stall is what the training thread waits for at an exchange: the snapshot, and the copy of a
decoded teacher into its place.
"""

from __future__ import annotations

import io
import itertools
import statistics
import time

import torch
from torch import Tensor

from benchmarks.figure import print_figure
from benchmarks.large_model import LargeModel, num_parameters
from p2pcodistill.checkpoint.decoder import decode_frame
from p2pcodistill.checkpoint.encoder import FrameEncoder
from p2pcodistill.checkpoint.reference import Reference
from p2pcodistill.checkpoint.snapshot import take_snapshot
from p2pcodistill.config import FramesConfig

NUM_FRAMES = 7  # the first is a keyframe, the second warms up
MAX_BYTES = 1 << 34


def print_gpu_figures() -> None:
    """Ternary delta frames of the large model."""
    device = torch.device("cuda")
    generator = torch.Generator(device).manual_seed(0)
    model = LargeModel().to(device)
    teacher = LargeModel().to(device)
    encoder = FrameEncoder(FramesConfig(delta="ternary"))
    reference: Reference | None = None
    encode_s, decode_s, stall_s = [], [], []
    for step in range(NUM_FRAMES):
        model.change(generator)
        sink = io.BytesIO()
        torch.cuda.synchronize()
        times_s = [time.perf_counter()]
        snapshot = take_snapshot(model, step, on_device=True)
        torch.cuda.synchronize()
        times_s.append(time.perf_counter())
        frame = encoder.encode(snapshot, sink)
        torch.cuda.synchronize()
        times_s.append(time.perf_counter())
        reference = decode_frame(sink.getbuffer(), reference, max_bytes=MAX_BYTES)
        times_s.append(time.perf_counter())
        _load(teacher, reference.tensors)
        torch.cuda.synchronize()
        times_s.append(time.perf_counter())
        snapshot_s, encoded_s, decoded_s, loaded_s = (
            after - before for before, after in itertools.pairwise(times_s)
        )
        encode_s.append(encoded_s)
        decode_s.append(decoded_s + loaded_s)
        stall_s.append(snapshot_s + loaded_s)
    num_mb = frame.num_fp16_bytes / 1e6
    on = f"{num_parameters(model)} parameters on {torch.cuda.get_device_name()}, ternary, median of {NUM_FRAMES - 2}"
    for name, value, unit in (
        ("gpu_encode_mb_s", num_mb / statistics.median(encode_s[2:]), "MB of fp16 a second"),
        ("gpu_decode_mb_s", num_mb / statistics.median(decode_s[2:]), "MB of fp16 a second"),
        ("gpu_exchange_stall_s", statistics.median(stall_s[2:]), "s of the training thread an exchange"),
    ):
        print_figure(
            name, round(value, 4), unit, "none: reported", holds=None, why="no bound is set for it", on=on
        )


@torch.no_grad()
def _load(model: torch.nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, parameter in model.named_parameters():
        parameter.copy_(tensors[name], non_blocking=True)
