"""Scenario files: what is accepted, what is refused, and that the refusal says what to do."""

from __future__ import annotations

import string
from pathlib import Path
from typing import Any

import pytest
import tomli_w
from hypothesis import given
from hypothesis import strategies as st

from p2pcodistill.errors import ConfigError, TopologyError, UserError
from p2pcodistill.simulation.scenario import ScenarioConfig, load_scenario
from p2pcodistill.strict import parse_model

REPOSITORY = Path(__file__).parents[2]


def table(**changes: Any) -> dict[str, Any]:
    base = {
        "name": "small",
        "sites": [{"name": "berlin"}, {"name": "tokyo"}],
        "arms": [{"name": "codistilled", "kind": "codistilled"}, {"name": "alone", "kind": "alone"}],
    }
    return base | changes


def write(folder: Path, content: dict[str, Any]) -> Path:
    path = folder / "small.toml"
    path.write_text(tomli_w.dumps(content))
    return path


def test_the_demo_is_the_case_where_codistillation_pays_most() -> None:
    scenario = load_scenario(REPOSITORY / "simulations" / "pair.toml")
    assert scenario.site_names == ("berlin", "tokyo")
    assert [arm.kind for arm in scenario.arms] == ["codistilled", "alone", "pooled"]
    assert (scenario.data.paths, scenario.data.max_bytes_per_site) == ((), 500_000)
    assert (scenario.task.num_layers, scenario.task.hidden_size, scenario.task.window_tokens) == (2, 256, 32)
    training = scenario.training
    assert (training.num_steps, training.batch_size) == (2000, 32)
    assert (training.learning_rate_schedule, training.evaluation_interval_steps) == ("cosine", 50)
    assert scenario.codistillation.burn_in_steps == 200
    assert scenario.codistillation.exchange_interval_steps == 50


