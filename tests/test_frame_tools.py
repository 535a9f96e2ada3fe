"""`p2pcodistill frame`: what a frame says of itself, and stored chains as safetensors files."""

from __future__ import annotations

import io
import json
from contextlib import closing
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, load_model
from torch import nn

from p2pcodistill.checkpoint.encoder import EncodedFrame, FrameEncoder
from p2pcodistill.checkpoint.manifest import (
    DEFAULT_CHUNK_BYTES,
    Manifest,
    Version,
    digest_chunks,
    sign_manifest,
)
from p2pcodistill.checkpoint.snapshot import Snapshot, take_snapshot
from p2pcodistill.checkpoint.store import FrameStore
from p2pcodistill.cli import main
from p2pcodistill.config import FramesConfig
from p2pcodistill.identity import Identity

BERLIN = Identity.from_secrets(b"\1" * 32, b"\1" * 32)
TOKYO = Identity.from_secrets(b"\2" * 32, b"\2" * 32)
KEYS = {"berlin": BERLIN.public, "tokyo": TOKYO.public}
GOLDEN = Path(__file__).parent / "checkpoint" / "golden"
STEPS = (0, 50, 100)


class Tied(nn.Module):
    """With a tied weight, buffers, and a bfloat16 parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(40, 30)
        self.norm = nn.BatchNorm1d(30)
        self.scale = nn.Parameter(torch.ones(40, 30, dtype=torch.bfloat16))
        self.head = nn.Linear(30, 40, bias=False)
        self.head.weight = self.embedding.weight


def encode(encoder: FrameEncoder, snapshot: Snapshot) -> tuple[EncodedFrame, bytes]:
    sink = io.BytesIO()
    return encoder.encode(snapshot, sink), sink.getvalue()


@pytest.fixture(scope="module")
def model() -> Tied:
    torch.manual_seed(0)
    return Tied()


@pytest.fixture(scope="module")
def chain(model: Tied) -> list[tuple[EncodedFrame, bytes]]:
    """Three frames of a model that moves; it stays as it was at the last of them."""
    encoder = FrameEncoder(FramesConfig(delta="8-bit"))
    frames = []
    for step in STEPS:
        with torch.no_grad():
            for parameter in model.parameters():
                parameter += 0.01 * torch.randn(parameter.shape).to(parameter.dtype)
        frames.append(encode(encoder, take_snapshot(model, step)))
    return frames


@pytest.fixture
def files(chain: list[tuple[EncodedFrame, bytes]], tmp_path: Path) -> list[Path]:
    paths = []
    for encoded, data in chain:
        paths.append(tmp_path / f"step-{encoded.step}.frame")
        paths[-1].write_bytes(data)
    return paths


def put_into(
    store: FrameStore, folder: Path, frames: list[tuple[EncodedFrame, bytes]], *, identity: Identity = TOKYO
) -> None:
    for encoded, data in frames:
        source = folder / "new.frame"
        source.write_bytes(data)
        manifest = Manifest(
            run="demo",
            origin="tokyo",
            version=Version(3, encoded.step),
            base=None if encoded.base_step is None else Version(3, encoded.base_step),
            codec=encoded.codec,
            schema_hash=encoded.schema_hash,
            num_fp16_bytes=encoded.num_fp16_bytes,
            num_bytes=len(data),
            chunk_bytes=DEFAULT_CHUNK_BYTES,
            chunk_digests=digest_chunks(data, DEFAULT_CHUNK_BYTES),
        )
        store.adopt(sign_manifest(manifest, identity), source)


@pytest.fixture
def run_folder(chain: list[tuple[EncodedFrame, bytes]], tmp_path: Path) -> Path:
    """Of berlin, which fetched tokyo's chain."""
    folder = tmp_path / "run-berlin"
    with closing(FrameStore(folder / "store", site="berlin", keys=KEYS)) as store:
        put_into(store, tmp_path, chain)
    return folder


