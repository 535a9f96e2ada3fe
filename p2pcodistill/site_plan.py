"""What a site's configuration comes to: who is there, who teaches whom, whom it dials, and what its ranks are told."""

from __future__ import annotations

from pathlib import Path

from p2pcodistill.config import GroupSpec, NodeConfig
from p2pcodistill.identity import Identity, PublicIdentity
from p2pcodistill.runfolder import RunFolder
from p2pcodistill.topology.build import build_topology
from p2pcodistill.transport.zeromq import PeerEndpoint


class SitePlan:
    """All that follows from `config` and stays the same while the node runs. Raises UserError for what does not fit.

    `base_folder` is what relative paths in `config` mean.
    """

    def __init__(self, config: NodeConfig, *, base_folder: Path) -> None:
        self._config = config
        self.identity = Identity.load(base_folder / (config.identity or f"{config.name}.key"))
        members = config.ordered_members
        self.topology = build_topology(config.topology, members, base_folder=base_folder)
        keys = {peer.name: peer.identity for peer in config.peers} | {config.name: self.identity.public}
        self.keys: dict[str, PublicIdentity] = {member: keys[member] for member in members}
        """Of all members, this site's own included, in member order."""
        self.teachers = self.topology.teachers_of(config.name)
        self.students = self.topology.students_of(config.name)
        self.neighbours = self.topology.neighbours_of(config.name)
        self.others = [name for name in members if name != config.name and name not in self.teachers]
        """Members that do not teach this site."""
        # Any member may need a relay here; neighbours and this site's own relays are dialled.
        self.dialled = (*self.neighbours, *config.relays)
        self.endpoints = {
            peer.name: PeerEndpoint(peer.identity, peer.address if peer.name in self.dialled else None)
            for peer in config.peers
        }
        self.run_folder = (base_folder / (config.run_folder or f"runs/{config.run}-{config.name}")).absolute()
        place = members.index(config.name)
        self._task = config.task.located_in(base_folder).of_member(place, len(members))
        script = config.group.script and (base_folder / config.group.script).absolute()
        self._group = config.group.model_copy(update={"script": script})

    def describe(self) -> dict[str, object]:
        """What must be the same whenever this run goes on in its folder: all that training depends on."""
        config = self._config
        return {
            "run": config.run,
            "name": config.name,
            "members": {name: str(key) for name, key in self.keys.items()},
            "topology": self.topology.digest.hex(),
            "task": config.task.model_dump(mode="json"),
            "training": config.training.model_dump(mode="json"),
            "codistillation": config.codistillation.model_dump(mode="json"),
            "frames": config.frames.model_dump(mode="json"),
            "group": config.group.model_dump(
                mode="json", include={"num_ranks", "script", "script_arguments"}
            ),
        }

    def group_spec(self, folder: RunFolder, *, link_address: str, link_token: str) -> GroupSpec:
        """What the ranks of one launch are told."""
        config = self._config
        return GroupSpec(
            site=config.name,
            link_address=link_address,
            link_token=link_token,
            outbox_folder=folder.outbox,
            training_folder=folder.training,
            model_path=folder.model,
            error_path=folder.group_error,
            teachers=tuple(dict(table) for table in self.topology.schedule_of(config.name)),
            num_students=len(self.students),
            group=self._group,
            task=self._task,
            training=config.training.of_site(config.name),
            codistillation=config.codistillation,
            frames=config.frames,
        )
