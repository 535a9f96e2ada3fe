"""A little of what `make soak` does for hours: kill -9 at random moments, and exchanges without end."""

from __future__ import annotations

import pytest
from integration.conftest import Sites
from integration.endurance import PARTS, SLACK, Sample, exchange_for_long, require_level, survive_kills


async def test_five_kills_in_a_ring(sites: Sites) -> None:
    kills = await survive_kills(sites, 5, seed=0)
    assert kills.total() == 5 and kills.keys() <= set(PARTS)


async def test_exchanges_without_end_take_no_more_and_no_more(sites: Sites) -> None:
    told: list[str] = []
    await exchange_for_long(sites, 24, exchanges_per_s=8.0, tell=told.append)
    assert len(told) == 24 and told[-1].startswith("24 exchanges: ")


@pytest.mark.parametrize("what", SLACK)
def test_growth_is_noticed(what: str) -> None:
    level = Sample(10**9, 100, 10**7)
    require_level("berlin", [level] * 30)
    growing = [
        Sample(**(vars(level) | {what: round(getattr(level, what) * (1 + step / 30))})) for step in range(30)
    ]
    with pytest.raises(AssertionError, match=f"{what} of berlin grows"):
        require_level("berlin", growing)
