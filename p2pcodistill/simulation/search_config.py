"""The grid of a search: which keys are tried with which values, and what arms come of it. Pure functions."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, TypeAlias

from pydantic import Field

from p2pcodistill.errors import ConfigError
from p2pcodistill.simulation.arm_config import ArmConfig, Label
from p2pcodistill.strict import NonNegativeInt, StrictModel, parse_model

MAX_TRIALS = 1000
_SECTIONS = ("training", "task", "codistillation")

Settings: TypeAlias = dict[str, Any]
"""{"section.key": value}."""


class GridConfig(StrictModel):
    """A key that is searched."""

    key: str
    """`training.learning_rate`, `codistillation.weight`, or any other of `[training]`, `[task]` and `[codistillation]`."""
    values: Annotated[tuple[Any, ...], Field(min_length=1)]
    """What it is tried with."""
    arms: tuple[Label, ...] = ()
    """Of which arms; empty: of all that have such a key."""


class SearchConfig(StrictModel):
    """Before the scenario runs, every arm is run with each combination of the values, and gets the best of them."""

    grid: Annotated[tuple[GridConfig, ...], Field(min_length=1)]
    seed: NonNegativeInt = 1_000_000
    """Under which the combinations are compared, on the held-out data of the result; none of `seeds`, whose runs the choice
    has not seen then."""

    def check(self, arms: Sequence[ArmConfig], seeds: Sequence[int]) -> None:
        """Raise ConfigError unless it fits the scenario's arms and seeds."""
        if self.seed in seeds:
            raise ConfigError(f"search.seed is {self.seed}, one of the seeds of the result: choose another")
        names = [arm.name for arm in arms]
        for searched in self.grid:
            section, dot, name = searched.key.partition(".")
            if section not in _SECTIONS or not dot or not name:
                raise ConfigError(
                    f"search.grid: {searched.key!r} is no key of {', '.join(_SECTIONS)}: write training.learning_rate"
                )
            for arm in searched.arms:
                if arm not in names:
                    raise ConfigError(f"search.grid: {arm!r} is none of the arms {', '.join(names)}")
                if not _applies(searched, arms[names.index(arm)]):
                    raise ConfigError(f"search.grid: the arm {arm!r} has no {searched.key}")
            if searched.key == "training.num_steps":
                raise ConfigError(
                    "search.grid: training.num_steps is what a result costs, and not searched: remove it"
                )
        for each in arms:
            keys = [searched.key for searched in self.of_arm(each)]
            for key in keys:
                if keys.count(key) > 1:
                    raise ConfigError(
                        f"search.grid has {key} twice for the arm {each.name!r}: list all its values in one table"
                    )
        num_trials = sum(len(combinations(self, arm)) for arm in arms)
        if num_trials > MAX_TRIALS:
            raise ConfigError(
                f"search.grid makes {num_trials} trials, more than {MAX_TRIALS}: list fewer values"
            )

    def of_arm(self, arm: ArmConfig) -> list[GridConfig]:
        """What is searched for `arm`."""
        return [one for one in self.grid if _applies(one, arm) and (not one.arms or arm.name in one.arms)]


def _applies(searched: GridConfig, arm: ArmConfig) -> bool:
    return not searched.key.startswith("codistillation.") or "codistillation" in arm.of_kind.keys


def combinations(search: SearchConfig, arm: ArmConfig) -> list[Settings]:
    """What `arm` is tried with: each combination of the values of the keys that are searched for it."""
    searched = search.of_arm(arm)
    if not searched:
        return []
    keys = [one.key for one in searched]
    return [
        dict(zip(keys, values, strict=True)) for values in itertools.product(*(o.values for o in searched))
    ]


def with_settings(arm: ArmConfig, settings: Mapping[str, Any]) -> ArmConfig:
    """`arm` with these keys set, whatever they were. Raises ConfigError for what it cannot have."""
    table = arm.model_dump(mode="json", exclude_unset=True)
    for key, value in settings.items():
        section, _, name = key.partition(".")
        table[section] = table.get(section, {}) | {name: value}
    return parse_model(ArmConfig, table, source=f"the arm {arm.name!r}")


def trial_arms(
    search: SearchConfig, arms: Sequence[ArmConfig]
) -> dict[str, tuple[ArmConfig, Settings, ArmConfig]]:
    """All trials by name: the arm as it is tried, its settings, and the arm that these are for."""
    trials = {}
    for position, arm in enumerate(arms):
        for index, settings in enumerate(combinations(search, arm)):
            name = f"{position}.{index}-{arm.name[:30]}"
            tried = with_settings(arm, settings).model_copy(update={"name": name})
            trials[name] = tried, settings, arm
    return trials
