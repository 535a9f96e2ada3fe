"""The outcome of a comparison in words: nothing is rounded away, nothing is left out."""

from __future__ import annotations

import io
import json
import math

from rich.console import Console

from p2pcodistill.report.arm_figures import ArmFigures, Point
from p2pcodistill.report.claim_config import ClaimConfig
from p2pcodistill.report.comparison import Comparison, arms_table, claims_table, compare, markdown


def arm(name: str, *losses: float, num_bytes: int = 0) -> ArmFigures:
    curves = {
        seed: [Point(50, 9.0, 5.0, 0, {}), Point(100, loss, 10.0, num_bytes, {})]
        for seed, loss in enumerate(losses)
    }
    return ArmFigures(name, "alone", curves, {seed: {} for seed in curves})


CLAIMS = [
    ClaimConfig(
        text="It is better | much",
        source="Them, Fig. 1",
        arm="ours",
        measure="loss-difference",
        against=("theirs", "third"),
        at_most=-0.5,
    ),
    ClaimConfig(
        text="It is quick",
        arm="third",
        measure="steps-ratio",
        against=("ours",),
        at_most=0.5,
        beyond_spread=True,
    ),
    ClaimConfig(text="It is calm", arm="ours", measure="churn"),
]


def example() -> Comparison:
    arms = [arm("ours", 1.0, 1.2, num_bytes=2_500_000), arm("theirs", 2.0, 2.0), arm("third", 3.0, math.nan)]
    return compare({of.name: of for of in arms}, CLAIMS)


def test_differences_are_to_the_strongest_of_those_that_claims_name() -> None:
    comparison = example()
    assert comparison.baseline == "ours", "the second claim compares with it"
    differences = {row.name: row.difference for row in comparison.rows}
    assert differences["ours"] is None
    assert differences["theirs"] is not None
    assert round(differences["theirs"].mean, 6) == 0.9
    assert differences["third"] is None, "it diverged under a seed"


def test_a_terminal_shows_all_of_it() -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=120)
    console.print(claims_table(example()), arms_table(example()))
    shown = stream.getvalue()
    for text in (
        "It is better",
        "-0.900 ± 0.100",
        "at most -0.5",
        "reproduced",
        "cannot be told",
        "2.5 MB",
        "minus ours",
    ):
        assert text in shown, shown


def test_markdown_is_whole_tables() -> None:
    text = markdown(example(), heading="`pair`", facts=["two seeds", "3 min"])
    assert text.startswith("## `pair`\n\n- two seeds\n- 3 min\n")
    claims, arms = (part.splitlines() for part in text.split("\n\n")[2:4])
    assert [line.replace("\\|", "").count("|") for line in claims] == [6] * 5
    assert [line.count("|") for line in arms] == [7] * 5
    assert "It is better \\| much (loss difference of ours against theirs)" in text
    assert "| Them, Fig. 1 |" in text


def test_the_record_is_json() -> None:
    record = json.loads(json.dumps(example().to_record(), allow_nan=False))
    assert [claim["verdict"] for claim in record["claims"]] == ["reproduced", "contradicted", None]
    assert record["claims"][1]["never"] == ["0", "1"], "one diverged, the other ended too high"
    assert record["claims"][2]["why"] == "ours has left no predictions to compare"
    assert record["arms"][2]["final_loss"] is None
