"""All copies in one process: they learn, they learn from each other, and the same arguments lead to the same events."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from p2pcodistill.checkpoint.manifest import MIN_CHUNK_BYTES
from p2pcodistill.config import CodistillationConfig, FramesConfig
from p2pcodistill.group.train import Join
from p2pcodistill.simulation.copies import Copies
from p2pcodistill.simulation.fault_config import FaultConfig
from p2pcodistill.simulation.shaping import LinkShape
from p2pcodistill.simulation.virtual.run import VirtualSettings
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.records import to_record
from p2pcodistill.topology.build import build_topology

NUM_STEPS = 120
CODISTILLATION = CodistillationConfig(burn_in_steps=20, exchange_interval_steps=20)
TRUTH = torch.randn(12, 3, generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


class Student:
    """A small classifier; its batches come from torch's random state, which is its own."""

    def __init__(self, name: str, join: Join, folder: Path | None = None, *, num_hidden: int = 24) -> None:
        self.name = name
        self.model = nn.Sequential(
            nn.Linear(12, num_hidden), nn.Dropout(0.1), nn.Tanh(), nn.Linear(num_hidden, 3)
        )
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=2e-2)
        self.codistiller = join(self.model)
        self.losses: list[float] = []
        self.num_taught = 0
        self._saved = None if folder is None else folder / f"{name}.pt"
        if self._saved is not None and self._saved.exists():
            saved = torch.load(self._saved, weights_only=True)
            self.model.load_state_dict(saved["model"])
            self.codistiller.load_state_dict(saved["codistiller"])

    def update(self) -> bool:
        inputs = torch.randn(32, 12)
        targets = (inputs @ TRUTH).argmax(dim=1)
        logits = self.model(inputs)
        loss = nn.functional.cross_entropy(logits, targets)
        distillation = self.codistiller.loss(logits, inputs, targets)
        self.optimizer.zero_grad()
        (loss + distillation).backward()
        self.optimizer.step()
        self.codistiller.step()
        self.losses.append(loss.item())
        self.num_taught += self.codistiller.last_distillation_loss is not None
        num_steps = self.codistiller.num_steps
        if self._saved is not None and num_steps % 20 == 0:
            torch.save(
                {"model": self.model.state_dict(), "codistiller": self.codistiller.state_dict()}, self._saved
            )
        return num_steps < NUM_STEPS and not self.codistiller.stop_requested


class Told:
    """Everything that the copies report."""

    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []

    def __call__(self, time_s: float, site: str, event: Event) -> None:
        self.records.append({"site": site} | to_record(event, time_unix_s=time_s))

    def of(self, name: str, **fields: Any) -> list[dict[str, Any]]:
        return [r for r in self.records if r["event"] == name and all(r[k] == v for k, v in fields.items())]

    @property
    def digest(self) -> str:
        return hashlib.sha256("\n".join(map(json.dumps, self.records)).encode()).hexdigest()


def make_copies(
    told: Told,
    *,
    shape: LinkShape | None = None,
    faults: Sequence[FaultConfig] = (),
    seed: int = 0,
    names: Sequence[str] = ("a", "b", "c"),
    topology: str = "ring",
    folder: Path | None = None,
    frames: FramesConfig | None = None,
    num_hidden: int = 24,
) -> Copies:
    graph = build_topology(topology, names)
    return Copies(
        graph,
        lambda name, join: Student(name, join, folder, num_hidden=num_hidden),
        codistillation=CODISTILLATION,
        frames=frames,
        step_time_s=0.1,
        settings=VirtualSettings(seed=seed, chunk_bytes=MIN_CHUNK_BYTES),
        shapes={("a", "b"): (shape, shape)} if shape else None,
        faults=faults,
        on_event=told,
    )


def test_copies_learn_from_data_and_from_each_other() -> None:
    told = Told()
    copies = make_copies(told)
    copies.run()
    assert copies.now_s == pytest.approx(NUM_STEPS * 0.1)
    for name, student in copies.students.items():
        assert isinstance(student, Student)
        assert sum(student.losses[-20:]) < 0.5 * sum(student.losses[:20])
        assert student.num_taught > 60
        teachers = {"a", "b", "c"} - {name}
        assert student.codistiller.teacher_versions.keys() == teachers
        assert {r["teacher"] for r in told.of("teacher-swapped", site=name)} == teachers
    assert told.of("refused") == told.of("teacher-refused") == []


