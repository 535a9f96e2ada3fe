"""What a simulation runs: the strict model of a scenario file (`simulations/`), and the one way to load it.

A scenario says which sites there are, what text they hold, who teaches whom, how they train, and which arms are compared
under which seeds. Every arm runs the same model, batch, number of steps and schedule, but for what it sets otherwise. Paths
are relative to the folder of the file. Links and faults are those of the codistilled arms: lone sites and pooled data are
what these are compared with.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, model_validator

from p2pcodistill.config import CodistillationConfig, FramesConfig, GroupConfig, TrainingConfig
from p2pcodistill.errors import ConfigError, DataError, TopologyError
from p2pcodistill.report.claim_config import ClaimConfig, check_claims
from p2pcodistill.simulation.arm_config import ArmConfig, Label
from p2pcodistill.simulation.arms.kinds import POOLED_SITE
from p2pcodistill.simulation.fault_config import FaultConfig, require_order
from p2pcodistill.simulation.link_config import LinkConfig, check_links
from p2pcodistill.simulation.scenario_checks import check_edges, refuse_overlaps, refuse_repetition
from p2pcodistill.simulation.scenario_file import load_scenario_table
from p2pcodistill.simulation.scenario_tables import (
    DataConfig,
    ReportConfig,
    SiteConfig,
    VirtualConfig,
)
from p2pcodistill.simulation.search_config import SearchConfig, trial_arms
from p2pcodistill.simulation.synthetic_config import (
    MAX_SITES,
    SyntheticConfig,
    complete_table,
    numbered_sites,
)
from p2pcodistill.strict import (
    NonNegativeInt,
    StrictModel,
    override,
    parse_model,
)
from p2pcodistill.task_configs import LanguageModelConfig, TaskConfig, entry_in
from p2pcodistill.topology.build import default_members, map_files

SCENARIO_FOLDER = Path("simulations")

# Names that the run folder uses beside the sites' own.
_RESERVED_SITE_NAMES = {
    POOLED_SITE: "the arm with pooled data",
    "held-out": "held-out text",
    "unlabelled": "unlabelled text",
    "nodes": "node files",
}
DECIDED_BY_SIMULATION = {
    ("task", "data"): "list the text in data.paths, or in data of each of the [[sites]]",
    ("task", "held_out"): "list it in data.held_out, or have it split off the data",
    ("task", "shards"): "every site gets its own part of the data",
    ("task", "num_shards"): "there are as many as sites",
    ("task", "max_data_bytes"): "set data.max_bytes_per_site",
    ("task", "max_held_out_bytes"): "set data.max_held_out_bytes",
    (
        "group",
        "script",
    ): "a script of your own runs below p2pcodistill node; scenarios measure the reference loop",
    ("group", "script_arguments"): "remove it, with group.script",
    ("training", "seed"): "list seeds = [0] at the top, from which each site gets its own",
}
"""(section, key) of what the simulation sets for each node, so that a scenario cannot; with what to write instead."""
DATA_KEYS_OF_TEXT = ("shard_by", "max_bytes_per_site", "max_held_out_bytes", "vocabulary_size", "unlabelled")
"""Keys of `[data]` that mean nothing for any task but the language model."""
ARM_SECTIONS = ("codistillation", "frames")
"""Tables of an arm that say only what differs from the scenario's."""


Section = TypeVar("Section", CodistillationConfig, FramesConfig)


class _Sections(StrictModel):
    """What an arm can set otherwise by keys of its tables."""

    training: TrainingConfig
    task: TaskConfig


