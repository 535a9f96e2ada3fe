"""What one peer has been asked for: credit that follows the link, and deadlines.

Credit is counted in bytes: at most a window's worth is asked of a peer and not yet received, so that nothing queues up
anywhere. The window follows what the link shows. Every chunk tells how much arrived between its want and itself, hence the
rate at which the link delivers, and how long that took, hence its round trip. Their product is what the link itself holds;
a little more than twice that keeps it full while the next want travels, and little waits in front of it. So the window of a
long, fat link grows with every round trip until it is filled, and that of a thin one stays at two chunks.

What waits in front of the link lengthens the round trips that are seen. So now and then the window is made smaller for one
of them, which then shows what the link is like without a queue; without that, each would make the next look longer.
"""

from __future__ import annotations

from dataclasses import dataclass, field

MAX_PATIENCE_FACTOR = 32
"""Each stall in a row doubles the time until the next is declared, up to this many stall timeouts."""
SLOW_FACTOR = 12
"""For so many stall timeouts a peer that let a request stall counts as slow, unless it sends what it is asked for."""
MIN_WINDOW_CHUNKS = 2
"""One that arrives while the want for the next one travels."""
FIRST_WINDOW_BYTES = 512 << 10
"""The least until so much has arrived: what the first chunks tell is how few of them were asked for."""
_PRODUCTS = 2.25
"""Bandwidth-delay products in a window: more is asked for while at least one of them is under way."""
_PROBE_PRODUCTS = 0.75
_PROBE_INTERVAL_S = 30.0
_MIN_PROBE_INTERVAL_ROUND_TRIPS = 40
_EARLY_PROBE_S = 5.0
_LONGER_FACTOR = 3.0
"""Round trips that are so much longer than before are not of this window's own making: the way has changed."""
_RATE_MEMORY_S = 10.0
_MIN_ROUND_TRIP_S = 0.02
"""Between neighbours the peer itself takes longer than the wire, and a queue of so little harms nobody."""
_MIN_TIME_S = 1e-6


@dataclass(slots=True)
class _Asked:
    """A chunk under way. When it was asked for, `num_delivered_bytes` had arrived, the last of them at `delivered_s` (the
    same moment if nothing was under way then). `of_probe`: it was asked for while the window was small."""

    num_bytes: int
    asked_s: float
    num_delivered_bytes: int
    delivered_s: float
    of_probe: bool


@dataclass(slots=True)
class _Extreme:
    """The least (or greatest) of the values seen since the turn before the last one."""

    is_greatest: bool
    now: float | None = None
    before: float | None = None

    def see(self, value: float) -> None:
        self.now = self._better(self.now, value)

    def turn(self) -> None:
        """What was seen before the last turn is forgotten."""
        self.before, self.now = self.now, None

    @property
    def value(self) -> float | None:
        """The extreme; None if nothing was seen."""
        return self.before if self.now is None else self._better(self.before, self.now)

    def _better(self, old: float | None, new: float) -> float:
        if old is None:
            return new
        return max(old, new) if self.is_greatest else min(old, new)