def test_the_same_seed_gives_the_same_events_and_weights() -> None:
    runs = []
    for seed in (0, 0, 1):
        told = Told()
        copies = make_copies(
            told, shape=LinkShape(bandwidth_mbit=0.01, jitter_ms=20, loss_ratio=0.1), seed=seed
        )
        torch.rand(seed + 3)  # whatever came before has no part in it
        copies.run()
        runs.append((told.digest, [student.losses for student in copies.students.values()]))
    assert runs[0] == runs[1]
    assert runs[0][1] != runs[2][1]


def test_a_run_leaves_torchs_random_state_as_it_was() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make_copies(Told()).run()
    assert torch.equal(torch.rand(3), expected)


def test_a_copy_alone_trains_as_it_does_beside_others_before_they_teach_it() -> None:
    losses = []
    for names in (("a", "b", "c"), ("a",)):
        copies = make_copies(Told(), names=names)
        copies.run()
        losses.append(copies.students["a"].losses[:20])
    assert losses[0] == losses[1]


def test_a_thin_link_makes_teachers_stale() -> None:
    told = Told()
    thin_link = LinkShape(bandwidth_mbit=0.002)
    copies = make_copies(told, topology="line", shape=thin_link, frames=FramesConfig(delta="off"))
    copies.run()
    # A keyframe of 800 bytes and a manifest take several seconds at 250 bytes a second; an interval is 2 s.
    thin = told.of("teacher-swapped", site="b", teacher="a")
    perfect = told.of("teacher-swapped", site="b", teacher="c")
    assert len(perfect) == 5 and 1 <= len(thin) < 4
    assert all(r["step"] - r["teacher_step"] <= 11 for r in perfect)
    assert all(r["step"] - r["teacher_step"] >= 30 for r in thin)


def test_a_thin_link_makes_no_teacher_stale_where_another_site_has_its_frames() -> None:
    told = Told()
    thin_link = LinkShape(bandwidth_mbit=2.0)
    # Frames of several chunks, on a triangle: those of a single one are not passed on between fellow students.
    copies = make_copies(told, shape=thin_link, frames=FramesConfig(delta="off"), num_hidden=5000)
    copies.run()
    by_the_thin_way = told.of("teacher-swapped", site="b", teacher="a")
    assert len(by_the_thin_way) >= 4
    network = copies.network
    by_c, by_a = (network.link_between("b", peer).wire_from(peer).num_bytes_sent for peer in ("c", "a"))
    assert by_c > 1.5 * by_a


def test_a_site_that_goes_down_goes_on_from_what_it_saved(tmp_path: Path) -> None:
    told = Told()
    faults = (
        FaultConfig(kind="kill", sites=("b",), at_step=50),
        FaultConfig(kind="restart", sites=("b",), at_step=80),
        FaultConfig(kind="leave", sites=("c",), at_step=90),
    )
    copies = make_copies(told, faults=faults, folder=tmp_path)
    copies.run()
    student = copies.students["b"]
    assert student.codistiller.num_steps == NUM_STEPS and len(student.losses) == NUM_STEPS - 40
    assert [r["incarnation"] for r in told.of("node-started", site="b")] == [0, 1]
    assert {r["incarnation"] for r in told.of("teacher-swapped", site="a", teacher="b")} == {1, 2}
    left = copies.students["c"]
    assert 90 <= left.codistiller.num_steps <= 90 + 2 * CODISTILLATION.agreement_interval_steps
    assert [r["reason"] for r in told.of("node-stopped", site="c")] == ["stopped"]


def test_a_corrupt_site_sends_valid_frames_with_no_sense_in_them() -> None:
    told = Told()
    faults = (FaultConfig(kind="corrupt", sites=("b",), at_step=0),)
    copies = make_copies(told, names=("a", "b"), topology="pair", faults=faults)
    copies.run()
    assert told.of("teacher-swapped", site="a") and told.of("teacher-refused") == []
    gated = told.of("teacher-gated", site="a", teacher="b")
    assert gated and gated[0]["loss"] > gated[0]["student_loss"]
    assert told.of("teacher-gated", site="b") == []


def test_slow_sites_take_longer() -> None:
    told = Told()
    faults = (FaultConfig(kind="slow-down", sites=("b",), at_s=0.0, factor=3.0),)
    copies = make_copies(told, faults=faults)
    copies.run()
    assert copies.now_s == pytest.approx(3 * NUM_STEPS * 0.1, rel=0.02)
    # The quick ones have finished long since, and their last checkpoints are what it learns from.
    assert told.of("teacher-swapped", site="b")[-1]["teacher_step"] >= 100
