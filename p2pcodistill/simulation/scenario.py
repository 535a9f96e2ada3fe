"""What a simulation runs: the strict model of a scenario file (`simulations/`), and the one way to load it.

A scenario says which sites there are, what text they hold, who teaches whom, how they train, and which arms are compared
under which seeds. Every arm runs the same model, batch, number of steps and schedule. Paths are relative to the folder of
the file. Links and faults are those of the codistilled arms: lone sites and pooled data are what these are compared with.
"""

from __future__ import annotations

import itertools
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
from p2pcodistill.topology.build import build_topology, map_files

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
    """Something that goes wrong, or is mended, during the run. Faults of one site happen in the order of the file."""

    kind: Literal["kill", "restart", "partition", "heal", "slow-down", "corrupt", "join", "leave"]
    """`kill`: kill -9 of the node. `restart`: start a killed or departed node again. `partition`: cut the sites off from all
    others, until `heal`. `slow-down`: divide their speed by `factor`. `corrupt`: they publish ruined weights from now on
    (in virtual time). `join`: they start only now. `leave`: they stop in order."""
    sites: Annotated[tuple[SiteName, ...], Field(min_length=1)]
    at_step: NonNegativeInt | None = None
    """When the first of `sites` has completed this many steps (for `restart`, `heal` and `join`: the first of all sites)."""
    at_s: NonNegativeFloat | None = None
    """Seconds after the start of the arm."""
    factor: PositiveFloat | None = None
    """How many times slower than by itself a slowed site is; 1 takes it back."""

    @model_validator(mode="after")
    def _check(self) -> FaultConfig:
        if (self.at_step is None) == (self.at_s is None):
            raise ValueError("a fault happens either at_step or at_s: set exactly one of them")
        if (self.factor is None) == (self.kind == "slow-down"):
            raise ValueError("factor belongs to the kind 'slow-down', and to no other")
        if self.factor is not None and self.factor < 1:
            raise ValueError("factor is how many times slower a site becomes: at least 1")
        return self

    @property
    def when(self) -> str:
        """For messages."""
        return f"at step {self.at_step}" if self.at_step is not None else f"after {self.at_s:g} s"


class VirtualConfig(StrictModel):
    """What virtual time is made of, where `mode` is `virtual`."""

    step_time_s: PositiveFloat = 0.1
    """Virtual seconds that an update takes."""


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
    """Who teaches whom in the codistilled arms: a named graph or schedule, or a graph file, as in a node's file."""
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
    virtual: VirtualConfig = VirtualConfig()
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
        if self.mode == "virtual":
            if self.group.num_ranks > 1 or self.group.device == "cuda":
                raise ConfigError(
                    "in virtual time each site is one rank on the CPU: remove group.num_ranks and group.device"
                )
        elif "virtual" in self.model_fields_set:
            raise ConfigError('[virtual] is for mode = "virtual": set that, or remove the table')
        elif any(fault.kind == "corrupt" for fault in self.faults):
            raise ConfigError(
                'the fault "corrupt" is for mode = "virtual": set that; real nodes publish what they train'
            )
        if (self.links or self.faults) and all(arm.kind != "codistilled" for arm in self.arms):
            raise ConfigError("links and faults are those of codistilled arms: add one, or remove them")
        _refuse_repetition("link between", [" and ".join(sorted(link.between)) for link in self.links])
        of_links = [link.between for link in self.links]
        for site in itertools.chain(*of_links, *[fault.sites for fault in self.faults]):
            if site not in self.site_names:
                raise ConfigError(f"{site!r} has a link or a fault, but is none of the [[sites]]")
        for site in self.site_names:
            _require_order(site, [fault for fault in self.faults if site in fault.sites])
        return self


def _overridden(section: Section, own: Section | None) -> Section:
    if own is None:
        return section
    return section.model_copy(update={key: getattr(own, key) for key in own.model_fields_set})


def _refuse_repetition(what: str, values: Sequence[object]) -> None:
    for value in values:
        if values.count(value) > 1:
            raise ConfigError(f"the {what} {value!r} is listed twice")


def _require_order(site: str, faults: Sequence[FaultConfig]) -> None:
    """Raise ConfigError unless each of the faults of `site` can happen after those before it."""
    state = "absent" if any(fault.kind == "join" for fault in faults) else "up"
    is_cut_off = False
    for moments in (
        [f.at_step for f in faults if f.at_step is not None],
        [f.at_s for f in faults if f.at_s is not None],
    ):
        if moments != sorted(moments):
            raise ConfigError(
                f"list the faults of {site!r} in the order in which they happen: these begin at {moments}"
            )
    for fault in faults:
        what = f"the fault {fault.kind!r} of {site!r} {fault.when}"
        match fault.kind:
            case "join" if state != "absent":
                raise ConfigError(f"{what}: a site joins once; use restart after kill or leave")
            case "restart" if state != "down":
                raise ConfigError(f"{what}: it is not down by then; list its kill or leave before")
            case "kill" | "leave" | "slow-down" | "corrupt" if state != "up":
                raise ConfigError(f"{what}: it does not run by then; list its restart or join before")
            case "partition" if is_cut_off:
                raise ConfigError(f"{what}: it is cut off already; list its heal before")
            case "heal" if not is_cut_off:
                raise ConfigError(f"{what}: it is not cut off by then; list its partition before")
        state = {"kill": "down", "leave": "down", "restart": "up", "join": "up"}.get(fault.kind, state)
        is_cut_off = {"partition": True, "heal": False}.get(fault.kind, is_cut_off)


def load_scenario(path: Path, overrides: Sequence[str] = (), *, data: Sequence[Path] = ()) -> ScenarioConfig:
    """The scenario in the file `path`, ready to run: paths absolute, topology fitting the sites.

    `overrides` are `dotted.key=value` assignments, relative paths in them as in the file. `data`, relative to the working
    directory, replaces all text that the file names. Raises ConfigError or TopologyError: one line that says what to do.
    """
    if not path.exists():
        raise ConfigError(f"no such scenario file: {path}{_known_scenarios()}")
    table = override(load_toml(path), overrides)
    scenario = parse_model(ScenarioConfig, table, source=str(path))
    scenario = _resolve(scenario, path.parent.absolute())
    if data:
        scenario = _replace_data(scenario, tuple(given.absolute() for given in data))
    try:
        topology = build_topology(scenario.topology, scenario.site_names)
    except TopologyError as error:
        raise TopologyError(f"{path}: {error}") from None
    for link in scenario.links:
        first, second = link.between
        if second not in topology.neighbours_of(first):
            raise ConfigError(
                f"{path}: there is a link between {first!r} and {second!r}, which share no edge of the topology "
                f"{scenario.topology!r}: remove it, or choose a topology that joins them"
            )
    return scenario


def _known_scenarios() -> str:
    known = sorted(SCENARIO_FOLDER.glob("*.toml"))
    if not known:
        return f" (and there are none in the folder {SCENARIO_FOLDER} here)"
    return f"; the ones in {SCENARIO_FOLDER} are {', '.join(file.name for file in known)}"


def _resolve(scenario: ScenarioConfig, base: Path) -> ScenarioConfig:
    def below(paths: Sequence[Path]) -> tuple[Path, ...]:
        return tuple(base / path for path in paths)

    return scenario.model_copy(
        update={
            "topology": map_files(scenario.topology, lambda path: str(base / path)),
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
