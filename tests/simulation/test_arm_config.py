"""What an arm can set, what it cannot, and that the refusal says what to do."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from p2pcodistill.errors import ConfigError, TopologyError
from p2pcodistill.simulation.arm_config import ArmConfig
from p2pcodistill.simulation.arms.kinds import KINDS, POOLED_SITE
from p2pcodistill.simulation.files import scenario_toml
from p2pcodistill.simulation.jobs import make_jobs, seeded_training
from p2pcodistill.simulation.scenario import ScenarioConfig, load_scenario
from p2pcodistill.strict import parse_model


def table(*arms: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return {
        "name": "small",
        "mode": "virtual",
        "sites": [{"name": name} for name in ("a", "b", "c")],
        "arms": [{"name": arm["kind"]} | arm for arm in arms],
    } | changes


def scenario(*arms: dict[str, Any], **changes: Any) -> ScenarioConfig:
    return parse_model(ScenarioConfig, table(*arms, **changes), source="small.toml")


def load(folder: Path, content: dict[str, Any]) -> ScenarioConfig:
    (folder / "small.toml").write_text(tomli_w.dumps(content))
    return load_scenario(folder / "small.toml")


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ({"kind": "alone", "outer_momentum": 0.9}, "'alone' is alone: remove its outer_momentum, .* diloco$"),
        (
            {"kind": "fedavg", "codistillation": {}},
            "remove its codistillation, .* of the kind codistilled, two-phase$",
        ),
        ({"kind": "fedavg", "topology": "ring"}, "remove its topology, .* codistilled, gossip-averaging$"),
        ({"kind": "ensemble", "teacher_steps": 3}, "remove its teacher_steps, .* two-phase$"),
        ({"kind": "synchronous", "interval_steps": 3}, "remove its interval_steps"),
        ({"kind": "fed-avg"}, "arms.0.kind: .*'fedavg'.*'fed-avg'"),
        ({"kind": "fedavg", "intervall_steps": 3}, "'arms.0.intervall_steps': did you mean 'interval_steps'"),
        ({"kind": "fedavg", "precision": "int8"}, "arms.0.precision: .*'int8'"),
        ({"kind": "fedavg", "interval_steps": 0}, "arms.0.interval_steps: .*1"),
        ({"kind": "diloco", "outer_momentum": 1.0}, "arms.0.outer_momentum: .*less than 1"),
        ({"kind": "ensemble", "num_members": 1}, "arms.0.num_members: .*2"),
        ({"kind": "ensemble", "num_members": 4}, "wants an ensemble of 4, and there are 3 sites: lower"),
        (
            {"kind": "alone", "training": {"num_step": 3}},
            "the arm 'alone': unknown key 'training.num_step': did",
        ),
        ({"kind": "alone", "training": {"num_steps": 0}}, "the arm 'alone': training.num_steps: .*got 0"),
        (
            {"kind": "alone", "training": {"momentum": 0.9}},
            r"the arm 'alone': momentum .* optimizer = \"sgd\"",
        ),
        ({"kind": "alone", "training": {"seed": 3}}, "training.seed is decided by the simulation"),
        ({"kind": "alone", "task": {"hidden_sise": 3}}, "the arm 'alone': .*hidden_sise.* 'hidden_size'"),
        ({"kind": "alone", "task": {"data": ["x"]}}, "task.data is decided by the simulation"),
        ({"kind": "alone", "task": {"name": "custom"}}, "all arms have the same task; remove its task.name"),
        (
            {"kind": "alone", "task": {"max_held_out_examples": 64}},
            r"'alone': task.max_held_out_examples decides what is evaluated on, .*: remove it, or set it in \[task\]",
        ),
        (
            {"kind": "alone", "task": {"generator_seed": 7}},
            "task.generator_seed decides what is evaluated on",
        ),
        ({"kind": "alone", "links": []}, "remove its links, which is for arms of the kind codistilled"),
        (
            {"kind": "codistilled", "links": [{"between": ["a", "d"]}]},
            "the arm 'codistilled': 'd' has a link, but is none of the sites a, b, c",
        ),
        (
            {"kind": "codistilled", "links": [{"between": "all"}, {"between": "all"}]},
            "the link between 'all' is listed twice",
        ),
        ({"kind": "alone", "num_sites": 9}, "the arm 'alone' wants 9 sites, and there are"),
        (
            {"kind": "ensemble", "num_sites": 2, "num_members": 3},
            "wants an ensemble of 3, and there are 2 sites",
        ),
        ({"kind": "alone", "sharing": "some"}, "arms.0.sharing: .*'some'"),
        ({"kind": "alone", "training": 3}, "arms.0.training: .*got 3"),
    ],
)
def test_an_arm_that_makes_no_sense_is_refused_in_one_line(arm: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        scenario(arm)
    assert str(caught.value).startswith("small.toml: ") and "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", [kind for kind, of in KINDS.items() if of.module is not None])
def test_arms_without_nodes_need_virtual_time(kind: str) -> None:
    with pytest.raises(ConfigError, match=f"the arm '{kind}' is {kind}, which is for mode = \"virtual\""):
        scenario({"kind": kind}, mode="processes")
    assert scenario({"kind": kind}).arms[0].kind == kind


def test_so_do_several_workers_of_a_site() -> None:
    with pytest.raises(ConfigError, match='has num_workers, which is for mode = "virtual"'):
        scenario({"kind": "codistilled", "num_workers": 2}, mode="processes")


def test_each_kind_is_known_to_the_model_and_has_its_module() -> None:
    assert set(KINDS) == set(ArmConfig.model_fields["kind"].annotation.__args__)  # type: ignore[union-attr]
    folder = Path(__file__).parents[2] / "p2pcodistill" / "simulation" / "arms"
    assert all((folder / f"{of.module}.py").exists() for of in KINDS.values() if of.module is not None)
    assert all(key in ArmConfig.model_fields for of in KINDS.values() for key in of.keys)


def test_data_that_two_sites_have_is_not_disjoint(tmp_path: Path) -> None:
    (tmp_path / "corpus").mkdir()
    shared = [{"name": "a", "data": ["corpus"]}, {"name": "b", "data": ["other", "corpus/part.txt"]}]
    with pytest.raises(ConfigError, match=r"sites 'a' and 'b' both have .*corpus/part.txt, .* disjoint"):
        load(tmp_path, table({"kind": "alone"}, sites=shared))
    same = table({"kind": "alone"}, sites=shared, data={"sharing": "same"})
    assert load(tmp_path, same).data.sharing == "same"
    same_in_arm = table({"kind": "alone", "sharing": "same"}, sites=shared)
    assert load(tmp_path, same_in_arm).arms[0].sharing == "same"
    apart = [{"name": "a", "data": ["corpus"]}, {"name": "b", "data": ["corpus-2"]}]
    assert len(load(tmp_path, table({"kind": "alone"}, sites=apart)).sites) == 2


def test_paths_in_an_arm_are_relative_to_the_file(tmp_path: Path) -> None:
    task = {"unlabelled": ["more"], "vocabulary": "words.json", "hidden_size": 8}
    arms = [{"kind": "alone", "task": task}, {"kind": "pooled"}]
    scenario = load(tmp_path, table(*arms))
    expected = {"unlabelled": [str(tmp_path / "more")], "vocabulary": str(tmp_path / "words.json")}
    assert scenario.arms[0].task == expected | {"hidden_size": 8} and scenario.arms[1].task == {}


def test_a_topology_of_an_arm_has_to_fit_the_sites(tmp_path: Path) -> None:
    with pytest.raises(TopologyError, match=r"small.toml: .*'pair' joins two members, this run has 3"):
        load(tmp_path, table({"kind": "codistilled", "topology": "pair"}))


def test_what_an_arm_sets_comes_before_what_the_scenario_does() -> None:
    both = scenario(
        {"kind": "alone", "training": {"learning_rate": 0.1}, "task": {"hidden_size": 8}},
        {"kind": "codistilled", "topology": "ring", "frames": {"delta": "off"}},
        training={"learning_rate": 0.5, "num_steps": 7},
        task={"hidden_size": 16, "num_layers": 1},
        topology="line",
    )
    alone, codistilled = (both.of_arm(arm) for arm in both.arms)
    assert (alone.training.learning_rate, alone.training.num_steps) == (0.1, 7)
    assert (codistilled.training.learning_rate, codistilled.frames.delta) == (0.5, "off")
    assert alone.task.model_dump()["hidden_size"] == 8 and alone.task.model_dump()["num_layers"] == 1
    assert (alone.topology, codistilled.topology) == ("line", "ring")


def test_a_scenario_is_written_with_what_its_arms_set(tmp_path: Path) -> None:
    arms = [
        {"name": "slow", "kind": "alone", "training": {"learning_rate": 0.1}, "sharing": "same"},
        {"name": "diloco", "kind": "diloco", "outer_momentum": 0.0, "precision": "float16"},
        {"name": "ring", "kind": "gossip-averaging", "topology": "ring", "initialisation": "different"},
    ]
    first = load(tmp_path, table(*arms, virtual={"step_time_tail": "exponential"}))
    (tmp_path / "again.toml").write_text(scenario_toml(first))
    assert load_scenario(tmp_path / "again.toml") == first


# --- jobs ----------------------------------------------------------------------------------------------------------


def test_jobs_have_the_sites_that_a_kind_has() -> None:
    jobs = make_jobs(scenario(*({"kind": kind} for kind in KINDS)))
    sites = {
        kind: [[run.name for run in job.sites] for job in jobs if job.arm.kind == kind] for kind in KINDS
    }
    together, apart, one = [["a", "b", "c"]], [["a"], ["b"], ["c"]], [[POOLED_SITE]]
    assert sites == {
        "codistilled": together,
        "alone": apart,
        "pooled": one,
        "synchronous": one,
        "asynchronous": one,
        "ensemble": one,
        "two-phase": one,
        "fedavg": together,
        "diloco": together,
        "gossip-averaging": together,
    }


def test_sites_that_share_have_the_data_of_all() -> None:
    both = scenario(
        {"kind": "codistilled"}, {"kind": "fedavg", "sharing": "disjoint"}, data={"sharing": "same"}
    )
    shards = {job.arm.kind: [run.shards for run in job.sites] for job in make_jobs(both)}
    assert shards == {"codistilled": [("a", "b", "c")] * 3, "fedavg": [("a",), ("b",), ("c",)]}


@pytest.mark.parametrize(
    ("arm", "own", "expected"),
    [
        ({"kind": "fedavg"}, None, 5),
        ({"kind": "codistilled"}, None, None),
        ({"kind": "codistilled", "initialisation": "same"}, None, 5),
        ({"kind": "fedavg", "initialisation": "different"}, None, None),
        ({"kind": "fedavg"}, 9, 9),
        ({"kind": "codistilled"}, 9, 9),
        ({"kind": "codistilled", "initialisation": "different"}, 9, None),
    ],
)
def test_who_starts_from_the_same_model(arm: dict[str, Any], own: int | None, expected: int | None) -> None:
    of = scenario(arm, training={} if own is None else {"initialisation_seed": own})
    training = seeded_training(of.training_of(of.arms[0]), of.arms[0], 5)
    assert (training.seed, training.initialisation_seed) == (5, expected)
