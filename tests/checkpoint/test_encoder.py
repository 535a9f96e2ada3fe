"""Chains of frames from an encoder to a decoder: what travels how, and that both ends hold the same."""

import copy
import io

import pytest
import torch
from torch import nn

from p2pcodistill.checkpoint import encoder as encoder_module
from p2pcodistill.checkpoint import pieces
from p2pcodistill.checkpoint.decoder import decode_frame
from p2pcodistill.checkpoint.encoder import FrameEncoder, encode_reference_keyframe
from p2pcodistill.checkpoint.frames import read_header
from p2pcodistill.checkpoint.quantize import Quantizer
from p2pcodistill.checkpoint.snapshot import Snapshot, take_snapshot
from p2pcodistill.config import FramesConfig
from p2pcodistill.errors import ChecksumError, NonFiniteError

MAX_BYTES = 1 << 30
DELTAS = ["adaptive", "ternary", "3-bit", "4-bit", "8-bit", "lossless"]
KEYFRAMES = ["fp16", "bf16", "fp32", "int8"]


class Net(nn.Module):
    """Matrices, a bias, batch norm with its counter, tied weights, a mask."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(300, 40)
        self.body = nn.Sequential(nn.Linear(40, 70), nn.BatchNorm1d(70), nn.Linear(70, 40))
        self.head = nn.Linear(40, 300, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("mask", torch.tensor([True, False, True]))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Net()


def train_a_bit(model, scale=0.03):
    """Move everything a little; the batch norm sees a batch."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
        model.body(torch.randn(16, 40))


def encode(encoder, model, step):
    sink = io.BytesIO()
    frame = encoder.encode(take_snapshot(model, step), sink)
    assert frame.num_bytes == len(sink.getvalue())
    return frame, sink.getvalue()


def assert_same(reference, other):
    assert list(reference.tensors) == list(other.tensors)
    for name, tensor in reference.tensors.items():
        assert tensor.dtype == other.tensors[name].dtype
        assert torch.equal(tensor, other.tensors[name]), name
    assert (reference.step, reference.checksum) == (other.step, other.checksum)
    assert (reference.aliases, reference.schema_hash) == (other.aliases, other.schema_hash)


@pytest.mark.parametrize("keyframe", KEYFRAMES)
@pytest.mark.parametrize("delta", DELTAS)
def test_sender_and_receiver_hold_the_same_through_a_long_chain(model, delta, keyframe):
    encoder = FrameEncoder(FramesConfig(delta=delta, keyframe=keyframe))
    reference, kinds = None, []
    for step in range(0, 200, 10):
        frame, data = encode(encoder, model, step)
        kinds.append(frame.base_step)
        reference = decode_frame(data, reference, max_bytes=MAX_BYTES)
        assert_same(reference, encoder.reference)
        train_a_bit(model, 0.003)
    assert kinds == [None, *range(0, 190, 10)]
    snapshot = take_snapshot(model, 0)
    assert reference.schema_hash == snapshot.schema_hash
    for name in ("body.0.bias", "body.1.running_mean", "body.1.num_batches_tracked", "mask"):
        assert reference.tensors[name].dtype == snapshot.tensors[name].dtype
    assert reference.aliases == {"head.weight": "embed.weight"}


@pytest.mark.parametrize("delta", DELTAS)
def test_small_tensors_and_buffers_are_exact_in_every_frame(model, delta):
    encoder = FrameEncoder(FramesConfig(delta=delta))
    encode(encoder, model, 0)
    train_a_bit(model)
    _, data = encode(encoder, model, 1)
    assert {
        entry.name: entry.encoding for entry in read_header(memoryview(data), max_bytes=MAX_BYTES).entries
    }["mask"] == "same"
    snapshot = take_snapshot(model, 1)
    for name, tensor in encoder.reference.tensors.items():
        if tensor.ndim <= 1:
            assert torch.equal(tensor, snapshot.tensors[name]), name


def test_lossless_deltas_are_the_student_in_fp16(model):
    encoder = FrameEncoder(FramesConfig(delta="lossless"))
    for step in range(3):
        _, data = encode(encoder, model, step)
        for name, tensor in take_snapshot(model, step).tensors.items():
            held = encoder.reference.tensors[name]
            assert torch.equal(held, tensor.to(held.dtype)), name
        train_a_bit(model)
    keyframe, _ = encode(FrameEncoder(FramesConfig(delta="off")), model, 0)
    assert len(data) < keyframe.num_bytes


def test_off_sends_keyframes_only(model):
    encoder = FrameEncoder(FramesConfig(delta="off"))
    assert [encode(encoder, model, step)[0].base_step for step in range(3)] == [None, None, None]