@dataclass(slots=True)
class LinkEstimate:
    """What bytes under way show of the link: the rate at which it delivers, and its round trip without a queue."""

    _transfer_s: _Extreme = field(default_factory=lambda: _Extreme(is_greatest=False))
    _answer_s: _Extreme = field(default_factory=lambda: _Extreme(is_greatest=False))
    _rate_bytes_s: _Extreme = field(default_factory=lambda: _Extreme(is_greatest=True))
    _rate_turned_s: float | None = None

    def observe(self, round_trip_s: float, num_bytes: int, duration_s: float, now_s: float) -> None:
        """Something arrived `round_trip_s` after it was asked for or sent, and with it `num_bytes` within `duration_s`."""
        self._transfer_s.see(max(round_trip_s, _MIN_TIME_S))
        if self._rate_turned_s is None:
            self._rate_turned_s = now_s
        elif now_s - self._rate_turned_s >= _RATE_MEMORY_S / 2:
            self._rate_turned_s = now_s
            self._rate_bytes_s.turn()
        self._rate_bytes_s.see(num_bytes / max(duration_s, _MIN_TIME_S))

    def observe_rtt(self, round_trip_s: float) -> None:
        """Something small was answered after so long."""
        self._answer_s.see(round_trip_s)

    def forget_rtt(self) -> None:
        """Round trips that were seen before the last call of this are of no interest any more."""
        self._transfer_s.turn()
        self._answer_s.turn()

    @property
    def rate_bytes_s(self) -> float | None:
        """The best rate of the last few seconds in which anything arrived; None if nothing ever did."""
        return self._rate_bytes_s.value

    @property
    def round_trip_s(self) -> float | None:
        """The shortest round trip of late; None if there was none."""
        seen_s = [s for s in (self._transfer_s.value, self._answer_s.value) if s is not None]
        return min(seen_s, default=None)

    @property
    def is_longer(self) -> bool:
        """Whether all round trips since the last `forget_rtt` were far longer than those before it."""
        before_s, now_s = self._transfer_s.before, self._transfer_s.now
        return before_s is not None and now_s is not None and now_s > _LONGER_FACTOR * before_s

    @property
    def product_bytes(self) -> float:
        """The bandwidth-delay product; 0 while nothing has arrived.

        By the shortest transfer and not the shortest answer: what is transferred is there when its last byte is.
        """
        round_trip_s = max(self._transfer_s.value or 0.0, _MIN_ROUND_TRIP_S)
        return (self.rate_bytes_s or 0.0) * round_trip_s


