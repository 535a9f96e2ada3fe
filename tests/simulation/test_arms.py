"""Arms that no node runs: each does what its name says, and where two must come to the same they do."""

from __future__ import annotations

import argparse
import functools
import inspect
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tomli_w
import torch
from safetensors.torch import load_file
from torch import Tensor

from p2pcodistill.report.history import SiteHistory
from p2pcodistill.runfolder import PREDICTIONS_FILE
from p2pcodistill.simulation.arms.gossip_averaging import mixing_weights
from p2pcodistill.simulation.arms.kinds import KINDS
from p2pcodistill.simulation.arms.run import ArmRun
from p2pcodistill.simulation.arms.workers import make_workers
from p2pcodistill.simulation.data import prepare_data
from p2pcodistill.simulation.files import node_files, write_scenario
from p2pcodistill.simulation.jobs import Job, make_jobs
from p2pcodistill.simulation.outcome import read_results, report
from p2pcodistill.simulation.scenario import load_scenario
from p2pcodistill.simulation.virtual.job import run_job
from p2pcodistill.simulation.virtual.logs import VirtualLogs
from p2pcodistill.simulation.virtual.step_time import StepTimes
from p2pcodistill.strict import load_toml
from p2pcodistill.telemetry.event import Event
from p2pcodistill.telemetry.records import from_record
from p2pcodistill.telemetry.training_events import Evaluated, StepMeasured, TrainingEnded, TrainingStarted
from p2pcodistill.topology.build import build_topology

torch.set_num_threads(1)

NUM_STEPS = 12
SITES = ("a", "b", "c")
# Real text: a module of the standard library for each site.
TEXT: dict[str, ModuleType] = {"a": argparse, "b": inspect, "c": functools}
SGD = {"optimizer": "sgd", "learning_rate": 0.5, "max_gradient_norm": 0.0}


class Done:
    """Arms that have run, in their run folder."""

    def __init__(self, path: Path) -> None:
        self.scenario = load_scenario(path)
        self.folder = path.parent / "run"
        self.folder.mkdir()
        self.scenario = write_scenario(self.scenario, prepare_data(self.scenario), self.folder)
        for job in make_jobs(self.scenario):
            run_job(job, self.scenario, self.folder)

    def job(self, arm: str) -> Job:
        return next(job for job in make_jobs(self.scenario) if job.arm.name == arm)

    def model(self, arm: str, site: str) -> dict[str, Tensor]:
        """The model that is left of a site."""
        return load_file(self.folder / f"{arm}-seed0" / site / "model.safetensors")

    def records(self, arm: str, site: str = "pooled") -> list[dict[str, Any]]:
        text = (self.folder / f"{arm}-seed0" / site / "events.jsonl").read_text()
        return [json.loads(line) for line in text.splitlines()]

    def events(self, arm: str, site: str = "pooled") -> list[Event]:
        return [from_record(record) for record in self.records(arm, site)]

    def evaluations(self, arm: str, site: str = "pooled") -> list[Evaluated]:
        return [event for event in self.events(arm, site) if isinstance(event, Evaluated)]

    def history(self, arm: str, site: str = "pooled") -> SiteHistory:
        return SiteHistory.of(self.records(arm, site))

    def end_s(self, arm: str, site: str = "pooled") -> float:
        return float(self.records(arm, site)[-1]["time_unix_s"])


Run = Callable[..., Done]


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write_file(*arms: dict[str, Any], sites: Sequence[str] = SITES, **changes: Any) -> Path:
        training = {
            "num_steps": NUM_STEPS,
            "batch_size": 4,
            "precision": "float32",
            "evaluation_interval_steps": 4,
            "report_interval_steps": 2,
        }
        table = {
            "name": "arms",
            "mode": "virtual",
            "num_sites": changes.pop("num_sites", None),
            "sites": [{"name": site, "data": [TEXT[site].__file__]} for site in sites],
            "arms": [{"name": arm["kind"]} | arm for arm in arms],
            "data": {"max_bytes_per_site": 8000, "max_held_out_bytes": 1500},
            "task": {"embedding_size": 8, "hidden_size": 16, "num_layers": 1, "window_tokens": 8},
            "training": training | changes.pop("training", {}),
            "codistillation": {"burn_in_steps": 2, "exchange_interval_steps": 4}
            | {"agreement_interval_steps": 1},
        }
        path = tmp_path / "arms.toml"
        content = {key: value for key, value in (table | changes).items() if value}
        path.write_text(tomli_w.dumps(content))
        return path

    return write_file