def test_a_keyframe_of_the_reference_is_the_same_version_for_whoever_comes_late(model):
    encoder = FrameEncoder(FramesConfig(keyframe="int8"))
    early = None
    for step in range(4):
        _, data = encode(encoder, model, step)
        early = decode_frame(data, early, max_bytes=MAX_BYTES)
        train_a_bit(model)
    sink = io.BytesIO()
    keyframe = encoder.encode_keyframe_of_reference(sink)
    assert (keyframe.step, keyframe.base_step) == (3, None)
    late = decode_frame(sink.getvalue(), None, max_bytes=MAX_BYTES)
    assert_same(late, early)
    _, data = encode(encoder, model, 4)
    assert_same(decode_frame(data, late, max_bytes=MAX_BYTES), decode_frame(data, early, max_bytes=MAX_BYTES))
    sink = io.BytesIO()
    encode_reference_keyframe(early, sink)  # and a receiver can make it, too
    assert_same(decode_frame(sink.getvalue(), None, max_bytes=MAX_BYTES), late)


def test_there_is_no_keyframe_of_nothing():
    assert FrameEncoder(FramesConfig()).encode_keyframe_of_reference(io.BytesIO()) is None


def test_a_delta_frame_needs_its_very_base(model):
    encoder = FrameEncoder(FramesConfig())
    _, first = encode(encoder, model, 0)
    train_a_bit(model)
    _, second = encode(encoder, model, 1)
    train_a_bit(model)
    _, third = encode(encoder, model, 2)
    with pytest.raises(ChecksumError, match="base"):
        decode_frame(second, None, max_bytes=MAX_BYTES)
    held = decode_frame(first, None, max_bytes=MAX_BYTES)
    with pytest.raises(ChecksumError, match="base"):
        decode_frame(third, held, max_bytes=MAX_BYTES)
    held.tensors["embed.weight"][0, 0] += 1
    with pytest.raises(ChecksumError, match="checksum"):
        decode_frame(second, held, max_bytes=MAX_BYTES)


def test_weights_that_are_not_finite_are_named_and_the_chain_goes_on(model):
    encoder = FrameEncoder(FramesConfig())
    _, data = encode(encoder, model, 0)
    reference = decode_frame(data, None, max_bytes=MAX_BYTES)
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.body[0].weight[3, 3] = float("nan")
    with pytest.raises(NonFiniteError, match=r"body\.0\.weight"):
        encode(encoder, broken, 1)
    frame, data = encode(encoder, model, 2)
    assert frame.base_step == 0
    assert_same(decode_frame(data, reference, max_bytes=MAX_BYTES), encoder.reference)


def test_a_sink_that_fails_begins_a_new_chain(model):
    class FullDisk(io.BytesIO):
        def write(self, data):
            raise OSError(28, "No space left on device")

    encoder = FrameEncoder(FramesConfig())
    encode(encoder, model, 0)
    with pytest.raises(OSError, match="No space"):
        encoder.encode(take_snapshot(model, 1), FullDisk())
    assert encode(encoder, model, 2)[0].base_step is None


def test_restart_begins_a_new_chain(model):
    encoder = FrameEncoder(FramesConfig())
    encode(encoder, model, 0)
    encoder.restart()
    assert encode(encoder, model, 1)[0].base_step is None


def test_another_model_begins_a_new_chain(model):
    encoder = FrameEncoder(FramesConfig())
    encode(encoder, model, 0)
    assert encode(encoder, nn.Linear(3, 3), 1)[0].base_step is None


def test_what_fp16_cannot_hold_travels_in_fp32_and_as_it_is_beyond_that(model):
    encoder = FrameEncoder(FramesConfig())
    tensors = {"wide": torch.full((40, 40), 7e4), "wider": torch.full((40, 40), 1e300, dtype=torch.float64)}
    encoder.encode(Snapshot(0, tensors, {}), io.BytesIO())
    assert encoder.reference.tensors["wide"].dtype == torch.float32
    assert encoder.reference.tensors["wider"].dtype == torch.float64
    assert torch.equal(encoder.reference.tensors["wider"], tensors["wider"])


@pytest.mark.parametrize("value", [65504.01, 65519.0, 65520.0, -7e4])
def test_one_number_beyond_fp16_late_in_a_large_tensor_makes_it_travel_in_fp32(value):
    weights = torch.randn(3000, 2000, generator=torch.Generator().manual_seed(0))
    edge = weights.clone()
    edge[0, 0] = 65504.0
    weights[-1, -1] = value
    encoder, sink = FrameEncoder(FramesConfig()), io.BytesIO()
    encoder.encode(Snapshot(0, {"far": weights, "edge": edge}, {}), sink)
    reference = decode_frame(sink.getvalue(), None, max_bytes=MAX_BYTES)
    assert_same(reference, encoder.reference)
    assert torch.equal(reference.tensors["far"], weights)
    assert torch.equal(reference.tensors["edge"], edge.half())


