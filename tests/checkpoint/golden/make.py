"""Write the golden files of the current format version, once: `python tests/checkpoint/golden/make.py`.

For every frame NAME.frame there is NAME.safetensors with what it decodes to, bit for bit. A dtype that safetensors lacks is
there as bytes, a large tensor by its SHA-256 only; the metadata has every tensor's dtypes and shape.
Golden files are never made anew: frames that were sent once must decode for ever. A new format version gets a new folder.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from p2pcodistill.checkpoint.encoder import FrameEncoder, encode_reference_keyframe
from p2pcodistill.checkpoint.entries import SAME
from p2pcodistill.checkpoint.frames import FORMAT_VERSION, FrameWriter
from p2pcodistill.checkpoint.rate import RateControl
from p2pcodistill.checkpoint.reference import Reference, raw_bytes
from p2pcodistill.checkpoint.snapshot import Snapshot, dtype_name
from p2pcodistill.config import FramesConfig

FOLDER = Path(__file__).parent / f"v{FORMAT_VERSION}"
MAX_KEPT_BYTES = 1 << 16
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.float8_e5m2, torch.float8_e5m2fnuz,
    torch.complex64, torch.complex128,
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8, torch.bool,
]  # fmt: skip


def main() -> None:
    FOLDER.mkdir()  # never over old ones
    write_dtypes()
    for precision in ("fp16", "bf16", "fp32", "int8"):
        encoder = FrameEncoder(FramesConfig(keyframe=precision))
        write(f"keyframe-{precision}", encoder, model(step=0))
    write_chain()
    write_large()
    write_full()


def write(name: str, encoder: FrameEncoder, snapshot: Snapshot) -> None:
    sink = io.BytesIO()
    encoder.encode(snapshot, sink)
    assert encoder.reference is not None
    keep(name, sink.getvalue(), encoder.reference)


def keep(name: str, frame: bytes, reference: Reference) -> None:
    specs, kept = {}, {}
    for tensor_name, tensor in reference.tensors.items():
        raw = raw_bytes(tensor)
        spec = [dtype_name(tensor.dtype), dtype_name(reference.dtypes[tensor_name]), list(tensor.shape)]
        if raw.numel() > MAX_KEPT_BYTES:
            spec.append(hashlib.sha256(raw.numpy().tobytes()).hexdigest())
        else:
            kept[tensor_name] = raw.clone() if tensor.dtype == torch.complex128 else tensor.clone()
        specs[tensor_name] = spec
    facts = {
        "step": reference.step,
        "checksum": reference.checksum,
        "aliases": reference.aliases,
        "tensors": specs,
    }
    (FOLDER / f"{name}.frame").write_bytes(frame)
    save_file(kept, FOLDER / f"{name}.safetensors", metadata={"reference": json.dumps(facts)})


def randn(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def write_dtypes() -> None:
    """A keyframe of every dtype, an empty tensor, a scalar, names beyond ASCII, and the highest step."""
    tensors = {f"a.{dtype_name(dtype)}": (randn(2, 3, seed=5).abs() * 20).to(dtype) for dtype in DTYPES}
    tensors |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(-0.0), "größe.重み": torch.arange(3)}
    aliases = {"tied": "a.float32", "geknüpft": "größe.重み"}
    snapshot = Snapshot(2**63 - 1, tensors, aliases, frozenset(tensors))
    write("keyframe-dtypes", FrameEncoder(FramesConfig()), snapshot)


def model(step: int) -> Snapshot:
    """A small model as it is after `step` steps: parameters that walk, some only in a few rows, and everything else."""
    embedding = randn(21, 60, seed=1) * 0.1
    embedding[step % 21] += randn(60, seed=step) * 0.02
    embedding[2, :4] = torch.tensor([0.0, -0.0, 6e-8, -6e-8])
    edge = torch.full((2, 40), 65500.0 if step else 65000.0)
    edge[0] = 60000.0 + 60 * step  # a scale for both rows: the other one overshoots the edge of fp16
    grows = randn(3, 50, seed=3)
    grows[1, 1] = 65000.0 + 10.0 * step  # beyond fp16 from step 60 on
    walk = randn(40, 30, seed=4) * 0.05 + randn(40, 30, seed=40 + step) * 0.002
    tensors = {
        "embedding": embedding,
        "edge": edge,
        "grows": grows,
        "walk.double": walk.double(),
        "walk.half": walk[:9].half(),
        "walk.bfloat": walk[9:].bfloat16(),
        "norm": 1 + randn(16, seed=step) * 0.01,
        "scalar": torch.tensor(0.1 * step),
        "running_mean": randn(2, 8, seed=6 + step // 30),
        "num_batches": torch.tensor(step),
        "num_samples": torch.tensor([32 * step, step]),
        "mask": torch.tensor([[True, False, True], [False, False, True]]),
        "empty": torch.empty(0, 3),
    }
    buffers = frozenset({"running_mean", "num_batches", "num_samples", "mask"})
    return Snapshot(step, tensors, {"head": "embedding"}, buffers)


def write_chain() -> None:
    encoder = FrameEncoder(FramesConfig())
    write("chain-00-keyframe", encoder, model(step=0))
    for step, delta in [
        (10, "ternary"), (20, "3-bit"), (30, "4-bit"), (40, "8-bit"), (50, "lossless"),
        (60, "ternary"), (70, "8-bit"), (80, "lossless"),
    ]:  # fmt: skip
        switch(encoder, FramesConfig(delta=delta))
        write(f"chain-{step}-{delta}", encoder, model(step))
    reference = encoder.reference
    assert reference is not None
    sink = io.BytesIO()
    writer = FrameWriter(sink)
    for name, tensor in reference.tensors.items():
        writer.end_tensor(name, reference.dtypes[name], tensor.dtype, tensor.shape, SAME)
    writer.finish(90, (reference.step, reference.checksum), reference.checksum, reference.aliases)
    reference.step = 90
    keep("chain-90-unchanged", sink.getvalue(), reference)
    sink = io.BytesIO()
    encode_reference_keyframe(reference, sink)
    keep("keyframe-of-reference", sink.getvalue(), reference)


def write_large() -> None:
    """Tensors of more than one segment and more than one raw piece, in frames that are small all the same."""
    encoder = FrameEncoder(FramesConfig(keyframe="int8"))
    for index, delta in enumerate(["keyframe", "ternary", "8-bit", "lossless"]):
        weights = torch.zeros((1 << 22) + 1500)
        weights[:: 1 << 18] = 0.25 * (index + 1)
        weights[-1] = -0.125 * index
        ids = torch.zeros((1 << 20) + 9, dtype=torch.int64)
        ids[-1] = index
        if index:
            switch(encoder, FramesConfig(delta=delta))
        snapshot = Snapshot(index, {"weights": weights, "ids": ids}, {}, frozenset({"ids"}))
        write(f"large-{index}-{delta}", encoder, snapshot)


def write_full() -> None:
    """More small tensors than are joined in one bundle, and others among them, in frames that are small all the same."""
    encoder = FrameEncoder(FramesConfig())
    for index, delta in enumerate(["keyframe", "ternary", "lossless"]):
        tensors: dict[str, Tensor] = {}
        for layer in range(8):
            for name, shape in (("weight", (449, 446)), ("bias", (2, 3))):
                tensors[f"{layer}.{name}"] = torch.full(shape, 0.5)
                tensors[f"{layer}.{name}"][-1, layer % 3] += 0.25 * index
            tensors[f"{layer}.table"] = torch.zeros((1 << 16) - (layer > 0), dtype=torch.int32)
            tensors[f"{layer}.table"][-1] = index
        tensors |= {"large": torch.zeros(512, 512), "last": torch.full((3, 3), 0.125 * index)}
        tensors["large"][index] = 0.25
        if index:
            switch(encoder, FramesConfig(delta=delta))
        write(f"full-{index}-{delta}", encoder, Snapshot(index, tensors, {}))


def switch(encoder: FrameEncoder, config: FramesConfig) -> None:
    """Go on with other codes: an encoder does so by itself only from one alphabet to another."""
    encoder._config = config
    encoder._rate = RateControl(config) if config.delta != "lossless" else None


if __name__ == "__main__":
    main()
