"""What `make soak` asks of sites that exchange for hours: that it would notice if they took ever more."""

from __future__ import annotations

import pytest
from integration.endurance import SLACK, Sample, require_level


@pytest.mark.parametrize("what", SLACK)
def test_growth_is_noticed(what: str) -> None:
    level = Sample(10**9, 100, 10**7)
    require_level("berlin", [level] * 30)
    growing = [
        Sample(**(vars(level) | {what: round(getattr(level, what) * (1 + step / 30))})) for step in range(30)
    ]
    with pytest.raises(AssertionError, match=f"{what} of berlin grows"):
        require_level("berlin", growing)