@pytest.fixture
def run(write: Callable[..., Path]) -> Run:
    def run_arms(*arms: dict[str, Any], **changes: Any) -> Done:
        return Done(write(*arms, **changes))

    return run_arms


def assert_same_model(one: dict[str, Tensor], other: dict[str, Tensor], **tolerances: float) -> None:
    assert one.keys() == other.keys() and one
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], **({"rtol": 0.0, "atol": 0.0} | tolerances))


# --- where two must come to the same ------------------------------------------------------------------------------


def test_synchronous_is_one_site_with_all_batches_in_one(run: Run) -> None:
    done = run({"kind": "synchronous"}, training=SGD)
    places = {place.site: place for place in node_files(done.job("synchronous"), done.folder)}
    arm = ArmRun(done.job("synchronous"), done.scenario, done.folder, places, VirtualLogs())
    # The data and the first model of its workers, trained by hand.
    tasks = [arm.learner(site, name=f"{site}", num_workers=3).training._task for site in SITES]
    torch.manual_seed(arm.training.of_site("a").seed)
    model = tasks[0].make_model()
    optimizer = torch.optim.SGD(model.parameters())
    state = None
    for step in range(NUM_STEPS):
        batches = [task.next_batch() for task in tasks]
        inputs, targets = (torch.cat(parts) for parts in zip(*batches, strict=True))
        assert len(inputs) == 3 * 4
        logits, state = tasks[0].forward(model, inputs, state)
        optimizer.zero_grad()
        tasks[0].loss(logits, targets).backward()
        optimizer.param_groups[0]["lr"] = (
            0.5 * 0.5 * (1 + torch.cos(torch.tensor(torch.pi * step / NUM_STEPS)))
        )
        optimizer.step()
        state = tuple(tensor.detach() for tensor in state)
    assert_same_model(done.model("synchronous", "pooled"), model.state_dict(), rtol=1e-4, atol=1e-6)


def test_the_workers_of_one_site_share_its_data_between_them(run: Run) -> None:
    done = run({"kind": "synchronous", "num_workers": 4})
    places = {place.site: place for place in node_files(done.job("synchronous"), done.folder)}
    arm = ArmRun(done.job("synchronous"), done.scenario, done.folder, places, VirtualLogs())
    workers = {worker.name: worker.training for worker in make_workers(arm, has_lead=False)}
    data = {name: training._task._data for name, training in workers.items()}
    assert {name: (of._rank, of._num_ranks) for name, of in data.items()} == {
        "a": (0, 2),
        "b": (0, 1),
        "c": (0, 1),
        "a+1": (1, 2),
    }
    assert workers["a"]._config.seed == workers["a+1"]._config.seed, "they share one order"


