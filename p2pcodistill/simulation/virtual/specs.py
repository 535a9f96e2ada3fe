"""What training in virtual time is told of a site: that of its node's file."""

from __future__ import annotations

from p2pcodistill.config import GroupSpec, NodeConfig
from p2pcodistill.simulation.files import NodeFiles
from p2pcodistill.strict import load_toml, parse_model


def spec_of(place: NodeFiles) -> GroupSpec:
    """What the node of this file would tell its ranks, as far as one rank without a node is concerned."""
    config = parse_model(NodeConfig, load_toml(place.node_file), source=str(place.node_file))
    folder = place.run_folder
    training_folder = folder / "training"
    training_folder.mkdir(exist_ok=True)
    return GroupSpec(
        site=config.name,
        link_address="",
        link_token="",
        outbox_folder=folder,
        training_folder=training_folder,
        model_path=folder / "model.safetensors",
        error_path=folder / "group-error.txt",
        teachers=({},),  # the exchange is not that of a node
        num_students=0,
        group=config.group,
        task=config.task.located_in(place.node_file.parent),
        training=config.training.of_site(config.name),
        codistillation=config.codistillation,
        frames=config.frames,
    )
