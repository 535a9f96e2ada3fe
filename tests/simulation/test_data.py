"""What the sites of a scenario train on: disjoint, deterministic, checked before anything starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tomli_w

from p2pcodistill.errors import ConfigError, DataError
from p2pcodistill.simulation.data import ScenarioText, prepare_data, task_of_site
from p2pcodistill.simulation.outcome import loss_unit_of
from p2pcodistill.simulation.scenario import ScenarioConfig, load_scenario
from p2pcodistill.task_configs import LanguageModelConfig
from p2pcodistill.tasks.vocabulary import load_vocabulary
from p2pcodistill.tasks.vocabulary_training import train_word_pieces


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    folder.mkdir()
    for index in range(60):
        (folder / f"file-{index}.txt").write_text(f"file {index} says ä thing\n" * 40)
    return folder


def load(folder: Path, **changes: Any) -> ScenarioConfig:
    content = {
        "name": "small",
        "sites": [{"name": "berlin"}, {"name": "tokyo"}],
        "arms": [{"name": kind, "kind": kind} for kind in ("codistilled", "alone", "pooled")],
        "data": {"paths": ["corpus"], "max_bytes_per_site": 5000, "max_held_out_bytes": 1000},
        "training": {"batch_size": 4},
    }
    path = folder / "small.toml"
    path.write_text(tomli_w.dumps(content | changes))
    return load_scenario(path)


@pytest.fixture
def scenario(corpus: Path) -> ScenarioConfig:
    return load(corpus.parent)


def split(scenario: ScenarioConfig) -> ScenarioText:
    text = prepare_data(scenario)
    assert isinstance(text, ScenarioText)
    return text


def test_sites_have_folders_of_their_own_where_text_is_dealt_by_path(tmp_path: Path) -> None:
    for package in ("cooking", "sailing"):
        (tmp_path / "corpus" / package).mkdir(parents=True)
        for index in range(30):
            (tmp_path / "corpus" / package / f"{index}.txt").write_text(f"{package} {index}\n" * 40)
    data = {"paths": ["corpus"], "max_bytes_per_site": 5000, "max_held_out_bytes": 1000}

    def share_of_cooking(text: bytes) -> float:
        return text.count(b"cooking") / (text.count(b"cooking") + text.count(b"sailing"))

    alike, unlike = (split(load(tmp_path, data=data | {"shard_by": by})) for by in ("hash", "path"))
    assert all(0.3 < share_of_cooking(shard) < 0.7 for shard in alike.shards.values())
    berlin, tokyo = map(share_of_cooking, unlike.shards.values())
    assert berlin > 0.9 and tokyo < 0.1, "but for a file in the middle, as what was held out left it"
    assert unlike.held_out == alike.held_out, "what all are judged on does not change"


# --- text --------------------------------------------------------------------------------------------------------


def test_common_text_is_split_between_the_sites(scenario: ScenarioConfig) -> None:
    text = split(scenario)
    assert text == split(scenario)
    assert list(text.shards) == ["berlin", "tokyo"]
    assert 900 < len(text.held_out) <= 1000
    assert all(4900 < len(shard) <= 5000 for shard in text.shards.values())
    parts = [
        {line.split()[1] for line in part.splitlines() if line.startswith(b"file ")}
        for part in (text.held_out, *text.shards.values())
    ]
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])


def test_a_site_with_text_of_its_own_trains_on_that_and_all_are_judged_on_both(corpus: Path) -> None:
    for name in ("berlin", "tokyo"):
        (corpus.parent / name).mkdir()
        for index in range(40):
            (corpus.parent / name / f"{index}.txt").write_text(f"{name} says thing {index}\n" * 30)
    sites = [{"name": name, "data": [name]} for name in ("berlin", "tokyo")]
    scenario = load(corpus.parent, sites=sites, data={"max_bytes_per_site": 4000, "max_held_out_bytes": 1000})
    text = split(scenario)
    assert text.shards["berlin"].count(b"berlin") > 50
    assert b"tokyo" not in text.shards["berlin"]
    assert text.held_out.count(b"berlin says") > 5
    assert text.held_out.count(b"tokyo says") > 5
    assert len(text.held_out) <= 1000


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training": {"batch_size": 1000}}, "the site berlin: .*corpus: .*batch_size"),
        ({"group": {"num_ranks": 200}, "training": {"batch_size": 4}}, "the site berlin: .*need 26400"),
        ({"data": {"paths": ["corpus/file-0.txt", "gone"]}}, "no such file or folder: .*gone"),
    ],
)
def test_too_little_text_is_refused_before_anything_is_written(
    corpus: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        prepare_data(load(corpus.parent, **changes))


def test_the_standard_library_is_the_text_where_none_is_given(corpus: Path) -> None:
    text = split(load(corpus.parent, data={"max_bytes_per_site": 20_000}))
    assert all(19_000 < len(shard) <= 20_000 for shard in text.shards.values())
    assert b"import" in text.shards["berlin"]


def test_text_without_lines_is_not_torn_inside_characters(corpus: Path) -> None:
    for index in range(20):
        (corpus.parent / f"long-{index}.txt").write_text("x" * (index % 3) + "语言模型" * 3000)
    paths = [f"long-{index}.txt" for index in range(20)]
    data = {"paths": paths, "max_bytes_per_site": 5000, "max_held_out_bytes": 1000}
    text = split(load(corpus.parent, data=data))
    for part, max_bytes in [(text.held_out, 1000), *((shard, 5000) for shard in text.shards.values())]:
        assert part.decode().endswith("\n")
        assert 0.9 * max_bytes < len(part) <= max_bytes


def test_held_out_text_of_its_own_is_not_split_off(corpus: Path) -> None:
    (corpus.parent / "held.txt").write_text("held out\n" * 50)
    data = {
        "paths": ["corpus"],
        "held_out": ["held.txt"],
        "max_bytes_per_site": 5000,
        "max_held_out_bytes": 200,
    }
    text = split(load(corpus.parent, data=data))
    assert set(text.held_out.splitlines()) == {b"held out"}
    assert 150 < len(text.held_out) <= 200
    assert all(b"held" not in shard for shard in text.shards.values())


# --- other data --------------------------------------------------------------------------------------------------


CUSTOM = {"name": "custom", "task": "mine:Task"}


def test_each_site_is_told_its_part_of_data_that_stays_where_it_is(corpus: Path, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("held out\n")
    scenario = load(corpus.parent, task=CUSTOM, data={"paths": ["corpus"], "held_out": ["held.txt"]})
    folder = tmp_path / "run"
    folder.mkdir()
    prepare_data(scenario).write(folder)
    assert list(folder.iterdir()) == []
    tokyo = task_of_site(scenario, ("tokyo",), folder, Path("..", ".."))
    assert (tokyo.data, tokyo.held_out) == ((corpus,), (tmp_path / "held.txt",))
    assert (tokyo.shards, tokyo.num_shards) == ((1,), 2)
    assert task_of_site(scenario, ("berlin", "tokyo"), folder, Path()).shards == (0, 1)


def test_each_site_is_told_of_data_of_its_own(corpus: Path, tmp_path: Path) -> None:
    sites = [
        {"name": "berlin", "data": ["corpus/file-1.txt"]},
        {"name": "tokyo", "data": ["corpus/file-2.txt"]},
    ]
    with pytest.raises(ConfigError, match=r"its own data, which others train on: .* in data\.held_out"):
        load(corpus.parent, task=CUSTOM, sites=sites, data={})
    data = {"held_out": ["corpus/file-3.txt"]}
    scenario = load(corpus.parent, task=CUSTOM, sites=sites, data=data)
    tokyo = task_of_site(scenario, ("tokyo",), tmp_path, Path())
    assert (tokyo.data, tokyo.shards) == ((corpus / "file-2.txt",), ())
    pooled = task_of_site(scenario, ("berlin", "tokyo"), tmp_path, Path())
    assert pooled.data == (corpus / "file-1.txt", corpus / "file-2.txt")
    sites[1]["data"] += ["corpus/../corpus/file-1.txt"]
    scenario = load(corpus.parent, task=CUSTOM, sites=sites, data=data | {"sharing": "same"})
    shared = task_of_site(scenario, ("berlin", "tokyo"), tmp_path, Path())
    assert shared.data == (corpus / "file-1.txt", corpus / "file-2.txt"), "no file twice"


@pytest.mark.parametrize(
    "changes",
    [
        {"data": {"paths": ["corpus"], "held_out": ["corpus/file-1.txt"]}},
        {"data": {"paths": ["corpus/file-1.txt"], "held_out": ["corpus"]}, "task": CUSTOM},
        {
            "data": {"held_out": ["corpus/../corpus/file-2.txt"]},
            "sites": [{"name": f"s{number}", "data": [f"corpus/file-{number}.txt"]} for number in (1, 2)],
        },
        {"data": {"held_out": ["corpus/file-2.txt"]}, "task": {"unlabelled": ["corpus"]}},
        {"data": {"paths": ["hf:a/b"], "held_out": ["hf:a/b#train"]}},
    ],
)
def test_held_out_data_that_is_trained_on_is_refused(corpus: Path, changes: dict[str, Any]) -> None:
    with pytest.raises(
        ConfigError, match=r"is to be evaluated on and overlaps .*: list other data"
    ) as refusal:
        load(corpus.parent, **changes)
    assert "\n" not in str(refusal.value)


def test_sites_with_the_same_data_of_the_hub_are_refused_however_it_is_written(corpus: Path) -> None:
    sites = [{"name": "berlin", "data": ["hf:a/b:c"]}, {"name": "tokyo", "data": ["hf:a/b:c#train"]}]
    with pytest.raises(ConfigError, match="the sites 'berlin' and 'tokyo' both have hf:a/b:c#train"):
        load(corpus.parent, sites=sites, data={})
    sites[1]["data"] = ["hf:a/b:c#validation"]
    assert load(corpus.parent, sites=sites, data={}).site_names == ("berlin", "tokyo")


def test_missing_data_and_limits_on_text_are_refused(corpus: Path) -> None:
    with pytest.raises(DataError, match=r"no such file or folder: .*gone"):
        prepare_data(load(corpus.parent, task=CUSTOM, data={"paths": ["gone"]}))
    with pytest.raises(ConfigError, match=r"data\.max_bytes_per_site is for text: remove it"):
        load(corpus.parent, task=CUSTOM, data={"max_bytes_per_site": 100})


# --- vocabularies ------------------------------------------------------------------------------------------------


def test_word_pieces_are_trained_on_the_text_of_all_sites_and_lie_in_the_run_folder(
    corpus: Path, tmp_path: Path
) -> None:
    data = {"paths": ["corpus"], "max_bytes_per_site": 5000, "max_held_out_bytes": 1000}
    scenario = load(corpus.parent, data=data | {"vocabulary_size": 280})
    folder = tmp_path / "run"
    folder.mkdir()
    prepare_data(scenario).write(folder)
    assert prepare_data(scenario) == prepare_data(scenario)
    task = task_of_site(scenario, ["berlin"], folder, folder)
    assert isinstance(task, LanguageModelConfig)
    assert task.vocabulary == folder / "data" / "vocabulary.json"
    vocabulary = load_vocabulary(task.vocabulary)
    assert vocabulary.size == 280
    assert len(vocabulary.encode_documents([b"file 3 says thing"])) < 17 + 5


def test_a_vocabulary_of_ones_own_is_copied_into_the_run_folder(corpus: Path, tmp_path: Path) -> None:
    content = train_word_pieces([b"thing thing thing says file\n" * 9], 270)
    (tmp_path / "own.json").write_bytes(content)
    scenario = load(corpus.parent, task={"vocabulary": "own.json"})
    folder = tmp_path / "run"
    folder.mkdir()
    prepare_data(scenario).write(folder)
    task = task_of_site(scenario, ["berlin"], folder, folder)
    assert isinstance(task, LanguageModelConfig) and task.vocabulary is not None
    assert task.vocabulary.read_bytes() == content


def test_tokens_are_counted_not_bytes(corpus: Path) -> None:
    data = {"paths": ["corpus"], "max_bytes_per_site": 5000, "max_held_out_bytes": 1000}
    training = {"batch_size": 140}
    assert split(load(corpus.parent, data=data, training=training)).vocabulary is None
    with pytest.raises(DataError, match=r"the site berlin: .* tokens of text to train on, but 140 documents"):
        prepare_data(load(corpus.parent, data=data | {"vocabulary_size": 300}, training=training))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"data": {"vocabulary_size": 300}, "task": {"vocabulary": "own.json"}},
            "data.vocabulary_size and task.vocabulary exclude each other",
        ),
        ({"data": {"vocabulary_size": 300}, "task": {"name": "clicks"}}, "data.vocabulary_size is for text"),
    ],
)
def test_vocabularies_that_make_no_sense_are_refused(
    corpus: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        load(corpus.parent, **changes)


@pytest.mark.parametrize(
    ("changes", "unit"),
    [
        ({}, "nats/byte"),
        ({"data": {"vocabulary_size": 300}}, "nats/token"),
        ({"task": {"vocabulary": "own.json"}}, "nats/token"),
        ({"task": {"name": "clicks"}, "data": {}}, "nats/example"),
    ],
)
def test_losses_are_counted_in_what_is_predicted(corpus: Path, changes: dict[str, Any], unit: str) -> None:
    assert loss_unit_of(load(corpus.parent, **changes)) == unit


# --- unlabelled text ---------------------------------------------------------------------------------------------

UNLABELLED_ARMS = [
    {"name": "plain", "kind": "codistilled"},
    {"name": "further", "kind": "codistilled", "task": {"unlabelled_batch_size": 2}},
]


def test_a_share_of_the_text_is_for_arms_that_distil_on_it(corpus: Path, tmp_path: Path) -> None:
    data = {"paths": ["corpus"], "max_bytes_per_site": 5000, "max_held_out_bytes": 1000, "unlabelled": True}
    scenario = load(corpus.parent, data=data, arms=UNLABELLED_ARMS)
    text = split(scenario)
    assert text.unlabelled is not None and list(text.shards) == ["berlin", "tokyo"]
    parts = [
        {line.split()[1] for line in part.splitlines() if line.startswith(b"file ")}
        for part in (text.held_out, text.unlabelled, *text.shards.values())
    ]
    assert sum(map(len, parts)) == len(set().union(*parts)), "disjoint"
    folder = tmp_path / "run"
    folder.mkdir()
    text.write(folder)
    told = [task_of_site(scenario.of_arm(arm), ["berlin"], folder, folder) for arm in scenario.arms]
    unlabelled = folder / "data" / "unlabelled.txt"
    assert [task.unlabelled for task in told if isinstance(task, LanguageModelConfig)] == [(), (unlabelled,)]
    assert unlabelled.read_bytes() == text.unlabelled


def test_unlabelled_text_that_is_not_there_is_refused(corpus: Path) -> None:
    with pytest.raises(ConfigError, match=r"the arm 'further' has .*: set data\.unlabelled = true"):
        prepare_data(load(corpus.parent, arms=UNLABELLED_ARMS))
    for name in ("berlin", "tokyo"):
        (corpus.parent / f"{name}.txt").write_text(f"{name} says thing\n" * 400)
    sites = [{"name": name, "data": [f"{name}.txt"]} for name in ("berlin", "tokyo")]
    scenario = load(corpus.parent, sites=sites, data={"unlabelled": True})
    with pytest.raises(ConfigError, match=r"these have their own: list task\.unlabelled instead"):
        prepare_data(scenario)
