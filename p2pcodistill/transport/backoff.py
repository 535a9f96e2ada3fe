"""How long to wait before the next dial: exponential back-off with full jitter.

Sites that lost each other at the same moment (a router that restarts) must not all come back at the same moment. So each
waits for a time drawn uniformly between nothing and a cap that doubles with every failure. ("Full jitter" is what AWS's
article on back-off calls it; of the kinds it compares, this one costs the least work.)
"""

from __future__ import annotations

import random


class Backoff:
    """The waits between attempts: the cap is `min_s` at first, and `max_s` in the end. `rng` draws them."""

    def __init__(self, min_s: float, max_s: float, rng: random.Random) -> None:
        self._min_s, self._max_s, self._rng = min_s, max_s, rng
        self._cap_s = min_s

    def reset(self) -> None:
        """An attempt succeeded."""
        self._cap_s = self._min_s

    def next_s(self) -> float:
        """How long to wait now."""
        wait_s = self._rng.uniform(0.0, self._cap_s)
        self._cap_s = min(2 * self._cap_s, self._max_s)
        return wait_s
