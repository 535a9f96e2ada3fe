"""What a simulation runs: the strict model of a scenario file (`simulations/`), and the one way to load it.

A scenario says which sites there are, what text they hold, who teaches whom, how they train, and which arms are compared
under which seeds. Every arm runs the same model, batch, number of steps and schedule. Paths are relative to the folder of
the file. The model holds the schema of all sections; `load_scenario` refuses by name the ones that cannot run yet.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BeforeValidator, Field, model_validator

from p2pcodistill.config import (
    CodistillationConfig,
    FramesConfig,
    GroupConfig,
    LanguageModelConfig,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    SiteName,
    StrictModel,
    TrainingConfig,
    load_toml,
    override,
    parse_model,
)
from p2pcodistill.errors import ConfigError, TopologyError
from p2pcodistill.topology import FILE_SUFFIXES, build_topology

POOLED_SITE = "pooled"
MAX_SITES = 1000
SCENARIO_FOLDER = Path("simulations")

# Names that the run folder uses beside the sites' own.
_RESERVED_SITE_NAMES = {
    POOLED_SITE: "the arm with pooled data",
    "held-out": "held-out text",
    "nodes": "node files",
}
DECIDED_BY_SIMULATION = {
    ("task", "data"): "list the text in data.paths, or in data of each of the [[sites]]",
    ("task", "held_out"): "held-out text is split off the data; data.max_held_out_bytes limits it",
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
_LABEL = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
ARM_SECTIONS = ("codistillation", "frames")
"""Tables of a scenario of which a codistilled arm can set keys otherwise."""
_UNBUILT_SECTIONS = ("links", "faults")


def _check_label(label: Any) -> Any:
    # Labels name folders and are part of a run's name; a non-string is the model's to refuse.
    if isinstance(label, str) and not _LABEL.fullmatch(label):
        raise ValueError("use at most 40 letters, digits, '.', '_' or '-', starting with a letter or digit")
    return label


Label = Annotated[str, BeforeValidator(_check_label)]
Section = TypeVar("Section", CodistillationConfig, FramesConfig)
SitePair = Annotated[tuple[SiteName, ...], Field(min_length=2, max_length=2)]


class SiteConfig(StrictModel):
    """A site of the simulation."""

    name: SiteName
    data: tuple[Path, ...] = ()
    """Files or folders with this site's own text. Either every site lists some or none does; with none, `[data]` is split
    between the sites."""


class DataConfig(StrictModel):
    """The text that the sites learn from, and how much of it."""

    paths: tuple[Path, ...] = ()
    """Files or folders of text, split by file into held-out text and one share a site; empty: the sources of the Python
    standard library."""
    max_bytes_per_site: PositiveInt = 500_000
    max_held_out_bytes: PositiveInt = 32_768
    """Held-out text that every site of every arm is evaluated on."""


class ArmConfig(StrictModel):
    """One of the things that are compared."""

    name: Label
    kind: Literal["codistilled", "alone", "pooled"]
    """`codistilled`: the sites learn from each other along the topology. `alone`: each site on its own data, no peers.
    `pooled`: one site with the data of all. Of several arms of one kind, the headline compares the first."""
    codistillation: CodistillationConfig | None = None
    """Keys of `[codistillation]` that differ in this codistilled arm."""
    frames: FramesConfig | None = None
    """Keys of `[frames]` that differ in this codistilled arm."""

    @model_validator(mode="after")
    def _check(self) -> ArmConfig:
        for section in ARM_SECTIONS:
            if self.kind != "codistilled" and getattr(self, section) is not None:
                raise ConfigError(
                    f"the arm {self.name!r} is {self.kind}: remove its {section}, which only codistilled arms have"
                )
        return self


class LinkConfig(StrictModel):
    """What the connection between two sites can carry, in each direction."""

    between: SitePair
    bandwidth_mbit: PositiveFloat | None = None
    """Megabits per second; left out: unlimited."""
    latency_ms: NonNegativeFloat = 0.0
    """One-way delay."""
    jitter_ms: NonNegativeFloat = 0.0
    """Random part of the delay, uniform between 0 and this, on top of `latency_ms`."""
    loss_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of packets that are lost and sent again."""
    reset_interval_s: PositiveFloat | None = None
    """The connection is cut (TCP reset) this often; left out: never."""


class FaultConfig(StrictModel):
    """Something that goes wrong, or is mended, during the run."""

    kind: Literal["kill", "restart", "partition", "heal", "slow-down", "corrupt", "join", "leave"]
    """`kill`: kill -9 of the node. `restart`: start a killed or departed node again. `partition`: cut the sites off from all
    others, until `heal`. `slow-down`: divide their speed by `factor`. `corrupt`: they publish ruined weights. `join`: they
    start only now. `leave`: they stop in order."""
    sites: Annotated[tuple[SiteName, ...], Field(min_length=1)]
    at_step: NonNegativeInt | None = None
    """When the first of `sites` has completed this many steps (for `restart`, `heal` and `join`: the first running site)."""
    at_s: NonNegativeFloat | None = None
    """Seconds after the start of the arm."""
    factor: PositiveFloat | None = None
    """How much slower a slowed site is; 1 takes it back."""

    @model_validator(mode="after")
    def _check(self) -> FaultConfig:
        if (self.at_step is None) == (self.at_s is None):
            raise ValueError("a fault happens either at_step or at_s: set exactly one of them")
        if (self.factor is None) == (self.kind == "slow-down"):
            raise ValueError("factor belongs to the kind 'slow-down', and to no other")
        return self


