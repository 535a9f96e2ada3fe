"""What the benchmarks count, against counting it the long way."""

import math

import pytest
import torch

from benchmarks.chains import (
    checkpoint_path,
    entropy_bytes,
    ideal_delta_bytes,
    list_checkpoints,
    load_checkpoint,
    num_exact_bytes,
    plane_entropy_bytes,
    save_checkpoint,
    send,
)
from benchmarks.training import SiteResult
from p2pcodistill.checkpoint.snapshot import Snapshot
from p2pcodistill.config import FramesConfig


def make_checkpoints() -> list[Snapshot]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randn((300, 70), generator=generator)  # the last block is a short one
    moved = first + 0.05 * torch.randn(first.shape, generator=generator)
    bias = torch.arange(8.0)
    return [Snapshot(50, {"w": first, "b": bias}, {}), Snapshot(100, {"w": moved, "b": bias + 1}, {})]


def test_entropy_of_equally_frequent_symbols() -> None:
    assert entropy_bytes(torch.tensor([8, 8, 8, 8])) == pytest.approx(8)
    assert entropy_bytes(torch.tensor([32, 0, 0, 0])) == 0


def test_entropy_of_planes_of_several_dtypes() -> None:
    constant = torch.zeros(64, dtype=torch.float16)
    bits = torch.tensor([0, 1] * 32, dtype=torch.uint8)
    assert plane_entropy_bytes([constant, bits]) == pytest.approx(8)


def test_ideal_bytes_are_those_of_the_codes_that_moved_the_reference() -> None:
    first, moved = make_checkpoints()
    sender = send([first, moved], FramesConfig(delta="ternary", keyframe="fp32"))
    before = next(sender).reference.tensors["w"].clone()
    sent = next(sender)
    codes = torch.sign(sent.reference.tensors["w"] - before)
    shares = [float((codes == code).float().mean()) for code in (-1, 0, 1)]
    num_bits = -codes.numel() * sum(share * math.log2(share) for share in shares)
    num_scale_bytes = ideal_delta_bytes(sent.data) - num_bits / 8
    assert 0 < num_scale_bytes < 200  # of 21 blocks
    assert num_exact_bytes(sent.data) > 0  # the bias
    assert ideal_delta_bytes(sent.data) < len(sent.data)


def test_checkpoints_come_back_in_order(tmp_path) -> None:
    checkpoints = make_checkpoints()
    for checkpoint in reversed(checkpoints):
        save_checkpoint(checkpoint_path(tmp_path, "berlin", checkpoint.step), checkpoint)
    loaded = [load_checkpoint(path) for path in list_checkpoints(tmp_path, "berlin")]
    assert [checkpoint.step for checkpoint in loaded] == [50, 100]
    assert list(loaded[0].tensors) == ["w", "b"]
    assert torch.equal(loaded[1].tensors["w"], checkpoints[1].tensors["w"])


def test_first_step_at_or_below() -> None:
    result = SiteResult(val_losses={100: 2.0, 50: 3.0, 150: 1.5})
    assert result.first_step_at_or_below(2.0) == 100
    assert result.first_step_at_or_below(1.0) is None
    assert result.final_loss == 1.5
