"""Training checkpoints: complete or not there, whatever happened while they were written.

Run as a script, this file is one rank of the test with two (see `rank_main`).
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from patience import GENEROUS_S

from p2pcodistill.errors import GroupError
from p2pcodistill.group import checkpoints as checkpoints_module
from p2pcodistill.group.checkpoints import TrainingCheckpoints


def shared_of(step: int) -> dict[str, Any]:
    return {"model": {"weight": torch.full((100,), float(step))}, "duration_s": 1.5}


def own_of(step: int) -> dict[str, Any]:
    return {"state": (torch.ones(2), None), "random": {"python": (3, (step, 2), None)}}


@pytest.fixture
def checkpoints(tmp_path: Path) -> TrainingCheckpoints:
    return TrainingCheckpoints(tmp_path / "training", None)


def save(checkpoints: TrainingCheckpoints, *steps: int) -> None:
    for step in steps:
        checkpoints.save(step, shared=shared_of(step), own=own_of(step))


def loaded_step(checkpoints: TrainingCheckpoints) -> int | None:
    checkpoint = checkpoints.load()
    if checkpoint is None:
        return None
    assert torch.equal(checkpoint.shared["model"]["weight"], shared_of(checkpoint.step)["model"]["weight"])
    assert checkpoint.own["random"] == own_of(checkpoint.step)["random"]
    return checkpoint.step


def test_there_is_none_at_first(checkpoints: TrainingCheckpoints) -> None:
    assert checkpoints.load() is None


def test_the_newest_is_loaded_as_it_was_saved_and_two_are_kept(
    checkpoints: TrainingCheckpoints, tmp_path: Path
) -> None:
    save(checkpoints, 5, 250, 123_456_789)
    assert loaded_step(checkpoints) == 123_456_789
    kept = sorted(path.name for path in (tmp_path / "training").iterdir())
    assert kept == ["step-00000250", "step-123456789"]
    assert {path.name for path in (tmp_path / "training" / kept[0]).iterdir()} == {
        "shared.pt",
        "shared.sha256",
        "rank-0.pt",
        "rank-0.sha256",
    }


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "truncated":
        path.write_bytes(content[: len(content) // 2])
    else:
        position = len(content) // 2
        path.write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "one bit flipped"])
@pytest.mark.parametrize("name", ["shared.pt", "rank-0.pt", "shared.sha256", "rank-0.sha256"])
def test_a_damaged_one_falls_back_to_the_one_before(
    checkpoints: TrainingCheckpoints, tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, how: str
) -> None:
    save(checkpoints, 1, 2)
    damage(tmp_path / "training" / "step-00000002" / name, how)
    with caplog.at_level(logging.WARNING):
        assert loaded_step(checkpoints) == 1
    [record] = caplog.records
    assert "damaged training checkpoint" in record.getMessage()
    assert "step-00000002" in record.getMessage()
    save(checkpoints, 2)
    assert loaded_step(checkpoints) == 2, "the damaged one is replaced when training gets there again"


def test_what_training_went_back_behind_is_abandoned(
    checkpoints: TrainingCheckpoints, tmp_path: Path
) -> None:
    save(checkpoints, 10, 20)
    shared = tmp_path / "training" / "step-00000020" / "shared.pt"
    intact = shared.read_bytes()
    damage(shared, "one bit flipped")
    assert loaded_step(checkpoints) == 10
    shared.write_bytes(intact)  # only that reading of it failed
    save(checkpoints, 15)
    assert loaded_step(checkpoints) == 15, "another branch is not gone on with"
    kept = sorted(path.name for path in (tmp_path / "training").iterdir())
    assert kept == ["step-00000010", "step-00000015"]


class Killed(BaseException):
    """The process ends here."""


@pytest.mark.parametrize("when", ["shared.pt", "rank-0.pt", "rename"])
def test_being_killed_while_saving_leaves_the_one_before(
    checkpoints: TrainingCheckpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    save(checkpoints, 1)
    num_kills = 0

    def kill(*_arguments: object) -> None:
        nonlocal num_kills
        num_kills += 1
        raise Killed

    write = checkpoints_module._write

    def write_or_die(path: Path, state: dict[str, Any]) -> None:
        write(path, state)
        if path.name == when:
            damage(path, "truncated")
            kill()

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoints_module, "_write", write_or_die)
        if when == "rename":
            patch.setattr(Path, "rename", kill)
        save(checkpoints, 2)
    assert num_kills == 1
    assert loaded_step(checkpoints) == 1
    save(checkpoints, 2)
    assert loaded_step(checkpoints) == 2
    assert len(list((tmp_path / "training").iterdir())) == 2, "what was left half written is gone"


def test_code_in_a_checkpoint_is_not_run(checkpoints: TrainingCheckpoints, tmp_path: Path) -> None:
    save(checkpoints, 1)
    marker = tmp_path / "marker"
    path = tmp_path / "training" / "step-00000001" / "rank-0.pt"

    class Payload:
        def __reduce__(self) -> Any:
            return Path.touch, (marker,)

    checkpoints_module._write(path, {"state": Payload()})
    with pytest.raises(Exception, match="weights_only"):
        checkpoints.load()
    assert not marker.exists()


# --- two ranks -----------------------------------------------------------------------------------------------


def rank_main(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    checkpoints = TrainingCheckpoints(folder / "training", dist.group.WORLD)
    results: list[Any] = [checkpoints.load()]
    for step in (1, 2):
        checkpoints.save(step, shared=shared_of(step), own={"rank": rank, "step": step})
    dist.barrier()
    newest = checkpoints.load()
    assert newest is not None
    results.append([newest.step, newest.own])
    dist.barrier()
    if rank == 1:  # damaged for one rank: no rank takes it
        damage(folder / "training" / "step-00000002" / "rank-1.pt", "truncated")
    dist.barrier()
    fallback = checkpoints.load()
    assert fallback is not None
    results.append([fallback.step, fallback.own])
    (folder / f"rank-{rank}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def test_ranks_save_and_load_the_same_step(tmp_path: Path) -> None:
    path = os.pathsep.join(str(Path(__file__).parents[index]) for index in (1, 2))
    environment = os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    ranks = [
        subprocess.Popen([sys.executable, __file__, str(rank), str(tmp_path)], env=environment)
        for rank in range(2)
    ]
    try:
        assert [rank.wait(timeout=GENEROUS_S) for rank in ranks] == [0, 0]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    for rank in range(2):
        results = json.loads((tmp_path / f"rank-{rank}.json").read_text())
        assert results == [None, [2, {"rank": rank, "step": 2}], [1, {"rank": rank, "step": 1}]]
    with pytest.raises(GroupError, match=r"written by 2 rank\(s\), and there are 1"):
        TrainingCheckpoints(tmp_path / "training", None).load()


if __name__ == "__main__":
    rank_main(int(sys.argv[1]), Path(sys.argv[2]))
