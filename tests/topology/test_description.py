"""`p2pcodistill topology`: figures against numbers worked out by hand, and one line for whatever makes no sense."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from p2pcodistill import cli
from p2pcodistill.topology.build import build_topology, default_members
from p2pcodistill.topology.density import CODEC_BITS
from p2pcodistill.topology.description import Assumptions, figures

WIDE_AREA = str(Path(__file__).parents[2] / "topologies" / "three-continents.json")


@pytest.fixture
def show(capsys):
    """Runs `p2pcodistill topology` with arguments; returns status, output, errors."""

    def run(*arguments):
        status = cli.main(["topology", *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def rows(output):
    """The lines below the first as {name: value}."""
    return dict(line.strip().split("  ", 1) for line in output.splitlines()[1:] if "  " in line.strip())


def test_a_ring_of_eight(show):
    status, output, _ = show("ring:8", "--parameters", 100e6, "--codec", "fp16", "--exchange-interval-s", 60)
    assert status == 0 and output.splitlines()[0] == "ring:8"
    shown = {name: value.strip() for name, value in rows(output).items()}
    assert (
        shown
        == {
            "sites": "8",
            "edges, teacher -> student": "16",
            "teachers of a site": "2",
            "students of a site": "2",
            "diameter": "4 hops",
            "spectral gap": "0.195",
            "knowledge reaches everyone": "after 4 exchanges, mean 2.3",  # (1 + 1 + 2 + 2 + 3 + 3 + 4) / 7
            "that is": "4 min, at 60 s an exchange",
            "a checkpoint": "200 MB: 100 M parameters at 16 bits",
            "upload a site and exchange": "400 MB",
            "download a site and exchange": "400 MB",
            "fp32 ring all-reduce": "420 GB each way in these 600 steps, 1,050 times as much",  # 2 * 7 / 8 * 400 MB * 600
            "teachers' forward passes": "+67% of a training step, a third for each teacher",
            "teachers' copies in memory": "2",
        }
    )


def test_a_schedule_costs_compute_for_one_teacher_and_bytes_for_all(show):
    shown = rows(show("one-peer-exponential", "-n", 16, "--bits", 1, "--parameters", 8e6)[1])
    told = {name: value.strip() for name, value in shown.items()}
    assert told["schedule"] == "repeats after 4 exchanges"
    assert (told["teachers at a time"], told["teachers of a site"]) == ("1", "4")
    assert told["spectral gap an exchange"] == "1.000: averages are exact within a period"
    assert told["knowledge reaches everyone"].startswith("after 4 exchanges")
    assert told["download a site and exchange"] == "4 MB"
    assert told["teachers' forward passes"].startswith("+33% of a training step")
    assert told["teachers' copies in memory"] == "4"


def test_figures_of_a_wide_area_file():
    assumptions = Assumptions(num_parameters=100e6, bits=0.8, exchange_interval_s=5.0)  # 10 MB a checkpoint
    facts = figures(build_topology(WIDE_AREA, default_members(WIDE_AREA)), assumptions)
    assert facts["checkpoint_bytes"] == 10e6
    assert facts["slowest_link"] == {"from": "mumbai", "to": "berlin", "checkpoint_s": pytest.approx(8.06)}
    assert facts["upload_bytes"] == {"least": 10e6, "mean": 20e6, "most": 30e6}
    # From montreal to mumbai, by virginia, oregon, tokyo and singapore: 5 s at each site, 80 Mbit over each link, its delay.
    links_s = [80 / 1000 + 0.008, 80 / 1000 + 0.033, 80 / 50 + 0.050, 80 / 500 + 0.035, 80 / 200 + 0.030]
    assert facts["spread_s"] == pytest.approx(5 * 5 + sum(links_s))
    assert facts["spread_exchanges"] == 5


def test_a_link_that_is_slower_than_the_interval_is_told(show):
    assert "longer than an exchange interval, so its student lags" in show(WIDE_AREA)[1]
    assert "longer than" not in show(WIDE_AREA, "--exchange-interval-s", 600)[1]


def test_knowledge_that_cannot_reach_everyone(show, tmp_path):
    (tmp_path / "g.edgelist").write_text("teacher student\n")
    output = show(tmp_path / "g.edgelist")[1]
    assert "never: teacher learns nothing of student" in output and "none: some sites cannot learn" in output
    facts = json.loads(show(tmp_path / "g.edgelist", "--json")[1])
    assert (facts["diameter_hops"], facts["spread_exchanges"], facts["spread_s"]) == (None, None, None)
    assert facts["cut_off"] == {"origin": "student", "never_reached": "teacher"}


def test_json_has_all_figures(show):
    status, output, _ = show("star", "--members", "hub,a,b,c,d", "--json", "--bits", 2, "--parameters", 4e6)
    facts = json.loads(output)
    assert status == 0 and facts["topology"] == "star"
    assert (facts["num_sites"], facts["num_edges"], facts["diameter_hops"]) == (5, 8, 2)
    assert facts["students"] == {"least": 1, "mean": 1.6, "most": 4}
    assert facts["upload_bytes"]["most"] == 4e6 and facts["teacher_compute_ratio"]["most"] == pytest.approx(
        4 / 3
    )
    assert facts["spread_s"] == 10.0 and facts["slowest_link"] is None


@pytest.mark.parametrize("spec", ["random-matching", "full", "line", "hypercube"])
def test_two_sites_and_one(show, spec):
    assert show(spec, "-n", 2)[0] == show(spec, "-n", 1)[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["ring"], "ring takes any number of sites: say how many with -n 8, or who with --members a,b,c"),
        (["ring:8", "-n", "7"], "'ring:8' is for 8 sites, this run has 7"),
        (["rign:8"], "did you mean 'ring'?"),
        (["ring", "-n", "0"], "-n must be from 1 to 10,000, not 0"),
        (["ring", "--members", "a,b c"], "'b c' cannot name a site"),
        (["ring", "--members", "a,b,a"], "'a' is listed twice"),
        (["ring:8", "--parameters", "-3"], "--parameters must be a number above 0, not -3"),
        (["ring:8", "--bits", "nan"], "--bits must be a number above 0, not nan"),
        (["ring:8", "--step-s", "0"], "--step-s must be a number above 0"),
        (["ring:8", "--exchange-interval-s", "inf"], "--exchange-interval-s must be a number above 0"),
        (["ring:8", "--exchange-interval-steps", "0"], "--exchange-interval-steps must be a number above 0"),
        (["ring:8", "--draw", "ring.bmp"], "--draw ring.bmp: name a file that ends in .png, .svg, .pdf"),
        (["ring:8", "--draw", "no-folder/ring.png"], "no-folder/ring.png: No such file"),
        (["gone.json"], "no topology file gone.json"),
    ],
)
def test_what_makes_no_sense_is_one_line(show, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    status, output, errors = show(*arguments)
    assert (status, output, errors.count("\n")) == (2, "", 1)
    assert message in errors


def test_the_help_offers_the_codecs_that_there_are():
    commands = next(a for a in cli._parser()._actions if isinstance(a, argparse._SubParsersAction))
    codec = next(a for a in commands.choices["topology"]._actions if a.dest == "codec")
    assert list(codec.choices) == list(CODEC_BITS)


def test_a_reader_may_stop_reading(tmp_path):
    command = f"{sys.executable} -m p2pcodistill topology ring:8 | true; echo ${{PIPESTATUS[0]}}"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, cwd=tmp_path)
    assert result.stdout.strip() in ("0", "141") and result.stderr == ""