def test_defaults_fit_any_number_of_sites(tmp_path: Path) -> None:
    sites = [{"name": name} for name in ("a", "b", "c", "d", "e")]
    scenario = load_scenario(write(tmp_path, table(sites=sites)))
    assert (scenario.seeds, scenario.topology, scenario.mode) == ((0,), "full", "processes")
    assert scenario.title == "small"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": [{"name": "berlin"}]}, "sites: .*at least 2"),
        ({"sites": [{"name": "berlin"}, {"name": "berlin"}]}, "site 'berlin' is listed twice"),
        ({"sites": [{"name": "berlin"}, {"name": "pooled"}]}, "no site can be called 'pooled'"),
        ({"sites": [{"name": "berlin"}, {"name": "held-out"}]}, "no site can be called 'held-out'"),
        ({"sites": [{"name": "berlin"}, {"name": "nodes"}]}, "no site can be called 'nodes'"),
        ({"sites": [{"name": "berlin"}, {"name": "../tokyo"}]}, "'../tokyo' cannot name a site"),
        ({"sites": [{"name": "berlin"}, {"nmae": "tokyo"}]}, "'sites.1.nmae': did you mean 'name'"),
        ({"arms": []}, "arms: .*at least 1"),
        ({"arms": [{"name": "a", "kind": "alone"}] * 2}, "arm 'a' is listed twice"),
        ({"arms": [{"name": "a", "kind": "lone"}]}, "arms.0.kind: .*'lone'"),
        ({"arms": [{"name": "a/b", "kind": "alone"}]}, "arms.0.name: use at most 40 letters.*'a/b'"),
        (
            {"arms": [{"name": "a", "kind": "alone", "frames": {"delta": "off"}}]},
            "the arm 'a' is alone: remove its frames",
        ),
        (
            {"arms": [{"name": "a", "kind": "codistilled", "frames": {"dleta": "off"}}]},
            "unknown key 'arms.0.frames.dleta': did you mean 'delta'",
        ),
        ({"frames": {"delta": "2-bit"}}, "frames.delta: .*'2-bit'"),
        ({"name": "x" * 41}, "name: use at most 40 letters"),
        ({"seeds": []}, "seeds: .*at least 1"),
        ({"seeds": [1, 1]}, "seed 1 is listed twice"),
        ({"seeds": [-1]}, "seeds.0: .*-1"),
        ({"seed": 1}, "unknown key 'seed': did you mean 'seeds'"),
        ({"data": {"max_bytes": 1}}, "unknown key 'data.max_bytes': did you mean"),
        ({"task": {"data": ["corpus"]}}, r"task.data is decided .* data.paths"),
        ({"task": {"held_out": ["corpus"]}}, r"task.held_out is decided .* data.held_out"),
        ({"task": {"max_data_bytes": 9}}, r"task.max_data_bytes is decided .* data.max_bytes_per_site"),
        ({"group": {"script": "train.py"}}, r"group.script is decided .* p2pcodistill node"),
        ({"task": {"max_held_out_bytes": 9}}, r"max_held_out_bytes is decided .* data.max_held_out_bytes"),
        ({"training": {"seed": 1}}, r"training.seed is decided .* seeds = \[0\]"),
        ({"training": {"num_step": 1}}, "unknown key 'training.num_step': did you mean 'num_steps'"),
        (
            {"sites": [{"name": "berlin", "data": ["b"]}, {"name": "tokyo"}]},
            "'berlin' lists data of its own and 'tokyo' does not",
        ),
        (
            {
                "sites": [{"name": "berlin", "data": ["b"]}, {"name": "tokyo", "data": ["t"]}],
                "data": {"paths": ["p"]},
            },
            "exclude each other",
        ),
        ({"links": [{"between": ["berlin", "rome"]}]}, "'rome' has a (link|fault), but is none"),
        ({"links": [{"between": ["berlin", "berlin"]}]}, "'berlin' and 'berlin', which share no edge"),
        (
            {"links": [{"between": ["berlin", "tokyo"]}, {"between": ["tokyo", "berlin"]}]},
            "link between 'berlin and tokyo' is listed twice",
        ),
        (
            {"sites": [{"name": name} for name in "abcd"], "topology": "ring"}
            | {"links": [{"between": ["a", "c"]}]},
            "a link between 'a' and 'c', which share no edge of the topology 'ring'",
        ),
        ({"faults": [{"kind": "no-such", "sites": ["berlin"], "at_s": 1}]}, "faults.0.kind: .*'no-such'"),
        ({"faults": [{"kind": "kill", "sites": ["rome"], "at_s": 1}]}, "'rome' has a (link|fault)"),
        (
            {"faults": [{"kind": "black-hole", "sites": ["tokyo"], "from_sites": ["rome"], "at_s": 1}]},
            "'rome' has a (link|fault)",
        ),
        (
            {
                "arms": [{"name": "alone", "kind": "alone"}],
                "faults": [{"kind": "kill", "sites": ["tokyo"], "at_s": 1}],
            },
            "links and faults are those of codistilled arms",
        ),
        ({"virtual": {"step_time_s": 0.5}}, r"\[virtual\] is for mode = \"virtual\""),
        ({"mode": "virtual", "group": {"num_ranks": 2}}, "each site is one rank: remove"),
        ({"mode": "real"}, "mode: .*'real'"),
    ],
)
def test_what_is_wrong_is_refused_in_one_line_that_names_file_and_key(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    path = write(tmp_path, table(**changes))
    with pytest.raises(ConfigError, match=message) as caught:
        load_scenario(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


def test_a_codistilled_arm_sets_keys_of_its_own() -> None:
    arms = [
        {"name": "ternary", "kind": "codistilled"},
        {"name": "exact", "kind": "codistilled", "frames": {"delta": "lossless"}},
        {"name": "average", "kind": "codistilled", "codistillation": {"teacher_average_decay": 0.98}},
    ]
    sections = {"frames": {"delta": "ternary", "keyframe": "int8"}, "codistillation": {"burn_in_steps": 7}}
    scenario = parse_model(ScenarioConfig, table(arms=arms, **sections), source="test")
    assert [scenario.frames_of(arm).delta for arm in scenario.arms] == ["ternary", "lossless", "ternary"]
    assert {scenario.frames_of(arm).keyframe for arm in scenario.arms} == {"int8"}
    of_arms = [scenario.codistillation_of(arm) for arm in scenario.arms]
    assert [of.teacher_average_decay for of in of_arms] == [0, 0, 0.98]
    assert {of.burn_in_steps for of in of_arms} == {7}


@pytest.mark.parametrize(
    ("topology", "message"),
    [
        ("pair", "'pair' joins two members, this run has 3"),
        ("stars", "unknown topology 'stars'"),
        ("gone.gml", "no topology file .*gone.gml"),
    ],
)
def test_a_topology_that_does_not_fit_is_refused(tmp_path: Path, topology: str, message: str) -> None:
    sites = [{"name": name} for name in ("a", "b", "c")]
    path = write(tmp_path, table(sites=sites, topology=topology))
    with pytest.raises(TopologyError, match=message) as caught:
        load_scenario(path)
    assert str(caught.value).startswith(f"{path}: ")


def test_paths_in_the_file_and_in_overrides_mean_its_folder(tmp_path: Path) -> None:
    (tmp_path / "ours.edgelist").write_text("berlin tokyo\n")
    content = table(topology="ours.edgelist", data={"paths": ["corpus", "/absolute"]})
    path = write(tmp_path, content)
    scenario = load_scenario(path, ["training.num_steps=7"])
    assert scenario.topology == str(tmp_path / "ours.edgelist")
    assert scenario.data.paths == (tmp_path / "corpus", Path("/absolute"))
    assert scenario.training.num_steps == 7
    with pytest.raises(ConfigError, match="KEY=VALUE"):
        load_scenario(path, ["training.num_steps"])


def test_given_data_replaces_all_text_of_the_scenario(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "scenarios").mkdir()
    sites = [{"name": "berlin", "data": ["b"]}, {"name": "tokyo", "data": ["t"]}]
    path = write(tmp_path / "scenarios", table(sites=sites))
    assert load_scenario(path).sites[1].data == (tmp_path / "scenarios" / "t",)
    scenario = load_scenario(path, data=[Path("corpus")])
    assert scenario.data.paths == (tmp_path / "corpus",)
    assert [site.data for site in scenario.sites] == [(), ()]


def test_a_missing_file_is_answered_with_the_ones_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ConfigError, match=r"no such scenario file: simulations/pear.toml \(and there are none"
    ):
        load_scenario(Path("simulations/pear.toml"))
    (tmp_path / "simulations").mkdir()
    for name in ("ring.toml", "pair.toml", "notes.md"):
        (tmp_path / "simulations" / name).write_text("")
    with pytest.raises(
        ConfigError, match=r"simulations/pear.toml; the ones in simulations are pair.toml, ring.toml$"
    ):
        load_scenario(Path("simulations/pear.toml"))


def test_broken_toml_and_a_folder_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "broken.toml"
    path.write_text("name = ")
    with pytest.raises(ConfigError, match=r"broken\.toml is not valid TOML"):
        load_scenario(path)
    with pytest.raises(ConfigError, match="cannot read"):
        load_scenario(tmp_path)


def test_links_and_faults_have_a_settled_schema() -> None:
    scenario = parse_model(
        ScenarioConfig,
        table(
            mode="virtual",
            links=[
                {"between": ["berlin", "tokyo"], "bandwidth_mbit": 20, "latency_ms": 100, "jitter_ms": 5}
                | {"loss_ratio": 0.01, "reset_interval_s": 30}
            ],
            faults=[
                {"kind": "kill", "sites": ["tokyo"], "at_step": 500},
                {"kind": "slow-down", "sites": ["berlin"], "at_s": 1.5, "factor": 10},
            ],
        ),
        source="test",
    )
    assert scenario.links[0].reset_interval_s == 30
    assert [fault.kind for fault in scenario.faults] == ["kill", "slow-down"]


@pytest.mark.parametrize(
    ("faults", "message"),
    [
        (
            ["restart 1"],
            "fault 'restart' of 'tokyo' at step 1: it is not down by then; list its kill or leave",
        ),
        (["kill 1", "restart 2", "restart 3"], "'restart' of 'tokyo' at step 3: it is not down"),
        (["kill 1", "leave 2"], "fault 'leave' of 'tokyo' at step 2: it does not run by then"),
        (["slow-down 1", "join 2"], "fault 'slow-down' of 'tokyo' at step 1: it does not run by then"),
        (["join 1", "kill 2", "join 3"], "'join' of 'tokyo' at step 3: a site joins once"),
        (["heal 1"], "fault 'heal' of 'tokyo' at step 1: it is not cut off by then"),
        (["partition 1", "black-hole 2"], "'black-hole' of 'tokyo' at step 2: it is cut off already"),
        (["kill 1", "impostor 2"], "'impostor' of 'tokyo' at step 2: it does not run by then"),
        (["impostor 1", "kill 2"], "'kill' of 'tokyo' at step 2: two machines run with its identity"),
        (["replace 1", "join 2"], "'replace' of 'tokyo' at step 1: it is not there by then"),
        (["leave 1", "slow-down 2"], "'slow-down' of 'tokyo' at step 2: it does not run by then"),
        (["partition 1", "partition 2"], "fault 'partition' of 'tokyo' at step 2: it is cut off already"),
        (["kill 2", "restart 1"], r"the faults of 'tokyo' in the order in which they happen: .*\[2, 1\]"),
    ],
)
def test_faults_that_cannot_follow_each_other_are_refused(faults: list[str], message: str) -> None:
    entries = [
        {"kind": kind, "sites": ["tokyo"], "at_step": int(step)}
        | ({"factor": 2} if kind == "slow-down" else {})
        for kind, step in map(str.split, faults)
    ]
    with pytest.raises(ConfigError, match=message):
        parse_model(ScenarioConfig, table(faults=entries), source="test")


def test_faults_that_can_follow_each_other_are_accepted() -> None:
    kinds = ["join", "kill", "restart", "partition", "corrupt", "leave", "heal", "restart", "partition"]
    kinds += ["kill", "replace", "hostile", "replace", "heal", "black-hole", "clock", "impostor", "heal"]
    own = {"hostile": {"does": "flood"}, "clock": {"offset_s": -5}}
    entries = [{"kind": kind, "sites": ["tokyo"], "at_step": 10} | own.get(kind, {}) for kind in kinds]
    for mode in ("processes", "virtual"):
        scenario = parse_model(ScenarioConfig, table(faults=entries, mode=mode), source="test")
        assert [fault.kind for fault in scenario.faults] == kinds


@pytest.mark.parametrize(
    ("section", "entry", "message"),
    [
        ("faults", {"kind": "kill", "sites": ["berlin"]}, "either at_step or at_s"),
        ("faults", {"kind": "kill", "sites": ["berlin"], "at_s": 1, "at_step": 1}, "either at_step or at_s"),
        ("faults", {"kind": "slow-down", "sites": ["berlin"], "at_s": 1}, "factor belongs to"),
        ("faults", {"kind": "kill", "sites": ["berlin"], "at_s": 1, "factor": 2}, "factor belongs to"),
        ("faults", {"kind": "slow-down", "sites": ["berlin"], "at_s": 1, "factor": 0.5}, "at least 1"),
        ("faults", {"kind": "kill", "sites": [], "at_s": 1}, "at least 1"),
        ("faults", {"kind": "clock", "sites": ["berlin"], "at_s": 1}, "offset_s belongs to"),
        ("faults", {"kind": "hostile", "sites": ["berlin"], "at_s": 1}, "does belongs to"),
        ("faults", {"kind": "corrupt", "sites": ["berlin"], "at_s": 1, "does": "flood"}, "does belongs to"),
        ("faults", {"kind": "hostile", "sites": ["berlin"], "at_s": 1, "does": "harm"}, "does: .*'harm'"),
        ("faults", {"kind": "kill", "sites": ["berlin"], "from_sites": ["tokyo"], "at_s": 1}, "from_sites"),
        (
            "faults",
            {"kind": "partition", "sites": ["berlin"], "from_sites": ["berlin"], "at_s": 1},
            "separated from itself: take 'berlin' out",
        ),
        ("links", {"between": ["berlin"]}, "at least 2"),
        ("links", {"between": ["berlin", "tokyo"], "loss_ratio": 1}, "less than 1"),
    ],
)
def test_links_and_faults_that_mean_nothing_are_refused(
    section: str, entry: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_model(ScenarioConfig, table(**{section: [entry]}), source="test")


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | st.text(string.printable, max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "kind", "data", "paths", "seed", "x"]), inner, max_size=3)
    ),
    max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(list(ScenarioConfig.model_fields)), VALUES))
def test_any_table_is_a_scenario_or_a_user_error(changes: dict[str, Any]) -> None:
    try:
        scenario = parse_model(ScenarioConfig, table(**changes), source="test")
    except UserError as error:
        assert str(error).startswith("test: ")
    else:
        assert len(scenario.sites) >= 2
