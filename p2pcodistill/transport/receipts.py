"""How much bulk is on its way to a peer, and what its receipts show of the link.

A receiver says from time to time how many bytes of bulk payloads it has taken from a channel so far. So the sender knows
what is still queued somewhere, in this process, on the link or over there, bounds it, and measures what the link carries.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from p2pcodistill.errors import MalformedError
from p2pcodistill.gossip.window import LinkEstimate

MIN_UNDER_WAY_BYTES = 4 << 20
MAX_UNDER_WAY_BYTES = 64 << 20
_PRODUCTS = 4.0
"""Of the link's bandwidth-delay product. The credit that a well-behaved receiver gives stays below."""
RECEIPT_INTERVAL_S = 0.02
RECEIPT_INTERVAL_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _Sent:
    """A payload: how many bytes had been sent with it, and what the receipts had said when it was sent, the last of them at
    `received_s` (the same moment if nothing was under way then)."""

    num_sent_bytes: int
    sent_s: float
    num_received_bytes: int
    received_s: float


class Deliveries:
    """Bulk payloads sent on one channel. `link` is what this site knows of the link with that peer, whatever the channel."""

    def __init__(self, link: LinkEstimate) -> None:
        self._link = link
        self._num_sent_bytes = 0
        self._num_received_bytes = 0
        self._received_s = 0.0
        self._sent: deque[_Sent] = deque()

    @property
    def num_under_way_bytes(self) -> int:
        """What was sent and has no receipt."""
        return self._num_sent_bytes - self._num_received_bytes

    def has_room(self, num_bytes: int) -> bool:
        """Whether so much more may be sent; one payload always may."""
        most_bytes = min(max(MIN_UNDER_WAY_BYTES, _PRODUCTS * self._link.product_bytes), MAX_UNDER_WAY_BYTES)
        return self.num_under_way_bytes == 0 or self.num_under_way_bytes + num_bytes <= most_bytes

    def send(self, num_bytes: int, now_s: float) -> None:
        """A payload was sent."""
        if not self.num_under_way_bytes:
            self._received_s = now_s
        self._num_sent_bytes += num_bytes
        self._sent.append(_Sent(self._num_sent_bytes, now_s, self._num_received_bytes, self._received_s))

    def acknowledge(self, num_received_bytes: int, now_s: float) -> None:
        """The peer has received so much. Raises MalformedError for what cannot be."""
        if not self._num_received_bytes <= num_received_bytes <= self._num_sent_bytes:
            raise MalformedError(
                f"a receipt for {num_received_bytes} bytes, of {self._num_sent_bytes} that were sent"
            )
        self._num_received_bytes = num_received_bytes
        last = None
        while self._sent and self._sent[0].num_sent_bytes <= num_received_bytes:
            last = self._sent.popleft()
        if last is not None:
            num_bytes = num_received_bytes - last.num_received_bytes
            self._link.observe(now_s - last.sent_s, num_bytes, now_s - last.received_s, now_s)
        self._received_s = now_s


class Receipts:
    """Bulk payloads received on one channel, and when to tell their sender."""

    def __init__(self) -> None:
        self._num_bytes = 0
        self._num_told_bytes = 0
        self._told_s = float("-inf")

    def receive(self, num_bytes: int) -> None:
        """A payload has arrived."""
        self._num_bytes += num_bytes

    def wait_s(self, now_s: float) -> float | None:
        """How long the next receipt may wait; None: there is nothing to tell."""
        num_untold_bytes = self._num_bytes - self._num_told_bytes
        if not num_untold_bytes:
            return None
        if num_untold_bytes >= RECEIPT_INTERVAL_BYTES:
            return 0.0
        return max(0.0, self._told_s + RECEIPT_INTERVAL_S - now_s)

    @property
    def num_bytes(self) -> int:
        """The number for a receipt that is sent now."""
        return self._num_bytes

    def tell(self, now_s: float) -> None:
        """That receipt was sent."""
        self._num_told_bytes, self._told_s = self._num_bytes, now_s
