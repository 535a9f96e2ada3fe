"""`p2pcodistill report` on real small runs: one, several, those that cannot be compared, and folders that are no runs."""

from __future__ import annotations

import io
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from p2pcodistill.cli import main
from p2pcodistill.config import NodeConfig
from p2pcodistill.errors import ConfigError, RunFolderError
from p2pcodistill.runfolder import RunFolder
from p2pcodistill.simulation import run_record
from p2pcodistill.simulation.processes import simulate
from p2pcodistill.simulation.recorded import load_recorded_scenario
from p2pcodistill.simulation.reporting import report_runs
from p2pcodistill.site_plan import SitePlan
from p2pcodistill.strict import load_toml, parse_model

NUM_STEPS = 20
SCENARIO: dict[str, Any] = {
    "name": "small",
    "mode": "virtual",
    "seeds": [0, 1],
    "topology": "pair",
    "sites": [{"name": "berlin"}, {"name": "tokyo"}],
    "arms": [
        {"name": "codistilled", "kind": "codistilled"},
        {"name": "lone", "kind": "alone", "num_sites": 1},
    ],
    "data": {"max_bytes_per_site": 20_000, "max_held_out_bytes": 2_000},
    "task": {"embedding_size": 4, "hidden_size": 8, "num_layers": 1, "window_tokens": 8},
    "training": {
        "num_steps": NUM_STEPS,
        "batch_size": 4,
        "precision": "float32",
        "evaluation_interval_steps": 5,
        "checkpoint_interval_steps": NUM_STEPS,
    },
    "codistillation": {"burn_in_steps": 5, "exchange_interval_steps": 5},
}


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Run folders: `both`, with two seeds; `wide`, another model under one seed; `elsewhere`, other held-out text."""
    root = tmp_path_factory.mktemp("originals")
    changes: dict[str, dict[str, Any]] = {
        "both": {},
        "wide": {
            "seeds": [1],
            "task": SCENARIO["task"] | {"hidden_size": 12},
            "training": SCENARIO["training"] | {"num_steps": 15},
        },
        "elsewhere": {
            "name": "elsewhere",
            "seeds": [0],
            "arms": SCENARIO["arms"][1:],
            "data": SCENARIO["data"] | {"max_held_out_bytes": 1_000},
        },
    }
    folders = {}
    for name, change in changes.items():
        file = root / f"{name}.toml"
        file.write_text(tomli_w.dumps(SCENARIO | change))
        assert simulate(file, run_root=root / name, stream=io.StringIO()) == 0
        folders[name] = (root / name / "latest").resolve()
    return folders


@pytest.fixture
def runs(originals: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies of them, in folders of their name."""
    return {
        name: Path(shutil.copytree(folder, tmp_path / "runs" / name)) for name, folder in originals.items()
    }


def told(*runs: object, **options: Any) -> str:
    stream = io.StringIO()
    assert report_runs([str(run) for run in runs], stream=stream, **options) == 0
    return stream.getvalue()


def final_losses(folder: Path, arm: str, site: str = "*") -> dict[int, float]:
    """By seed, of a site or mean over all, from the logs."""
    losses: dict[int, list[float]] = {}
    for log in folder.glob(f"{arm}-seed*/{site}/events.jsonl"):
        records = [json.loads(line) for line in log.read_text().splitlines()]
        seed = int(log.parent.parent.name.rpartition("seed")[2])
        losses.setdefault(seed, []).append([r for r in records if r["event"] == "evaluated"][-1]["val_loss"])
    return {seed: sum(of) / len(of) for seed, of in losses.items()}


def stop_half_way(folder: Path) -> None:
    """As a run of which one arm has not begun under the second seed, and the other has got to step 10."""
    shutil.rmtree(folder / "lone-seed1")
    for log in (folder / "codistilled-seed1").glob("*/events.jsonl"):
        lines = log.read_text().splitlines(keepends=True)
        end = next(
            i for i, line in enumerate(lines) if '"evaluated"' in line and json.loads(line)["step"] > 10
        )
        log.write_text("".join(lines[:end]))
    for name in ("summary.json", "report.html"):
        (folder / name).unlink()


# --- one run -----------------------------------------------------------------------------------------------------


