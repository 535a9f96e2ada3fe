"""The command line: help, version, keygen, and a clear line with status 2 for everything a user can get wrong."""

import socket
import stat
import subprocess
import sys

import pytest
import tomli_w
from patience import GENEROUS_S

from p2pcodistill.cli import main
from p2pcodistill.identity import Identity, PublicIdentity


def run(*arguments, cwd=None):
    return subprocess.run(
        [sys.executable, "-m", "p2pcodistill", *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=cwd,
        timeout=GENEROUS_S,
    )


def assert_one_line(result, *expected):
    assert result.returncode == 2, result
    assert result.stderr.startswith("p2pcodistill: ") and result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    for text in expected:
        assert text in result.stderr


@pytest.fixture
def folder(tmp_path):
    """A folder with an identity for berlin, a public one for tokyo, and a node file of the two."""
    identity = Identity.from_secrets(b"b" * 32, b"c" * 32)
    identity.save(tmp_path / "berlin.key")
    table = {
        "name": "berlin",
        "listen": "tcp://127.0.0.1:0",
        "peers": [{"name": "tokyo", "public_identity": str(Identity.generate().public)}],
    }
    (tmp_path / "berlin.toml").write_text(tomli_w.dumps(table))
    return tmp_path


def test_help_and_version_are_for_strangers(capsys):
    commands = (
        [],
        ["node"],
        ["simulate"],
        ["keygen"],
        ["frame"],
        ["frame", "inspect"],
        ["frame", "decode"],
        ["topology"],
        ["report"],
        ["vocabulary", "train"],
    )
    for arguments in ([*command, "--help"] for command in commands):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "--peers" in shown and "simulations/pair.toml" in shown and "PUBLIC-IDENTITY" in shown
    assert "frame decode runs/run-berlin --origin tokyo" in shown
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out.startswith("p2pcodistill 0.")


def test_windows_is_refused_by_name(monkeypatch, capsys):
    monkeypatch.setattr(sys, "platform", "win32")
    assert main(["keygen", "berlin"]) == 2
    assert "Windows is not supported" in capsys.readouterr().err


def test_keygen_writes_a_private_file_and_prints_only_the_public_identity(tmp_path):
    result = run("keygen", "berlin", cwd=tmp_path)
    assert result.returncode == 0
    path = tmp_path / "berlin.key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert PublicIdentity.parse(result.stdout) == Identity.load(path).public
    before = path.read_bytes()
    assert_one_line(run("keygen", "berlin", cwd=tmp_path), "berlin.key exists already")
    assert path.read_bytes() == before
    assert_one_line(run("keygen", "a b", cwd=tmp_path), "cannot name a site")


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--set", "trainig.num_steps=3"], ["unknown key 'trainig'", "did you mean 'training'"]),
        (["--set", "training.num_steps=none"], ["training.num_steps", "'none'"]),
        (["--set", "nonsense"], ["KEY=VALUE"]),
        (["--topology", "rign"], ["unknown topology 'rign'", "ring"]),
        (["--topology", "graph.gml"], ["no topology file", "graph.gml"]),
        (["--peers", "tokyo"], ["--peers", "NAME=tcp://HOST:PORT#PUBLIC-IDENTITY"]),
        (["--peers", "tokyo=tcp://t:5600#p2p1-AAAA"], ["--peers tokyo", "copy it again"]),
        (["--peers"], []),
        (["--identity", "nobody.key"], ["no identity file", "p2pcodistill keygen nobody"]),
        (["--listen", "5600"], ["5600", "tcp://"]),
        (["--listen", "udp://127.0.0.1:5600"], ["udp://127.0.0.1:5600"]),
        (["--task", "vision"], ["task.name", "vision"]),
        (["--data", "missing-corpus"], ["missing-corpus"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_flags_that_make_no_sense(folder, flags, expected):
    result = run("node", "berlin.toml", *flags, cwd=folder)
    if flags == ["--peers"]:  # argparse's own message
        assert result.returncode == 2 and "expected at least one argument" in result.stderr
    else:
        assert_one_line(result, *expected)
    assert not (folder / "runs").exists()


def test_files_that_make_no_sense(folder):
    assert_one_line(run("node", "missing.toml", cwd=folder), "no such file: missing.toml")
    (folder / "broken.toml").write_text("name = \n")
    assert_one_line(run("node", "broken.toml", cwd=folder), "broken.toml is not valid TOML")
    assert_one_line(run("node", cwd=folder), "a node needs a name")
    assert_one_line(run("simulate", "missing.toml", cwd=folder), "missing.toml")
    (folder / "few.toml").write_text('name = "few"\nmode = "virtual"\ntopology = "ring:4"\n[synthetic]\n')
    assert_one_line(run("simulate", "--namespaces", "few.toml", cwd=folder), 'mode = "processes"')


def test_graphs_that_do_not_fit_the_members(folder):
    (folder / "g.edgelist").write_text("berlin tokyo\nberlin berlin\n")
    assert_one_line(run("node", "berlin.toml", "--topology", "g.edgelist", cwd=folder), "berlin", "self-loop")
    (folder / "g.edgelist").write_text("berlin lima\n")
    assert_one_line(
        run("node", "berlin.toml", "--topology", "g.edgelist", cwd=folder), "'lima' is not a member"
    )
    (folder / "g.gml").write_text('graph [ node [ id 0 label "berlin" ] node [ id 1 label "tokyo" ] ]')
    assert_one_line(run("node", "berlin.toml", "--topology", "g.gml", cwd=folder), "tokyo cannot be reached")


def test_an_exposed_identity_is_refused(folder):
    (folder / "berlin.key").chmod(0o644)
    assert_one_line(run("node", "berlin.toml", cwd=folder), "others can read", "chmod 600")


def test_a_port_in_use_is_named(folder):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        assert_one_line(run("node", "berlin.toml", "--listen", address, cwd=folder), address, "in use")


def test_a_run_folder_of_another_configuration_is_not_touched(folder):
    run_folder = folder / "runs" / "run-berlin"
    run_folder.mkdir(parents=True)
    (run_folder / "config.json").write_text('{"run": "run", "name": "lima"}')
    assert_one_line(run("node", "berlin.toml", cwd=folder), "another configuration", "name was 'lima'")
    assert (run_folder / "config.json").read_text() == '{"run": "run", "name": "lima"}'


@pytest.mark.parametrize(("content", "expected"), [("", "empty"), ("too small\n", "bytes")])
def test_data_that_is_empty_or_too_small_is_named_before_anything_starts(folder, content, expected):
    (folder / "corpus.txt").write_text(content)
    result = run("node", "berlin.toml", "--data", "corpus.txt", cwd=folder)
    assert_one_line(result, "corpus.txt", expected)
