"""New machines with an old identity."""

from __future__ import annotations

from pathlib import Path

import tomli_w

from p2pcodistill.simulation.files import NodeFiles
from p2pcodistill.simulation.machines import add_impostor, replace_machine
from p2pcodistill.strict import load_toml


def make_place(folder: Path) -> NodeFiles:
    (folder / "nodes").mkdir()
    place = NodeFiles("tokyo", folder / "nodes" / "tokyo.toml", folder / "tokyo")
    place.run_folder.mkdir()
    table = {
        "name": "tokyo",
        "listen": "tcp://127.0.0.1:1",
        "run_folder": "../tokyo",
        "identity": "tokyo.key",
    }
    place.node_file.write_text(tomli_w.dumps(table))
    return place


def test_a_new_machine_has_an_empty_disk_and_the_simulation_its_logs(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    for name in ("store/frames", "training"):
        (place.run_folder / name).mkdir(parents=True)
        (place.run_folder / name / "something").write_text("old")
    (place.run_folder / "link").symlink_to(tmp_path / "gone")
    for path in (place.events, place.log, place.run_folder / "config.json"):
        path.write_text("old")
    replace_machine(place)
    assert sorted(place.run_folder.iterdir()) == sorted([place.events, place.log])
    assert place.node_file.exists()


def test_an_impostor_has_the_identity_and_nothing_else(tmp_path: Path) -> None:
    place = make_place(tmp_path)
    (place.run_folder / "store").mkdir()
    twin = add_impostor(place, port=7)
    ours, theirs = load_toml(place.node_file), load_toml(twin.node_file)
    assert theirs == ours | {"listen": "tcp://127.0.0.1:7", "run_folder": "../tokyo-impostor"}
    assert twin.node_file.parent == place.node_file.parent, "where the key lies"
    assert list(twin.run_folder.iterdir()) == []
    assert (twin.node_file.parent / theirs["run_folder"]).resolve() == twin.run_folder
