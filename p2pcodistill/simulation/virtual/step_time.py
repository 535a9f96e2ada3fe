"""How long updates take in virtual time: always the same, or with a tail, in which some take much longer than most.

An update takes longer for each teacher that runs in it. Of workers that wait for each other, the slowest decides: what a
tail costs grows with their number (Anil et al. 2018, figure 1b).
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

    def __call__(self, site: str, *, num_teachers: int = 0) -> float:
        """The duration of the next update of `site`, with the forward passes of so many teachers in it."""
        return self._draw_s(site) * (1 + self._config.teacher_time_ratio * num_teachers)

    def _draw_s(self, site: str) -> float:
        least_s, spread = self._config.step_time_s, self._config.step_time_spread
        if self._config.step_time_tail == "none":
            return least_s
        if site not in self._random:
            self._random[site] = random.Random(f"p2pcodistill-step-time/{self._seed}/{site}")
        draws = self._random[site]
        if self._config.step_time_tail == "lognormal":
            return least_s * math.exp(spread * max(draws.gauss(0, 1) for _ in range(self._num_workers)))
        return least_s * (1 + spread * max(draws.expovariate(1) for _ in range(self._num_workers)))
