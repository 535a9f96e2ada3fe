"""What can go wrong in a scenario, or be mended: the strict model of one of its `[[faults]]`, and their possible orders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from p2pcodistill.errors import ConfigError
from p2pcodistill.strict import NonNegativeFloat, NonNegativeInt, PositiveFloat, SiteName, StrictModel

FaultKind = Literal[
    "kill",
    "restart",
    "join",
    "leave",
    "partition",
    "black-hole",
    "heal",
    "slow-down",
    "clock",
    "replace",
    "impostor",
    "corrupt",
    "hostile",
]
Misdeed = Literal["garbage", "replay", "forge", "flood"]
CUTS = ("partition", "black-hole")
"""The kinds that separate sites, until `heal`."""
_OWN_KEYS = {"factor": ("slow-down",), "offset_s": ("clock",), "does": ("hostile",)}
"""Keys that belong to certain kinds, which cannot do without."""
NEEDS_RUNNING = ("kill", "leave", "slow-down", "impostor", "corrupt", "hostile")
"""The kinds that only befall a site that runs."""


class FaultConfig(StrictModel):
    """Something that goes wrong, or is mended, during the run. Faults of one site happen in the order of the file."""

    kind: FaultKind
    """`kill`: kill -9 of the node. `restart`: start a killed or departed node again. `join`: they start only now. `leave`:
    they stop in order. `partition`: connections with all others are reset and refused, until `heal`. `black-hole`: what is
    sent to or by them vanishes while connections stay, until `heal`. `slow-down`: divide their speed by `factor`. `clock`:
    their wall clock is wrong by `offset_s`. `replace`: a new machine takes their place at once, with the same identity and
    an empty disk. `impostor`: another machine, with an empty disk, runs with their identity beside them. `corrupt`: they
    publish valid checkpoints with ruined weights. `hostile`: they do nothing any more but what `does` says, with their real
    key. Who is corrupt or hostile need not finish; after `kill` and `restart` it is honest again."""
    sites: Annotated[tuple[SiteName, ...], Field(min_length=1)]
    from_sites: tuple[SiteName, ...] = ()
    """Whom a `partition` or `black-hole` separates `sites` from; empty: from all others."""
    at_step: NonNegativeInt | None = None
    """When the first of `sites` has completed this many steps (for `restart`, `replace`, `heal` and `join`: the first of all
    sites)."""
    at_s: NonNegativeFloat | None = None
    """Seconds after the start of the arm."""
    factor: PositiveFloat | None = None
    """How many times slower than by itself a slowed site is; 1 takes it back."""
    offset_s: float | None = None
    """How many seconds a wrong clock is ahead (or, if negative, behind); 0 sets it right."""
    does: Misdeed | None = None
    """`garbage`: bytes that are no message, and messages with bits flipped. `replay`: what it has heard and said before,
    once more. `forge`: manifests signed with a key that nobody knows, or in the name of others, the end of others' training,
    and chunks that are not those announced. `flood`: announcements, thousands a second."""

    @model_validator(mode="after")
    def _check(self) -> FaultConfig:
        if (self.at_step is None) == (self.at_s is None):
            raise ValueError("a fault happens either at_step or at_s: set exactly one of them")
        for key, kinds in _OWN_KEYS.items():
            if (getattr(self, key) is None) == (self.kind in kinds):
                raise ValueError(f"{key} belongs to the kind {kinds[0]!r}, and to no other")
        if self.factor is not None and self.factor < 1:
            raise ValueError("factor is how many times slower a site becomes: at least 1")
        if self.from_sites and self.kind not in CUTS:
            raise ValueError(f"from_sites belongs to the kinds {' and '.join(map(repr, CUTS))}")
        if both := set(self.sites) & set(self.from_sites):
            raise ValueError(f"no site can be separated from itself: take {min(both)!r} out of from_sites")
        return self

    @property
    def when(self) -> str:
        """For messages."""
        return f"at step {self.at_step}" if self.at_step is not None else f"after {self.at_s:g} s"


def require_order(site: str, faults: Sequence[FaultConfig]) -> None:
    """Raise ConfigError unless each of the faults of `site` can happen after those before it."""
    state = "absent" if any(fault.kind == "join" for fault in faults) else "up"
    is_cut_off = is_doubled = False
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
            case "heal" if not is_cut_off:
                raise ConfigError(
                    f"{what}: it is not cut off by then; list its partition or black-hole before"
                )
            case "partition" | "black-hole" if is_cut_off:
                raise ConfigError(f"{what}: it is cut off already; list its heal before")
            case "partition" | "black-hole" | "heal" | "clock" | "slow-down" if state == "up":
                pass
            case _ if is_doubled:
                raise ConfigError(f"{what}: two machines run with its identity by then; list this before")
            case "join" if state != "absent":
                raise ConfigError(f"{what}: a site joins once; use restart after kill or leave")
            case "restart" if state != "down":
                raise ConfigError(f"{what}: it is not down by then; list its kill or leave before")
            case "replace" if state == "absent":
                raise ConfigError(f"{what}: it is not there by then; list its join before")
            case kind if kind in NEEDS_RUNNING and state != "up":
                raise ConfigError(f"{what}: it does not run by then; list its restart or join before")
        state = {"kill": "down", "leave": "down", "restart": "up", "join": "up", "replace": "up"}.get(
            fault.kind, state
        )
        is_cut_off = (is_cut_off or fault.kind in CUTS) and fault.kind != "heal"
        is_doubled = is_doubled or fault.kind == "impostor"
