"""What a site's store must hold when its node has ended, whatever happened to it: all that its events told of, and whole."""

from __future__ import annotations

import json
import os
import tomllib
from pathlib import Path

from p2pcodistill.checkpoint.store import FrameStore
from p2pcodistill.config import NodeConfig
from p2pcodistill.identity import Identity
from p2pcodistill.strict import parse_model


def require_whole_store(node_file: Path, run_folder: Path) -> None:
    """Assert that no frame of the site is damaged, and no version lost that it told of having stored."""
    config = parse_model(NodeConfig, tomllib.loads(node_file.read_text()), source=str(node_file))
    identity = Identity.load(node_file.parent / (config.identity or f"{config.name}.key"))
    keys = {peer.name: peer.identity for peer in config.peers} | {config.name: identity.public}
    folder = run_folder / "store"
    on_disk = {path.stem for path in (folder / "frames").glob("*.frame")}
    for path in (folder / "frames").glob("*.frame"):
        os.utime(path)  # or what the store has hashed once it would not hash again
    store = FrameStore(folder, site=config.name, keys=keys)  # removes what is not whole
    whole = {frame.signed.frame_id for origin in keys for frame in store.frames(origin)}
    assert on_disk == whole, "damaged, or belonging to nothing"
    stored: dict[str, tuple[int, int]] = {}
    for line in (run_folder / "events.jsonl").read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a killed writer tore it
            continue
        if record["event"] in ("frame-published", "frame-fetched"):
            origin = record.get("origin", config.name)
            version = (record["incarnation"], record["step"])
            stored[origin] = max(version, stored.get(origin, version))
    assert config.name in stored
    for origin, version in stored.items():
        newest = store.chain(origin)[-1].version
        assert (newest.incarnation, newest.step) >= version, (
            f"{origin} {version} is lost, {newest} is the newest"
        )
    store.close()