@pytest.mark.parametrize("delta", ["ternary", "off"])
@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_keyframe_with_a_number_late_that_is_not_finite_is_refused_before_anything_is_written(delta, bad):
    tensors = {
        "first": torch.randn(50, 40),
        "last": torch.randn(3000, 200),
        "double": torch.randn(40, 40).double(),
    }
    encoder = FrameEncoder(FramesConfig(delta=delta))
    for name, index in (("last", -1), ("double", 0), ("first", 3)):
        broken = {key: tensor.clone() for key, tensor in tensors.items()}
        broken[name].view(-1)[index] = bad
        sink = io.BytesIO()
        with pytest.raises(NonFiniteError, match=name):
            encoder.encode(Snapshot(0, broken, {}), sink)
        assert not sink.getvalue()
        encoder.restart()
    assert encoder.encode(Snapshot(1, tensors, {}), sink).base_step is None
    assert_same(decode_frame(sink.getvalue(), None, max_bytes=MAX_BYTES), encoder.reference)


def test_a_tensor_that_outgrows_fp16_within_a_chain_is_replaced(model):
    encoder = FrameEncoder(FramesConfig())
    weights = torch.randn(64, 64)
    reference = None
    for step, factor in enumerate((1.0, 1e6, 1.1e6, 1.0)):
        sink = io.BytesIO()
        frame = encoder.encode(Snapshot(step, {"w": weights * factor}, {}), sink)
        reference = decode_frame(sink.getvalue(), reference, max_bytes=MAX_BYTES)
        assert frame.base_step == (step - 1 if step else None)
        assert_same(reference, encoder.reference)
    assert reference.tensors["w"].dtype == torch.float32


def test_unchanged_rows_cost_almost_nothing():
    encoder = FrameEncoder(FramesConfig(delta="ternary"))
    torch.manual_seed(0)
    table = torch.randn(8192, 128)
    encoder.encode(Snapshot(0, {"embed": table.clone()}, {}), io.BytesIO())
    table = encoder.reference.tensors["embed"].float()
    table[:80] += 0.1 * torch.randn(80, 128)
    frame = encoder.encode(Snapshot(1, {"embed": table}, {}), io.BytesIO())
    assert frame.num_bytes < 0.02 * frame.num_fp16_bytes / 8
    torch.testing.assert_close(encoder.reference.tensors["embed"][80:].float(), table[80:])


@pytest.mark.parametrize("delta", DELTAS)
def test_frozen_tensors_cost_next_to_nothing(delta):
    torch.manual_seed(0)
    encoder = FrameEncoder(FramesConfig(delta=delta))
    frozen, trained = torch.randn(300, 1000), torch.randn(40, 50)
    for step in range(3):
        tensors = {"frozen": frozen.clone(), "trained": trained + 0.1 * step}
        frame = encoder.encode(Snapshot(step, tensors, {}), io.BytesIO())
    assert frame.num_bytes < 6000


@pytest.mark.parametrize("delta", ["adaptive", "ternary", "3-bit", "4-bit", "8-bit"])
def test_a_few_rows_that_move_far_arrive_soon(delta):
    torch.manual_seed(0)
    encoder = FrameEncoder(FramesConfig(delta=delta, target_error=0.02))
    weights = torch.randn(4000, 256) * 0.02
    encoder.encode(Snapshot(0, {"w": weights.clone()}, {}), io.BytesIO())
    weights[1001:1004] += 0.5
    for step in range(1, 16):
        weights += 1e-5 * torch.randn(4000, 256)
        encoder.encode(Snapshot(step, {"w": weights.clone()}, {}), io.BytesIO())
    left = (weights - encoder.reference.tensors["w"].float())[1001:1004]
    assert float(left.abs().mean()) < 0.05


@pytest.mark.parametrize("seed", range(3))
def test_ternary_frames_are_near_the_entropy_of_their_codes(seed):
    torch.manual_seed(seed)
    encoder = FrameEncoder(FramesConfig(delta="ternary", target_error=0.12))
    weights = torch.randn(1000, 1000)
    encoder.encode(Snapshot(0, {"w": weights.clone()}, {}), io.BytesIO())
    before = encoder.reference.tensors["w"].clone()
    frame = encoder.encode(Snapshot(1, {"w": weights + 0.2 * torch.randn(1000, 1000)}, {}), io.BytesIO())
    moved = torch.sign(encoder.reference.tensors["w"].float() - before.float())
    shares = torch.unique(moved, return_counts=True)[1].double() / moved.numel()
    entropy_bytes = float(-(shares * shares.log2()).sum()) * moved.numel() / 8
    assert frame.num_bytes < entropy_bytes / 0.96
    assert frame.num_fp16_bytes > 12 * frame.num_bytes


