"""How far behind a teacher is, and what follows from that: limits, and weights by age.

Of the version of a teacher that is in use here,

- the *staleness* is the number of steps from it to the newest version that its origin is known to have announced. It grows
  while transfers do not keep up. An origin that went back behind the version in use (it restarted) leaves it at 0;
- the *age* is the number of seconds since that version was announced here. It also grows while nothing is heard of the
  origin. A teacher that publishes rarely gets old in between, and so does one that has finished: a limit should be longer
  than that takes.

Neither is the lag (the student's step minus the teacher's): a slow site is no sinner.

Ages are counted on the site's own monotonic clocks, and nobody's wall clock is asked: by rank 0, from the round of agreement
in which it first knew of that version or of a newer one, and by the node, which outlives the ranks and tells a new launch
what it has heard; the larger age counts. Rank 0's are kept in training checkpoints and go on from there, so that no restart
makes a teacher young; the time in which the node is down does not count, for nobody could hear of anything newer. All ranks
are told the ages of one and the same moment, and so decide alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from p2pcodistill.checkpoint.manifest import Version
from p2pcodistill.config import CodistillationConfig

MAX_HEARD_VERSIONS = 256


@dataclass(frozen=True, slots=True)
class Freshness:
    """Of a teacher's version in use."""

    staleness_steps: int = 0
    age_s: float = 0.0


def staleness_steps(newest: Version, in_use: Version) -> int:
    """Steps from the version in use to the newest one announced; never negative."""
    return max(0, newest.step - in_use.step)


def find_excess(config: CodistillationConfig, freshness: Freshness) -> str | None:
    """Which limit a teacher is over, in words; None while it is within all of them."""
    stale, age_s = freshness.staleness_steps, freshness.age_s
    if config.max_staleness_steps is not None and stale > config.max_staleness_steps:
        return f"{stale} steps behind what it announced, and the limit is {config.max_staleness_steps}"
    if config.max_age_s is not None and age_s > config.max_age_s:
        return f"{age_s:.0f} s old, and the limit is {config.max_age_s:g} s"
    return None


def weigh_by_age(
    weights: Mapping[str, float], ages_s: Mapping[str, float], half_life_s: float | None
) -> dict[str, float]:
    """The weights of those teachers who have an age, halved for each half-life of it; they add up to 1.

    In the order of `weights`, which are positive. Only differences of age count, so a lone teacher has all the weight.
    """
    weighed = {name: weight for name, weight in weights.items() if name in ages_s}
    if half_life_s is not None:
        youngest_s = min((ages_s[name] for name in weighed), default=0.0)
        for name in weighed:
            weighed[name] *= 0.5 ** ((ages_s[name] - youngest_s) / half_life_s)
    total = sum(weighed.values())
    return {name: weight / total for name, weight in weighed.items()}


class Limits:
    """How fresh the teachers are, and which of their versions are over a limit; the same on every rank."""

    def __init__(self, config: CodistillationConfig) -> None:
        self._config = config
        self._ages_s: dict[str, float] = {}
        self._expired: dict[str, Version] = {}

    @property
    def expired(self) -> frozenset[str]:
        """The teachers that are over a limit."""
        return frozenset(self._expired)

    def age_s(self, teacher: str) -> float:
        """The teacher's age as last noted."""
        return self._ages_s.get(teacher, 0.0)

    def note(
        self, teacher: str, version: Version, freshness: Freshness, *, is_revoked: bool = False
    ) -> str | None:
        """What is known of the version in use now; if it is over a limit since now, why. One that `is_revoked` always is."""
        self._ages_s[teacher] = freshness.age_s
        why = "its key is revoked at this site" if is_revoked else find_excess(self._config, freshness)
        is_news = self._expired.get(teacher) != version
        if why is None:
            self._expired.pop(teacher, None)
        else:
            self._expired[teacher] = version
        return why if is_news else None


_NOTHING: Mapping[str, Mapping[Version, float]] = MappingProxyType({})


class AgeClock:
    """A memory of when which version was heard of. `clock` is monotonic, in seconds.

    Of each teacher, at most `max_versions` are remembered.
    """

    def __init__(self, clock: Callable[[], float], *, max_versions: int = MAX_HEARD_VERSIONS) -> None:
        self._clock = clock
        self._max_versions = max_versions
        # Per teacher, versions in their order, each with the time since when it is known. A version that was overtaken
        # between two looks counts as known since the later one.
        self._heard: dict[str, list[tuple[Version, float]]] = {}

    def hear(
        self, newest: Mapping[str, Version], known_ages_s: Mapping[str, Mapping[Version, float]] = _NOTHING
    ) -> None:
        """The newest version of each teacher that is known now; and what someone else, who counts too, says of ages."""
        now_s = self._clock()
        for teacher, version in newest.items():
            heard = self._heard.setdefault(teacher, [])
            if not heard or version > heard[-1][0]:
                heard.append((version, now_s))
                self._thin_out(heard)
        for teacher, ages_s in known_ages_s.items():
            self._merge(teacher, {version: now_s - age_s for version, age_s in ages_s.items()})

    def _merge(self, teacher: str, times_s: Mapping[Version, float]) -> None:
        known_s = dict(self._heard.get(teacher, ()))
        for version, time_s in times_s.items():
            known_s[version] = min(time_s, known_s.get(version, time_s))
        self._heard[teacher] = sorted(known_s.items())
        self._thin_out(self._heard[teacher])

    def _thin_out(self, heard: list[tuple[Version, float]]) -> None:
        while len(heard) > self._max_versions:  # the first one is in use, and the last one the newest
            del heard[1:-1:2]

    def age_s(self, teacher: str, version: Version | None) -> float:
        """Seconds since that version was announced; 0 for one that nothing is known of."""
        if version is None:
            return 0.0
        # Whoever knew of a newer one could have known of this one.
        times_s = [time_s for heard, time_s in self._heard.get(teacher, ()) if heard >= version]
        return self._clock() - min(times_s) if times_s else 0.0

    def ages_s(self, teacher: str) -> dict[Version, float]:
        """All that is remembered of a teacher, oldest version first."""
        now_s = self._clock()
        return {version: now_s - time_s for version, time_s in self._heard.get(teacher, ())}

    def forget(self, teacher: str, before: Version) -> None:
        """Versions before this one will not be asked for any more."""
        self._heard[teacher] = [
            (heard, since_s) for heard, since_s in self._heard.get(teacher, ()) if heard >= before
        ]

    def state_dict(self) -> dict[str, Any]:
        """Plain data: per teacher, (incarnation, step, age in seconds) of what was heard."""
        return {
            teacher: [[*version, age_s] for version, age_s in self.ages_s(teacher).items()]
            for teacher in self._heard
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from `state`, with the ages that were then."""
        now_s = self._clock()
        self._heard = {
            teacher: [(Version(incarnation, step), now_s - age_s) for incarnation, step, age_s in heard]
            for teacher, heard in state.items()
        }
