"""New machines with an identity that is in use: in the place of a site's old one, or beside it."""

from __future__ import annotations

import shutil

import tomli_w

from p2pcodistill.simulation.faults import impostor_of
from p2pcodistill.simulation.files import NodeFiles, loopback
from p2pcodistill.strict import load_toml


def replace_machine(place: NodeFiles) -> None:
    """Empty the disk of a site whose node is down, but for the logs from which the simulation knows what it did."""
    for path in place.run_folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path not in (place.events, place.log):
            path.unlink()


def add_impostor(place: NodeFiles, *, port: int) -> NodeFiles:
    """A machine that has the site's identity and configuration, an empty disk, and another port of loopback."""
    name = impostor_of(place.site)
    twin = NodeFiles(name, place.node_file.with_name(f"{name}.toml"), place.run_folder.with_name(name))
    table = load_toml(place.node_file) | {"listen": loopback(port), "run_folder": f"../{name}"}
    twin.node_file.write_text(tomli_w.dumps(table))
    twin.run_folder.mkdir()
    return twin