def test_averaging_after_each_plain_step_is_synchronous(run: Run) -> None:
    done = run(
        {"kind": "fedavg", "interval_steps": 1},
        {"kind": "synchronous", "initialisation": "same"},
        training=SGD,
    )
    for site in SITES:
        assert_same_model(
            done.model("fedavg", site), done.model("synchronous", "pooled"), rtol=1e-4, atol=1e-6
        )
    losses = [
        done.evaluations(arm, site)[-1].val_loss for arm, site in (("fedavg", "b"), ("synchronous", "pooled"))
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_diloco_without_outer_momentum_and_rate_is_averaging(run: Run) -> None:
    plain = {"outer_learning_rate": 1.0, "outer_momentum": 0.0}
    done = run({"kind": "fedavg"}, {"kind": "diloco"} | plain, {"kind": "diloco", "name": "outer"})
    assert_same_model(done.model("fedavg", "b"), done.model("diloco", "b"), rtol=1e-4, atol=1e-6)
    difference = done.model("fedavg", "b")["readout.weight"] - done.model("outer", "b")["readout.weight"]
    assert difference.abs().max() > 1e-3


def test_a_round_of_diloco_that_is_cut_short_is_averaged(run: Run) -> None:
    done = run({"kind": "fedavg", "interval_steps": 50}, {"kind": "diloco", "interval_steps": 50})
    assert_same_model(done.model("fedavg", "b"), done.model("diloco", "b"), rtol=1e-4, atol=1e-6)


def test_a_moving_average_is_of_what_the_rounds_yield(run: Run) -> None:
    averaged = {"average_decay": 0.5}
    done = run({"kind": "fedavg", "interval_steps": 1, "training": averaged})
    # After each step all models are alike, and so are their averages.
    assert_same_model(done.model("fedavg", "a"), done.model("fedavg", "c"))
    assert "unaveraged_loss" in done.evaluations("fedavg", "a")[-1].metrics


def test_members_of_an_ensemble_have_the_weights_that_a_user_would_keep(run: Run) -> None:
    averaged = {"training": {"average_decay": 0.9}}
    done = run(
        {"kind": "ensemble"} | averaged,
        {"kind": "alone"} | averaged,
        {"kind": "two-phase"} | averaged,
    )
    alone = [predictions(done, "alone", site) for site in SITES]
    torch.testing.assert_close(
        predictions(done, "ensemble", "pooled"), torch.stack(alone).mean(0), rtol=1e-4, atol=1e-6
    )
    ensemble = done.evaluations("ensemble")[-1]
    assert done.evaluations("two-phase")[-1].metrics["teacher_loss"] == pytest.approx(ensemble.val_loss)
    assert ensemble.val_loss < ensemble.metrics["mean_member_loss"]


def test_gossip_with_everyone_is_averaging(run: Run) -> None:
    done = run({"kind": "fedavg"}, {"kind": "gossip-averaging", "topology": "full"})
    for site in SITES:
        assert_same_model(
            done.model("fedavg", site), done.model("gossip-averaging", site), rtol=1e-4, atol=1e-6
        )


def test_asynchronous_with_one_worker_is_a_lone_site(run: Run) -> None:
    done = run({"kind": "asynchronous", "num_workers": 1}, {"kind": "alone"})
    assert_same_model(done.model("asynchronous", "pooled"), done.model("alone", "a"))
    of_server, of_site = done.evaluations("asynchronous"), done.evaluations("alone", "a")
    assert [(e.step, e.val_loss) for e in of_server] == [(e.step, e.val_loss) for e in of_site]
    assert of_server[-1].metrics["mean_staleness_updates"] == 0
    assert done.end_s("asynchronous") == pytest.approx(done.end_s("alone", "a"))


def test_members_of_an_ensemble_are_the_lone_sites(run: Run) -> None:
    done = run({"kind": "ensemble"}, {"kind": "alone"}, {"kind": "ensemble", "name": "two", "num_members": 2})
    together, two = done.evaluations("ensemble"), done.evaluations("two")
    assert [event.step for event in together] == [4, 8, 12]
    for index, event in enumerate(together):
        alone = [done.evaluations("alone", site)[index].val_loss for site in SITES]
        assert event.metrics["mean_member_loss"] == pytest.approx(sum(alone) / 3)
        assert event.metrics["best_member_loss"] == pytest.approx(min(alone))
        # The logarithm is concave: a mean prediction is at least as good as the mean of what each says.
        assert event.val_loss < event.metrics["mean_member_loss"]
        assert two[index].metrics["mean_member_loss"] == pytest.approx(sum(alone[:2]) / 2)
    alone = [predictions(done, "alone", site) for site in SITES]
    torch.testing.assert_close(
        predictions(done, "ensemble", "pooled"), torch.stack(alone).mean(0), rtol=1e-4, atol=1e-6
    )
    assert done.history("ensemble").num_parameters == 3 * (done.history("alone", "a").num_parameters or 0)


def predictions(done: Done, arm: str, site: str) -> Tensor:
    """(N, C): what is left of a site of what its model says of held-out examples."""
    return load_file(done.folder / f"{arm}-seed0" / site / PREDICTIONS_FILE)["probabilities_NC"]


# --- what is particular to a kind ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["ring:6", "full:5", "exponential:8", "torus:3x4", "one-peer-exponential:8", "line:5", "star:5"]
)
def test_mixing_keeps_the_mean_over_all_sites(spec: str) -> None:
    topology = build_topology(spec, [str(index) for index in range(sites_in(spec))])
    for index in range(topology.period):
        tables = {member: mixing_weights(topology, member, index) for member in topology.members}
        for member, table in tables.items():
            own = 1 - sum(table.values())
            given = sum(other.get(member, 0.0) for other in tables.values())
            assert own > 0 and own + given == pytest.approx(1.0)