class ReportConfig(StrictModel):
    """How the result is presented."""

    title: str | None = None
    """Heading of the live view and of the report; the scenario's name by default."""


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
    """Who teaches whom in the codistilled arms: `pair`, `ring`, `full` or a graph file."""
    sites: Annotated[tuple[SiteConfig, ...], Field(min_length=2, max_length=MAX_SITES)]
    arms: Annotated[tuple[ArmConfig, ...], Field(min_length=1)]
    data: DataConfig = DataConfig()
    group: GroupConfig = GroupConfig()
    """The workers of each site. Where `num_threads` is not set, jobs that would leave cores idle get more than one."""
    task: LanguageModelConfig = LanguageModelConfig()
    training: TrainingConfig = TrainingConfig()
    codistillation: CodistillationConfig = CodistillationConfig()
    frames: FramesConfig = FramesConfig()
    links: tuple[LinkConfig, ...] = ()
    faults: tuple[FaultConfig, ...] = ()
    report: ReportConfig = ReportConfig()

    @property
    def site_names(self) -> tuple[str, ...]:
        """The sites in the order that every node uses."""
        return tuple(site.name for site in self.sites)

    @property
    def title(self) -> str:
        """Heading of what is shown to a person."""
        return self.report.title or self.name

    def codistillation_of(self, arm: ArmConfig) -> CodistillationConfig:
        """The scenario's, with the keys that the arm sets."""
        return _overridden(self.codistillation, arm.codistillation)

    def frames_of(self, arm: ArmConfig) -> FramesConfig:
        """The scenario's, with the keys that the arm sets."""
        return _overridden(self.frames, arm.frames)

    @model_validator(mode="after")
    def _check(self) -> ScenarioConfig:
        _refuse_repetition("site", self.site_names)
        _refuse_repetition("arm", [arm.name for arm in self.arms])
        _refuse_repetition("seed", self.seeds)
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
        return self


def _overridden(section: Section, own: Section | None) -> Section:
    if own is None:
        return section
    return section.model_copy(update={key: getattr(own, key) for key in own.model_fields_set})


def _refuse_repetition(what: str, values: Sequence[object]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ConfigError(f"the {what} {value!r} is listed twice")


def load_scenario(path: Path, overrides: Sequence[str] = (), *, data: Sequence[Path] = ()) -> ScenarioConfig:
    """The scenario in the file `path`, ready to run: paths absolute, topology fitting the sites.

    `overrides` are `dotted.key=value` assignments, relative paths in them as in the file. `data`, relative to the working
    directory, replaces all text that the file names. Raises ConfigError or TopologyError: one line that says what to do.
    """
    if not path.exists():
        raise ConfigError(f"no such scenario file: {path}{_known_scenarios()}")
    table = override(load_toml(path), overrides)
    for section in _UNBUILT_SECTIONS:
        if table.get(section):
            raise ConfigError(f"{path}: the section [[{section}]] is not built yet: remove it")
    scenario = parse_model(ScenarioConfig, table, source=str(path))
    if scenario.mode != "processes":
        raise ConfigError(f"{path}: mode = {scenario.mode!r} is not built yet: remove it")
    scenario = _resolve(scenario, path.parent.absolute())
    if data:
        scenario = _replace_data(scenario, tuple(given.absolute() for given in data))
    try:
        build_topology(scenario.topology, scenario.site_names)
    except TopologyError as error:
        raise TopologyError(f"{path}: {error}") from None
    return scenario


def _known_scenarios() -> str:
    known = sorted(SCENARIO_FOLDER.glob("*.toml"))
    if not known:
        return f" (and there are none in the folder {SCENARIO_FOLDER} here)"
    return f"; the ones in {SCENARIO_FOLDER} are {', '.join(file.name for file in known)}"


def _resolve(scenario: ScenarioConfig, base: Path) -> ScenarioConfig:
    def below(paths: Sequence[Path]) -> tuple[Path, ...]:
        return tuple(base / path for path in paths)

    is_file = scenario.topology.endswith(FILE_SUFFIXES)
    return scenario.model_copy(
        update={
            "topology": str(base / scenario.topology) if is_file else scenario.topology,
            "sites": tuple(site.model_copy(update={"data": below(site.data)}) for site in scenario.sites),
            "data": scenario.data.model_copy(update={"paths": below(scenario.data.paths)}),
        }
    )


def _replace_data(scenario: ScenarioConfig, paths: tuple[Path, ...]) -> ScenarioConfig:
    return scenario.model_copy(
        update={
            "sites": tuple(site.model_copy(update={"data": ()}) for site in scenario.sites),
            "data": scenario.data.model_copy(update={"paths": paths}),
        }
    )
