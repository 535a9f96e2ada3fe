"""What the connections between sites carry: `[[links]]` of a scenario, or of an arm."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from p2pcodistill.errors import ConfigError
from p2pcodistill.strict import NonNegativeFloat, PositiveFloat, SiteName, StrictModel

SitePair = Annotated[tuple[SiteName, ...], Field(min_length=2, max_length=2)]


class LinkConfig(StrictModel):
    """What the connection between two sites can carry, in each direction."""

    between: SitePair | Literal["all"]
    """The two sites, or `"all"`: what each link carries that neither has a table of its own nor attributes in the topology's
    file."""
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
    max_upload_mbit: PositiveFloat | None = None
    """What each of the two nodes sends to the other at most, as in a node's file; left out: no cap."""

    @property
    def name(self) -> str:
        """For messages."""
        return "all" if self.between == "all" else " and ".join(sorted(self.between))


def check_links(links: Sequence[LinkConfig], sites: Sequence[str]) -> None:
    """Raise ConfigError for a link that is listed twice, or with a site that is none of `sites`."""
    names = [link.name for link in links]
    for link in links:
        if names.count(link.name) > 1:
            raise ConfigError(f"the link between {link.name!r} is listed twice")
        for site in () if link.between == "all" else link.between:
            if site not in sites:
                raise ConfigError(f"{site!r} has a link, but is none of the sites {', '.join(sites)}")