def sites_in(spec: str) -> int:
    sizes = spec.partition(":")[2].split("x")
    return functools.reduce(lambda product, size: product * int(size), sizes, 1)


def test_gossip_brings_models_of_a_ring_closer_than_none_but_not_together(run: Run) -> None:
    done = run({"kind": "gossip-averaging", "topology": "line"})
    ends = [done.model("gossip-averaging", site)["readout.weight"] for site in SITES]
    assert not torch.equal(ends[0], ends[2])
    # The middle one is the mean of three after each exchange, hence nearer to both ends than these to each other.
    apart = (ends[0] - ends[2]).norm()
    assert (ends[0] - ends[1]).norm() < apart and (ends[1] - ends[2]).norm() < apart


def test_different_initialisation_is_what_averaging_does_not_stand(run: Run) -> None:
    late = {"interval_steps": NUM_STEPS}
    done = run(
        {"kind": "fedavg"} | late,
        {"kind": "fedavg", "name": "unlike", "initialisation": "different"} | late,
        {"kind": "alone", "initialisation": "same"},
    )
    firsts = [
        [done.evaluations(arm, site)[0].val_loss for site in SITES] for arm in ("fedavg", "alone", "unlike")
    ]
    assert firsts[0] == firsts[1], "before the first exchange an averaging site is a lone one"
    assert firsts[0] != firsts[2]


def test_gradients_of_an_asynchronous_arm_are_as_old_as_there_are_other_workers(run: Run) -> None:
    done = run({"kind": "asynchronous"}, {"kind": "asynchronous", "name": "ramp", "worker_ramp_steps": 6})
    evaluations = done.evaluations("asynchronous")
    assert [event.step for event in evaluations] == [4, 8, 12]
    for event in evaluations:
        num_updates = 3 * event.step
        assert event.metrics["mean_staleness_updates"] * num_updates == pytest.approx(
            0 + 1 + 2 * (num_updates - 2)
        )
    history = done.history("asynchronous")
    assert history.finished and history.num_steps == NUM_STEPS
    assert done.end_s("asynchronous") == pytest.approx(NUM_STEPS * 0.1)
    # The second begins after 3 steps, the third after 6: 9 of 36 updates are still to be made after 12 steps, 3 a step.
    assert done.end_s("ramp") == pytest.approx((NUM_STEPS + 3) * 0.1)
    assert done.evaluations("ramp")[-1].metrics["mean_staleness_updates"] < 2 - 1 / 12