def test_narrow_models_keep_their_dtype():
    encoder = FrameEncoder(FramesConfig())
    torch.manual_seed(0)
    weights = torch.randn(64, 64).bfloat16()
    reference = None
    for step in range(3):
        sink = io.BytesIO()
        encoder.encode(Snapshot(step, {"w": weights + 0.01 * step}, {}), sink)
        reference = decode_frame(sink.getvalue(), reference, max_bytes=MAX_BYTES)
    assert reference.tensors["w"].dtype == torch.bfloat16
    assert_same(reference, encoder.reference)


def test_models_of_nothing_but_odd_tensors():
    tensors = {
        "empty": torch.zeros(0, 5),
        "scalar": torch.tensor(1.5),
        "int": torch.arange(5),
        "c": torch.ones(2, 2, dtype=torch.complex64),
    }
    encoder = FrameEncoder(FramesConfig())
    reference = None
    for step in range(3):
        sink = io.BytesIO()
        encoder.encode(Snapshot(step, {k: v + step for k, v in tensors.items()}, {}), sink)
        reference = decode_frame(sink.getvalue(), reference, max_bytes=MAX_BYTES)
        assert_same(reference, encoder.reference)
    assert reference.tensors["scalar"].item() == 3.5


@pytest.mark.parametrize("size", [1e16, 1e19, 3e38])
@pytest.mark.parametrize("where", ["everywhere", "one row"])
@pytest.mark.parametrize("keyframe", ["fp16", "bf16"])
@pytest.mark.parametrize("delta", ["adaptive", "ternary", "3-bit"])
def test_a_student_that_was_huge_once_comes_back(delta, keyframe, where, size):
    encoder = FrameEncoder(FramesConfig(delta=delta, keyframe=keyframe))
    torch.manual_seed(0)
    weights = torch.randn(200, 1024)
    huge = weights.clone()
    huge[slice(None) if where == "everywhere" else slice(150, 151)] = size
    held = None
    for step, tensor in enumerate([huge, weights, weights + 0.01, weights + 0.02]):
        sink = io.BytesIO()
        frame = encoder.encode(Snapshot(step, {"w": tensor.clone()}, {}), sink)
        assert frame.base_step == (step - 1 if step else None)
        held = decode_frame(sink.getvalue(), held, max_bytes=MAX_BYTES)
        assert_same(held, encoder.reference)
    assert float((held.tensors["w"].float() - tensor).abs().max()) < 0.1
    kinds = [
        entry.encoding for entry in read_header(memoryview(sink.getvalue()), max_bytes=MAX_BYTES).entries
    ]
    assert kinds != ["exact"], "small numbers travel as codes again"


def test_one_quantizer_a_device_codes_all_tensors_of_all_frames(model, monkeypatch):
    """Its buffers are megabytes, and a bundle may hold tensors of several devices: each is coded where it is."""
    devices = []

    def make(device):
        devices.append(device)
        return Quantizer(device)

    monkeypatch.setattr(pieces, "Quantizer", make)
    encoder = FrameEncoder(FramesConfig(delta="ternary"))
    for step in range(4):
        encode(encoder, model, step)
        train_a_bit(model)
    assert devices == [torch.device("cpu")]


def test_keyframes_of_8_bits_are_not_cast_to_fp16_first(model, monkeypatch):
    scanned = []
    scan_tensor = encoder_module.scan_tensor

    def scan(tensor, source):
        scanned.append(tuple(tensor.shape))
        return scan_tensor(tensor, source)

    monkeypatch.setattr(encoder_module, "scan_tensor", scan)
    _, data = encode(FrameEncoder(FramesConfig(keyframe="int8")), model, 0)
    entries = read_header(memoryview(data), max_bytes=MAX_BYTES).entries
    assert {entry.encoding for entry in entries} == {"exact", "int8"}
    assert scanned == [entry.shape for entry in entries if entry.encoding == "exact"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_keyframe_of_8_bits_with_a_number_that_is_not_finite_writes_nothing(bad):
    tensors = {"first": torch.randn(50, 40), "last": torch.randn(3000, 200)}
    tensors["last"][-1, -1] = bad
    sink = io.BytesIO()
    with pytest.raises(NonFiniteError, match="last"):
        FrameEncoder(FramesConfig(keyframe="int8")).encode(Snapshot(0, tensors, {}), sink)
    assert not sink.getvalue()