class ScenarioConfig(StrictModel):
    """A scenario file: `p2pcodistill simulate FILE`."""

    name: Label
    """Names the run folder, `runs/<name>-<time>`."""
    description: str = ""
    mode: Literal["processes", "virtual"] = "processes"
    """`processes`: real nodes on this machine. `virtual`: a discrete-event run in virtual time."""
    seeds: Annotated[tuple[NonNegativeInt, ...], Field(min_length=1)] = (0,)
    """Every arm runs once with each."""
    topology: str = "full"
    """Who teaches whom in the codistilled arms: a named graph or schedule, or a graph file, as in a node's file."""
    num_sites: Annotated[int, Field(ge=2, le=MAX_SITES)] | None = None
    """In place of `[[sites]]`: so many, called "0", "1" and so on. Without either, the topology says which there are."""
    sites: Annotated[tuple[SiteConfig, ...], Field(min_length=2, max_length=MAX_SITES)]
    arms: Annotated[tuple[ArmConfig, ...], Field(min_length=1)]
    data: DataConfig = DataConfig()
    group: GroupConfig = GroupConfig()
    """The workers of each site. Where `num_threads` is not set, jobs that would leave cores idle get more than one."""
    task: TaskConfig = LanguageModelConfig()
    training: TrainingConfig = TrainingConfig()
    codistillation: CodistillationConfig = CodistillationConfig()
    frames: FramesConfig = FramesConfig()
    links: tuple[LinkConfig, ...] = ()
    faults: tuple[FaultConfig, ...] = ()
    virtual: VirtualConfig = VirtualConfig()
    synthetic: SyntheticConfig | None = None
    """Nothing is trained: sites publish checkpoints of the size of a model's, in virtual time."""
    search: SearchConfig | None = None
    """Every arm gets the best of a grid of settings, chosen under a seed of its own, before the scenario runs."""
    report: ReportConfig = ReportConfig()
    claims: tuple[ClaimConfig, ...] = ()
    """What somebody says of the arms; the report says what was seen."""

    @property
    def site_names(self) -> tuple[str, ...]:
        """The sites in the order that every node uses."""
        return tuple(site.name for site in self.sites)

    def max_upload_mbit(self, site: str, peer: str) -> float | None:
        """What `site` may send to `peer`; None: as much as it can."""
        listed = {frozenset(link.between): link for link in self.links if link.between != "all"}
        of_all = next((link for link in self.links if link.between == "all"), None)
        link = listed.get(frozenset((site, peer)), of_all)
        return None if link is None else link.max_upload_mbit

    @property
    def title(self) -> str:
        """Heading of what is shown to a person."""
        return self.report.title or self.name

    def of_arm(self, arm: ArmConfig) -> ScenarioConfig:
        """The scenario as the arm wants it: with the keys of all tables that it sets, and its topology."""
        return self.model_copy(
            update={
                "training": self.training_of(arm),
                "task": self.task_of(arm),
                "codistillation": self.codistillation_of(arm),
                "frames": self.frames_of(arm),
                "topology": arm.topology or self.topology,
                "links": self.links_of(arm),
            }
        )

    def topologies(self) -> tuple[str, ...]:
        """The scenario's, and those of arms that have another."""
        return (self.topology, *(arm.topology for arm in self.arms if arm.topology is not None))

    def with_topology_files(self, change: Callable[[str], str]) -> ScenarioConfig:
        """The same with the path of every graph file changed."""
        arms = [
            arm.model_copy(update={"topology": arm.topology and map_files(arm.topology, change)})
            for arm in self.arms
        ]
        return self.model_copy(update={"topology": map_files(self.topology, change), "arms": tuple(arms)})

    def training_of(self, arm: ArmConfig) -> TrainingConfig:
        """The scenario's, with the keys that the arm sets."""
        return self._sections_of(arm).training

    def task_of(self, arm: ArmConfig) -> TaskConfig:
        """The scenario's, with the keys that the arm sets."""
        return self._sections_of(arm).task

    def sites_of(self, arm: ArmConfig) -> tuple[str, ...]:
        """The sites that are in that arm."""
        return self.site_names[: arm.num_sites]

    def pool_of(self, arm: ArmConfig) -> tuple[str, ...]:
        """The sites whose data one site has in that arm, where it stands for all."""
        return self.sites_of(arm)[: 1 if (arm.sharing or self.data.sharing) == "first" else None]

    def num_streams_of(self, arm: ArmConfig) -> int:
        """By how many times a batch the data of one site is read side by side: once for each of the workers there."""
        num_workers = arm.num_workers or 1
        return num_workers if arm.of_kind.module is None else -(-num_workers // len(self.sites_of(arm)))

    def shards_of(self, arm: ArmConfig, site: str) -> tuple[str, ...]:
        """The sites whose data `site` trains on in that arm, where it has a model or a worker of its own."""
        match arm.sharing or self.data.sharing:
            case "disjoint":
                return (site,)
            case "first":
                return self.sites_of(arm)[:1]
            case "same":
                return self.sites_of(arm)

    def _sections_of(self, arm: ArmConfig) -> _Sections:
        if not arm.training and not arm.task:
            return _Sections(training=self.training, task=self.task)
        tables = {
            section: getattr(self, section).model_dump(mode="json", exclude_unset=True)
            | getattr(arm, section)
            for section in ("training", "task")
        }
        return parse_model(_Sections, tables, source=f"the arm {arm.name!r}")

    def codistillation_of(self, arm: ArmConfig) -> CodistillationConfig:
        """The scenario's, with the keys that the arm sets."""
        return _overridden(self.codistillation, arm.codistillation)

    def frames_of(self, arm: ArmConfig) -> FramesConfig:
        """The scenario's, with the keys that the arm sets."""
        return _overridden(self.frames, arm.frames)

    def links_of(self, arm: ArmConfig) -> tuple[LinkConfig, ...]:
        """The scenario's, or those that the arm has in their place."""
        return self.links if arm.links is None else arm.links

    def _check_arm(self, arm: ArmConfig) -> None:
        if self.mode != "virtual" and (arm.of_kind.module is not None or arm.num_workers is not None):
            what = f"is {arm.kind}" if arm.of_kind.module is not None else "has num_workers"
            raise ConfigError(f'the arm {arm.name!r} {what}, which is for mode = "virtual": set that')
        for (section, key), instead in DECIDED_BY_SIMULATION.items():
            if key in getattr(arm, section, {}):
                raise ConfigError(
                    f"the arm {arm.name!r}: {section}.{key} is decided by the simulation: remove it; {instead}"
                )
        if "name" in arm.task:
            raise ConfigError(f"the arm {arm.name!r}: all arms have the same task; remove its task.name")
        if arm.num_sites is not None:
            if arm.num_sites > len(self.sites):
                raise ConfigError(
                    f"the arm {arm.name!r} wants {arm.num_sites} sites, and there are {len(self.sites)}: "
                    "lower its num_sites, or add sites"
                )
            if self.faults:
                raise ConfigError(
                    f"the arm {arm.name!r} has num_sites, and there are faults of certain sites: remove one or the other"
                )
        try:
            check_links(self.links_of(arm), self.sites_of(arm))
        except ConfigError as error:
            raise ConfigError(f"the arm {arm.name!r}: {error}") from None
        if arm.num_members is not None and arm.num_members > len(self.sites_of(arm)):
            raise ConfigError(
                f"the arm {arm.name!r} wants an ensemble of {arm.num_members}, and there are {len(self.sites_of(arm))} "
                "sites: lower num_members, or add sites"
            )
        self._sections_of(arm)  # refuses what they cannot have

    @model_validator(mode="after")
    def _check(self) -> ScenarioConfig:
        if self.synthetic is not None:
            self.synthetic.require_versions()
        refuse_repetition("site", self.site_names)
        refuse_repetition("arm", [arm.name for arm in self.arms])
        refuse_repetition("seed", self.seeds)
        for name in self.site_names:
            if name in _RESERVED_SITE_NAMES:
                raise ConfigError(
                    f"no site can be called {name!r}, {_RESERVED_SITE_NAMES[name]} is: choose another name"
                )
        for (section, key), instead in DECIDED_BY_SIMULATION.items():
            if key in getattr(self, section).model_fields_set:
                raise ConfigError(f"{section}.{key} is decided by the simulation: remove it; {instead}")
        with_data = [site.name for site in self.sites if site.data]
        if with_data and len(with_data) < len(self.sites):
            without = next(site.name for site in self.sites if not site.data)
            raise ConfigError(
                f"the site {with_data[0]!r} lists data of its own and {without!r} does not: give all sites data, or none"
            )
        if with_data and self.data.paths:
            raise ConfigError("data.paths and data of the [[sites]] exclude each other: remove one of them")
        if with_data and not self.data.held_out and self.task.name != "language-model":
            raise ConfigError(
                "each site would keep back a part of its own data, which others train on: list what all are evaluated on "
                "in data.held_out"
            )
        if self.task.name != "language-model":
            for key in DATA_KEYS_OF_TEXT:
                if key in self.data.model_fields_set:
                    raise ConfigError(
                        f"data.{key} is for text: remove it, or see what {self.task.name!r} has in [task]"
                    )
        elif self.data.vocabulary_size is not None and self.task.vocabulary is not None:
            raise ConfigError(
                "data.vocabulary_size and task.vocabulary exclude each other: remove one of them"
            )
        if self.mode == "virtual":
            if self.group.num_ranks > 1:
                raise ConfigError("in virtual time each site is one rank: remove group.num_ranks")
        elif "virtual" in self.model_fields_set:
            raise ConfigError('[virtual] is for mode = "virtual": set that, or remove the table')
        for arm in self.arms:
            self._check_arm(arm)
        if self.search is not None:
            if self.synthetic is not None:
                raise ConfigError("nothing is trained where there is [synthetic]: remove 'search'")
            self.search.check(self.arms, self.seeds)
            for trial, _, _ in trial_arms(self.search, self.arms).values():
                self._check_arm(trial)
        if (self.links or self.faults) and all(arm.kind != "codistilled" for arm in self.arms):
            raise ConfigError("links and faults are those of codistilled arms: add one, or remove them")
        check_links(self.links, self.site_names)
        for site in itertools.chain(*((*fault.sites, *fault.from_sites) for fault in self.faults)):
            if site not in self.site_names:
                raise ConfigError(f"{site!r} has a fault, but is none of the [[sites]]")
        num_models = {
            arm.name: 1 if arm.of_kind.sites == "one" else len(self.sites_of(arm)) for arm in self.arms
        }
        check_claims(self.claims, num_models, len(self.seeds))
        for site in self.site_names:
            require_order(site, [fault for fault in self.faults if site in fault.sites])
        return self


def _overridden(section: Section, own: Section | None) -> Section:
    if own is None:
        return section
    return section.model_copy(update={key: getattr(own, key) for key in own.model_fields_set})


def load_scenario(path: Path, overrides: Sequence[str] = (), *, data: Sequence[Path] = ()) -> ScenarioConfig:
    """The scenario in the file `path`, ready to run: paths absolute, topology fitting the sites.

    `overrides` are `dotted.key=value` assignments, relative paths in them as in the file. `data`, relative to the working
    directory, replaces all text that the file names. Raises ConfigError or TopologyError: one line that says what to do.
    """
    if not path.exists():
        raise ConfigError(f"no such scenario file: {path}{_known_scenarios()}")
    table = override(load_scenario_table(path), overrides)
    if "sites" not in table and "num_sites" not in table:
        table |= _sites_of_topology(table, path)
    try:
        table = complete_table(table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    scenario = parse_model(ScenarioConfig, table, source=str(path))
    scenario = _resolve(scenario, path.parent.absolute())
    if data and scenario.synthetic is not None:
        raise ConfigError(f"{path}: nothing is trained where there is [synthetic]: leave out --data")
    if data:
        scenario = _replace_data(scenario, tuple(entry_in(Path(), given) for given in data))
    try:
        refuse_overlaps(scenario)
        check_edges(scenario.topology, scenario.site_names, scenario.links)
        for arm in scenario.arms:
            if arm.kind == "codistilled" or arm.topology is not None:
                of_arm = scenario.of_arm(arm)
                check_edges(of_arm.topology, scenario.sites_of(arm), of_arm.links)
    except (ConfigError, DataError) as error:
        raise ConfigError(f"{path}: {error}") from None
    except TopologyError as error:
        raise TopologyError(f"{path}: {error}") from None
    return scenario


def _sites_of_topology(table: dict[str, Any], path: Path) -> dict[str, Any]:
    """The sites that the topology itself speaks of. Raises ConfigError if it takes any number of them."""
    spec = table.get("topology")
    try:
        members = default_members(spec, base_folder=path.parent) if isinstance(spec, str) else None
    except TopologyError as error:
        raise TopologyError(f"{path}: {error}") from None
    if members is None:
        raise ConfigError(
            f"{path}: which sites are there? List [[sites]], set num_sites, or choose a topology that says it, like 'ring:8'"
        )
    if list(members) == numbered_sites(len(members)):
        return {"num_sites": len(members)}
    return {"sites": [{"name": member} for member in members]}


def _known_scenarios() -> str:
    known = sorted(SCENARIO_FOLDER.glob("*.toml"))
    if not known:
        return f" (and there are none in the folder {SCENARIO_FOLDER} here)"
    return f"; the ones in {SCENARIO_FOLDER} are {', '.join(file.name for file in known)}"


def _resolve(scenario: ScenarioConfig, base: Path) -> ScenarioConfig:
    def below(paths: Sequence[Path]) -> tuple[Path, ...]:
        return tuple(entry_in(base, path) for path in paths)

    def located(arm: ArmConfig) -> ArmConfig:
        task = scenario.task_of(arm).located_in(base).model_dump(mode="json")
        return arm.model_copy(update={"task": {key: task[key] for key in arm.task}})

    scenario = scenario.with_topology_files(lambda path: str(base / path))
    return scenario.model_copy(
        update={
            "sites": tuple(site.model_copy(update={"data": below(site.data)}) for site in scenario.sites),
            "task": scenario.task.located_in(base),
            "arms": tuple(located(arm) for arm in scenario.arms),
            "data": scenario.data.model_copy(
                update={"paths": below(scenario.data.paths), "held_out": below(scenario.data.held_out)}
            ),
        }
    )


def _replace_data(scenario: ScenarioConfig, paths: tuple[Path, ...]) -> ScenarioConfig:
    return scenario.model_copy(
        update={
            "sites": tuple(site.model_copy(update={"data": ()}) for site in scenario.sites),
            "data": scenario.data.model_copy(update={"paths": paths}),
        }
    )