def test_a_two_phase_student_has_the_ensemble_as_its_teacher(run: Run) -> None:
    teacher_steps = 8
    done = run(
        {"kind": "two-phase", "teacher_steps": teacher_steps},
        {"kind": "ensemble", "training": {"num_steps": teacher_steps}},
    )
    events = done.events("two-phase")
    [started] = [event for event in events if isinstance(event, TrainingStarted)]
    assert (started.start_step, started.num_steps) == (0, teacher_steps + NUM_STEPS)
    evaluations = done.evaluations("two-phase")
    assert [event.step for event in evaluations] == [teacher_steps + step for step in (4, 8, 12)]
    teacher = done.evaluations("ensemble")[-1]
    assert evaluations[-1].metrics["teacher_loss"] == pytest.approx(teacher.val_loss)
    measured = {event.step: event for event in events if isinstance(event, StepMeasured)}
    assert list(measured) == list(range(2, teacher_steps + NUM_STEPS + 1, 2))
    taught = [step for step, event in measured.items() if event.distillation_loss is not None]
    assert taught == [step for step in measured if step >= teacher_steps + 4], (
        "as soon as the ranks agree on it"
    )
    assert isinstance(events[-1], TrainingEnded) and events[-1].finished
    history = done.history("two-phase")
    assert history.num_parameters is not None
    raw_fp16_bytes = 3 * 2 * history.num_parameters
    assert 0.5 * raw_fp16_bytes < history.num_bytes_sent == history.num_bytes_received < 1.1 * raw_fp16_bytes
    taught = [
        done_at["step"] for done_at in done.records("two-phase") if done_at["event"] == "teacher-swapped"
    ]
    taught_steps = sum(teacher_steps + NUM_STEPS - step for step in taught)
    assert len(taught) == 3 and taught_steps > 0
    assert done.end_s("two-phase") == pytest.approx((teacher_steps + NUM_STEPS + taught_steps / 3) * 0.1)
    assert history.duration_s == pytest.approx(done.end_s("two-phase"))


# --- bytes and time ------------------------------------------------------------------------------------------------


def test_bytes_are_what_the_exchange_would_send(run: Run) -> None:
    done = run(
        {"kind": "fedavg"},
        {"kind": "diloco", "precision": "float16"},
        {"kind": "gossip-averaging", "precision": "bfloat16", "topology": "line"},
        {"kind": "synchronous"},
        {"kind": "asynchronous", "precision": "float16"},
        {"kind": "ensemble"},
    )
    num_parameters = done.history("ensemble").num_parameters
    assert num_parameters is not None
    size, rounds = num_parameters // 3, NUM_STEPS // 4
    ring = 2 * 2 / 3
    sent = {
        (arm, site): done.history(arm, site).num_bytes_sent
        for arm in ("fedavg", "diloco", "gossip-averaging")
        for site in SITES
    }
    for site in SITES:
        assert sent["fedavg", site] == pytest.approx(rounds * ring * 4 * size, abs=rounds)
        assert sent["diloco", site] == pytest.approx(rounds * ring * 2 * size, abs=rounds)
        num_neighbours = 2 if site == "b" else 1
        assert sent["gossip-averaging", site] == rounds * num_neighbours * 2 * size
        assert done.history("fedavg", site).num_bytes_received == sent["fedavg", site]
    synchronous, asynchronous = done.history("synchronous"), done.history("asynchronous")
    assert synchronous.num_bytes_sent == pytest.approx(3 * NUM_STEPS * ring * 4 * size, abs=3 * NUM_STEPS)
    # A gradient there and a model back for each update; the first fetch of each worker comes on top.
    assert asynchronous.num_bytes_sent == (2 * 3 * NUM_STEPS + 3 - 1) * 2 * size
    assert done.history("ensemble").num_bytes_sent == 0


@pytest.mark.parametrize("precision", ["float16", "bfloat16"])
def test_what_is_sent_is_rounded(run: Run, precision: str) -> None:
    done = run({"kind": "fedavg"}, {"kind": "fedavg", "name": "rounded", "precision": precision})
    exact, rounded = (done.model(arm, "a")["readout.weight"] for arm in ("fedavg", "rounded"))
    error = float((exact - rounded).abs().max() / exact.abs().max())
    assert 0 < error < (2e-3 if precision == "float16" else 3e-2)


