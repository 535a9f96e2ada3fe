"""Which faults of a scenario are due, and whom partitions separate. Pure: real processes and virtual time both ask here."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from p2pcodistill.simulation.fault_config import FaultConfig
from p2pcodistill.telemetry.simulation_events import FaultInjected

_OF_ANY_SITE = frozenset({"restart", "replace", "heal", "join"})
"""Whose `at_step` is the step of whichever site is first: their own sites may be down, or know nothing."""
_STARTS = frozenset({"join", "restart", "replace"})
_ENDS = frozenset({"kill", "leave", "corrupt", "hostile"})
_OF_SURROUNDINGS = frozenset({"partition", "black-hole", "heal"})


class FaultSchedule:
    """The faults of one arm, each handed out once, when it is due.

    Faults of one site keep the order of the file: none is due before those that are listed above it.
    """

    def __init__(self, faults: Sequence[FaultConfig]) -> None:
        self._pending = list(faults)

    @property
    def pending(self) -> tuple[FaultConfig, ...]:
        """What has not been handed out yet."""
        return tuple(self._pending)

    def pop_due(self, elapsed_s: float, steps: Mapping[str, int]) -> FaultConfig | None:
        """The first fault that is due, or None.

        `elapsed_s` counts from the start of the arm, `steps` has the most steps that each site has ever completed; a site
        that has not begun may be left out.
        """
        waiting: set[str] = set()
        for index, fault in enumerate(self._pending):
            if waiting.isdisjoint(fault.sites) and _is_due(fault, elapsed_s, steps):
                return self._pending.pop(index)
            waiting.update(fault.sites)
        return None

    @property
    def next_s(self) -> float | None:
        """When the next of those that wait for a time is due, seconds from the start of the arm; None if there is none."""
        return min((fault.at_s for fault in self._pending if fault.at_s is not None), default=None)

    def starts(self, site: str) -> bool:
        """Whether `site` is started by a fault that is still to come."""
        return any(fault.kind in _STARTS and site in fault.sites for fault in self._pending)


def _is_due(fault: FaultConfig, elapsed_s: float, steps: Mapping[str, int]) -> bool:
    if fault.at_s is not None:
        return elapsed_s >= fault.at_s
    assert fault.at_step is not None
    sites: Collection[str] = steps if fault.kind in _OF_ANY_SITE else fault.sites
    return max((steps.get(site, 0) for site in sites), default=0) >= fault.at_step


def joiners(faults: Sequence[FaultConfig]) -> frozenset[str]:
    """The sites that are not there from the start."""
    return frozenset(site for fault in faults if fault.kind == "join" for site in fault.sites)


def absentees(faults: Sequence[FaultConfig]) -> frozenset[str]:
    """The sites that go, or turn bad, and do not come back, so that nobody expects them to finish."""
    is_gone: dict[str, bool] = {}
    for fault in faults:
        if fault.kind in _ENDS | _STARTS:
            is_gone |= dict.fromkeys(fault.sites, fault.kind in _ENDS)
    return frozenset(site for site, gone in is_gone.items() if gone)


def afflicted(faults: Sequence[FaultConfig]) -> frozenset[str]:
    """The sites with a fault of their own: not of what is between them and others."""
    return frozenset(site for fault in faults if fault.kind not in _OF_SURROUNDINGS for site in fault.sites)


def told(fault: FaultConfig, site: str, step: int) -> FaultInjected:
    """What the simulator's log says when the fault happens to `site`, which has completed `step` steps."""
    return FaultInjected(site, fault.kind, step, fault.factor, fault.offset_s, fault.does)


def impostor_of(site: str) -> str:
    """What the second machine with the identity of `site` is called by the simulation, and its run folder."""
    return f"{site}-impostor"


class Partitions:
    """Who is cut off from whom. The sites of one partition stay connected with each other."""

    def __init__(self) -> None:
        self._parts: list[tuple[set[str], frozenset[str]]] = []

    def cut_off(self, sites: Collection[str], from_sites: Collection[str] = ()) -> None:
        """Separate `sites` from `from_sites`; from all others if these are none."""
        self._parts.append((set(sites), frozenset(from_sites)))

    def heal(self, sites: Collection[str]) -> None:
        """Have `sites` connected again with all that are not cut off themselves."""
        for part, _ in self._parts:
            part.difference_update(sites)

    def separate(self, first: str, second: str) -> bool:
        """Whether nothing travels between the two sites now."""
        for part, others in self._parts:
            for inner, outer in ((first, second), (second, first)):
                if inner in part and outer not in part and (not others or outer in others):
                    return True
        return False