class Window:
    """What was asked of one peer in this session and has not arrived: at most `window_bytes`, less on a thinner link."""

    def __init__(
        self, *, window_bytes: int, stall_timeout_s: float, link: LinkEstimate | None = None
    ) -> None:
        """`link` is what earlier sessions with the peer showed."""
        self.patience_s = stall_timeout_s
        """How long the peer may stay silent. It follows what the link shows: asking a slow one again too early would
        only add to its queue."""
        self._stall_timeout_s = stall_timeout_s
        self._max_bytes = window_bytes
        self._asked: dict[tuple[str, int], _Asked] = {}
        self._num_asked_bytes = 0
        self._num_delivered_bytes = 0
        self._delivered_s = 0.0
        self._max_chunk_bytes = 0
        self._progress_s: float | None = None
        self._deadline_from_s = 0.0
        self._slow_until_s = float("-inf")
        self.link = link or LinkEstimate()
        """What chunks show."""
        self._is_probing = False
        self._probed_s: float | None = None

    @property
    def window_bytes(self) -> int:
        """How much may be under way now."""
        product_bytes = self.link.product_bytes
        if self._is_probing:
            window_bytes = max(self._max_chunk_bytes, round(_PROBE_PRODUCTS * product_bytes))
        else:
            window_bytes = max(MIN_WINDOW_CHUNKS * self._max_chunk_bytes, round(_PRODUCTS * product_bytes))
        if self._num_delivered_bytes < FIRST_WINDOW_BYTES:
            window_bytes = max(window_bytes, FIRST_WINDOW_BYTES)
        return min(window_bytes, self._max_bytes)

    @property
    def credit_bytes(self) -> int:
        """How much more may be asked for. With nothing under way it is enough for any chunk: its size is yet to be seen."""
        if not self._asked:
            return self._max_bytes
        return self.window_bytes - self._num_asked_bytes

    @property
    def num_asked_bytes(self) -> int:
        """How much is under way."""
        return self._num_asked_bytes

    @property
    def is_low(self) -> bool:
        """Whether it is time to ask for more: at least half the window is free, so that wants are few and large."""
        return not self._asked or 2 * self._num_asked_bytes <= self.window_bytes

    def has_asked(self, frame_id: str) -> bool:
        """Whether anything of this frame is under way from the peer."""
        return any(asked == frame_id for asked, _ in self._asked)

    def observe_rtt(self, rtt_s: float) -> None:
        """A message of this session was answered after `rtt_s`."""
        self.link.observe_rtt(rtt_s)

    def ask(self, frame_id: str, index: int, num_bytes: int, now_s: float) -> None:
        """Spend credit on a chunk. There must be enough of it."""
        assert num_bytes <= self.credit_bytes
        if self._progress_s is None:
            self._progress_s = self._deadline_from_s = now_s
        if not self._asked:
            self._delivered_s = now_s
        asked = _Asked(num_bytes, now_s, self._num_delivered_bytes, self._delivered_s, self._is_probing)
        self._asked[frame_id, index] = asked
        self._num_asked_bytes += num_bytes
        self._max_chunk_bytes = max(self._max_chunk_bytes, num_bytes)

    def receive(self, frame_id: str, index: int, now_s: float) -> bool:
        """A chunk arrived: its credit is back, and the deadline moves. False, and neither, when it was not asked for."""
        asked = self._asked.pop((frame_id, index), None)
        if asked is None:
            return False
        self._slow_until_s = float("-inf")
        if self._progress_s is not None:
            self.patience_s = max(self._stall_timeout_s, 2 * (now_s - self._progress_s))
            self._progress_s = self._deadline_from_s = now_s
        self._num_asked_bytes -= asked.num_bytes
        self._num_delivered_bytes += asked.num_bytes
        num_bytes = self._num_delivered_bytes - asked.num_delivered_bytes
        self.link.observe(now_s - asked.asked_s, num_bytes, now_s - asked.delivered_s, now_s)
        self._delivered_s = now_s
        self._probe(asked, now_s)
        return True

    def is_stalled(self, now_s: float) -> bool:
        """Whether something is under way and nothing has arrived for too long."""
        return bool(self._asked) and now_s - self._deadline_from_s >= self.patience_s

    def is_slow(self, now_s: float) -> bool:
        """Whether the peer let a request stall of late, and has sent nothing since then that it was asked for."""
        return now_s < self._slow_until_s

    def stall(self, now_s: float, *, is_only_source: bool = True) -> None:
        """Give what is under way up for lost (see `void`), and, if nobody else has it, be more patient next time."""
        if is_only_source:
            longest_s = MAX_PATIENCE_FACTOR * self._stall_timeout_s
            self.patience_s = max(self.patience_s, min(2 * self.patience_s, longest_s))
        self._deadline_from_s = now_s
        self._slow_until_s = now_s + SLOW_FACTOR * self._stall_timeout_s

    def void(self, frame_id: str | None = None) -> list[tuple[str, int]]:
        """Forget what is under way, of one frame or of all; credit returns. The (frame, index) pairs, as asked."""
        voided = [key for key in self._asked if frame_id in (None, key[0])]
        for key in voided:
            self._num_asked_bytes -= self._asked.pop(key).num_bytes
        return voided

    def rest(self) -> None:
        """Nothing more is to be asked for now; with nothing under way there is no deadline."""
        if not self._asked:
            self._progress_s = None

    def _probe(self, arrived: _Asked, now_s: float) -> None:
        """Make the window small when the interval is over, and large again when a chunk that was asked then has arrived."""
        if self._probed_s is None:
            self._probed_s = now_s
        elif self._is_probing and arrived.of_probe:
            self._is_probing = False
            self._probed_s = now_s
            self.link.forget_rtt()
        elif not self._is_probing:
            least_s = _MIN_PROBE_INTERVAL_ROUND_TRIPS * (self.link.round_trip_s or 0.0)
            due_s = _EARLY_PROBE_S if self.link.is_longer else max(_PROBE_INTERVAL_S, least_s)
            self._is_probing = now_s - self._probed_s >= due_s