def test_a_synchronous_arm_waits_for_the_slowest_of_its_workers(run: Run) -> None:
    virtual = {"step_time_s": 0.2, "step_time_tail": "lognormal", "step_time_spread": 0.7}
    done = run(
        {"kind": "synchronous"},
        {"kind": "alone"},
        {"kind": "fedavg"},
        {"kind": "ensemble"},
        {"kind": "alone", "name": "group", "num_workers": 4},
        virtual=virtual,
    )
    times = StepTimes(done.scenario.virtual, seed=0)
    drawn = {site: [times(site) for _ in range(NUM_STEPS)] for site in SITES}
    slowest_s = sum(map(max, zip(*drawn.values(), strict=True)))
    assert done.end_s("synchronous") == pytest.approx(slowest_s)
    for site in SITES:
        assert done.end_s("alone", site) == pytest.approx(sum(drawn[site]))
    assert done.end_s("ensemble") == pytest.approx(max(sum(drawn[site]) for site in SITES))
    slowest_at_first_s = max(sum(drawn[site][:4]) for site in SITES)
    [first, *_] = [of for of in done.records("ensemble") if of["event"] == Evaluated.name]
    assert first["time_unix_s"] == pytest.approx(slowest_at_first_s)
    assert done.history("ensemble").duration_s == pytest.approx(done.end_s("ensemble"))
    of_groups = StepTimes(done.scenario.virtual, seed=0, num_workers=4)
    assert done.end_s("group", "a") == pytest.approx(sum(of_groups("a") for _ in range(NUM_STEPS)))
    rounds = [max(sum(drawn[site][start : start + 4]) for site in SITES) for start in range(0, NUM_STEPS, 4)]
    assert done.end_s("fedavg", "c") == pytest.approx(sum(rounds)) and sum(rounds) < slowest_s


def test_teachers_take_time_once_they_teach(run: Run) -> None:
    done = run(
        {"kind": "codistilled"},
        {"kind": "codistilled", "name": "burning", "codistillation": {"burn_in_steps": 100}},
        topology="line",
        virtual={"teacher_time_ratio": 0.5},
    )
    assert done.end_s("burning", "b") == pytest.approx(NUM_STEPS * 0.1)
    for site, num_teachers in (("a", 1), ("b", 2)):
        firsts = {}  # of each teacher: after how many updates it began to teach
        for of in done.records("codistilled", site):
            if of["event"] == "teacher-swapped":
                firsts.setdefault(of["teacher"], of["step"])
        assert len(firsts) == num_teachers
        num_taught = sum(NUM_STEPS - step for step in firsts.values())
        [ended] = [of for of in done.records("codistilled", site) if of["event"] == TrainingEnded.name]
        assert ended["duration_s"] == pytest.approx((NUM_STEPS + 0.5 * num_taught) * 0.1)


# --- what arms set otherwise ---------------------------------------------------------------------------------------


def test_arms_have_keys_of_their_own(run: Run) -> None:
    done = run(
        {"kind": "alone"},
        {"kind": "alone", "name": "longer", "training": {"num_steps": 16, "average_decay": 0.9}},
        {"kind": "alone", "name": "wider", "task": {"hidden_size": 24}},
        {"kind": "alone", "name": "same", "sharing": "same"},
        {"kind": "codistilled", "topology": "line"},
        {"kind": "codistilled", "name": "workers", "num_workers": 2},
    )
    assert done.history("longer", "a").num_steps == 16 and done.history("alone", "a").num_steps == NUM_STEPS
    assert "unaveraged_loss" in done.evaluations("longer", "a")[-1].metrics
    assert done.model("wider", "b")["readout.weight"].shape == (256, 24)
    sizes = {arm: sum(path.stat().st_size for path in data_of(done, arm, "a")) for arm in ("alone", "same")}
    assert sizes["same"] == sum(
        path.stat().st_size for site in SITES for path in data_of(done, "alone", site)
    )
    assert sizes["same"] > 2 * sizes["alone"]
    assert set(done.history("codistilled", "a").swapped) == {"b"}, "a line has no edge between a and c"
    assert set(done.history("workers", "a").swapped) == {"b", "c"}
    batch = {arm: node_config(done, arm, "a")["training"]["batch_size"] for arm in ("codistilled", "workers")}
    assert batch == {"codistilled": 4, "workers": 8}


