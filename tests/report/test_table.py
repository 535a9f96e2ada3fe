from __future__ import annotations

import io
from dataclasses import replace

import pytest
from rich.console import Console

from p2pcodistill.report.summary import summarise
from p2pcodistill.report.table import headline, table


def test_the_headline_of_a_good_run(make_arms):
    assert headline(summarise("pair", make_arms(), 2000)) == (
        "Held-out losses end, in nats/byte: codistilled sites at 1.485, sites alone at 1.601, one site with all data pooled "
        "at 1.479. 95 % of the gap between alone and pooled is closed, without moving a byte of training data. "
        "The lone sites' final loss is reached after 0.65 of the steps. Training took 1.33 times as long as "
        "alone. Checkpoints travelled 1.0 times smaller than as raw fp16."
    )


def test_the_headline_of_nothing():
    assert "nothing to compare" in headline(summarise("pair", [], 100))


def rendered(summary, width: int = 100) -> list[str]:
    console = Console(width=width, file=io.StringIO())
    with console.capture() as capture:
        console.print(table(summary))
    return capture.get().splitlines()


@pytest.mark.parametrize("seeds", [(0,), (0, 1)])
def test_the_table_is_legible_at_100_columns(make_arms, seeds):
    lines = rendered(summarise("pair", make_arms(seeds=seeds), 2000))
    assert max(map(len, lines)) <= 100
    assert not any("…" in line for line in lines)
    text = "\n".join(lines)
    assert "1.473" in text and "64.5 MB" in text and "95" in text
    assert sum("berlin" in line for line in lines) == 2 * len(seeds)


def test_the_table_marks_what_did_not_finish(make_arms):
    arms = make_arms()
    history = arms[1].sites["tokyo"]
    history.finished, history.evaluations = False, history.evaluations[:3]
    text = "\n".join(rendered(summarise("pair", arms, 2000)))
    assert "tokyo*" in text and "* did not finish" in text


def test_further_codistilled_arms_are_told_behind_the_first(make_arms):
    first, other = make_arms(), make_arms(kinds=("codistilled",))[0]
    for history in other.sites.values():
        history.evaluations = [(step, loss - 0.061) for step, loss in history.evaluations]
        history.fetched = {}
    arms = [*first, replace(other, name="exact")]
    summary = summarise("pair", arms, 2000)
    told = headline(summary)
    assert told.startswith(headline(summarise("pair", first, 2000)))
    assert told.endswith("The arm exact: at 1.424, 145 % of the gap closed, 0.56 of the steps.")
    assert sum("exact" in line for line in rendered(summary)) >= 1
    other.sites["tokyo"].finished, other.sites["tokyo"].evaluations = False, []
    assert headline(summarise("pair", arms, 2000)).endswith("The arm exact did not finish.")
