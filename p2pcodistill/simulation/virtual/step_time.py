"""How long updates take in virtual time: always the same, or with a tail, in which some take much longer than most.

Of workers that wait for each other, the slowest decides: what a tail costs grows with their number (Anil et al. 2018,
figure 1b).
"""

from __future__ import annotations

import math
import random

from p2pcodistill.simulation.scenario_tables import VirtualConfig


class StepTimes:
    """Draws durations: called with a site's name, that of its next update in seconds, the longest of `num_workers`.

    Each site draws from a sequence of its own, which `seed` and its name decide.
    """

    def __init__(self, config: VirtualConfig, *, seed: int, num_workers: int = 1) -> None:
        self._config, self._seed, self._num_workers = config, seed, num_workers
        self._random: dict[str, random.Random] = {}

    def __call__(self, site: str) -> float:
        """The duration of the next update of `site`."""
        least_s, spread = self._config.step_time_s, self._config.step_time_spread
        if self._config.step_time_tail == "none":
            return least_s
        if site not in self._random:
            self._random[site] = random.Random(f"p2pcodistill-step-time/{self._seed}/{site}")
        draws = self._random[site]
        if self._config.step_time_tail == "lognormal":
            return least_s * math.exp(spread * max(draws.gauss(0, 1) for _ in range(self._num_workers)))
        return least_s * (1 + spread * max(draws.expovariate(1) for _ in range(self._num_workers)))