def node_config(done: Done, arm: str, site: str) -> dict[str, Any]:
    return load_toml(done.folder / f"{arm}-seed0" / "nodes" / f"{site}.toml")


def data_of(done: Done, arm: str, site: str) -> list[Path]:
    nodes = done.folder / f"{arm}-seed0" / "nodes"
    return [nodes / path for path in node_config(done, arm, site)["task"]["data"]]


def test_one_way_codistillation_is_a_directed_topology(run: Run, tmp_path: Path) -> None:
    (tmp_path / "one-way.edgelist").write_text("a b\nb c\n")
    done = run({"kind": "codistilled", "topology": "one-way.edgelist"}, {"kind": "alone"})
    assert {site: set(done.history("codistilled", site).swapped) for site in SITES} == {
        "a": set(),
        "b": {"a"},
        "c": {"b"},
    }
    assert_same_model(done.model("codistilled", "a"), done.model("alone", "a"))
    assert (done.folder / "topology.edgelist").exists()


# --- other tasks and all kinds -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "task",
    [
        {"name": "images", "max_examples": 64, "max_held_out_examples": 64, "width": 4},
        {"name": "clicks", "num_generated_examples": 2000, "hidden_sizes": [8], "num_buckets": 16},
    ],
    ids=lambda task: str(task["name"]),
)
def test_every_kind_takes_every_task(run: Run, task: dict[str, Any]) -> None:
    done = run(
        *({"kind": kind} for kind, of in KINDS.items() if of.module is not None),
        {"kind": "asynchronous", "name": "one", "num_workers": 1},
        {"kind": "alone"},
        task=task,
        data={},
        sites=(),
        num_sites=2,
        training={"num_steps": 8},
    )
    for result in read_results(done.scenario, done.folder):
        for history in result.sites.values():
            assert history.finished and history.final_val_loss is not None and history.final_val_loss < 3.0
    # Buffers, such as running means, are the server's, too.
    assert_same_model(done.model("one", "pooled"), done.model("alone", "0"))
    together = done.evaluations("ensemble")[-1]
    assert together.val_loss < together.metrics["mean_member_loss"]
    assert done.evaluations("two-phase")[-1].metrics["teacher_loss"] < 3.0


def test_every_kind_runs_and_does_the_same_again(
    run: Run, write: Callable[..., Path], tmp_path: Path
) -> None:
    arms = [{"kind": kind} for kind in KINDS]
    virtual = {"step_time_s": 0.1, "step_time_tail": "exponential"}
    done = run(*arms, virtual=virtual)
    (tmp_path / "run").rename(tmp_path / "first")
    again = Done(write(*arms, virtual=virtual))
    logs = {
        path.relative_to(again.folder): path.read_bytes() for path in again.folder.glob("*/*/events.jsonl")
    }
    assert {path.parts[0] for path in logs} == {f"{kind}-seed0" for kind in KINDS}
    assert {path: (tmp_path / "first" / path).read_bytes() for path in logs} == logs
    results = read_results(again.scenario, again.folder)
    assert [result.kind for result in results] == list(KINDS)
    for result in results:
        for history in result.sites.values():
            assert history.finished and history.final_val_loss is not None and history.final_val_loss < 5.7
    assert done.scenario.arms == again.scenario.arms
    stream = io.StringIO()
    report(again.scenario, again.folder, stream)
    page = (again.folder / "report.html").read_text()
    assert all(kind in page for kind in KINDS)
    summary = json.loads((again.folder / "summary.json").read_text())
    assert [arm["name"] for arm in summary["arms"]] == list(KINDS)
