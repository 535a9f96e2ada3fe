"""How knowledge spreads: when, and over how many sites, what one origin knew reached the others."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from p2pcodistill.simulation.virtual.knowledge import Knowledge, hops_of


@dataclass(frozen=True, slots=True)
class Arrival:
    """The first knowledge of an origin at a site: when it came, and over how many sites."""

    time_s: float
    num_hops: int


class SpreadTracker:
    """Takes note of the first that each member learns of each other; an `OnKnowledge` is `update`."""

    def __init__(self, members: tuple[str, ...]) -> None:
        self._members = members
        self._row = {member: index for index, member in enumerate(members)}
        num_members = len(members)
        # By site and origin. A site knows of itself without being told.
        self._times_s: npt.NDArray[np.float64] = np.full((num_members, num_members), np.inf)
        self._hops = np.zeros((num_members, num_members), np.uint8)
        np.fill_diagonal(self._times_s, 0.0)
        self._num_missing = [num_members - 1] * num_members

    def update(self, time_s: float, site: str, knowledge: Knowledge) -> None:
        """This has arrived at `site`."""
        row = self._row[site]
        if not self._num_missing[row]:
            return
        times_s = self._times_s[row]
        fresh = np.flatnonzero((knowledge != 0) & np.isinf(times_s))
        if len(fresh):
            times_s[fresh] = time_s
            self._hops[row, fresh] = hops_of(knowledge)[fresh]
            self._num_missing[row] -= len(fresh)

    @property
    def times_s(self) -> npt.NDArray[np.float64]:
        """When each site (row) first had knowledge of each origin (column), in member order; infinite where it has none."""
        return self._times_s.copy()

    @property
    def hops(self) -> npt.NDArray[np.uint8]:
        """Over how many sites that came, where it did."""
        return self._hops.copy()

    @property
    def known_ratio(self) -> float:
        """Of all pairs of a site and another, the share in which the one knows of the other."""
        num_pairs = len(self._num_missing) * (len(self._num_missing) - 1)
        return 1 - sum(self._num_missing) / num_pairs

    @property
    def is_complete(self) -> bool:
        """Whether everyone knows of everyone."""
        return not any(self._num_missing)

    @property
    def complete_s(self) -> float | None:
        """When everyone knew of everyone; None while that is not so."""
        return float(self._times_s.max()) if self.is_complete else None

    @property
    def max_hops(self) -> int:
        """The longest way that first knowledge has come."""
        return int(self._hops.max())

    def arrivals(self, origin: str) -> dict[str, Arrival]:
        """Of `origin`, at each site that it has reached, in member order."""
        column = self._row[origin]
        return {
            site: Arrival(float(self._times_s[row, column]), int(self._hops[row, column]))
            for site, row in self._row.items()
            if site != origin and np.isfinite(self._times_s[row, column])
        }