def contents_of(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["frame", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that says why."""
    assert main(["frame", *map(str, arguments)]) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.startswith("p2pcodistill: ") and shown.err.count("\n") == 1
    return shown.err


def assert_is_model(path: Path, model: Tied, *, step: int) -> None:
    copy = Tied()
    load_model(copy, path)
    state, expected = copy.state_dict(), model.state_dict()
    assert all(state[name].dtype == tensor.dtype for name, tensor in expected.items())
    assert torch.equal(state["norm.running_mean"], expected["norm.running_mean"])
    assert copy.head.weight is copy.embedding.weight
    for name in ("embedding.weight", "scale"):
        assert (state[name] - expected[name]).abs().max() < 1e-2
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert (metadata["step"], metadata["head.weight"]) == (str(step), "embedding.weight")


# --- inspect ---------------------------------------------------------------------------------------------------------


def test_inspect_shows_the_header_and_a_row_for_each_tensor(
    capsys: pytest.CaptureFixture[str], chain: list[tuple[EncodedFrame, bytes]], files: list[Path]
) -> None:
    keyframe, delta = run(capsys, "inspect", files[0]), run(capsys, "inspect", files[1])
    assert "keyframe" in keyframe and "base" not in keyframe and chain[0][0].schema_hash.hex() in keyframe
    assert "base      step 0, checksum " in delta
    row = next(line.split() for line in delta.splitlines() if line.startswith("embedding.weight"))
    assert row[:6] == ["embedding.weight", "40x30", "float32", "as", "float16", "8-bit"]
    assert row[-1].endswith("%")
    assert "head.weight is tied to embedding.weight" in delta


def test_inspect_speaks_json(
    capsys: pytest.CaptureFixture[str], chain: list[tuple[EncodedFrame, bytes]], files: list[Path]
) -> None:
    encoded, data = chain[1]
    keyframe = json.loads(run(capsys, "inspect", files[0], "--json"))
    delta = json.loads(run(capsys, "inspect", files[1], "--json"))
    assert delta["base"] == {"step": 0, "checksum": keyframe["checksum"]}
    assert (delta["kind"], delta["step"], delta["num_bytes"]) == ("delta", 50, len(data))
    assert delta["num_fp16_bytes"] == encoded.num_fp16_bytes
    assert delta["ratio_vs_fp16"] == encoded.num_fp16_bytes / len(data)
    assert delta["schema_hash"] == keyframe["schema_hash"] == encoded.schema_hash.hex()
    assert delta["tied"] == {"head.weight": "embedding.weight"}
    tensors = {tensor["name"]: tensor for tensor in delta["tensors"]}
    assert tensors["norm.num_batches_tracked"] == {
        "name": "norm.num_batches_tracked",
        "shape": [],
        "dtype": "int64",
        "wire_dtype": "int64",
        "encoding": "same",
        "num_bytes": 0,
        "is_joined": False,
        "ratio_vs_fp16": None,
        "share_of_zero_codes": None,
    }


@pytest.mark.parametrize("delta", ["ternary", "3-bit", "4-bit", "8-bit"])
@pytest.mark.parametrize("num_elements", [1024, 1500, 4096 + 1])
def test_the_share_of_zero_codes_counts_every_code_once(
    delta: str, num_elements: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ten elements move far, and all others not at all."""
    encoder = FrameEncoder(FramesConfig(delta=delta))
    weights = torch.zeros(num_elements, 1)
    encode(encoder, Snapshot(0, {"weights": weights}, {}))
    weights[-10:] = 1.0
    path = tmp_path / "frame"
    path.write_bytes(encode(encoder, Snapshot(1, {"weights": weights}, {}))[1])
    (tensor,) = json.loads(run(capsys, "inspect", path, "--json"))["tensors"]
    assert tensor["share_of_zero_codes"] == 1 - 10 / num_elements


def test_joined_tensors_share_out_what_they_take_together(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoder = FrameEncoder(FramesConfig(delta="8-bit"))
    for step in range(2):
        tensors = {"a": torch.randn(30, 40), "b": torch.randn(60, 40), "alone": torch.tensor(step)}
        data = encode(encoder, Snapshot(step, tensors, {}))[1]
    path = tmp_path / "frame"
    path.write_bytes(data)
    a, b, alone = json.loads(run(capsys, "inspect", path, "--json"))["tensors"]
    assert (a["is_joined"], b["is_joined"], alone["is_joined"]) == (True, True, False)
    assert b["num_bytes"] == pytest.approx(2 * a["num_bytes"], abs=2)
    assert 0 <= len(data) - a["num_bytes"] - b["num_bytes"] - alone["num_bytes"] < 300  # the footer
    shown = run(capsys, "inspect", path)
    assert shown.count("~") == 3 and f"~{a['num_bytes']:,} " in shown


def test_names_that_could_play_tricks_on_a_terminal_are_escaped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "frame"
    snapshot = Snapshot(0, {"evil\x1b[2J": torch.ones(1)}, {})
    path.write_bytes(encode(FrameEncoder(FramesConfig()), snapshot)[1])
    assert "\x1b" not in run(capsys, "inspect", path)


@pytest.mark.parametrize(
    "path", sorted(GOLDEN.glob("v*/*.frame")), ids=lambda path: f"{path.parent.name}/{path.stem}"
)
def test_every_golden_frame_can_be_looked_into(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert json.loads(run(capsys, "inspect", path, "--json"))["num_bytes"] == path.stat().st_size


# --- decode ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1)])
def test_a_chain_of_files_in_any_order_becomes_a_model(
    order: tuple[int, ...],
    files: list[Path],
    model: Tied,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "model.safetensors"
    out.write_text("an older one")
    shown = run(capsys, "decode", *(files[index] for index in order), "--out", out)
    assert "step 100" in shown and str(out) in shown
    assert_is_model(out, model, step=100)
    assert not list(tmp_path.glob("*.part"))


def test_a_part_of_a_chain_gives_the_checkpoint_of_its_end(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.safetensors"
    run(capsys, "decode", files[0], files[1], "--out", out)
    with safe_open(out, "pt") as file:
        assert file.metadata()["step"] == "50"


@pytest.mark.parametrize("what", ["run-berlin", "run-berlin/store"])
def test_the_newest_checkpoint_of_a_store_that_is_in_use_becomes_a_model(
    what: str, run_folder: Path, model: Tied, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (run_folder / "store" / "frames" / "half.part").write_bytes(b"of a download")
    (run_folder / "store" / "manifests" / f"{'ab' * 32}.manifest").write_bytes(b"half of it")
    before = contents_of(run_folder)
    out = tmp_path / "tokyo.safetensors"
    run(capsys, "decode", tmp_path / what, "--origin", "tokyo", "--out", out)
    assert contents_of(run_folder) == before, "a store is only read"
    assert_is_model(out, model, step=100)
    with safe_open(out, "pt") as file:
        metadata = file.metadata()
    assert (metadata["origin"], metadata["incarnation"]) == ("tokyo", "3")


def test_a_local_keyframe_that_the_site_signed_itself_counts(
    chain: list[tuple[EncodedFrame, bytes]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encoded, data = encode(FrameEncoder(FramesConfig()), Snapshot(150, {"weights": torch.ones(2, 2)}, {}))
    with closing(FrameStore(tmp_path / "store", site="berlin", keys=KEYS)) as store:
        put_into(store, tmp_path, chain)
        put_into(store, tmp_path, [(encoded, data)], identity=BERLIN)
    out = tmp_path / "model.safetensors"
    run(capsys, "decode", tmp_path / "store", "--origin", "tokyo", "--out", out)
    assert torch.equal(load_file(out)["weights"], torch.ones(2, 2))


# --- what a user can get wrong ---------------------------------------------------------------------------------------


def test_files_that_are_no_frames_are_named(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "text").write_text("not a frame at all")
    (tmp_path / "cut").write_bytes(files[0].read_bytes()[:-1])
    for name, why in (
        ("missing", "No such file"),
        ("empty", "empty"),
        ("text", "not a frame"),
        ("cut", "cut off"),
    ):
        assert name in (told := refused(capsys, "inspect", tmp_path / name)) and why in told
        assert why in refused(capsys, "decode", tmp_path / name, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_chains_that_do_not_hold_together_are_named(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = "--out", tmp_path / "out"
    other = GOLDEN / "v3" / "chain-10-ternary.frame"
    assert "starts with one keyframe" in refused(capsys, "decode", files[1], files[2], *out)
    assert "step-100.frame is a delta frame of step 50" in refused(capsys, "decode", files[0], files[2], *out)
    assert str(other) in refused(capsys, "decode", files[0], other, *out)
    assert "given twice" in refused(capsys, "decode", files[0], files[0], *out)
    copy = tmp_path / "copy.frame"
    copy.write_bytes(files[1].read_bytes())
    assert "give one of them" in refused(capsys, "decode", *files, copy, *out)
    assert "--origin goes with a folder" in refused(capsys, "decode", files[0], "--origin", "x", *out)
    assert "one folder" in refused(capsys, "decode", files[0], tmp_path, *out)
    assert not (tmp_path / "out").exists()


def test_damage_is_named(
    files: list[Path], run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    damaged = bytearray(files[1].read_bytes())
    damaged[300] ^= 1
    files[1].write_bytes(damaged)
    assert str(files[1]) in refused(capsys, "decode", *files, "--out", tmp_path / "out")
    victim = max((run_folder / "store" / "frames").iterdir(), key=lambda path: path.stat().st_size)
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    told = refused(capsys, "decode", run_folder, "--origin", "tokyo", "--out", tmp_path / "out")
    assert victim.name in told and "damaged" in told


def test_stores_without_what_was_asked_for_are_named(
    run_folder: Path, files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = "--out", tmp_path / "out"
    assert "no frames of lima, but of tokyo" in refused(
        capsys, "decode", run_folder, "--origin", "lima", *out
    )
    assert "with --origin: " in refused(capsys, "decode", run_folder, *out)
    assert "neither" in refused(capsys, "decode", tmp_path, "--origin", "tokyo", *out)
    keyframe = max((run_folder / "store" / "frames").iterdir(), key=lambda path: path.stat().st_size)
    keyframe.unlink()
    assert "no keyframe of tokyo" in refused(capsys, "decode", run_folder, "--origin", "tokyo", *out)


def test_places_that_cannot_be_written_to_are_named(
    files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "no folder" in refused(capsys, "decode", files[0], "--out", tmp_path / "no" / "out")
    assert "is no file" in refused(capsys, "decode", files[0], "--out", tmp_path)
    assert "is no file" in refused(capsys, "decode", files[0], "--out", "/dev/full")
    dtypes = GOLDEN / "v3" / "keyframe-dtypes.frame"
    assert "complex128" in refused(capsys, "decode", dtypes, "--out", tmp_path / "out")
    assert not list(tmp_path.glob("out*"))


def test_the_cap_can_be_set(files: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["inspect", files[0]], ["decode", files[0], "--out", tmp_path / "out"]):
        assert "--max-bytes" in refused(capsys, *command, "--max-bytes", 100)
        run(capsys, *command, "--max-bytes", 100_000)
