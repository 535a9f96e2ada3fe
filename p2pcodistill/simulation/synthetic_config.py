"""What a scenario without training pretends to train, and what it is told in place of a training scenario's tables."""

from __future__ import annotations

from typing import Any

from p2pcodistill.errors import ConfigError
from p2pcodistill.strict import NonNegativeInt, PositiveFloat, PositiveInt, StrictModel

MAX_SITES = 1000
SYNTHETIC_ARM = "synthetic"
RESULT_FILE = "synthetic.json"
"""What a job leaves in the folder of its run."""
TRAINING_TABLES = ("arms", "data", "group", "task", "training", "codistillation", "frames")
"""What a scenario without training has no use for."""


class SyntheticConfig(StrictModel):
    """Checkpoints that are only as large as a model's: to study a topology and its links with up to a thousand sites."""

    num_parameters: PositiveInt = 100_000_000
    """Of the model that is pretended; each is two bytes of raw fp16."""
    keyframe_ratio: PositiveFloat = 1.6
    """How many times smaller than raw fp16 a keyframe is."""
    delta_ratio: PositiveFloat = 20.0
    """How many times smaller than raw fp16 a delta frame is."""
    keyframe_bytes: PositiveInt | None = None
    """Size of a keyframe, in place of `keyframe_ratio`."""
    delta_bytes: PositiveInt | None = None
    """Size of a delta frame, in place of `delta_ratio`."""
    num_steps: PositiveInt = 2000
    """Updates of the whole run, each of `virtual.step_time_s`."""
    exchange_interval_steps: PositiveInt = 50
    """Steps between two published checkpoints."""
    burn_in_steps: NonNegativeInt = 0
    """Nothing is published before the first multiple of the interval after so many steps. (Sites that train publish at the
    end of burn-in, too: here all versions are one interval apart.)"""
    event_logs: bool = False
    """Write each site's `events.jsonl`, as its node would; a thousand sites make some hundred megabytes."""

    @property
    def first_step(self) -> int:
        """After how many steps the first checkpoint is published."""
        interval_steps = self.exchange_interval_steps
        return max(interval_steps, -(-self.burn_in_steps // interval_steps) * interval_steps)

    @property
    def num_versions(self) -> int:
        """How many checkpoints each site publishes."""
        return (self.num_steps - self.first_step) // self.exchange_interval_steps + 1

    def require_versions(self) -> None:
        """Raise ConfigError where nothing is ever published."""
        if self.num_versions < 1:
            raise ConfigError(
                f"synthetic.num_steps: {self.num_steps} steps end before the first exchange, at step {self.first_step}: "
                "set more steps, a shorter exchange_interval_steps or a shorter burn_in_steps"
            )


def complete_table(table: dict[str, Any]) -> dict[str, Any]:
    """`table`, a scenario's, with what follows from `num_sites` and from `[synthetic]`.

    Raises ConfigError for what such a scenario cannot have. A `num_sites` that makes no sense is the model's to refuse.
    """
    num_sites = table.get("num_sites")
    if isinstance(num_sites, int) and 2 <= num_sites <= MAX_SITES:
        if "sites" in table:
            raise ConfigError("num_sites and [[sites]] exclude each other: remove one of them")
        table = table | {"sites": [{"name": name} for name in numbered_sites(num_sites)]}
    if "synthetic" in table:
        for key in TRAINING_TABLES:
            if key in table:
                raise ConfigError(f"nothing is trained where there is [synthetic]: remove {key!r}")
        if table.get("mode") != "virtual":
            raise ConfigError('[synthetic] is for mode = "virtual": set that, or remove the table')
        table = table | {"arms": [{"name": SYNTHETIC_ARM, "kind": "codistilled"}]}
    return table


def numbered_sites(num_sites: int) -> list[str]:
    """The names of so many sites that have no others, as in `ring:8`."""
    return [str(index) for index in range(num_sites)]