def test_a_run_is_reported_again_as_it_was(runs: dict[str, Path]) -> None:
    before = {name: (runs["both"] / name).read_text() for name in ("summary.json", "report.html")}
    for name in before:
        (runs["both"] / name).unlink()
    shown = told(runs["both"])
    assert "small: 20 steps" in shown and f"report:  {runs['both'] / 'report.html'}" in shown
    assert {name: (runs["both"] / name).read_text() for name in before} == before
    assert json.loads((runs["both"] / "run.json").read_text())["made_with"]["torch"] in before["report.html"]


def test_a_run_that_went_on_with_another_version_says_so(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    made_with = run_record.read_run_record(runs["both"])
    for release in ("1.0", "1.0", "2.0"):
        now = {**made_with, "torch": release}
        monkeypatch.setattr(run_record, "versions", lambda _, now=now: now)
        run_record.note_start(runs["both"], 2)
    line = f"went on with something else than it began with: torch {made_with['torch']}, then 1.0, then 2.0"
    assert line in told(runs["both"]).splitlines()
    assert line in (runs["both"] / "report.html").read_text()


def test_a_run_that_was_stopped_is_reported_as_far_as_it_went(runs: dict[str, Path], tmp_path: Path) -> None:
    stop_half_way(runs["both"])
    out = tmp_path / "told"
    told(runs["both"], out=out, baseline="lone")
    assert not (out / "result.md").exists(), "there is no result yet"
    shown = told(runs["both"], out=out)
    assert "lone, seed 1: not begun\n" in shown
    assert "codistilled, seed 1: not finished, at step 10 of 20\n" in shown
    assert "berlin*" in shown, "it is marked in the table"
    summary = json.loads((out / "summary.json").read_text())
    assert summary["notes"][0] == "lone, seed 1: not begun"
    assert [(arm["name"], arm["seed"]) for arm in summary["arms"]] == [
        ("codistilled", 0),
        ("lone", 0),
        ("codistilled", 1),
    ]
    assert "lone, seed 1: not begun" in (out / "report.html").read_text()
    assert not (runs["both"] / "summary.json").exists()


def test_claims_about_arms_that_have_not_finished_cannot_be_told(runs: dict[str, Path]) -> None:
    claim = {"text": "It helps", "arm": "codistilled", "measure": "steps-ratio", "against": ["lone"]}
    table = load_toml(runs["both"] / "scenario.toml") | {"claims": [claim]}
    (runs["both"] / "scenario.toml").write_text(tomli_w.dumps(table))
    shutil.rmtree(runs["both"] / "lone-seed1")
    told(runs["both"])
    record = json.loads((runs["both"] / "summary.json").read_text())
    (settled,) = record["comparison"]["claims"]
    assert settled["why"] == "lone has finished under other seeds than codistilled"


def test_with_a_baseline_the_arms_of_one_run_are_compared(runs: dict[str, Path]) -> None:
    shown = told(runs["both"], baseline="lone")
    ours, theirs = (final_losses(runs["both"], arm, "berlin") for arm in ("codistilled", "lone"))
    rows = json.loads((runs["both"] / "summary.json").read_text())["comparison"]["arms"]
    assert rows[0]["difference"]["mean"] == pytest.approx(sum(ours[s] - theirs[s] for s in (0, 1)) / 2)
    assert "minus lone" in shown and "(1 of its sites)" in shown, "the lone arm has no other"
    assert "minus lone" in (runs["both"] / "result.md").read_text()
    assert (runs["both"] / "loss-over-bytes.png").read_bytes().startswith(b"\x89PNG")


def site_run(run: Path, tmp_path: Path, seed: int = 0) -> Path:
    """What a node would have left that trained as berlin did in `run`."""
    arm = run / f"codistilled-seed{seed}"
    config = parse_model(NodeConfig, load_toml(arm / "nodes" / "berlin.toml"), source="berlin.toml")
    RunFolder(arm / "berlin", SitePlan(config, base_folder=arm / "nodes").describe()).close()
    return Path(shutil.copytree(arm / "berlin", tmp_path / f"run-berlin-{seed}"))


def test_the_run_of_a_single_site_is_reported(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = site_run(runs["both"], tmp_path)
    shown = told(folder)
    summary = json.loads((folder / "summary.json").read_text())
    final = summary["arms"][0]["sites"]["berlin"]["final_val_loss"]
    assert f"The held-out loss of berlin is {final:.3f} nats/byte in the end." in " ".join(shown.split())
    assert summary["notes"] == []
    assert "hidden_size" in (folder / "report.html").read_text()
    # A site of one run, and another of a simulation: the same text, of which only predictions tell.
    comparison = told(folder, site_run(runs["both"], tmp_path, seed=1), runs["both"], out=tmp_path / "out")
    assert "run-berlin-0" in comparison and "run-berlin-1" in comparison and "small: lone" in comparison
    record = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert len(record["groups"]) == 1
    assert any("No seed is common to run-berlin-1 and run-berlin-0" in note for note in record["notes"])


# --- several -----------------------------------------------------------------------------------------------------


def test_runs_are_compared_seed_by_seed(runs: dict[str, Path], tmp_path: Path) -> None:
    shown = told(f"narrow={runs['both']}", runs["wide"], baseline="narrow:codistilled")
    (out,) = (tmp_path / "runs").glob("comparison-*")
    record = json.loads((out / "summary.json").read_text())
    rows = {row["name"]: row for row in record["groups"][0]["comparison"]["arms"]}
    assert list(rows) == ["narrow: codistilled", "narrow: lone", "small: codistilled", "small: lone"]
    ours, theirs = final_losses(runs["wide"], "codistilled"), final_losses(runs["both"], "codistilled")
    assert rows["small: codistilled"]["difference"]["mean"] == pytest.approx(ours[1] - theirs[1])
    assert rows["narrow: lone"]["difference"]["num"] == 2
    assert record["differing_settings"]["task.hidden_size"] == ["8", "12"]
    notes = " ".join(record["notes"])
    assert "different models: task.hidden_size is 12 and 8" in notes
    assert "different numbers of steps, 15 and 20" in notes
    assert "seeds" in shown and "minus" in shown and "baseline" in shown
    page = (out / "report.html").read_text()
    assert "http" not in re.sub(
        r'xmlns(:\w+)?="[^"]*"', "", page.split("</style>", 1)[1].split("<details>")[0]
    )
    markdown = (out / "result.md").read_text()
    for text in ("small: codistilled", "task.hidden_size", "different models"):
        assert text in page and text in markdown
    for axis in ("steps", "seconds", "bytes"):
        assert (out / f"loss-over-{axis}.png").read_bytes().startswith(b"\x89PNG")


def test_runs_on_other_held_out_data_are_shown_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    out = tmp_path / "out"
    shown = told(f"a={runs['both']}", runs["elsewhere"], f"b={runs['wide']}", out=out)
    record = json.loads((out / "summary.json").read_text())
    assert [group["runs"] for group in record["groups"]] == [["a", "b"], ["elsewhere"]]
    assert "elsewhere is shown apart from a, and not compared with it" in shown
    assert "different held-out data" in shown
    assert [group["comparison"]["baseline"] for group in record["groups"]] == ["a: lone", "elsewhere"]
    assert (out / "loss-over-steps-2.png").exists()


def test_what_has_not_finished_is_compared_with_nothing(runs: dict[str, Path], tmp_path: Path) -> None:
    stop_half_way(runs["both"])
    shutil.rmtree(runs["both"] / "codistilled-seed0")
    shown = told(f"a={runs['wide']}", f"b={runs['both']}", out=tmp_path / "out")
    record = json.loads((tmp_path / "out" / "summary.json").read_text())
    rows = {row["name"]: row for row in record["groups"][0]["comparison"]["arms"]}
    assert rows["b: codistilled"] | {"is_finished": False, "difference": None} == rows["b: codistilled"]
    assert rows["b: codistilled"]["num_steps"] == 10
    assert "* not finished" in shown
    assert "b: codistilled, seed 0: not begun." in shown
    assert "No seed is common to b: lone and a: lone" in shown


# --- what cannot be reported -------------------------------------------------------------------------------------


def test_folders_that_are_no_runs_are_refused_with_advice(
    runs: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    part = runs["both"] / "codistilled-seed0" / "berlin"
    expected = {
        tmp_path / "missing": "no such run folder",
        tmp_path / "empty": "is no run folder",
        part: f"is a part of a run: report on the whole of it, {runs['both']}",
    }
    for folder, text in expected.items():
        assert main(["report", str(folder)]) == 2
        error = capsys.readouterr().err
        assert text in error and error.count("\n") == 1, error


def test_a_run_of_another_format_or_version_is_refused(runs: dict[str, Path]) -> None:
    record = json.loads((runs["both"] / "run.json").read_text())
    (runs["both"] / "run.json").write_text(json.dumps(record | {"format": 99}))
    with pytest.raises(
        RunFolderError, match=r"of format 99, .* reads format 1: use the version that made it, "
    ):
        told(runs["both"])
    (runs["both"] / "run.json").write_text("{")
    with pytest.raises(RunFolderError, match=r"run\.json is damaged"):
        told(runs["both"])
    (runs["both"] / "run.json").unlink()
    assert load_recorded_scenario(runs["both"]).name == "small", "it is of before there were any"
    scenario = runs["both"] / "scenario.toml"
    scenario.write_text("gravity = 9.81\n" + scenario.read_text())
    with pytest.raises(RunFolderError, match=r"another version has written.*unknown key 'gravity'"):
        told(runs["both"])


def test_a_site_of_another_version_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = site_run(runs["both"], tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"gravity": 9.81}))
    with pytest.raises(RunFolderError, match="another version has written"):
        told(folder)
    (folder / "config.json").write_text("[")
    with pytest.raises(RunFolderError, match="or which is damaged"):
        told(folder)


def test_a_run_without_evaluations_says_when_the_first_comes(runs: dict[str, Path], tmp_path: Path) -> None:
    folder = site_run(runs["both"], tmp_path)
    for log in (*runs["both"].glob("*/*/events.jsonl"), folder / "events.jsonl"):
        log.unlink()
    for run in (runs["both"], folder):
        with pytest.raises(RunFolderError, match=r"nothing .* evaluated yet: wait for step 5, the first"):
            told(run)
    with pytest.raises(RunFolderError, match="evaluated yet"):
        told(f"a={runs['both']}", runs["elsewhere"])


def test_a_run_that_still_searches_is_refused(runs: dict[str, Path]) -> None:
    search = {"grid": [{"key": "training.learning_rate", "values": [0.1, 0.2]}]}
    table = load_toml(runs["both"] / "scenario.toml") | {"search": search}
    (runs["both"] / "scenario.toml").write_text(tomli_w.dumps(table))
    with pytest.raises(RunFolderError, match=r"still to be searched.*report on its trials, .*search"):
        told(runs["both"])


def test_a_run_without_training_is_compared_with_nothing(runs: dict[str, Path]) -> None:
    table = {"name": "pretended", "mode": "virtual", "topology": "ring:4", "synthetic": {}}
    (runs["both"] / "scenario.toml").write_text(tomli_w.dumps(table))
    with pytest.raises(RunFolderError, match="without training"):
        told(runs["both"], runs["wide"])
    with pytest.raises(RunFolderError, match="has finished yet"):
        told(runs["both"])


@pytest.mark.parametrize(
    ("names", "options", "expected"),
    [
        (("x={both}", "x={wide}"), {}, r"two runs are called 'x': name them, as in mine="),
        (("{both}", "{both}"), {}, r"two runs are called 'both'"),
        (
            ("{both}", "{elsewhere}"),
            {"baseline": "smal"},
            r"none of the runs: .*RUN:ARM, of small, elsewhere",
        ),
        (("{both}", "{elsewhere}"), {"baseline": "small:loan"}, r"the arms of small are codistilled, lone"),
        (("{both}",), {"baseline": "loan"}, r"no figures of an arm 'loan'.*codistilled, lone"),
        (("{both}",), {"baseline": "large:lone"}, r"it takes an ARM of it"),
        (("{both}", "{elsewhere}"), {"out": "elsewhere"}, r"is a run folder, whose own report would be lost"),
    ],
)
def test_what_makes_no_sense_is_refused(
    runs: dict[str, Path], names: tuple[str, ...], options: dict[str, str], expected: str
) -> None:
    given: dict[str, Any] = dict(options)
    if "out" in given:
        given["out"] = runs[given["out"]]
    with pytest.raises((ConfigError, RunFolderError), match=expected):
        told(*(name.format(**runs) for name in names), **given)
