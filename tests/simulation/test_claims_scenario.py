"""A scenario with claims, from its file to the verdicts in its report."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import tomli_w

from p2pcodistill.errors import ConfigError
from p2pcodistill.report.arm_figures import read_predictions
from p2pcodistill.simulation.processes import simulate
from p2pcodistill.simulation.scenario import load_scenario

SCENARIO = {
    "name": "claims",
    "mode": "virtual",
    "seeds": [0, 1],
    "topology": "pair",
    "sites": [{"name": "berlin"}, {"name": "tokyo"}],
    "arms": [{"name": kind, "kind": kind} for kind in ("codistilled", "ensemble")],
    "data": {"max_bytes_per_site": 20_000, "max_held_out_bytes": 2_000},
    "task": {
        "name": "language-model",
        "embedding_size": 4,
        "hidden_size": 8,
        "num_layers": 1,
        "window_tokens": 8,
    },
    "training": {
        "num_steps": 20,
        "batch_size": 4,
        "precision": "float32",
        "evaluation_interval_steps": 10,
        "checkpoint_interval_steps": 20,
    },
    "codistillation": {"burn_in_steps": 5, "exchange_interval_steps": 5},
    "report": {"curves": ["steps", "bytes"], "bars": ["churn", "diversity"]},
    "claims": [
        {
            "text": "An ensemble <is> better",
            "source": "Everyone",
            "arm": "ensemble",
            "measure": "loss-difference",
            "against": ["codistilled"],
            "at_most": 0.0,
        },
        {"text": "It churns", "arm": "codistilled", "measure": "churn-ratio", "against": ["ensemble"]},
    ],
}


def test_claims_are_settled_in_the_report(tmp_path: Path) -> None:
    path = tmp_path / "claims.toml"
    path.write_text(tomli_w.dumps(SCENARIO))
    shown = io.StringIO()
    assert simulate(path, run_root=tmp_path / "runs", stream=shown) == 0
    folder = (tmp_path / "runs" / "latest").resolve()
    better, churns = json.loads((folder / "summary.json").read_text())["comparison"]["claims"]
    losses = {seed: final_losses(folder, seed) for seed in ("0", "1")}
    assert better["baseline"] == "codistilled"
    assert better["figures"] == pytest.approx(
        {seed: of["ensemble"] - of[better["baseline"]] for seed, of in losses.items()}
    )
    assert better["verdict"] in ("reproduced", "contradicted", "not at this scale")
    assert churns["verdict"] is None
    assert list(churns["figures"]) == ["0-1"]
    assert 0 < churns["figure"]["mean"] < 10
    page = (folder / "report.html").read_text()
    assert "An ensemble &lt;is&gt; better" in page
    assert "Arms side by side" in page
    assert "An ensemble <is> better (loss difference of ensemble" in (folder / "result.md").read_text()
    for name in ("loss-over-steps", "loss-over-bytes", "churn", "diversity"):
        assert (folder / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert "What was claimed, and what was seen" in shown.getvalue()
    predictions = read_predictions(folder / "codistilled-seed0" / "berlin" / "predictions.safetensors")
    assert predictions.probabilities_NC.sum(axis=1) == pytest.approx(1.0, abs=1e-5)


def final_losses(folder: Path, seed: str) -> dict[str, float]:
    """By arm, mean over its sites."""
    losses: dict[str, list[float]] = {}
    for log in folder.glob(f"*-seed{seed}/*/events.jsonl"):
        last = [
            record
            for line in log.read_text().splitlines()
            if (record := json.loads(line))["event"] == "evaluated"
        ][-1]
        losses.setdefault(log.parent.parent.name.removesuffix(f"-seed{seed}"), []).append(last["val_loss"])
    return {arm: sum(of) / len(of) for arm, of in losses.items()}


def test_a_claim_about_no_arm_is_refused_with_the_file(tmp_path: Path) -> None:
    path = tmp_path / "claims.toml"
    claims = [{"text": "It churns", "arm": "codistiled", "measure": "churn"}]
    path.write_text(tomli_w.dumps(SCENARIO | {"claims": claims}))
    with pytest.raises(
        ConfigError, match=r"claims\.toml: the claim 'It churns' speaks of 'codistiled', which is none"
    ):
        load_scenario(path)
    claims = [{"text": "It churns", "arm": "ensemble", "measure": "churning"}]
    path.write_text(tomli_w.dumps(SCENARIO | {"claims": claims}))
    with pytest.raises(ConfigError, match=r"claims\.0\.measure"):
        load_scenario(path)
